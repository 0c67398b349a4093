"""The rules of the loss: who is a candidate of a row, who is one of its positives, and who is dropped.

A rule is a function of the batch, never of the worker. The arithmetic on what they leave is in loss.py.

A global batch's texts stand in one table: the rows' positives, their further positives, all hard negatives, and last
the anchors. What an anchor is scored against is then one piece of it, with or without the other anchors.
"""

# Axes:  g rows of the global batch   b rows of one block    u unique texts   n hard negatives of all rows
#        m further positives, q of a row at most   t texts of the table   k pairs   c candidates of one part

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gist_dist.config import LossConfig
from gist_dist.core.device import sent

PARTS = ("ap", "aa", "pp", "an")
"""The blocks of similarities: anchor-positive, anchor-anchor, positive-positive, anchor-negative."""

TIE = 2e-6  # rounding and exact ties never count as closer: scores come from fp32 products of fp16-rounded embeddings
SLICES = {"cpu": 1024, "cuda": 1 << 20}
"""Candidates whose guide scores, masks and gradients are worked on at a time, by device: a CPU's stay in its cache;
a GPU is given all at once, since it would wait for the launches."""
LEAST_ROWS = {"cpu": 64, "cuda": 1024}
"""Fewest rows of a block, where the budget allows: smaller ones leave a GPU waiting for launches."""


@dataclass(frozen=True)
class BatchIndex:
    """The rows of a global batch, as positions in its unique texts."""

    anchors: Int[Tensor, "g"]
    positives: Int[Tensor, "g"]
    negatives: Int[Tensor, "n"]
    """Every hard negative of every row: each is a candidate of all rows."""
    identity: Int[Tensor, "u"]
    """Equal for texts that the student can't tell apart: the same token ids."""
    negative_rows: Int[Tensor, "n"] | None = None
    """The row that each hard negative belongs to, ascending; None where no rule asks."""
    more_positives: Int[Tensor, "m"] | None = None
    """Further positives of rows that have several."""
    further_positives: Int[Tensor, "g q"] | None = None
    """Their places in the table, by row; -1 where a row has fewer."""
    known_rows: Int[Tensor, "k"] | None = None
    known_places: Int[Tensor, "k"] | None = None
    """A row, ascending, and a place in the table whose text is known to be no negative of it. On the host."""
    groups: Int[Tensor, "u"] | None = None
    """Texts of the same group are positives of each other: they have one label, or are in one cluster."""
    sections: tuple[tuple[range, LossConfig], ...] = ()
    """Rows with a loss of their own, where sources differ in it; together all rows. Empty: the recipe's, for all."""

    @property
    def num_rows(self) -> int:
        return len(self.anchors)

    @cached_property
    def texts(self) -> Int[Tensor, "t"]:
        """The table: positives, further positives, hard negatives, anchors."""
        return torch.cat([self.all_positives, self.negatives, self.anchors])

    @cached_property
    def all_positives(self) -> Int[Tensor, "_"]:
        return self.positives if self.more_positives is None else torch.cat([self.positives, self.more_positives])

    def to(self, device: torch.device) -> "BatchIndex":
        moved: dict[str, Any] = {
            name: sent(tensor, device)
            for name in ("anchors", "positives", "negatives", "identity", "negative_rows", "more_positives",
                         "further_positives", "groups")
            if (tensor := getattr(self, name)) is not None
        }  # fmt: skip
        return replace(self, **moved)

    def config_of(self, row: int, config: LossConfig) -> LossConfig:
        """The loss of a row; config: the recipe's."""
        return next((own for rows, own in self.sections if row in rows), config)

    def configs(self, config: LossConfig) -> set[LossConfig]:
        return {own for _, own in self.sections} or {config}

    def parts(self, config: LossConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """For each part in use: the texts that query (one a row) and the texts that are candidates."""
        parts = {"ap": (self.anchors, self.all_positives)} if config.in_batch else {}
        if len(self.negatives):
            parts["an"] = (self.anchors, self.negatives)
        if config.in_batch and config.contrast_anchors:
            parts["aa"] = (self.anchors, self.anchors)
        if config.in_batch and config.contrast_positives:
            parts["pp"] = (self.positives, self.all_positives)
        return parts


def mean_over_positives(
    first: Float[Tensor, "b 1"], further: Float[Tensor, "b q"], is_there: Bool[Tensor, "b q"]
) -> Float[Tensor, "b 1"]:
    """What the guide's threshold of a row is taken from: how near its positives are to its anchor. The nearest alone
    could be a copy of the anchor, which would leave nothing to drop; the farthest alone a mistake, which would drop
    everything."""
    total = first + further.masked_fill(~is_there, 0.0).sum(dim=1, keepdim=True)
    return total / (1 + is_there.sum(dim=1, keepdim=True))


def further_places(rows: Int[Tensor, "m"], num_rows: int) -> Int[Tensor, "g q"]:
    """BatchIndex.further_positives; rows: whose each of more_positives is, ascending."""
    counts = torch.bincount(rows, minlength=num_rows)
    number = torch.arange(len(rows), device=rows.device)
    places = rows.new_full((num_rows, int(counts.max())), -1)
    places[rows, number - (counts.cumsum(0) - counts)[rows]] = num_rows + number
    return places


@dataclass(frozen=True)
class LossShare:
    """What some of the rows contribute. Shares add up: their sum over workers is the single-process result."""

    loss: Float[Tensor, ""]
    """Sum over the rows scored here, already divided by g; fp64."""
    gradient: Float[Tensor, "u d"]
    """d(loss) / d(student embeddings); fp64, so that the order in which blocks and workers add up leaves no trace."""
    counts: dict[str, Float[Tensor, ""]]
    """By the names of count_names()."""


def count_names(parts: Iterable[Iterable[str]]) -> list[str]:
    """What a loss counts, given the parts in use: how many candidates there were and the guide masked, in each part;
    identical_dropped (the rows themselves not counted), known_dropped and promoted ones, rows_without_negatives; and
    sums over rows: of similarities, and of the share that a rule took out of a row's Σ exp(s/τ), or of one part's."""
    some = {part for in_one in parts for part in in_one}
    in_use = [part for part in PARTS if part in some]
    names = [f"{count}_{part}" for count in ("candidates", "masked", "masked_weight") for part in in_use]
    names += ["masked_weight", "identical_weight", "known_weight", "identical_dropped", "known_dropped", "promoted"]
    return [*names, "rows_without_negatives", "positive_similarity", "guide_positive_similarity"]


def row_blocks(batch: BatchIndex, config: LossConfig, budget_bytes: float) -> list[range]:
    """Cut the rows into blocks whose scores fit the budget; all rows of a block have the same loss.

    The cut knows nothing of workers, so that a block's matrix products, and with them the guide's verdict on near
    ties, are bit for bit the same whoever computes them.
    """
    blocks = list[range]()
    for rows, own in batch.sections or ((range(batch.num_rows), config),):
        widths = [len(candidates) for _, candidates in batch.parts(own).values()]
        # Scores; guide scores, masks and what is dropped of one slice.
        bytes_per_row = 4 * sum(widths) + 14 * min(max(widths, default=1), slice_size(batch))
        in_budget = max(1, int(budget_bytes // bytes_per_row))
        least = LEAST_ROWS.get(batch.anchors.device.type, LEAST_ROWS["cpu"])
        to_share = max(least, -(-batch.num_rows // 128))  # enough blocks that workers get equal numbers of rows
        size = min(in_budget, to_share)
        blocks += [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
    return blocks


def slice_size(batch: BatchIndex) -> int:
    return SLICES.get(batch.anchors.device.type, SLICES["cpu"])


def false_negatives(
    guide_scores: Float[Tensor, "b c"], guide_positive: Float[Tensor, "b 1"], config: LossConfig
) -> Bool[Tensor, "b c"]:
    """Candidates that the guide finds closer than the row's own positive, less the margin."""
    return guide_scores > guide_threshold(guide_positive, config)


def guide_threshold(guide_positive: Float[Tensor, "*b"], config: LossConfig) -> Float[Tensor, "*b"]:
    """The guide score above which a candidate is a false negative."""
    return _threshold(guide_positive, config.margin, config)


def promotion_threshold(guide_positive: Float[Tensor, "*b"], config: LossConfig) -> Float[Tensor, "*b"]:
    """The guide score above which a false negative joins the row's positives."""
    own = _threshold(guide_positive, config.promotion.margin, config)
    return torch.maximum(own, guide_threshold(guide_positive, config))


def _threshold(guide_positive: Float[Tensor, "*b"], margin: float, config: LossConfig) -> Float[Tensor, "*b"]:
    scale = guide_positive.abs() if config.margin_kind == "relative" else 1.0
    return guide_positive - scale * margin + TIE
