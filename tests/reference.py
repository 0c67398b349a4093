"""The loss of shared/design.md, read off its formulas: a loop over rows and candidates, autograd.

Slow on purpose; the package never imports it.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gist_dist.config import LossConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TIE = 2e-6
"""By more than this a candidate has to be closer to the guide than the positive, to be a false negative."""


@dataclass(frozen=True)
class Row:
    """One training example, as numbers of texts."""

    anchor: int
    positive: int
    negatives: tuple[int, ...] = ()
    further: tuple[int, ...] = ()
    """Positives beside the first; the guide's threshold is taken from the mean over all of them."""


def reference_loss(
    rows: Sequence[Row],
    student: Tensor,
    guide: Tensor | None,
    identity: Sequence[int],
    config: LossConfig | Sequence[LossConfig],
    known: Collection[tuple[int, int]] = (),
    groups: Sequence[int] | None = None,
) -> tuple[Tensor, Counter]:
    """Mean loss of the rows, to be differentiated, and what was counted on the way.

    student, guide: unit vectors, one for each text. identity: equal for texts of the same student token ids.
    config: of all rows, or of each. known: (row, text) that is no negative of the row, as are all texts of its
    anchor's group.
    """
    sigma = None if guide is None else (guide @ guide.T).tolist()
    cosines = (student @ student.T).detach().double().tolist()
    configs = [config] * len(rows) if isinstance(config, LossConfig) else config
    losses, counts = [], Counter()
    for i, row in enumerate(rows):
        a, p, config = row.anchor, row.positive, configs[i]
        candidates = []
        for j, other in enumerate(rows):
            own = j == i
            positives = [other.positive, *other.further]
            if config.in_batch:
                candidates += [("ap", a, text, own) for text in positives]
            if config.in_batch and config.contrast_anchors:
                candidates += [("aa", a, other.anchor, own)]
            if config.in_batch and config.contrast_positives:
                candidates += [("pp", p, text, own) for text in positives]
            if config.negatives == "all" or own:
                candidates += [("an", a, text, own) for text in other.negatives]

        if sigma is not None:
            own_sigma = sum(sigma[a][text] for text in (p, *row.further)) / (1 + len(row.further))
            shift = abs(own_sigma) if config.margin_kind == "relative" else 1.0
            threshold = own_sigma - shift * config.margin
            promoted_above = max(threshold, own_sigma - shift * config.promotion.margin)
            counts["guide_positive_similarity"] += own_sigma
        kept, above = [], []
        weight = Counter()  # of exp(s / τ), by what became of the candidate, and by part
        for part, query, text, is_own in candidates:
            if is_own and part != "an":  # a positive, which is kept already, or an anchor or positive with itself
                continue
            mass = math.exp(cosines[query][text] / config.temperature)
            weight["all", "all"] += mass
            weight["all", part] += mass
            in_group = groups is not None and groups[text] == groups[a]
            if identity[text] in (identity[a], identity[p]):
                counts["identical_dropped"] += 1
                weight["identical", "all"] += mass
                continue
            if in_group or (i, text) in known:
                counts["known_dropped"] += 1
                weight["known", "all"] += mass
                continue
            counts[f"candidates_{part}"] += 1
            guarded = config.guard_negatives and part == "an" and is_own
            if sigma is not None and sigma[query][text] > threshold + TIE and not guarded:
                counts[f"masked_{part}"] += 1
                weight["masked", "all"] += mass
                weight["masked", part] += mass
                if config.false_negatives == "positive" and sigma[query][text] > promoted_above + TIE:
                    above.append((sigma[query][text], query, text))
                continue
            kept.append((query, text))
        for rule in ("masked", "identical", "known"):
            counts[f"{rule}_weight"] += weight[rule, "all"] / (weight["all", "all"] or 1)
        for part in ("ap", "aa", "pp", "an"):
            counts[f"masked_weight_{part}"] += weight["masked", part] / (weight["all", part] or 1)
        counts["rows_without_negatives"] += not kept

        joining = sorted(above, reverse=True)[: config.promotion.most]
        counts["promoted"] += len(joining)
        pairs = [(a, p), *((a, text) for text in row.further), *((query, text) for _, query, text in joining)]
        weights = torch.ones(len(pairs), dtype=student.dtype)
        if config.false_negatives == "positive" and config.promotion.weight == "guide" and sigma is not None:
            own = max(own_sigma, 1e-6)
            weights = torch.tensor(
                [own] * (1 + len(row.further)) + [max(g, 1e-6) for g, *_ in joining], dtype=student.dtype
            )
        weights = weights / weights.sum()
        s = _cosines(student, pairs)
        counts["positive_similarity"] += s[0].item()
        logits = s / config.temperature
        negatives = _cosines(student, kept) / config.temperature
        if config.positives == "mean":
            with_each = torch.stack([torch.cat([logit.reshape(1), negatives]).logsumexp(dim=0) for logit in logits])
            losses.append((weights * (with_each - logits)).sum())
        else:
            of_all = (weights.log() + logits).logsumexp(dim=0)
            losses.append(torch.cat([of_all.reshape(1), negatives]).logsumexp(dim=0) - of_all)
    return torch.stack(losses).mean(), counts


def _cosines(student: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Of pairs of texts, to be differentiated."""
    queries, texts = zip(*pairs, strict=True) if pairs else ((), ())
    return (student[list(queries)] * student[list(texts)]).sum(dim=1)


def embedded_by_stock_models(
    student: Path, guide: Path | None, texts: list[str]
) -> tuple["SentenceTransformer", Tensor, Tensor | None, list[tuple[int, ...]]]:
    """By sentence-transformers alone: the student in fp64, its embeddings of the texts, the guide's as the cache keeps
    them, and the texts' token ids."""
    from sentence_transformers import SentenceTransformer

    trained = SentenceTransformer(str(student), device="cpu").double().eval()
    features = trained.preprocess(texts)
    identity = [tuple(ids) for ids in features["input_ids"].tolist()]
    embeddings = F.normalize(trained(features)["sentence_embedding"], dim=-1)
    if guide is None:
        return trained, embeddings, None, identity
    frozen = SentenceTransformer(str(guide), device="cpu").double().eval()
    with torch.no_grad():
        guided = F.normalize(frozen(frozen.preprocess(texts))["sentence_embedding"], dim=-1)
        return trained, embeddings, F.normalize(guided.half().double(), dim=-1), identity


def gradients_of(model: nn.Module) -> dict[str, np.ndarray]:
    """The gradients that a backward pass has left."""
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
