"""Whether a cluster has, or could have, room for the workers of a recipe."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster.connect import cpus_per_worker, gpus_per_worker

KEYS = {"CPU": "cpus", "GPU": "gpus"}


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
