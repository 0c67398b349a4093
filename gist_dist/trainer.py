"""The training loop; knows nothing of Ray. Every worker runs it with the same arguments but its rank."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gist_dist.checkpoint import committed, latest_intact, load_checkpoint, save_checkpoint
from gist_dist.collectives import World, all_reduce_max, barrier, broadcast_object
from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.plan import BatchPlan
from gist_dist.data.sampler import Sampler
from gist_dist.encoder import Guide, Student, save_model
from gist_dist.errors import UserError
from gist_dist.guidance import Guidance
from gist_dist.guide_cache import GuideCache
from gist_dist.metrics import MetricsFile, metrics_line, peak_memory_bytes
from gist_dist.optim import build_optimizer, learning_rate, set_learning_rate
from gist_dist.step import StepInputs, Trainee, prepare_inputs, train_step

logger = logging.getLogger(__name__)


def train(config: RunConfig, corpus: Corpus, student: Student, guide: Guide | GuideCache | None, world: World) -> None:
    """Train to the last step, from the newest intact checkpoint if there is one, and write run_dir/model.

    guide: the model, or in mode cache what it has computed. Checkpoints are our own and not reported to Ray: a report
    waits for the controller, and Ray's retry only has to call this function again. Raises UserError, on every worker,
    for a run that can't go on.
    """
    run_dir = config.run_dir
    sampler = Sampler(corpus, config)
    optimizer = build_optimizer(student.model, config.optim)
    is_cached = isinstance(guide, GuideCache)
    trainee = Trainee(config, corpus, student, None if is_cached else guide, optimizer, world)
    guidance = Guidance(trainee, sampler, guide if is_cached else None)
    done = _resume(trainee)
    guidance.resume(done)
    metrics = MetricsFile(run_dir / "metrics.jsonl", resume_after=done) if world.rank == 0 else None
    writer = _tensorboard(config) if world.rank == 0 else None
    progress = _Progress(sampler.num_steps, done)

    def plan(step: int) -> tuple[BatchPlan, StepInputs]:
        batch = guidance.plan(step)
        return batch, prepare_inputs(trainee, batch)

    with ThreadPoolExecutor(1, thread_name_prefix="plan") as planner:
        upcoming = planner.submit(plan, done + 1)
        for step in range(done + 1, sampler.num_steps + 1):
            started = time.perf_counter()
            batch, inputs = upcoming.result()
            waited = time.perf_counter() - started
            if step < sampler.num_steps and not guidance.changes_after(step):
                upcoming = planner.submit(plan, step + 1)
            rate = learning_rate(step, sampler.num_steps, config.optim)
            set_learning_rate(optimizer, rate)
            result = train_step(trainee, batch, inputs)
            result.seconds["plan"] = waited
            seconds = time.perf_counter() - started
            peak = all_reduce_max(float(peak_memory_bytes(student.device)), student.device, world)
            line = metrics_line(batch, result, corpus, rate, world.size, seconds, sampler.steps_per_epoch, peak)
            if metrics:
                metrics.write(line)
                progress.show(line)
            if writer:
                _write_scalars(writer, line)
            if guidance.changes_after(step):
                guidance.renew(step)  # before the checkpoint, which then never lacks its guide
                upcoming = planner.submit(plan, step + 1)
            if step == sampler.num_steps or (
                config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            ):
                _checkpoint(trainee, guidance, step)
    if metrics:
        metrics.close()
        save_model(student, run_dir / "model")
    if writer:
        writer.close()
    barrier(world)


def _resume(trainee: Trainee) -> int:
    """The number of steps done. Rank 0 chooses the checkpoint, all load the same one."""
    folder, world = trainee.config.run_dir / "checkpoints", trainee.world
    checkpoint = broadcast_object(latest_intact(folder) if world.rank == 0 else None, world)
    if checkpoint is None:
        return 0
    state = load_checkpoint(checkpoint, trainee.student.model, trainee.optimizer, trainee.student.device)
    expected = _identity_of_run(trainee)
    for key, value in expected.items():
        if state[key] != value:
            raise UserError(
                f"{checkpoint.folder}: {key} was {state[key]!r} and is now {value!r}; a run continues only with what "
                "its batches depend on unchanged: give it another name, or remove the folder to start over"
            )
    if world.rank == 0:
        logger.info("resuming after step %d from %s", checkpoint.step, checkpoint.folder)
    return checkpoint.step


def _identity_of_run(trainee: Trainee) -> dict[str, object]:
    """What the global batches are a function of."""
    config = trainee.config
    return {
        "data": trainee.corpus.manifest["content"],
        "seed": config.seed,
        "batch.global_size": config.batch.global_size,
        "data.mixing": config.data.mixing,
        "weights": [source.weight for source in config.data.sources],
        "data.temperature": config.data.temperature,
    }


def _checkpoint(trainee: Trainee, guidance: Guidance, step: int) -> None:
    config, world = trainee.config, trainee.world
    if world.rank == 0:
        folder, identity = config.run_dir / "checkpoints", _identity_of_run(trainee)
        save_checkpoint(folder, step, trainee.student.model, trainee.optimizer, identity, config.checkpoint.keep)
        guidance.collect(checkpoint.step for checkpoint in committed(folder))
    barrier(world)


class _Progress:
    """A plain line every few seconds: where the run is, how fast, and when it will be done."""

    def __init__(self, num_steps: int, done: int) -> None:
        self.num_steps, self.first, self.started = num_steps, done, time.monotonic()
        self.shown = 0.0

    def show(self, line: dict[str, Any]) -> None:
        now, step = time.monotonic(), line["step"]
        if now - self.shown < 5 and step not in (self.first + 1, self.num_steps):
            return
        self.shown = now
        remaining = (now - self.started) / (step - self.first) * (self.num_steps - step)
        logger.info(
            "step %d/%d  loss %.4f  %.0f pairs/s  masked %.1f %%  %s left",
            step,
            self.num_steps,
            line["loss"],
            line["pairs_per_second"],
            100 * line["masked_fraction"],
            _clock(remaining),
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _tensorboard(config: RunConfig):
    if not config.tracking.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.run_dir / "tensorboard"))


def _write_scalars(writer, line: dict[str, Any]) -> None:
    for name, value in line.items():
        if isinstance(value, int | float) and name != "step":
            writer.add_scalar(name, value, line["step"])
