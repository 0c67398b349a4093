"""Hard negatives: the pool's nearest texts to every anchor by a guide, but its own and those too close to its positive.

The options mean what they mean in sentence_transformers.util.mine_hard_negatives. Scores are exact: the product of two
fp16 numbers below 1 is a multiple of 2^-48, so that a sum of them in fp64 is without rounding and the result depends
neither on the size of a block nor on who scores it.
"""

# Axes:  r rows   n texts of the corpus   a anchors searched at once   p pool   c candidates of an anchor
#        k negatives wanted   m pairs of anchor and positive   e guide width

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float64, Int, Int32
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gist_dist.common.errors import UserError
from gist_dist.config import Mine, RunConfig
from gist_dist.data.held_out import held_out_rows

if TYPE_CHECKING:
    from gist_dist.data.corpus import Corpus

MINED = "mined"
"""Folder of what data.mine finds before training, in data.cache_dir."""
ANCHORS_AT_ONCE = 4096
SPARE = 8
NUMBERS_IN_CACHE = 2**20  # of a processor, in fp64
MOST_POSITIVES = 64
REASONS = ("own", "absolute_margin", "relative_margin", "max_score", "min_score", "rank")
"""Why a near text is no candidate, in the order in which they are asked."""

Embeddings = Callable[[np.ndarray], np.ndarray]
"""Text numbers → unit vectors in fp16."""


@dataclass(frozen=True)
class MineOptions:
    """What becomes a hard negative. UserError for a value out of range."""

    negatives: int = 3
    """How many are added to each row."""
    model: str | None = None
    """Hub id or folder of the model that scores, in place of the recipe's guide."""
    absolute_margin: float | None = None
    """A negative's score is at most the positive's − this (of an anchor with several positives, the lowest counts)."""
    relative_margin: float | None = None
    """A negative's score is at most the positive's − its magnitude × this."""
    min_rank: int = 0
    """So many of the nearest that pass are skipped."""
    max_rank: int | None = None
    """So many of the nearest are looked at. None: min_rank + negatives + the most positives of an anchor, with ten
    times the negatives where a margin or max_score may take some."""
    min_score: float | None = None
    max_score: float | None = None
    pool: Literal["positives", "all"] = "positives"
    """Where negatives come from: the positives of all rows, or also their hard negatives."""
    sampling: Literal["top", "random"] = "top"
    """The nearest that pass, or a seeded draw from the rank range."""

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise UserError(f"negatives = {self.negatives}: nothing would be mined; ask for at least 1")
        if self.min_rank < 0:
            raise UserError(f"min-rank = {self.min_rank}: ranks count from 0")
        if self.max_rank is not None and self.max_rank - self.min_rank < self.negatives:
            raise UserError(
                f"max-rank = {self.max_rank} leaves {max(0, self.max_rank - self.min_rank)} candidates after "
                f"min-rank = {self.min_rank}, and {self.negatives} negatives are wanted; raise max-rank"
            )
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise UserError(f"min-score = {self.min_score} is above max-score = {self.max_score}; swap them")

    def last_rank(self, most_positives: int) -> int:
        if self.max_rank is not None:
            return self.max_rank
        filtered = any(x is not None for x in (self.absolute_margin, self.relative_margin, self.max_score))
        return self.min_rank + self.negatives * (10 if filtered else 1) + most_positives


@dataclass(frozen=True)
class Search:
    """Who looks for negatives, among what, and what is its own."""

    anchors: Int[np.ndarray, "anchors"]
    """Text number of every distinct anchor."""
    groups: Int[np.ndarray, "anchors"]
    """Equal for anchors that are the same text."""
    pool: Int[np.ndarray, "p"]
    """Text numbers of the candidates, ascending; no two are the same text."""
    own: Int[np.ndarray, "pairs"]
    """group × p + pool index of every text that a group owns, ascending."""
    positive_groups: Int[np.ndarray, "pairs2"]
    positives: Int[np.ndarray, "pairs2"]
    """Text numbers of the distinct positives of every group, by group."""
    most_positives: int
    """Rows of the group with most of them, at most MOST_POSITIVES."""

    def blocks(self) -> list[slice]:
        """Slices of the anchors: the units of work, whoever does it."""
        starts = range(0, len(self.anchors), ANCHORS_AT_ONCE)
        return [slice(start, min(start + ANCHORS_AT_ONCE, len(self.anchors))) for start in starts]


@dataclass(frozen=True)
class Mined:
    """What a block of anchors got."""

    texts: Int[np.ndarray, "a k"]
    """Text numbers, nearest first; -1 where there are no more."""
    scores: Float64[np.ndarray, "a k"]
    """Their similarity to the anchor; nan where there are no more."""
    positive_scores: Float64[np.ndarray, "m"]
    """Similarity of every anchor to each of its distinct positives."""
    shortage: Int[np.ndarray, "a"]
    """-1: has all k. Else the place in REASONS of the filter that took most of its candidates, or of "rank"."""
    refused: Int[np.ndarray, "reasons"]
    """How many of the near texts of all these anchors each of REASONS took."""


@runtime_checkable
class Pool(Protocol):
    """Unit vectors in fp16; a memory-mapped array will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray: ...


def same_texts(*features: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """A number for every text, equal for texts that agree in any feature (directly, or by way of others)."""
    n, values = len(features[0]), [np.unique(feature, return_inverse=True)[1] for feature in features]
    starts = n + np.cumsum([0, *(value.max() + 1 for value in values)])
    nodes = np.concatenate([start + value for start, value in zip(starts, values, strict=False)])
    edges = np.ones(len(nodes), dtype=bool), (np.tile(np.arange(n), len(values)), nodes)
    graph = coo_array(edges, shape=(starts[-1], starts[-1]))
    return connected_components(graph, directed=False)[1][:n].astype(np.int64)


def plan_search(
    anchors: Int[np.ndarray, "r"],
    positives: Int[np.ndarray, "r"],
    negatives: Int[np.ndarray, "negatives"],
    num_negatives: Int[np.ndarray, "r"],
    same: Int[np.ndarray, "n"],
    options: MineOptions,
) -> Search:
    """What to search for, from the text numbers of all rows (hard negatives joined); `same` is of every text number."""
    group = same[anchors]
    candidates = np.unique(np.concatenate([positives, negatives]) if options.pool == "all" else positives)
    pool = candidates[np.sort(np.unique(same[candidates], return_index=True)[1])]
    index_of = np.full(same.max() + 1, -1, dtype=np.int64)
    index_of[same[pool]] = np.arange(len(pool))

    owners = np.concatenate([group, group, np.repeat(group, num_negatives)])
    owned = index_of[np.concatenate([group, same[positives], same[negatives]])]
    pairs = np.divmod(np.unique(group * len(same) + positives), len(same))
    distinct = np.unique(anchors)
    return Search(
        anchors=distinct,
        groups=same[distinct],
        pool=pool,
        own=np.unique((owners * len(pool) + owned)[owned >= 0]),
        positive_groups=pairs[0],
        positives=pairs[1],
        most_positives=min(int(np.unique(group, return_counts=True)[1].max()), MOST_POSITIVES),
    )


def plan_corpus_search(corpus: "Corpus", options: MineOptions, rows: np.ndarray | None = None) -> Search:
    """For all rows of a corpus, or these. Two texts are the same if student or guide can't tell them apart, or if they
    are equal but for their prompts."""
    texts, same = corpus.texts_in_use, np.full(len(corpus.identity), -1, dtype=np.int64)
    contents = np.fromiter((hash(corpus.text(text)) for text in texts.tolist()), np.int64, len(texts))
    same[texts] = same_texts(corpus.identity[texts], corpus.guide_keys[texts, 0].view(np.int64), contents)
    rows = np.arange(corpus.num_rows) if rows is None else rows
    negatives, counts = corpus.own_negatives_of(rows), corpus.num_own_negatives[rows]
    anchors, positives = corpus.pairs_of(rows)
    counts = np.concatenate([counts, np.zeros(len(anchors) - len(rows), counts.dtype)])  # a row's negatives count once
    return plan_search(anchors, positives, negatives, counts, same, options)


def options_of(mine: Mine) -> MineOptions:
    """The options that a recipe's data.mine sets."""
    return MineOptions(
        negatives=mine.negatives, relative_margin=mine.relative_margin, min_rank=mine.min_rank, sampling=mine.sampling,
        max_rank=mine.min_rank + 10 * mine.negatives if mine.sampling == "random" else None,
    )  # fmt: skip


def minable_rows(config: RunConfig, corpus: "Corpus") -> Int[np.ndarray, "r"]:
    """Not those of classification sets: what is nearest to their texts is of the same class; nor those held out."""
    sources = [config.data.sources[number] for number in corpus.recipe_sources]
    classified = np.array([source.columns.is_classification for source in sources])
    minable = ~classified[corpus.source]
    minable[held_out_rows(config, corpus)] = False
    return np.flatnonzero(minable)


def by_row(
    corpus: "Corpus", rows: Int[np.ndarray, "r"], search: Search, texts: Int[np.ndarray, "anchors k"]
) -> Int32[np.ndarray, "rows k"]:
    """What was mined for every anchor, as Corpus.adopt() takes it."""
    mined = np.full((corpus.num_rows, texts.shape[1]), -1, np.int32)
    mined[rows] = texts[np.searchsorted(search.anchors, corpus.anchors[rows])]
    return mined


def mine_block(
    search: Search,
    block: slice,
    embeddings: Embeddings,
    options: MineOptions,
    seed: int,
    memory_gb: float = 0.5,
    device: torch.device | str = "cpu",
) -> Mined:
    """The negatives of search.anchors[block]; they don't depend on what else the block holds."""
    vectors, groups = embeddings(search.anchors[block]), search.groups[block]
    positive_scores, first = _positive_scores(search, groups, vectors, embeddings)
    lowest = np.minimum.reduceat(positive_scores, first)

    last_rank = options.last_rank(search.most_positives)
    group_ends = np.searchsorted(search.own, np.stack([groups, groups + 1]) * len(search.pool))
    depth = last_rank + np.maximum(group_ends[1] - group_ends[0], search.most_positives)  # own texts take no ranks
    pool = _Selected(search.pool, embeddings)
    scores, indices = nearest(vectors, pool, int(depth.max()), memory_gb, device)

    is_own = _among(search.own, groups[:, None] * len(search.pool) + indices)
    reasons = refusals(scores, lowest, is_own, depth, last_rank, options)
    chosen = choose(reasons < 0, search.anchors[block], options, seed)

    rows, columns = np.nonzero(chosen)
    places = (np.cumsum(chosen, axis=1) - 1)[rows, columns]
    texts = np.full((len(groups), options.negatives), -1, dtype=np.int64)
    texts[rows, places] = search.pool[indices[rows, columns]]
    kept_scores = np.full(texts.shape, np.nan)
    kept_scores[rows, places] = scores[rows, columns]
    counts = np.stack([(reasons == number).sum(axis=1) for number in range(len(REASONS))], axis=1)
    return Mined(texts, kept_scores, positive_scores, _shortage(texts, counts), counts.sum(axis=0))


def nearest(
    vectors: Float16[np.ndarray, "a e"],
    pool: Pool,
    depth: int,
    memory_gb: float = 0.5,
    device: torch.device | str = "cpu",
    spare: int = SPARE,
) -> tuple[Float64[np.ndarray, "a c"], Int[np.ndarray, "a c"]]:
    """Exact scores and pool indices of the `depth` nearest (or the whole pool), nearest first, equals by pool index.

    The pool goes by in blocks, scored in fp32, and a few more than wanted are kept and scored exactly. Where rounding
    could have kept another text out, the anchor is done again with more to spare.
    """
    num_kept = min(depth + spare, len(pool))
    wide = _tensor(vectors).to(device).float()
    best = torch.empty(len(wide), 0, device=device)
    indices = torch.empty(len(wide), 0, dtype=torch.int64, device=device)
    pool_block = max(1, int(memory_gb * 1e9 / 4 / (len(wide) + 2 * wide.shape[1])))
    for start in range(0, len(pool), pool_block):
        block = _tensor(pool[start : start + pool_block]).to(device).float()
        found, columns = (wide @ block.T).topk(min(num_kept, len(block)), dim=1)
        best, indices = torch.cat([best, found], dim=1), torch.cat([indices, columns + start], dim=1)
        best, order = best.topk(min(num_kept, best.shape[1]), dim=1)
        indices = indices.gather(1, order)

    kept = indices.cpu().numpy()
    scores = _exact_scores(vectors, kept, pool)
    first = np.lexsort((kept, -scores), axis=1)[:, :depth]
    scores, kept = np.take_along_axis(scores, first, axis=1), np.take_along_axis(kept, first, axis=1)
    if num_kept < len(pool):
        rounding = 1.01 * wide.shape[1] * 2.0**-24  # of a sum of so many fp32 products, for unit vectors
        doubtful = np.flatnonzero(scores[:, -1] <= best[:, -1].cpu().numpy().astype(np.float64) + rounding)
        if len(doubtful):
            scores[doubtful], kept[doubtful] = nearest(vectors[doubtful], pool, depth, memory_gb, device, 8 * spare)
    return scores, kept


def refusals(
    scores: Float64[np.ndarray, "a c"],
    lowest: Float64[np.ndarray, "a"],
    is_own: Bool[np.ndarray, "a c"],
    depth: Int[np.ndarray, "a"],
    last_rank: int,
    options: MineOptions,
) -> Int[np.ndarray, "a c"]:
    """Why each near text is no candidate, as a place in REASONS; len(REASONS): not looked at; -1: it is one."""
    lowest, beyond = lowest[:, None], np.arange(scores.shape[1]) >= depth[:, None]
    nothing = np.zeros_like(is_own)
    tests = [
        is_own,
        nothing if options.absolute_margin is None else scores + options.absolute_margin > lowest,
        nothing if options.relative_margin is None else scores > lowest - abs(lowest) * options.relative_margin,
        nothing if options.max_score is None else scores > options.max_score,
        nothing if options.min_score is None else scores < options.min_score,
    ]
    rank = np.cumsum(~np.logical_or.reduce([*tests, beyond]), axis=1) - 1
    tests.append((rank < options.min_rank) | (rank >= last_rank))
    return np.select([beyond, *tests], [len(REASONS), *range(len(REASONS))], default=-1)


def choose(
    is_candidate: Bool[np.ndarray, "a c"], anchors: Int[np.ndarray, "a"], options: MineOptions, seed: int
) -> Bool[np.ndarray, "a c"]:
    """Up to options.negatives candidates of each anchor; a random draw depends on the seed and the anchor alone."""
    if options.sampling == "top":
        return is_candidate & (np.cumsum(is_candidate, axis=1) <= options.negatives)
    chosen = np.zeros_like(is_candidate)
    for row, anchor in enumerate(anchors.tolist()):
        columns = np.flatnonzero(is_candidate[row])
        random = np.random.default_rng((seed, anchor))
        chosen[row, random.choice(columns, min(options.negatives, len(columns)), replace=False)] = True
    return chosen


@dataclass(frozen=True)
class _Selected:
    """Embeddings of some texts, by place among them."""

    texts: np.ndarray
    embeddings: Embeddings

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.embeddings(self.texts[index])


def _positive_scores(
    search: Search, groups: np.ndarray, vectors: np.ndarray, embeddings: Embeddings
) -> tuple[Float64[np.ndarray, "m"], Int[np.ndarray, "a"]]:
    """Scores of all positives, by anchor, and where each anchor's begin."""
    begins, ends = (np.searchsorted(search.positive_groups, groups, side) for side in ("left", "right"))
    first = np.cumsum(ends - begins) - (ends - begins)
    anchor = np.repeat(np.arange(len(groups)), ends - begins)
    pairs = np.arange(len(anchor)) + (begins - first)[anchor]
    scores = np.empty(len(pairs))
    for start in range(0, len(pairs), ANCHORS_AT_ONCE):
        part = slice(start, start + ANCHORS_AT_ONCE)
        found = embeddings(search.positives[pairs[part]])
        scores[part] = np.einsum("me,me->m", vectors[anchor[part]], found, dtype=np.float64, casting="safe")
    return scores, first


def _exact_scores(vectors: np.ndarray, indices: np.ndarray, pool: Pool) -> Float64[np.ndarray, "a c"]:
    scores = np.empty(indices.shape)
    step = max(1, NUMBERS_IN_CACHE // (indices.shape[1] * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        candidates = _tensor(pool[indices[part].ravel()]).double().view(-1, indices.shape[1], vectors.shape[1])
        anchors = _tensor(vectors[part]).double()
        scores[part] = torch.bmm(candidates, anchors[:, :, None])[:, :, 0].numpy()
    return scores


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements="W"))  # torch warns of a read-only map


def _among(ascending: np.ndarray, values: np.ndarray) -> Bool[np.ndarray, "a c"]:
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values


def _shortage(texts: np.ndarray, counts: np.ndarray) -> Int[np.ndarray, "a"]:
    filters = counts[:, 1:-1]
    main = np.where(filters.any(axis=1), 1 + filters.argmax(axis=1), len(REASONS) - 1)
    return np.where(texts[:, -1] >= 0, -1, main)
