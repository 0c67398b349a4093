"""How fast each worker encodes, measured in the steps themselves: what cluster.deal_by_speed assigns texts by."""

from gist_dist.core.collectives import World
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import StepInputs, StepResult

GRID = 20
"""Speeds are rounded to so many parts of the fastest worker's: equal workers are then assigned equal work."""
SMOOTHING = 0.5
"""Weight of a new measurement."""
RECOVERY = 1.05
"""A worker that is too slow for any chunk is thought so much faster every step, until it is tried again."""


class WorkerSpeeds:
    """Speeds of all workers, equal on all of them. Work in proportion to them evens out encoding times."""

    def __init__(self, world: World, is_on: bool) -> None:
        self.world, self.is_on = world, is_on and world.size > 1
        self.speeds: list[float] | None = None
        """Parts of the fastest; None before the first step, and while it is off."""
        self.own: float | None = None
        """Padded tokens a second of this worker."""

    def of_step(self, plan: BatchPlan, inputs: StepInputs, result: StepResult) -> dict[str, float]:
        """What the workers tell each other, by the largest of each number."""
        if not self.is_on:
            return {}
        tokens = sum(plan.student_chunks[c].padded_tokens for c in inputs.chunks_by_rank[self.world.rank])
        if tokens:
            measured = tokens / (result.seconds["encode"] + result.seconds["backward"])
            self.own = measured**SMOOTHING * (self.own or measured) ** (1 - SMOOTHING)
        elif self.own:
            self.own *= RECOVERY
        told = dict.fromkeys(map(_name, range(self.world.size)), 0.0)
        return told | {_name(self.world.rank): self.own or 0.0}

    def adopt(self, largest: dict[str, float]) -> None:
        """Take up what of_step() gave on all workers; one that has encoded nothing yet counts as one of the fastest."""
        if self.is_on:
            speeds = [largest[_name(rank)] for rank in range(self.world.size)]
            fastest = max(speeds)
            self.speeds = [max(1, round(GRID * (speed or fastest) / fastest)) / GRID for speed in speeds]


def _name(rank: int) -> str:
    return f"speed {rank}"
