"""What follows a run from outside: metrics.jsonl, a line in the log every few seconds, TensorBoard. Rank 0's."""

import logging
import time
from collections.abc import Callable
from typing import Any

from gist_dist.config import RunConfig
from gist_dist.errors import UserError
from gist_dist.metrics import MetricsFile

logger = logging.getLogger(__name__)

SHOW_SECONDS = 5


class Observers:
    """Each gets every line of metrics.jsonl, once, in the order of the steps."""

    def __init__(
        self, config: RunConfig, num_steps: int, done: int, other: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """done: steps that the run goes on after. UserError if metrics.jsonl can't be written."""
        try:
            self.metrics = MetricsFile(config.run_dir / "metrics.jsonl", resume_after=done)
        except OSError as error:
            raise UserError(f"{config.run_dir}/metrics.jsonl can't be written: {error}; free space") from error
        self._progress = _Progress(num_steps, done)
        self._tensorboard = _tensorboard(config)
        self._other = other

    def observe(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self._progress.show(line)
        if self._tensorboard:
            self._to_tensorboard(lambda writer: _write_scalars(writer, line))
        if self._other:
            self._other(line)

    def close(self) -> None:
        """UserError for lines of metrics.jsonl that can't be written."""
        if self._tensorboard:
            self._to_tensorboard(lambda writer: writer.close())
        self.metrics.close()

    def _to_tensorboard(self, write: Callable[[Any], None]) -> None:
        try:
            write(self._tensorboard)
        except OSError as error:  # a copy of metrics.jsonl is no reason to lose a run
            logger.warning("TensorBoard's events can't be written (%s); they end here", error)
            self._tensorboard = None


class _Progress:
    """A plain line every few seconds: where the run is, how fast, and when it will be done."""

    def __init__(self, num_steps: int, done: int) -> None:
        self.num_steps, self.first, self.started = num_steps, done, time.monotonic()
        self.shown = 0.0

    def show(self, line: dict[str, Any]) -> None:
        now, step = time.monotonic(), line["step"]
        if now - self.shown < SHOW_SECONDS and step not in (self.first + 1, self.num_steps):
            return
        self.shown = now
        remaining = (now - self.started) / (step - self.first) * (self.num_steps - step)
        logger.info(
            "step %d/%d  loss %s  %.0f pairs/s  masked %.1f %%  %s left",
            step,
            self.num_steps,
            "not finite" if line["loss"] is None else f"{line['loss']:.4f}",
            line["pairs_per_second"],
            100 * line["masked_fraction"],
            _clock(remaining),
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _tensorboard(config: RunConfig) -> Any:
    if not config.tracking.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.run_dir / "tensorboard"))


def _write_scalars(writer: Any, line: dict[str, Any]) -> None:
    for name, value in line.items():
        if isinstance(value, int | float) and name != "step":
            writer.add_scalar(name, value, line["step"])
