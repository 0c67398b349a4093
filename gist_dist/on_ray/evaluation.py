"""MTEB side by side: one Ray task for every model and MTEB task.

A lost worker is retried, a failing task reported while the others go on, and what has a result already is not
run again, so that starting once more runs what is left.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from gist_dist.config import ClusterConfig, EvaluateConfig, RunConfig
from gist_dist.errors import UserError
from gist_dist.evaluation import (
    Score,
    check_tasks,
    estimated_characters,
    evaluate_task,
    finished_score,
    model_identity,
    read_result,
)
from gist_dist.evaluation_sets import one_line
from gist_dist.files import write_atomically
from gist_dist.on_ray.cluster import connected, gpus_per_worker

logger = logging.getLogger(__name__)

OnResult = Callable[[str, str, Score | str, int, int], None]


class Model(NamedTuple):
    """What evaluate_task needs to know of a model."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    prompts: dict[str, str] | None = None


class Job(NamedTuple):
    label: str
    task: str


def evaluate_models(
    models: dict[str, str], config: RunConfig, folder: Path, on_result: OnResult | None = None
) -> dict[str, dict[str, str]]:
    """Evaluate models, given by label (baseline, trained, guide), on config.evaluate.tasks; Ray is running.

    Results are folder/<label>/<task>.json. Returns {label: {task: one line}} of what failed, also kept in
    folder/failures.json; empty if all went well. on_result(label, task, score or error, done, total) is
    called for every task that ends.
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
    check_tasks(evaluate)
    path = path.absolute() if path.is_dir() else path
    label = "__".join(path.parts[-2:]).strip("/")
    cluster = ClusterConfig(address=address)
    with connected(cluster):
        failures = _evaluate_all({label: Model(str(path))}, evaluate, cluster, Path(folder).absolute())
    logger.info("MTEB's result files are in %s", Path(folder).absolute() / label)
    return failures.get(label, {})


def _evaluate_all(
    models: dict[str, Model],
    evaluate: EvaluateConfig,
    cluster: ClusterConfig,
    folder: Path,
    on_result: OnResult | None = None,
) -> dict[str, dict[str, str]]:
    jobs = [Job(label, task) for label in models for task in dict.fromkeys(evaluate.tasks)]
    unfinished = _longest_first(_unfinished(jobs, models, evaluate, folder), evaluate)
    running = _start(unfinished, models, evaluate, cluster, folder)
    done, total = len(jobs) - len(running), len(jobs)
    if done:
        logger.info("%d of %d evaluations were done before", done, total)

    failures: dict[str, dict[str, str]] = {}
    try:
        while running:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            label, task = running.pop(finished)
            done += 1
            outcome = _outcome(finished)
            if isinstance(outcome, Score):
                numbers = (done, total, label, task, outcome.main_score, outcome.seconds)
                logger.info("evaluated %d/%d: %s %s %.4f in %.0f s", *numbers)
            else:
                failures.setdefault(label, {})[task] = outcome
                logger.warning("evaluation %d/%d failed: %s %s: %s", done, total, label, task, outcome)
            if on_result:
                on_result(label, task, outcome, done, total)
    finally:
        for reference in running:
            ray.cancel(reference)

    file = folder / "failures.json"
    if failures:
        write_atomically(file, lambda aside: aside.write_text(json.dumps(failures, indent=2)))
    else:
        file.unlink(missing_ok=True)
    return failures


def _as_in_recipe(label: str, path: str, config: RunConfig) -> Model:
    """The trained model is a folder of ours with its prompts inside; the others are as the recipe says."""
    section = config.guide if label == "guide" and config.guide else config.student
    if label == "trained":
        return Model(path, trust_remote_code=section.trust_remote_code)
    prompts = {"query": section.prompts.anchor, "document": section.prompts.positive}
    wanted = prompts if any(prompts.values()) else None
    return Model(path, section.revision, section.trust_remote_code, wanted)


def _unfinished(jobs: list[Job], models: dict[str, Model], evaluate: EvaluateConfig, folder: Path) -> list[Job]:
    identity = {label: model_identity(m.path, m.revision, m.prompts) for label, m in models.items()}
    return [j for j in jobs if not finished_score(folder / j.label, j.task, evaluate, identity[j.label])]


def _longest_first(jobs: list[Job], evaluate: EvaluateConfig) -> list[Job]:
    length = {task: estimated_characters(task, evaluate.local_tasks) for task in {job.task for job in jobs}}
    return sorted(jobs, key=lambda job: -length[job.task])


def _start(
    jobs: list[Job], models: dict[str, Model], evaluate: EvaluateConfig, cluster: ClusterConfig, folder: Path
) -> dict[ray.ObjectRef, Job]:
    # Ray ends a worker process after a task that held a GPU and uses it again after one that held none, which
    # saves the imports.
    resources = ray.cluster_resources()
    gpus = gpus_per_worker(cluster, resources) if resources.get("GPU") else 0.0
    remote = ray.remote(max_retries=2, num_cpus=cluster.cpus_per_worker or 1, num_gpus=gpus)(_evaluate)
    return {remote.remote(models[job.label], job.task, evaluate, folder / job.label): job for job in jobs}


def _evaluate(model: Model, task: str, evaluate: EvaluateConfig, folder: Path) -> Score:
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return read_result(evaluate_task(model.path, task, evaluate, folder, model.prompts, **options))


def _outcome(finished: Any) -> Score | str:
    try:
        return ray.get(finished)
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        return one_line(cause if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}")
