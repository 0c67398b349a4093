"""The only torch.distributed calls. Every cross-worker reduction is a sum; one process needs no process group."""

# Axes:  r rows held here   R rows of all workers   d width

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()


def all_gather_rows(rows: Float[Tensor, "r d"], counts: Sequence[int], world: World) -> Float[Tensor, "R d"]:
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


def all_reduce_max(value: float, device: torch.device, world: World) -> float:
    if world.size == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def try_backends() -> list[str]:
    """Sum a tensor in a gloo group of one, in this process; RuntimeError if that fails. Names of what can be used."""
    with tempfile.TemporaryDirectory() as folder:
        group = dist.ProcessGroupGloo(dist.FileStore(f"{folder}/store", 1), 0, 1)
        group.allreduce([torch.ones(3)]).wait()
    return ["gloo"] + ["nccl"] * dist.is_nccl_available()
