"""The law for the rules beyond the paper's: several positives, known ones, promotion, which negatives, a loss for each
source, clustered batches. Loss and gradients of real steps in fp64, on one to three workers and cut in several ways,
against the reference, which is told of the rules from the rows as they were written.
"""

import random
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Row, embedded_by_stock_models, gradients_of, reference_loss
from test_law import MACHINERY, assert_equal_gradients
from tiny import double, one_step, prepared, recipe, run_group, save_tiny_model, words, write_jsonl

from gist_dist.config import RunConfig
from gist_dist.core.collectives import World
from gist_dist.data.clusters import RowClusters
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler
from gist_dist.recipe import parse_config

WORLD_SIZES = (1, 2, 3)
PROMOTION = {"false_negatives": "positive", "promotion": {"most": 2}}
BY_GUIDE = {"false_negatives": "positive", "promotion": {"margin": -0.05, "most": 3, "weight": "guide"}}
OTHER_SOURCE = {"temperature": 0.3, "contrast_anchors": False, "negatives": "own", "margin": 0.1}

RULES: dict[str, dict[str, Any]] = {
    "several positives, mean": {},
    "several positives, sum": {"loss": {"positives": "sum"}},
    "several positives without a guide": {"guided": False},
    "several positives, sum, without a guide": {"guided": False, "loss": {"positives": "sum"}},
    "promotion": {"loss": PROMOTION},
    "promotion, weighted, sum": {"loss": BY_GUIDE | {"positives": "sum"}},
    "own negatives": {"loss": {"negatives": "own"}},
    "guarded negatives": {"loss": {"guard_negatives": True, "margin": 0.3}},
    "hard negatives alone": {"loss": {"in_batch": False}},
    "a loss for each source": {"source_loss": OTHER_SOURCE},
    "nothing known": {"known": "off"},
    "known clusters": {"known": "clusters"},
    "labels": {"labels": True},
    "clustered batch": {"mixing": "clustered"},
    "own, guarded, promotion": {"loss": PROMOTION | {"negatives": "own", "guard_negatives": True}},
    "a loss for each source, labels, clusters": {"source_loss": OTHER_SOURCE, "labels": True, "known": "clusters"},
    "own hard negatives alone, sum": {"loss": {"in_batch": False, "negatives": "own", "positives": "sum"}},
    "all at once": {
        "loss": BY_GUIDE | {"positives": "sum", "guard_negatives": True, "margin_kind": "relative", "margin": 0.1},
        "source_loss": OTHER_SOURCE, "labels": True, "mixing": "clustered",
    },
}  # fmt: skip


def rows_of_two_sources() -> list[list[dict[str, Any]]]:
    """16 rows and 8, half of them with several positives, and copies of those in every other role."""
    rng = random.Random(8)
    rows = [
        {
            "anchor": words(rng, 1, 6),
            "positive": [words(rng, 2, 12) for _ in range(1 + number % 2 * (1 + number % 3))],
            "negatives": [words(rng, 1, 9) for _ in range(1 + number % 2)],
            "kind": number % 5 or None,
        }
        for number in range(24)
    ]
    several = [*rows[1]["positive"], *rows[5]["positive"]]
    assert len(several) == 7
    rows[2]["positive"] = [several[1]]  # a further positive that another row has as its only one,
    rows[4]["anchor"] = several[4]  # as its anchor,
    rows[6]["negatives"] = [several[5], words(rng, 2, 3)]  # as a negative,
    rows[5]["negatives"] = [several[5]]  # a row as its own negative,
    rows[7]["positive"] += [several[1], rows[7]["positive"][0].upper() + " "]  # and among others; one text twice
    rows[9]["positive"] = [*rows[9]["positive"][:1], rows[9]["anchor"].upper(), rows[10]["anchor"]]
    rows[20]["positive"] = [several[2], words(rng, 2, 4)]
    return [rows[:16], rows[16:]]


class Stage:
    """Models and corpora on disk, and what every world made of every rule."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student = save_tiny_model(folder / "student", width=32, seed=1)
        self.guide = save_tiny_model(folder / "guide", width=16, layers=1, seed=2)
        self.rows = rows_of_two_sources()
        self.sources = [write_jsonl(folder / f"{n}.jsonl", rows) for n, rows in enumerate(self.rows)]
        self.corpora: dict[tuple[bool, bool], Path] = {}
        self.outcomes: dict[int, dict[tuple[str, str], list[dict[str, Any]]]] = {}

    def tree(self, name: str, **batch: Any) -> dict[str, Any]:
        rule = RULES[name]
        columns = {"columns": {"label": "kind"}} if rule.get("labels") else {}
        sources = [{"path": str(path), **columns} for path in self.sources]
        sources[1]["loss"] = rule.get("source_loss", {})
        mixing, known = rule.get("mixing", "mixed"), rule.get("known", "pairs")
        guide = self.guide if rule.get("guided", True) else None
        return recipe(
            self.folder, self.student, guide, loss={"temperature": 0.1, **rule.get("loss", {})},
            data={"sources": sources, "mixing": mixing, "known_positives": known}, batch={"global_size": 8} | batch,
        )  # fmt: skip

    def corpus(self, name: str) -> Path:
        key = RULES[name].get("guided", True), RULES[name].get("labels", False)
        if key not in self.corpora:
            self.corpora[key] = prepared(self.tree(name))[1].folder
        return self.corpora[key]

    def of(self, world_size: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """By rule and machinery: what every rank got. One process group for all of them."""
        if world_size not in self.outcomes:
            keys = [(name, machinery) for name in RULES for machinery in ("small pieces", "one piece")]
            jobs = [(self.tree(name, **MACHINERY[cut]), str(self.corpus(name))) for name, cut in keys]
            by_rank = run_group(run_steps, world_size, self.folder / f"world-{world_size}", jobs)
            self.outcomes[world_size] = {key: [of[n] for of in by_rank] for n, key in enumerate(keys)}
        return self.outcomes[world_size]


def batch_of(config: RunConfig, corpus: Corpus) -> np.ndarray:
    """All rows; where batches are clustered, the first of those."""
    corpus.recipe = config
    if config.data.mixing != "clustered":
        return np.arange(corpus.num_rows)
    corpus.clusters = RowClusters((np.arange(corpus.num_rows) % 3).astype(np.int32), "by hand")
    return Sampler(corpus, config).rows(1)


def run_steps(world: World, jobs: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    outcomes, encoders = [], {}
    for tree, folder in jobs:
        config, corpus = parse_config(tree), Corpus(Path(folder))
        for section in (config.student, config.guide):
            if section and section not in encoders:
                encoders[section] = double(section)
        rows = batch_of(config, corpus)
        student, guide = encoders[config.student], encoders.get(config.guide)
        outcomes.append(one_step(world, config, corpus, student, guide, rows=rows))
    return outcomes


def expected_of(stage: Stage, name: str) -> tuple[float, dict[str, np.ndarray], Counter]:
    config, corpus = parse_config(stage.tree(name)), Corpus(stage.corpus(name))
    batch = batch_of(config, corpus)
    chosen = [(int(s), int(n)) for s, n in zip(corpus.source[batch], corpus.number[batch], strict=True)]
    every = [(s, row) for s, rows in enumerate(stage.rows) for row in rows]
    texts = sorted({t for _, row in every for t in (row["anchor"], *row["positive"], *row["negatives"])})
    number = {text: i for i, text in enumerate(texts)}
    guide = stage.guide if config.guide else None
    student, embeddings, guide_embeddings, identity = embedded_by_stock_models(stage.student, guide, texts)

    def identity_of(text: str) -> tuple[int, ...]:
        return identity[number[text]]

    def as_row(row: dict[str, Any]) -> Row:
        first, *others = row["positive"]
        further, seen = list[int](), {identity_of(row["anchor"]), identity_of(first)}
        for text in others:
            if identity_of(text) not in seen:
                seen.add(identity_of(text))
                further.append(number[text])
        return Row(number[row["anchor"]], number[first], tuple(number[n] for n in row["negatives"]), tuple(further))

    pairs = {(identity_of(row["anchor"]), identity_of(text)) for _, row in every for text in row["positive"]}
    rows = [as_row(stage.rows[source][of]) for source, of in chosen]
    known = set[tuple[int, int]]()
    for i, row in enumerate(rows):
        ends = {identity[t] for t in (row.anchor, row.positive, *row.further)}
        partners = {identity[t] for t in row.further}
        if config.data.known_positives == "pairs":
            partners |= {y for x, y in pairs if x in ends} | {x for x, y in pairs if y in ends}
        known |= {(i, t) for t in range(len(texts)) if identity[t] in partners}
    clusters, has_labels = config.data.known_positives == "clusters", RULES[name].get("labels", False)
    groups = groups_of(pairs if clusters else set(), has_labels, every, identity_of, identity)
    losses = [config.loss_of(config.data.sources[source]) for source, _ in chosen]
    groups = groups if clusters or has_labels else None
    loss, counts = reference_loss(rows, embeddings, guide_embeddings, identity, losses, known, groups)
    loss.backward()
    counts["rows_of_several"] = sum(bool(row.further) for row in rows)
    return loss.item(), gradients_of(student), counts


def groups_of(pairs, has_labels, every, identity_of, identity) -> list[int]:
    """Of every text: joined by pairs, and by labels of one source where those are read, over any number of steps."""
    joined = set(pairs) | {
        (identity_of(row["anchor"]), identity_of(other["anchor"]))
        for source, row in every for of, other in every
        if has_labels and source == of and row["kind"] and row["kind"] == other["kind"]
    }  # fmt: skip
    group = {one: n for n, one in enumerate(sorted(set(identity)))}
    for _ in range(len(group)):
        for one, other in joined:
            group[one] = group[other] = min(group[one], group[other])
    return [group[one] for one in identity]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("law-of-rules"))


@pytest.fixture(scope="module")
def expected(stage):
    return cache(partial(expected_of, stage))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_step_equals_the_reference(stage, expected, world_size, name):
    loss, gradients, counts = expected(name)
    assert sum(np.abs(gradient).sum() for gradient in gradients.values()) > 0.1
    assert counts["rows_of_several"] >= 3 and counts["known_dropped"] >= 1
    assert counts["promoted"] >= 1 or "promotion" not in name
    for machinery in ("small pieces", "one piece"):
        for outcome in stage.of(world_size)[name, machinery]:
            assert outcome["loss"] == pytest.approx(loss, abs=1e-10), machinery
            assert_equal_gradients(outcome["gradients"], gradients, 1e-10)
            for count, value in outcome["counts"].items():
                assert value == pytest.approx(counts[count], abs=1e-9), (machinery, count)


def test_rules_differ(expected):
    """Each changes the loss of these rows."""
    losses = [round(expected(name)[0], 9) for name in RULES]
    assert len(set(losses)) == len(losses)
