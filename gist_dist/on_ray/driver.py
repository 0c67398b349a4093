"""`gist-dist train`: check, prepare, train on Ray, evaluate on the freed workers, report."""

import logging
from pathlib import Path
from typing import NamedTuple

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.signals import stop_requests
from gist_dist.config import RunConfig
from gist_dist.data.corpus import PREPARING, Corpus
from gist_dist.data.row_rules import check_negatives
from gist_dist.data.sampler import Sampler
from gist_dist.data.statistics import data_summary
from gist_dist.evaluation.evaluate import read_results
from gist_dist.evaluation.tasks import check_tasks
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import embedding_fingerprint
from gist_dist.on_ray.cluster.capacity import check_resources
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.tasks.clusters import cluster_on_ray
from gist_dist.on_ray.tasks.evaluation import evaluate_models
from gist_dist.on_ray.tasks.mine import mine_for_training
from gist_dist.on_ray.tasks.precompute import precompute
from gist_dist.on_ray.tasks.prepare import prepare_on_ray
from gist_dist.on_ray.tasks.triplets import resolve_classification
from gist_dist.on_ray.train.fit import fit
from gist_dist.on_ray.train.worker import RunInputs
from gist_dist.planning.outline import outline
from gist_dist.report import Summary, build_report
from gist_dist.report.model_card import write_model_card
from gist_dist.report.mteb_export import export_run
from gist_dist.report.publish import check_hub, push_model
from gist_dist.runs.folder import RunFolder
from gist_dist.runs.lock import RunLock, locked
from gist_dist.training.trackers import check_trackers, track_scores

logger = logging.getLogger(__name__)


def train_and_evaluate(config: RunConfig) -> Summary:
    """The whole run; called again with the same recipe it does only what is left.

    Every check comes before Ray is started. Raises UserError, and Stopped once training has stopped as it was asked to.
    """
    config = config.absolute_paths()
    run = RunFolder(config)
    run.refuse_other_recipe()
    check_tasks(config.evaluate)
    check_trackers(config)
    check_hub(config.tracking.hub)
    with locked(run.folder) as lock:
        return _train_and_evaluate(config, run, lock)


class Stopped(Exception):
    """Training stopped as it was asked to, with a checkpoint."""


def _train_and_evaluate(config: RunConfig, run: RunFolder, lock: RunLock) -> Summary:
    trained = run.is_trained()
    prepared = None if trained else prepare_run(config, run)
    if trained and not config.evaluate.tasks:
        logger.info("%s is trained; nothing is left to do but the report", run.folder)
    else:
        with connected(config.cluster) as resources:
            if prepared:
                check_resources(config.cluster, resources)
                if config.guide_mode == "cache" and prepared.guide:
                    logger.info("\n".join(precompute(config, prepared.corpus, prepared.guide).lines()))
                mined = None
                if config.data.mine and prepared.guide:
                    _, mined = mine_for_training(config, prepared.corpus, prepared.guide, resources)
                inputs = _inputs(config, prepared, mined, lock.token)
                with stop_requests() as requests:
                    outcome = fit(config, inputs, resources, requests, lock.check)
                if outcome == "stopped":
                    raise Stopped(f"stopped with a checkpoint, {run.folder}")
                run.mark_trained()
                if requests.requested:
                    raise Stopped(f"trained, and stopped before evaluation and report, {run.folder}")
            if config.evaluate.tasks:
                labels = _models(config, run)
                evaluate_models(labels, config, run.folder / "mteb")
                track_scores(config, {label: _scores(run.folder / "mteb" / label) for label in labels})
    run.mark_finished()
    write_model_card(run.folder)
    push_model(config, run.folder)
    export_run(config, run.folder)
    return build_report(run.folder)


class Prepared(NamedTuple):
    """What a run is made of, loaded once on the CPU of the driver: to check it, and for its tokenizers."""

    student: Student
    guide: Guide | None
    corpus: Corpus


def prepare(config: RunConfig, clustered: bool = True) -> Prepared:
    """UserError for models or data that can't be loaded. clustered: with the clusters that data.mixing asks for, for
    which the guide encodes all texts."""
    logger.info("loading models and preparing data", extra=phase(PREPARING))
    student = Student(config.student)
    guide = Guide(config.guide_or_student) if config.has_guide_model else None
    _check_refresh(config, student, guide)
    corpus = prepare_on_ray(resolve_classification(config, student, guide), student, guide)
    check_negatives(config, corpus)
    if clustered and config.data.mixing == "clustered" and guide is not None:
        Sampler(corpus, config)  # what can't be batched is said before the guide encodes all texts
        precompute(config, corpus, guide)
        corpus.clusters = cluster_on_ray(config, corpus, guide)
    return Prepared(student, guide, corpus)


def _check_refresh(config: RunConfig, student: Student, guide: Guide | None) -> None:
    """A refreshed guide is the student, which reads the token ids that were prepared for the guide."""
    if guide is None or config.guide_refresh is None:
        return
    both = [(s.prompts.student, s.prompts.guide) for s in config.data.sources]
    same_prompts = all(student.prompts_with(ours) == guide.prompts_with(its) for ours, its in both)
    if guide.tokenizer_fingerprint() != student.tokenizer_fingerprint() or not same_prompts:
        raise UserError(
            f"guide.refresh = {config.guide_refresh}: the guide becomes a copy of the student, so both need the same "
            "tokenizer, max_tokens and prompts; leave out guide.model to start from the student"
        )


def precompute_only(config: RunConfig) -> list[str]:
    """`gist-dist precompute`: the guide's embeddings of the whole corpus; lines that say what was done."""
    config = config.absolute_paths()
    if not config.has_guide_model:
        raise UserError("guide: there is no guide model whose embeddings could be kept; set guide.model")
    prepared = prepare(config)
    assert prepared.guide is not None
    return precompute(config, prepared.corpus, prepared.guide).lines()


def prepare_run(config: RunConfig, run: RunFolder) -> Prepared:
    """Prepare, check that batches can be drawn, and only then take the run's folder."""
    prepared = prepare(config)
    corpus = prepared.corpus
    sampler = Sampler(corpus, config)
    run.create(config)  # not before: a mistake in the recipe's data can then be fixed under the same name
    run.write_data_summary(data_summary(corpus, sampler))
    logger.info("%s", "\n".join(outline(config, prepared.student, prepared.guide, corpus, sampler)))
    return prepared


def _scores(folder: Path) -> dict[str, float]:
    return {task: score.main_score for task, score in read_results(folder).items()}


def _models(config: RunConfig, run: RunFolder) -> dict[str, str]:
    models = {"trained": str(run.folder / "model")}
    if config.evaluate.baseline:
        models["baseline"] = config.student.model
    if config.evaluate.guide and config.guide and config.guide.model:
        models["guide"] = config.guide.model
    return models


def _inputs(config: RunConfig, prepared: Prepared, mined: str | None, lock: str) -> RunInputs:
    """mined: the kept array of data.mine. The guide's cache is named where workers read it in place of the model."""
    corpus, guide = prepared.corpus, prepared.guide if config.guide_mode == "cache" else None
    return RunInputs(
        corpus=corpus.place,
        lock=lock,
        clusters=corpus.clusters.name if corpus.clusters else None,
        mined=mined,
        guide_fingerprint=embedding_fingerprint(guide) if guide else None,
        guide_width=guide.width if guide else 0,
    )
