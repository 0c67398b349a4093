"""The guided contrastive loss of a global batch, and its gradient, in row blocks.

GISTEmbed (Solatorio 2024, arXiv 2402.16829): candidates that the guide finds closer to the anchor than the row's own
positive are false negatives and leave the softmax. Without a guide it is InfoNCE. The gradient is written out instead
of left to autograd: one block's scores are the only rows × candidates memory there ever is, reused in place.

A row's own positive is identical to itself, so that the rule for identical texts takes it, like the row's own anchor
and positive in aa and pp, out of the candidates; with s⁺ its score, the loss is log(1 + Σ exp(s/τ) / exp(s⁺/τ)).
"""

# Axes:  g rows of the global batch   b rows of one block   u unique texts   n hard negatives of all rows
#        c candidates of one part     d student width       e guide width

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gist_dist.config import LossConfig

PARTS = ("ap", "aa", "pp", "an")
"""The blocks of similarities: anchor-positive, anchor-anchor, positive-positive, anchor-negative."""

TIE = 2e-6  # rounding and exact ties never count as closer: scores come from fp32 products of fp16-rounded embeddings
SLICES = {"cpu": 1024, "cuda": 1 << 20}
"""Candidates whose guide scores, masks and gradients are worked on at a time, by device: a CPU's stay in its cache;
a GPU is given all at once, since it would wait for the launches."""
LEAST_ROWS = {"cpu": 64, "cuda": 1024}
"""Of a block, where the budget allows: smaller ones leave a GPU waiting for launches."""


@dataclass(frozen=True)
class BatchIndex:
    """The rows of a global batch, as positions in its unique texts."""

    anchors: Int[Tensor, "g"]
    positives: Int[Tensor, "g"]
    negatives: Int[Tensor, "n"]
    """Every hard negative of every row: each is a candidate of all rows."""
    identity: Int[Tensor, "u"]
    """Equal for texts that the student can't tell apart: the same token ids."""

    @property
    def num_rows(self) -> int:
        return len(self.anchors)

    def to(self, device: torch.device) -> "BatchIndex":
        move = (self.anchors, self.positives, self.negatives, self.identity)
        return BatchIndex(*(tensor.to(device, non_blocking=True) for tensor in move))

    def parts(self, config: LossConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """For each part in use: the texts that query (one a row) and the texts that are candidates."""
        parts = {"ap": (self.anchors, self.positives)}
        if config.contrast_anchors:
            parts["aa"] = (self.anchors, self.anchors)
        if config.contrast_positives:
            parts["pp"] = (self.positives, self.positives)
        if len(self.negatives):
            parts["an"] = (self.anchors, self.negatives)
        return parts


@dataclass(frozen=True)
class LossShare:
    """What some of the rows contribute. Shares add up: their sum over workers is the single-process result."""

    loss: Float[Tensor, ""]
    """Of the rows scored here, already divided by g; fp64."""
    gradient: Float[Tensor, "u d"]
    """d(loss) / d(student embeddings); fp64, so that the order in which blocks and workers add up leaves no trace."""
    counts: dict[str, Float[Tensor, ""]]
    """candidates_* and masked_* for each part, identical_dropped (the rows themselves not counted),
    rows_without_negatives, and the sums over rows positive_similarity and guide_positive_similarity."""


def row_blocks(batch: BatchIndex, config: LossConfig, budget_bytes: float) -> list[range]:
    """Cut the rows into blocks whose scores fit the budget.

    The cut knows nothing of workers, so that a block's matrix products, and with them the guide's verdict on near
    ties, are bit for bit the same whoever computes them.
    """
    widths = [len(candidates) for _, candidates in batch.parts(config).values()]
    # Scores; guide scores and masks of one slice.
    bytes_per_row = 4 * sum(widths) + 7 * min(max(widths), _slice_size(batch))
    in_budget = max(1, int(budget_bytes // bytes_per_row))
    least = LEAST_ROWS.get(batch.anchors.device.type, LEAST_ROWS["cpu"])
    to_share = max(least, -(-batch.num_rows // 128))  # enough blocks that workers get equal numbers of rows
    size = min(in_budget, to_share)
    return [range(start, min(start + size, batch.num_rows)) for start in range(0, batch.num_rows, size)]


def gist_loss(
    student: Float[Tensor, "u d"],
    guide: Float[Tensor, "u e"] | None,
    batch: BatchIndex,
    blocks: Iterable[range],
    config: LossConfig,
    kernel: bool = False,
) -> LossShare:
    """Loss and gradient of the rows in ``blocks`` against every candidate of the global batch.

    Student embeddings are unit vectors in fp32 (or fp64); the guide's may be fp16, and a guide of None means InfoNCE.
    kernel: have loss_kernel.py compute it. Wide matrix products are up to five times as fast on an H200 (docs/log.md).
    """
    if kernel:
        from gist_dist.core.loss_kernel import fused_share

        return fused_share(student, guide, batch, blocks, config)
    scorer = _Scorer(student, guide, batch, config)
    for block in blocks:
        scorer.add(block)
    return scorer.share()


def false_negatives(
    guide_scores: Float[Tensor, "b c"], guide_positive: Float[Tensor, "b 1"], config: LossConfig
) -> Bool[Tensor, "b c"]:
    """Candidates that the guide finds closer than the row's own positive, less the margin."""
    return guide_scores > guide_threshold(guide_positive, config)


def guide_threshold(guide_positive: Float[Tensor, "*b"], config: LossConfig) -> Float[Tensor, "*b"]:
    """The guide score above which a candidate is a false negative."""
    scale = guide_positive.abs() if config.margin_kind == "relative" else 1.0
    return guide_positive - scale * config.margin + TIE


class _Scorer:
    """The tables that all blocks share, and what the blocks have added up to so far."""

    def __init__(self, student: Tensor, guide: Tensor | None, batch: BatchIndex, config: LossConfig) -> None:
        assert student.dtype in (torch.float32, torch.float64), "similarities need fp32"
        self.batch, self.config, self.num_texts = batch, config, len(student)
        # Anchors last: what they are scored against is then one piece from the start, with or without themselves.
        self.texts = torch.cat([batch.positives, batch.negatives, batch.anchors])
        self.students = student.detach()[self.texts]
        self.guides = None if guide is None else guide.to(student.dtype)[self.texts]
        self.identity = batch.identity[self.texts]
        self.gradients = torch.zeros_like(self.students, dtype=torch.float64)
        self.loss = student.new_zeros((), dtype=torch.float64)
        self.slices = _slices(batch, config)
        parts = batch.parts(config)
        names = [f"{count}_{part}" for count in ("candidates", "masked") for part in parts]
        names += ["identical_dropped", "rows_without_negatives", "positive_similarity", "guide_positive_similarity"]
        self.counts = {name: student.new_zeros((), dtype=torch.float64) for name in names}
        self.width = sum(len(candidates) for _, candidates in parts.values())
        self.anchor_width = self.width - batch.num_rows * config.contrast_positives

    def add(self, block: range) -> None:
        first_anchor = len(self.texts) - self.batch.num_rows
        rows = {
            "anchor": slice(first_anchor + block.start, first_anchor + block.stop),
            "positive": slice(block.start, block.stop),
        }
        scores = self._scores(rows)
        self._drop(scores, rows)
        self._add_loss_and_gradient(scores, rows)

    def _scores(self, rows: dict[str, slice]) -> Float[Tensor, "b all"]:
        """Every candidate's similarity / τ: an anchor's candidates, then its positive's."""
        anchors, positives = (self.students[rows[role]] / self.config.temperature for role in ("anchor", "positive"))
        scores = self.students.new_empty(len(anchors), self.width)
        torch.mm(anchors, self.students[: self.anchor_width].T, out=scores[:, : self.anchor_width])
        if self.config.contrast_positives:
            torch.mm(positives, self.students[: self.batch.num_rows].T, out=scores[:, self.anchor_width :])
        return scores

    def _drop(self, scores: Float[Tensor, "b all"], rows: dict[str, slice]) -> None:
        """Scores of -inf for identical texts, the row's own among them, and for false negatives; counted."""
        anchor, positive = (self.identity[rows[role]].unsqueeze(1) for role in ("anchor", "positive"))
        if self.guides is not None:
            guide_positive = (self.guides[rows["anchor"]] * self.guides[rows["positive"]]).sum(dim=1, keepdim=True)
            self.counts["guide_positive_similarity"] += guide_positive.sum()
        for part, table, columns in self.slices:
            identity = self.identity[table]
            dropped = (identity == anchor).logical_or_(identity == positive)
            num_identical = dropped.count_nonzero()
            self.counts["identical_dropped"] += num_identical
            self.counts[f"candidates_{part}"] += dropped.numel() - num_identical
            if self.guides is not None:
                query = self.guides[rows["positive" if part == "pp" else "anchor"]]
                dropped |= false_negatives(query @ self.guides[table].T, guide_positive, self.config)
                self.counts[f"masked_{part}"] += dropped.count_nonzero() - num_identical
            scores[:, columns].masked_fill_(dropped, -torch.inf)
        for part in self.batch.parts(self.config):
            if part != "an":
                self.counts["identical_dropped"] -= len(scores)  # the row itself

    def _add_loss_and_gradient(self, scores: Float[Tensor, "b all"], rows: dict[str, slice]) -> None:
        """In place of the scores: torch.logsumexp and softmax would need as much memory again."""
        anchors, positives = self.students[rows["anchor"]], self.students[rows["positive"]]
        similarity = (anchors * positives).sum(dim=1, dtype=torch.float64)
        largest = scores.amax(dim=1)
        self.counts["rows_without_negatives"] += (largest == -torch.inf).sum()
        self.counts["positive_similarity"] += similarity.sum()
        largest.clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(largest.unsqueeze(1)).exp_()
        total = weights.sum(dim=1).double()
        # log of the negatives' weight against the positive's
        excess = total.log() + largest - similarity / self.config.temperature
        softplus = torch.logaddexp(excess, torch.zeros_like(excess))
        self.loss += softplus.sum() / self.batch.num_rows
        slope = 1 / (self.config.temperature * self.batch.num_rows)
        normalise = (largest - similarity / self.config.temperature - softplus).exp() * slope
        normalise, pull = normalise.to(scores.dtype).unsqueeze(1), (excess.sigmoid() * slope).unsqueeze(1)

        self.gradients[rows["anchor"]] -= pull * positives
        self.gradients[rows["positive"]] -= pull * anchors
        from_candidates = weights[:, : self.anchor_width] @ self.students[: self.anchor_width]
        self.gradients[rows["anchor"]] += from_candidates.mul_(normalise)
        if self.config.contrast_positives:
            from_candidates = weights[:, self.anchor_width :] @ self.students[: self.batch.num_rows]
            self.gradients[rows["positive"]] += from_candidates.mul_(normalise)

        anchors, positives = anchors * normalise, positives * normalise
        for part, table, columns in self.slices:
            if part == "pp":
                continue  # taken together with ap, whose candidates are the same
            from_rows = weights[:, columns].T @ anchors
            if part == "ap" and self.config.contrast_positives:
                columns = slice(self.anchor_width + columns.start, self.anchor_width + columns.stop)
                from_rows.addmm_(weights[:, columns].T, positives)
            self.gradients[table] += from_rows

    def share(self) -> LossShare:
        gradient = self.gradients.new_zeros(self.num_texts, self.students.shape[1])
        return LossShare(self.loss, gradient.index_add_(0, self.texts, self.gradients), self.counts)


def _slices(batch: BatchIndex, config: LossConfig) -> list[tuple[str, slice, slice]]:
    """Candidates by part: where they stand in the tables (positives, negatives, anchors) and in a block's scores."""
    tables = {"ap": 0, "an": batch.num_rows, "aa": batch.num_rows + len(batch.negatives), "pp": 0}
    slices, column, parts = [], 0, batch.parts(config)
    for part in sorted(parts, key=list(tables).index):
        num_candidates = len(parts[part][1])
        for start in range(0, num_candidates, _slice_size(batch)):
            stop = min(start + _slice_size(batch), num_candidates)
            table, columns = (slice(first + start, first + stop) for first in (tables[part], column))
            slices.append((part, table, columns))
        column += num_candidates
    return slices


def _slice_size(batch: BatchIndex) -> int:
    return SLICES.get(batch.anchors.device.type, SLICES["cpu"])
