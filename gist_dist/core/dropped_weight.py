"""What the rules took out of a block of rows, as a share of the softmax."""

# Axes:  b rows of the block   c candidates of one piece   p parts   k pairs

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gist_dist.core.layout import SomePairs

RULES = ("masked", "identical", "known")
"""By which a candidate is dropped: the guide, identical texts, known positives."""


class DroppedWeight:
    """log Σ exp(s/τ) of what each rule took out, by row and part."""

    def __init__(self, num_rows: int, parts: Iterable[str], device: torch.device) -> None:
        self.parts = list(parts)
        empty = torch.full((num_rows, len(self.parts)), -torch.inf, dtype=torch.float64, device=device)
        self.log_sums: dict[str, Float[Tensor, "b p"]] = {rule: empty.clone() for rule in RULES}

    def add(self, rule: str, part: str, scores: Float[Tensor, "b c"], chosen: Bool[Tensor, "b c"]) -> None:
        if not chosen.is_cuda and not chosen.any():  # a GPU would have to be waited for
            return
        found = scores.masked_fill(~chosen, -torch.inf).logsumexp(dim=1).double()
        so_far = self.log_sums[rule][:, self.parts.index(part)]
        so_far.copy_(torch.logaddexp(so_far, found))

    def add_pairs(self, rule: str, pairs: SomePairs, scores: Float[Tensor, "k"]) -> None:
        log_sums, scores = self.log_sums[rule], scores.double()
        at = pairs.row * len(self.parts) + pairs.part
        largest = log_sums.flatten().scatter_reduce(0, at, scores, "amax")
        shift = largest.clamp(min=torch.finfo(torch.float64).min)
        total = torch.zeros_like(shift).index_add(0, at, (scores - shift[at]).exp())
        found = (total.log() + shift).view_as(log_sums)
        log_sums.copy_(torch.logaddexp(log_sums, found))

    def shares(self, kept: list[Float[Tensor, "b"]]) -> dict[str, Float[Tensor, ""]]:
        """Each rule's share of the weight of all candidates, and the guide's share of each part's; summed over rows.
        kept: log Σ exp(s/τ) of the negatives, by part."""
        if not kept:
            return {}
        every = torch.stack([torch.stack(kept, dim=1), *self.log_sums.values()]).logsumexp(dim=0)
        whole = every.logsumexp(dim=1)
        shares = {f"{rule}_weight": _share(log.logsumexp(dim=1), whole) for rule, log in self.log_sums.items()}
        by_part = {part: (self.log_sums["masked"][:, i], every[:, i]) for i, part in enumerate(self.parts)}
        return shares | {f"masked_weight_{part}": _share(*logs) for part, logs in by_part.items()}


def _share(log_part: Float[Tensor, "b"], log_whole: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """Rows without a candidate count as 0."""
    return (log_part - log_whole).exp().nan_to_num(nan=0.0).sum()
