"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, a second Ctrl-C ends the command at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequests:
    """What has come so far. Handlers only count: the caller's loop acts, where it is safe to."""

    requested: str | None = None
    insisted: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Count SIGINT and SIGTERM instead of being ended by them, while the block runs in the main thread.

    Ray's own handlers (SIGINT in fit(), SIGTERM in init()) abort the workers within a step.
    """
    requests = StopRequests()

    def count(number: int, frame: Any) -> None:
        requests.insisted = requests.insisted or (requests.requested is not None and number == signal.SIGINT)
        requests.requested = requests.requested or signal.Signals(number).name

    with handled(signal.SIGINT, count), handled(signal.SIGTERM, count):
        yield requests


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """A signal's handler while the block runs; nothing changes outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
