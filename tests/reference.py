"""The loss of shared/design.md, read off its formulas: a loop over rows and candidates, autograd.

Slow on purpose; the package never imports it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gist_dist.config import LossConfig

TIE = 2e-6
"""By more than this a candidate has to be closer to the guide than the positive, to be a false negative."""


@dataclass(frozen=True)
class Row:
    """One training example, as numbers of texts."""

    anchor: int
    positive: int
    negatives: tuple[int, ...] = ()


def reference_loss(
    rows: Sequence[Row], student: Tensor, guide: Tensor | None, identity: Sequence[int], config: LossConfig
) -> tuple[Tensor, Counter]:
    """Mean loss of the rows, to be differentiated, and what was counted on the way.

    student, guide: unit vectors, one for each text. identity: equal for texts of the same student token ids.
    """
    sigma = None if guide is None else (guide @ guide.T).tolist()
    hard_negatives = [text for row in rows for text in row.negatives]
    losses, counts = [], Counter()
    for i, row in enumerate(rows):
        a, p = row.anchor, row.positive
        candidates = [("ap", a, other.positive, j == i) for j, other in enumerate(rows)]
        if config.contrast_anchors:
            candidates += [("aa", a, other.anchor, j == i) for j, other in enumerate(rows)]
        if config.contrast_positives:
            candidates += [("pp", p, other.positive, j == i) for j, other in enumerate(rows)]
        candidates += [("an", a, text, False) for text in hard_negatives]

        if sigma is not None:
            shift = abs(sigma[a][p]) if config.margin_kind == "relative" else 1.0
            threshold = sigma[a][p] - shift * config.margin
            counts["guide_positive_similarity"] += sigma[a][p]
        kept = [(a, p)]
        for part, query, text, is_own_row in candidates:
            if is_own_row:  # the positive itself, which is kept already, or an anchor or positive with itself
                continue
            if identity[text] in (identity[a], identity[p]):
                counts["identical_dropped"] += 1
                continue
            counts[f"candidates_{part}"] += 1
            if sigma is not None and sigma[query][text] > threshold + TIE:
                counts[f"masked_{part}"] += 1
                continue
            kept.append((query, text))
        counts["rows_without_negatives"] += len(kept) == 1
        queries, texts = zip(*kept, strict=True)
        s = (student[list(queries)] * student[list(texts)]).sum(dim=1)
        counts["positive_similarity"] += s[0].item()
        losses.append(torch.logsumexp(s / config.temperature, dim=0) - s[0] / config.temperature)
    return torch.stack(losses).mean(), counts
