"""The law: for a fixed global batch, loss and parameter gradient depend on nothing else.

Real gloo process groups of one to four workers and a tiny BERT in fp64, against the reference, which knows no
workers, no chunks and no blocks: one big batch and autograd.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Row, embedded_by_stock_models, gradients_of, reference_loss
from safetensors.numpy import load_file
from tiny import double, one_step, prepared, recipe, run_group, save_tiny_model, wait_for, words, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.config import StudentConfig
from gist_dist.core.collectives import World
from gist_dist.data.corpus import Corpus
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config
from gist_dist.runs.metrics_file import read_metrics
from gist_dist.training.trainer import train

WORLD_SIZES = (1, 2, 3, 4)

FLAGS = [(True, True), (True, False), (False, True), (False, False)]
GUIDED = [None, ("absolute", 0.0), ("absolute", -0.05), ("relative", 0.1)]
"""No guide, or margin_kind and margin."""

MACHINERY = {
    "small pieces": {"chunk_tokens": 20, "loss_gb": 1e-7, "activation_gb": 0.0},
    "medium pieces": {"chunk_tokens": 90, "loss_gb": 1e-5, "activation_gb": 0.002},
    "one piece": {"chunk_tokens": 10**6, "loss_gb": 1.0, "activation_gb": 1.0},
}
"""What a step must not depend on."""

Setting = tuple[str, tuple[str, float] | None, tuple[bool, bool]]
SETTINGS: list[Setting] = [
    *(("rich", guided, flags) for guided in GUIDED for flags in FLAGS),
    *(("plain", guided, flags) for guided, flags in zip(GUIDED, FLAGS, strict=True)),
    *(("few", guided, FLAGS[0]) for guided in GUIDED[:2]),
]
"""Rows, guide and margin, contrast_anchors and contrast_positives."""


def rich_rows() -> list[dict[str, Any]]:
    """17 rows with 0 to 7 hard negatives and every kind of duplicate."""
    rng = random.Random(3)
    rows = [
        {
            "anchor": words(rng, 1, 6),
            "positive": words(rng, 2, 18),
            "negatives": [words(rng, 1, 9) for _ in range(size)],
        }
        for size in (2, 0, 1, 7, 0, 3, 0, 1, *[0] * 9)
    ]
    rows[1]["anchor"] = rows[0]["anchor"]
    rows[2]["positive"] = rows[0]["positive"]
    rows[4]["anchor"] = rows[3]["positive"]
    rows[5]["positive"] = rows[5]["anchor"]
    rows[7]["negatives"] = [rows[8]["positive"], rows[7]["positive"]]
    rows[9]["negatives"] = [rows[0]["negatives"][0]]
    rows[10]["positive"] = rows[11]["positive"].upper() + " "  # another text with the same token ids
    return rows


def plain_rows() -> list[dict[str, Any]]:
    """17 rows, no hard negatives, no text twice."""
    rng = random.Random(4)
    return [{"anchor": words(rng, 1, 6), "positive": words(rng, 7, 18)} for _ in range(17)]


def few_rows() -> list[dict[str, Any]]:
    """Five rows of equally long texts make one chunk and one block: the other workers have nothing to do."""
    rng = random.Random(6)
    return [{"anchor": words(rng, 4, 4), "positive": words(rng, 4, 4)} for _ in range(5)]


class Stage:
    """Models and corpora on disk, and what every world made of every setting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student = save_tiny_model(folder / "student", width=32, seed=1)
        self.guide = save_tiny_model(folder / "guide", width=16, layers=1, seed=2)
        self.rows = {"rich": rich_rows(), "plain": plain_rows(), "few": few_rows()}
        self.corpora: dict[tuple[str, bool], Path] = {}
        for name, rows in self.rows.items():
            source = write_jsonl(folder / f"{name}.jsonl", rows)
            for guided in (True, False):
                tree = recipe(folder, self.student, self.guide if guided else None, source, batch={"global_size": 5})
                self.corpora[name, guided] = prepared(tree)[1].folder
        self._outcomes: dict[tuple[int, str], list[Any]] = {}

    def tree(self, setting: Setting, **sections: Any) -> dict[str, Any]:
        rows, guided, (contrast_anchors, contrast_positives) = setting
        kind, margin = guided or ("absolute", 0.0)
        loss = {"margin_kind": kind, "margin": margin, "temperature": 0.1}
        loss |= {"contrast_anchors": contrast_anchors, "contrast_positives": contrast_positives}
        guide = self.guide if guided else None
        return recipe(self.folder, self.student, guide, self.folder / f"{rows}.jsonl", loss=loss, **sections)

    def outcomes(self, world_size: int) -> dict[tuple[Setting, str], list[dict[str, Any]]]:
        """By setting and machinery: what every rank got. One process group for all of them."""
        jobs = {
            (setting, machinery): (
                self.tree(setting, batch=batch),
                str(self.corpora[setting[0], bool(setting[1])]),
                1,
            )
            for setting in SETTINGS
            for machinery, batch in MACHINERY.items()
        }
        return self._run(world_size, "off", jobs)

    def dropout_outcomes(self, world_size: int) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """By activation budget and step; chunk_tokens is part of what dropout is a function of."""
        setting: Setting = ("rich", ("absolute", 0.0), (True, True))
        jobs = {}
        for kept, activation_gb in {"nothing kept": 0.0, "some kept": 0.002, "all kept": 1.0}.items():
            batch = {
                "chunk_tokens": 60,
                "loss_gb": 1e-5 if activation_gb else 1.0,
                "activation_gb": activation_gb,
            }
            tree = self.tree(setting, batch=batch, student={"dropout": 0.3})
            jobs |= {(kept, step): (tree, str(self.corpora["rich", True]), step) for step in (1, 2)}
        return self._run(world_size, "on", jobs)

    def rounded_outcomes(self, world_size: int) -> dict[str, list[dict[str, Any]]]:
        """By batch.gather_precision."""
        jobs = {}
        for precision in ("fp32", "bf16", "fp16"):
            tree = self.tree(SETTINGS[4], batch=MACHINERY["medium pieces"] | {"gather_precision": precision})
            jobs[precision] = (tree, str(self.corpora[SETTINGS[4][0], True]), 1)
        return self._run(world_size, "rounded", jobs)

    def bf16_outcomes(self, world_size: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """By precision of student and guide, whose weights are fp32, and by machinery; with dropout in the first."""
        jobs = {}
        for precision in ("fp32", "bf16"):
            for machinery, batch in MACHINERY.items():
                models = {"precision": precision} | {"dropout": 0.2 * (machinery == "small pieces")}
                tree = self.tree(SETTINGS[4], batch=batch, student=models)
                tree["guide"] |= {"precision": precision}
                jobs[precision, machinery] = (tree, str(self.corpora[SETTINGS[4][0], True]), 1)
        return self._run(world_size, "bf16", jobs, run_steps_in_fp32)

    def _run(
        self, world_size: int, name: str, jobs: dict[Any, tuple], function: Any = None
    ) -> dict[Any, list[dict[str, Any]]]:
        if (world_size, name) not in self._outcomes:
            folder = self.folder / f"world-{world_size}-{name}"
            self._outcomes[world_size, name] = run_group(function or run_steps, world_size, folder, list(jobs.values()))
        by_rank = self._outcomes[world_size, name]
        return {key: [results[number] for results in by_rank] for number, key in enumerate(jobs)}


def run_steps_in_fp32(world: World, jobs: list[tuple[dict[str, Any], str, int]]) -> list[dict[str, Any]]:
    return run_steps(world, jobs, load=lambda config: (Student if isinstance(config, StudentConfig) else Guide)(config))


def run_steps(
    world: World, jobs: list[tuple[dict[str, Any], str, int]], load: Callable[[Any], Any] = double
) -> list[dict[str, Any]]:
    """One real train_step for every job: recipe, prepared corpus and number of the step."""
    outcomes, encoders = [], {}
    for tree, corpus_folder, step in jobs:
        config, corpus = parse_config(tree), Corpus(Path(corpus_folder))
        for section in (config.student, config.guide):
            if section and section not in encoders:
                encoders[section] = load(section)
        student, guide = encoders[config.student], encoders.get(config.guide)
        outcomes.append(one_step(world, config, corpus, student, guide, step))
    return outcomes


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("law"))


@pytest.fixture(scope="module")
def expected(stage):
    """The reference's loss, gradients and counts, by setting; texts come from the rows, not from a corpus."""
    return cache(partial(reference_step, stage))


def reference_step(stage: Stage, setting: Setting) -> tuple[float, dict[str, np.ndarray], Counter]:
    config = parse_config(stage.tree(setting))
    rows = stage.rows[setting[0]]
    texts = sorted({text for row in rows for text in (row["anchor"], row["positive"], *row.get("negatives", ()))})
    number = {text: i for i, text in enumerate(texts)}
    guide = stage.guide if setting[1] else None
    student, embeddings, guide_embeddings, identity = embedded_by_stock_models(stage.student, guide, texts)
    numbered = [
        Row(number[r["anchor"]], number[r["positive"]], tuple(number[n] for n in r.get("negatives", ()))) for r in rows
    ]
    loss, counts = reference_loss(numbered, embeddings, guide_embeddings, identity, config.loss)
    loss.backward()
    return loss.item(), gradients_of(student), counts


def assert_equal_gradients(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(actual[name], gradient, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_step_equals_the_reference(stage, expected, world_size, setting):
    """Loss, every parameter's gradient, their norm and the counts; on every rank; however the work is cut."""
    loss, gradients, counts = expected(setting)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert norm > 0.1 and (setting[0] != "rich" or counts["identical_dropped"] >= 5)
    if setting[1]:
        assert counts["masked_ap"] > 0
    for machinery in MACHINERY:
        for outcome in stage.outcomes(world_size)[setting, machinery]:
            assert outcome["loss"] == pytest.approx(loss, abs=1e-10), machinery
            assert outcome["grad_norm"] == pytest.approx(norm, abs=1e-9)
            assert_equal_gradients(outcome["gradients"], gradients, 1e-10)
            for name, count in outcome["counts"].items():
                assert count == pytest.approx(counts[name], abs=1e-9), (machinery, name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_machinery_was_what_it_is_called(stage, world_size):
    """Small pieces are many, few rows leave workers idle, and the budget kept none, some and all chunks."""
    outcomes = stage.outcomes(world_size)
    small, medium, one = (outcomes[SETTINGS[0], machinery] for machinery in MACHINERY)
    assert one[0]["num_chunks"] < medium[0]["num_chunks"] < 20 < small[0]["num_chunks"]
    assert all(rank["own_chunks"] for rank in small)
    kept = [sum(rank["kept_bytes"] for rank in ranks) for ranks in (small, medium, one)]
    assert kept[0] == 0 < kept[1] < kept[2]
    few = outcomes[SETTINGS[-1], "one piece"]
    assert [rank["own_chunks"] for rank in few] == [1] + [0] * (world_size - 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_dropout_masks_do_not_depend_on_world_size_or_budget(stage, world_size):
    alone, here = stage.dropout_outcomes(1), stage.dropout_outcomes(world_size)
    for (_, step), ranks in here.items():
        for outcome in ranks:
            reference = alone["nothing kept", step][0]
            assert outcome["loss"] == pytest.approx(reference["loss"], abs=1e-10)
            assert_equal_gradients(outcome["gradients"], reference["gradients"], 1e-10)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rounded_embeddings_are_the_same_for_any_world_size(stage, world_size):
    """One worker rounds too, though it sends nothing."""
    alone, here = stage.rounded_outcomes(1), stage.rounded_outcomes(world_size)
    exact = alone["fp32"][0]
    for precision, coarse in (("bf16", 2**-8), ("fp16", 2**-11)):
        rounded = alone[precision][0]
        assert 1e-8 < abs(rounded["loss"] - exact["loss"]) < 10 * coarse
        for outcome in here[precision]:
            assert outcome["loss"] == pytest.approx(rounded["loss"], abs=1e-10)
            assert_equal_gradients(outcome["gradients"], rounded["gradients"], 1e-10)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bf16_gives_the_same_bits_on_any_number_of_workers(stage, world_size):
    alone, here = stage.bf16_outcomes(1), stage.bf16_outcomes(world_size)
    for key, ranks in here.items():
        for outcome in ranks:
            assert outcome["loss"] == pytest.approx(alone[key][0]["loss"], abs=1e-12)
            for name, gradient in alone[key][0]["gradients"].items():
                np.testing.assert_array_equal(outcome["gradients"][name], gradient, err_msg=name)


def test_bf16_depends_on_how_the_work_is_cut_by_no_more_than_its_rounding(stage):
    """Other chunks are other shapes of products, which round otherwise: all within bf16's distance from fp32."""
    outcomes = stage.bf16_outcomes(1)
    exact = outcomes["fp32", "one piece"][0]
    whole = np.concatenate([gradient.ravel() for gradient in exact["gradients"].values()])
    for machinery in ("medium pieces", "one piece"):
        rounded = outcomes["bf16", machinery][0]
        assert 1e-7 < abs(rounded["loss"] - exact["loss"]) < 0.02 * exact["loss"]
        flat = np.concatenate([rounded["gradients"][name].ravel() for name in exact["gradients"]])
        assert np.linalg.norm(flat - whole) < 0.1 * np.linalg.norm(whole)


def test_dropout_was_on(stage, expected):
    """Losses differ from the one without dropout and from step to step, though the batch is the same."""
    outcomes = stage.dropout_outcomes(1)
    without, _, _ = expected(("rich", ("absolute", 0.0), (True, True)))
    first, second = outcomes["nothing kept", 1][0]["loss"], outcomes["nothing kept", 2][0]["loss"]
    assert abs(first - without) > 1e-3 and abs(second - without) > 1e-3 and abs(first - second) > 1e-3


# Whole runs


class Runs:
    """Five steps of trainer.train in fp64 with dropout, each in a folder of its own."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        rng = random.Random(5)
        rows = [{"anchor": words(rng, 1, 6), "positive": words(rng, 3, 12)} for _ in range(60)]
        for row in rows[::4]:
            row["negatives"] = [words(rng, 2, 8)]
        self.source = write_jsonl(folder / "rows.jsonl", rows)
        self.corpus = prepared(self.tree("prepare"))[1].folder

    def tree(self, name: str, **sections: Any) -> dict[str, Any]:
        fixed = {
            "name": name,
            "student": {"dropout": 0.1},
            "batch": {"global_size": 16, "chunk_tokens": 64, "loss_gb": 1e-6},
            "optim": {"steps": 5, "learning_rate": 1e-3, "max_grad_norm": 1.0},
            "checkpoint": {"every_steps": 2, "keep": 2},
        }
        return recipe(self.folder, self.stage.student, self.stage.guide, self.source, **{**fixed, **sections})

    def run(self, name: str, world_size: int, die_at: int = 0, dtype: str = "float64") -> Path:
        tree = self.tree(name)
        run_dir = parse_config(tree).run_dir
        run_dir.mkdir(exist_ok=True)
        rendezvous = self.folder / f"{name}-{world_size}-{die_at}-group"
        run_group(
            run_train,
            world_size,
            rendezvous,
            tree,
            str(self.corpus),
            die_at,
            dtype,
            exit_code=DEATH if die_at else 0,
        )
        return run_dir

    def interrupted(self, name: str, world_size: int) -> Path:
        """A run whose processes die within step 4: a checkpoint of step 2, metrics of three steps."""
        run_dir = self.run(name, world_size, die_at=4)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000002"]
        assert len(read_metrics(run_dir / "metrics.jsonl")) == 3 and not (run_dir / "model").exists()
        return run_dir


DEATH = 9


def run_train(world: World, tree: dict[str, Any], corpus: str, die_at: int, dtype: str) -> None:
    class Mortal(Student):
        def encode(self, tokens, dropout_seed):
            if dropout_seed[1] == die_at:
                wait_for(config.run_dir / "checkpoints" / f"step-{die_at - 2:08d}" / "COMMIT.json")
                os._exit(DEATH)
            return super().encode(tokens, dropout_seed)

    config = parse_config(tree)
    student, guide = Mortal(config.student), Guide(config.guide)
    student.model.to(getattr(torch, dtype))
    guide.model.to(getattr(torch, dtype))
    train(config, Corpus(Path(corpus)), student, guide, world)


def weights(run_dir: Path) -> dict[str, np.ndarray]:
    return load_file(run_dir / "model" / "model.safetensors")


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured by a clock or counts workers."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    varying = ("seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes", "world_size")
    return [{key: value for key, value in line.items() if key not in varying} for line in lines]


def assert_equal_runs(run_dir: Path, other: Path, tolerance: float) -> None:
    """tolerance 0: bit for bit."""
    for line, other_line in zip(curve(run_dir), curve(other), strict=True):
        assert line.keys() == other_line.keys()
        for key, value in line.items():
            expected = other_line[key]
            if tolerance and expected is not None:
                expected = pytest.approx(expected, rel=tolerance, abs=tolerance)
            assert value == expected, (line["step"], key)
    mine, theirs = weights(run_dir), weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        np.testing.assert_allclose(weight, theirs[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def runs(stage, tmp_path_factory) -> Runs:
    return Runs(stage, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs) -> Path:
    return runs.run("undisturbed", 2)


def test_training_moves_the_model(undisturbed, stage):
    before = load_file(stage.student / "model.safetensors")
    moved = [name for name, weight in weights(undisturbed).items() if not np.allclose(weight, before[name], atol=1e-4)]
    assert any("attention" in name for name in moved) and any("embeddings" in name for name in moved)
    assert [line["step"] for line in curve(undisturbed)] == [1, 2, 3, 4, 5]
    assert all(0 < line["masked_fraction"] < 1 and line["grad_norm"] > 0 for line in curve(undisturbed))
    assert len({line["rows"] for line in curve(undisturbed)}) == 2  # the rest of an epoch makes a smaller batch


@pytest.mark.parametrize("world_size", [1, 3])
def test_run_does_not_depend_on_the_number_of_workers(runs, undisturbed, world_size):
    assert_equal_runs(runs.run(f"world-{world_size}", world_size), undisturbed, 1e-10)


def test_run_in_fp32_does_not_depend_on_the_number_of_workers(runs):
    """Gradients are summed in fp64, so that even here nothing is left for Adam to blow up."""
    one, two = (runs.run(f"single-{n}", n, dtype="float32") for n in (1, 2))
    assert_equal_runs(one, two, 1e-6)


def test_run_repeated_is_bit_equal(runs, undisturbed):
    assert_equal_runs(runs.run("repeated", 2), undisturbed, 0)


def test_resumed_run_is_bit_equal_to_an_undisturbed_one(runs, undisturbed):
    run_dir = runs.interrupted("resumed", 2)
    runs.run("resumed", 2)
    assert_equal_runs(run_dir, undisturbed, 0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_run_resumes_on_another_number_of_workers(runs, undisturbed, world_size):
    run_dir = runs.interrupted(f"resumed-on-{world_size}", 2)
    runs.run(run_dir.name, world_size)
    assert_equal_runs(run_dir, undisturbed, 1e-10)
    assert [line["world_size"] for line in read_metrics(run_dir / "metrics.jsonl")] == [
        2,
        2,
        *[world_size] * 3,
    ]


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "file gone"])
def test_damaged_newest_checkpoint_is_passed_over(runs, undisturbed, damage):
    run_dir = runs.folder / damage.replace(" ", "-")
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "model")
    newest = run_dir / "checkpoints" / "step-00000005"
    file = newest / ("optimizer.safetensors" if damage == "file gone" else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "file gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped byte" else content[:-1])
    runs.run(run_dir.name, 2)
    assert_equal_runs(run_dir, undisturbed, 0)


def test_finished_run_only_writes_its_model_again(runs, undisturbed):
    run_dir = runs.folder / "finished"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "model")
    runs.run("finished", 2)
    assert_equal_runs(run_dir, undisturbed, 0)


def test_checkpoint_of_another_run_is_refused(runs, undisturbed, tmp_path):
    """Another seed, batch size or data: the batches would not go on where they stopped."""
    moved = [json.loads(line) for line in runs.source.read_text().splitlines()]
    moved[1]["negatives"] = moved[0].pop("negatives")  # the same texts, a hard negative in another row
    other_rows = write_jsonl(tmp_path / "rows.jsonl", moved)
    for changed, name in (
        ({"seed": 1}, "seed"),
        ({"batch": {"global_size": 8}}, "batch.global_size"),
        ({"data": {"sources": [{"path": str(other_rows)}]}}, "data"),
    ):
        tree = runs.tree("undisturbed", **changed)
        config, corpus = prepared({**tree, "name": "undisturbed"})
        with pytest.raises(UserError, match=f"{name} was .* and is now"):
            train(config, corpus, double(config.student), double(config.guide), World())
