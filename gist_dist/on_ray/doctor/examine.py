"""Whether Ray can start here, and whether the nodes of a cluster have what training needs and fit together."""

import platform
import time

import ray

from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig, Place, RunConfig, paths_of
from gist_dist.on_ray.cluster.capacity import check_resources, cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.doctor.bandwidth import measure_gather
from gist_dist.on_ray.doctor.machine import Finding, Verdict, examine_machine
from gist_dist.on_ray.doctor.nodes import Nodes

REACH_TIMEOUT_S = 60


def examine(address: str | None = None, config: RunConfig | None = None, output_dir: str | None = None) -> Verdict:
    """This machine and, with an address, the cluster there in place of a Ray of our own.

    config: its models, tasks, storage and workers are looked at, too. output_dir: as the recipe's.
    """
    if address is None:
        return examine_machine(examine_local_ray)
    config = config.absolute_paths() if config else None
    return examine_machine(lambda: examine_cluster(address, config, output_dir))


def examine_local_ray() -> list[Finding]:
    """Start the Ray that a run without an address would start, and run a task on it."""
    started = time.monotonic()
    with connected(ClusterConfig()) as resources:
        version = ray.get(ray.remote(_versions).remote(), timeout=REACH_TIMEOUT_S)
    seconds = time.monotonic() - started
    listed = _listed(resources)
    return [Finding("Ray", "ok", f"{version['ray']} started, ran a task and stopped in {seconds:.0f} s; {listed}")]


def examine_cluster(address: str, config: RunConfig | None = None, output_dir: str | None = None) -> list[Finding]:
    """The cluster, each of its nodes, what they share, and how fast their workers gather."""
    cluster = (config.cluster if config else ClusterConfig()).model_copy(update={"address": address})
    try:
        with connected(cluster) as resources:
            theirs = ray.get(ray.remote(_versions).remote(), timeout=REACH_TIMEOUT_S)
            ours = {"ray": ray.__version__, "python": platform.python_version()}
            if theirs != ours:
                found = f"cluster {theirs}, here {ours}"
                return [Finding("versions", "fail", found, "install the same on both")]
            return _examine_nodes(address, config, _shared_places(config, output_dir), cluster, resources)
    except UserError as error:
        return [Finding("Ray", "fail", str(error), "start it with `ray start --head`, or correct --address")]
    except ray.exceptions.GetTimeoutError:
        found = f"the cluster at {address} ran no task within {REACH_TIMEOUT_S} s"
        return [Finding("Ray", "fail", found, "see its dashboard: no core may be free, or no worker can start")]


def _examine_nodes(
    address: str,
    config: RunConfig | None,
    places: dict[str, str],
    cluster: ClusterConfig,
    resources: dict[str, float],
) -> list[Finding]:
    nodes = Nodes()
    try:
        count = len(nodes.names)
        findings = [Finding("Ray", "ok", f"{address}: {count} node{'s' * (count > 1)}; {_listed(resources)}")]
        findings += nodes.examine(config, places)
    finally:
        nodes.close()
    if not places and count > 1:
        remedy = "give --output-dir FOLDER or a recipe"
        findings.append(Finding("storage", "warn", "whether the nodes share any was not looked at", remedy))
    try:
        check_resources(cluster, resources)
    except UserError as error:
        return [*findings, Finding("workers", "fail", str(error), "add nodes, or ask for less")]
    least = _usual_workers(cluster, resources, count)
    return findings + measure_gather(cluster, resources, max(cluster.min_workers, least) if config else least)


def _usual_workers(cluster: ClusterConfig, resources: dict[str, float], num_nodes: int) -> int:
    """One for each GPU; without any, one for each node, and two on a single one; as many as there is room for."""
    cpus, gpus = cpus_per_worker(cluster, resources), gpus_per_worker(cluster, resources)
    room = int(resources.get("CPU", 0) / cpus)
    if gpus:
        return min(room, int(resources["GPU"] / gpus))
    return max(1, min(max(2, num_nodes), room))


def _shared_places(config: RunConfig | None, output_dir: str | None) -> dict[str, str]:
    places = {key: path for key, place, path in paths_of(config) if place is Place.WRITTEN} if config else {}
    return places | ({"output_dir": output_dir} if output_dir else {})


def _versions() -> dict[str, str]:
    return {"ray": ray.__version__, "python": platform.python_version()}


def _listed(resources: dict[str, float]) -> str:
    parts = [f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU")]
    return ", ".join([*parts, f"{resources.get('memory', 0) / 1e9:.0f} GB memory"])
