"""Connecting to Ray: the cluster that the recipe names, or a local Ray of our own that disturbs no other."""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gist_dist.common.signals import handled
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster import local_ray
from gist_dist.on_ray.cluster.address import address_of, check_address, reach, setting_of, unreached

# Read by Ray's processes when they start. The controller polls its workers at this interval.
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
WORKER_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # then Ray looks again how many workers there is room for
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
    else:
        yield from _remote(address, config) if address else _local(config)


@contextmanager
def _own_signals() -> Iterator[None]:
    """ray.init() sets a SIGTERM handler that ends the process; ours stays."""
    if threading.current_thread() is threading.main_thread():
        with handled(signal.SIGTERM, signal.getsignal(signal.SIGTERM)):
            yield
    else:
        yield


def _remote(address: str, config: ClusterConfig) -> Iterator[dict[str, float]]:
    import ray

    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train view
    setting = setting_of(config)
    check_address(address, setting)
    try:
        reach(address)
        with _own_signals():
            ray.init(
                address=address, runtime_env=_runtime_env(config), log_to_driver=False, logging_level=logging.WARNING
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise unreached(address, setting, error) from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _local(config: ClusterConfig) -> Iterator[dict[str, float]]:
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        _require_token()
    import ray

    with local_ray.temporary_folder() as folder:
        try:
            with _own_signals():
                local_ray.start(folder, _runtime_env(config))
            yield ray.cluster_resources()
        finally:
            ray.shutdown()


def _require_token() -> None:
    """Ray's servers listen on every interface; with a token nobody but this process and its workers gets in.

    The token is a variable of ours, where ray.init() would leave a file in the user's home.
    """
    from ray._raylet import Config  # type: ignore[attr-defined]  # its cached settings were read when ray was imported

    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    Config.initialize("")


def _runtime_env(config: ClusterConfig) -> dict[str, Any]:
    environment = dict(config.runtime_env)
    environment["env_vars"] = WORKER_ENVIRONMENT | dict(environment.get("env_vars", {}))
    return environment
