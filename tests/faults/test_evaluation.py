"""The worker of an evaluation task is killed: the task is run again, and training is not."""

import random
import signal

import pytest
import tiny

from faults.product import Run, kill, name_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def test_killed_evaluation(started, record, ends_as_undisturbed, random_moments, tmp_path):
    draw = random.Random(1)
    for name in ("OurPairs", "MorePairs"):
        (tmp_path / name).mkdir()
        rows = [{"sentence1": tiny.words(draw, 3, 9), "sentence2": tiny.words(draw, 3, 9), "score": draw.random()}
                for _ in range(20_000)]  # fmt: skip
        tiny.write_jsonl(tmp_path / name / "test.jsonl", rows)
    evaluate = {"tasks": ["OurPairs", "MorePairs"], "local_tasks": str(tmp_path), "baseline": False}
    run = started("killed-evaluation", evaluate=evaluate)
    run.start()
    run.wait_for(lambda: (run.folder / "model" / "model.safetensors").exists(), "the model")
    trained = (run.folder / "model" / "model.safetensors").stat().st_mtime_ns
    worker = run.wait_for(lambda: _evaluating(run), "an evaluation task")
    kill(worker, signal.SIGKILL)
    record(fault="SIGKILL of an evaluation task", moment="while it ran", recomputed=0)
    assert run.finish() == 0, run.tail()
    assert {path.stem for path in (run.folder / "mteb" / "trained").rglob("*.json")} >= {"OurPairs", "MorePairs"}
    assert (run.folder / "model" / "model.safetensors").stat().st_mtime_ns == trained
    ends_as_undisturbed(run)


def _evaluating(run: Run) -> int | None:
    return next((pid for pid in run.processes() if name_of(pid).startswith("ray::_evaluate")), None)
