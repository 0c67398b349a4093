"""(manifest, seed, step) -> the rows of a global batch. Knows nothing of workers.

An epoch takes every row once (a source's weight aside) and cuts it into full batches, but for one that holds the rest.
Within a batch no text occurs twice where that can be avoided: rows whose texts are common are spread first, each to a
batch without them, and the others fill the places that are left.
"""

import logging
import math
from dataclasses import dataclass
from itertools import chain

import numpy as np

from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """The batches of one pass over the data."""

    batches: list[np.ndarray]
    """Row numbers of every batch, in training order."""
    rows_moved: int
    """Rows that left the batch they were first drawn for, because a text of theirs was there already."""
    duplicates_admitted: int
    """Rows that share a text with another row of their batch because no batch without it had room."""


class Sampler:
    """Global batches by step, the same on every worker and on any number of workers."""

    def __init__(self, corpus: Corpus, config: RunConfig) -> None:
        self.corpus, self.config = corpus, config
        self.global_size = config.batch.global_size
        self.weights = [source.weight for source in config.data.sources]
        self.num_steps = self._num_steps()
        self._cached: tuple[int, Epoch] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(self._rows_per_epoch()) / self.global_size)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of step 1, 2, …"""
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        return self.epoch(epoch).batches[batch]

    def epoch(self, number: int) -> Epoch:
        if self._cached is None or self._cached[0] != number:
            self._cached = (number, self._draw(number))
        return self._cached[1]

    def _num_steps(self) -> int:
        optim = self.config.optim
        if optim.steps is not None:
            return optim.steps
        return max(1, round((optim.epochs or 1) * self.steps_per_epoch))

    def _rows_per_epoch(self) -> list[int]:
        counts = np.bincount(self.corpus.source, minlength=len(self.weights))
        return [max(1, round(count * weight)) for count, weight in zip(counts.tolist(), self.weights, strict=True)]

    def _draw(self, number: int) -> Epoch:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.config.seed, 1, number])))
        per_source = [self._draw_source(source, rng) for source in range(len(self.weights))]
        if self.config.data.mixing == "mixed":
            pools, rest = [], np.concatenate(per_source)
        else:
            full = [len(rows) // self.global_size * self.global_size for rows in per_source]
            pools = [rows[:n] for rows, n in zip(per_source, full, strict=True) if n]
            rest = np.concatenate([rows[n:] for rows, n in zip(per_source, full, strict=True)])
        drawn = [spread(self.corpus, pool, self.global_size, rng) for pool in (*pools, rng.permutation(rest)) if len(pool)]
        batches = [batch for epoch in drawn for batch in epoch.batches]
        order = rng.permutation(len(batches))
        return Epoch(
            [batches[i] for i in order],
            sum(epoch.rows_moved for epoch in drawn),
            sum(epoch.duplicates_admitted for epoch in drawn),
        )

    def _draw_source(self, source: int, rng: np.random.Generator) -> np.ndarray:
        """Its rows in random order: all of them as often as the weight says, plus a random part for the fraction."""
        rows = np.flatnonzero(self.corpus.source == source)
        times, part = divmod(self._rows_per_epoch()[source], len(rows))
        return np.concatenate([rng.permutation(rows) for _ in range(times)] + [rng.permutation(rows)[:part]])


def spread(corpus: Corpus, rows: np.ndarray, size: int, rng: np.random.Generator) -> Epoch:
    """Cut shuffled rows into batches of ``size`` (the last may be smaller) with no text twice in a batch if possible."""
    num_batches = math.ceil(len(rows) / size)
    room = np.full(num_batches, size)
    room[-1] = len(rows) - size * (num_batches - 1)
    drawn = np.repeat(np.arange(num_batches), room)
    owner, texts = _texts_of(corpus, rows)
    common = np.zeros(len(rows), dtype=bool)
    _, inverse, count = np.unique(texts, return_inverse=True, return_counts=True)
    common[owner[count[inverse] > 1]] = True

    assigned = np.full(len(rows), -1)
    placed = _place_common(np.flatnonzero(common), drawn, room, owner, inverse, count)
    assigned[list(placed.assigned)] = list(placed.assigned.values())
    # The rows without common texts stay where they were drawn as long as there is room, and fill the rest otherwise.
    free = np.flatnonzero(~common)
    left = room - np.bincount(assigned[common], minlength=num_batches)
    rank = np.arange(len(free)) - np.searchsorted(drawn[free], drawn[free])
    stays = rank < left[drawn[free]]
    assigned[free[stays]] = drawn[free[stays]]
    left -= np.bincount(drawn[free[stays]], minlength=num_batches)
    assigned[free[~stays]] = np.repeat(np.arange(num_batches), left)

    by_batch = np.argsort(assigned, kind="stable")
    batches = np.split(rows[by_batch], np.cumsum(room)[:-1])
    return Epoch(batches, int((assigned[common] != drawn[common]).sum()), placed.duplicates_admitted)


@dataclass(frozen=True)
class _Placement:
    assigned: dict[int, int]
    duplicates_admitted: int


def _place_common(
    common: np.ndarray, drawn: np.ndarray, room: np.ndarray, owner: np.ndarray, text: np.ndarray, count: np.ndarray
) -> _Placement:
    """Each row with a common text goes to the first batch, from the drawn one on, that has room and none of them.

    Rows of the most common texts choose first. A text in more rows than there are batches has to repeat.
    """
    num_batches = len(room)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(drawn) + 1))
    left = room.tolist()
    members: list[set[int]] = [set() for _ in range(num_batches)]
    batches_with = np.zeros(len(count), dtype=np.int64)
    texts_of = {int(row): text[order[starts[row] : starts[row + 1]]] for row in common}
    most = {row: int(count[texts].max()) for row, texts in texts_of.items()}
    assigned: dict[int, int] = {}
    admitted = 0
    for row in sorted(texts_of, key=lambda row: (-most[row], row)):
        mine = set(texts_of[row].tolist())
        first = int(drawn[row])
        hopeless = any(batches_with[t] >= num_batches for t in mine)
        with_room = (b for b in chain(range(first, num_batches), range(first)) if left[b])
        choice = None if hopeless else next((b for b in with_room if mine.isdisjoint(members[b])), None)
        if choice is None:
            admitted += 1
            choice = next(b for b in chain(range(first, num_batches), range(first)) if left[b])
        for t in mine - members[choice]:
            batches_with[t] += 1
        members[choice] |= mine
        left[choice] -= 1
        assigned[row] = choice
    return _Placement(assigned, admitted)


def _texts_of(corpus: Corpus, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position in rows, identity) of every distinct text of every row; a text twice in one row counts once."""
    negatives = corpus.negatives_of(rows)
    owner = np.concatenate([np.arange(len(rows)), np.arange(len(rows)), np.repeat(np.arange(len(rows)), corpus.num_negatives[rows])])
    identity = corpus.identity[np.concatenate([corpus.anchors[rows], corpus.positives[rows], negatives])]
    pairs = np.unique(np.stack([owner, identity], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]
