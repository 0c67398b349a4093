"""Pieces of work on Ray: given out, listened to, given out again where they are lost, ended with their caller.

prepare, precompute, mine, clusters and evaluation differ in what a piece is, and in what they do with a lost one.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line

P = TypeVar("P", bound=Hashable)
ASK_SECONDS = 1.0
"""Between two questions whether the outcomes are still wanted."""
cancel: Callable[[Any], None] = partial(ray.cancel, force=True)
"""A process that is only interrupted may hold locks when its next task comes."""


class Answer(NamedTuple):
    """What a task has returned; of one that yields, what it has yielded."""

    value: Any


class Failed(NamedTuple):
    """The piece raised this, and is done."""

    cause: Exception


class Lost(NamedTuple):
    """The process of a piece, its node or its answer is gone; the piece is done unless it is given out again."""

    error: RayError
    times: int
    """How often this piece was lost by now."""


class Late(NamedTuple):
    """The piece was not done in its time, and was ended."""


Outcome = Answer | Failed | Lost | Late


class Pool(Generic[P]):
    """Runs pieces on Ray while its block lasts; those that still run when it is left are ended."""

    def __init__(
        self,
        start: Callable[[P], Any],
        pieces: Iterable[P],
        max_running: int | None = None,
        end: Callable[[Any], None] = cancel,
        is_unwanted: Callable[[], bool] | None = None,
    ) -> None:
        """start: gives a piece to Ray, and returns its reference, or its generator of references. end: undoes it.
        is_unwanted: asked about every second; once it is true, no more outcomes come."""
        self.start, self.end, self.is_unwanted = start, end, is_unwanted
        self.max_running = max_running or math.inf
        self.waiting = deque(pieces)
        self.running: dict[Any, P] = {}
        self.deadlines: dict[P, float] = {}
        """Times of time.monotonic()."""
        self.losses: Counter[P] = Counter()

    def __enter__(self) -> "Pool[P]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for reference in self.running:
            self.end(reference)

    def again(self, piece: P) -> None:
        """A piece that was lost is the next one again."""
        self.waiting.appendleft(piece)

    def limit(self, piece: P, seconds: int | float) -> None:
        """From now on the running piece has so much time."""
        self.deadlines[piece] = time.monotonic() + seconds

    def finish(self, piece: P) -> None:
        """Nothing more is wanted of a running piece that yields."""
        self._forget(next(reference for reference, running in self.running.items() if running == piece))

    def outcomes(self) -> Iterator[tuple[P, Outcome]]:
        """What comes of the pieces, as it comes, until all are done or unwanted."""
        while (self.waiting or self.running) and not (self.is_unwanted and self.is_unwanted()):
            while self.waiting and len(self.running) < self.max_running:
                piece = self.waiting.popleft()
                self.running[self.start(piece)] = piece
            for reference in self._ready():
                piece, is_stream = self.running[reference], not isinstance(reference, ObjectRef)
                try:
                    outcome: Outcome = Answer(ray.get(next(reference) if is_stream else reference))
                except StopIteration:
                    self._forget(reference)
                    continue
                except RayTaskError as error:
                    outcome = Failed(error.cause)
                except RayError as error:
                    self.losses[piece] += 1
                    outcome = Lost(error, self.losses[piece])
                if not (is_stream and isinstance(outcome, Answer)):
                    self._forget(reference)
                yield piece, outcome
            now = time.monotonic()
            for reference in [r for r, piece in self.running.items() if self.deadlines.get(piece, math.inf) <= now]:
                self.end(reference)
                yield self._forget(reference), Late()

    def _ready(self) -> list[Any]:
        """At least one that has something to say, unless a deadline comes first, or the question whether to go on."""
        first = min(self.deadlines.get(piece, math.inf) for piece in self.running.values())
        if self.is_unwanted:
            first = min(first, time.monotonic() + ASK_SECONDS)
        timeout = None if math.isinf(first) else max(0.0, first - time.monotonic())
        return ray.wait(list(self.running), num_returns=1, timeout=timeout, fetch_local=False)[0]

    def _forget(self, reference: Any) -> P:
        piece = self.running.pop(reference)
        self.deadlines.pop(piece, None)
        return piece


def failure(cause: Exception, what: str) -> UserError:
    """A piece's own UserError, or a sentence that begins with what was being done: "mining"."""
    if isinstance(cause, UserError):
        return cause
    return UserError(f"{what} failed with {type(cause).__name__}: {one_line(cause)}")
