"""What differences between paired runs amount to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev

import numpy as np

DRAWS = 10_000
"""Draws of the bootstrap."""
LEVEL = 0.95
"""Level of every interval."""


@dataclass(frozen=True)
class Paired:
    """What the differences of pairs tell; what takes at least two of them is None for one."""

    number: int
    mean: float
    sd: float | None
    low: float | None
    """Bounds of the t interval of the mean, at 95 %."""
    high: float | None
    p: float | None
    """p of the paired t test that the mean is zero, two-sided; None where all differences are equal."""


def paired(differences: Sequence[float]) -> Paired:
    """Student's t for the mean of paired differences: at least one, all finite."""
    assert differences and all(map(isfinite, differences))
    number, mean = len(differences), fmean(differences)
    if number == 1:
        return Paired(1, mean, None, None, None, None)
    sd = stdev(differences)
    if sd == 0:
        return Paired(number, mean, 0.0, mean, mean, None)
    from scipy import stats

    half = stats.t.ppf((1 + LEVEL) / 2, number - 1) * sd / sqrt(number)
    return Paired(number, mean, sd, mean - half, mean + half, float(stats.ttest_1samp(differences, 0.0).pvalue))


def bootstrap(by_task: Mapping[str, Sequence[float]], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean difference when tasks and, within each, seeds are drawn anew: what other
    tasks of this kind and other seeds might have shown. Seeds are drawn once for all tasks, which share their runs.

    by_task: differences of every task, in the same order of seeds. None for fewer than two seeds or two tasks.
    """
    table = np.array([list(differences) for differences in by_task.values()], dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        return None
    rng, (tasks, seeds) = np.random.default_rng(seed), table.shape
    of_tasks = rng.integers(0, tasks, (DRAWS, tasks))
    of_seeds = rng.integers(0, seeds, (DRAWS, seeds))
    counts = np.zeros((DRAWS, seeds))
    np.add.at(counts, (np.arange(DRAWS)[:, None], of_seeds), 1 / seeds)
    means = np.einsum("dts,ds->dt", table[of_tasks], counts).mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted for all tests of a family (Holm 1979); None, no test, stays out."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted
