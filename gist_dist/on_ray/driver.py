"""`gist-dist train`: check, prepare, train on Ray, evaluate on the freed workers, report."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler
from gist_dist.encoder import Guide, Student
from gist_dist.errors import UserError
from gist_dist.evaluation import check_tasks
from gist_dist.guide_cache import guide_fingerprint
from gist_dist.model_card import write_model_card
from gist_dist.on_ray.cluster import address_of, check_resources, connected, cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.evaluation import evaluate_models
from gist_dist.on_ray.precompute import precompute
from gist_dist.on_ray.prepare import prepare_on_ray
from gist_dist.on_ray.triplets import resolve_classification
from gist_dist.on_ray.worker import FAILURE_NAME, LOG_NAME, train_worker
from gist_dist.report import Summary, build_report
from gist_dist.run_folder import RunFolder

logger = logging.getLogger(__name__)


def train_and_evaluate(config: RunConfig) -> Summary:
    """The whole run; called again with the same recipe it does only what is left.

    Every check comes before Ray is started. Raises UserError.
    """
    config = config.absolute_paths()
    run = RunFolder(config)
    run.refuse_other_recipe()
    check_tasks(config.evaluate)
    _check_tracking(config)
    trained = run.is_trained()
    prepared = None if trained else prepare_run(config, run)
    if trained and not config.evaluate.tasks:
        logger.info("%s is trained; nothing is left to do but the report", run.folder)
    else:
        with connected(config.cluster) as resources:
            if prepared:
                check_resources(config.cluster, resources)
                if config.guide and config.guide.mode == "cache":
                    logger.info("\n".join(precompute(config, prepared.corpus, prepared.guide).lines()))
                _fit(config, prepared, run, resources)
                run.mark_trained()
            if config.evaluate.tasks:
                evaluate_models(_models(config, run), config, run.folder / "mteb")
    run.mark_finished()
    write_model_card(run.folder)
    return build_report(run.folder)


def _check_tracking(config: RunConfig) -> None:
    if config.tracking.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "tracking.tensorboard = true: install it with `pip install 'gist-dist[tensorboard]'`, or set false"
        )


class Prepared(NamedTuple):
    """What a run is made of, loaded once on the CPU of the driver: to check it, and for its tokenizers."""

    student: Student
    guide: Guide | None
    corpus: Corpus


def prepare(config: RunConfig) -> Prepared:
    """UserError for models or data that can't be had."""
    logger.info("loading models and preparing data")
    student = Student(config.student)
    guide = Guide(config.guide_or_student) if config.has_guide_model else None
    _check_refresh(config, student, guide)
    return Prepared(student, guide, prepare_on_ray(resolve_classification(config, student, guide), student, guide))


def _check_refresh(config: RunConfig, student: Student, guide: Guide | None) -> None:
    """A refreshed guide is the student, which reads the token ids that were prepared for the guide."""
    if guide is None or config.guide.refresh is None:
        return
    ours, its = config.student.prompts, config.guide_or_student.prompts
    same_prompts = all((s.prompts.student or ours) == (s.prompts.guide or its) for s in config.data.sources)
    if guide.fingerprint() != student.fingerprint() or not same_prompts:
        raise UserError(
            f"guide.refresh = {config.guide.refresh}: the guide becomes a copy of the student, so both need the same "
            "tokenizer, max_tokens and prompts; leave out guide.model to start from the student"
        )


def precompute_only(config: RunConfig) -> list[str]:
    """`gist-dist precompute`: the guide's embeddings of the whole corpus; lines that say what was done."""
    config = config.absolute_paths()
    if not config.has_guide_model:
        raise UserError("guide: there is no guide model whose embeddings could be kept; set guide.model")
    prepared = prepare(config)
    return precompute(config, prepared.corpus, prepared.guide).lines()


def prepare_run(config: RunConfig, run: RunFolder) -> Prepared:
    """Prepare, check that batches can be drawn, and only then take the run's folder."""
    prepared = prepare(config)
    corpus = prepared.corpus
    sampler = Sampler(corpus, config)
    run.create(config)  # not before: a mistake in the recipe's data can then be mended under the same name
    run.write_data_summary(corpus, sampler)
    logger.info(
        "%s rows with %s distinct texts; %d steps of %d rows (%.2f epochs)",
        f"{corpus.num_rows:,}",
        f"{corpus.num_texts:,}",
        sampler.num_steps,
        config.batch.global_size,
        sampler.num_steps / sampler.steps_per_epoch,
    )
    return prepared


def _models(config: RunConfig, run: RunFolder) -> dict[str, str]:
    models = {"trained": str(run.folder / "model")}
    if config.evaluate.baseline:
        models["baseline"] = config.student.model
    if config.evaluate.guide and config.guide and config.guide.model:
        models["guide"] = config.guide.model
    return models


def _fit(config: RunConfig, prepared: Prepared, run: RunFolder, resources: dict[str, float]) -> None:
    """Ray Train's worker group, restarted as often as cluster.max_failures says after lost workers."""
    import ray.train
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    cluster = config.cluster
    cpus, gpus = cpus_per_worker(cluster, resources), gpus_per_worker(cluster, resources)
    failure = run.folder / FAILURE_NAME
    failure.unlink(missing_ok=True)
    logger.info("starting %d worker%s on Ray", cluster.num_workers, "s" * (cluster.num_workers > 1))
    trainer = _trainer_class(local=address_of(cluster) is None)(
        train_worker,
        train_loop_config={
            "recipe": config.model_dump(mode="json"),
            "corpus": prepared.corpus.place,
            "guide_cache": _cache_of(config, prepared.guide),
            "use_gpu": gpus > 0,
            "threads": max(1, int(cpus)),
        },
        torch_config=TorchConfig(backend="nccl" if gpus > 0 else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"fit-{int(time.time())}",
            storage_path=str(run.folder / ".ray"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=3),
            worker_runtime_env=cluster.runtime_env or None,
        ),
    )
    log = run.folder / "logs" / LOG_NAME
    log.parent.mkdir(exist_ok=True)
    try:
        with _following(log):
            trainer.fit()
    except TrainingFailedError as error:
        raise UserError(_explain(error, log)) from error
    finally:
        shutil.rmtree(run.folder / ".ray", ignore_errors=True)
    if failure.exists():
        raise UserError(json.loads(failure.read_text())["error"])


def _cache_of(config: RunConfig, guide: Guide | None) -> dict[str, Any] | None:
    """Which guide's cache the workers open."""
    if guide is None or config.guide.mode != "cache":
        return None
    return {"fingerprint": guide_fingerprint(guide), "width": guide.width}


def _trainer_class(local: bool) -> Any:
    """TorchTrainer; on a local Ray without the placement group cleaner.

    The cleaner asks the machine's first dashboard whether the controller lives. If that is another Ray's, it knows
    nothing of ours, and the live placement group is removed (Ray 2.60). The method is private: without it, all stays.
    """
    from ray.train.torch import TorchTrainer

    if not local or not hasattr(TorchTrainer, "_create_default_callbacks"):
        return TorchTrainer

    class LocalTorchTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTorchTrainer


def _explain(error: Exception, log: Path) -> str:
    """The last line of the first failed worker's traceback; the whole of it goes to the log."""
    failures = getattr(error, "worker_failures", {})
    text = str(next(iter(failures.values()), error)).strip() or type(error).__name__
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{error}\n")
    return f"training stopped: {text.splitlines()[-1]} (all of it in {log})"


@contextmanager
def _following(log: Path) -> Iterator[None]:
    """Repeat what rank 0 writes to its log, while the block runs."""
    ended = threading.Event()
    start = log.stat().st_size if log.exists() else 0
    follower = threading.Thread(target=_follow, args=(log, start, ended), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join(timeout=5)


def _follow(log: Path, position: int, ended: threading.Event) -> None:
    while True:
        last_look = ended.wait(0.5)
        if log.exists():
            with open(log, encoding="utf-8") as file:
                file.seek(position)
                while (line := file.readline()).endswith("\n"):
                    position = file.tell()
                    logger.info("%s", line.rstrip("\n"))
        if last_look:
            return
