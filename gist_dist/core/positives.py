"""The positives of a block of rows, those that the guide promotes among them, against the negatives."""

# Axes:  b rows of the block   q positives of a row, at most   c candidates of one piece   m that join a row, at most
#        t texts of the table   d width

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gist_dist.config import LossConfig
from gist_dist.core.candidates import promotion_threshold
from gist_dist.core.layout import Layout


class Positives(NamedTuple):
    """Rows that have fewer than others are filled up with weights of 0."""

    cosine: Float[Tensor, "b q"]
    weight: Float[Tensor, "b q"]
    place: Int[Tensor, "b q"]
    """In the table of texts."""
    of_positive: Bool[Tensor, "b q"]
    """Compared with the row's own positive, not with its anchor."""

    def joined(self, others: "Positives") -> "Positives":
        return Positives(*(torch.cat(pair, dim=1) for pair in zip(self, others, strict=True)))

    def against(self, log_negatives: Float[Tensor, "b"], config: LossConfig) -> "Slopes":
        """log_negatives: log N, of the sum of exp(s/τ) over the row's negatives. See loss.py for the formulas."""
        log_positive = self.cosine / config.temperature
        log_weight = (self.weight / self.weight.sum(dim=1, keepdim=True)).log()
        if config.positives == "sum":
            log_weight = log_weight + log_positive
            log_positive = log_weight.logsumexp(dim=1, keepdim=True)  # log P
            log_weight = log_weight - log_positive
        excess = log_negatives.unsqueeze(1) - log_positive  # log of N against each positive, or against P
        softplus = torch.logaddexp(excess, torch.zeros_like(excess))
        share = log_weight.exp()
        log_scale = (log_weight - log_positive - softplus).logsumexp(dim=1)
        return Slopes((share * softplus).sum(dim=1), share * excess.sigmoid(), log_scale)


def further_cosines(
    anchors: Float[Tensor, "b d"],
    embeddings: Float[Tensor, "t d"],
    places: Int[Tensor, "b q"],
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "b q"], Bool[Tensor, "b q"]]:
    """Scores of the rows' anchors and further positives, and which are there. places: in the table, -1 for none."""
    columns = [(anchors * embeddings[column]).sum(dim=1, dtype=dtype) for column in places.clamp(min=0).T]
    return torch.stack(columns, dim=1), places >= 0


class Slopes(NamedTuple):
    """A row's loss, and how it falls and rises with cosines, times τ."""

    loss: Float[Tensor, "b"]
    pull: Float[Tensor, "b q"]
    """With that of each positive it falls."""
    log_scale: Float[Tensor, "b"]
    """With that of a negative it rises by exp(s/τ) times exp of this."""


class Promoted:
    """The false negatives that join each row's positives: the closest to the guide, piece by piece."""

    def __init__(self, guide_positive: Float[Tensor, "b 1"], config: LossConfig) -> None:
        self.promotion, self.guide_positive = config.promotion, guide_positive
        self.threshold = promotion_threshold(guide_positive, config)
        empty = guide_positive.new_full((len(guide_positive), self.promotion.most), -torch.inf)
        self.guide_scores: Float[Tensor, "b m"] = empty
        """-inf where fewer join."""
        self.scores = torch.zeros_like(empty)
        """The student's, / τ."""
        self.columns: Int[Tensor, "b m"] = torch.zeros_like(empty, dtype=torch.long)

    def consider(
        self,
        masked: Bool[Tensor, "b c"],
        guide_scores: Float[Tensor, "b c"],
        scores: Float[Tensor, "b c"],
        first_column: int,
    ) -> None:
        """masked: what the guide drops of one piece of the candidates."""
        close = guide_scores.masked_fill(~masked | (guide_scores <= self.threshold), -torch.inf)
        found, at = close.topk(min(self.promotion.most, close.shape[1]), dim=1)
        self.guide_scores, best = torch.cat([self.guide_scores, found], dim=1).topk(self.promotion.most, dim=1)
        self.scores = torch.cat([self.scores, scores.gather(1, at)], dim=1).gather(1, best)
        self.columns = torch.cat([self.columns, at + first_column], dim=1).gather(1, best)

    def join(self, positives: Positives, layout: Layout, temperature: float) -> Positives:
        weight = self._weight(self.guide_scores) * self.is_there
        place, of_positive = layout.places(self.columns)
        cosine = self.scores.masked_fill(~self.is_there, 0.0).double() * temperature
        joining = Positives(cosine, weight, place, of_positive)
        own_weight = positives.weight * self._weight(self.guide_positive)
        return positives._replace(weight=own_weight).joined(joining)

    @property
    def is_there(self) -> Bool[Tensor, "b m"]:
        return self.guide_scores > -torch.inf

    def _weight(self, guide_scores: Float[Tensor, "b q"]) -> Float[Tensor, "b q"]:
        """The weight of positives that the guide scores so; one that it finds opposite has next to none."""
        if self.promotion.weight == "equal":
            return torch.ones_like(guide_scores, dtype=torch.float64)
        return guide_scores.double().clamp(min=1e-6)
