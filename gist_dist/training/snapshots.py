"""The student as it is after some steps, kept to be scored while training goes on (evaluate.every_steps).

Keeping it changes nothing of the training: no random number is drawn and no weight touched.
"""

import logging
import time
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from gist_dist.common.errors import UserError
from gist_dist.common.text import plural
from gist_dist.config import RunConfig
from gist_dist.core.collectives import on_rank_0
from gist_dist.models.encoder import save_model
from gist_dist.runs.evaluations import is_done, model_of
from gist_dist.training.train_state import RunTrainState

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
IsScored = Callable[[int], bool]


def evaluation_steps(config: RunConfig, num_steps: int, steps_per_epoch: int) -> list[int]:
    """Steps after which the run is scored: 0, those of evaluate.every_steps, the last; none where nothing is scored.
    UserError for a step that the run does not have."""
    if not config.watched:
        return []
    every = config.evaluate.every_steps
    if isinstance(every, tuple):
        if max(every) > num_steps:
            raise UserError(f"evaluate.every_steps: step {max(every)}, and the run has {plural(num_steps, 'step')}")
        chosen = set(every)
    elif every is None:
        chosen = set[int]()
    elif every < 1:
        count = int(num_steps / steps_per_epoch / every)
        chosen = {max(1, round(number * every * steps_per_epoch)) for number in range(1, count + 1)}
    else:
        chosen = set(range(int(every), num_steps + 1, int(every)))
    return sorted({0, *chosen, num_steps})


class Snapshots:
    """What all workers do after a step that is to be scored: rank 0 writes, and the others wait for it."""

    def __init__(self, train_state: RunTrainState, steps: list[int], is_scored: IsScored | None) -> None:
        """is_scored: whether whoever scores a step is done with it, or wants the workers to go on; None where scoring
        has resources of its own and nobody waits."""
        self.train_state, self.steps, self.is_scored = train_state, set(steps), is_scored

    def keep_if_due(self, step: int) -> None:
        if step not in self.steps:
            return
        if self.is_scored and self.train_state.student.device.type == "cuda":
            torch.cuda.empty_cache()  # the evaluation has the same GPU
        on_rank_0(lambda: self._keep(step), self.train_state.world)

    def _keep(self, step: int) -> None:
        """A run that goes on may come by a step once more, whose model is there or scored."""
        run_dir = self.train_state.config.run_dir
        if is_done(run_dir, step):
            return
        place = model_of(run_dir, step)
        try:
            if not place.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                save_model(self.train_state.student, place, self.train_state.config)
        except (OSError, SafetensorError) as error:
            logger.warning("the student of step %d can't be kept to be scored (%s); training goes on", step, error)
            return
        while self.is_scored and step < max(self.steps) and not self.is_scored(step):
            time.sleep(LOOK_SECONDS)
