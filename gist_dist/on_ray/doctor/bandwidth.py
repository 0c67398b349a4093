"""How fast the workers of a cluster gather embeddings from each other: the same group and calls as in training."""

import shutil
import tempfile
import time
from statistics import median
from typing import Any

import torch

from gist_dist.config import ClusterConfig
from gist_dist.core.collectives import World, all_gather_rows, barrier, broadcast_object
from gist_dist.on_ray.cluster.capacity import cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.doctor.machine import Finding

SIZES = {"64 kB": 64 * 10**3, "1 MB": 10**6, "16 MB": 16 * 10**6, "64 MB": 64 * 10**6}
"""Bytes that every worker has when all are gathered."""
WIDTH = 64
SECONDS_A_SIZE = 1.0
MAX_REPEATS = 50
SLOW_GB_S = 0.1
"""About what a network of 1 Gbit/s gives; a batch of 65,536 rows of width 1,024 then takes five seconds to gather."""


def measure_gather(cluster: ClusterConfig, resources: dict[str, float], num_workers: int) -> list[Finding]:
    """A line for a small Ray Train run of so many workers, that it started, and how fast it gathered."""
    import ray.train.torch

    from gist_dist.on_ray.cluster.network import NodeTorchConfig

    train: Any = ray.train  # annotated as its first version, while the second is what runs
    cpus, gpus = cpus_per_worker(cluster, resources), gpus_per_worker(cluster, resources)
    free = ray.available_resources()
    if num_workers * cpus > free.get("CPU", 0) or num_workers * gpus > free.get("GPU", 0):
        found = f"not measured: {num_workers} workers have no room beside what runs there"
        return [Finding("all-gather", "warn", found, "look again when no job runs")]
    folder = tempfile.mkdtemp(prefix="gist-dist-doctor-")  # made anew on the node that Ray's controller runs on
    backend = "nccl" if gpus else "gloo"
    started = time.monotonic()
    try:
        trainer = train.torch.TorchTrainer(
            _gather,
            train_loop_config={"use_gpu": gpus > 0},
            torch_config=NodeTorchConfig(backend=backend, timeout_s=120),
            scaling_config=train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
                placement_strategy="SPREAD",
            ),
            run_config=train.RunConfig(
                name=f"doctor-{int(time.time())}", storage_path=folder, worker_runtime_env=cluster.runtime_env or None
            ),
        )
        measured = trainer.fit().return_value
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = (
            "workers must reach each other on all ports; set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to their link"
        )
        return [Finding("all-gather", "fail", f"{num_workers} workers, {backend}: {lines[-1][:300]}", remedy)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    workers, nodes = (
        f"{n} {what}{'s' * (n > 1)}" for n, what in ((num_workers, "worker"), (measured["num_nodes"], "node"))
    )
    spread = f"{workers} on {nodes}, {backend}"
    group = Finding("process group", "ok", f"{spread}, ready in {time.monotonic() - started:.0f} s")
    speeds = {name: SIZES[name] * (num_workers - 1) / num_workers / s / 1e9 for name, s in measured["seconds"].items()}
    shown = ", ".join(f"{n} {_time(measured['seconds'][n])} ({speed:.2f} GB/s)" for n, speed in speeds.items())
    best = max(speeds.values())
    is_slow = num_workers > 1 and best < SLOW_GB_S
    remedy = f"less than {SLOW_GB_S} GB/s: see which link is used (NCCL_DEBUG=INFO), and put nodes into one zone"
    return [group, Finding("all-gather", "warn" if is_slow else "ok", shown, remedy if is_slow else "")]


def _gather(payload: dict[str, Any]) -> dict[str, Any]:
    """On a worker: what gather_seconds() gives, and over how many nodes."""
    import ray
    from ray.train.torch import get_device

    world = World.current()
    device = get_device() if payload["use_gpu"] else torch.device("cpu")
    node = torch.tensor([[float(int(ray.get_runtime_context().get_node_id()[:12], 16))]], dtype=torch.float64)
    nodes = all_gather_rows(node.to(device), [1] * world.size, world).flatten().tolist()
    return {"seconds": gather_seconds(world, device), "num_nodes": len(set(nodes))}


def gather_seconds(world: World, device: torch.device, seconds_a_size: float = SECONDS_A_SIZE) -> dict[str, float]:
    """Median time for each size. Every rank repeats as often as rank 0 says, which tries once first."""
    seconds = {}
    for name, num_bytes in SIZES.items():
        rows = torch.ones(max(1, num_bytes // (4 * WIDTH * world.size)), WIDTH, device=device)
        counts = [len(rows)] * world.size

        def gather(rows: torch.Tensor = rows, counts: list[int] = counts) -> float:
            barrier(world)
            started = time.perf_counter()
            all_gather_rows(rows, counts, world)[-1, -1].item()  # reading a number waits for the GPU
            return time.perf_counter() - started

        gather()
        once = gather()
        repeats = broadcast_object(min(MAX_REPEATS, max(3, int(seconds_a_size / once))), world)
        seconds[name] = median(gather() for _ in range(repeats))
    return seconds


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
