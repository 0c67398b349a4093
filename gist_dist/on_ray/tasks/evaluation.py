"""MTEB side by side: one Ray task for every model and MTEB task.

A task whose process is lost is started again, one that takes too long is ended, one that fails is reported while the
others go on, and what has a result already is not run again, so that starting once more runs what is left.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.files import write_atomically
from gist_dist.common.progress import Progress, progress_of
from gist_dist.common.redact import redact_text
from gist_dist.common.text import one_line, plural
from gist_dist.config import ClusterConfig, EvaluateConfig, RunConfig
from gist_dist.evaluation.evaluate import (
    Score,
    evaluate_task,
    finished_score,
    model_identity,
    read_result,
)
from gist_dist.evaluation.suites import check_evaluation, expanded, write_suites
from gist_dist.evaluation.tasks import estimated_characters
from gist_dist.models.precision import suited, this_device
from gist_dist.on_ray.cluster.capacity import gpus_per_worker
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.tasks.pool import Answer, Failed, Late, Pool
from gist_dist.report.mteb_export import Named, export_results

logger = logging.getLogger(__name__)

OnResult = Callable[[str, str, Score | str, int, int], None]
MAX_ATTEMPTS = 3
"""At a task whose process is lost."""
STREAMING: dict[str, Any] = {"max_retries": 0, "num_returns": "streaming"}
"""Attempts are counted here, not by Ray, so that each has its own time."""
LOST: dict[type[BaseException], str] = {
    OutOfMemoryError: "its process was ended because its node ran out of memory",
    NodeDiedError: "its node was lost",
    LocalRayletDiedError: "its node was lost",
    ObjectLostError: "its answer was lost with its node",
    WorkerCrashedError: "its process was killed or crashed",
}


class Model(NamedTuple):
    """What evaluate_task needs to know of a model."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    prompts: dict[str, str | None] | None = None


class Job(NamedTuple):
    label: str
    task: str


class Started(NamedTuple):
    """The first thing that a Ray task says; the second is the score."""

    process: int
    node: str


def evaluate_models(
    models: dict[str, str], config: RunConfig, folder: Path, on_result: OnResult | None = None
) -> dict[str, dict[str, str]]:
    """Evaluate models, given by label (baseline, trained, guide), on config.evaluate.tasks; Ray is running.

    Results are folder/<label>/<task>.json. Returns {label: {task: one sentence}} of what failed, also kept in
    folder/failures.json as it happens; empty if all went well. Interrupted, it ends what runs and keeps what is done.
    on_result(label, task, score or error, done, total) is called for every task that ends.
    """
    config = config.absolute_paths()
    described = {label: _as_in_recipe(label, path, config) for label, path in models.items()}
    return _evaluate_all(described, config.evaluate, config.cluster, Path(folder).absolute(), on_result)


def evaluate_one_model(
    model: str, evaluate: EvaluateConfig, folder: Path, address: str | None = None
) -> dict[str, str]:
    """Evaluate any model without a recipe, on a Ray cluster or a local Ray.

    Results are folder/<name>/<task>.json, name being the last two parts of the model's path or Hub id.
    Returns {task: one line} of what failed.
    """
    path = Path(model).expanduser()
    if not path.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"there is no model folder '{model}'; give a SentenceTransformer folder or a Hub id")
    check_evaluation(evaluate)
    path = path.absolute() if path.is_dir() else path
    label = "__".join(path.parts[-2:]).strip("/")
    cluster = ClusterConfig(address=address)
    evaluate = evaluate.model_copy(update={"precision": suited(evaluate.precision, this_device(cluster))})
    with connected(cluster):
        failures = _evaluate_all({label: Model(str(path))}, evaluate, cluster, Path(folder).absolute())
    name = "/".join(path.parts[-2:]).replace("//", "local/") if path.is_absolute() else model
    export_results(Path(folder).absolute(), {label: Named(name)}, evaluate.batch_size)
    logger.info("MTEB's result files are in %s", Path(folder).absolute() / label)
    return failures.get(label, {})


def _evaluate_all(
    models: dict[str, Model],
    evaluate: EvaluateConfig,
    cluster: ClusterConfig,
    folder: Path,
    on_result: OnResult | None = None,
) -> dict[str, dict[str, str]]:
    write_suites(evaluate, folder)
    evaluate = expanded(evaluate)
    jobs = [Job(label, task) for label in models for task in dict.fromkeys(evaluate.tasks)]
    unfinished = _longest_first(_unfinished(jobs, models, evaluate, folder), evaluate)
    done, total = len(jobs) - len(unfinished), len(jobs)
    if done:
        logger.info("%d of %d evaluations were done before", done, total)
    if unfinished:
        told = ", ".join(models), plural(len({job.task for job in unfinished}), "task")
        logger.info("evaluating %s on %s", *told, extra=phase("evaluating"))
    progress = _Evaluated(unfinished, evaluate)

    failures: dict[str, dict[str, str]] = {}
    _keep(failures, folder)
    # Closed at once if this loop is left by an exception: what runs is ended then.
    with contextlib.closing(_outcomes(unfinished, models, evaluate, cluster, folder)) as outcomes:
        for job, outcome in outcomes:
            label, task = job
            done += 1
            if isinstance(outcome, Score):
                numbers = (done, total, label, task, outcome.main_score, outcome.seconds)
                logger.info("evaluated %d/%d: %s %s %.4f in %.0f s", *numbers)
            else:
                failures.setdefault(label, {})[task] = outcome
                _keep(failures, folder)
                logger.warning("evaluation %d/%d failed: %s %s: %s", done, total, label, task, outcome)
            progress.add(job, done, total)
            if on_result:
                on_result(label, task, outcome, done, total)
    return failures


class _Evaluated:
    """How much of the evaluations is done, by the amount of text that they read; said from a tenth of it on."""

    def __init__(self, jobs: list[Job], evaluate: EvaluateConfig) -> None:
        self.characters = {job: 1 + estimated_characters(job.task, evaluate.local_tasks) for job in jobs}
        self.done = 0.0
        self.progress = Progress(sum(self.characters.values()), progress_of(logger))

    def add(self, job: Job, done: int, total: int) -> None:
        """done: so many evaluations of the total."""
        self.done += self.characters[job]
        if self.progress.total / 10 <= self.done < self.progress.total:
            self.progress.reach(self.done, f"{done} of {total} evaluations done")


def _keep(failures: dict[str, dict[str, str]], folder: Path) -> None:
    """failures.json, at once: the driver may be interrupted while other tasks still run."""
    file = folder / "failures.json"
    if failures:
        write_atomically(file, lambda aside: aside.write_text(json.dumps(failures, indent=2)))
    else:
        file.unlink(missing_ok=True)


def _as_in_recipe(label: str, path: str, config: RunConfig) -> Model:
    """The trained model is a folder of ours with its prompts inside; the others are as the recipe says."""
    section = config.guide if label == "guide" and config.guide else config.student
    if label == "trained":
        return Model(path, trust_remote_code=section.trust_remote_code)
    prompts = section.prompts if label == "guide" else config.prompts_to_keep
    given = {"query": prompts.anchor, "document": prompts.positive}
    return Model(path, section.revision, section.trust_remote_code, given)


def _unfinished(jobs: list[Job], models: dict[str, Model], evaluate: EvaluateConfig, folder: Path) -> list[Job]:
    identity = {label: model_identity(m.path, m.revision, m.prompts) for label, m in models.items()}
    return [j for j in jobs if not finished_score(folder / j.label, j.task, evaluate, identity[j.label])]


def _longest_first(jobs: list[Job], evaluate: EvaluateConfig) -> list[Job]:
    length = {task: estimated_characters(task, evaluate.local_tasks) for task in {job.task for job in jobs}}
    return sorted(jobs, key=lambda job: -length[job.task])


def _outcomes(
    jobs: list[Job], models: dict[str, Model], evaluate: EvaluateConfig, cluster: ClusterConfig, folder: Path
) -> Generator[tuple[Job, Score | str], None, None]:
    """Each job with its score or why it failed, as they end. Whatever still runs when the caller stops is killed."""
    options: dict[str, Any] = STREAMING | resources_of_a_task(cluster)
    remote = ray.remote(**options)(evaluate_on_ray)

    def start(job: Job) -> Any:
        return remote.remote(models[job.label], job.task, evaluate, folder / job.label)

    with Pool(start, jobs) as pool:
        yield from outcomes(pool, evaluate)


def outcomes(pool: "Pool[Job]", evaluate: EvaluateConfig) -> Generator[tuple[Job, Any], None, None]:
    """Each job with what its task has found or why it failed, as they end; a lost one is started again."""
    for job, outcome in pool.outcomes():
        if isinstance(outcome, Answer) and isinstance(outcome.value, Started):
            logger.debug("%s %s runs in process %d on %s", *job, *outcome.value)
            if evaluate.task_timeout_minutes:
                pool.limit(job, 60 * evaluate.task_timeout_minutes)
        elif isinstance(outcome, Answer):
            pool.finish(job)
            yield job, outcome.value
        elif isinstance(outcome, Late):
            minutes = f"evaluate.task_timeout_minutes = {evaluate.task_timeout_minutes:g}"
            yield job, f"it was not done after {minutes} and was ended; raise it or set null"
        elif isinstance(outcome, Failed):
            yield job, _told(outcome.cause)
        elif (reason := _reason(outcome.error)) is None:
            yield job, _told(outcome.error)
        elif outcome.times < MAX_ATTEMPTS:
            logger.warning("%s %s: %s; it is started again", *job, reason)
            pool.again(job)
        else:
            remedy = f"if memory ran out, lower evaluate.batch_size = {evaluate.batch_size}"
            yield job, f"{reason}, {MAX_ATTEMPTS} times in a row; {remedy}"


def _reason(error: RayError) -> str | None:
    """Why a task's process is gone; None for other errors of Ray, which would come again."""
    return next((reason for kind, reason in LOST.items() if isinstance(error, kind)), None)


def _told(error: Exception) -> str:
    return one_line(redact_text(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"))


def resources_of_a_task(cluster: ClusterConfig) -> dict[str, float]:
    """What a task reserves: a training worker's share, or all of the largest node where none has as many cores."""
    cpus, total = cluster.cpus_per_worker or 1, ray.cluster_resources()
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    gpus = gpus_per_worker(cluster, total) if total.get("GPU") else 0.0
    return {"num_cpus": float(min(cpus, largest) or cpus), "num_gpus": gpus}


@no_type_check  # checked, it would be wrapped under pytest, and Ray streams from plain generator functions only
def evaluate_on_ray(model: Model, task: str, evaluate: EvaluateConfig, folder: Path) -> Iterator[Started | Score]:
    # Ray ends a worker process after a task that held a GPU and uses it again after one that held none, which
    # saves the imports.
    yield Started(os.getpid(), ray.util.get_node_ip_address())
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    yield read_result(evaluate_task(model.path, task, evaluate, folder, model.prompts, **options))
