"""What a worker takes of a cluster, and whether the cluster has, or could have, room for the workers of a recipe."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig

KEYS = {"CPU": "cpus", "GPU": "gpus"}


def gpus_per_worker(config: ClusterConfig, resources: dict[str, float]) -> float:
    if config.gpus_per_worker is not None:
        return config.gpus_per_worker
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def cpus_per_worker(config: ClusterConfig, resources: dict[str, float]) -> float:
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    return 1.0 if config.min_workers <= resources.get("CPU", 0) else 0.5


def check_resources(config: ClusterConfig, resources: dict[str, float]) -> None:
    """UserError if the workers, the fewest that the recipe allows, would wait for what the cluster does not have."""
    cpus, gpus = cpus_per_worker(config, resources), gpus_per_worker(config, resources)
    wants = {"CPU": (cpus, "cpus_per_worker"), "GPU": (gpus, "gpus_per_worker")}
    for kind, (each, key) in wants.items():
        total = resources.get(kind, 0)
        if config.min_workers * each > total:
            raise UserError(
                f"cluster.num_workers = {workers_asked_for(config)} with {key} = {each:g} needs "
                f"{config.min_workers * each:g} {kind}s; the cluster has {total:g}; lower one of them"
            )


def workers_asked_for(config: ClusterConfig) -> str:
    """As cluster.num_workers says it: 4, or [2, 4]."""
    elastic = config.min_workers < config.max_workers
    return f"[{config.min_workers}, {config.max_workers}]" if elastic else str(config.max_workers)


def check_room(
    config: ClusterConfig, nodes: Sequence[Mapping[str, float]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """UserError if the fewest workers that the recipe allows can never run at once.

    nodes: resources of each. groups: of nodes that an autoscaler may start, with resources and most (-1: any number).
    """
    growth = [{kind: n * (group["most"] != 0) for kind, n in group["resources"].items()} for group in groups]
    totals: dict[str, float] = {kind: sum(n.get(kind, 0) for n in (*nodes, *growth)) for kind in ("CPU", "GPU")}
    needs = {"CPU": cpus_per_worker(config, totals), "GPU": gpus_per_worker(config, totals)}
    now = sum(_fitting(node, needs) for node in nodes)
    grown = sum(_fitting(g["resources"], needs) * (inf if g["most"] < 0 else g["most"]) for g in groups)
    room = max(now, grown)
    if config.min_workers > room:
        each = " and ".join(f"{key}_per_worker = {needs[kind]:g}" for kind, key in KEYS.items() if needs[kind])
        raise UserError(
            f"cluster.num_workers = {config.min_workers} with {each}: the cluster has room for {room:g} "
            f"({_listed(nodes)}{', and grows no further' if groups else ''}); ask for less, or add nodes"
        )


def _fitting(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """Workers that one node has room for."""
    return int(min(resources.get(kind, 0) / each + 1e-9 for kind, each in needs.items() if each))


def _listed(nodes: Sequence[Mapping[str, float]]) -> str:
    """2 nodes with 8 CPUs and 1 GPU, 1 node with 0 CPUs."""
    kinds = Counter(
        " and ".join(f"{node.get(kind, 0):g} {kind}s" for kind in KEYS if kind == "CPU" or node.get(kind, 0))
        for node in nodes
    )
    return ", ".join(f"{count} node{'s' * (count > 1)} with {what}" for what, count in kinds.most_common())
