"""Ends a process whose step makes no progress: whoever started it can then start it again."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

FIRST_STEPS, FIRST_STEPS_FACTOR = 3, 6
"""The first steps of a process may take so many times as long: torch.compile, and the first use of every kernel."""
SLOW_FACTOR = 5
"""And any step so many times as long as the longest so far."""
EXIT_STATUS = 86


class Watchdog:
    """Watches steps only: checkpoints, a guide's renewal and the loading of models take the time that they take.

    A thread of its own, which runs as long as the hung code lets go of Python's lock; where it does not, Ray's health
    check gets no answer either.
    """

    def __init__(self, limit_s: float, stacks: Path, end: Callable[[], None] = lambda: os._exit(EXIT_STATUS)) -> None:
        """stacks: a file that the stacks of all threads are appended to before end() is called."""
        self.limit_s, self.stacks, self.end = limit_s, stacks, end
        self.num_steps, self.longest = 0, 0.0
        self.step: int | None = None
        self._lock, self._is_awake = threading.Lock(), False

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        with self._lock:
            self.step, self.started = step, time.monotonic()
            self.num_steps += 1
            if not self._is_awake:
                self._is_awake = True
                threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self.longest = max(self.longest, time.monotonic() - self.started)
                self.step = None

    @property
    def allowed_s(self) -> float:
        first = FIRST_STEPS_FACTOR if self.num_steps <= FIRST_STEPS else 1
        return max(first * self.limit_s, SLOW_FACTOR * self.longest)

    def _watch(self) -> None:
        while True:
            time.sleep(self.limit_s / 16)
            with self._lock:
                if self.step is None:  # between two steps: the next one wakes another thread
                    self._is_awake = False
                    return
                step, seconds = self.step, time.monotonic() - self.started
                if seconds > self.allowed_s:
                    break
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self.stacks, "a", encoding="utf-8") as file:
            file.write(f"step {step} made no progress for {seconds:.0f} s; stacks of process {os.getpid()}:\n")
            faulthandler.dump_traceback(file, all_threads=True)
        logger.error("step %d made no progress for %.0f s: this worker ends (stacks in %s)", step, seconds, self.stacks)
        self.end()
