"""All candidates of some rows side by side, with what the rules say of each: to look at a batch, not to train on it.

The rules themselves are those of the loss; a table holds rows × candidates at once, so ask for few rows at a time.
"""

# Axes:  r rows looked at   c candidates of the batch   u unique texts   e width

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gist_dist.config import LossConfig
from gist_dist.core.candidates import BatchIndex, false_negatives, mean_over_positives
from gist_dist.core.layout import Layout, Pairs


def mean_guide_similarity(batch: BatchIndex, guide: Float[Tensor, "u e"]) -> float:
    """How near the positives of other rows are to a row's anchor, to the guide: how hard a batch is."""
    anchors, positives, g = guide[batch.anchors], guide[batch.positives], batch.num_rows
    total = anchors.sum(dim=0, dtype=torch.float64) @ positives.sum(dim=0, dtype=torch.float64)
    return float((total - (anchors * positives).sum(dtype=torch.float64)) / max(1, g * (g - 1)))


class CandidateTable:
    """All candidates of a batch side by side, in the columns of Layout."""

    def __init__(self, batch: BatchIndex, guide: Float[Tensor, "u e"], loss: LossConfig) -> None:
        self.batch, self.guide, self.loss = batch, guide, loss
        self.parts, self.layout = batch.parts(loss), Layout(batch, loss)
        self.texts = torch.cat([texts for _, texts in self.parts.values()])
        self.block_of = [part for part, (_, texts) in self.parts.items() for _ in range(len(texts))]

    def scores(self, embeddings: Float[Tensor, "u e"], rows: Tensor) -> Float[Tensor, "r c"]:
        scores = [embeddings[queries[rows]] @ embeddings[texts].T for queries, texts in self.parts.values()]
        return torch.cat(scores, dim=1)

    def of_positive(self, embeddings: Float[Tensor, "u e"], rows: Tensor) -> Float[Tensor, "r 1"]:
        anchors, positives = embeddings[self.batch.anchors[rows]], embeddings[self.batch.positives[rows]]
        return (anchors * positives).sum(dim=1, keepdim=True)

    def guide_positive(self, rows: Tensor) -> Float[Tensor, "r 1"]:
        """What the threshold is taken from."""
        first, places = self.of_positive(self.guide, rows), self.batch.further_positives
        if places is None:
            return first
        texts = self.batch.texts[places[rows].clamp(min=0)]
        further = (self.guide[self.batch.anchors[rows]].unsqueeze(1) * self.guide[texts]).sum(dim=2)
        return mean_over_positives(first, further, places[rows] >= 0)

    def of_pair(self, embeddings: Float[Tensor, "u e"], row: int, column: int) -> Float[Tensor, ""]:
        return (embeddings[self.query(row, column)] * embeddings[self.texts[column]]).sum()

    def query(self, row: int, column: int) -> Tensor:
        """The text that a candidate is compared with: the row's anchor, or for pp its positive."""
        return self.parts[self.block_of[column]][0][row]

    def masked(self, rows: Tensor) -> Bool[Tensor, "r c"]:
        """What the guide takes out, unless another rule does."""
        masked = false_negatives(self.scores(self.guide, rows), self.guide_positive(rows), self.loss)
        return masked & ~self._is_own_negative(rows) if self.loss.guard_negatives else masked

    def left_out(self, rows: Tensor) -> Bool[Tensor, "r c"]:
        """What the loss leaves out of a row without a guide: known positives too."""
        out, groups = self.no_candidates(rows), self.batch.groups
        if groups is not None:
            out |= groups[self.texts] == groups[self.batch.anchors[rows]].unsqueeze(1)
        return self._mark(out, rows, self.layout.known)

    def no_candidates(self, rows: Tensor) -> Bool[Tensor, "r c"]:
        """Equal texts, the row's further positives, other rows' negatives where only own count."""
        out = self._mark(self.identical(rows), rows, self.layout.further)
        if self.loss.negatives == "own" and "an" in self.layout.columns:
            negatives = self.layout.columns["an"]
            out[:, negatives] |= ~self._is_own_negative(rows)[:, negatives]
        return out

    def _mark(self, out: Bool[Tensor, "r c"], rows: Tensor, pairs: Pairs) -> Bool[Tensor, "r c"]:
        row_of_pair, columns = (tensor.to(rows.device) for tensor in (pairs.rows, pairs.columns))
        at, pair = (rows.unsqueeze(1) == row_of_pair).nonzero(as_tuple=True)
        out[at, columns[pair]] = True
        return out

    def guarded(self, rows: Tensor) -> Bool[Tensor, "r c"]:
        """What the guide may not take out: own negatives, where they are guarded."""
        return self._is_own_negative(rows) & self.loss.guard_negatives

    def _is_own_negative(self, rows: Tensor) -> Bool[Tensor, "r c"]:
        own = torch.zeros(len(rows), len(self.texts), dtype=torch.bool, device=rows.device)
        if "an" in self.layout.columns:
            assert self.batch.negative_rows is not None
            own[:, self.layout.columns["an"]] = self.batch.negative_rows == rows.unsqueeze(1)
        return own

    def identical(self, rows: Tensor) -> Bool[Tensor, "r c"]:
        """Candidates that leave by the rule for equal texts, whatever the guide says."""
        identity, candidates = self.batch.identity, self.batch.identity[self.texts]
        anchors, positives = (
            identity[texts[rows]].unsqueeze(1) for texts in (self.batch.anchors, self.batch.positives)
        )
        return (candidates == anchors) | (candidates == positives)
