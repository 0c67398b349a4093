"""One command at a time in a run folder, however the one before ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.runs import lock as run_lock
from gist_dist.runs.lock import LOCK_NAME, holder_of, locked

HOLD = """
import sys, time
from pathlib import Path
from gist_dist.runs.lock import locked
with locked(Path(sys.argv[1])) as lock:
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold():
    """Another process that holds the lock of a folder."""
    processes = []

    def start(folder: Path, seconds: float = 60) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.5)


def from_elsewhere(folder: Path) -> dict:
    """Make the lock look like one of another machine, whose processes can't be looked up."""
    path = folder / LOCK_NAME
    holder = json.loads(path.read_text()) | {"host": "node-7", "machine": "node-7/another boot"}
    path.write_text(json.dumps(holder))
    return holder


def test_second_command_is_told_who_holds_the_run(tmp_path, hold, monkeypatch):
    metadata = {"metadata": {"job_submission_id": "raysubmit_7"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))
    process = hold(tmp_path)
    with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*since 20.*Ray job raysubmit_7\)"):
        with locked(tmp_path):
            pass
    assert str(process.pid) in holder_of(tmp_path)


def test_lock_is_released_however_the_block_ends(tmp_path):
    for error in (None, UserError("no"), KeyboardInterrupt()):
        try:
            with locked(tmp_path):
                assert (tmp_path / LOCK_NAME).exists()
                if error:
                    raise error
        except (UserError, KeyboardInterrupt):
            pass
        assert os.listdir(tmp_path) == []


def test_lock_of_a_killed_command_is_taken_over_at_once(tmp_path, hold):
    process = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK_NAME).exists() and holder_of(tmp_path) is None
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < 2


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path, hold):
    hold(tmp_path)
    path = tmp_path / LOCK_NAME
    holder = json.loads(path.read_text())
    path.write_text(json.dumps(holder | {"pid": os.getpid()}))  # alive, but started at another time
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_beating_lock_of_another_machine_is_respected(tmp_path, quick):
    with locked(tmp_path):
        theirs = from_elsewhere(tmp_path)
        path = tmp_path / LOCK_NAME
        beat = subprocess.Popen(["sh", "-c", f"while sleep 0.2; do touch -c '{path}'; done"])
        try:
            with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on node-7"):
                with locked(tmp_path):
                    pass
        finally:
            beat.kill()
            beat.wait()
        assert json.loads(path.read_text()) == theirs


def test_silent_lock_of_another_machine_is_taken_over(tmp_path, quick, hold):
    process = hold(tmp_path)  # beats every 10 s only
    from_elsewhere(tmp_path)
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with locked(tmp_path):
        assert 1 < time.monotonic() - started < 10
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_holder_that_was_taken_for_gone_learns_it(tmp_path, quick):
    with locked(tmp_path) as lock:
        lock.check()
        from_elsewhere(tmp_path)
        deadline = time.monotonic() + 10
        while not lock.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match=r"was taken over by process .* on node-7"):
            lock.check()
    assert (tmp_path / LOCK_NAME).exists()  # not ours to remove


def test_torn_lock_is_removed(tmp_path, quick):
    (tmp_path / LOCK_NAME).write_text("")
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_only_one_of_many_takes_a_stale_lock(tmp_path, hold):
    process = hold(tmp_path)
    process.kill()
    process.wait()
    script = (
        "import sys, time; from pathlib import Path; from gist_dist.runs.lock import locked\n"
        "from gist_dist.common.errors import UserError\n"
        "while not Path(sys.argv[2]).exists(): pass\n"
        "try:\n  with locked(Path(sys.argv[1])): print('mine', flush=True); time.sleep(2)\n"
        "except UserError: print('refused')"
    )
    start = tmp_path / "start"
    command = [sys.executable, "-c", script, str(tmp_path), str(start)]
    contenders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    time.sleep(1.5)
    start.touch()
    said = [process.communicate(timeout=60)[0].strip() for process in contenders]
    assert sorted(said) == ["mine"] + ["refused"] * 5


def test_train_is_refused_where_another_command_trains(tmp_path, hold, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"anchor": "a", "positive": "b"}\n')
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    process = hold(folder)
    recipe = {
        "name": "mine", "output_dir": str(tmp_path / "runs"), "student": {"model": str(tmp_path / "none")},
        "data": {"sources": [{"path": str(rows)}]},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert main(["train", str(path)]) == 1
    assert f"in use by process {process.pid}" in capsys.readouterr().err


def test_a_worker_of_a_command_that_was_replaced_ends_without_writing(tmp_path, monkeypatch):
    from gist_dist.on_ray.train.worker import Requests

    class Ended(Exception):
        pass

    def end(status: int) -> None:
        raise Ended

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("gist_dist.on_ray.train.worker.preemption_notice", lambda: None)
    with locked(tmp_path) as lock:
        assert Requests(tmp_path, 0, lock.token)() is None
    with locked(tmp_path) as other:
        assert Requests(tmp_path, 0, other.token)() is None and Requests(tmp_path, 1, lock.token)() is None
        with pytest.raises(Ended):
            Requests(tmp_path, 0, lock.token)()
