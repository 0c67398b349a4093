"""A global batch's rows -> unique texts -> chunks of similar length -> chunks per worker.

Nothing here but `assign_chunks` knows how many workers there are.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from gist_dist.config import LossConfig

CHUNK_START_TOKENS = {"cpu": 32, "cuda": 4096}
"""What starting one more chunk costs, in tokens' worth of encoding, by kind of device: weighs short chunks against
padding. A GPU waits for the host's hundreds of launches a chunk."""


@runtime_checkable
class Rules(Protocol):
    """What the data say of rows beside their texts; data/row_rules.py has it."""

    @property
    def groups(self) -> np.ndarray | None:
        """A number for every text, equal for texts of one label or cluster."""

    def in_order(self, rows: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, tuple[tuple[range, LossConfig], ...]]:
        """The rows with those of equal loss together, and where those are."""

    def known(
        self, anchors: np.ndarray, positives: np.ndarray, table: np.ndarray, further_rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows, ascending, and places in the table whose text is a known positive of the row, and none of its own
        texts. further_rows: whose each further positive is; they stand in the table behind the positives."""


@runtime_checkable
class PreparedRows(Protocol):
    """Rows of tokenized texts, as a step needs them; data/corpus.py has one on disk. Arrays are read-only."""

    @property
    def anchors(self) -> np.ndarray:
        """Text number of every row's anchor; positives likewise."""

    @property
    def positives(self) -> np.ndarray: ...

    @property
    def source(self) -> np.ndarray:
        """Number of every row's source."""

    @property
    def rules(self) -> "Rules": ...

    def further_of(self, rows: np.ndarray) -> np.ndarray:
        """Text numbers of all positives of these rows beside the first."""

    @property
    def num_further(self) -> np.ndarray:
        """So many each row has."""

    def negatives_of(self, rows: np.ndarray) -> np.ndarray:
        """Text numbers of all hard negatives of these rows."""

    @property
    def num_negatives(self) -> np.ndarray:
        """Hard negatives of every row."""

    @property
    def identity(self) -> np.ndarray:
        """A number for every text, equal for equal token ids of the student."""

    @property
    def student_lengths(self) -> np.ndarray:
        """Tokens of every text; guide_lengths likewise, by the guide's tokenizer."""

    @property
    def guide_lengths(self) -> np.ndarray: ...

    @property
    def guide_keys(self) -> np.ndarray:
        """Numbers for every text [t 2], equal for equal inputs of the guide."""

    def student_tokens(self, texts: np.ndarray) -> list[np.ndarray]:
        """Token ids of these texts."""

    def guide_tokens(self, texts: np.ndarray) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Chunk:
    """Texts that are encoded together."""

    texts: np.ndarray
    """Positions in the batch's unique texts, or in the guide's distinct inputs."""
    longest: int
    """Tokens of its longest text."""
    num_tokens: int
    """Tokens without padding."""
    is_packed: bool = False
    """Joined without padding; see models/packing.py."""

    @property
    def padded_tokens(self) -> int:
        return self.num_tokens if self.is_packed else len(self.texts) * self.longest


@dataclass(frozen=True)
class ChunkRule:
    """How texts are cut into chunks. It knows nothing of workers."""

    tokens: int
    """At most so many padded tokens a chunk."""
    start_tokens: int = CHUNK_START_TOKENS["cpu"]
    """What starting one more chunk costs."""
    packs_student: bool = False
    packs_guide: bool = False


@dataclass(frozen=True)
class BatchPlan:
    """All that a step needs to know about its global batch."""

    step: int
    rows: np.ndarray
    """Row numbers of the corpus [g]."""
    texts: np.ndarray
    """Text numbers of the corpus, each once, ascending [u]. A text that is anchor and positive of one row, as in
    SimCSE, comes again behind those, for its positive: encoded twice, each time with its own dropout."""
    anchors: np.ndarray
    positives: np.ndarray
    more_positives: np.ndarray
    negatives: np.ndarray
    """Positions in texts: [g], [g], [m] for the rows' positives beside the first, [n] for all their hard negatives."""
    more_positive_rows: np.ndarray
    negative_rows: np.ndarray
    """The row of the batch that each of them belongs to [m], [n]."""
    identity: np.ndarray
    """Equal for texts with the same student token ids [u]."""
    student_chunks: tuple[Chunk, ...]
    guide_inputs: np.ndarray
    """Text numbers, one for each distinct input of the guide; fewer than texts where it can't tell some apart [v]."""
    guide_input_of: np.ndarray
    """Position in guide_inputs of every text [u]."""
    guide_chunks: tuple[Chunk, ...]
    """The chunks of guide_inputs; empty where no guide encodes within the step."""
    guide_embeddings: np.ndarray | None = None
    """The embeddings of guide_inputs, where they come from the cache [v e]."""
    known: tuple[np.ndarray, np.ndarray] | None = None
    """Rows of the batch, and places in its table of texts that are known positives of them; see BatchIndex."""
    groups: np.ndarray | None = None
    """Equal for texts of one label or cluster [u]."""
    sections: tuple[tuple[range, LossConfig], ...] = ()
    """Rows with a loss of their own."""

    @cached_property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.student_chunks)

    @cached_property
    def padded_tokens(self) -> int:
        return sum(chunk.padded_tokens for chunk in self.student_chunks)


def plan_batch(corpus: PreparedRows, rows: np.ndarray, step: int, rule: ChunkRule | int, with_guide: bool) -> BatchPlan:
    """rule: or only the most padded tokens of a chunk. with_guide: whether a guide encodes the batch within the
    step."""
    rule = ChunkRule(rule) if isinstance(rule, int) else rule

    def cut(lengths: np.ndarray, is_packed: bool) -> tuple[Chunk, ...]:
        return pack_chunks(lengths, rule.tokens) if is_packed else cut_chunks(lengths, rule.tokens, rule.start_tokens)

    rows, sections = corpus.rules.in_order(rows, corpus.source)
    anchors, positives = corpus.anchors[rows], corpus.positives[rows]
    further, negatives = corpus.further_of(rows), corpus.negatives_of(rows)
    texts, positions = np.unique(np.concatenate([anchors, positives, further, negatives]), return_inverse=True)
    (of_one_text,) = np.nonzero(anchors == positives)
    again = np.unique(positives[of_one_text])
    positions[len(rows) + of_one_text] = len(texts) + np.searchsorted(again, positives[of_one_text])
    texts = np.concatenate([texts, again])
    _, first, input_of = np.unique(corpus.guide_keys[texts, 0], return_index=True, return_inverse=True)
    guide_inputs = texts[first]
    g, m = len(rows), len(further)
    further_rows = np.repeat(np.arange(g), corpus.num_further[rows])
    table = np.concatenate([positives, further, negatives, anchors])
    return BatchPlan(
        step=step,
        rows=rows,
        texts=texts,
        anchors=positions[:g],
        positives=positions[g : 2 * g],
        more_positives=positions[2 * g : 2 * g + m],
        negatives=positions[2 * g + m :],
        more_positive_rows=further_rows,
        negative_rows=np.repeat(np.arange(g), corpus.num_negatives[rows]),
        identity=np.unique(corpus.identity[texts], return_inverse=True)[1],
        student_chunks=cut(corpus.student_lengths[texts], rule.packs_student),
        guide_inputs=guide_inputs,
        guide_input_of=input_of,
        guide_chunks=cut(corpus.guide_lengths[guide_inputs], rule.packs_guide) if with_guide else (),
        known=corpus.rules.known(anchors, positives, table, further_rows),
        groups=None if corpus.rules.groups is None else corpus.rules.groups[texts],
        sections=sections,
    )


def pack_chunks(lengths: np.ndarray, chunk_tokens: int) -> tuple[Chunk, ...]:
    """Texts in order of length, joined until the next one would be too much; always at least one."""
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    ends = np.cumsum(lengths[order].astype(np.int64))
    chunks, start, before = [], 0, 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, before + chunk_tokens, side="right")))
        tokens = int(ends[stop - 1]) - before
        chunks.append(Chunk(order[start:stop], int(lengths[order[start]]), tokens, is_packed=True))
        start, before = stop, before + tokens
    return tuple(chunks)


def cut_chunks(
    lengths: np.ndarray, chunk_tokens: int, start_tokens: int = CHUNK_START_TOKENS["cpu"]
) -> tuple[Chunk, ...]:
    """Cut the texts, longest first, where padding plus the cost of starting chunks is least.

    A chunk has at most ``chunk_tokens`` padded tokens, but always at least one text. Boundaries are found by dynamic
    programming over the sorted lengths; greedy filling pads about 10 % instead.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    ends = _best_boundaries(lengths[order].astype(np.int64), chunk_tokens, start_tokens)
    starts = [0, *ends[:-1]]
    return tuple(
        Chunk(order[i:j], int(lengths[order[i]]), int(lengths[order[i:j]].sum()))
        for i, j in zip(starts, ends, strict=True)
    )


def _best_boundaries(descending: np.ndarray, chunk_tokens: int, start_tokens: int) -> list[int]:
    n = len(descending)
    candidates = _candidate_boundaries(descending, chunk_tokens)
    lengths_at = descending[np.minimum(candidates, n - 1)]
    cost = np.full(len(candidates), np.iinfo(np.int64).max // 2)
    came_from = np.zeros(len(candidates), dtype=np.int64)
    cost[0] = 0
    for start in range(len(candidates) - 1):
        first, longest = candidates[start], lengths_at[start]
        room = max(1, chunk_tokens // longest)
        stop = np.searchsorted(candidates, first + room, side="right")
        reach = slice(start + 1, max(stop, start + 2))
        through = cost[start] + longest * (candidates[reach] - first) + start_tokens
        better = through < cost[reach]
        cost[reach][better] = through[better]
        came_from[reach][better] = start
    ends, node = list[int](), len(candidates) - 1
    while node:
        ends.append(int(candidates[node]))
        node = int(came_from[node])
    return ends[::-1]


def _candidate_boundaries(descending: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """Where the length changes and, within a run of equal lengths, where a chunk would be full.

    From every such place the next one is at most one full chunk away, so a path always exists.
    """
    n = len(descending)
    changes = np.flatnonzero(np.diff(descending)) + 1
    marks = {0, n, *changes.tolist()}
    for start, stop in zip([0, *changes.tolist()], [*changes.tolist(), n], strict=True):
        room = max(1, chunk_tokens // int(descending[start]))
        marks.update(range(start, stop, room))
    full = 0
    while full < n:  # the greedy cuts, so that a chunk that begins in one run can fill up within the next
        full = min(n, full + max(1, chunk_tokens // int(descending[full])))
        marks.add(full)
    return np.array(sorted(marks))


def assign_chunks(chunks: Sequence[Chunk], num_workers: int, speeds: Sequence[float] | None = None) -> list[list[int]]:
    """Chunk numbers for every worker, so that all are done at nearly the same time; a worker may get none.

    speeds: of every worker, in any unit; None: all are equally fast. Longest processing time first: the next largest
    chunk goes to the worker that is done with it first.
    """
    chunks_by_rank: list[list[int]] = [[] for _ in range(num_workers)]
    loads: dict[float, list[tuple[int, int]]] = {}  # a heap for each speed: padded tokens and worker
    for worker, speed in enumerate(speeds or [1.0] * num_workers):
        loads.setdefault(speed, []).append((0, worker))
    for number in sorted(range(len(chunks)), key=lambda i: (-chunks[i].padded_tokens, i)):
        tokens = chunks[number].padded_tokens
        load = min(loads.items(), key=lambda item: ((item[1][0][0] + tokens) / item[0], item[1][0]))[1]
        held, worker = load[0]
        chunks_by_rank[worker].append(number)
        heapq.heapreplace(load, (held + tokens, worker))
    return [sorted(own) for own in chunks_by_rank]
