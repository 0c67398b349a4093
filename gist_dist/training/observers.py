"""What follows a run from outside: metrics.jsonl, a line in the log every few seconds, the trackers. Rank 0's."""

import logging
import time
from collections.abc import Callable
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.text import PROGRESS_SECONDS, clock
from gist_dist.config import RunConfig
from gist_dist.training.metrics import MetricsFile
from gist_dist.training.trackers import Trackers

logger = logging.getLogger(__name__)


class Observers:
    """Each gets every line of metrics.jsonl, once, in the order of the steps."""

    def __init__(
        self, config: RunConfig, num_steps: int, done: int, other: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """done: steps that the run goes on after. UserError if metrics.jsonl can't be written or a tracker opened."""
        try:
            self.metrics = MetricsFile(config.run_dir / "metrics.jsonl", resume_after=done)
        except OSError as error:
            raise UserError(f"{config.run_dir}/metrics.jsonl can't be written: {error}; free space") from error
        self._progress = _Progress(num_steps, done)
        self._trackers = Trackers(config, done, must_open=done == 0)  # a week of training outlives a tracker's server
        self._other = other

    def observe(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self._progress.show(line)
        self._trackers.log(line, line["step"])
        if self._other:
            self._other(line)

    def close(self) -> None:
        """UserError for lines of metrics.jsonl that can't be written."""
        self._trackers.close()
        self.metrics.close()


class _Progress:
    """A plain line every few seconds: where the run is, how fast, and when it will be done."""

    def __init__(self, num_steps: int, done: int) -> None:
        self.num_steps, self.first, self.started = num_steps, done, time.monotonic()
        self.shown = 0.0

    def show(self, line: dict[str, Any]) -> None:
        now, step = time.monotonic(), line["step"]
        if now - self.shown < PROGRESS_SECONDS and step not in (self.first + 1, self.num_steps):
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
            clock(remaining),
        )
