"""Ctrl-C and SIGTERM: nothing is lost, and nobody is shown a traceback."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
from faults.product import Run

from gist_dist import cli
from gist_dist.common.signals import handled, stop_requests
from gist_dist.core.collectives import World
from gist_dist.models.encoder import Guide, Student
from gist_dist.runs.lock import LOCK_NAME
from gist_dist.runs.metrics_file import read_metrics
from gist_dist.training.trainer import train

STEPS = 200


def test_requests_are_counted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as requests:
        assert (requests.requested, requests.insisted) == (None, False)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert (requests.requested, requests.insisted) == ("SIGTERM", False)  # a batch system may send it twice
        signal.raise_signal(signal.SIGINT)
        assert requests.insisted
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_left_alone_outside_of_the_main_thread():
    seen = []

    def elsewhere() -> None:
        with handled(signal.SIGINT, None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def write_recipe(folder: Path, name: str, **sections) -> dict:
    student, guide = folder / "student", folder / "guide"
    for seed, model in enumerate((student, guide)):
        if not model.exists():
            tiny.save_tiny_model(model, seed=seed)
    rows = folder / "rows.jsonl"
    words = tiny.WORDS
    rows.write_text(
        "".join(
            json.dumps({"anchor": f"{a} {b}", "positive": f"{b} {a} {c}"}) + "\n"
            for a, b, c in zip(words * 4, words[3:] * 5, words[7:] * 6, strict=False)
        )
    )
    sections = {
        "batch": {"global_size": 16}, "optim": {"steps": STEPS}, "checkpoint": {"every_steps": None},
        "cluster": {"num_workers": 2}, "student": {"dropout": 0.1}, **sections,
    }  # fmt: skip
    return tiny.recipe(folder / "runs", student, guide, rows, name=name, **sections)


def send_when(reached, *numbers: int) -> threading.Thread:
    """Signals for this process, half a second apart, once something is so."""

    def send() -> None:
        deadline = time.monotonic() + 200
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.ray
@pytest.mark.slow
def test_stopped_run_goes_on_and_ends_as_an_undisturbed_one(ray_session, tmp_path, capsys):
    """Stopped by Ctrl-C, it goes on with the same command; the undisturbed one is without Ray."""
    tree = write_recipe(tmp_path, "stopped", cluster={"num_workers": 1})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tree))
    folder = tmp_path / "runs" / "stopped"
    sent = send_when(lambda: len(read_metrics(folder / "metrics.jsonl")) >= 3, signal.SIGINT)
    assert cli.main(["train", str(recipe)]) == 130
    sent.join()
    said = capsys.readouterr().err
    assert "stopped with a checkpoint" in said and "the same command resumes" in said and "Traceback" not in said
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert 3 <= done < STEPS
    assert list((folder / "checkpoints").glob(f"step-{done:08d}/COMMIT.json"))  # not a step is lost
    assert not (folder / "model").exists() and not (folder / "STOP").exists() and not (folder / LOCK_NAME).exists()
    assert cli.main(["train", str(recipe)]) == 0
    config, corpus = tiny.prepared({**tree, "name": "undisturbed"})
    config.run_dir.mkdir()
    assert train(config, corpus, Student(config.student), Guide(config.guide), World()) == "finished"
    lines, expected = (read_metrics(run_dir / "metrics.jsonl") for run_dir in (folder, config.run_dir))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_second_ctrl_c_and_sigterm_of_a_whole_command(tmp_path):
    """From outside, to the process group, as a terminal and a batch system do."""
    run = Run(tmp_path, write_recipe(tmp_path, "command", optim={"steps": 100_000}))
    try:
        run.start()
        run.wait_for_step(5)
        run.command.send_signal(signal.SIGTERM)
        assert run.finish(60) == 130 and run.said("SIGTERM: stopping after this step")
        done = run.position().step
        run.start()
        run.wait_for_step(done + 5)
        run.interrupt()
        time.sleep(0.1)
        run.interrupt()
        assert run.finish(60) == 130
        assert "Traceback" not in run.output.read_text()
        deadline = time.monotonic() + 20
        while run.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not run.processes() and not (run.folder / LOCK_NAME).exists()
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["loading models", "starting 2 workers"])
def test_interrupt_while_it_prepares_or_starts(tmp_path, number, moment):
    run = Run(tmp_path, write_recipe(tmp_path, "early"))
    try:
        run.start()
        run.wait_for(lambda: run.said(moment), moment)
        time.sleep(0.3)
        os.killpg(run.command.pid, number)
        assert run.finish(120) == 130, run.tail()
        assert "Traceback" not in run.output.read_text(), run.tail()
        run.start()
        assert run.finish(300) == 0, run.tail()
    finally:
        run.end()
