"""Steps in their order, each planned while the one before it is trained."""

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import StepInputs, prepare_inputs
from gist_dist.training.guide_schedule import Guidance
from gist_dist.training.train_state import RunTrainState
from gist_dist.training.watchdog import Watchdog


@runtime_checkable
class Schedule(Protocol):
    """What a run is made with and renews between two steps: the guide, or mined negatives."""

    def changes_after(self, step: int) -> bool: ...

    def renew(self, step: int) -> None:
        """On every worker, after this step."""


class PlannedStep(NamedTuple):
    step: int
    plan: BatchPlan
    inputs: StepInputs
    waited: float
    """Seconds that planning kept the training waiting."""


def planned_steps(
    train_state: RunTrainState,
    guidance: Guidance,
    schedules: Sequence[Schedule],
    steps: range,
    speeds: Callable[[], list[float] | None],
    watchdog: Watchdog,
) -> Generator[PlannedStep, None, None]:
    """sampler -> plan -> guide embeddings -> padded inputs, one step ahead in a thread of its own.

    The step after one that a schedule changes after is planned only when it is asked for: by then the caller has
    renewed what it is made with. speeds: of the workers, asked when planning begins. Close it to end the thread.
    """

    def plan(step: int, speeds: list[float] | None) -> tuple[BatchPlan, StepInputs]:
        batch = guidance.plan(step)
        return batch, prepare_inputs(train_state, batch, speeds)

    upcoming = None
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as planner:
        for step in steps:
            started = time.perf_counter()
            with watchdog.watching(step):
                batch, inputs = (upcoming or planner.submit(plan, step, speeds())).result()
            waited, upcoming = time.perf_counter() - started, None
            if step + 1 in steps and not any(schedule.changes_after(step) for schedule in schedules):
                upcoming = planner.submit(plan, step + 1, speeds())
            yield PlannedStep(step, batch, inputs, waited)
