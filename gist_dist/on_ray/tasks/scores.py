"""Scores of a run while it trains: a thread of the driver gives every step's model to Ray tasks.

On resources that training leaves, where one evaluation fits there; else on those of the workers, which then wait until
a step is scored. A process of its own either way, so that no evaluation ends a training.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, no_type_check

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import HELD_OUT, ClusterConfig, RunConfig
from gist_dist.evaluation.evaluate import Score
from gist_dist.on_ray.cluster.capacity import cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.tasks.evaluation import (
    STREAMING,
    Job,
    Model,
    Started,
    evaluate_on_ray,
    outcomes,
    resources_of_a_task,
)
from gist_dist.on_ray.tasks.pool import Pool
from gist_dist.on_ray.train.worker import RunInputs, open_guide
from gist_dist.runs.evaluations import (
    LOSS,
    Evaluation,
    Verdict,
    folder_of,
    model_of,
    read_evaluations,
    remove_models,
    unscored,
    verdict_so_far,
    write_evaluation,
)

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.3


class Share:
    """What evaluation has of the cluster while training runs."""

    def __init__(self, cluster: ClusterConfig, resources: dict[str, float]) -> None:
        """resources: of the cluster."""
        needs = resources_of_a_task(cluster)
        wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"]}
        taken = {"CPU": cpus_per_worker(cluster, resources), "GPU": gpus_per_worker(cluster, resources)}
        spare = {kind: resources.get(kind, 0.0) - cluster.max_workers * taken[kind] for kind in wanted}
        fit = int(min(spare[kind] / each + 1e-9 for kind, each in wanted.items() if each))
        self.waits = fit < 1
        """Whether the workers wait."""
        self.most = max(1, cluster.max_workers if self.waits else fit)
        """Evaluations at once."""
        self.threads = max(1, int(taken["CPU"])) if self.waits else None
        self._needs = needs
        self._places = cycle(_devices(taken["GPU"] > 0)) if self.waits else None

    def options(self) -> tuple[dict[str, Any], str | None]:
        """Options of ray.remote for the next task, and the GPU that it shall see if Ray gives it none."""
        if self._places is None:
            return self._needs, None
        node, gpu = next(self._places)
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}, gpu


def _devices(gpus: bool) -> list[tuple[str, str | None]]:
    """Node and, where training has GPUs, one of them; of all nodes that have what training takes."""
    nodes = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if gpus:
        return [(node, str(gpu)) for node, has in nodes for gpu in range(int(has.get("GPU", 0)))]
    return [(node, None) for node, has in nodes if has.get("CPU", 0)]


class ScoresWhileTraining:
    """Scores what the workers keep to be scored, while its block lasts; left by an error, it ends what runs."""

    def __init__(
        self, config: RunConfig, inputs: RunInputs, resources: dict[str, float], on_stop: Callable[[], None]
    ) -> None:
        """on_stop: called once, to have training end: when evaluate.stop_after says so, or when workers would wait for
        scores that never come."""
        self.config, self.inputs, self.run_dir = config, inputs, config.run_dir
        self.share = Share(config.cluster, resources)
        self.on_stop, self.is_ending = on_stop, threading.Event()
        self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
        self.stopped_after: int | None = None
        """The step after which scores have ended training."""
        self.error: UserError | None = None
        """What ended the evaluation, if something did."""

    def __enter__(self) -> "ScoresWhileTraining":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.is_ending.set()
        self._thread.join(timeout=10)

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait, once training has ended, until all is scored. check() is called several times a second, and may raise.
        UserError for what evaluation itself raised."""
        while self._thread.is_alive() and unscored(self.run_dir) and self.stopped_after is None:
            check()
            time.sleep(LOOK_SECONDS)
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            self._judge()
            while self.stopped_after is None and not self.is_ending.wait(LOOK_SECONDS):
                for step in unscored(self.run_dir)[:1]:
                    self._score(step)
                    self._judge()
        except Exception as error:
            self.error = UserError(f"evaluation while it trains ended with {type(error).__name__}: {one_line(error)}")
            self.error.__cause__ = error
            if not self.is_ending.is_set():
                goes_on = "training stops, as it waits for the scores" if self.share.waits else "training goes on"
                logger.warning("%s; %s", self.error, goes_on)
            if self.share.waits:
                self.on_stop()

    def _judge(self) -> None:
        found, verdict = read_evaluations(self.run_dir), verdict_so_far(self.run_dir, self.config.evaluate)
        newest = found[-1].step if found else None
        remove_models(self.run_dir, keep={verdict.best, newest if self.config.evaluate.keep_best else None})
        if verdict.stop is not None and self.stopped_after is None:
            self.stopped_after = verdict.stop
            self.on_stop()

    def _score(self, step: int) -> None:
        config, began = self.config, time.monotonic()
        tasks = [*config.watched, *[LOSS] * (HELD_OUT in config.watched)]
        jobs = [Job(folder_of(self.run_dir, step).name, task) for task in tasks]
        scores, failed, loss = dict[str, float](), dict[str, str](), None
        with Pool(lambda job: self._start(step, job), jobs, self.share.most, is_unwanted=self.is_ending.is_set) as pool:
            for job, outcome in outcomes(pool, config.evaluate):
                if isinstance(outcome, Score):
                    scores[job.task] = outcome.main_score
                elif isinstance(outcome, float):
                    loss = outcome
                else:
                    failed[job.task] = outcome
                    logger.warning("after step %d: %s: %s", step, job.task, outcome)
        if self.is_ending.is_set():
            return  # results are kept, and the same command does the rest
        in_order = {task: scores[task] for task in config.watched if task in scores}
        evaluation = Evaluation(step, in_order, loss, round(time.monotonic() - began, 2), failed)
        write_evaluation(self.run_dir, evaluation)
        logger.info("%s", told(evaluation, verdict_so_far(self.run_dir, config.evaluate)))

    def _start(self, step: int, job: Job) -> Any:
        options, gpu = self.share.options()
        model, folder = model_of(self.run_dir, step), folder_of(self.run_dir, step)
        place = (gpu, self.share.threads)
        if job.task == LOSS:
            remote = ray.remote(**STREAMING, **options)(_loss_on_ray)
            return remote.remote(place, self.config.model_dump(mode="json"), self.inputs, model)
        trusted = self.config.student.trust_remote_code
        evaluate = self.config.evaluate
        if job.task == HELD_OUT:
            evaluate = evaluate.model_copy(update={"local_tasks": str(self.run_dir)})
        remote = ray.remote(**STREAMING, **options)(_score_on_ray)
        return remote.remote(place, Model(str(model), trust_remote_code=trusted), job.task, evaluate, folder)


def told(evaluation: Evaluation, verdict: Verdict) -> str:
    """after step 100: mean 45.21, held_out 51.30, loss 2.31 (best so far after step 80)."""
    mean = evaluation.value("mean")
    parts = [f"mean {mean:.2f}"] if mean is not None and len(evaluation.scores) > 1 else []
    parts += [f"{task} {100 * score:.2f}" for task, score in list(evaluation.scores.items())[:4]]
    parts += [f"held-out loss {evaluation.loss:.4f}"] if evaluation.loss is not None else []
    parts += [f"{len(evaluation.failed)} failed"] if evaluation.failed else []
    text = f"after step {evaluation.step}: {', '.join(parts)}"
    if verdict.best is None:
        return text
    return f"{text} ({'the best so far' if verdict.best == evaluation.step else f'best after step {verdict.best}'})"


def _take(place: tuple[str | None, int | None]) -> None:
    """A GPU and cores that Ray has not given this task: they are those of a worker, which waits."""
    import os

    gpu, threads = place
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@no_type_check
def _score_on_ray(place, model, task, evaluate, folder) -> Iterator[Started | Score]:
    _take(place)
    yield from evaluate_on_ray(model, task, evaluate, folder)


@no_type_check
def _loss_on_ray(place, recipe, inputs, model) -> Iterator[Started | float]:
    import os

    yield Started(os.getpid(), ray.util.get_node_ip_address())
    _take(place)
    import torch

    from gist_dist.data.corpus import open_corpus
    from gist_dist.recipe import parse_config
    from gist_dist.training.held_out_loss import held_out_loss

    config = parse_config(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = open_corpus(config, inputs.corpus)
    yield held_out_loss(config, corpus, Path(model), open_guide(config, inputs, device), device)
