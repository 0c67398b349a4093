"""A local Ray of our own: in a folder that goes with it, and started once more where it does not come up."""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line

logger = logging.getLogger(__name__)

PREFIX, OWNER = "gist-ray-", "owner"
SETTLED_SECONDS = 60.0
"""A folder younger than that may belong to a process that is about to lock it."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """For Ray's files, until the block ends. Short, as the path of a socket may have 107 characters; and below a
    folder that is closed to other users, as Ray opens its own to all."""
    base = Path("/tmp") if os.access("/tmp", os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    remove_left_folders(base)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        raise UserError(
            f"{base} is no place for the local Ray's files ({error.strerror}); make it writable, or set TMPDIR to a "
            "folder with a short path"
        ) from error
    try:
        with (folder / OWNER).open("w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)  # the system takes it from a process that dies
            yield folder / "ray"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_folders(base: Path) -> None:
    """Those of this user whose process was killed: nobody holds their lock."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process holds the lock or was faster, or there is none to hold
            found = folder.lstat()
            is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if is_own and time.time() - found.st_mtime > SETTLED_SECONDS:
                with (folder / OWNER).open() as owner:
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def start(folder: Path, runtime_env: dict[str, Any]) -> None:
    """ray.init(), twice if need be: Ray gives its processes 30 seconds, which a busy machine may not do with.

    UserError if it does not start.
    """
    import ray

    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                runtime_env=runtime_env,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
            return
        except Exception as error:
            end_processes(folder)
            ray.shutdown()
            reason = one_line(error)
            if is_last or isinstance(
                error, ValueError | TypeError
            ):  # those are of a runtime_env, or of too little room
                raise UserError(
                    f"the local Ray did not start: {reason}; end other work on this machine, fix cluster.runtime_env "
                    "if that is what it names, or set cluster.address to a Ray that runs"
                ) from error
            logger.warning("the local Ray did not start (%s); trying once more", reason)


def end_processes(folder: Path) -> None:
    """Those of a node that did not come up, which ray.shutdown() does not know of.

    Each has this folder, which is nobody else's, in its command line.
    """
    import psutil  # Ray brings it

    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(str(folder) in word for word in process.info["cmdline"] or ())
    ]
    for process in found:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=10)
