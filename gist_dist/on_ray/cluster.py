"""Connecting to Ray: the cluster that the recipe names, or a local Ray of our own that disturbs no other."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gist_dist.config import ClusterConfig
from gist_dist.errors import UserError

# Read by Ray's processes when they start. The controller polls its workers at this interval.
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
WORKER_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS does not promise equal bits twice
}


@contextmanager
def connected(config: ClusterConfig) -> Iterator[dict[str, float]]:
    """Total resources of the cluster, connected for the length of the block.

    An address in the recipe or in RAY_ADDRESS is used; a Ray that happens to run on this machine is not.
    """
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = address_of(config)
    import ray

    if ray.is_initialized():  # a caller's own session: theirs to stop
        yield ray.cluster_resources()
        return
    if address:
        yield from _remote(address, config)
    else:
        yield from _local(config)


def _remote(address: str, config: ClusterConfig) -> Iterator[dict[str, float]]:
    import ray

    try:
        _reach(address)
        ray.init(address=address, runtime_env=_runtime_env(config), log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cluster.address = {address}: no Ray cluster answers there: {reason}") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError if nothing listens there: Ray would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _local(config: ClusterConfig) -> Iterator[dict[str, float]]:
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        _require_token()
    # A short path of its own: sockets under it may have 107 characters, and no other Ray's files are touched.
    folder = Path(tempfile.mkdtemp(prefix="gist-ray-", dir="/tmp" if Path("/tmp").is_dir() else None))
    import ray

    try:
        ray.init(
            address="local",
            include_dashboard=False,
            runtime_env=_runtime_env(config),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _require_token() -> None:
    """Ray's servers listen on every interface; with a token nobody but this process and its workers gets in.

    The token is a variable of ours, where ray.init() would leave a file in the user's home.
    """
    from ray._raylet import Config  # its cached settings were read when ray was imported

    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    Config.initialize("")


def _runtime_env(config: ClusterConfig) -> dict[str, Any]:
    environment = dict(config.runtime_env)
    environment["env_vars"] = WORKER_ENVIRONMENT | dict(environment.get("env_vars", {}))
    return environment


def address_of(config: ClusterConfig) -> str | None:
    """None: a local Ray of our own."""
    return config.address or os.environ.get("RAY_ADDRESS")


def gpus_per_worker(config: ClusterConfig, resources: dict[str, float]) -> float:
    if config.gpus_per_worker is not None:
        return config.gpus_per_worker
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def cpus_per_worker(config: ClusterConfig, resources: dict[str, float]) -> float:
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    return 1.0 if config.num_workers <= resources.get("CPU", 0) else 0.5


def check_resources(config: ClusterConfig, resources: dict[str, float]) -> None:
    """UserError if the workers would wait forever for what the cluster does not have."""
    cpus, gpus = cpus_per_worker(config, resources), gpus_per_worker(config, resources)
    wants = {"CPU": (cpus, "cpus_per_worker"), "GPU": (gpus, "gpus_per_worker")}
    for kind, (each, key) in wants.items():
        total = resources.get(kind, 0)
        if config.num_workers * each > total:
            raise UserError(
                f"cluster.num_workers = {config.num_workers} with {key} = {each:g} needs "
                f"{config.num_workers * each:g} {kind}s; the cluster has {total:g}; lower one of them"
            )
