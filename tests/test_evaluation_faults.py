"""What becomes of an evaluation whose tasks are killed, lack data, never end or fail half way, on real Ray."""

import csv
import itertools
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from facts import assert_tells

from gist_dist.common.errors import UserError
from gist_dist.config import EvaluateConfig, RunConfig
from gist_dist.evaluation.evaluate import evaluate_task, read_results
from gist_dist.recipe import parse_config

SENTENCES = ["old river", "cold valley", "red harbor", "wide lagoon", "new willow", "loud zephyr"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write_set(folder: Path) -> Path:
    """A small STS set of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "score"])
        writer.writerows((a, b, i % 4 + i / 10) for i, (a, b) in enumerate(itertools.pairwise(SENTENCES)))
    return folder


def write_endless_set(folder: Path) -> Path:
    """So large that no test waits for its end."""
    folder.mkdir(parents=True)
    rows = (f"sentence {i},another {i},{i % 5}\n" for i in range(500_000))
    (folder / "test.csv").write_text("sentence1,sentence2,score\n" + "".join(rows))
    return folder


def recipe(folder: Path, model: Path, *tasks: str, **evaluate) -> RunConfig:
    return parse_config(
        {
            "name": "faults",
            "output_dir": str(folder),
            "student": {"model": str(model)},
            "data": {"sources": [{"path": "unused.parquet"}]},
            "evaluate": {"tasks": list(tasks), "local_tasks": str(folder / "tasks"), **evaluate},
        }
    )


class Starts(logging.Handler):
    """Calls on_start(task, process) when the driver hears that a task has started."""

    def __init__(self, on_start) -> None:
        super().__init__(logging.DEBUG)
        self.on_start, self.processes = on_start, []

    def emit(self, record: logging.LogRecord) -> None:
        if "runs in process" in record.msg:
            _, task, process, _ = record.args
            self.processes.append(process)
            self.on_start(task, process)


@pytest.fixture
def starts():
    logger = logging.getLogger("gist_dist.on_ray.tasks.evaluation")
    before, handlers = logger.level, []

    def watch(on_start=lambda task, process: None) -> Starts:
        logger.setLevel(logging.DEBUG)
        handlers.append(Starts(on_start))
        logger.addHandler(handlers[-1])
        return handlers[-1]

    yield watch
    logger.setLevel(before)
    for handler in handlers:
        logger.removeHandler(handler)


def is_gone(process: int, within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def cpus_are_free(total: float, within_s: float = 20) -> bool:
    import ray

    deadline = time.monotonic() + within_s
    while ray.available_resources().get("CPU", 0) < total and time.monotonic() < deadline:
        time.sleep(0.1)
    return ray.available_resources().get("CPU", 0) == total


@pytest.mark.ray
def test_a_killed_task_is_run_again_and_one_without_data_fails_alone(ray_session, model, tmp_path, starts, caplog):
    from gist_dist.on_ray.tasks.evaluation import evaluate_models

    tasks = tmp_path / "tasks"
    write_endless_set(tasks / "Killed")
    write_set(tasks / "Fine")
    (tasks / "Vanished").mkdir()  # as when its files went between the check and the evaluation
    config = recipe(tmp_path, model, "Killed", "Fine", "Vanished", "SICK-R")
    attempts = []

    def kill_the_first(task: str, process: int) -> None:
        if task == "Killed":
            attempts.append(process)
            if len(attempts) == 1:
                (tasks / "Killed" / "test.csv").unlink()
                write_set(tasks / "Killed")
                os.kill(process, signal.SIGKILL)

    starts(kill_the_first)
    failures = evaluate_models({"trained": str(model)}, config, tmp_path / "mteb")

    assert len(attempts) == 2 and attempts[0] != attempts[1]
    assert sorted(read_results(tmp_path / "mteb" / "trained")) == ["Fine", "Killed"]
    assert "trained Killed: its process was killed or crashed; it is started again" in caplog.messages
    assert set(failures["trained"]) == {"SICK-R", "Vanished"}
    assert_tells(failures["trained"]["Vanished"], f"{tasks / 'Vanished'} … MTEB")
    assert_tells(failures["trained"]["SICK-R"], f"SICK-R … data … put them into {tasks / 'SICK-R'} … Hub")
    assert json.loads((tmp_path / "mteb" / "failures.json").read_text()) == failures

    # Submitted again, with the data there: only what failed is run.
    write_set(tasks / "Vanished")
    again = starts()
    only_local = config.evaluate.model_copy(update={"tasks": ("Killed", "Fine", "Vanished")})
    config = config.model_copy(update={"evaluate": only_local})
    assert evaluate_models({"trained": str(model)}, config, tmp_path / "mteb") == {}
    assert len(again.processes) == 1 and not (tmp_path / "mteb" / "failures.json").exists()


@pytest.mark.ray
def test_a_task_that_never_ends_is_ended_at_its_limit(ray_session, model, tmp_path, starts):
    from gist_dist.on_ray.tasks.evaluation import evaluate_models

    write_endless_set(tmp_path / "tasks" / "Endless")
    config = recipe(tmp_path, model, "Endless", task_timeout_minutes=0.05)
    watch = starts(lambda task, process: os.kill(process, signal.SIGSTOP))  # not even a stopped process stays
    started = time.monotonic()
    failures = evaluate_models({"trained": str(model)}, config, tmp_path / "mteb")

    assert 3 <= time.monotonic() - started < 60
    told = "it was not done after evaluate.task_timeout_minutes = 0.05 and was ended; raise it or set null"
    assert failures == {"trained": {"Endless": told}}
    assert len(watch.processes) == 1 and is_gone(watch.processes[0])
    assert cpus_are_free(ray_session["CPU"])


@pytest.mark.ray
def test_a_task_whose_process_always_dies_fails_after_three_attempts(ray_session, model, tmp_path, starts):
    from gist_dist.on_ray.tasks.evaluation import evaluate_models

    write_endless_set(tmp_path / "tasks" / "Deadly")
    watch = starts(lambda task, process: os.kill(process, signal.SIGKILL))
    failures = evaluate_models({"trained": str(model)}, recipe(tmp_path, model, "Deadly"), tmp_path / "mteb")
    assert len(watch.processes) == 3
    assert_tells(failures["trained"]["Deadly"], "killed or crashed … 3 times … lower evaluate.batch_size = 64")


@pytest.mark.ray
def test_an_interrupted_evaluation_keeps_what_is_done_and_frees_what_runs(ray_session, model, tmp_path, starts):
    from gist_dist.on_ray.tasks.evaluation import evaluate_models

    write_set(tmp_path / "tasks" / "Fine")
    write_endless_set(tmp_path / "tasks" / "Endless")
    config = recipe(tmp_path, model, "Endless", "Fine")
    processes: dict[str, int] = {}
    starts(processes.__setitem__)
    ended, timer = [], threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))

    def interrupt_soon(label: str, task: str, *rest: object) -> None:
        ended.append(task)
        timer.start()

    try:
        with pytest.raises(KeyboardInterrupt):  # once one is done, while the driver waits for the other
            evaluate_models({"trained": str(model)}, config, tmp_path / "mteb", interrupt_soon)
    finally:
        timer.cancel()
    assert ended == ["Fine"]
    assert sorted(read_results(tmp_path / "mteb" / "trained")) == ["Fine"]
    assert cpus_are_free(ray_session["CPU"]) and is_gone(processes["Endless"])  # Fine's process may serve again


@pytest.mark.ray
@pytest.mark.slow
def test_training_is_not_repeated_because_an_evaluation_failed(ray_session, model, tmp_path, capsys):
    """The whole command: it fails with status 1, keeps model, card and report, and tries only the failed task again."""
    from tiny import recipe as train_recipe
    from tiny import write_jsonl

    from gist_dist.cli import main

    rows = [{"anchor": a, "positive": b} for a, b in itertools.product(SENTENCES, SENTENCES)]
    tree = train_recipe(tmp_path, model, None, write_jsonl(tmp_path / "rows.jsonl", rows), batch={"global_size": 12})
    write_set(tmp_path / "tasks" / "Fine")
    tree |= {"name": "ours", "optim": {"steps": 3}}
    tree |= {"evaluate": {"tasks": ["Fine", "SICK-R"], "local_tasks": str(tmp_path / "tasks")}}
    file, run = tmp_path / "recipe.yaml", tmp_path / "ours"
    file.write_text(json.dumps(tree))

    def written() -> dict[str, int]:
        kept = ("metrics.jsonl", "model/model.safetensors", "mteb/trained/Fine.json", "mteb/baseline/Fine.json")
        return {name: (run / name).stat().st_mtime_ns for name in kept}

    assert main(["train", str(file)]) == 1
    assert set(json.loads((run / "mteb" / "failures.json").read_text())) == {"baseline", "trained"}
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if "SICK-R failed" in line]
    assert_tells(failed, "SICK-R … trained … data")
    assert "The evaluation on SICK-R failed" in (run / "model" / "README.md").read_text()
    assert (run / "report.html").is_file()
    assert len(list((run / "mteb" / "results" / "local__ours").glob("*/Fine.json"))) == 1

    before = written()
    assert main(["train", str(file)]) == 1 and written() == before
    assert main(["train", str(file), "evaluate.tasks=[Fine]"]) == 0 and written() == before
    assert not (run / "mteb" / "failures.json").exists()


# ------------------------------------------------------------------------------------------------ half results


def test_a_failed_evaluation_of_another_model_leaves_no_score_behind(model, tmp_path):
    from tiny import save_tiny_model

    write_set(tmp_path / "tasks" / "Ours")
    evaluate, results = EvaluateConfig(local_tasks=str(tmp_path / "tasks")), tmp_path / "results"
    evaluate_task(model, "Ours", evaluate, results)
    assert read_results(results)

    other = save_tiny_model(tmp_path / "other", seed=1)
    data = tmp_path / "tasks" / "Ours" / "test.csv"
    data.write_text(data.read_text() + "a,b,high\n")
    with pytest.raises(UserError, match=r"row 6: column 'score' is 'high'"):
        evaluate_task(other, "Ours", evaluate, results)
    assert read_results(results) == {}


def test_a_score_of_one_model_never_counts_for_another(model, tmp_path, monkeypatch):
    """Killed between its files, an evaluation leaves the details of the new model without a result, not an old one."""
    from tiny import save_tiny_model

    from gist_dist.evaluation import evaluate as evaluation

    write_set(tmp_path / "tasks" / "Ours")
    evaluate, results = EvaluateConfig(local_tasks=str(tmp_path / "tasks")), tmp_path / "results"
    evaluate_task(model, "Ours", evaluate, results)
    other = save_tiny_model(tmp_path / "other", seed=1)
    write = evaluation.write_atomically

    def die_before_the_result(file: Path, *arguments) -> None:
        if file.name == "Ours.json" and file.parent == results:
            raise KeyboardInterrupt
        write(file, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "write_atomically", die_before_the_result)
        with pytest.raises(KeyboardInterrupt):
            evaluate_task(other, "Ours", evaluate, results)
    identity = evaluation.model_identity(other)
    assert evaluation.finished_score(results, "Ours", evaluate, identity) is None
    evaluate_task(other, "Ours", evaluate, results)
    assert evaluation.finished_score(results, "Ours", evaluate, identity) is not None
