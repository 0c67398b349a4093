"""Rows of an epoch change places until no text is twice in a batch, as far as that can be had.

A row is *crowded* where another row of its batch has one of its texts. In rounds, crowded rows each pick a batch that
lacks the text and a row there to change places with; of these moves all that help and don't touch the same text in the
same batch are made at once. A round is a few array operations over what is crowded, so a million rows take seconds
whatever their texts: also where every row has the same text, which no move can part.
"""

# Axes:  n places (rows in the order drawn)   k pairs of (row, text it has)   m proposed moves

from dataclasses import dataclass

import numpy as np

from gist_dist.data.corpus import Corpus
from gist_dist.data.ragged import expand

PROPOSALS = 2**16
"""Moves weighed in a round, or an eighth of those that are wanted where that is more."""
TRIES = 16
"""Moves weighed in a round for one crowded text of a row, at most."""
LEAST_GAIN = 1e-3
"""Share of the crowded rows: a round with no more gain is fruitless."""
PATIENCE = 8
"""Fruitless rounds in a row after which the duplicates that are left are admitted."""
MAX_ROUNDS = 200
TABLE_SHARE = 4
"""Entries of the table of counts for each text of a row."""


@dataclass(frozen=True)
class SharedTexts:
    """The texts of every row of the corpus that another row may have too; equal token ids are one text.

    Row r has texts[ends[r - 1]:ends[r]], each once.
    """

    texts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, passes: np.ndarray) -> "SharedTexts":
        """passes: of every row, how often an epoch may take it."""
        rows = np.arange(corpus.num_rows)
        owner, numbers = corpus.own_texts_of(rows)
        identities, identity = np.unique(corpus.identity, return_inverse=True)
        texts = identity[numbers]
        shared = np.bincount(texts, weights=passes[owner], minlength=len(identities))[texts] > 1
        owner, texts = np.divmod(np.unique(owner[shared] * len(identities) + texts[shared]), len(identities))
        return cls(texts, np.cumsum(np.bincount(owner, minlength=len(rows))))

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in rows, text) of the texts that more than one of these rows has, by position. Texts are numbered
        anew, those in the most rows first."""
        starts = np.concatenate([[0], self.ends[:-1]])[rows]
        owner, pairs = expand(starts, self.ends[rows] - starts)
        _, texts, times = np.unique(self.texts[pairs], return_inverse=True, return_counts=True)
        is_shared = times[texts] > 1
        number = np.empty(len(times), dtype=np.int64)
        number[np.argsort(-times, kind="stable")] = np.arange(len(times))
        return owner[is_shared], number[texts[is_shared]]


def spread(
    rows: np.ndarray, starts: np.ndarray, limits: np.ndarray, shared: SharedTexts, rng: np.random.Generator
) -> np.ndarray:
    """An order of these shuffled rows in which few texts are in more rows of a batch than its limit.

    Batches begin at ``starts``. A row is elsewhere only if it left its batch.
    """
    seating = _Seating(starts, len(rows), limits, *shared.of_rows(rows))
    seating.part(rng)
    return seating.row_at


def repeating_rows(batches: list[np.ndarray], shared: SharedTexts) -> np.ndarray:
    """A row for every text that an earlier row of its batch has too."""
    owner, texts = shared.of_rows(np.concatenate(batches))
    batch_at = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    _, first = np.unique(texts * len(batches) + batch_at[owner], return_index=True)
    return np.concatenate(batches)[np.delete(owner, first)]


class _Seating:
    """Place p, which belongs to batch batch_at[p], holds row row_at[p]; rows are numbered as they were drawn."""

    def __init__(
        self, starts: np.ndarray, num_rows: int, limits: np.ndarray, owner: np.ndarray, texts: np.ndarray
    ) -> None:
        """limits: rows of a batch that may have the same text. owner [k], texts [k]: what SharedTexts.of_rows gives."""
        self.starts, self.sizes, self.num_batches = starts, np.diff(starts, append=num_rows), len(starts)
        self.limits = limits
        self.batch_at = np.repeat(np.arange(self.num_batches), self.sizes)
        self.row_at, self.place_of = np.arange(num_rows), np.arange(num_rows)
        self.owner, self.texts = owner, texts
        self.num_texts = np.bincount(owner, minlength=num_rows)
        self.first = np.cumsum(self.num_texts) - self.num_texts
        self.count = _Counts(self._keys(np.arange(len(owner))), limits)

    def part(self, rng: np.random.Generator) -> None:
        pairs, fruitless = np.arange(len(self.owner)), 0
        for _ in range(MAX_ROUNDS):
            pairs = pairs[self.count.of(self._keys(pairs)) > self.limits[self._batch_of(self.owner[pairs])]]
            movable = pairs[self.count.batches_with_room[self.texts[pairs]] > 0]
            if fruitless == PATIENCE or not len(movable):
                return
            # After a fruitless round moves that change nothing are made as well: they may open new ways.
            row, other, gain = self._propose(movable, rng, at_least=0 if fruitless else 1)
            fruitless = 0 if gain > len(movable) * LEAST_GAIN else fruitless + 1
            is_pair = np.zeros(len(self.owner), dtype=bool)
            is_pair[pairs] = True
            is_pair[self._pairs_of(np.concatenate([row, other]))[1]] = True  # a moved row may crowd another batch
            pairs = np.flatnonzero(is_pair)

    def _propose(
        self, movable: np.ndarray, rng: np.random.Generator, at_least: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Weigh moves of the rows of crowded pairs and make the best: rows moved, rows they changed places with,
        duplicates that vanished."""
        tries, most = min(TRIES, max(1, PROPOSALS // len(movable))), max(PROPOSALS, len(movable) // 8)
        chosen = rng.permutation(np.tile(movable, tries))[:most]
        row, target = self.owner[chosen], self.count.draw_batch_with_room(self.texts[chosen], rng)
        place = self.starts[target] + (rng.random(len(row)) * self.sizes[target]).astype(np.int64)
        other, source = self.row_at[place], self._batch_of(row)
        gain = self._gain(row, other, source, target)
        best = np.argsort(-gain, kind="stable")[: (gain >= at_least).sum()]
        row, other, source, target = (array[best] for array in (row, other, source, target))
        apart, keys, changes = self._choose(row, other, source, target)
        self._swap(row[apart], other[apart])
        self.count.add(keys, changes)
        return row[apart], other[apart], int(gain[best][apart].sum())

    def _gain(self, row: np.ndarray, other: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Duplicates that vanish by each move [m] alone."""
        ways = ((*self._pairs_of(row), source, target), (*self._pairs_of(other), target, source))
        move = np.concatenate([move for move, *_ in ways])
        texts = np.concatenate([self.texts[pairs] for _, pairs, *_ in ways])
        leaves, enters = (np.concatenate([way[i][way[0]] for way in ways]) for i in (2, 3))
        keys = texts * self.num_batches
        vanishes = self.count.of(keys + leaves) > self.limits[leaves]
        gain = vanishes.astype(np.int64) - (self.count.of(keys + enters) >= self.limits[enters])
        pairs = move * self.count.num_texts + texts
        in_order = np.sort(pairs)
        common = in_order[1:][in_order[1:] == in_order[:-1]]
        at = np.searchsorted(common, pairs)
        gain[np.append(common, -1)[at] == pairs] = 0  # both rows have the text: no batch has it more or less often
        return np.bincount(move, weights=gain, minlength=len(row)).astype(np.int64)

    def _choose(
        self, row: np.ndarray, other: np.ndarray, source: np.ndarray, target: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The moves, given best first, that share no row and no text in a batch with a better one, so that each gains
        what it would alone; then the counts that they change: keys, and by how much."""
        moves, keys, changes = [], [], []
        for rows, leaves, enters in ((row, source, target), (other, target, source)):
            move, pairs = self._pairs_of(rows)
            for batch, change in ((leaves, -1), (enters, 1)):
                moves.append(move)
                keys.append(self.texts[pairs] * self.num_batches + batch[move])
                changes.append(np.full(len(move), change))
        move, key = np.concatenate(moves), np.concatenate(keys)
        every = np.arange(len(row))
        touching = np.concatenate([move, every, every])
        touched = np.concatenate([key, -1 - row, -1 - other])  # rows beside the keys, as negative numbers
        in_order = np.argsort(touching, kind="stable")
        _, first, which = np.unique(touched[in_order], return_index=True, return_inverse=True)
        best_claim = touching[in_order][first]
        apart = np.ones(len(row), dtype=bool)
        apart[touching[in_order][best_claim[which] != touching[in_order]]] = False
        made = apart[move]
        return np.flatnonzero(apart), key[made], np.concatenate(changes)[made]

    def _swap(self, row: np.ndarray, other: np.ndarray) -> None:
        a, b = self.place_of[row], self.place_of[other]
        self.place_of[row], self.place_of[other] = b, a
        self.row_at[a], self.row_at[b] = other, row

    def _batch_of(self, rows: np.ndarray) -> np.ndarray:
        return self.batch_at[self.place_of[rows]]

    def _keys(self, pairs: np.ndarray) -> np.ndarray:
        return self.texts[pairs] * self.num_batches + self._batch_of(self.owner[pairs])

    def _pairs_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in rows, pair) of all their texts."""
        return expand(self.first[rows], self.num_texts[rows])


class _Counts:
    """How many rows of a batch have a text, by key = text * num_batches + batch.

    The first texts, those in the most rows, are counted in a table; for the others, whose table would be large and
    nearly empty, the keys that some row has are kept in order.
    """

    def __init__(self, keys: np.ndarray, limits: np.ndarray) -> None:
        self.limits, self.num_batches = limits, len(limits)
        self.num_texts = int(keys.max(initial=-1)) // self.num_batches + 1
        in_table = min(self.num_texts, TABLE_SHARE * len(keys) // self.num_batches) * self.num_batches
        self.table = np.bincount(keys[keys < in_table], minlength=in_table).astype(np.int32)
        self.keys, self.counts = np.unique(keys[keys >= in_table], return_counts=True)
        self._index()

    def _index(self) -> None:
        in_table = np.flatnonzero(self.table.reshape(-1, self.num_batches) >= self.limits)
        full = np.concatenate([in_table, self.keys[self.counts >= self.limits[self.keys % self.num_batches]]])
        texts = full // self.num_batches
        num_full = np.bincount(texts, minlength=self.num_texts)
        self.batches_with_room = self.num_batches - num_full
        """For every text, how many batches could take one more row with it."""
        self._first = np.cumsum(num_full) - num_full
        # Plus text * num_batches, the batches with room that come before each batch without: ascending.
        self._room_before = full - (np.arange(len(full)) - self._first[texts])

    def of(self, keys: np.ndarray) -> np.ndarray:
        counts, rare = np.zeros(len(keys), dtype=np.int64), keys >= len(self.table)
        counts[~rare] = self.table[keys[~rare]]
        if len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, keys[rare]), len(self.keys) - 1)
            counts[rare] = np.where(self.keys[at] == keys[rare], self.counts[at], 0)
        return counts

    def add(self, keys: np.ndarray, changes: np.ndarray) -> None:
        rare = keys >= len(self.table)
        np.add.at(self.table, keys[~rare], changes[~rare].astype(np.int32))
        keys, which = np.unique(keys[rare], return_inverse=True)
        changes = np.bincount(which, weights=changes[rare], minlength=len(keys)).astype(np.int64)
        at = np.searchsorted(self.keys, keys)
        known = np.append(self.keys, -1)[at] == keys
        self.counts[at[known]] += changes[known]
        counts = np.insert(self.counts, at[~known], changes[~known])
        self.keys, self.counts = np.insert(self.keys, at[~known], keys[~known])[counts > 0], counts[counts > 0]
        self._index()

    def draw_batch_with_room(self, texts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each text a random batch that could take one more row with it; there must be one."""
        nth = (rng.random(len(texts)) * self.batches_with_room[texts]).astype(np.int64)
        before = np.searchsorted(self._room_before, texts * self.num_batches + nth, side="right")
        return nth + before - self._first[texts]
