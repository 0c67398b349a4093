"""Checkpoints: exact resume from any of them, storage that is slow, fails or is full, damage, and what is kept."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_storage import s3  # noqa: F401
from tiny_runs import (
    STEPS,
    Runs,
    assert_same_run,
    checkpoints,
    complaint,
    curve,
    run_dir,
    run_in_fp64,
    weights,
)

from gist_dist.common.errors import UserError
from gist_dist.common.storage import join, open_store
from gist_dist.core.collectives import World
from gist_dist.recipe import parse_config
from gist_dist.training.checkpoint import CheckpointStore, CheckpointWriter, Snapshot

EVERY = {"every_steps": 1, "keep": 99}
REFRESHED = {"model": None, "refresh": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[str, Any]:
    """Guided by copies of the student, a checkpoint at every step."""
    tree = runs.tree("undisturbed", guide=REFRESHED, checkpoint=EVERY)
    assert runs.train(tree) == "finished" and checkpoints(tree) == list(range(1, STEPS + 1))
    return tree


# Exact resume


@pytest.mark.parametrize("step", [1, 3, 4, STEPS])
def test_resume_from_any_checkpoint_is_bit_equal(runs, undisturbed, step):
    resumed = runs.from_checkpoint(undisturbed, step, f"from-{step}")
    assert checkpoints(resumed) == list(range(1, step + 1)) and not (run_dir(resumed) / "model").exists()
    assert runs.train(resumed) == "finished"
    assert_same_run(resumed, undisturbed)


def test_what_resume_has_to_restore_was_in_use(runs, undisturbed):
    """Dropout, the moments of the optimizer and the renewed guide all make a difference."""
    plain = runs.tree("no-dropout", guide=REFRESHED, student={"dropout": 0.0})
    fixed = runs.tree("never-renewed", guide={"model": None, "refresh": 1000})
    for tree in (plain, fixed):
        runs.train(tree)
    assert curve(plain)[0]["loss"] != curve(undisturbed)[0]["loss"]
    masked = [[line["masked_fraction"] for line in curve(tree)] for tree in (fixed, undisturbed)]
    assert masked[0][:2] == masked[1][:2] and masked[0][2:] != masked[1][2:]
    moments = load_file(run_dir(undisturbed) / "checkpoints" / "step-00000003" / "optimizer.safetensors")
    assert all(np.abs(moment).max() > 0 for moment in moments.values())
    assert len(moments) == 3 * sum("pooler" not in name for name in weights(undisturbed))


def test_resume_on_another_number_of_workers(runs):
    """From a checkpoint of one worker on two and three, in fp64; the refreshed guide is read from the cache."""
    tree = runs.tree("one", guide=REFRESHED, checkpoint=EVERY)
    run_in_fp64(World(), tree)
    for world_size in (2, 3):
        resumed = runs.from_checkpoint(tree, 3, f"one-on-{world_size}")
        runs.train_on(world_size, resumed["name"], run_in_fp64, resumed)
        assert_same_run(resumed, tree, 1e-10)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"loss": {"temperature": 0.1}}, "loss.temperature"),
        ({"optim": {"steps": STEPS + 1}}, "optim.steps"),
        ({"student": {"dropout": 0.2}}, "student.dropout"),
        ({"batch": {"global_size": 8}}, "batch.global_size"),
    ],
)
def test_what_the_losses_depend_on_must_not_change(runs, undisturbed, changes, key):
    tree = runs.tree("undisturbed", **{"guide": REFRESHED, "checkpoint": EVERY, **changes})
    with pytest.raises(UserError, match=rf"step-00000006: {key} was .* and is now .*; a run continues only"):
        runs.train(tree)


def test_a_model_that_was_changed_in_its_place_is_noticed(runs):
    shutil.copytree(runs.guide, runs.folder / "replaced")
    tree = runs.tree("guided", guide={"model": str(runs.folder / "replaced")})
    runs.train(tree)
    shutil.rmtree(runs.folder / "replaced")
    shutil.copytree(runs.student, runs.folder / "replaced")
    with pytest.raises(UserError, match=r"guide was '.*' and is now '.*'"):
        runs.train(tree)


def test_how_a_run_is_done_may_change(runs, undisturbed, caplog):
    caplog.set_level("INFO")
    resumed = runs.from_checkpoint(undisturbed, 3, "otherwise")
    resumed["batch"] = resumed["batch"] | {"chunk_tokens": 100, "activation_gb": 0.0}
    resumed["optim"] = resumed["optim"] | {"non_finite": "skip"}
    assert runs.train(resumed) == "finished"
    assert "batch.chunk_tokens was 64 and is now 100: dropout or rounding may differ" in caplog.messages


def test_what_can_not_be_resumed_is_told_on_every_rank(runs, undisturbed):
    tree = runs.tree("undisturbed", guide=REFRESHED, checkpoint=EVERY, seed=1)
    told = runs.train_on(2, "other-seed", complaint, tree)
    assert told[0] == told[1] and "seed was 0 and is now 1" in told[0]
    (runs.folder / "unreadable").write_text("")
    tree = runs.tree("unreadable", checkpoint={"dir": str(runs.folder)})
    told = runs.train_on(2, "unreadable", complaint, tree)
    assert told[0] == told[1] and "can't be read: " in told[0]


# What is kept


def store(runs: Runs, name: str, **sections: Any) -> CheckpointStore:
    return CheckpointStore(parse_config(runs.tree(name, checkpoint=sections)))


def snapshot(step: int, size: int = 8) -> Snapshot:
    return Snapshot(step, {"model": {"weight": torch.full((size,), float(step))}}, {"skipped": []})


def damage(checkpoints: CheckpointStore, step: int) -> None:
    file = checkpoints.store.local / f"step-{step:08d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_old_checkpoints_go_once_the_new_one_is_complete(runs):
    kept = store(runs, "kept", keep=2)
    for step in (1, 2, 3):
        kept.write(snapshot(step))
        kept.collect(step)
    assert kept.committed() == [2, 3]

    def unsaved() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        kept.write(snapshot(4), before_commit=unsaved)
    assert checkpoints({}, kept.store.local) == [2, 3]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(runs):
    """Of 2 and 4, 4 is damaged: the run goes on from 2 to 3, and with keep=1 that is the one to keep."""
    kept = store(runs, "damaged", keep=1)
    for step in (2, 4):
        kept.write(snapshot(step))
    damage(kept, 4)
    assert kept.newest_intact().step == 2
    kept.write(snapshot(3))
    kept.collect(3)
    assert kept.committed() == [3] and kept.newest_intact().tensors["model"]["weight"].tolist() == [3.0] * 8


def test_what_killed_runs_leave_is_removed(runs, undisturbed):
    resumed = runs.from_checkpoint(undisturbed, 3, "killed")
    folder = run_dir(resumed) / "checkpoints"
    torn = folder / "step-00000004"
    shutil.copytree(folder / "step-00000003", torn)
    (torn / "COMMIT.json").unlink()
    for name in (".gist-dist-scratch-0123", "step-00000009"):
        (folder / name).mkdir()
    runs.train(resumed)
    assert checkpoints(resumed) == list(range(1, STEPS + 1))
    assert_same_run(resumed, undisturbed)


def recommit(folder: Path, name: str, content: bytes) -> None:
    """Put other content in place of a file, with a commit that says so."""
    (folder / name).write_bytes(content)
    commit = json.loads((folder / "COMMIT.json").read_text())
    commit["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "COMMIT.json").write_text(json.dumps(commit))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "no JSON": lambda folder: (folder / "COMMIT.json").write_text("{"),
    "no object": lambda folder: (folder / "COMMIT.json").write_text("[1]"),
    "nested": lambda folder: (folder / "COMMIT.json").write_text("[" * 100_000),
    "no text": lambda folder: (folder / "COMMIT.json").write_bytes(b"\xff\xfe\x00"),
    "a path": lambda folder: (folder / "COMMIT.json").write_text('{"files": {"../../../etc/passwd": {}}}'),
    "no hash": lambda folder: (folder / "COMMIT.json").write_text('{"files": {"model.safetensors": {"bytes": "x"}}}'),
    "no files": lambda folder: (folder / "COMMIT.json").write_text('{"files": {}}'),
    "a pickle": lambda folder: recommit(folder, "model.safetensors", b"\x80\x04cos\nsystem\n(S'false'\ntR."),
    "facts of another step": lambda folder: recommit(folder, "state.json", b'{"step": 1}'),
    "no facts": lambda folder: recommit(folder, "state.json", b"3"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_checkpoint_that_is_none_is_named_and_passed_over(runs, undisturbed, kind, caplog):
    resumed = runs.from_checkpoint(undisturbed, 3, f"hostile-{kind.replace(' ', '-')}")
    folder = run_dir(resumed) / "checkpoints" / "step-00000003"
    HOSTILE[kind](folder)
    found = CheckpointStore(parse_config(resumed)).newest_intact()
    assert found.step == 2
    assert f"checkpoint {folder} is damaged (" in caplog.text


@pytest.mark.parametrize("content", [b'{"step": 3}', b'{"step": 3, "identity": 5, "told": [], "skipped": null}'])
def test_facts_of_no_run_are_refused(runs, undisturbed, content):
    resumed = runs.from_checkpoint(undisturbed, 3, f"facts-{len(content)}")
    recommit(run_dir(resumed) / "checkpoints" / "step-00000003", "state.json", content)
    with pytest.raises(UserError, match="step-00000003: data was None and is now"):
        runs.train(resumed)


@pytest.mark.parametrize("file", ["model", "optimizer", "guide"])
def test_tensors_of_another_student_are_refused(runs, undisturbed, file):
    resumed = runs.from_checkpoint(undisturbed, 3, f"tensors-{file}")
    recommit(run_dir(resumed) / "checkpoints" / "step-00000003", f"{file}.safetensors", one_tensor())
    with pytest.raises(UserError, match=r"tensors .*student, optimizer"):
        runs.train(resumed)


def one_tensor() -> bytes:
    from safetensors.torch import save

    return save({"exp_avg|nowhere": torch.zeros(3)})


# Writing while training goes on


def test_writing_does_not_hold_up_training(runs, monkeypatch):
    """The state is copied at once; a write in progress is waited for, and no two run at a time."""
    slow, release, begun = store(runs, "slow", keep=9), threading.Semaphore(0), threading.Semaphore(0)
    write = slow.write

    def wait_and_write(*arguments: Any) -> None:
        begun.release()
        release.acquire()
        write(*arguments)

    monkeypatch.setattr(slow, "write", wait_and_write)
    writer, weight = CheckpointWriter(slow, retry_seconds=0.0), torch.zeros(8)
    writer.save(1, {"model": {"weight": weight}}, {})
    begun.acquire()
    weight += 1  # the next step
    second = threading.Thread(target=writer.save, args=(2, {"model": {"weight": weight}}, {}))
    second.start()
    assert not begun.acquire(timeout=0.3) and second.is_alive() and slow.committed() == []
    release.release(2)
    second.join()
    assert writer.finish() is None
    writer.close()
    assert slow.committed() == [1, 2]
    values = [slow._read(step).tensors["model"]["weight"].unique().tolist() for step in (1, 2)]
    assert values == [[0.0], [1.0]]


def test_a_write_that_waits_for_its_storage_gives_way_to_a_newer_one(runs, caplog):
    """And so training is held up by one try at most."""
    place = runs.folder / "in-the-way"
    place.mkdir()
    lost = CheckpointStore(parse_config(runs.tree("lost", checkpoint={"dir": str(place)})))
    writer, weights = CheckpointWriter(lost, retry_seconds=1000.0), {"model": {"weight": torch.zeros(8)}}
    (place / "lost").write_text("")
    started = time.monotonic()
    for step in (1, 2):
        writer.save(step, weights, {})
    (place / "lost").unlink()
    assert writer.finish() is None and time.monotonic() - started < 10
    writer.close()
    assert lost.committed() == [2]
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "the checkpoint of step 1 can't be written" in caplog.text


# A disk that is full


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system of 2 MB takes root, and a container that may mount (CAP_SYS_ADMIN)")
    yield folder
    # Lazy: a mapped file may wait for the garbage collector, and would keep the place busy.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(runs, undisturbed, small_disk, caplog):
    """Full from step 2 to step 4."""
    tree = runs.tree("full", guide=REFRESHED, checkpoint={"every_steps": 1, "keep": 1, "dir": str(small_disk)})
    steps = []

    def requests() -> None:
        steps.append(len(steps) + 1)
        time.sleep(0.3)  # the checkpoint before is written
        if steps[-1] == 2:
            fill(small_disk)
        if steps[-1] == 4:
            assert checkpoints({}, small_disk / "full") == [1]
            (small_disk / "filler").unlink()

    assert runs.train(tree, requests) == "finished"
    assert checkpoints({}, small_disk / "full") == [STEPS]
    assert_same_run(tree, undisturbed)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [warning[:25] for warning in warnings] == ["the checkpoint of step 2 ", "the checkpoint of step 3 "]
    for part in (str(small_disk / "full"), "No space left on device", "lower checkpoint.keep", "training goes on"):
        assert part in warnings[0]


def test_a_disk_that_stays_full_is_told_once_the_model_is_written(runs, small_disk):
    tree = runs.tree("stays-full", checkpoint={"every_steps": None, "dir": str(small_disk)})
    fill(small_disk)
    told = r"the model is written, but the checkpoint of step 6 can't be written to .*: .*No space.*; free space"
    with pytest.raises(UserError, match=told):
        runs.train(tree)
    assert weights(tree) and list((small_disk / "stays-full").rglob("*")) == []
    (small_disk / "filler").unlink()
    assert runs.train(tree) == "finished"


def test_a_full_disk_of_the_run_itself_loses_no_line(runs, small_disk, caplog):
    sections = {"optim": {"steps": 12}, "checkpoint": {"every_steps": 4, "keep": 1}}
    tree = runs.tree("all-full", output_dir=str(small_disk), **sections)
    steps = []

    def requests() -> None:
        steps.append(len(steps) + 1)
        if steps[-1] == 2:
            fill(small_disk)
        if steps[-1] == 9:
            (small_disk / "filler").unlink()

    assert runs.train(tree, requests) == "finished"
    assert "metrics.jsonl can't be written" in caplog.text
    undisturbed = runs.tree("not-full", **sections)
    runs.train(undisturbed)
    assert_same_run(tree, undisturbed)


# Object storage


class Outage:
    """An S3 server on this machine that refuses every request while it is down."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.is_down, self.refused, self.served = False, 0, DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        options = f"scheme=http&endpoint_override=127.0.0.1:{self.server.port}&region=us-east-1"
        self.place = f"s3://outage/runs?{options}&allow_bucket_creation=true"
        open_store(f"s3://outage?{options}&allow_bucket_creation=true")._filesystem.create_dir("outage")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if not self.is_down:
            return self.served(environ, start_response)
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("403 Forbidden", [("Content-Length", "0")])
        return [b""]


@pytest.fixture(scope="module")
def outage() -> Iterator[Outage]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        server = Outage()
        yield server
        server.server.shutdown()


def test_a_run_goes_on_from_object_storage_when_its_folder_is_lost(runs, undisturbed, s3):  # noqa: F811
    tree = runs.tree("in-s3", guide=REFRESHED, checkpoint={"every_steps": 2, "keep": 2, "dir": s3})
    kept = open_store(join(s3, "in-s3"))
    asked = iter([None, None, None, "stop"])
    assert runs.train(tree, lambda: next(asked)) == "stopped"
    assert kept.folders() == ["step-00000002", "step-00000004"] and not (run_dir(tree) / "checkpoints").exists()
    shutil.rmtree(run_dir(tree))
    assert runs.train(tree) == "finished"
    assert [line["step"] for line in curve(tree)] == [5, 6]
    for name, weight in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(tree)[name], weight)
    assert kept.folders() == ["step-00000004", "step-00000006"]


def test_storage_that_fails_and_comes_back(runs, undisturbed, outage, caplog):
    """Down at step 2, whose checkpoint is abandoned; down again at the last, which is tried until it works."""
    tree = runs.tree("outage", guide=REFRESHED, checkpoint={"dir": outage.place, "retry_seconds": 0})
    steps = []

    def requests() -> None:
        steps.append(len(steps) + 1)
        time.sleep(0.2)
        outage.is_down = steps[-1] in (2, 3)

    assert runs.train(tree, requests) == "finished" and outage.refused
    assert_same_run(tree, undisturbed)
    assert open_store(join(outage.place, "outage")).folders() == ["step-00000004", "step-00000006"]
    assert "the checkpoint of step 2 can't be written to s3://outage/runs/outage?" in caplog.text
    caplog.clear()
    tree = runs.tree("retried", guide=REFRESHED, checkpoint={"dir": outage.place, "retry_seconds": 60})
    asked, store = iter(range(1, STEPS + 1)), open_store(join(outage.place, "retried"))

    def fail_at_the_end() -> None:
        if next(asked) == STEPS:
            while not store.exists("step-00000004/COMMIT.json"):  # or it is abandoned for the one that comes now
                time.sleep(0.05)
            outage.is_down = True
            threading.Timer(1.0, setattr, (outage, "is_down", False)).start()

    assert runs.train(tree, fail_at_the_end) == "finished"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert store.folders() == ["step-00000004", "step-00000006"]


def test_storage_that_is_away_at_the_start_is_waited_for(runs, outage):
    tree = runs.tree("away", checkpoint={"dir": outage.place, "retry_seconds": 0})
    outage.is_down = True
    with pytest.raises(
        UserError, match=r"the checkpoints in s3://outage/runs/away\?.* can't be read: .*fix the storage"
    ):
        runs.train(tree)
    threading.Timer(0.7, setattr, (outage, "is_down", False)).start()
    tree["checkpoint"]["retry_seconds"] = 60
    assert runs.train(tree) == "finished"
