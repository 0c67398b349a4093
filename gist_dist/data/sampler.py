"""(manifest, seed, step) -> the rows of a global batch. Knows nothing of workers.

An epoch takes every row once (a source's weight aside) and cuts it into full batches; what is left at the end is a
smaller batch. If that would be less than a sixteenth of a batch, too few to contrast with, its rows enlarge another.

Rows are drawn at random. Then texts that came twice into a batch are parted: such a row changes places with a row of
another batch, so that the texts of a batch are distinct wherever that can be had.
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import numpy as np

from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.errors import UserError

SMALLEST_BATCH = 1 / 16
"""Share of global_size below which the rest of an epoch is no batch of its own."""
TRIES = 16
"""Rows of a batch that are asked, at random, to change places."""


@dataclass(frozen=True)
class Epoch:
    """The batches of one pass over the data."""

    batches: list[np.ndarray]
    """Row numbers of every batch, in training order."""
    rows_moved: int
    """Rows that left the batch they were drawn for, so that no text is twice in a batch."""
    duplicates_admitted: int
    """How often a text is in a batch once more, in another row, because no batch without it could take the row."""


class Sampler:
    """Global batches by step, the same on every worker and on any number of workers.

    UserError if an epoch, with the weights of the sources, is less than a batch.
    """

    def __init__(self, corpus: Corpus, config: RunConfig) -> None:
        self.corpus, self.config = corpus, config
        self.global_size = config.batch.global_size
        weights = [source.weight for source in config.data.sources]
        self._rows_of = [np.flatnonzero(corpus.source == source) for source in range(len(weights))]
        self.rows_per_source = [
            max(1, round(len(rows) * weight)) for rows, weight in zip(self._rows_of, weights, strict=True)
        ]
        if self.rows_per_epoch < self.global_size:
            raise UserError(
                f"batch.global_size = {self.global_size}: an epoch has only {self.rows_per_epoch} rows, with the "
                "weights of data.sources; lower it, raise the weights or add data"
            )
        self.steps_per_epoch = _num_batches(self.rows_per_epoch, self.global_size)
        epochs = config.optim.epochs or 1
        self.num_steps = config.optim.steps or max(1, round(epochs * self.steps_per_epoch))
        self._cached: tuple[int, Epoch] | None = None

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.rows_per_source)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of step 1, 2, …"""
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        return self.epoch(epoch).batches[batch]

    def epoch(self, number: int) -> Epoch:
        if self._cached is None or self._cached[0] != number:
            self._cached = (number, self._draw(number))
        return self._cached[1]

    def _draw(self, number: int) -> Epoch:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.config.seed, 1, number])))
        size, drawn = self.global_size, [self._draw_source(source, rng) for source in range(len(self._rows_of))]
        full, rest, rows_moved = [], [], 0
        if self.config.data.mixing == "mixed":
            rest = drawn
        else:
            for rows in drawn:
                parts, moved = spread(self.corpus, rows, np.arange(0, len(rows), size), rng)
                full += [part for part in parts if len(part.rows) == size]
                rest += [part.rows for part in parts if len(part.rows) < size]
                rows_moved += moved
            if 0 < sum(map(len, rest)) < SMALLEST_BATCH * size:
                rest.append(full.pop().rows)
        if rest:
            rows = rng.permutation(np.concatenate(rest))
            parts, moved = spread(self.corpus, rows, np.arange(_num_batches(len(rows), size)) * size, rng)
            full += parts
            rows_moved += moved
        order = rng.permutation(len(full))
        return Epoch([full[i].rows for i in order], rows_moved, sum(part.num_duplicates for part in full))

    def _draw_source(self, source: int, rng: np.random.Generator) -> np.ndarray:
        """Its rows in random order: all of them as often as the weight says, plus a random part for the fraction."""
        rows = self._rows_of[source]
        times, part = divmod(self.rows_per_source[source], len(rows))
        return np.concatenate([rng.permutation(rows) for _ in range(times)] + [rng.permutation(rows)[:part]])


def _num_batches(num_rows: int, size: int) -> int:
    full, rest = divmod(num_rows, size)
    return max(1, full + (rest >= SMALLEST_BATCH * size and rest > 0))


@dataclass(frozen=True)
class Part:
    rows: np.ndarray
    num_duplicates: int
    """How often a text is in it once more, in another row."""


def spread(corpus: Corpus, rows: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> tuple[list[Part], int]:
    """Cut shuffled rows at ``starts`` into parts with no text twice, as far as that can be had by moving rows.

    Also returns how many rows were moved to another part.
    """
    part_at = np.searchsorted(starts, np.arange(len(rows)), side="right") - 1
    seating = _Seating(part_at, *_common_texts(corpus, rows))
    seating.part_duplicates(random.Random(int(rng.integers(2**62))))
    row_at = np.array(seating.row_at)
    parts = zip(np.split(rows[row_at], starts[1:]), seating.num_duplicates(), strict=True)
    return [Part(*part) for part in parts], int((part_at[row_at] != part_at).sum())


def _common_texts(corpus: Corpus, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position in rows, text) for every text that is in more than one row, each once a row, by position.

    Texts with the same student token ids are the same text here.
    """
    position, counts = np.arange(len(rows)), corpus.num_negatives[rows]
    owner = np.concatenate([position, position, np.repeat(position, counts)])
    numbers = np.concatenate([corpus.anchors[rows], corpus.positives[rows], corpus.negatives_of(rows)])
    _, texts, times = np.unique(corpus.identity[numbers], return_inverse=True, return_counts=True)
    is_common = times[texts] > 1
    pairs = np.unique(owner[is_common] * len(times) + texts[is_common])  # a text twice in one row counts once
    owner, texts = np.divmod(pairs, len(times))
    _, texts, times = np.unique(texts, return_inverse=True, return_counts=True)
    return owner[times[texts] > 1], texts[times[texts] > 1]


class _Seating:
    """Place p, which belongs to batch batch_at[p], holds row row_at[p]; rows move by changing places.

    A text and a batch together are one key, text * num_batches + batch: `count` has how many rows of the batch have
    the text. Only texts that are in more than one row are kept track of.
    """

    def __init__(self, batch_at: np.ndarray, owner: np.ndarray, texts: np.ndarray) -> None:
        """batch_at: of every place, ascending. owner, texts: what _common_texts gives."""
        self.num_batches = int(batch_at[-1]) + 1
        self.ends = np.cumsum(np.bincount(batch_at)).tolist()
        self.batch_at = batch_at.tolist()
        self.row_at = list(range(len(batch_at)))
        self.place_of = list(range(len(batch_at)))
        keys = texts * self.num_batches
        rows, starts = np.unique(owner, return_index=True)
        bounds, flat = [*starts.tolist(), len(keys)], keys.tolist()
        self.texts_of = {row: flat[bounds[i] : bounds[i + 1]] for i, row in enumerate(rows.tolist())}
        keys, counts = np.unique(keys + batch_at[owner], return_counts=True)
        self.count = dict(zip(keys.tolist(), counts.tolist(), strict=True))
        texts, num_batches_with = np.unique(keys - keys % self.num_batches, return_counts=True)
        self.num_batches_with = dict(zip(texts.tolist(), num_batches_with.tolist(), strict=True))

    def num_duplicates(self) -> list[int]:
        """Of every batch."""
        duplicates = [0] * self.num_batches
        for key, count in self.count.items():
            duplicates[key % self.num_batches] += max(0, count - 1)
        return duplicates

    def part_duplicates(self, rng: random.Random) -> None:
        """Every row with a text that its batch has twice changes places with another, as long as that helps."""
        tries_left, fruitless = 100_000 + TRIES * len(self.texts_of), 0
        while crowded := [row for row in self.texts_of if self._crowding_texts(row)]:
            crowded_in = defaultdict(list)
            for row in crowded:
                crowded_in[self._batch_of(row)].append(row)
            change = 0
            for row in crowded:
                # After a fruitless round moves that change nothing are made as well: they may open new ways.
                moved, tries = self._move(row, crowded_in, rng, at_most=0 if fruitless else -1)
                change += moved
                tries_left -= tries
            fruitless = 0 if change < 0 else fruitless + 1
            if fruitless == 8 or tries_left < 0:
                return

    def _batch_of(self, row: int) -> int:
        return self.batch_at[self.place_of[row]]

    def _crowding_texts(self, row: int) -> list[int]:
        batch = self._batch_of(row)
        return [text for text in self.texts_of[row] if self.count[text + batch] > 1]

    def _move(self, row: int, crowded_in: dict[int, list[int]], rng: random.Random, at_most: int) -> tuple[int, int]:
        """(change in the number of duplicates, number of rows tried) of the first move that changes it by at_most."""
        crowding = self._crowding_texts(row)
        if all(self.num_batches_with[text] == self.num_batches for text in crowding):
            return 0, 0
        tries, first = 0, rng.randrange(self.num_batches)
        for batch in chain(range(first, self.num_batches), range(first)):
            if all(self.count.get(text + batch) for text in crowding):
                continue
            start, end = self.ends[batch - 1] if batch else 0, self.ends[batch]
            anyone = (self.row_at[rng.randrange(start, end)] for _ in range(TRIES))
            for other in chain(crowded_in[batch][:TRIES], anyone):
                tries += 1
                if self._batch_of(other) == batch and (change := self._change(row, other)) <= at_most:
                    self._swap(row, other)
                    return change, tries
        return 0, tries

    def _change(self, row: int, other: int) -> int:
        """In the number of duplicates, if the two rows change places."""
        change = 0
        for one, two in ((row, other), (other, row)):
            leaves, enters = self._batch_of(one), self._batch_of(two)
            stays = self.texts_of.get(two, ())
            for text in self.texts_of.get(one, ()):
                if text not in stays:
                    change += (self.count.get(text + enters, 0) > 0) - (self.count[text + leaves] > 1)
        return change

    def _swap(self, row: int, other: int) -> None:
        for one, two in ((row, other), (other, row)):
            leaves, enters = self._batch_of(one), self._batch_of(two)
            for text in self.texts_of.get(one, ()):
                self._add(text, leaves, -1)
                self._add(text, enters, 1)
        a, b = self.place_of[row], self.place_of[other]
        self.place_of[row], self.place_of[other] = b, a
        self.row_at[a], self.row_at[b] = other, row

    def _add(self, text: int, batch: int, number: int) -> None:
        before = self.count.get(text + batch, 0)
        self.count[text + batch] = before + number
        self.num_batches_with[text] += (before + number > 0) - (before > 0)
