"""What follows a run from outside: metrics.jsonl, a line in the log every few seconds, the trackers. Rank 0's."""

import logging
import time
from collections.abc import Callable
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.progress import Progress, progress_of
from gist_dist.config import RunConfig
from gist_dist.runs.evaluations import read_evaluations
from gist_dist.runs.metrics_file import METRICS, MetricsFile, evaluation_lines
from gist_dist.training.trackers import Trackers

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks for scores of earlier steps."""


class Observers:
    """Each gets every line of metrics.jsonl, once, in the order of the steps."""

    def __init__(
        self, config: RunConfig, num_steps: int, done: int, other: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """done: steps that the run goes on after. UserError if metrics.jsonl can't be written or a tracker opened."""
        try:
            self.metrics = MetricsFile(config.run_dir / METRICS, resume_after=done)
        except OSError as error:
            raise UserError(f"{config.run_dir}/metrics.jsonl can't be written: {error}; free space") from error
        self._progress = _StepProgress(num_steps, done)
        self._trackers = Trackers(config, done, must_open=done == 0)  # a week of training outlives a tracker's server
        self._other = other
        self._is_scored, self._run_dir, self._looked = bool(config.watched), config.run_dir, 0.0
        self._told = {line["step"] for line in evaluation_lines(config.run_dir / METRICS)}

    def observe(self, line: dict[str, Any]) -> None:
        self._tell_scores()
        self.metrics.write(line)
        self._progress.show(line)
        self._trackers.log(line, line["step"])
        if self._other:
            self._other(line)

    def _tell_scores(self) -> None:
        """Pass on the scores of steps that the driver has scored meanwhile."""
        if not self._is_scored or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        for evaluation in read_evaluations(self._run_dir):
            if evaluation.step not in self._told:
                self._told.add(evaluation.step)
                self.metrics.write(evaluation.line())
                self._trackers.log_evaluation(evaluation.line())
        self._looked = time.monotonic()

    def close(self) -> None:
        """UserError for lines of metrics.jsonl that can't be written."""
        self._trackers.close()
        self.metrics.close()


class _StepProgress:
    """Where the run is, how fast, and when it will be done; the first and the last step always say so."""

    def __init__(self, num_steps: int, done: int) -> None:
        self.num_steps, self.first = num_steps, done
        self.progress = Progress(num_steps - done, progress_of(logger))

    def show(self, line: dict[str, Any]) -> None:
        step = line["step"]
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        speed, masked = line["pairs_per_second"], 100 * (line.get("masked_weight") or 0.0)
        self.progress.reach(
            step - self.first,
            f"step {step}/{self.num_steps}  loss {loss}  {speed:.0f} pairs/s  masked weight {masked:.1f} %",
            now=step in (self.first + 1, self.num_steps),
        )
