"""The training loop; knows nothing of Ray. Every worker runs it with the same arguments but its rank."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

from safetensors import SafetensorError

from gist_dist.common.errors import UserError, in_phase
from gist_dist.config import RunConfig
from gist_dist.core.collectives import World, all_reduce_max, on_rank_0
from gist_dist.core.optim import build_optimizer, learning_rate, set_learning_rate
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import StepResult, train_step
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Guide, Student, save_model
from gist_dist.models.guide_cache import GuideCache
from gist_dist.training.guide_schedule import Guidance
from gist_dist.training.masked_examples import masking_is_shown, write_masked_examples
from gist_dist.training.metrics import metrics_line, peak_memory_bytes
from gist_dist.training.mining_schedule import MiningSchedule
from gist_dist.training.non_finite import report_non_finite
from gist_dist.training.observers import Observers
from gist_dist.training.planned import Schedule, planned_steps
from gist_dist.training.profiling import StepProfiler
from gist_dist.training.run_state import RunState
from gist_dist.training.snapshots import Snapshots, evaluation_steps
from gist_dist.training.train_state import RunTrainState
from gist_dist.training.watchdog import Watchdog
from gist_dist.training.worker_speeds import WorkerSpeeds

logger = logging.getLogger(__name__)

REQUESTS = (None, "checkpoint", "stop")
"""What can be wanted of a running training; of what several workers want, the last in this order is done."""


def train(
    config: RunConfig,
    corpus: Corpus,
    student: Student,
    guide: Guide | GuideCache | None,
    world: World,
    requests: Callable[[], str | None] = lambda: None,
    observe: Callable[[dict[str, Any]], None] | None = None,
    is_scored: Callable[[int], bool] | None = None,
) -> str:
    """Train to the last step, from the newest intact checkpoint if there is one, and write run_dir/model.

    guide: the model, or in mode cache what it has computed. requests: asked on every worker at every step; "checkpoint"
    has one written now, once as long as it is wanted; "stop" ends the run after the step. observe: on rank 0, given
    each line of metrics.jsonl. is_scored: asked on rank 0 where training waits until a step is scored. Gives
    "finished", or "stopped" where a checkpoint and no model was written. Checkpoints are our own and not reported to
    Ray: a report waits for the controller, and Ray's retry only has to call this function again. Raises UserError, on
    every worker, for a run that can't go on.
    """
    student.learn_prompts(source.prompts.student for source in config.data.sources)
    sampler = Sampler(corpus, config)
    model, cache = (None, guide) if isinstance(guide, GuideCache) else (guide, None)
    optimizer = build_optimizer(student.model, config.optim)
    train_state = RunTrainState(config, corpus, student, model, optimizer, world)
    guidance = Guidance(train_state, sampler, cache)
    with ExitStack() as ends:
        mining = MiningSchedule(train_state, sampler.num_steps)
        state = RunState(train_state, guidance, mining)
        ends.callback(state.close)
        done = state.resume()
        scored = evaluation_steps(config, sampler.num_steps, sampler.steps_per_epoch)
        snapshots = Snapshots(train_state, scored, is_scored)
        observers = on_rank_0(lambda: Observers(config, sampler.num_steps, done, observe), world)
        if observers and state.writer:  # on rank 0
            ends.callback(observers.close)
            state.writer.before_commit = observers.metrics.sync
        snapshots.keep_if_due(done)  # of 0; and of the step that a run goes on after, if it was ended before
        last = _train_steps(train_state, guidance, mining, sampler, state, snapshots, observers, requests, done)
        _keep_result(train_state, state, last, sampler.num_steps)
        on_rank_0(lambda: observers.close() if observers else None, world)
        return "finished" if last == sampler.num_steps else "stopped"


def _train_steps(
    train_state: RunTrainState,
    guidance: Guidance,
    mining: MiningSchedule,
    sampler: Sampler,
    state: RunState,
    snapshots: Snapshots,
    observers: Observers | None,
    requests: Callable[[], str | None],
    done: int,
) -> int:
    """All steps that are left, or those before a stop is wanted; gives the last one."""
    config, world, num_steps = train_state.config, train_state.world, sampler.num_steps
    watchdog = Watchdog(config.cluster.hang_timeout_s, config.run_dir / "logs" / f"hang-{world.rank}.txt")
    worker_speeds = WorkerSpeeds(world, is_on=config.cluster.deal_by_speed)
    profiler = StepProfiler(config, world.rank, train_state.student.device)
    schedules, steps = (mining, guidance), range(done + 1, num_steps + 1)
    planned = planned_steps(train_state, guidance, schedules, steps, lambda: worker_speeds.speeds, watchdog)
    with closing(planned):
        for step, batch, inputs, waited in planned:
            started = time.perf_counter()
            set_learning_rate(train_state.optimizer, rate := learning_rate(step, num_steps, config.optim))
            shows = world.rank == 0 and masking_is_shown(config, step, num_steps)
            with profiler.recording(step), watchdog.watching(step):
                result = train_step(train_state, batch, inputs, keep_scored=shows)
            if result.non_finite:
                _skip_or_stop(train_state, state, batch, result)
            result.seconds["plan"] = waited
            seconds = waited + time.perf_counter() - started
            largest = _largest(train_state, requests(), worker_speeds.of_step(batch, inputs, result))
            worker_speeds.adopt(largest)
            if observers:
                _observe(train_state, observers, sampler, batch, result, rate, seconds, largest["memory"])
            result.scored = None  # its memory is the next step's
            _renew(schedules, step)  # before the checkpoint, which stores what the next step is made with
            request = REQUESTS[int(largest["request"])]
            state.save_if_due(step, request)
            snapshots.keep_if_due(step)
            if request == "stop":
                return step
    return num_steps


def _observe(
    train_state: RunTrainState,
    observers: Observers,
    sampler: Sampler,
    batch: BatchPlan,
    result: StepResult,
    rate: float,
    seconds: float,
    peak_memory: float,
) -> None:
    """Rank 0 writes the step's metrics, and the masked examples where the step has kept its embeddings."""
    config, corpus, world_size = train_state.config, train_state.corpus, train_state.world.size
    line = metrics_line(batch, result, corpus, rate, world_size, seconds, sampler.steps_per_epoch, peak_memory)
    observers.observe(line)
    if result.scored and not result.non_finite:
        write_masked_examples(config, corpus, batch, result.scored)


def _largest(train_state: RunTrainState, request: str | None, others: dict[str, float]) -> dict[str, float]:
    """The largest of each number over all workers: memory in use, what is requested of the run, and the others."""
    device = train_state.student.device
    own = {"memory": float(peak_memory_bytes(device)), "request": float(REQUESTS.index(request))}
    return all_reduce_max(own | others, device, train_state.world)


def _renew(schedules: Sequence[Schedule], step: int) -> None:
    for schedule in schedules:
        if schedule.changes_after(step):
            with in_phase("guide"):
                schedule.renew(step)


def _skip_or_stop(train_state: RunTrainState, state: RunState, batch: BatchPlan, result: StepResult) -> None:
    """UserError, on every worker, unless the recipe allows to skip a step whose loss or gradient is not finite."""
    config, optim, skipped = train_state.config, train_state.config.optim, len(state.skipped)
    if optim.non_finite == "skip" and skipped < optim.max_skipped:
        state.skipped.append(batch.step)
        if train_state.world.rank == 0:
            told = report_non_finite(config, train_state.student, train_state.corpus, batch, result).told
            logger.warning("%s; skipped, as %d of at most %d steps", told, skipped + 1, optim.max_skipped)
        return

    def stop() -> None:
        told, remedy = report_non_finite(config, train_state.student, train_state.corpus, batch, result)
        if optim.non_finite == "skip":
            told += f", and optim.max_skipped = {optim.max_skipped} steps were skipped before"
        else:
            remedy += "; optim.non_finite=skip goes on without the step"
        raise UserError(f"{told}; {state.keep(batch.step - 1)}; {remedy}")

    on_rank_0(stop, train_state.world)


def _keep_result(train_state: RunTrainState, state: RunState, last: int, num_steps: int) -> None:
    """Write the model of a finished run and wait for the last checkpoint; UserError, on every worker, if that fails."""
    folder = train_state.config.run_dir / "model"

    def write_model() -> None:
        try:
            save_model(train_state.student, folder, train_state.config)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder} can't be written: {error}; free space, and the same command goes on from the last checkpoint"
            ) from error

    problem = None
    if last == num_steps:
        try:
            on_rank_0(write_model, train_state.world)
        except UserError as error:
            problem = error
    missing = state.finish()
    if problem:
        raise problem
    if missing:
        done = "the model is written, but " if last == num_steps else f"training was stopped after step {last}, but "
        raise UserError(f"{done}{missing}; the same command then goes on from the checkpoint before")
