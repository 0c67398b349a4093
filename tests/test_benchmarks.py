"""The benchmarks' own machinery at toy sizes: that both sides do the same work, and that what is published is right."""

import argparse
import json
from pathlib import Path

import batch_scaling
import ceiling
import gpu
import harness
import loss_stage
import numpy as np
import pytest
import sides
import step
import workers
from sides import SHAPES, Ours, Setting, Theirs
from tiny import run_group

from gist_dist.recipe import parse_config


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def setting(work) -> Setting:
    rows, origin = sides.load_rows("short", 24)
    assert origin == "short: made-up words" and len({t for row in rows for t in row.values()}) == 48
    models = (sides.random_encoder(work / "models" / f"made-up-{name}", SHAPES["tiny"]) for name in ("a", "b"))
    return Setting(*models, tuple(rows), work, max_tokens=32)


@pytest.fixture
def flags(work) -> argparse.Namespace:
    return argparse.Namespace(
        work=work, results=work / "results", repeats=2, budget=60.0, threads=1, activation_gb=1.0, device="cpu",
        mode="online", student=str(work / "models/made-up-a"), guide=str(work / "models/made-up-b"), max_tokens=32,
    )  # fmt: skip


def test_sides_take_turns_and_one_round_always_runs():
    calls: list[str] = []
    named = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    samples = harness.interleave(named, repeats=2, cold=["b"])
    assert "".join(calls) == "a" + "aa" + "bb" + "bb" + "aa"  # of two calls in a turn the second is timed
    assert [len(taken.seconds) for taken in samples.values()] == [2, 2]
    calls.clear()
    harness.interleave(named, repeats=5, budget_s=0)
    assert "".join(calls) == "ab" + "aa" + "bb"


def test_memory_of_a_call_is_seen():
    samples = harness.interleave({"large": lambda: np.ones(20_000_000), "small": lambda: np.ones(20)}, repeats=1)
    assert samples["large"].added_bytes > 150e6 > 50e6 > samples["small"].added_bytes >= 0


def test_published_files_say_what_was_claimed(tmp_path):
    claims = [harness.Claim("good", 2.0, at_least=1.7), harness.Claim("bad", 1.2, at_most=1.05), harness.Claim("so", 3)]
    document = {"question": "Why?", "control": "none", "settings": {}, "results": [{"rows": 1}, {}]}
    harness.publish("guide", document, {"n": "rows"}, claims, lambda axes: axes.plot([1, 2]), tmp_path)
    told = json.loads((tmp_path / "guide.json").read_text())
    assert [claim["holds"] for claim in told["claims"]] == [True, False, None]
    assert {"git_commit", "torch", "cpu", "threads"} <= told["environment"].keys()
    overview = (tmp_path / "README.md").read_text()
    assert "| good | 2.00× | ≥ 1.7 | reached |" in overview and "| bad | 1.20× | ≤ 1.05 | **not reached** |" in overview
    assert "| 1 |\n| – |" in (tmp_path / "guide.md").read_text() and (tmp_path / "guide.svg").stat().st_size > 1000


def test_loss_stages_agree(flags):
    flags.sizes, flags.width, flags.their_largest, flags.mini_batch_sizes = [24], 16, 24, [5]
    result = loss_stage.measure(24, loss_stage.their_losses(flags)[5], flags)
    assert result["loss_difference"] < 1e-5 and result["gradient_difference"] < 1e-4 and result["ratio"]["median"] > 0


def test_both_sides_are_given_the_same_tokens_and_find_the_same_loss(setting):
    told = step.losses_agree(setting, 16)
    assert told["masked"] > 0
    ours = Ours(setting)
    theirs = Theirs(setting, ours, mini_batch_size=5)
    for role, features in zip(("anchor", "positive"), theirs.features(16), strict=True):
        expected = theirs.model.preprocess([row[role] for row in setting.rows[:16]])
        assert features.keys() == expected.keys() - {"modality"}
        assert all((features[name] == expected[name]).all() for name in features)
    assert theirs.num_tokens(16) == ours.plan(16).num_tokens < theirs.padded_tokens(16)


@pytest.mark.slow
def test_steps_are_measured(setting, flags):
    flags.sizes, flags.their_largest, flags.activation_gb = [8, 16], 8, [0.0, 1.0]
    small, large = step.measure(harness.World(), setting, "short", 8, flags)
    assert small["ratio"]["ours 1 GB"]["rounds"] == 2 and "theirs" not in large and not large["ratio"]
    assert step.claims_of(small | {"data": "short", "processes": 1})[0].at_least is None
    claims = step.claims_of(small | {"data": "short", "processes": 1, "rows": 1024})
    assert [claim.at_least for claim in claims] == [None, 4.5, None, 6.0]


def test_ceiling_packs_what_the_step_encoded(setting, flags):
    flags.rows, flags.plain_rows, flags.padding_rows = 16, 12, [24]
    result = ceiling.measure(setting, flags)
    assert result["packed"]["seconds"]["median"] > 0 and 0 <= result["padding"][24] < 0.5
    assert result["losses"][0] == pytest.approx(result["losses"][1], rel=0.2)


def test_plain_training_is_the_same_loss(setting):
    """The control of the ceiling, not only as fast as it but as right."""
    from dataclasses import replace

    ours = Ours(replace(setting, dropout=0.0))
    ours.train_state.optimizer.param_groups[0]["lr"] = ours.train_state.optimizer.param_groups[1]["lr"] = 0.0
    assert ceiling.plain_step(ours, 16) == pytest.approx(ours.step(16).loss, rel=1e-5)


@pytest.mark.slow
def test_workers_share_a_step(setting, flags, tmp_path):
    flags.rows = [16]
    by_rank = run_group(workers.measure, 2, tmp_path, setting, flags)
    result = workers.joined(tuple(told[0] for told in by_rank))
    assert result["speedup"]["median"] > 0 and 0 <= result["imbalance"] < 1
    assert sum(result["shares"].values()) < 1


def test_batch_scaling_measures_a_size_and_names_its_runs(flags, setting):
    flags.data_folder, flags.steps_sizes = None, [24]
    told = batch_scaling.one_size(24, flags)
    assert told["rows_per_second"] > 0 and told["phases"]["loss"] > 0
    flags.data_folder, flags.sources, flags.rows, flags.learning_rate = flags.work, ["a", "b"], 64, 1e-4
    flags.tasks, flags.tasks_folder, flags.workers, flags.address = ["STSBenchmark"], flags.work, 2, None
    runs = [(size, guided, 0) for size in (8, 32) for guided in (True, False)]
    configs = [parse_config(batch_scaling.recipe(flags, *run, is_first=False)) for run in runs]
    assert len({config.run_dir for config in configs}) == 4
    assert [config.optim.steps * config.batch.global_size for config in configs] == [64] * 4
    assert not batch_scaling.is_finished(configs[0].run_dir)


GPU_SECTIONS = ["loss correct", "step correct", "profile", "loss stage", "largest"]


@pytest.mark.slow
def test_gpu_script_runs_at_toy_sizes(flags):
    flags.sizes, flags.kernel_sizes, flags.largest, flags.mini_batch_sizes = [8, 16], [16], 32, [4, 8]
    flags.minutes, flags.smoke, flags.only = 30.0, True, [*GPU_SECTIONS]
    run = gpu.Run(flags)
    run.all((("tiny", "tiny"),))
    assert [r["case"] for r in run.results] == GPU_SECTIONS
    assert not any("skipped" in r for r in run.results)
    assert run.results[0]["gradient_error"] < 1e-5 and run.results[1]["packed step repeated"]
    assert (flags.results / "gpu-smoke.json").exists()
