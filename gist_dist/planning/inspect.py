"""`gist-dist inspect`: what a guide, a batch size, a temperature and a margin are worth on these data. Trains nothing.

Of every source some rows are drawn and encoded once by the untrained student and the guide. They are cut into batches
of several sizes, and the rules of the loss say for every candidate whether it stays. A candidate's weight in a row is
exp(s/τ) over the sum of all candidates': its share of the gradient that pushes texts away from the row.
"""

# Axes:  b rows looked at   c candidates   n texts of the corpus   u texts of a sample   e width

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gist_dist.common.errors import UserError
from gist_dist.common.progress import Progress, progress_of
from gist_dist.common.text import one_line, percent, text_table
from gist_dist.config import GuideConfig, RunConfig
from gist_dist.core.candidate_table import CandidateTable
from gist_dist.core.candidates import false_negatives
from gist_dist.core.plan import plan_batch
from gist_dist.core.step import batch_index
from gist_dist.data.clusters import cluster_source, neighbours_together
from gist_dist.data.corpus import Corpus
from gist_dist.data.row_rules import joined_by_pairs
from gist_dist.data.sources import Source
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import encode_inputs
from gist_dist.planning.advice import advise, advise_source, size_at, weights_at

logger = logging.getLogger(__name__)

SIZES = (64, 256, 1024, 4096, 16384, 65536)
TEMPERATURES = (0.01, 0.02, 0.05, 0.1)
MARGINS = (-0.1, -0.05, 0.0, 0.05, 0.1)
DEFAULT_ROWS = 2048
TOKENS_OF_SOURCE, FEWEST_ROWS = 150_000, 256
"""Unless a number of rows is asked for, a sample has about so many tokens at most, so that long texts take minutes and
not hours; but never fewer rows."""
SCORED_ROWS, ROWS_AT_ONCE = 512, 64
FEWEST_CLUSTERS = 4
"""Batches that a sample must hold to be clustered; else the nearest smaller size is."""
NEAREST = 10
EXAMPLES = 4
"""Examples shown of each kind and source."""
SAMPLE = 5  # what a seed is for


@dataclass(frozen=True)
class Inspection:
    contents: dict[str, Any]

    def lines(self) -> list[str]:
        """For the terminal: a line a source, then the advice."""
        recipe = self.contents["recipe"]
        rows = [["source", "batch", "known", "left", "taken out", "masked", "precision", "recall", "hardness"]]
        for source in self.contents["sources"]:
            size, weight = size_at(source["sizes"], recipe), weights_at(source, recipe)
            cells = (*(weight[key] for key in ("known_weight", "known_weight_left", "masked_weight")),)
            cells += (size["masked_fraction"], size["precision"], size["recall"], weight["hardness"])
            rows.append([source["name"], f"{size['rows']:,}", *("-" if c is None else percent(c) for c in cells)])
        told = f"weights at temperature {recipe['temperature']:g}, margin {recipe['margin']:g}:"
        return [told, *text_table(rows), "", *self.contents["advice"]]


def inspect(
    config: RunConfig, student: Student, guide: Guide | None, corpus: Corpus, max_rows: int | None = None
) -> Inspection:
    """Measure every source of a prepared corpus. guide: None in mode self. UserError without any guide."""
    check_inspect(config, max_rows)
    progress, sources = Progress(len(corpus.source_names), progress_of(logger)), list[dict[str, Any]]()
    frozen = Guide.copy_of(student, GuideConfig(model=config.student.model))
    names = corpus.source_names
    for number, name in enumerate(names):
        sources.append(_inspect_source(config, frozen, guide, corpus, number, max_rows))
        progress.reach(number + 1, f"inspected {number + 1} of {len(names)} sources, {name} the last")
    recipe = {
        "name": config.name,
        "student": config.student.model,
        "guide": config.guide_or_student.model if config.has_guide_model else "the student itself",
        "global_size": config.batch.global_size,
        "temperature": config.loss.temperature,
        "margin": config.loss.margin,
        "margin_kind": config.loss.margin_kind,
        "mixing": config.data.mixing,
    }
    for source in sources:
        source["advice"] = advise_source(source, recipe)
    contents = {"recipe": recipe, "seconds": progress.seconds, "sources": sources}
    return Inspection(contents | {"advice": advise(sources, recipe)})


def check_inspect(config: RunConfig, max_rows: int | None) -> None:
    """UserError for what could not be measured, before anything is loaded."""
    if config.guide is None:
        raise UserError(
            "guide: there is no guide to inspect; set guide.model, or guide.mode=self to look at the student as its own"
        )
    if max_rows is not None and max_rows < 2:
        raise UserError(f"--rows {max_rows}: a batch has at least 2 rows")


def _inspect_source(
    config: RunConfig, student: Guide, guide: Guide | None, corpus: Corpus, number: int, max_rows: int | None
) -> dict[str, Any]:
    rows = _sample(config, corpus, number, max_rows)
    texts = np.unique(corpus.texts_of(rows))
    chunk = config.batch.tokens_at_once
    embedded = torch.from_numpy(encode_inputs(student, corpus.student_tokens(texts), chunk)).float()
    guided = embedded if guide is None else torch.from_numpy(encode_inputs(guide, corpus.guide_tokens(texts), chunk))
    truth, cluster = _known_clusters(config, corpus, number)
    sample = _Sample(config, corpus, rows, texts, embedded, guided.float(), cluster if truth else None)
    sizes = sorted({size for size in (*SIZES, config.batch.global_size) if size <= len(rows)} or {len(rows)})
    measured = [sample.measure(size) for size in sizes]
    at = size_at(measured, {"global_size": config.batch.global_size})["rows"]
    few = [size for size in sizes if size <= at and FEWEST_CLUSTERS * size <= len(rows)]
    counts = Counter(cluster[corpus.anchors[np.flatnonzero(corpus.source == number)]].tolist()) if truth else {}
    return {
        "name": corpus.source_names[number],
        "rows": int((corpus.source == number).sum()),
        "sampled_rows": len(rows),
        "truth": truth,
        "clusters": len(counts),
        "largest_cluster": max(counts.values(), default=0),
        "sizes": measured,
        "margins": sample.margins(at),
        "clustered": sample.clustered(max(few)) if guide and few else None,
        "agreement": sample.agreement(at),
        "examples": sample.examples(at) if config.tracking.report_texts else [],
    }


def _sample(config: RunConfig, corpus: Corpus, number: int, max_rows: int | None) -> np.ndarray:
    """Rows of a source in random order: so many, or by default as many as the limits allow."""
    rows = np.flatnonzero(corpus.source == number)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(config.seed, spawn_key=(SAMPLE, number))))
    rows = rng.permutation(rows)
    if max_rows is not None:
        return rows[:max_rows]
    rows = rows[:DEFAULT_ROWS]
    lengths = corpus.student_lengths.astype(np.int64)
    tokens = lengths[corpus.anchors[rows]] + lengths[corpus.positives[rows]]
    further, negatives = (corpus.further_of, corpus.num_further), (corpus.negatives_of, corpus.num_negatives)
    for texts_of, counts in (further, negatives):
        row = np.repeat(np.arange(len(rows)), counts[rows])
        tokens = tokens + np.bincount(row, lengths[texts_of(rows)], len(rows)).astype(np.int64)
    return rows[: max(FEWEST_ROWS, int(np.searchsorted(np.cumsum(tokens), TOKENS_OF_SOURCE)))]


def _known_clusters(config: RunConfig, corpus: Corpus, number: int) -> tuple[str | None, Int[np.ndarray, " n"]]:
    """What is known to belong together: a number for every text, equal for texts of one label or one cluster of pairs,
    and whether that comes from "labels" or "pairs"; None where no text is in two pairs, so that nothing is known."""
    recipe = config.data.sources[corpus.recipe_sources[number]]
    rows = np.flatnonzero(corpus.source == number)
    used = np.unique(corpus.texts_of(rows))
    cluster = np.arange(len(corpus.identity))
    if recipe.columns.is_classification:
        labels = dict(Source(recipe, number, config.data.root).labelled())
        names = [labels.get(corpus.text(text), "") for text in used.tolist()]
        cluster[used] = np.unique(names, return_inverse=True)[1]
        return "labels", cluster
    identity = np.unique(corpus.identity, return_inverse=True)[1]
    anchors, positives = corpus.pairs_of(rows)
    groups = joined_by_pairs([(identity[anchors], identity[positives])], int(identity.max()) + 1)
    cluster = np.unique(groups[identity], return_inverse=True)[1]
    return ("pairs" if np.bincount(cluster[corpus.anchors[rows]]).max() > 1 else None), cluster


@dataclass(frozen=True)
class _Sample:
    """Rows of a source in random order, with both models' embeddings of their texts."""

    config: RunConfig
    corpus: Corpus
    rows: np.ndarray
    texts: np.ndarray
    """Text numbers, ascending [u]."""
    student: Float[Tensor, "u d"]
    guide: Float[Tensor, "u e"]
    cluster: Int[np.ndarray, " n"] | None
    """A number for every text of the corpus, equal where texts are known to mean the same."""

    def batches(self, size: int) -> "Iterator[_Batch]":
        """Batches of so many rows, until SCORED_ROWS rows have been scored."""
        num_batches = max(1, min(len(self.rows) // size, -(-SCORED_ROWS // size)))
        for start in range(0, num_batches * size, size):
            plan = plan_batch(self.corpus, self.rows[start : start + size], 0, self.config.batch.tokens_at_once, False)
            batch = batch_index(plan, torch.device("cpu"))
            at = torch.from_numpy(np.searchsorted(self.texts, plan.texts))
            table = CandidateTable(batch, self.guide[at], self.config.loss)
            cluster = None if self.cluster is None else torch.from_numpy(self.cluster[plan.texts])
            yield _Batch(table, self.student[at], cluster, plan.texts, min(size, SCORED_ROWS))

    def measure(self, size: int) -> dict[str, Any]:
        temperatures = sorted({*TEMPERATURES, self.config.loss.temperature})
        counts, weights = _Counts(), {temperature: _Weights() for temperature in temperatures}
        for batch in self.batches(size):
            for block in batch.blocks():
                masked = block.masked(self.config.loss.margin)
                counts.add(block, masked)
                for temperature, sums in weights.items():
                    sums.add(block, masked, temperature)
        told = [{"temperature": t, **sums.means(self.cluster is not None)} for t, sums in weights.items()]
        return {"rows": size} | counts.shares(self.cluster is not None) | {"temperatures": told}

    def clustered(self, size: int) -> dict[str, Any]:
        """As measure(), of batches of neighbours. Among all rows of the source neighbours are nearer than in a sample,
        and so batches harder."""
        ends = [np.searchsorted(self.texts, of[self.rows]) for of in (self.corpus.anchors, self.corpus.positives)]
        vectors = torch.nn.functional.normalize(self.guide[ends[0]] + self.guide[ends[1]], dim=1).numpy()
        places, seed = np.arange(len(self.rows)), self.config.seed
        clusters = cluster_source(places, lambda chosen: vectors[chosen], size, seed)
        order = neighbours_together(places, clusters, 1.0, np.random.default_rng(seed))
        return replace(self, rows=self.rows[order]).measure(size)

    def margins(self, size: int) -> list[dict[str, Any]]:
        margins = sorted({*MARGINS, self.config.loss.margin})
        counts, weights = defaultdict[float, _Counts](_Counts), defaultdict[float, _Weights](_Weights)
        for batch in self.batches(size):
            for block in batch.blocks():
                for margin in margins:
                    masked = block.masked(margin)
                    counts[margin].add(block, masked)
                    weights[margin].add(block, masked, self.config.loss.temperature)
        known = self.cluster is not None
        return [{"margin": m, **counts[m].shares(known), **weights[m].means(known)} for m in margins]

    def agreement(self, size: int) -> dict[str, float]:
        """How alike student and guide order the candidates of a row: the mean correlation of their similarities, and
        the share of the student's ten nearest candidates that are among the guide's ten nearest."""
        correlations, overlaps = list[float](), list[float]()
        for batch in self.batches(size):
            for block in batch.blocks():
                ours, theirs = (s.masked_fill(block.identical, torch.nan) for s in (block.scores, block.guide_scores))
                ours, theirs = (s - s.nanmean(dim=1, keepdim=True) for s in (ours, theirs))
                spread = ((ours**2).nansum(dim=1) * (theirs**2).nansum(dim=1)).sqrt().clamp_min(1e-12)
                correlations += ((ours * theirs).nansum(dim=1) / spread).tolist()
                nearest = min(NEAREST, ours.shape[1])
                tops = [s.nan_to_num(-torch.inf).topk(nearest).indices for s in (ours, theirs)]
                overlaps += (tops[0].unsqueeze(2) == tops[1].unsqueeze(1)).any(dim=2).double().mean(dim=1).tolist()
        return {"correlation": float(np.mean(correlations)), "nearest_in_common": float(np.mean(overlaps))}

    def examples(self, size: int) -> list[dict[str, Any]]:
        """The heaviest candidates that were rightly dropped, dropped though not known, and kept though known."""
        picked: dict[str, list[tuple[float, _Batch, int, int]]] = defaultdict(list)
        for batch in self.batches(size):
            for block in batch.blocks():
                masked = block.masked(self.config.loss.margin)
                kinds = {"dropped": masked}
                if block.known is not None:
                    kinds = {
                        "dropped, known": masked & block.known,
                        "dropped, not known": masked & ~block.known,
                        "kept, known": block.known & ~masked,
                    }
                for kind, chosen in kinds.items():
                    best, column = block.scores.masked_fill(~chosen, -torch.inf).max(dim=1)
                    found = zip(best.tolist(), block.rows.tolist(), column.tolist(), strict=True)
                    picked[kind] += [(score, batch, row, at) for score, row, at in found if score > -torch.inf]
        examples, seen = list[dict[str, Any]](), set[tuple[int, int]]()
        for kind, picks in picked.items():
            left = EXAMPLES
            for _, owner, row, at in sorted(picks, key=lambda pick: -pick[0]):
                pair = owner.pair(row, at)
                if left and pair not in seen and pair[::-1] not in seen:
                    seen.add(pair)
                    left -= 1
                    examples.append({"kind": kind} | owner.describe(self.corpus, row, at))
        return examples


@dataclass(frozen=True)
class _Batch:
    table: CandidateTable
    student: Float[Tensor, "u d"]
    cluster: Int[Tensor, " u"] | None
    texts: np.ndarray
    """Text numbers of the batch."""
    num_scored: int

    def blocks(self) -> "Iterator[_Block]":
        for rows in torch.arange(self.num_scored).split(ROWS_AT_ONCE):
            yield _Block.of(self, rows)

    def pair(self, row: int, column: int) -> tuple[int, int]:
        return int(self.texts[int(self.table.query(row, column))]), int(self.texts[int(self.table.texts[column])])

    def describe(self, corpus: Corpus, row: int, column: int) -> dict[str, Any]:
        batch, at = self.table.batch, torch.tensor([row])
        texts = {"anchor": batch.anchors[row], "positive": batch.positives[row], "candidate": self.table.texts[column]}
        cosines = {
            "student_positive": self.table.of_positive(self.student, at),
            "student_candidate": self.table.of_pair(self.student, row, column),
            "guide_positive": self.table.guide_positive(at),
            "guide_candidate": self.table.of_pair(self.table.guide, row, column),
        }
        return {
            "block": self.table.block_of[column],
            **{role: one_line(corpus.text(int(self.texts[int(text)])), 200) for role, text in texts.items()},
            **{name: round(float(cosine), 4) for name, cosine in cosines.items()},
        }


@dataclass(frozen=True)
class _Block:
    """Some rows of a batch against all its candidates."""

    table: CandidateTable
    rows: Int[Tensor, " b"]
    scores: Float[Tensor, "b c"]
    positive: Float[Tensor, "b 1"]
    guide_scores: Float[Tensor, "b c"]
    guide_positive: Float[Tensor, "b 1"]
    identical: Bool[Tensor, "b c"]
    """No candidates: the row's own texts, and equal ones; other rows' negatives where only own count."""
    guarded: Bool[Tensor, "b c"]
    """Own negatives that the guide may not take out."""
    known: Bool[Tensor, "b c"] | None
    """Known to mean what the row means: a false negative."""

    @classmethod
    def of(cls, batch: _Batch, rows: Int[Tensor, " b"]) -> "_Block":
        table, identical, known = batch.table, batch.table.no_candidates(rows), None
        if batch.cluster is not None:
            own = batch.cluster[table.batch.anchors[rows]].unsqueeze(1)
            known = (batch.cluster[table.texts] == own) & ~identical
        ours, theirs = (table.scores(embeddings, rows) for embeddings in (batch.student, table.guide))
        positive = table.of_positive(batch.student, rows)
        return cls(
            table, rows, ours, positive, theirs, table.guide_positive(rows), identical, table.guarded(rows), known
        )

    def masked(self, margin: float) -> Bool[Tensor, "b c"]:
        """What the guide takes out, were this the margin."""
        loss = self.table.loss.model_copy(update={"margin": margin})
        return false_negatives(self.guide_scores, self.guide_positive, loss) & ~self.identical & ~self.guarded


class _Counts(Counter[str]):
    """Candidates, and how many of them are masked, known, or both."""

    def add(self, block: _Block, masked: Bool[Tensor, "b c"]) -> None:
        self["candidates"] += block.identical.numel() - int(block.identical.count_nonzero())
        self["masked"] += int(masked.count_nonzero())
        if block.known is not None:
            self["known"] += int(block.known.count_nonzero())
            self["both"] += int((masked & block.known).count_nonzero())

    def shares(self, has_truth: bool) -> dict[str, float | None]:
        def share(part: str, whole: str) -> float | None:
            return self[part] / self[whole] if self[whole] else None

        told = {"masked_fraction": share("masked", "candidates"), "known_fraction": share("known", "candidates")}
        told |= {"precision": share("both", "masked"), "recall": share("both", "known")}
        return told if has_truth else told | dict.fromkeys(("known_fraction", "precision", "recall"))


class _Weights:
    """Means over rows of the weight that known false negatives and masked candidates have in a row."""

    def __init__(self) -> None:
        self.sums, self.num_rows = defaultdict[str, float](float), 0

    def add(self, block: _Block, masked: Bool[Tensor, "b c"], temperature: float) -> None:
        scores = (block.scores / temperature).masked_fill(block.identical, -torch.inf)
        largest = scores.amax(dim=1, keepdim=True).clamp_min(-1e30)
        weights = (scores - largest).exp()
        total, kept = weights.sum(dim=1), weights.masked_fill(masked, 0).sum(dim=1)
        sums = {"masked_weight": (total - kept) / total}
        if block.known is not None:
            known, left = (weights * block.known).sum(dim=1), (weights * (block.known & ~masked)).sum(dim=1)
            sums |= {"known_weight": known / total, "known_weight_left": left / total}
            sums |= {"wrong_weight": (total - kept - (known - left)) / total}
        odds = kept.log() + largest[:, 0] - block.positive[:, 0] / temperature
        sums["hardness"] = odds.sigmoid()
        for name, values in sums.items():
            self.sums[name] += float(values.nan_to_num(0).double().sum())
        self.num_rows += len(scores)

    def means(self, has_truth: bool) -> dict[str, float | None]:
        """Shares of the weight of all candidates, masked or not. masked_weight: taken out by the guide. known_weight:
        on known false negatives; known_weight_left: on those that stay. wrong_weight: taken out and not known.
        hardness: 1 − the positive's probability among what stays."""
        told = {n: self.sums[n] / self.num_rows for n in ("masked_weight", "hardness")}
        known = ("known_weight", "known_weight_left", "wrong_weight")
        return told | {n: self.sums[n] / self.num_rows if has_truth else None for n in known}
