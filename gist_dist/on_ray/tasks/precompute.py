"""The guide's embeddings of a corpus, or of any inputs, encoded by a pool of actors.

Plain actors and not Ray Data: what must survive a killed worker is one shard of work, which any other actor can then
encode, and here the driver knows at any time which shard is whose. A lost actor takes only its unfinished shard along.
"""

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.progress import Say
from gist_dist.common.storage import join, open_store
from gist_dist.common.text import one_line, plural
from gist_dist.config import GuideConfig, RunConfig
from gist_dist.data.corpus import Corpus, open_corpus
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import (
    SAY,
    Encoded,
    Filled,
    Keys,
    embedding_fingerprint,
    encode_inputs,
    fill,
    missing_inputs,
    open_guide_cache,
    write_shard,
)
from gist_dist.models.tokenizer import Tokens, token_keys
from gist_dist.on_ray.cluster.address import address_of
from gist_dist.on_ray.cluster.capacity import check_resources, gpus_per_worker
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.tasks.pool import Failed, Lost, Pool, failure

logger = logging.getLogger(__name__)

IN_PROCESS_FLOPS = 2e12
"""Up to this much the driver encodes itself: 15 seconds of one core, less than actors take to start."""
ACTOR_BYTES = 1e9
"""Memory of an actor beside twice the guide's weights."""


@dataclass(frozen=True)
class _CorpusInputs:
    """Texts of a corpus, which actors open for themselves."""

    corpus: Corpus
    texts: np.ndarray
    keys: Keys
    lengths: np.ndarray

    def tokens(self, chosen: np.ndarray) -> list[np.ndarray]:
        return self.corpus.guide_tokens(self.texts[chosen])

    def for_actor(self, chosen: np.ndarray) -> tuple[Any, ...]:
        return self.corpus.place, self.texts[chosen]


@dataclass(frozen=True)
class _GivenInputs:
    """Token ids, joined, which travel to the actors with their shard."""

    ids: np.ndarray
    lengths: np.ndarray
    keys: Keys

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.lengths, dtype=np.int64)

    def tokens(self, chosen: np.ndarray) -> list[np.ndarray]:
        ends, lengths = self.ends[chosen].tolist(), self.lengths[chosen].tolist()
        return [self.ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def for_actor(self, chosen: np.ndarray) -> tuple[Any, ...]:
        return np.concatenate(self.tokens(chosen)), self.lengths[chosen]


def precompute(config: RunConfig, corpus: Corpus, guide: Guide, progress: Say = SAY) -> Filled:
    """Have the guide's embeddings of all texts of the corpus in the guide cache.

    Only what is missing is encoded, damaged shards again; after an interruption the next call does the rest.
    config: with absolute paths. Raises UserError.
    """
    texts = corpus.texts_in_use
    inputs = _CorpusInputs(corpus, texts, corpus.guide_keys[texts], corpus.guide_lengths[texts])
    return _precompute(config, inputs, guide, progress)


def precompute_inputs(config: RunConfig, tokens: Tokens, guide: Guide, progress: Say = SAY) -> Filled:
    """The same for any inputs, as guide.tokenize gives them; the cache finds them by token_keys(tokens)."""
    return _precompute(config, _GivenInputs(*tokens, token_keys(tokens)), guide, progress)


def _precompute(config: RunConfig, inputs: _CorpusInputs | _GivenInputs, guide: Guide, say: Say) -> Filled:
    cache = open_guide_cache(config, guide, verify=True)
    keys, lengths = inputs.keys, inputs.lengths
    work = missing_inputs(cache, keys, lengths)
    done = Encoded(work, lengths, say)
    if not work.shards:
        return Filled.of(cache, len(keys), work, done)
    num_weights = sum(parameter.numel() for parameter in guide.model.parameters())
    if 2 * num_weights * sum(done.tokens_of) <= IN_PROCESS_FLOPS and not address_of(config.cluster):
        return fill(cache, keys, inputs.tokens, lengths, guide, config.batch.tokens_at_once, progress=say)
    cache.describe(guide)
    with connected(config.cluster) as resources:
        needs = _needs(config, resources)
        num_actors = min(len(work.shards), _room(needs, resources, guide_bytes=4 * num_weights))
        told = f"{work.num_missing:,}", plural(num_actors, "actor")
        logger.info("guide cache: %s texts to encode, on %s", *told, extra=phase("guide embeddings"))
        remote: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=0)(_Actor)

        done = Encoded(work, lengths, say)  # from here: not the seconds that Ray takes to start
        _encode_on(
            num_actors,
            lambda: remote.remote(config, guide.config, guide.skipped, cache.fingerprint, needs),
            lambda number: (keys[work.shards[number]], *inputs.for_actor(work.shards[number])),
            config.cluster.max_failures,
            done,
        )
    cache.refresh()
    return Filled.of(cache, len(keys), work, done)


def _needs(config: RunConfig, resources: dict[str, float]) -> dict[str, float]:
    """What one actor takes; UserError if the cluster has less."""
    check_resources(config.cluster.model_copy(update={"num_workers": 1}), resources)
    gpus = gpus_per_worker(config.cluster, resources)
    return {"CPU": config.cluster.cpus_per_worker or 1.0} | ({"GPU": gpus} if gpus else {})


def _room(needs: dict[str, float], resources: dict[str, float], guide_bytes: int) -> int:
    """How many actors the cluster holds: one a GPU or a core, and no more than memory has room for."""
    needs = needs | {"memory": ACTOR_BYTES + 2 * guide_bytes}
    return max(1, int(min(resources.get(kind, np.inf) / each for kind, each in needs.items())))


def _encode_on(
    num_actors: int,
    start: Callable[[], ActorHandle[Any]],
    shard: Callable[[int], tuple[Any, ...]],
    max_failures: int,
    done: Encoded,
) -> None:
    """Every shard of the work to the next actor that is free. A lost actor is replaced, and its shard is the next one.

    shard: its number → arguments of encode(). UserError for what an actor raises, and for more than max_failures lost
    actors.
    """
    free: list[ActorHandle[Any]] = []
    busy: dict[int, ActorHandle[Any]] = {}

    def encode(number: int) -> ObjectRef[Any]:
        busy[number] = free.pop() if free else start()
        return busy[number].encode.remote(*shard(number))

    try:
        with Pool(encode, range(len(done.texts_of)), num_actors, end=lambda reference: None) as pool:
            for number, outcome in pool.outcomes():
                if isinstance(outcome, Failed):
                    raise failure(outcome.cause, "guide cache: encoding") from outcome.cause
                if isinstance(outcome, Lost):
                    ray.kill(busy.pop(number))
                    num_lost = pool.losses.total()
                    if num_lost > max_failures:
                        raise UserError(
                            f"guide cache: {num_lost} actors were lost (cluster.max_failures = {max_failures}), the "
                            f"last with: {one_line(outcome.error)}; run again for what is left, with a smaller "
                            "batch.chunk_tokens if memory ran out"
                        ) from outcome.error
                    logger.warning("guide cache: an actor was lost and is replaced: %s", one_line(outcome.error))
                    pool.again(number)
                    continue
                free.append(busy.pop(number))
                done.add(number)
    finally:
        for actor in (*free, *busy.values()):
            ray.kill(actor)


class _Actor:
    """Loads the guide with its first shard, encodes shards of work and writes them into the cache."""

    def __init__(
        self,
        config: RunConfig,
        guide: GuideConfig,
        skipped: list[np.ndarray],
        fingerprint: str,
        needs: dict[str, float],
    ) -> None:
        """skipped: Guide.skipped, which only knows the prompts of sources where it has seen them."""
        self.config, self.guide_config, self.skipped = config, guide, skipped
        self.fingerprint, self.needs = fingerprint, needs
        self.corpus: Corpus | None = None
        self.guide: Guide | None = None

    def _load(self) -> Guide:
        """Apart from the constructor, so that its errors are not wrapped into the actor's death."""
        torch.set_num_threads(max(1, int(self.needs["CPU"])))
        guide = Guide(self.guide_config, "cuda" if "GPU" in self.needs else "cpu")
        guide.skipped = self.skipped
        if embedding_fingerprint(guide) != self.fingerprint:
            raise UserError(
                f"guide.model: '{self.guide_config.model}' on node {platform.node()} differs from the driver's; put "
                "the same files and the same version of transformers on every node"
            )
        self.store = open_store(join(self.config.guide_cache_dir, self.fingerprint))
        return guide

    def encode(self, keys: Keys, place_or_ids: str | np.ndarray, texts_or_lengths: np.ndarray) -> None:
        """Inputs are the texts of a corpus, or token ids, joined, with the number of tokens of each."""
        self.guide = self.guide or self._load()
        if isinstance(place_or_ids, str):
            self.corpus = self.corpus or open_corpus(self.config, place_or_ids)
            tokens = self.corpus.guide_tokens(texts_or_lengths)
        else:
            tokens = np.split(place_or_ids, np.cumsum(texts_or_lengths)[:-1])
        write_shard(self.store, keys, encode_inputs(self.guide, tokens, self.config.batch.tokens_at_once))
