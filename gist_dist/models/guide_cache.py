"""The guide's embedding of every distinct input, on disk: encoded once for each guide, read by memory map.

<place>/<fingerprint>/<sha256>-<bytes>.arrow   key, embedding: a shard, named by what it must hold
                      meta.json                whose embeddings these are

The fingerprint is the guide's: another guide, or the same one with other weights, has a folder of its own. A key is
the hash of an input's token ids, as the corpus has it.
"""

# Axes:  n inputs   e width of the guide

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Int64, UInt64

from gist_dist.common.errors import Damaged, UserError
from gist_dist.common.progress import Progress, Say, progress_of
from gist_dist.common.storage import Store, check_file, copies_folder, join, open_store
from gist_dist.common.storage import local_copy as copy_to_node
from gist_dist.common.version import __version__
from gist_dist.config import RunConfig
from gist_dist.core.plan import cut_chunks
from gist_dist.models.encoder import Encoder, Guide

logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"([0-9a-f]{64})-(\d+)\.arrow")
MAX_SHARD_TEXTS = 2**14
MIN_SHARD_TOKENS, MAX_SHARD_TOKENS = 2**16, 2**20
AIMED_AT_SHARDS = 512
"""Enough that workers end together and little is lost with one; fewer where there is little to encode."""
UNTOLD = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Keys of a transformers config that say nothing about embeddings, or what the weights themselves tell."""

Keys = UInt64[np.ndarray, "n 2"]
SAY = progress_of(logger, "guide embeddings")


@dataclass(frozen=True)
class Shard:
    """One file of embeddings, memory-mapped."""

    keys: Keys
    embeddings: Float16[np.ndarray, "n e"]


class GuideCache:
    """The shards of one guide. A position counts the inputs of all of them, one shard after another.

    Other processes may write shards meanwhile: refresh() takes them up, and positions found before stay right.
    """

    def __init__(
        self, place: str, fingerprint: str, width: int, local_copy: str | None = None, verify: bool = False
    ) -> None:
        """place: path or URI with a folder for each guide. local_copy: data.local_copy. verify: read all shards in full
        and remove the damaged ones, whose inputs are then encoded again. One process does so before training; the
        others trust it, and check what they copy to their node. UserError for a place that can't be read."""
        self.place, self.fingerprint = join(place, fingerprint), fingerprint
        self.width, self.verify = width, verify
        self.store = open_store(self.place)
        in_place = self.store.local if local_copy is None else None
        self.is_copied = in_place is None
        self.folder = in_place or copies_folder(local_copy, "guide_cache", fingerprint)
        self.names: list[str] = []
        self.shards: list[Shard] = []
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that are new. A damaged one is named in the log and left out."""
        try:
            infos, known = self.store.infos(), set(self.names)
            # Oldest first: of an input that is in two shards, every process then finds the same, whenever it looks.
            new = sorted(infos.keys() - known, key=lambda name: (infos[name].modified, name))
            new = [name for name in new if SHARD_NAME.fullmatch(name)]
            if new and self.is_copied and not self.verify:
                copy_to_node(self.store, {name: _told_by(name)[0] for name in new}, self.folder)
            with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter
                opened = list(pool.map(self._open, new))
        except OSError as error:
            raise UserError(f"{self.place}: guide embeddings can't be read there: {error}") from error
        for name, shard in zip(new, opened, strict=True):
            if shard is not None:
                self.names.append(name)
                self.shards.append(shard)
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in self.shards)])
        self.__dict__.pop("_index", None)

    def __len__(self) -> int:
        """Inputs, those in several shards counted as often."""
        return int(self._starts[-1])

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum(_told_by(name)[1] for name in self.names)

    def find(self, keys: Keys) -> Int64[np.ndarray, " n"]:
        """Position of every key, -1 where it is missing."""
        first, second, order = self._index
        positions, undecided = np.full(len(keys), -1), np.arange(len(keys))
        at = np.searchsorted(first, keys[:, 0])
        while len(undecided):  # once, and again for as long as only the first halves are equal
            undecided = undecided[at[undecided] < len(first)]
            undecided = undecided[first[at[undecided]] == keys[undecided, 0]]
            is_found = second[at[undecided]] == keys[undecided, 1]
            found, undecided = undecided[is_found], undecided[~is_found]
            positions[found] = order[at[found]]
            at[undecided] += 1
        return positions

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First halves of all keys, sorted, with their second halves and positions."""
        keys = np.concatenate([shard.keys for shard in self.shards] or [np.empty((0, 2), np.uint64)])
        order = np.argsort(keys[:, 0], kind="stable")
        return keys[order, 0], keys[order, 1], order

    def embeddings(self, positions: Int64[np.ndarray, " n"]) -> Float16[np.ndarray, "n e"]:
        """Read from the memory maps, shard after shard."""
        order = np.argsort(positions)
        bounds = np.searchsorted(positions, self._starts, sorter=order)
        assert bounds[0] == 0 and bounds[-1] == len(positions), "a position that find() has not given"
        embeddings = np.empty((len(positions), self.width), np.float16)
        for shard in np.flatnonzero(np.diff(bounds)):
            rows = order[bounds[shard] : bounds[shard + 1]]
            embeddings[rows] = self.shards[shard].embeddings[positions[rows] - self._starts[shard]]
        return embeddings

    def write(self, keys: Keys, embeddings: Float16[np.ndarray, "n e"]) -> None:
        """A shard, whole or not at all; equal contents are the same file. refresh() opens it."""
        write_shard(self.store, keys, embeddings)

    def describe(self, guide: Encoder) -> None:
        """Say in meta.json whose embeddings these are, where nobody has."""
        if not self.store.exists("meta.json"):
            told = {"model": guide.config.model, "revision": guide.config.revision, "width": guide.width}
            told |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "gist_dist": __version__}
            _write(self.store, "meta.json", json.dumps(told, indent=1).encode())

    def remove(self) -> None:
        """All embeddings of this guide, and this node's copies."""
        for name in self.store.list():
            self.store.delete(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, name: str) -> Shard | None:
        path = self.folder / name
        try:
            if self.verify:
                self._check(name, path)
            shard = _read_shard(path, self.width)
            if self.verify and not _is_finite(shard.embeddings):
                raise Damaged("it holds numbers that are not finite")
            return shard
        except Damaged as damage:
            logger.warning("%s is left out and its inputs are encoded again: %s", join(self.place, name), damage)
            if self.verify:
                self.store.delete(name)
            return None

    def _check(self, name: str, path: Path) -> None:
        """Damaged unless it is as it was written; a damaged copy is fetched again."""
        digest, size = _told_by(name)
        try:
            check_file(path, size, digest)
        except Damaged:
            if not self.is_copied:
                raise
            self.store.download(name, path)
            check_file(path, size, digest)


def write_shard(store: Store, keys: Keys, embeddings: Float16[np.ndarray, "n e"]) -> None:
    width = embeddings.shape[1]
    columns = [_vectors(keys, 2), _vectors(embeddings, width)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _schema(width)) as file:
        file.write_batch(pa.record_batch(columns, schema=_schema(width)))
    content = sink.getvalue()
    _write(store, f"{hashlib.sha256(content).hexdigest()}-{len(content)}.arrow", content)


def _write(store: Store, name: str, content: bytes | pa.Buffer) -> None:
    try:
        store.write_bytes(name, content)
    except OSError as error:
        raise UserError(
            f"{store.place}: guide embeddings can't be written there: {error}; set guide.cache_dir"
        ) from error


def _read_shard(path: Path, width: int) -> Shard:
    check_file(path, _told_by(path.name)[1], None)
    with pa.memory_map(str(path)) as file:  # closed, since a process may open 1,024 files; the mapping stays
        content = file.read_buffer()
    try:
        batch = pa.ipc.open_file(content).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"it is no Arrow file: {error}") from error
    if batch.schema != _schema(width):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
        raise Damaged(f"it holds {found}, not vectors of width {width}")
    return Shard(*(column.values.to_numpy().reshape(batch.num_rows, -1) for column in batch.columns))


def _is_finite(embeddings: Float16[np.ndarray, "n e"]) -> bool:
    """A third of np.isfinite's time."""
    return bool((embeddings.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0) < 0x7C00)


def _schema(width: int) -> pa.Schema:
    return pa.schema({"key": pa.list_(pa.uint64(), 2), "embedding": pa.list_(pa.float16(), width)})


def _vectors(rows: np.ndarray, width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), width)


def _told_by(name: str) -> tuple[str, int]:
    """SHA-256 and bytes of a shard."""
    told = SHARD_NAME.fullmatch(name)
    assert told, name
    digest, size = told.groups()
    return digest, int(size)


def embedding_fingerprint(encoder: Encoder) -> str:
    """Hash of everything that decides its embeddings, wherever the model lies and on whichever device."""
    weights = sorted(encoder.model.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        digests = list(pool.map(lambda named: _digest(*named), weights))
    described = {
        "weights": digests,
        "modules": [_module_config(module) for module in encoder.model],
        "tokens": encoder.tokenizer_fingerprint(),  # with the limit of tokens
        "precision": encoder.config.precision,
        "width": encoder.width,
    }
    if encoder.skipped:  # prompts that are not pooled
        described["skipped"] = sorted(ids.tolist() for ids in encoder.skipped)
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _digest(name: str, tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data.data).hexdigest()}"


def _module_config(module: torch.nn.Module) -> dict[str, Any]:
    described = {"type": type(module).__name__, **getattr(module, "get_config_dict", dict)()}
    transformer = getattr(getattr(module, "model", None), "config", None)
    if transformer is not None:  # heads, activation, epsilon: what shapes don't show
        told = transformer.to_dict().items()
        described["transformer"] = {k: v for k, v in told if k not in UNTOLD and "dropout" not in k}
    return described


class Work(NamedTuple):
    """What is to be encoded."""

    shards: list[np.ndarray]
    """Indices of one input for each key that is missing; of similar length and about as many tokens in every shard."""
    num_inputs: int
    """Distinct keys, found or missing."""

    @property
    def num_missing(self) -> int:
        return sum(map(len, self.shards))


def missing_inputs(cache: GuideCache, keys: Keys, lengths: np.ndarray) -> Work:
    """What the cache lacks, longest inputs first, so that a chunk too large for memory shows at once."""
    distinct = _first_of_each(keys)
    missing = distinct[cache.find(keys[distinct]) < 0]
    order = missing[np.argsort(-lengths[missing].astype(np.int64), kind="stable")]
    tokens = np.cumsum(lengths[order], dtype=np.int64)
    if not len(order):
        return Work([], len(distinct))
    target = np.clip(tokens[-1] // AIMED_AT_SHARDS, MIN_SHARD_TOKENS, MAX_SHARD_TOKENS)
    parts = np.split(order, np.flatnonzero(np.diff(tokens // target)) + 1)
    return Work([s for part in parts for s in np.array_split(part, -(-len(part) // MAX_SHARD_TEXTS))], len(distinct))


def _first_of_each(keys: Keys) -> np.ndarray:
    """Index of the first of every run of equal keys, were they sorted."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return order[is_new]


@dataclass(frozen=True)
class Filled:
    """What it took to have the embeddings of all inputs."""

    place: str
    num_texts: int
    """Asked for."""
    num_inputs: int
    """Distinct ones among them."""
    num_encoded: int
    """The others were there before."""
    num_tokens: int
    """Tokens that were encoded, without padding."""
    seconds: float
    num_bytes: int
    """Size of this guide's whole cache on disk."""

    @classmethod
    def of(cls, cache: GuideCache, num_texts: int, work: Work, done: "Encoded") -> "Filled":
        tokens, seconds = sum(done.tokens_of), done.seconds
        return cls(cache.place, num_texts, work.num_inputs, work.num_missing, tokens, seconds, cache.num_bytes)

    def lines(self) -> list[str]:
        """For the user."""
        rate = self.num_tokens / max(self.seconds, 1e-9)
        return [
            f"{self.num_texts:,} texts are {self.num_inputs:,} distinct inputs of the guide",
            f"{self.num_inputs - self.num_encoded:,} were there before; {self.num_encoded:,} encoded in "
            f"{self.seconds:.1f} s ({rate:,.0f} tokens/s)",
            f"{self.place} holds {self.num_bytes / 1e6:,.1f} MB",
        ]


class Encoded:
    """How much of the work is encoded, and how fast."""

    def __init__(self, work: Work, lengths: np.ndarray, say: Say) -> None:
        self.tokens_of = [int(lengths[shard].sum(dtype=np.int64)) for shard in work.shards]
        self.texts_of = [len(shard) for shard in work.shards]
        self.texts = self.tokens = 0
        self.progress = Progress(sum(self.tokens_of), say)

    @property
    def seconds(self) -> float:
        return self.progress.seconds

    def add(self, shard: int) -> None:
        self.texts += self.texts_of[shard]
        self.tokens += self.tokens_of[shard]
        self.progress.reach(self.tokens, self.describe())

    def describe(self) -> str:
        texts, tokens = self.texts / self.seconds, self.tokens / self.seconds
        return (
            f"guide cache: {self.texts:,} of {sum(self.texts_of):,} texts, {texts:,.0f} texts/s, {tokens:,.0f} tokens/s"
        )


def fill(
    cache: GuideCache,
    keys: Keys,
    tokens_of: Callable[[np.ndarray], Sequence[np.ndarray]],
    lengths: np.ndarray,
    guide: Guide,
    chunk_tokens: int,
    share: tuple[int, int] = (0, 1),
    progress: Say = SAY,
) -> Filled:
    """Encode in this process what the cache lacks of these inputs, and open it.

    tokens_of: indices → token ids of these inputs. share: (rank, size): of several processes with equal arguments each
    encodes a part; once all have returned, refresh() opens the parts of the others. UserError for embeddings that are
    not finite.
    """
    rank, size = share
    # By key, so that the parts stay the same however much of the others' is written already.
    own = np.flatnonzero(keys[:, 1] % np.uint64(size) == rank)
    work = missing_inputs(cache, keys[own], lengths[own])
    if work.shards:
        cache.describe(guide)
    done = Encoded(work, lengths[own], progress)
    for number, shard in enumerate(work.shards):
        cache.write(keys[own[shard]], encode_inputs(guide, tokens_of(own[shard]), chunk_tokens))
        done.add(number)
    cache.refresh()
    return Filled.of(cache, len(own), work, done)


def encode_inputs(guide: Guide, tokens: Sequence[np.ndarray], chunk_tokens: int) -> Float16[np.ndarray, "n e"]:
    """In chunks of similar length; UserError for embeddings that are not finite."""
    chunks = cut_chunks(np.array([len(ids) for ids in tokens]), chunk_tokens)
    encoded = [guide.encode([tokens[i] for i in chunk.texts]).half() for chunk in chunks]
    embeddings = np.empty((len(tokens), guide.width), np.float16)
    embeddings[np.concatenate([chunk.texts for chunk in chunks])] = torch.cat(encoded).cpu().numpy()
    if num_broken := int((~np.isfinite(embeddings).all(axis=1)).sum()):
        raise UserError(
            f"guide.model: '{guide.config.model}' gives embeddings that are not finite for {num_broken:,} of "
            f"{len(tokens):,} texts with guide.precision={guide.config.precision}; use fp32 or another guide"
        )
    return embeddings


def open_guide_cache(config: RunConfig, guide: Encoder, verify: bool = False) -> GuideCache:
    """This guide's cache, where the recipe keeps guide embeddings."""
    place = config.guide_cache_dir
    return GuideCache(place, embedding_fingerprint(guide), guide.width, config.data.local_copy, verify)
