"""How far something is, in a line of the log every few seconds."""

import logging
import time
from collections.abc import Callable
from functools import partial

from gist_dist.common.events import PROGRESS, phase
from gist_dist.common.text import clock

PROGRESS_SECONDS = 5
"""Between two lines."""
Say = Callable[[str], None]


def progress_of(logger: logging.Logger, of_phase: str | None = None) -> Say:
    """Lines of this logger that replace each other on a terminal."""
    return partial(logger.info, extra={**PROGRESS, **(phase(of_phase) if of_phase else {})})


class Progress:
    """Says a line every few seconds, with the time that the rest takes at the speed so far."""

    def __init__(self, total: int | float, say: Say) -> None:
        """total: of whatever takes time in proportion, as tokens; reach() counts the same."""
        self.total, self.say = total, say
        self.started = self.said = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning; never 0."""
        return max(time.monotonic() - self.started, 1e-9)

    def left(self, done: int | float) -> str | None:
        """A few words; None at the beginning and at the end."""
        if not 0 < done < self.total:
            return None
        return f"about {clock(self.seconds / done * (self.total - done))} left"

    def reach(self, done: int | float, text: str, now: bool = False) -> None:
        """So much is done. now: say so even if the last line was just said."""
        if now or time.monotonic() - self.said >= PROGRESS_SECONDS:
            self.said = time.monotonic()
            left = self.left(done)
            self.say(f"{text}, {left}" if left else text)
