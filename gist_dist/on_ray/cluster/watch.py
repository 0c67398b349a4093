"""Whether a cluster stays there while a training runs on it."""

import logging
import threading
import time

from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster.address import reach
from gist_dist.on_ray.cluster.capacity import workers_asked_for

logger = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
UNREACHABLE_SECONDS = 30.0
"""Ray itself ends this process when the head has been away for a minute, without a word for the user."""


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
            missing = (
                f"the cluster lacks {' and '.join(short)} for cluster.num_workers = {workers_asked_for(self.config)}"
            )
            if not self.is_short:
                self.is_short = True
                logger.info("%s; waiting %g minutes for nodes", missing, self.config.wait_minutes)
            if time.monotonic() - enough > 60 * self.config.wait_minutes:
                self.problem = (
                    f"{missing}, for {self.config.wait_minutes:g} minutes now; the same command resumes once there "
                    "are nodes (cluster.wait_minutes waits longer)"
                )
                return
