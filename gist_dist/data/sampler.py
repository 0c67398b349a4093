"""(manifest, seed, step) -> the rows of a global batch. Knows nothing of workers.

Every source is an endless stream of rows: pass k over the source is a permutation that (seed, source, k) decides.
Epoch e takes the e-th slice of every stream, as long as the source's share of an epoch, so that no row is taken again
before all rows of its source were, and any epoch can be drawn without those before it.

An epoch is cut into full batches; what is left at the end is a smaller batch. If that would be less than a sixteenth
of a batch, too few to contrast with, its rows enlarge another. Then texts that came twice into a batch are parted: such
a row is swapped into another batch, so that the texts of a batch are distinct wherever that can be had.
"""

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.data.clusters import neighbours_together
from gist_dist.data.corpus import Corpus
from gist_dist.data.held_out import held_out_rows
from gist_dist.data.no_duplicates import SharedTexts, repeating_rows, spread

SMALLEST_BATCH = 1 / 16
"""Share of global_size below which the rest of an epoch is no batch of its own."""
PASSES_ROWS = 4096
"""Passes over a short source are drawn together, up to so many rows from one seed: seeding costs more than drawing."""
ORDER, BATCHES = 1, 2  # what a seed is for


@dataclass(frozen=True)
class Epoch:
    """The batches of one pass over the data."""

    batches: list[np.ndarray]
    """Row numbers of every batch, in training order."""
    moved: np.ndarray
    """For every source, how many rows left the batch they were drawn for, so that no text is twice in a batch."""
    duplicates: np.ndarray
    """For every source, how often a row has a text that an earlier row of its batch has, because no batch without that
    text could take the row."""

    @property
    def rows_moved(self) -> int:
        return int(self.moved.sum())

    @property
    def duplicates_admitted(self) -> int:
        return int(self.duplicates.sum())


class Sampler:
    """Global batches by step, the same on every worker and on any number of workers.

    While an epoch's batches are served, a thread draws the next one. UserError if an epoch is less than a batch.
    """

    def __init__(self, corpus: Corpus, config: RunConfig) -> None:
        self.corpus, self.config = corpus, config
        self.global_size = config.batch.global_size
        self.held_out = held_out_rows(config, corpus)
        """Rows that no batch has."""
        in_order = np.argsort(corpus.source, kind="stable")
        if len(self.held_out):
            in_order = in_order[~np.isin(in_order, self.held_out)]
        num_rows = np.bincount(corpus.source[in_order], minlength=len(corpus.recipe_sources))
        self._rows_of = np.split(in_order, np.cumsum(num_rows)[:-1])
        weights = np.array([config.data.sources[number].weight for number in corpus.recipe_sources])
        self.rows_per_source = share_epoch(num_rows, weights, config.data.temperature)
        """Rows that an epoch takes of every source."""
        if self.rows_per_epoch < self.global_size:
            raise UserError(
                f"batch.global_size = {self.global_size}: an epoch has only {self.rows_per_epoch} rows, with the "
                "weights of data.sources; lower it, raise the weights or add data"
            )
        if self.is_clustered and not any(self._alone):
            raise UserError(
                f"data.mixing = clustered: no source has the rows for two batches of batch.global_size = "
                f"{self.global_size} (an epoch takes {', '.join(f'{n:,}' for n in self.rows_per_source[:5])}); lower it"
            )
        self.steps_per_epoch = _num_batches(self.rows_per_epoch, self.global_size)
        epochs = config.optim.epochs or 1
        self.num_steps = config.optim.steps or max(1, round(epochs * self.steps_per_epoch))
        self._epochs: dict[int, Future[Epoch]] = {}
        self._lock = threading.Lock()

    @property
    def is_clustered(self) -> bool:
        return self.config.data.mixing == "clustered"

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.rows_per_source)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of step 1, 2, …"""
        number, batch = divmod(step - 1, self.steps_per_epoch)
        epoch = self.epoch(number)
        if (number + 1) * self.steps_per_epoch < self.num_steps:
            self.prefetch(number + 1)
        return epoch.batches[batch]

    def epoch(self, number: int) -> Epoch:
        """Epoch 0, 1, …; what drawing it raised, if it did."""
        return self._drawing(number).result()

    def prefetch(self, number: int) -> None:
        """Begin to draw the epoch in another thread. This epoch and the one before it are kept."""
        self._drawing(number)

    def _drawing(self, number: int) -> "Future[Epoch]":
        with self._lock:
            if number not in self._epochs:
                drawing: Future[Epoch] = Future()
                self._epochs = {n: e for n, e in self._epochs.items() if n == number - 1} | {number: drawing}
                # A daemon: a run that ends or fails does not wait for an epoch that nobody needs.
                threading.Thread(target=self._fulfil, args=(drawing, number), name="epoch", daemon=True).start()
            return self._epochs[number]

    def _fulfil(self, drawing: "Future[Epoch]", number: int) -> None:
        try:
            drawing.set_result(self._draw(number))
        except BaseException as error:
            drawing.set_exception(error)

    def _draw(self, number: int) -> Epoch:
        rng, size = self._rng(BATCHES, number), self.global_size
        full, rest = list[_Rows](), list[_Rows]()
        for source, num_rows in enumerate(self.rows_per_source):
            stream = self._stream(source, number * num_rows, (number + 1) * num_rows)
            if self.is_clustered and self._alone[source]:
                stream = self._neighbours_together(source, number * num_rows, stream, rng)
            rows = _Rows(stream, np.zeros(num_rows, dtype=bool))
            if self._alone[source]:
                starts = np.arange(0, num_rows, size)
                limits = np.where(starts + size <= num_rows, 1, self._num_mixed)  # what is left is parted once more
                parts = rows.spread(starts, limits, self.shared_texts, rng)
                full += parts[: num_rows // size]
                rest += parts[num_rows // size :]
            else:
                rest.append(rows)
        if 0 < sum(map(len, rest)) < SMALLEST_BATCH * size:
            rest.append(full.pop())
        if rest:
            rows = _Rows.joined(rest)[rng.permutation(sum(map(len, rest)))]
            starts = np.arange(_num_batches(len(rows), size)) * size
            full += rows.spread(starts, np.ones_like(starts), self.shared_texts, rng)
        batches = [full[i].numbers for i in rng.permutation(len(full))]
        moved = np.concatenate([batch.numbers[batch.moved] for batch in full])
        return Epoch(batches, self._by_source(moved), self._by_source(repeating_rows(batches, self.shared_texts)))

    @cached_property
    def _alone(self) -> list[bool]:
        """Whether a source fills batches alone. Less than a batch of different rows can't, however often they come; and
        a single source has nothing to be mixed with. Clusters take two batches, or there is nothing to choose."""
        if self.is_clustered:
            fewest = map(min, self.rows_per_source, map(len, self._rows_of))
            return [num_rows >= 2 * self.global_size for num_rows in fewest]
        if self.config.data.mixing == "mixed" or len(self._rows_of) == 1:
            return [False] * len(self._rows_of)
        fewest = map(min, self.rows_per_source, map(len, self._rows_of))
        return [num_rows >= self.global_size for num_rows in fewest]

    @cached_property
    def _num_mixed(self) -> int:
        """Batches of what is left of the sources."""
        shares = zip(self.rows_per_source, self._alone, strict=True)
        return _num_batches(sum(n % self.global_size if alone else n for n, alone in shares), self.global_size)

    def _by_source(self, rows: np.ndarray) -> np.ndarray:
        return np.bincount(self.corpus.source[rows], minlength=len(self._rows_of))

    def _stream(self, source: int, start: int, stop: int) -> np.ndarray:
        """Rows start, …, stop - 1 of the endless stream of a source."""
        rows = self._rows_of[source]
        passes = np.tile(rows, (max(1, PASSES_ROWS // max(1, len(rows))), 1))
        first, last = start // passes.size, (stop - 1) // passes.size
        drawn = [self._rng(ORDER, source, block).permuted(passes, axis=1).ravel() for block in range(first, last + 1)]
        return np.concatenate(drawn)[start - first * passes.size :][: stop - start]

    def _neighbours_together(self, source: int, start: int, stream: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pass by pass, so that a row that comes twice comes in different batches."""
        clusters, hardness = self.corpus.clusters, self.config.data.clustering.hardness
        assert clusters is not None, "data.mixing clustered: the corpus has no clusters"
        num_rows = len(self._rows_of[source])
        ends = np.arange(num_rows - start % num_rows, len(stream), num_rows)
        passes = np.split(stream, ends)
        return np.concatenate([neighbours_together(p, clusters.of_row[p], hardness, rng) for p in passes])

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.config.seed, spawn_key=purpose)))

    @cached_property
    def shared_texts(self) -> SharedTexts:
        """Counting a row as often as an epoch may take it: a slice that is no whole number of passes can begin within
        one and end within another."""
        num_rows = np.array([max(1, len(rows)) for rows in self._rows_of])
        whole, part = np.divmod(self.rows_per_source, num_rows)
        return SharedTexts.of(self.corpus, (whole + 2 * (part > 0))[self.corpus.source])


@dataclass(frozen=True)
class _Rows:
    """Rows in the order drawn, and which of them have left the batch that they were drawn for."""

    numbers: np.ndarray
    moved: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: np.ndarray | slice) -> "_Rows":
        return _Rows(self.numbers[which], self.moved[which])

    @classmethod
    def joined(cls, parts: list["_Rows"]) -> "_Rows":
        return cls(np.concatenate([p.numbers for p in parts]), np.concatenate([p.moved for p in parts]))

    def spread(
        self, starts: np.ndarray, limits: np.ndarray, shared: SharedTexts, rng: np.random.Generator
    ) -> list["_Rows"]:
        """Cut at ``starts`` into batches with few texts in more rows than the batch's limit."""
        order = spread(self.numbers, starts, limits, shared, rng)
        batch_at = np.searchsorted(starts, np.arange(len(self)), side="right")
        rows = self[order]
        rows = _Rows(rows.numbers, rows.moved | (batch_at[order] != batch_at))
        return [rows[start:stop] for start, stop in zip(starts, [*starts[1:], len(self)], strict=True)]


def share_epoch(num_rows: np.ndarray, weights: np.ndarray, temperature: float) -> list[int]:
    """Rows that an epoch takes of every source: in proportion to (rows × weight)^(1/temperature), at least one.

    They add up to sum(rows × weight) whatever the temperature, rounded by largest remainders.
    """
    wanted = num_rows * weights
    total = round(float(wanted.sum()))
    shares = wanted ** (1 / temperature)
    exact = shares / shares.sum() * total
    taken = np.floor(exact).astype(np.int64)
    largest = np.argsort(taken - exact, kind="stable")[: total - taken.sum()]
    taken[largest] += 1
    return np.maximum(taken, num_rows > 0).tolist()


def _num_batches(num_rows: int, size: int) -> int:
    full, rest = divmod(num_rows, size)
    return max(1, full + (rest >= SMALLEST_BATCH * size and rest > 0))
