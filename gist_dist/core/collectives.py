"""The only torch.distributed calls. Every cross-worker reduction is a sum; one process needs no process group."""

# Axes:  r rows held here   R rows of all workers   d width

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from gist_dist.common.errors import UserError

T = TypeVar("T")
ANSWER_SECONDS = 20
"""How long the others wait for rank 0 in one collective."""

CollectiveError = dist.DistError
"""What a collective raises, where a peer was lost too."""


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()


def all_gather_rows(rows: Shaped[Tensor, "r d"], counts: Sequence[int], world: World) -> Shaped[Tensor, "R d"]:
    """The rows of all workers, by rank. counts: rows of every worker, which may differ and may be 0."""
    if world.size == 1:
        return rows
    most = max(counts)
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(world.size * most, rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded)
    return torch.cat([gathered[rank * most : rank * most + count] for rank, count in enumerate(counts)])


def reduce_scatter_rows(rows: Float[Tensor, "R d"], counts: Sequence[int], world: World) -> Float[Tensor, "r d"]:
    """Sum over workers; each keeps its own rows. The inverse of all_gather_rows."""
    if world.size == 1:
        return rows
    most = max(counts)
    padded = rows.new_zeros(world.size * most, rows.shape[1])
    for rank, own in enumerate(torch.split(rows, list(counts))):
        padded[rank * most : rank * most + len(own)] = own
    summed = rows.new_empty(most, rows.shape[1])
    dist.reduce_scatter_tensor(summed, padded)
    return summed[: counts[world.rank]]


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum over workers, in place."""
    dist.all_reduce(tensor)


def all_reduce_values(values: dict[str, Tensor], world: World) -> dict[str, float]:
    """Sum named numbers over workers, in fp64; every worker has the same names."""
    names = sorted(values)
    stacked = torch.stack([values[name].to(torch.float64) for name in names])
    if world.size > 1:
        dist.all_reduce(stacked)
    return dict(zip(names, stacked.tolist(), strict=True))


def all_reduce_max(values: dict[str, float], device: torch.device, world: World) -> dict[str, float]:
    """The largest of each named number over workers; every worker has the same names."""
    if world.size == 1:
        return values
    names = sorted(values)
    largest = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(names, largest.tolist(), strict=True))


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast(tensor: Tensor, world: World) -> None:
    """Rank 0's numbers, on every rank, in place. The tensor is contiguous."""
    if world.size > 1 and tensor.numel():
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)  # of any type


def on_rank_0(task: Callable[[], T], world: World) -> T | None:
    """Rank 0 does the task, for as long as it takes, while the others wait; they get None.

    A UserError of it is raised on every rank, so that none goes on alone.
    """
    if world.size == 1:
        return task()
    with ThreadPoolExecutor(1, thread_name_prefix="rank-0") as pool:
        doing = pool.submit(task) if world.rank == 0 else None
        done, complaint = False, None
        while not done:  # asked again and again: a collective that waits for minutes counts as hung
            done, complaint = broadcast_object(_progress(doing) if doing else None, world)
    if doing:
        return doing.result()
    if complaint is not None:
        raise UserError(complaint)
    return None


def _progress(doing: Future[Any]) -> tuple[bool, str | None]:
    """Whether it is done, and what the user is to be told. What else went wrong ends rank 0, and so its group."""
    is_done = bool(wait([doing], ANSWER_SECONDS).done)
    error = doing.exception() if is_done else None
    return is_done, str(error) if isinstance(error, UserError) else None


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def try_backends() -> list[str]:
    """Sum a tensor in a gloo group of one, in this process; RuntimeError if that fails. Names of what can be used."""
    with tempfile.TemporaryDirectory() as folder:
        api: Any = dist  # its stubs lack FileStore, the default timeout and allreduce
        group = api.ProcessGroupGloo(api.FileStore(f"{folder}/store", 1), 0, 1)
        group.allreduce([torch.ones(3)]).wait()
    return ["gloo"] + ["nccl"] * dist.is_nccl_available()
