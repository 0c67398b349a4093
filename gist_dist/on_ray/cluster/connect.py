"""Connecting to Ray: the cluster that the recipe names, or a local Ray of our own that disturbs no other."""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.signals import handled
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster import local_ray
from gist_dist.on_ray.cluster.address import address_of, check_address, reach, setting_of, unreached

logger = logging.getLogger(__name__)

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

LOOK_SECONDS = 3.0
UNREACHABLE_SECONDS = 30.0
"""Ray itself ends this process when the head has been away for a minute, without a word for the user."""


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
                f"cluster.num_workers = {_shown(config)} with {key} = {each:g} needs "
                f"{config.min_workers * each:g} {kind}s; the cluster has {total:g}; lower one of them"
            )


def _shown(config: ClusterConfig) -> str:
    elastic = config.min_workers < config.max_workers
    return f"[{config.min_workers}, {config.max_workers}]" if elastic else str(config.max_workers)


class ClusterWatch:
    """Whether the cluster still answers and has room for the fewest workers, looked at from a thread.

    problem is a sentence once that has not been so for UNREACHABLE_SECONDS, or for cluster.wait_minutes.
    """

    def __init__(self, config: ClusterConfig, cpus: float, gpus: float) -> None:
        self.config, self.needs = config, {"CPU": config.min_workers * cpus, "GPU": config.min_workers * gpus}
        self.problem: str | None = None
        self.is_short = False
        self._ended = threading.Event()

    def __enter__(self) -> "ClusterWatch":
        import ray

        self.address = ray.get_runtime_context().gcs_address
        threading.Thread(target=self._reach_again, name="cluster-reach", daemon=True).start()
        threading.Thread(target=self._count_again, name="cluster-room", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def silence(self) -> str | None:
        """A sentence if the head does not answer now."""
        try:
            reach(self.address)
        except OSError as error:
            return (
                f"the head of the Ray cluster at {self.address} does not answer ({error.strerror or error}); the same "
                "command resumes from the last checkpoint"
            )
        return None

    def _reach_again(self) -> None:
        answered = time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            silence = self.silence()
            if silence is None:
                answered = time.monotonic()
            elif time.monotonic() - answered > UNREACHABLE_SECONDS:
                self.problem = silence
                return

    def _count_again(self) -> None:
        """On its own, as a question to a cluster that is away can take a minute to fail."""
        import ray

        enough = time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            try:
                resources = ray.cluster_resources()
            except Exception:  # not connected any more: the other thread's concern
                continue
            short = [
                f"{least:g} {kind}s of which it has {resources.get(kind, 0):g}"
                for kind, least in self.needs.items()
                if resources.get(kind, 0) < least
            ]
            if not short:
                if self.is_short:
                    logger.info("the cluster has room for the workers again")
                enough, self.is_short = time.monotonic(), False
                continue
            missing = f"the cluster lacks {' and '.join(short)} for cluster.num_workers = {_shown(self.config)}"
            if not self.is_short:
                self.is_short = True
                logger.info("%s; waiting %g minutes for nodes", missing, self.config.wait_minutes)
            if time.monotonic() - enough > 60 * self.config.wait_minutes:
                self.problem = (
                    f"{missing}, for {self.config.wait_minutes:g} minutes now; the same command resumes once there "
                    "are nodes (cluster.wait_minutes waits longer)"
                )
                return
