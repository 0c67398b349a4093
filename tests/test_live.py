"""What a terminal shows while a command runs: in place, and nothing of it left behind; plain lines elsewhere."""

import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from terminal import run_in_terminal
from tiny import recipe, save_tiny_model, words, write_jsonl

from gist_dist.common.events import PROGRESS, TRAINING, phase
from gist_dist.common.text import clock
from gist_dist.live import LiveHandler, View, live_view
from gist_dist.runs.metrics_file import Tail

LINE = {
    "step": 7, "loss": 0.5, "grad_norm": 1.25, "learning_rate": 2e-5, "world_size": 2, "pairs_per_second": 100.0,
    "tokens_per_second": 4000.0, "padding_fraction": 0.01, "masked_fraction": 0.025,
    "masked_weight": 0.31, "masked_fraction_ap": 0.03,
    "masked_fraction_aa": None, "masked_fraction_pp": 0.01, "masked_fraction_an": None, "rows_without_negatives": 3,
    "seconds": {"step": 2.0}, "peak_memory_bytes": 1_500_000_000,
}  # fmt: skip


def shown(view: View) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(view.render())
    return console.file.getvalue()


def training_view(folder: Path) -> View:
    (folder / "data.json").write_text(json.dumps({"steps": 100}))
    (folder / "metrics.jsonl").write_text("")
    view = View("my-run", folder)
    view.hear("starting 2 workers on Ray", phase(TRAINING))
    return view


def test_a_training_is_shown_with_its_newest_metrics(tmp_path):
    view = training_view(tmp_path)
    assert "my-run  training" in shown(view) and "step" not in shown(view)
    lines = [LINE, {**LINE, "step": 8, "loss": 0.3, "seconds": {"step": 4.0}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = shown(view)
    for told in (
        "step 8 of 100", "3.00 s a step", f"{clock(92 * 3.0)} left", "loss 0.4000", "gradient norm 1.25",
        "learning rate 2.00e-05", "100 pairs/s", "4,000 tokens/s", "masked 2.5% (ap 3.0, pp 1.0)",
        "rows without negatives 3", "1.5 GB a worker", "training on 2 workers",
    ):  # fmt: skip
        name, number = told.rsplit(" ", 1) if told.endswith("/s") else (None, told)
        assert (f"{number} {name}" if name else told) in text, (told, text)


def test_a_loss_that_is_not_finite_is_shown_as_that(tmp_path):
    view = training_view(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**LINE, "loss": None, "grad_norm": None}) + "\n")
    assert "loss nan" in shown(view) and "gradient norm not finite" in shown(view)


def test_metrics_are_followed_over_a_restart_and_torn_lines(tmp_path):
    """A run that goes on drops the steps that it will do again, so the file gets shorter."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1}) + "\n")
    tail = Tail(file, 20)
    assert tail.newest() == []  # of an earlier command
    with file.open("a") as stream:
        stream.write('{"step": 2}\nno json\n[]\n{"step": 3}\n{"st')
    assert [line["step"] for line in tail.newest()] == [2, 3]
    with file.open("a") as stream:
        stream.write('ep": 4}\n')
    assert [line["step"] for line in tail.newest()] == [2, 3, 4]
    file.write_text('{"step": 1}\n{"step": 2}\n')
    assert [line["step"] for line in tail.newest()] == [1, 2]
    file.unlink()
    assert [line["step"] for line in tail.newest()] == [1, 2]


def test_lines_of_progress_replace_each_other_and_all_others_stay():
    view, console = View("run"), Console(file=io.StringIO(), width=110)
    handler = LiveHandler(view, console)
    for line, fields in (
        ("loading models", phase("preparing data")),
        ("1 of 4 parts", PROGRESS),
        ("[bold]source[/bold]: 3 rows dropped, 0:04 left", {}),
    ):
        handler.emit(logging.getLogger("x").makeRecord("x", logging.INFO, "", 0, "%s", (line,), None, extra=fields))
    kept = console.file.getvalue()
    assert (
        "loading models" in kept
        and "[bold]source[/bold]: 3 rows dropped, 0:04 left" in kept
        and "1 of 4 parts" not in kept
    )
    assert "preparing data" in shown(view) and "1 of 4 parts" in shown(view)
    view.hear("evaluating trained on 2 tasks", phase("evaluating"))
    assert "evaluating" in shown(view) and "1 of 4 parts" not in shown(view)


def test_every_phase_marks_its_progress_so_that_it_is_shown_in_place(tmp_path, monkeypatch, caplog):
    import numpy as np

    from gist_dist.common import progress
    from gist_dist.config import EvaluateConfig
    from gist_dist.data.corpus import SAY as PREPARING
    from gist_dist.data.corpus import _Prepared
    from gist_dist.models.guide_cache import SAY as ENCODING
    from gist_dist.models.guide_cache import Encoded, Work
    from gist_dist.on_ray.tasks.evaluation import Job, _Evaluated
    from gist_dist.training.observers import _StepProgress

    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0)
    caplog.set_level(logging.INFO)
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.csv").write_text("sentence1,sentence2,score\nsome words,other words,1\n")
    _Prepared(4, PREPARING).tick(0, 10)
    Encoded(Work([np.arange(3), np.arange(2)], 5), np.array([3, 4, 5]), ENCODING).add(0)
    _StepProgress(9, 0).show({"step": 1, "loss": 0.5, "pairs_per_second": 10.0, "masked_fraction": 0.01})
    tasks = EvaluateConfig(tasks=("A", "B"), local_tasks=str(tmp_path))
    _Evaluated([Job("trained", "A"), Job("trained", "B")], tasks).add(Job("trained", "A"), 1, 2)
    assert len(caplog.records) == 4 and all(record.progress for record in caplog.records)
    assert [getattr(record, "phase", None) for record in caplog.records[:2]] == ["preparing data", "guide embeddings"]
    numbers = ("prepared 10 rows", "3 of 5 texts", "step 1/9  loss 0.5000", "1 of 2 evaluations done")
    for number, message in zip(numbers, caplog.messages, strict=True):
        assert number in message
    assert all(message.endswith("left") for message in caplog.messages[1:])


def test_progress_tells_the_time_that_the_rest_takes_and_not_too_often():
    from gist_dist.common.progress import Progress

    said = []
    progress = Progress(40, said.append)
    progress.reach(5, "5")
    assert not said
    progress.started -= 100.0
    progress.said -= 100.0
    progress.reach(10, "10")
    progress.reach(11, "11")
    progress.reach(40, "40", now=True)
    assert said[1:] == ["40"] and re.fullmatch(r"10, about 5:0\d left", said[0]), said


def test_a_workers_events_are_repeated_with_their_fields(tmp_path, caplog):
    from gist_dist.common.events import EventFormatter, log_event, problems, read_events

    caplog.set_level(logging.INFO)
    source, file = logging.getLogger("gist_dist.x"), tmp_path / "events.jsonl"
    fields = {"problem": "checkpoint"} | PROGRESS | phase("elsewhere")
    record = source.makeRecord("x", logging.WARNING, "", 0, "%s of %s", ("one", "two"), None, extra=fields)
    line = EventFormatter().format(record)
    file.write_text(f'{line}\n[1]\n{{"message": 3}}\n{{"mess\n{line}\n')
    assert problems(file, {"problem": "checkpoint"}) == ["one of two"] and not problems(file, {"problem": "other"})
    assert not problems(tmp_path / "none", {"problem": "checkpoint"})
    for event in read_events([line]):
        log_event(source, event)
    (told,) = caplog.records
    assert (told.getMessage(), told.levelname, told.progress, told.problem) == (
        "one of two",
        "WARNING",
        True,
        "checkpoint",
    )
    assert not hasattr(told, "phase")


def test_without_a_terminal_nothing_is_changed(capsys):
    handlers = list(logging.getLogger().handlers)
    with live_view("run"):
        assert logging.getLogger().handlers == handlers
    assert capsys.readouterr().err == ""


@pytest.mark.ray
@pytest.mark.slow
def test_a_whole_run_in_a_terminal(tmp_path):
    import random

    rng = random.Random(1)
    student, guide = save_tiny_model(tmp_path / "student"), save_tiny_model(tmp_path / "guide", seed=1)
    rows = [{"anchor": words(rng, 3, 6), "positive": words(rng, 3, 9)} for _ in range(120)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    tree = recipe(tmp_path, student, guide, source, batch={"global_size": 32}, optim={"steps": 150})
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    environment = {**os.environ, "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gist_dist.cli", "train", "recipe.yaml"]
    session = run_in_terminal(command, tmp_path, environment)

    assert session.status == 0, session.text
    training = [screen for screen in session.screens if " s a step" in screen]
    assert training, session.text
    assert re.search(r"● tiny  training on 1 worker  \d:\d\d\n  step [\d,]+ of 150 .* left\n", training[-1]), training[
        -1
    ]
    assert "loss " in training[-1] and "pairs/s" in training[-1] and "GB a worker" in training[-1]
    # When it has ended: the outline, the verdict and where things are, and nothing of what was drawn in place.
    assert "●" not in session.text and not re.search(r"^step \d+/150", session.text, re.MULTILINE)
    for told in ("gist_dist 0.1.0: tiny -> ", "student  ", "steps    150 of 32 rows", "150 steps in", "report   "):
        assert told in session.text, (told, session.text)


def test_time_left_of_evaluations_is_told_by_their_text_once_that_says_something(tmp_path, monkeypatch, caplog):
    from gist_dist.common import progress
    from gist_dist.config import EvaluateConfig
    from gist_dist.on_ray.tasks.evaluation import Job, _Evaluated

    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0)
    caplog.set_level(logging.INFO)
    for name, rows in (("Small", 2), ("Large", 200), ("Larger", 400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.csv").write_text("sentence1,sentence2,score\n" + "some words,other words,1\n" * rows)
    jobs = [Job("trained", name) for name in ("Small", "Large", "Larger")]
    evaluated = _Evaluated(jobs, EvaluateConfig(tasks=("Small", "Large", "Larger"), local_tasks=str(tmp_path)))
    evaluated.progress.started -= 100.0
    for number, job in enumerate(jobs, 1):  # seconds of a task without text say nothing of the others
        evaluated.add(job, number, 3)
    (said,) = caplog.messages
    assert re.fullmatch(r"2 of 3 evaluations done, about [23]:\d\d left", said)
