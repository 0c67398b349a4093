"""One command at a time in a run folder: a lock file that says who holds it, and that outlives nobody for long."""

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError

logger = logging.getLogger(__name__)

LOCK_NAME = "LOCK"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A holder on another machine that has not beaten for so long is taken for gone."""


class RunLock:
    """What a holder has to know: lost is a sentence once another command took the lock over."""

    def __init__(self, token: str) -> None:
        self.token = token
        """Names this command in the lock; see other_holder."""
        self.lost: str | None = None

    def check(self) -> None:
        """UserError if this command is no longer the one that may write: it had been frozen, say."""
        if self.lost:
            raise UserError(self.lost)


@contextmanager
def locked(run_dir: Path) -> Iterator[RunLock]:
    """Hold run_dir/LOCK while the block runs. UserError names who holds it already.

    A holder on this machine is looked up by process id and start time. One on another machine is watched: its lock
    is touched every BEAT_SECONDS, and taken over when that stopped for STALE_SECONDS. Ages are differences of the
    file system's own times, so clocks need not agree.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, ours = run_dir / LOCK_NAME, _describe_this_process()
    lock = RunLock(ours["token"])
    while not _create(path, ours):
        _take_away(path, _await_stale(path))
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ours, ended, lock), name="run-lock", daemon=True)
    beating.start()
    try:
        yield lock
    finally:
        ended.set()
        beating.join()
        if _read(path) == ours:
            path.unlink(missing_ok=True)


def holder_of(run_dir: Path) -> str | None:
    """Who holds the lock, in words; None if nobody does, or one who is known to be gone."""
    holder = _read(run_dir / LOCK_NAME)
    return None if holder is None or _is_gone(holder) else _in_words(holder)


def other_holder(run_dir: Path, token: str) -> str | None:
    """Who holds the lock, in words, if it is another command than the token's: what that one started must not write."""
    holder = _read(run_dir / LOCK_NAME)
    return None if holder is None or holder["token"] == token else _in_words(holder)


def _create(path: Path, ours: dict[str, Any]) -> bool:
    """Whether the lock is ours now. The file appears with its content: it is linked from one that was written."""
    aside = path.with_name(f"{path.name}.{ours['token']}")
    try:
        aside.write_text(json.dumps(ours))
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with open(descriptor, "w") as file:
                file.write(json.dumps(ours))
        return True
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}; choose another output_dir") from error
    finally:
        aside.unlink(missing_ok=True)


def _await_stale(path: Path) -> dict[str, Any] | None:
    """What the stale lock says. UserError if its holder is alive; a holder elsewhere is watched for a while first."""
    first = _read(path)
    if first is None or _is_gone(first):
        return first
    if first["machine"] == _machine():
        raise _refusal(path, first)
    beaten, said = _beat_time(path), False
    deadline = time.monotonic() + STALE_SECONDS - _age(path)
    while time.monotonic() < deadline:
        if not said:
            logger.info("%s is held by %s; watching whether it still runs", path, _in_words(first))
            said = True
        time.sleep(min(1.0, BEAT_SECONDS / 5))
        if _read(path) != first:  # released, or taken over by a third
            return None
        if _beat_time(path) != beaten:
            raise _refusal(path, first)
    return first


def _take_away(path: Path, stale: dict[str, Any] | None) -> None:
    """Remove the lock if it still is the stale one: one command at a time looks and removes, or two would both."""
    guard = path.with_name(f"{path.name}.takeover")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if _age(guard) > STALE_SECONDS:  # its maker died between two lines
            guard.unlink(missing_ok=True)
        time.sleep(0.2)
        return
    try:
        if stale is not None and _read(path) == stale:
            logger.warning("taking over a stale lock: %s no longer runs", _in_words(stale))
            path.unlink(missing_ok=True)
        elif stale is None and path.exists() and _read(path) is None and _age(path) > BEAT_SECONDS:
            path.unlink(missing_ok=True)  # torn by a full disk or a crash
    finally:
        guard.unlink(missing_ok=True)
    time.sleep(0.05)


def _beat(path: Path, ours: dict[str, Any], ended: threading.Event, lock: RunLock) -> None:
    while not ended.wait(BEAT_SECONDS):
        try:
            holder = _read(path)
            if holder == ours:
                os.utime(path)
            elif holder is not None:
                lock.lost = f"{path.parent} was taken over by {_in_words(holder)}; this command stops"
                return
        except OSError:  # a file server that is away for a moment
            continue


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            holder = json.load(file)
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"machine", "host", "pid", "token"} <= holder.keys() else None


def _beat_time(path: Path) -> float | None:
    try:
        with open(path) as file:  # opening makes NFS ask the server for the times
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _age(path: Path) -> float:
    """Seconds since the file was touched, by the clock that touches it."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        probe.write_text("now")
        beaten = _beat_time(path)
        return probe.stat().st_mtime - beaten if beaten is not None else 0.0
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_gone(holder: dict[str, Any]) -> bool:
    """Known for holders on this machine only."""
    return holder["machine"] == _machine() and _start_time(holder["pid"]) != holder.get("process_started")


def _machine() -> str:
    """The same for two processes that see each other's process ids; another one after a restart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _start_time(pid: int) -> str | None:
    """A mark of when a process started; None if there is no such process. Zombies count as gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc: the process id has to do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _describe_this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _start_time(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": _job(),
        "token": uuid.uuid4().hex,
    }


def _job() -> str | None:
    """The Ray or Slurm job that this command runs in."""
    try:
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))["metadata"]["job_submission_id"]
        return f"Ray job {job}"
    except (ValueError, KeyError, TypeError):
        pass
    slurm = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {slurm}" if slurm else None


def _refusal(path: Path, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"{path.parent} is in use by {_in_words(holder)}; wait for it, stop it, or choose another name= (if that "
        f"command surely no longer runs, remove {path})"
    )


def _in_words(holder: dict[str, Any]) -> str:
    job = f", {holder['job']}" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']} (since {holder.get('since')}{job})"
