"""Classification sets as training data, the way of GISTEmbed's MTEBcls (Solatorio 2024, arXiv:2402.16829).

# Axes:  n texts of the set   e guide width   m triplets   c distinct texts of one label   b of them at once
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_atomically
from gist_dist.config import Columns, SourceConfig, Triplets
from gist_dist.data.sources import PART_ROWS

logger = logging.getLogger(__name__)

GRID = 2.0**24
"""Embeddings are rounded to multiples of 1/GRID, as all fp16 numbers are. Sums of products of unit vectors of such
numbers are exact in fp64 in any order: block size, threads and BLAS don't decide which of two near texts is nearer."""
BLOCK_BYTES = 64 * 2**20
"""Size of one block of similarities."""


def make_triplets(
    labels: Integer[np.ndarray, " n"],
    identity: Integer[np.ndarray, " n"],
    embeddings: Float[np.ndarray, "n e"],
    config: Triplets,
    seed: int,
    where: str = "columns.label",
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """(anchor, positive, negative) for every text, as indices into the set.

    Texts of equal ``identity`` are copies of each other; drawn is always the first of them. The positive is drawn by
    softmax(similarity / temperature) from the ``neighbors`` nearest other texts of the anchor's label, the negative
    uniformly from the texts that never have that label. ``embeddings`` are unit vectors. Texts whose label has no other
    text are left out, and counted in the log. UserError, beginning with ``where``, if there is one label, or if every
    text would be left out.
    """
    if len(np.unique(labels)) < 2:
        raise UserError(f"{where}: all {len(labels):,} texts have the same label; negatives need texts of a second one")
    _, first, distinct = np.unique(identity, return_index=True, return_inverse=True)
    draws = np.random.default_rng(seed).random((len(labels), 2))  # two a text, whatever becomes of the others
    positive, negative = np.full((2, len(labels)), -1)
    for anchors in _classes(labels):
        members = np.unique(distinct[anchors])
        num_others = len(first) - len(members)
        if len(members) == 1 or num_others == 0:
            continue
        vectors = torch.from_numpy(np.round(embeddings[first[members]].astype(np.float64) * GRID) / GRID)
        own = np.searchsorted(members, distinct[anchors])
        block = max(1, BLOCK_BYTES // vectors[:, 0].nbytes)
        for rows in (slice(start, start + block) for start in range(0, len(anchors), block)):
            drawn = _draw_neighbor(vectors, own[rows], draws[anchors[rows], 0], config)
            positive[anchors[rows]] = first[members[drawn]]
        rank = np.floor(draws[anchors, 1] * num_others).astype(np.int64)
        negative[anchors] = first[_outside(members, rank)]
    (anchor,) = np.nonzero(positive >= 0)
    if not len(anchor):
        raise UserError(f"{where}: no label has two distinct texts and texts without it; correct the columns")
    if left_out := len(labels) - len(anchor):
        logger.info("%s: %d of %d texts left out, alone with their label", where, left_out, len(labels))
    return anchor, positive[anchor], negative[anchor]


def _classes(labels: Integer[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " _"]]:
    """The texts of each label."""
    order = np.argsort(labels, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _draw_neighbor(
    vectors: Float[Tensor, "c e"], own: Int[np.ndarray, " b"], draws: Float[np.ndarray, " b"], config: Triplets
) -> Int[np.ndarray, " b"]:
    """One of the nearest of ``vectors`` for each of those in ``own``, never itself."""
    similarity = vectors[own] @ vectors.T
    similarity[torch.arange(len(own)), torch.from_numpy(own)] = -torch.inf
    nearest, places = similarity.topk(min(config.neighbors, len(vectors) - 1))
    weights = np.exp((nearest - nearest[:, :1]).numpy() / config.temperature)
    ends = np.cumsum(weights, axis=1)
    chosen = (ends[:, :-1] <= draws[:, None] * ends[:, -1:]).sum(axis=1)
    return places.numpy()[np.arange(len(own)), chosen]


def _outside(members: Int[np.ndarray, " c"], rank: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    """The numbers at these ranks among those that are not in ``members``, which is sorted."""
    return rank + np.searchsorted(members - np.arange(len(members)), rank, side="right")


def write_triplets(
    path: Path, texts: Sequence[str], labels: Sequence[str], triplets: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """A parquet file of the columns anchor, positive, negative and label (the anchor's), whole or not there."""
    column = pa.array(texts, pa.large_string())
    roles = ("anchor", "positive", "negative")
    columns = {role: column.take(pa.array(numbers)) for role, numbers in zip(roles, triplets, strict=True)}
    table = pa.table(columns | {"label": pa.array(labels, pa.large_string()).take(pa.array(triplets[0]))})
    write_atomically(path, lambda aside: pa.parquet.write_table(table, aside, row_group_size=PART_ROWS))


def triplet_source(source: SourceConfig, path: Path | str) -> SourceConfig:
    """The classification set as a source of triplets: of the same name, weight and prompts, already filtered."""
    return SourceConfig(
        path=str(path),
        name=source.label,
        columns=Columns(negatives=("negative",), label="label"),
        prompts=source.prompts,
        weight=source.weight,
        loss=source.loss,
    )
