"""Lists of different lengths that lie in one array, one after the other."""

import numpy as np


def expand(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, starts[i] + j) for every j < counts[i]."""
    number = np.repeat(np.arange(len(counts)), counts)
    return number, np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
