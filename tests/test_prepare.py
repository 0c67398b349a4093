"""Preparing with Ray tasks: the same corpus, progress, errors as sentences, and tasks that are lost."""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import tiny

from gist_dist.common import progress
from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig
from gist_dist.data.corpus import prepare
from gist_dist.models.encoder import Guide, Student
from gist_dist.on_ray.tasks import prepare as module
from gist_dist.on_ray.tasks.prepare import prepare_on_ray, run_in_tasks
from gist_dist.recipe import parse_config

NUM_FILES, ROWS = 5, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", width=16, seed=1)


@pytest.fixture
def recipe(tmp_path, models) -> dict:
    """Half of the texts of each file are in the next one too."""
    for n in range(NUM_FILES):
        rows = [{"anchor": f"amber {n * 20 + i}", "positive": f"basin {n * 20 + i}"} for i in range(ROWS)]
        tiny.write_jsonl(tmp_path / f"{n}.jsonl", [*rows, {"anchor": "😀", "positive": "x"}])
    return tiny.recipe(tmp_path, *models, tmp_path / "*.jsonl", batch={"global_size": 4})


def prepared_on_ray(recipe: dict, progress=lambda message: None, changed=lambda job: job, max_in_flight: int = 3):
    """As prepare_on_ray does it for much data."""
    config = parse_config(recipe)
    run_parts = lambda job, tick: run_in_tasks(changed(job), tick, max_in_flight)  # noqa: E731
    return prepare(config, Student(config.student), Guide(config.guide), progress, run_parts)


def test_small_data_starts_no_ray(recipe, monkeypatch):
    monkeypatch.setattr(module, "connected", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = parse_config(recipe)
    assert prepare_on_ray(config, Student(config.student), Guide(config.guide)).num_rows == NUM_FILES * ROWS


@pytest.mark.ray
def test_tasks_prepare_what_one_process_prepares(ray_session, recipe, tmp_path, monkeypatch):
    _, expected = tiny.prepared(recipe | {"output_dir": str(tmp_path / "other")})
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(module, "run_in_process", None)
    config, told = parse_config(recipe), []
    monkeypatch.setattr(module, "run_in_tasks", lambda job, *rest: run_in_tasks(without_torch(job), *rest))
    # In processes of their own: those that Ray keeps from other tests have imported torch.
    apart = {"env_vars": {"TASKS_OF": "test_prepare"}}
    monkeypatch.setattr(ray, "remote", partial(ray.remote, runtime_env=apart))
    corpus = prepare_on_ray(config, Student(config.student), Guide(config.guide))
    assert corpus.manifest["content"] == expected.manifest["content"]
    assert {k: v for k, v in corpus.manifest.items() if k != "inputs"} == {
        k: v for k, v in expected.manifest.items() if k != "inputs"
    }
    assert corpus.num_texts == 240 and corpus.manifest["sources"][0]["rows_read"] == NUM_FILES * (ROWS + 1)
    monkeypatch.setattr(module, "run_in_tasks", None)
    again = prepare(
        config, Student(config.student), Guide(config.guide), told.append, partial(module.run_parts, ClusterConfig())
    )
    assert again.manifest == corpus.manifest and not [line for line in told if "parts" in line]


def without_torch(job):
    """The job with a tokenizer that looks at what its process has imported."""
    tokens_of = job.student.tokens_of

    def tokenize(texts):
        import sys

        assert not {"torch", "transformers", "sentence_transformers"} & set(sys.modules)
        return tokens_of(texts)

    return replace(job, student=replace(job.student, tokens_of=tokenize))


@pytest.mark.ray
def test_a_lost_task_is_begun_again(ray_session, recipe, tmp_path, monkeypatch, caplog):
    """Its process is killed the first time that the third file's texts are tokenized."""
    expected = tiny.prepared(recipe | {"output_dir": str(tmp_path / "other")})[1].manifest["content"]
    marker, told = tmp_path / "killed", []
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0)
    corpus = prepared_on_ray(recipe, told.append, partial(lethal, marker=marker, times=1))
    assert marker.read_text() == "x" and "is begun again" in caplog.text
    assert corpus.manifest["content"] == expected
    assert any(f"3 of {NUM_FILES} parts, about" in line and "rows/s" in line for line in told)
    assert f"prepared {NUM_FILES * (ROWS + 1)} rows" in told[-1]


@pytest.mark.ray
def test_a_part_that_is_lost_again_and_again_ends_the_run(ray_session, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOSSES", 1)
    with pytest.raises(UserError, match=r"part 2 of the data was lost 2 times while it was prepared, .*run again"):
        prepared_on_ray(recipe, changed=partial(lethal, marker=tmp_path / "killed", times=9))
    assert (tmp_path / "killed").read_text() == "xx"


def lethal(job, marker: Path, times: int):
    """The job with a tokenizer that kills its process so many times at one text."""
    tokens_of = job.student.tokens_of

    def kill_or_tokenize(texts):
        if "amber 45" in texts and "amber 79" in texts and (not marker.exists() or len(marker.read_text()) < times):
            with marker.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return tokens_of(texts)

    return replace(job, student=replace(job.student, tokens_of=kill_or_tokenize))


@pytest.mark.ray
def test_the_sentence_of_a_task_reaches_the_user(ray_session, recipe, tmp_path):
    (tmp_path / "3.jsonl").write_text('{"anchor": "a", "positive": "b"}\n' * 1200 + "{broken\n")
    with pytest.raises(UserError) as caught:
        prepared_on_ray(recipe)
    assert str(caught.value).startswith("data.sources[0]: 3.jsonl line 1201 is not JSON")


@pytest.mark.ray
def test_a_disk_that_refuses_is_named(ray_session, recipe, tmp_path):
    def without_disk(job):
        def refuse(texts):
            raise OSError(28, "No space left on device")

        return replace(job, student=replace(job.student, tokens_of=refuse))

    with pytest.raises(UserError, match=r"corpora: the prepared corpus can't be written there: .*No space left"):
        prepared_on_ray(recipe, changed=without_disk)


@pytest.mark.ray
def test_processes_of_parts_that_are_given_up_do_no_more(ray_session, recipe, tmp_path):
    """One that was interrupted may hold the import system's lock, and the next task there would wait for ever."""
    import psutil  # comes with Ray

    marker = tmp_path / "process"

    def endless(job):
        tokens_of = job.student.tokens_of

        def tokenize(texts):
            if "amber 45" in texts and "amber 79" in texts:
                marker.with_suffix(".new").write_text(str(os.getpid()))
                marker.with_suffix(".new").rename(marker)
                time.sleep(600)
            while "amber 99" in texts and not marker.exists():
                time.sleep(0.1)
            if "amber 99" in texts:
                raise OSError(28, "No space left on device")
            return tokens_of(texts)

        return replace(job, student=replace(job.student, tokens_of=tokenize))

    with pytest.raises(UserError, match="No space left"):
        prepared_on_ray(recipe, changed=endless)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(marker.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(marker.read_text()))


@pytest.mark.ray
def test_a_folder_that_nodes_do_not_share_is_named(ray_session, recipe, tmp_path):
    """Every node sees its own disk there: the driver finds nothing of what tasks wrote."""

    def elsewhere(job):
        return replace(job, place=str(tmp_path / "other-node" / "key"))

    with pytest.raises(UserError, match=r"is missing; it must be a folder or URI that all nodes share"):
        prepared_on_ray(recipe, changed=elsewhere)
