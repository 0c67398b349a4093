"""Whether Ray can start here, and what a cluster has."""

import platform
import time

import ray

from gist_dist.config import ClusterConfig
from gist_dist.doctor import Finding, Verdict, examine_machine
from gist_dist.errors import UserError
from gist_dist.on_ray.cluster import connected

REACH_TIMEOUT_S = 60


def examine(address: str | None = None) -> Verdict:
    """This machine and, with an address, the cluster there in place of a Ray of our own."""
    return examine_machine((lambda: examine_cluster(address)) if address else examine_local_ray)


def examine_local_ray() -> list[Finding]:
    """Start the Ray that a run without an address would start, and run a task on it."""
    started = time.monotonic()
    with connected(ClusterConfig()) as resources:
        version = ray.get(ray.remote(_versions).remote(), timeout=REACH_TIMEOUT_S)
    seconds = time.monotonic() - started
    listed = _listed(resources)
    return [Finding("Ray", "ok", f"{version['ray']} started, ran a task and stopped in {seconds:.0f} s; {listed}")]


def examine_cluster(address: str) -> list[Finding]:
    """A line for the cluster and one for each of its nodes."""
    try:
        with connected(ClusterConfig(address=address)) as resources:
            theirs = ray.get(ray.remote(_versions).remote(), timeout=REACH_TIMEOUT_S)
            nodes = [node for node in ray.nodes() if node["Alive"]]
    except UserError as error:
        return [Finding("Ray", "fail", str(error), "start it with `ray start --head`, or correct --address")]
    except ray.exceptions.GetTimeoutError:
        found = f"the cluster at {address} ran no task within {REACH_TIMEOUT_S} s"
        return [Finding("Ray", "fail", found, "see its dashboard: no core may be free, or no worker can start")]
    findings = [Finding("Ray", "ok", f"{address}: {len(nodes)} node{'s' * (len(nodes) > 1)}; {_listed(resources)}")]
    ours = {"ray": ray.__version__, "python": platform.python_version()}
    if theirs != ours:
        findings.append(Finding("versions", "fail", f"cluster {theirs}, here {ours}", "install the same on both"))
    for node in nodes:
        findings.append(Finding(f"node {node['NodeManagerAddress']}", "ok", _listed(node["Resources"])))
    return findings


def _versions() -> dict[str, str]:
    return {"ray": ray.__version__, "python": platform.python_version()}


def _listed(resources: dict[str, float]) -> str:
    parts = [f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU")]
    return ", ".join([*parts, f"{resources.get('memory', 0) / 1e9:.0f} GB memory"])
