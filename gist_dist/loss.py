"""The guided contrastive loss of a global batch, and its gradient, in row blocks.

GISTEmbed (Solatorio 2024, arXiv 2402.16829): candidates that the guide finds closer to the anchor than the row's own
positive are false negatives and leave the softmax. Without a guide it is InfoNCE. The gradient is written out instead
of left to autograd: one block's scores are the only rows × candidates memory there ever is, reused in place.
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
    parts = batch.parts(config)
    num_candidates = sum(len(candidates) for _, candidates in parts.values())
    widest = max(len(candidates) for _, candidates in parts.values())
    # Scores; guide scores, masks and counts of one part, while those of the part before are being replaced.
    bytes_per_row = 4 * num_candidates + 12 * widest
    in_budget = max(1, int(budget_bytes // bytes_per_row))
    to_share = max(32, -(-batch.num_rows // 128))  # enough blocks that workers get equal numbers of rows
    size = min(in_budget, to_share)
    return [range(start, min(start + size, batch.num_rows)) for start in range(0, batch.num_rows, size)]


def gist_loss(
    student: Float[Tensor, "u d"],
    guide: Float[Tensor, "u e"] | None,
    batch: BatchIndex,
    blocks: Iterable[range],
    config: LossConfig,
) -> LossShare:
    """Loss and gradient of the rows in ``blocks`` against every candidate of the global batch.

    Embeddings are unit vectors in fp32 (or fp64); a guide of None means InfoNCE.
    """
    scorer = _Scorer(student, guide, batch, config)
    for block in blocks:
        scorer.add(block)
    return scorer.share()


def false_negatives(
    guide_scores: Float[Tensor, "b c"], guide_positive: Float[Tensor, "b 1"], config: LossConfig
) -> Bool[Tensor, "b c"]:
    """Candidates that the guide finds closer than the row's own positive, less the margin."""
    scale = guide_positive.abs() if config.margin_kind == "relative" else 1.0
    return guide_scores > guide_positive - scale * config.margin


class _Scorer:
    """The tables that all blocks share, and what the blocks have added up to so far."""

    def __init__(self, student: Tensor, guide: Tensor | None, batch: BatchIndex, config: LossConfig) -> None:
        assert student.dtype in (torch.float32, torch.float64), "similarities need fp32"
        self.batch, self.config = batch, config
        self.student = student.detach()
        self.parts = batch.parts(config)
        self.width = sum(len(candidates) for _, candidates in self.parts.values())
        texts = {"anchor": batch.anchors, "positive": batch.positives, "negative": batch.negatives}
        self.rows = {role: self.student[index] for role, index in texts.items()}
        self.guide_rows = {} if guide is None else {role: guide[index] for role, index in texts.items()}
        self.identity = {role: batch.identity[index] for role, index in texts.items()}
        self.gradients = {role: torch.zeros_like(rows, dtype=torch.float64) for role, rows in self.rows.items()}
        self.texts = texts
        self.loss = student.new_zeros((), dtype=torch.float64)
        names = [f"{count}_{part}" for count in ("candidates", "masked") for part in self.parts]
        names += ["identical_dropped", "rows_without_negatives", "positive_similarity", "guide_positive_similarity"]
        self.counts = {name: student.new_zeros((), dtype=torch.float64) for name in names}

    def add(self, block: range) -> None:
        rows, device = slice(block.start, block.stop), self.student.device
        own = torch.arange(len(block), device=device), torch.arange(block.start, block.stop, device=device)
        scores = self.student.new_empty(len(block), self.width)
        kept = self.student.new_zeros(len(block), dtype=torch.int64)
        for part, columns in self._columns().items():
            query, candidates = _ROLES[part]
            part_scores = scores[:, columns]
            torch.mm(self.rows[query][rows], self.rows[candidates].T, out=part_scores)
            identical = self._identical(rows, candidates)
            if part == "ap":
                identical[own] = False  # a row's own positive is never dropped
            dropped = identical
            if self.guide_rows:
                guide_scores = self.guide_rows[query][rows] @ self.guide_rows[candidates].T
                if part == "ap":  # comes first; read off the same product, so that equal texts tie exactly
                    guide_positive = guide_scores[own].unsqueeze(1)
                    self.counts["guide_positive_similarity"] += guide_positive.sum()
                masked = false_negatives(guide_scores, guide_positive, self.config) & ~identical
                if part == "ap":
                    masked[own] = False
                self.counts[f"masked_{part}"] += _per_row(masked).sum()
                dropped = identical | masked
            num_identical = _per_row(identical).sum()
            num_self = len(block) if part in ("aa", "pp") else 0
            self.counts["identical_dropped"] += num_identical - num_self
            self.counts[f"candidates_{part}"] += identical.numel() - num_identical
            kept += dropped.shape[1] - _per_row(dropped)
            part_scores.masked_fill_(dropped, -torch.inf)
        self.counts["candidates_ap"] -= len(block)  # own positives are no candidates for masking
        self.counts["rows_without_negatives"] += (kept == 1).sum()
        self.counts["positive_similarity"] += scores[own].sum()
        self._add_loss(scores, own)
        self._add_gradient(scores, rows, own)

    def _identical(self, rows: slice, candidates: str) -> Bool[Tensor, "b c"]:
        """Candidates the student can't tell from the row's anchor or positive; in aa and pp, the row itself too."""
        anchor, positive = (self.identity[role][rows].unsqueeze(1) for role in ("anchor", "positive"))
        return (self.identity[candidates] == anchor) | (self.identity[candidates] == positive)

    def _columns(self) -> dict[str, slice]:
        columns, start = {}, 0
        for part, (_, candidates) in self.parts.items():
            columns[part] = slice(start, start + len(candidates))
            start += len(candidates)
        return columns

    def _add_loss(self, scores: Float[Tensor, "b all"], own: tuple[Tensor, Tensor]) -> None:
        """Leaves softmax(scores / τ) in place of the scores; torch.logsumexp would need as much memory again."""
        scores /= self.config.temperature
        largest = scores.amax(dim=1)
        above_positive = largest - scores[own]
        scores.sub_(largest.unsqueeze(1)).exp_()
        total = scores.sum(dim=1)
        self.loss += (total.log() + above_positive).sum(dtype=torch.float64) / self.batch.num_rows
        scores /= total.unsqueeze(1)

    def _add_gradient(self, softmax: Float[Tensor, "b all"], rows: slice, own: tuple[Tensor, Tensor]) -> None:
        softmax[own] -= 1
        softmax /= self.config.temperature * self.batch.num_rows
        for part, columns in self._columns().items():
            query, candidates = _ROLES[part]
            d_scores = softmax[:, columns]
            self.gradients[query][rows] += d_scores @ self.rows[candidates]
            self.gradients[candidates] += d_scores.T @ self.rows[query][rows]

    def share(self) -> LossShare:
        gradient = torch.zeros_like(self.student, dtype=torch.float64)
        for role, index in self.texts.items():
            gradient.index_add_(0, index, self.gradients[role])
        return LossShare(self.loss, gradient, self.counts)


def _per_row(mask: Bool[Tensor, "b c"]) -> Int[Tensor, "b"]:
    """How many are true. On CPU torch sums a copy of the mask in the type of the result: not in int64, then."""
    return mask.sum(dim=1, dtype=torch.int32)


_ROLES = {
    "ap": ("anchor", "positive"),
    "aa": ("anchor", "anchor"),
    "pp": ("positive", "positive"),
    "an": ("anchor", "negative"),
}
