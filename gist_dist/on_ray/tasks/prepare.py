"""Preparing a corpus with Ray tasks: every part of every source on whichever core is free."""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import ClusterConfig, RunConfig
from gist_dist.data.corpus import Corpus, prepare, run_in_process
from gist_dist.data.shards import Commit, Job
from gist_dist.on_ray.cluster.connect import connected

if TYPE_CHECKING:  # tasks import this module, and need no torch
    from gist_dist.models.encoder import Encoder

logger = logging.getLogger(__name__)

SMALL_BYTES = 64 * 2**20
"""The driver prepares less than this in the time that a local Ray takes to start."""
MAX_LOSSES = 3
"""How often a part is started again after its process or node was lost."""
QUEUED_PER_CORE = 2
"""Tasks that are given to Ray before others are done, so that no core waits for the driver."""


def prepare_on_ray(config: RunConfig, student: "Encoder", guide: "Encoder | None") -> Corpus:
    """As gist_dist.data.corpus.prepare, with Ray where there is much to do.

    Ray is not started to open what is prepared. A session that is there already is used.
    """
    return prepare(config, student, guide, run_parts=partial(run_parts, config.cluster))


def run_parts(
    cluster: ClusterConfig, job: Job, tick: Callable[[int, int], None]
) -> Iterator[tuple[int, Commit | None]]:
    """Small jobs in this process: mistakes in the data are then named before any cluster is asked for anything."""
    if sum(map(_num_bytes, job.sources)) < SMALL_BYTES:
        yield from run_in_process(job, tick)
        return
    with connected(cluster) as resources:
        yield from run_in_tasks(job, tick, max(2, int(QUEUED_PER_CORE * resources.get("CPU", 1))))


def run_in_tasks(job: Job, tick: Callable[[int, int], None], max_in_flight: int) -> Iterator[tuple[int, Commit | None]]:
    """A task for each part. UserError as it was raised in a task; one for a part that is lost again and again."""
    import ray

    from gist_dist.on_ray.tasks.pool import Answer, Failed, Lost, Pool

    # Lost tasks are begun again here and not by Ray, which expects a task to yield the same things once more.
    # A lambda, as Ray does not see that a function which the tests' type checker has wrapped is a generator.
    remote: Any = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")
    task = remote(lambda shared, number: (yield from _run_part(shared, number)))
    shared = ray.put(job)
    with Pool(lambda number: task.remote([shared], number), range(len(job.parts)), max_in_flight) as pool:
        for number, outcome in pool.outcomes():
            if isinstance(outcome, Failed):
                raise outcome.cause
            if isinstance(outcome, Lost):  # its process, its node or what it yielded
                reason = one_line(outcome.error, 200)
                if outcome.times > MAX_LOSSES:
                    raise UserError(
                        f"part {number} of the data was lost {outcome.times} times while it was prepared, at last "
                        f"because: {reason}; see that its node has memory and disk left, and run again"
                    ) from outcome.error
                logger.warning("part %d of the data was lost and is begun again: %s", number, reason)
                pool.again(number)
                continue
            assert isinstance(outcome, Answer)
            if isinstance(outcome.value, UserError):
                raise outcome.value
            if isinstance(outcome.value, int):
                tick(number, outcome.value)
            else:
                yield number, outcome.value


def _run_part(shared: list[Any], number: int) -> Iterator[int | Commit | UserError | None]:
    try:
        yield from _job(shared[0]).run(number)
    except UserError as error:
        yield error  # raised, it would reach the driver within a traceback


@lru_cache(maxsize=1)
def _job(reference: Any) -> Job:
    """Once for each process: tokenizers of large vocabularies take a second to load."""
    import ray

    return ray.get(reference)


def _num_bytes(source: Any) -> int:
    return sum(file.num_bytes for file in source.files)
