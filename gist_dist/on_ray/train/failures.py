"""What went wrong in a worker: the user's mistake, memory, a lost process, a lost peer, a bug."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from gist_dist.common.errors import UserError
from gist_dist.config import BatchConfig

Kind = Literal["user", "memory", "killed", "hung", "lost", "peer", "error"]

# torch on a CPU, Ray and gloo raise one type for many causes, without a field that tells them apart: their words do.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Unable to allocate|running low on memory"
    r"|could not create a (primitive|memory object)(?! desc)",  # what oneDNN says of it
    re.I,
)
LOW_MEMORY = re.compile(r"running low on memory|memory usage threshold|OutOfMemoryError", re.I)
KILLED = re.compile(r"SIGKILL|connection error code 2|killed by|End of file", re.I)
PEER = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Socket closed|Timed out waiting|NCCL|gloo|TCPStore", re.I
)
PHASES = {
    "loss": "scoring the batch",
    "guide": "the guide",
    "encode": "encoding",
    "backward": "encoding",
    "optimizer": "the optimizer's step",
}
"""Names of a step's phases in sentences. The memory of the other phases follows from no budget of the recipe."""


class OutOfMemory(Exception):
    """A worker's memory, or its GPU's, was not enough; the message is a sentence for the user."""


@dataclass(frozen=True)
class Failure:
    rank: int
    kind: Kind
    text: str
    """One line."""
    has_remedy: bool = False
    """The text is a sentence of ours that tells the user what to do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this exception means that memory ran out: CUDA's, Python's, numpy's, or torch's on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def memory_sentence(batch: BatchConfig, phase: str | None = None, what: str = "a worker ran out of memory") -> str:
    """What happened, which budgets to lower, and what they are now. phase: of a step, as the clock names it."""
    during = f" in {PHASES[phase]}" if phase in PHASES else ""
    return f"{what}{during}; {memory_remedy(batch, phase)}"


def memory_remedy(batch: BatchConfig, phase: str | None = None) -> str:
    """Which budgets to lower, and what they are now."""
    tokens, activations, loss = (
        f"batch.chunk_tokens (now {batch.tokens_at_once})",
        f"batch.activation_gb (now {batch.kept_bytes / 1e9:g})",
        f"batch.loss_gb (now {batch.loss_gb:g})",
    )
    if phase == "loss":
        remedy = f"lower {loss}, then {activations}"
    elif phase == "guide":
        remedy = f"lower {tokens}, or set guide.mode=cache"
    elif phase == "optimizer":
        remedy = f"lower {activations}; the weights with their optimizer state take the rest"
    elif phase in ("encode", "backward"):
        remedy = f"lower {activations}, then {tokens}"
    else:
        remedy = f"lower {activations}, then {tokens} and {loss}"
    return f"{remedy}: results stay the same, and the same command resumes"


def classify(failures: Mapping[int, BaseException]) -> list[Failure]:
    """The failures of the ranks, causes before consequences: a rank whose peer went away is never the first."""
    order: tuple[Kind, ...] = ("user", "memory", "hung", "killed", "lost", "error", "peer")
    found = [_classified(rank, error) for rank, error in failures.items()]
    return sorted(found, key=lambda failure: (order.index(failure.kind), failure.rank))


def _classified(rank: int, error: BaseException) -> Failure:
    from gist_dist.core.collectives import CollectiveError

    text = last_line(str(error)) or type(error).__name__
    causes = list(_causes(error))
    full = str(error)
    if isinstance(error, UserError):
        return Failure(rank, "user", str(error), has_remedy=True)
    if isinstance(error, OutOfMemory):
        return Failure(rank, "memory", str(error), has_remedy=True)
    if any(isinstance(cause, WorkerHealthCheckTimeoutError) for cause in causes):
        return Failure(rank, "hung", f"worker {rank} did not answer")
    if any(isinstance(cause, WorkerHealthCheckFailedError) for cause in causes):
        if LOW_MEMORY.search(full):
            return Failure(rank, "memory", full)
        if KILLED.search(full):
            return Failure(rank, "killed", f"worker {rank} was ended from outside or ended itself")
        return Failure(rank, "lost", f"worker {rank} was lost")
    if isinstance(error, CollectiveError) or (isinstance(error, RuntimeError) and PEER.search(full)):
        return Failure(rank, "peer", text)
    return Failure(rank, "error", f"{type(error).__name__}: {text}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "health_check_failure", None)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""
