"""`gist-dist train`: check, prepare, train on Ray, evaluate on the freed workers, report."""

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.signals import StopRequests, stop_requests
from gist_dist.common.text import plural
from gist_dist.config import HELD_OUT, RunConfig
from gist_dist.data.corpus import PREPARING, Corpus
from gist_dist.data.held_out import write_evaluation_set
from gist_dist.data.row_rules import check_negatives
from gist_dist.data.sampler import Sampler
from gist_dist.data.statistics import data_summary
from gist_dist.evaluation.evaluate import read_results
from gist_dist.evaluation.suites import check_evaluation, with_suites
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import embedding_fingerprint
from gist_dist.models.precision import settled
from gist_dist.on_ray.cluster.capacity import check_resources
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.tasks.clusters import cluster_on_ray
from gist_dist.on_ray.tasks.evaluation import evaluate_models
from gist_dist.on_ray.tasks.mine import mine_for_training
from gist_dist.on_ray.tasks.precompute import precompute
from gist_dist.on_ray.tasks.prepare import prepare_on_ray
from gist_dist.on_ray.tasks.scores import ScoresWhileTraining
from gist_dist.on_ray.tasks.triplets import resolve_classification
from gist_dist.on_ray.train.fit import fit
from gist_dist.on_ray.train.messages import STOP, post, withdraw
from gist_dist.on_ray.train.worker import RunInputs
from gist_dist.planning.outline import outline
from gist_dist.report import Summary, build_report
from gist_dist.report.model_card import write_model_card
from gist_dist.report.mteb_export import export_run
from gist_dist.report.publish import check_hub, push_model
from gist_dist.runs.evaluations import adopt_best, read_evaluations, remove_all_models, verdict_so_far
from gist_dist.runs.folder import RunFolder
from gist_dist.runs.lock import RunLock, locked
from gist_dist.runs.metrics_file import METRICS, add_evaluations
from gist_dist.training.snapshots import evaluation_steps
from gist_dist.training.trackers import check_trackers, track_evaluations, track_scores

logger = logging.getLogger(__name__)


def train_and_evaluate(config: RunConfig) -> Summary:
    """The whole run; called again with the same recipe it does only what is left.

    Every check comes before Ray is started. Raises UserError, and Stopped once training has stopped as it was asked to.
    """
    config = config.absolute_paths()
    RunFolder(config).refuse_other_recipe()
    check_evaluation(config.evaluate, config.watched)
    config = with_suites(settled(config, RunFolder(config).recorded()))
    run = RunFolder(config)
    check_trackers(config)
    check_hub(config.tracking.hub)
    with locked(run.folder) as lock:
        return _train_and_evaluate(config, run, lock)


class Stopped(Exception):
    """Training stopped as it was asked to, with a checkpoint."""


def _train_and_evaluate(config: RunConfig, run: RunFolder, lock: RunLock) -> Summary:
    trained = run.is_trained()
    prepared, num_steps = (None, 0) if trained else prepare_run(config, run)
    if trained and not config.evaluate.is_wanted:
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
                _train(config, run, inputs, resources, lock, num_steps)
            if config.evaluate.is_wanted:
                labels = _models(config, run)
                evaluate_models(labels, config, run.folder / "mteb")
                track_scores(config, {label: _scores(run.folder / "mteb" / label) for label in labels})
    run.mark_finished()
    write_model_card(run.folder)
    push_model(config, run.folder)
    export_run(config, run.folder)
    return build_report(run.folder)


def _train(
    config: RunConfig, run: RunFolder, inputs: RunInputs, resources: dict[str, float], lock: RunLock, num_steps: int
) -> None:
    """To the last step, or the one after which scores no longer rise; scored meanwhile, where the recipe says so.

    Stopped where it was asked to stop. What is done stays done, and the next call does the rest.
    """
    with stop_requests() as requests:
        if verdict_so_far(run.folder, config.evaluate).stop is None:  # else an earlier command got so far
            _train_and_score(config, run, inputs, resources, lock, requests)
        last = _adopt_best(config, run, num_steps)
        run.mark_trained(last)
        if requests.requested:
            raise Stopped(f"trained, and stopped before evaluation and report, {run.folder}")


def _train_and_score(
    config: RunConfig,
    run: RunFolder,
    inputs: RunInputs,
    resources: dict[str, float],
    lock: RunLock,
    requests: StopRequests,
) -> None:
    """Until training has ended and all steps that were kept for it are scored. Stopped where that was asked for."""
    stopped = Stopped(f"stopped with a checkpoint, {run.folder}")
    if not config.watched:
        if fit(config, inputs, resources, requests, lock.check) == "stopped":
            raise stopped
        return

    def check() -> None:
        lock.check()
        if requests.requested:
            raise Stopped(f"trained, and stopped before all steps were scored, {run.folder}")

    end_early = partial(post, run.folder, STOP)
    with ScoresWhileTraining(config, inputs, resources, end_early) as scores:
        outcome = fit(config, inputs, resources, requests, lock.check, scores.share.waits)
        if outcome == "stopped" and scores.stopped_after is None:
            raise scores.error or stopped
        scores.finish(check)
    withdraw(run.folder, STOP)  # of scores that ended the run when it had ended anyway


def _adopt_best(config: RunConfig, run: RunFolder, num_steps: int) -> int:
    """The run's model is that of the step with the best scores, where the recipe says so; gives the last step."""
    evaluations, verdict = read_evaluations(run.folder), verdict_so_far(run.folder, config.evaluate)
    last = num_steps if verdict.stop is None else verdict.stop
    adopt_best(run.folder, verdict, last)
    remove_all_models(run.folder)
    untold = add_evaluations(run.folder / METRICS, [evaluation.line() for evaluation in evaluations])
    track_evaluations(config, untold)
    if verdict.stop is not None:
        without = plural(config.evaluate.stop_after or 0, "evaluation")
        logger.info("training ended after step %d: %s without a gain in %s", last, without, config.evaluate.keep_best)
    if verdict.best is not None:
        logger.info("the run's model is that of step %d, the best in %s", verdict.best, config.evaluate.keep_best)
    return last


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
    guide = Guide.of_run(config) if config.has_guide_model else None
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
    config = settled(config.absolute_paths())
    if not config.has_guide_model:
        raise UserError("guide: there is no guide model whose embeddings could be kept; set guide.model")
    prepared = prepare(config)
    assert prepared.guide is not None
    return precompute(config, prepared.corpus, prepared.guide).lines()


def prepare_run(config: RunConfig, run: RunFolder) -> tuple[Prepared, int]:
    """What the run is made of, and how many steps it has. All is checked before the run's folder is taken."""
    prepared = prepare(config)
    corpus = prepared.corpus
    sampler = Sampler(corpus, config)
    evaluation_steps(config, sampler.num_steps, sampler.steps_per_epoch)
    run.create(config)  # not before: a mistake in the recipe's data can then be fixed under the same name
    run.write_data_summary(data_summary(corpus, sampler))
    if len(sampler.held_out):
        write_evaluation_set(corpus, sampler.held_out, run.folder / HELD_OUT)
    logger.info("%s", "\n".join(outline(config, prepared.student, prepared.guide, corpus, sampler)))
    return prepared, sampler.num_steps


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
