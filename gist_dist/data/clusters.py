"""Rows that the guide finds alike, for batches of neighbours (data.mixing: clustered; Morris & Rush 2024, CDE,
arXiv:2410.02525, fill batches so).

A row lies where its anchor and its positive lie to the guide, as one unit vector. k-means is run for each source. Its
clusters are numbered along a tour from each to the nearest that is left, so that clusters of close numbers are
neighbours. They are made once and kept (kept_arrays.py): k-means may give others on another machine.
"""

# Axes:  r rows of a source   k clusters   e guide width

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.kept_arrays import digest_of, find_array, keep_array, read_array
from gist_dist.models.guide_cache import GuideCache

logger = logging.getLogger(__name__)

KIND, FORMAT = "clusters", 1
MAX_CLUSTERS = 2**14
"""Most clusters of a source: the tour compares each with each."""
FITTED_ROWS, FITTED_PER_CLUSTER = 2**17, 32
"""Rows that k-means sees of a large source; the others only go to the nearest centre."""
ROWS_AT_ONCE = 2**13

RowVectors = Callable[[np.ndarray], np.ndarray]
"""Row numbers → unit vectors [r e] in fp32."""
Assign = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Row numbers, centres [k e] → the number of the nearest centre of every row."""


@dataclass(frozen=True)
class RowClusters:
    """The cluster of every row of a corpus within its source, numbered so that close numbers are neighbours."""

    of_row: Int32[np.ndarray, " rows"]
    name: str
    """Name of the kept array."""

    @property
    def digest(self) -> str:
        return digest_of(self.name)


def make_clusters(
    config: RunConfig, corpus: Corpus, guide: str, vectors: RowVectors, assign: Assign | None = None
) -> RowClusters:
    """The clusters that an equal recipe has made before, or new ones, which are kept. guide: its fingerprint. assign:
    how many rows find their centres; None: in this process."""
    size = config.data.clustering.rows_per_cluster or config.batch.global_size
    inputs = {"format": FORMAT, "data": corpus.manifest["content"], "guide": guide, "seed": config.seed, "size": size}
    if found := find_array(config, KIND, inputs):
        return RowClusters(*found)
    started, of_row = time.monotonic(), np.zeros(corpus.num_rows, np.int32)
    for source in range(len(corpus.source_names)):
        rows = np.flatnonzero(corpus.source == source)
        of_row[rows] = cluster_source(rows, vectors, size, config.seed, assign)
    name = keep_array(config, KIND, inputs, of_row)
    logger.info("clustered %s rows in %.1f s", f"{len(of_row):,}", time.monotonic() - started)
    return RowClusters(of_row, name)


def read_clusters(config: RunConfig, name: str) -> RowClusters:
    return RowClusters(read_array(config, KIND, name), name)


def row_vectors(corpus: Corpus, cache: GuideCache) -> RowVectors:
    """Out of a guide cache that holds all texts of the corpus."""
    positions = cache.find(corpus.guide_keys)

    def vectors(rows: np.ndarray) -> np.ndarray:
        ends = (cache.embeddings(positions[texts[rows]]) for texts in (corpus.anchors, corpus.positives))
        both = np.add(*ends, dtype=np.float32)
        return both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-6)

    return vectors


def cluster_source(
    rows: np.ndarray, vectors: RowVectors, size: int, seed: int, assign: Assign | None = None
) -> Int32[np.ndarray, " r"]:
    """The cluster of each of these rows, about so many rows in each, numbered along the tour."""
    num_clusters = min(round(len(rows) / size), MAX_CLUSTERS)
    if num_clusters < 2:
        return np.zeros(len(rows), np.int32)
    num_fitted = max(FITTED_ROWS, FITTED_PER_CLUSTER * num_clusters)
    fitted = rows
    if len(rows) > num_fitted:
        fitted = np.sort(np.random.default_rng(seed).choice(rows, num_fitted, replace=False))
    centres = tour(_centres(vectors(fitted), num_clusters, seed))
    return assign(rows, centres) if assign else nearest_centres(rows, centres, vectors)


def nearest_centres(
    rows: np.ndarray, centres: Float32[np.ndarray, "k e"], vectors: RowVectors
) -> Int32[np.ndarray, " r"]:
    nearest = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        nearest[part] = (vectors(rows[part]) @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
    return nearest


def _centres(vectors: Float32[np.ndarray, "r e"], num_clusters: int, seed: int) -> Float32[np.ndarray, "k e"]:
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(num_clusters, random_state=seed, n_init=1, batch_size=max(4096, 4 * num_clusters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different rows than clusters: some stay empty
        return means.fit(vectors).cluster_centers_.astype(np.float32)


def tour(centres: Float32[np.ndarray, "k e"]) -> Float32[np.ndarray, "k e"]:
    """In an order in which each is followed by the nearest of those that are left, from the one farthest out."""
    left = np.ones(len(centres), dtype=bool)
    at, order = int(((centres - centres.mean(axis=0)) ** 2).sum(axis=1).argmax()), list[int]()
    squares = (centres**2).sum(axis=1)
    for _ in range(len(centres)):
        order.append(at)
        left[at] = False
        at = int(np.where(left, squares - 2 * (centres @ centres[at]), np.inf).argmin())
    return centres[order]


def neighbours_together(
    rows: np.ndarray, clusters: np.ndarray, hardness: float, rng: np.random.Generator
) -> np.ndarray:
    """Rows in random order → an order in which each stretch holds rows of one cluster and its neighbours.

    hardness: the share of the rows, the same in every stretch, that are so ordered; the others stay in random order.
    Where the tour begins, and so what a batch holds, is drawn.
    """
    num_ordered = round(hardness * len(rows))
    ordered, free = rows[:num_ordered], rows[num_ordered:]
    if num_ordered:
        ordered = ordered[np.argsort(clusters[:num_ordered], kind="stable")]
        ordered = np.roll(ordered, rng.integers(num_ordered))
    place = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (ordered, free)])
    return np.concatenate([ordered, free])[np.argsort(place, kind="stable")]
