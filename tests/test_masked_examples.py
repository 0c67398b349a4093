"""Examples of masked candidates: what is shown is what the loss dropped, and showing it changes nothing."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import prepared, recipe, save_tiny_model, words, write_jsonl
from torch.nn import functional as F

from gist_dist.config import LossConfig
from gist_dist.core.candidate_table import mean_guide_similarity
from gist_dist.core.candidates import PARTS, BatchIndex, row_blocks
from gist_dist.core.collectives import World
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import plan_batch
from gist_dist.core.step import Scored
from gist_dist.models.encoder import Guide, Student
from gist_dist.runs.metrics_file import read_metrics
from gist_dist.training import trainer
from gist_dist.training.masked_examples import (
    FILE_NAME,
    MAX_CHARACTERS,
    masked_examples,
    masking_is_shown,
    write_masked_examples,
)

LONG = "amber " * 100


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A recipe and its corpus: 72 rows on 12 topics, so that some positives are another row's too; some negatives."""
    folder, rng = tmp_path_factory.mktemp("masked"), random.Random(0)
    topics = [words(rng, 4, 6) for _ in range(12)]
    rows = [{"anchor": f"{topics[i % 12]} {words(rng, 1, 3)}", "positive": topics[i * 5 % 12]} for i in range(71)]
    rows += [{"anchor": LONG, "positive": f"{LONG} {words(rng, 2, 2)}", "negatives": [words(rng, 3, 5)] * 2}]
    source = write_jsonl(folder / "rows.jsonl", rows)
    tree = recipe(
        folder, save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=1), source,
        student={"dropout": 0.1}, batch={"global_size": 24, "chunk_tokens": 256},
        optim={"steps": 6, "learning_rate": 1e-3}, checkpoint={"every_steps": 4}, tracking={"tensorboard": False},
    )  # fmt: skip
    return prepared(tree)


def scored_batch(corpus, seed=0, dtype=torch.float64):
    """All rows as one batch, with random embeddings that agree a little."""
    plan = plan_batch(corpus, np.arange(corpus.num_rows), 3, 256, with_guide=True)
    batch = BatchIndex(*(torch.from_numpy(a) for a in (plan.anchors, plan.positives, plan.negatives, plan.identity)))
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(len(plan.texts), 8, generator=generator, dtype=dtype)
    student, guide = (
        F.normalize(common + torch.randn(common.shape, generator=generator, dtype=dtype), dim=1) for _ in range(2)
    )
    return plan, Scored(batch, student, guide)


def brute_force(plan, scored, loss):
    """(row, block, candidate) → (student score, guide score) of all that the guide drops, in plain loops."""
    _, student, guide = scored
    found = {}
    for row, (anchor, positive) in enumerate(zip(plan.anchors, plan.positives, strict=True)):
        threshold = float(guide[anchor] @ guide[positive]) - loss.margin
        sides = [("ap", anchor, plan.positives), ("an", anchor, plan.negatives)]
        sides += [("aa", anchor, plan.anchors)] * loss.contrast_anchors
        sides += [("pp", positive, plan.positives)] * loss.contrast_positives
        for block, query, candidates in sides:
            for candidate in candidates:
                same = plan.identity[candidate] in (plan.identity[anchor], plan.identity[positive])
                if not same and float(guide[query] @ guide[candidate]) > threshold + 2e-6:
                    scores = float(student[query] @ student[candidate]), float(guide[query] @ guide[candidate])
                    found[row, block, int(candidate)] = scores
    return found


@pytest.mark.parametrize("flags", [(True, True), (False, True), (False, False)])
def test_examples_are_what_the_loss_drops(stage, flags):
    _, corpus = stage
    loss = LossConfig(margin=0.05, contrast_anchors=flags[0], contrast_positives=flags[1])
    plan, scored = scored_batch(corpus)
    found = masked_examples(corpus, plan, scored, loss, seed=0)
    counts = gist_loss(scored.student, scored.guide, scored.batch, row_blocks(scored.batch, loss, 1e9), loss).counts
    total = {what: sum(int(counts.get(f"{what}_{part}", 0)) for part in PARTS) for what in ("candidates", "masked")}
    assert (found["num_candidates"], found["num_masked"]) == (total["candidates"], total["masked"])
    assert (found["num_rows"], found["step"]) == (72, 3) and found["num_masked"] > 100

    dropped = brute_force(plan, scored, loss)
    by_scores = {(round(student, 4), round(guide, 4)) for student, guide in dropped.values()}
    for example in found["examples"]:
        assert (example["student_candidate"], example["guide_candidate"]) in by_scores
        assert example["guide_candidate"] > example["threshold"]
        assert example["threshold"] == pytest.approx(example["guide_positive"] - 0.05, abs=2e-4)
    closest = [e["student_candidate"] for e in found["examples"] if e["chosen"] == "closest"]
    assert len(closest) == 16 and closest == sorted(closest, reverse=True)
    assert closest[0] == round(max(student for student, _ in dropped.values()), 4)
    drawn = [e["student_candidate"] for e in found["examples"] if e["chosen"] == "random"]
    assert len(drawn) == 16 and np.mean(drawn) < np.mean(closest) - 0.2
    blocks = {e["block"] for e in found["examples"]}
    assert "ap" in blocks and ("aa" in blocks, "pp" in blocks) == flags


def test_texts_are_those_of_the_row_and_each_pair_comes_once(stage):
    _, corpus = stage
    plan, scored = scored_batch(corpus)
    examples = masked_examples(corpus, plan, scored, LossConfig(margin=0.3), seed=0)["examples"]
    texts = {corpus.text(number) for number in range(corpus.num_texts)}
    texts |= {f"{text[:MAX_CHARACTERS]}…" for text in texts if len(text) > MAX_CHARACTERS}
    pairs = []
    for example in examples:
        (row,) = [i for i in range(corpus.num_rows) if corpus.number[i] == example["row"]]
        assert corpus.text(int(corpus.anchors[row])).startswith(example["anchor"].removesuffix("…"))
        assert corpus.text(int(corpus.positives[row])).startswith(example["positive"].removesuffix("…"))
        assert {example["anchor"], example["positive"], example["candidate"]} <= texts
        query = example["positive"] if example["block"] == "pp" else example["anchor"]
        pairs.append(frozenset((query, example["candidate"])))
    assert len(set(pairs)) == len(pairs) == 32
    for chosen in ("closest", "random"):
        rows = [example["row"] for example in examples if example["chosen"] == chosen]
        assert len(set(rows)) == len(rows) == 16


def test_long_texts_are_cut(stage):
    _, corpus = stage
    plan, scored = scored_batch(corpus)
    examples = masked_examples(corpus, plan, scored, LossConfig(margin=2.0), seed=0, num_each=1000)["examples"]
    (example,) = [e for e in examples if e["row"] == 71 and e["chosen"] == "closest"]
    assert example["anchor"] == LONG[:MAX_CHARACTERS] + "…"


def test_the_draw_is_seeded(stage):
    _, corpus = stage
    plan, scored = scored_batch(corpus)
    first, again, other = (masked_examples(corpus, plan, scored, LossConfig(), seed)["examples"] for seed in (0, 0, 1))
    assert first == again and first != other
    assert [e for e in first if e["chosen"] == "closest"] == [e for e in other if e["chosen"] == "closest"]


def test_embeddings_that_are_not_finite_are_no_examples(stage):
    _, corpus = stage
    plan, scored = scored_batch(corpus)
    scored.student.fill_(torch.nan)
    found = masked_examples(corpus, plan, scored, LossConfig(), seed=0)
    json.dumps([e for e in found["examples"] if e["chosen"] == "closest"], allow_nan=False)
    assert not [e for e in found["examples"] if e["chosen"] == "closest"]


def test_a_run_leaves_examples_and_their_being_made_changes_nothing(stage, monkeypatch):
    config, corpus = stage

    def run(name: str) -> tuple[Path, list[dict]]:
        named = config.model_copy(update={"name": name})
        named.run_dir.mkdir()
        trainer.train(named, corpus, Student(named.student), Guide(named.guide), World())
        return named.run_dir, read_metrics(named.run_dir / "metrics.jsonl")

    shown, metrics = run("shown")
    found = json.loads((shown / FILE_NAME).read_text())
    assert found["step"] == 6 and found["num_rows"] == 24 and len(found["examples"]) > 8
    # The step's own count, made by the loss.
    assert found["num_masked"] / found["num_candidates"] == metrics[-1]["masked_fraction"]

    monkeypatch.setattr(trainer, "masking_is_shown", lambda *_: False)
    unshown, metrics_without = run("unshown")
    assert not (unshown / FILE_NAME).exists()
    for key in ("loss", "grad_norm", "masked_fraction"):
        assert [line[key] for line in metrics] == [line[key] for line in metrics_without]
    weights, without = (load_file(folder / "model" / "model.safetensors") for folder in (shown, unshown))
    assert all(np.array_equal(weights[name], without[name]) for name in weights)


def test_shown_at_the_last_step_and_at_checkpoints_and_never_without_a_guide(stage):
    config, _ = stage
    assert [step for step in range(1, 7) if masking_is_shown(config, step, 6)] == [4, 6]
    unguided = config.model_copy(update={"guide": None})
    assert not masking_is_shown(unguided, 6, 6)


def test_a_recipe_may_keep_texts_out_of_the_report(stage, tmp_path):
    """What a run before the switch has left is overwritten; the counts stay."""
    config, corpus = stage
    plan, scored = scored_batch(corpus)
    found = []
    for is_told in (True, False):
        tracking = config.tracking.model_copy(update={"report_texts": is_told})
        private = config.model_copy(update={"output_dir": str(tmp_path), "tracking": tracking})
        write_masked_examples(private, corpus, plan, scored)
        found.append(json.loads((private.run_dir / FILE_NAME).read_text()))
    told, kept = found
    assert len(told["examples"]) == 32 and kept == told | {"examples": []} and kept["num_masked"] > 100


def test_a_disk_that_refuses_costs_the_examples_only(stage, tmp_path, caplog):
    config, corpus = stage
    config = config.model_copy(update={"output_dir": str(tmp_path)})
    (config.run_dir / FILE_NAME / "in-the-way").mkdir(parents=True)
    plan, scored = scored_batch(corpus)
    with caplog.at_level(logging.WARNING):
        write_masked_examples(config, corpus, plan, scored)
    assert "the report goes without it" in caplog.text


def test_similarity_of_candidates_is_the_mean_over_all_pairs_of_rows(stage):
    _, corpus = stage
    _, scored = scored_batch(corpus)
    batch, guide = scored.batch, scored.guide
    g = batch.num_rows
    pairs = [guide[batch.anchors[i]] @ guide[batch.positives[j]] for i in range(g) for j in range(g) if i != j]
    assert mean_guide_similarity(batch, guide) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)
