"""Clusters of rows with Ray tasks where there are many: each finds the nearest centres of some rows."""

from functools import lru_cache
from typing import Any

import numpy as np

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.config import RunConfig
from gist_dist.data.clusters import RowClusters, make_clusters, nearest_centres, row_vectors
from gist_dist.data.corpus import Corpus, open_corpus
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import GuideCache, open_guide_cache
from gist_dist.on_ray.cluster.connect import connected

IN_PROCESS_FLOPS = 1e13
"""So much the driver does by itself, in the time that a local Ray takes to start."""
ROWS_OF_TASK = 2**17


def cluster_on_ray(config: RunConfig, corpus: Corpus, guide: Guide) -> RowClusters:
    """As make_clusters, of a corpus whose embeddings the guide cache holds. config: with absolute paths. UserError."""
    cache = open_guide_cache(config, guide)
    vectors = row_vectors(corpus, cache)
    place = corpus.place, (config.guide_cache_dir, cache.fingerprint, cache.width, config.data.local_copy)

    def assign(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
        if 2.0 * len(rows) * centres.size <= IN_PROCESS_FLOPS:
            return nearest_centres(rows, centres, vectors)
        import ray

        from gist_dist.on_ray.tasks.pool import Answer, Failed, Lost, Pool, failure

        with connected(config.cluster):
            task = ray.remote(num_cpus=1, max_retries=config.cluster.max_failures)(_assign)
            shared = ray.put(centres)
            parts = np.array_split(rows, -(-len(rows) // ROWS_OF_TASK))
            found: dict[int, np.ndarray] = {}
            start = lambda number: task.remote(config, place, parts[number], shared)  # noqa: E731
            with Pool(start, range(len(parts))) as pool:
                for number, outcome in pool.outcomes():
                    if isinstance(outcome, Failed):
                        raise failure(outcome.cause, "clustering") from outcome.cause
                    if isinstance(outcome, Lost):
                        raise UserError(f"clusters: {one_line(outcome.error)}; run again") from outcome.error
                    assert isinstance(outcome, Answer)
                    found[number] = outcome.value
            return np.concatenate([found[number] for number in range(len(parts))])

    return make_clusters(config, corpus, cache.fingerprint, vectors, assign)


def _assign(config: RunConfig, place: tuple[str, tuple[Any, ...]], rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return nearest_centres(rows, centres, row_vectors(*_opened(config.model_dump_json(), *place)))


@lru_cache(maxsize=1)
def _opened(recipe: str, corpus: str, cache: tuple[Any, ...]) -> tuple[Corpus, GuideCache]:
    """Once for all parts that this process does."""
    return open_corpus(RunConfig.model_validate_json(recipe), corpus), GuideCache(*cache)
