"""What we add to Ray Train's controller: when to start the workers again, and a checkpoint before they are resized.

These are Ray's internal interfaces (2.60); fit.py does without, and warns, where another version lacks them.
"""

import logging
import time
from pathlib import Path
from typing import Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from gist_dist.common.events import EventFormatter
from gist_dist.on_ray.train.failures import Failure, classify, last_line
from gist_dist.on_ray.train.messages import CONTROLLER_EVENTS, READY, RESIZE, STOP, post, posted, withdraw
from gist_dist.runs.metrics_file import last_step

logger = logging.getLogger(__name__)

RESIZE_PATIENCE_S = 300.0


class RetryPolicy(FailurePolicy):
    """Workers are started again as long as the run gets on.

    max_failures counts failures in a row without a step further than before, so that a long run may lose any number
    of workers. A UserError ends the run at once; so does an exception that comes a second time at the same step, and
    memory that ran out a second time at the same step or more than max_failures times in all.
    """

    def __init__(self, max_failures: int, run_dir: Path) -> None:
        super().__init__(FailureConfig(max_failures=max_failures))
        self.max_failures, self.run_dir = max_failures, run_dir
        self.furthest, self.in_a_row, self.failed_starts, self.num_memory = 0, 0, 0, 0
        self.seen: set[tuple[int, str]] = set()

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _is_without_room(training_failed_error):
            return FailureDecision.RETRY  # the driver knows how long to wait, and says so
        retries, reason = self._decide(training_failed_error)
        say(self.run_dir, f"{reason}; {'starting the workers again' if retries else 'not tried again'}")
        return FailureDecision.RETRY if retries else FailureDecision.RAISE

    def _decide(self, error: TrainingFailedError) -> tuple[bool, str]:
        done = last_step(self.run_dir)
        if isinstance(error, PreemptionError):
            return True, f"after step {done} a node was taken away as announced"
        if isinstance(error, ControllerError):
            self.failed_starts += 1
            return self.failed_starts <= self.max_failures, f"workers could not be started: {last_line(str(error))}"
        if not isinstance(error, WorkerGroupError):
            return False, last_line(str(error))
        failure = classify(error.worker_failures)[0]
        reason = f"after step {done}: {failure.text}"
        if failure.kind == "user":
            return False, reason
        if failure.kind in ("error", "memory") and self._came_before(done, failure):
            return False, f"{reason} (for the second time at this step)"
        self.in_a_row = 1 if done > self.furthest else self.in_a_row + 1
        self.furthest, self.failed_starts = max(self.furthest, done), 0
        self.num_memory += failure.kind == "memory"
        tries = max(self.in_a_row, self.num_memory)
        return tries <= self.max_failures, f"{reason} ({tries} of {self.max_failures} failures allowed)"

    def _came_before(self, done: int, failure: Failure) -> bool:
        mark = (done, failure.text if failure.kind == "error" else failure.kind)
        came = mark in self.seen
        self.seen.add(mark)
        return came


def _is_without_room(error: TrainingFailedError) -> bool:
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


class CheckpointBeforeResize(ControllerCallback):
    """Running workers write a checkpoint before Ray ends them to start another number: no step is computed twice."""

    def __init__(self, run_dir: Path, said: int = 0) -> None:
        """said: a number of workers of which the user knows that it is being started."""
        self.run_dir, self.are_running, self.said = run_dir, False, said

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self.are_running = isinstance(previous_state, ResizingState)
        if isinstance(current_state, RunningState):
            self.said = 0

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if not self.are_running:
            if resize_decision.num_workers != self.said:  # not again and again while there is no room
                self.said = resize_decision.num_workers
                say(self.run_dir, f"starting {self.said} worker{'s' * (self.said > 1)}")
            return
        started, done = time.monotonic(), last_step(self.run_dir)
        withdraw(self.run_dir, READY)
        post(self.run_dir, RESIZE)
        while not posted(self.run_dir) & {READY, STOP} and time.monotonic() < started + RESIZE_PATIENCE_S:
            time.sleep(0.2)
        how = "from a checkpoint written now" if READY in posted(self.run_dir) else "from the last checkpoint"
        withdraw(self.run_dir, RESIZE, READY)
        done = max(done, last_step(self.run_dir))
        say(self.run_dir, f"after step {done}: going on with {resize_decision.num_workers} workers {how}")


def say(run_dir: Path, text: str) -> None:
    """An event that the driver repeats."""
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, text, (), None)
    with open(run_dir / "logs" / CONTROLLER_EVENTS, "a", encoding="utf-8") as file:
        file.write(EventFormatter().format(record) + "\n")
