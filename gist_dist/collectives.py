"""The only torch.distributed calls. Every cross-worker reduction is a sum; one process needs no process group."""

# Axes:  r rows held here   R rows of all workers   d width

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

BUCKET_BYTES = 64 * 2**20


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


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Sum the parameters' gradients over workers, in buckets.

    A worker without chunks has gradients of None where others have some: who has one is agreed upon first.
    """
    if world.size == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present)
    bucket: list[torch.nn.Parameter] = []
    for parameter, num_present in zip(parameters, present.tolist(), strict=True):
        if not num_present:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (_bytes(bucket) + _bytes([parameter]) > BUCKET_BYTES or bucket[0].dtype != parameter.dtype):
            _all_reduce_bucket(bucket)
            bucket = []
        bucket.append(parameter)
    if bucket:
        _all_reduce_bucket(bucket)


def _bytes(bucket: list[torch.nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in bucket)


def _all_reduce_bucket(bucket: list[torch.nn.Parameter]) -> None:
    flat = torch.cat([p.grad.flatten() for p in bucket])
    dist.all_reduce(flat)
    for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad.copy_(summed.view_as(parameter.grad))


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
