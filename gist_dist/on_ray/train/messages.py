"""Files in the run folder by which the driver, Ray Train's controller and the workers tell each other what to do.

Files and not actors: they outlive every process, a person can make one (`touch runs/my/STOP`), and whoever starts
next sees what is still asked for.
"""

import os
from pathlib import Path

STOP = "STOP"
"""Finish the step, write a checkpoint, end. Made by the driver; removed when the next command starts."""
RESIZE = "RESIZE"
"""The same, and wait to be ended: the controller is about to start another number of workers."""
READY = "RESIZE.ready"
"""The answer to it: the checkpoint is written."""
CONTROLLER_EVENTS = "controller.jsonl"
"""In logs/: what the controller says, in the form of gist_dist.common.events. Its own logging goes to Ray's files."""


def post(run_dir: Path, name: str) -> None:
    (run_dir / name).touch()


def withdraw(run_dir: Path, *names: str) -> None:
    for name in names:
        (run_dir / name).unlink(missing_ok=True)


def posted(run_dir: Path) -> set[str]:
    """Which of the messages are there. The folder is listed, as NFS remembers for half a minute that a file was not."""
    try:
        return {STOP, RESIZE, READY} & set(os.listdir(run_dir))
    except OSError:  # a file server that is away for a moment
        return set()
