"""The guided contrastive loss of a global batch, and its gradient, in row blocks.

GISTEmbed (Solatorio 2024, arXiv 2402.16829): candidates that the guide finds closer to the anchor than the row's own
positive are false negatives and leave the softmax. Without a guide it is InfoNCE. The rules are in candidates.py.

The gradient is written out instead of left to autograd: one block's scores are the only rows × candidates memory there
ever is, reused in place. With N the sum of exp(s/τ) over a row's negatives, and s⁺ the cosine of a positive of weight w
(most rows have one; weights add up to 1), a row's loss and its slopes by the cosines are

    mean   loss   Σ w log(1 + N / exp(s⁺/τ))       sum   loss   log(1 + N / P),  P = Σ w exp(s⁺/τ)
           by s⁺  −w N / (exp(s⁺/τ) + N) / τ             by s⁺  −w exp(s⁺/τ) / P · N / (P + N) / τ
           by s   exp(s/τ) Σ w / (exp(s⁺/τ) + N) / τ     by s   exp(s/τ) / (P + N) / τ

and a cosine passes its slope on to each of its two embeddings, times the other one. Every slope carries 1/g.
"""

# Axes:  g rows of the global batch   b rows of one block   u unique texts    t texts of the table
#        c candidates of one piece    q positives of a row, at most           d student width   e guide width

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gist_dist.config import LossConfig
from gist_dist.core.candidates import BatchIndex, LossShare, count_names, false_negatives, mean_over_positives
from gist_dist.core.dropped_weight import DroppedWeight
from gist_dist.core.layout import Layout
from gist_dist.core.positives import Positives, Promoted, further_cosines


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


class _Scorer:
    """The tables that all blocks share, and what the blocks have added up to so far."""

    def __init__(self, student: Tensor, guide: Tensor | None, batch: BatchIndex, config: LossConfig) -> None:
        assert student.dtype in (torch.float32, torch.float64), "similarities need fp32"
        self.batch, self.config, self.num_texts = batch, config, len(student)
        self.texts = batch.texts
        self.students = student.detach()[self.texts]
        self.guides = None if guide is None else guide.to(student.dtype)[self.texts]
        self.identity = batch.identity[self.texts]
        self.groups = None if batch.groups is None else batch.groups[self.texts]
        self.gradients = torch.zeros_like(self.students, dtype=torch.float64)
        self.loss = student.new_zeros((), dtype=torch.float64)
        self.layouts = {own: Layout(batch, own) for own in batch.configs(config)}
        names = count_names(layout.parts for layout in self.layouts.values())
        self.counts = {name: student.new_zeros((), dtype=torch.float64) for name in names}

    def add(self, block: range) -> None:
        config = self.batch.config_of(block.start, self.config)
        _Block(self, block, self.layouts[config], config).add()

    def share(self) -> LossShare:
        gradient = self.gradients.new_zeros(self.num_texts, self.students.shape[1])
        return LossShare(self.loss, gradient.index_add_(0, self.texts, self.gradients), self.counts)


class _Block:
    """Some rows, and all their candidates."""

    def __init__(self, scorer: _Scorer, rows: range, layout: Layout, config: LossConfig) -> None:
        self.scorer, self.rows, self.layout, self.config = scorer, rows, layout, config
        self.batch, self.counts, self.device = scorer.batch, scorer.counts, scorer.students.device
        first_anchor = len(scorer.texts) - self.batch.num_rows
        self.anchor = slice(first_anchor + rows.start, first_anchor + rows.stop)
        self.positive = slice(rows.start, rows.stop)
        """Where the rows' own texts stand in the table."""
        self.dropped = DroppedWeight(len(rows), layout.columns, self.device)
        self.guide_positive, self.promoted = None, None
        if (guides := scorer.guides) is not None:
            self.guide_positive = (guides[self.anchor] * guides[self.positive]).sum(dim=1, keepdim=True)
            if (several := self.batch.further_positives) is not None:
                further = further_cosines(guides[self.anchor], guides, several[rows.start : rows.stop])
                self.guide_positive = mean_over_positives(self.guide_positive, *further)
            self.counts["guide_positive_similarity"] += self.guide_positive.sum()
            if config.false_negatives == "positive":
                self.promoted = Promoted(self.guide_positive, config)

    def add(self) -> None:
        scores = self._scores()
        positives = self._take_positives(scores)
        self._drop(scores)
        if self.promoted is not None:
            self.counts["promoted"] += self.promoted.is_there.sum()
            positives = self.promoted.join(positives, self.layout, self.config.temperature)
        self._add_loss_and_gradient(scores, positives)

    def _scores(self) -> Float[Tensor, "b all"]:
        """Every candidate's similarity / τ: an anchor's candidates, then its positive's."""
        students, layout = self.scorer.students, self.layout
        anchors, positives = (students[rows] / self.config.temperature for rows in (self.anchor, self.positive))
        scores = students.new_empty(len(anchors), layout.width)
        torch.mm(anchors, students[layout.for_anchors].T, out=scores[:, : layout.anchor_width])
        if "pp" in layout.parts:
            torch.mm(positives, students[layout.for_positives].T, out=scores[:, layout.anchor_width :])
        return scores

    def _take_positives(self, scores: Float[Tensor, "b all"]) -> Positives:
        """The rows' positives. They and the rows themselves are no candidates any more."""
        students, rows = self.scorer.students, self.rows
        for first in self.layout.own_columns:
            scores[:, first + rows.start : first + rows.stop].fill_diagonal_(-torch.inf)
        anchors = students[self.anchor]
        cosine = (anchors * students[self.positive]).sum(dim=1, keepdim=True, dtype=torch.float64)
        self.counts["positive_similarity"] += cosine.sum()
        place = torch.arange(rows.start, rows.stop, device=self.device).unsqueeze(1)
        positives = Positives(cosine, torch.ones_like(cosine), place, torch.zeros_like(place, dtype=torch.bool))
        if self.batch.further_positives is None:
            return positives
        for further in self.layout.further.of(rows, self.device):
            scores[further.row, further.column] = -torch.inf
            self._no_candidates(further.num_by_part)
        place = self.batch.further_positives[rows.start : rows.stop]
        cosine, is_there = further_cosines(anchors, students, place, torch.float64)
        return positives.joined(Positives(cosine, is_there.double(), place.clamp(min=0), torch.zeros_like(is_there)))

    def _drop(self, scores: Float[Tensor, "b all"]) -> None:
        """Scores of -inf for all that a rule takes out, counted and weighed."""
        for known in self.layout.known.of(self.rows, self.device):
            self.dropped.add_pairs("known", known, scores[known.row, known.column])
            scores[known.row, known.column] = -torch.inf
            self._no_candidates(known.num_by_part)
            self.counts["known_dropped"] += len(known.row)
        for part, table, columns in self.layout.slices:
            self._drop_by_text(part, table, scores[:, columns])
            if self.scorer.guides is not None:
                self._drop_by_guide(part, table, columns, scores[:, columns])
        self.counts["identical_dropped"] -= len(self.rows) * len(self.layout.own_columns)  # the rows themselves

    def _drop_by_text(self, part: str, table: slice, piece: Float[Tensor, "b c"]) -> None:
        """Equal texts, and known positives by group."""
        identity, groups, num_candidates = self.scorer.identity, self.scorer.groups, piece.numel()
        same = identity[table] == identity[self.anchor].unsqueeze(1)
        same.logical_or_(identity[table] == identity[self.positive].unsqueeze(1))
        if part == "an" and self.config.negatives == "own":
            others = ~self._is_own_negative(table)
            piece.masked_fill_(others, -torch.inf)
            same &= ~others
            self.counts["candidates_an"] -= others.count_nonzero()
        num_gone = num_identical = self._leave("identical", part, piece, same)
        self.counts["identical_dropped"] += num_identical
        if groups is not None:
            known = (groups[table] == groups[self.anchor].unsqueeze(1)).logical_and_(piece > -torch.inf)
            num_known = self._leave("known", part, piece, known)
            self.counts["known_dropped"] += num_known
            num_gone = num_gone + num_known
        self.counts[f"candidates_{part}"] += num_candidates - num_gone

    def _drop_by_guide(self, part: str, table: slice, columns: slice, piece: Float[Tensor, "b c"]) -> None:
        assert self.scorer.guides is not None and self.guide_positive is not None
        query = self.scorer.guides[self.positive if part == "pp" else self.anchor]
        guide_scores = query @ self.scorer.guides[table].T
        masked = false_negatives(guide_scores, self.guide_positive, self.config).logical_and_(piece > -torch.inf)
        if part == "an" and self.config.guard_negatives:
            masked &= ~self._is_own_negative(table)
        if self.promoted is not None:
            self.promoted.consider(masked, guide_scores, piece, columns.start)
        self.counts[f"masked_{part}"] += self._leave("masked", part, piece, masked)

    def _is_own_negative(self, table: slice) -> Bool[Tensor, "b c"]:
        """Which of a piece of the hard negatives are the rows' own."""
        assert self.batch.negative_rows is not None
        first = len(self.batch.all_positives)
        rows = torch.arange(self.rows.start, self.rows.stop, device=self.device).unsqueeze(1)
        return self.batch.negative_rows[table.start - first : table.stop - first] == rows

    def _leave(self, rule: str, part: str, piece: Float[Tensor, "b c"], who: Bool[Tensor, "b c"]) -> Int[Tensor, ""]:
        """How many they are."""
        self.dropped.add(rule, part, piece, who)
        piece.masked_fill_(who, -torch.inf)
        return who.count_nonzero()

    def _no_candidates(self, num_by_part: dict[str, int]) -> None:
        for part, count in num_by_part.items():
            self.counts[f"candidates_{part}"] -= count

    def _add_loss_and_gradient(self, scores: Float[Tensor, "b all"], positives: Positives) -> None:
        """In place of the scores: torch.logsumexp and softmax would need as much memory again."""
        largest = scores.amax(dim=1) if scores.shape[1] else scores.new_full((len(scores),), -torch.inf)
        self.counts["rows_without_negatives"] += (largest == -torch.inf).sum()
        largest.clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(largest.unsqueeze(1)).exp_()
        by_part = [weights[:, columns].sum(dim=1).double() for columns in self.layout.columns.values()]
        log_negatives = sum(by_part, largest.new_zeros(len(largest), dtype=torch.float64)).log() + largest  # log N
        for name, share in self.dropped.shares([total.log() + largest for total in by_part]).items():
            self.counts[name] += share

        slopes = positives.against(log_negatives, self.config)
        self.scorer.loss += slopes.loss.sum() / self.batch.num_rows
        slope = 1 / (self.config.temperature * self.batch.num_rows)
        scale = ((largest + slopes.log_scale).exp() * slope).to(scores.dtype)
        self._pull_positives(positives, slopes.pull * slope)
        self._push_negatives(weights, scale.unsqueeze(1))

    def _pull_positives(self, positives: Positives, pull: Float[Tensor, "b q"]) -> None:
        students, gradients = self.scorer.students, self.scorer.gradients
        anchors, own = students[self.anchor], students[self.positive]
        gradients[self.anchor] -= pull[:, :1] * own
        gradients[self.positive] -= pull[:, :1] * anchors
        for column in range(1, pull.shape[1]):
            place, of_positive = positives.place[:, column], positives.of_positive[:, column].unsqueeze(1)
            strength = pull[:, column].unsqueeze(1)
            towards = strength * students[place]
            gradients[self.anchor] -= towards * ~of_positive
            gradients[self.positive] -= towards * of_positive
            gradients.index_add_(0, place, strength * torch.where(of_positive, own, anchors), alpha=-1)

    def _push_negatives(self, weights: Float[Tensor, "b all"], scale: Float[Tensor, "b 1"]) -> None:
        """weights: exp(s/τ) of the negatives, which scale makes slopes."""
        students, gradients, layout = self.scorer.students, self.scorer.gradients, self.layout
        width, has_positives = layout.anchor_width, "pp" in layout.parts
        gradients[self.anchor] += (weights[:, :width] @ students[layout.for_anchors]).mul_(scale)
        if has_positives:
            gradients[self.positive] += (weights[:, width:] @ students[layout.for_positives]).mul_(scale)
        anchors, positives = students[self.anchor] * scale, students[self.positive] * scale
        for part, table, columns in layout.slices:
            if part == "pp":
                continue  # taken together with ap, whose candidates are the same
            from_rows = weights[:, columns].T @ anchors
            if part == "ap" and has_positives:
                from_rows.addmm_(weights[:, width + columns.start : width + columns.stop].T, positives)
            gradients[table] += from_rows
