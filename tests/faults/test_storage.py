"""What checkpoints are kept on fills up, goes away or is damaged."""

import random
import signal
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pyarrow.fs
import pytest

from faults.conftest import CHECKPOINT_EVERY, STEPS
from faults.product import kill
from faults.test_processes import reach

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def test_damaged_checkpoints(started, record, ends_as_undisturbed, random_moments):
    """A worker is killed, and the newest checkpoint damaged before the group reads it: the one before is used."""
    run = started("damaged")
    run.start()
    damages = [("one bit flipped", _flip_bit), ("cut short", _truncate), ("its commit gone", _remove_commit),
               ("a file gone", _remove_file)]  # fmt: skip
    steps = sorted(
        random_moments.sample(range(2 * CHECKPOINT_EVERY + 5, STEPS - 10, 2 * CHECKPOINT_EVERY), len(damages))
    )
    for step, (name, damage) in zip(steps, damages, strict=True):
        moment = reach(run, step, random_moments)
        fault = run.position()
        kill(run.worker(0), signal.SIGKILL)
        newest = sorted(run.folder.glob("checkpoints/step-*/COMMIT.json"))[-1].parent
        damage(newest, random_moments)
        recovery = run.goes_on(fault)
        said = run.said(rf"checkpoint \S*{newest.name} is damaged \(.*?\)")
        assert said or damage is _remove_commit, run.tail()
        record(fault=f"newest checkpoint damaged: {name}", moment=moment, notes=said,
               recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_full_disk(started, record, ends_as_undisturbed, random_moments, tmp_path):
    """Checkpoints fail for a while, and training goes on; when there is space again they are written again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a disk of 8 MB takes root, and a container that may mount (CAP_SYS_ADMIN)")
    try:
        run = started("full-disk", checkpoint={"dir": str(disk), "retry_seconds": 2})
        run.start()
        moment = reach(run, random_moments.randint(CHECKPOINT_EVERY + 1, STEPS // 3), random_moments)
        fault = run.position()
        _fill(disk)
        said = run.wait_for(lambda: run.said("the checkpoint of step .* can't be written.*"), "the warning")
        during = _newest_step(_commits(disk))
        run.wait_for_step(min(run.position().step + CHECKPOINT_EVERY, STEPS - 2 * CHECKPOINT_EVERY))
        (disk / "filler").unlink()
        run.wait_for(lambda: _newest_step(_commits(disk)) > during, "a checkpoint after the disk had space again")
        assert run.position().metrics == fault.metrics, "training stopped"
        record(fault="disk full during checkpoints", moment=moment, notes=said, recomputed=0)
        fault = run.position()
        kill(run.worker(0), signal.SIGKILL)
        run.goes_on(fault)
        assert run.finish() == 0, run.tail()
        ends_as_undisturbed(run)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_object_storage_fails_and_comes_back(started, record, ends_as_undisturbed, random_moments):
    """An S3 server on loopback is stopped for a while: checkpoints wait for it, training does not."""
    server = _S3()
    server.start()
    try:
        run = started("away", server.credentials, checkpoint={"dir": server.uri})
        run.start()
        moment = reach(run, random_moments.randint(CHECKPOINT_EVERY + 1, STEPS // 3), random_moments)
        fault = run.position()
        server.stop()
        said = run.wait_for(lambda: run.said("checkpoint of step .* can't be written.*"), "the warning")
        run.wait_for_step(min(run.position().step + CHECKPOINT_EVERY, STEPS - 2 * CHECKPOINT_EVERY))
        server.start()
        before = _newest_step(server.commits())
        run.wait_for(lambda: _newest_step(server.commits()) > before, "a checkpoint after the storage came back")
        assert run.position().metrics == fault.metrics, "training stopped"
        record(fault="object storage away and back", moment=moment, notes=said, recomputed=0)
        fault = run.position()
        kill(run.worker(0), signal.SIGKILL)
        recovery = run.goes_on(fault)
        record(fault="SIGKILL of a worker, checkpoints in object storage", moment=f"step {fault.step}",
               recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
        assert run.finish() == 0, run.tail()
        ends_as_undisturbed(run)
    finally:
        server.stop()


class _S3:
    """A real S3 server whose buckets outlive a stop: they are kept by this process."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.server = None
        self.uri = f"s3://bucket/checkpoints?scheme=http&endpoint_override={self.address}&region=us-east-1"
        self.credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        is_new = self.server is None
        self.server = ThreadedMotoServer("127.0.0.1", port=int(self.address.rpartition(":")[2]), verbose=False)
        self.server.start()
        if is_new:
            self._filesystem().create_dir("bucket")

    def stop(self) -> None:
        self.server.stop()

    def commits(self) -> list[str]:
        """Of the complete checkpoints."""
        files = self._filesystem().get_file_info(pyarrow.fs.FileSelector("bucket/checkpoints", recursive=True))
        return [file.path for file in files if file.path.endswith("COMMIT.json")]

    def _filesystem(self) -> pyarrow.fs.S3FileSystem:
        return pyarrow.fs.S3FileSystem(
            access_key="test", secret_key="test", region="us-east-1", scheme="http", endpoint_override=self.address,
            allow_bucket_creation=True,
        )  # fmt: skip


def _flip_bit(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(["model.safetensors", "optimizer.safetensors"])
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _truncate(folder: Path, draw: random.Random) -> None:
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[: draw.randrange(1000, file.stat().st_size)])


def _remove_commit(folder: Path, draw: random.Random) -> None:
    (folder / "COMMIT.json").unlink()


def _remove_file(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").unlink()


def _fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def _commits(disk: Path) -> list[str]:
    return [str(path) for path in disk.glob("*/step-*/COMMIT.json")]


def _newest_step(commits: Iterable[str]) -> int:
    """0 if there is none."""
    return max((int(commit.split("/")[-2].removeprefix("step-")) for commit in commits), default=0)
