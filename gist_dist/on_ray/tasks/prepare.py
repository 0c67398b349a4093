"""Preparing a corpus with Ray tasks: every part of every source on whichever core is free."""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import ClusterConfig, RunConfig
from gist_dist.data.corpus import Corpus, prepare, run_in_process
from gist_dist.data.formats import HubRows
from gist_dist.data.shards import Commit, Job
from gist_dist.on_ray.cluster.connect import connected

if TYPE_CHECKING:  # tasks import this module, and need no torch
    from gist_dist.models.encoder import Encoder

logger = logging.getLogger(__name__)

SMALL_BYTES = 64 * 2**20
"""Less than this is prepared by the driver in the time that a local Ray takes to start."""
MAX_LOSSES = 3
"""How often a part is begun again whose process or node was lost."""
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

    # Lost tasks are begun again here and not by Ray, which expects a task to yield the same things once more.
    # A lambda, as Ray does not see that a function which the tests' type checker has wrapped is a generator.
    remote: Any = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")
    task = remote(lambda shared, number: (yield from _run_part(shared, number)))
    shared = ray.put(job)
    waiting = list(range(len(job.parts)))[::-1]
    losses = dict.fromkeys(waiting, 0)
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max_in_flight:
                number = waiting.pop()
                running[task.remote([shared], number)] = number
            ready: list[Any] = ray.wait(list(running), num_returns=1, fetch_local=False)[0]
            for stream in ready:
                number = running[stream]
                try:
                    told: Any = ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:  # its process, its node or what it yielded is lost
                    del running[stream]
                    losses[number] += 1
                    reason = one_line(error, 200)
                    if losses[number] > MAX_LOSSES:
                        raise UserError(
                            f"part {number} of the data was lost {losses[number]} times while it was prepared, at last "
                            f"because: {reason}; see that its node has memory and disk left, and run again"
                        ) from error
                    logger.warning("part %d of the data was lost and is begun again: %s", number, reason)
                    waiting.append(number)
                    continue
                if isinstance(told, UserError):
                    raise told
                if isinstance(told, int):
                    tick(number, told)
                else:
                    yield number, told
    finally:
        for stream in running:
            ray.cancel(stream, force=True)  # a process that is only interrupted may hold locks when its next task comes


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
    return sum(
        file.dataset.data.nbytes
        if isinstance(file, HubRows)
        else max(0, file.filesystem.get_file_info(file.path).size or 0)
        for file in source.files
    )
