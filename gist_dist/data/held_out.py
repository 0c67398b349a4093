"""Rows that are not trained on but scored: data.hold_out.

Whole clusters: rows that share a text, or that known positives join over any number of steps, are held out together,
so that nothing of what is scored was trained on. Which ones is a function of the corpus, the seed and the share.
"""

# Axes:  r rows of the corpus   h held-out rows

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.config import RunConfig
from gist_dist.data.row_rules import joined_by_pairs, pairs_of_labels

if TYPE_CHECKING:
    from gist_dist.data.corpus import Corpus

PURPOSE = 3
"""What a seed is for, as a number; the sampler has those before it."""


def held_out_rows(config: RunConfig, corpus: "Corpus") -> Int[np.ndarray, " h"]:
    """Row numbers, ascending: at most the share of data.hold_out, none without it. UserError where not even one cluster
    is as small as that."""
    share = config.data.hold_out
    if share is None:
        return np.empty(0, np.int64)
    cluster, sizes = row_clusters(corpus)
    wanted, taken = round(share * corpus.num_rows), np.zeros(len(sizes), dtype=bool)
    left = wanted
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(config.seed, spawn_key=(PURPOSE,))))
    for number in rng.permutation(len(sizes)).tolist():
        if sizes[number] <= left:
            taken[number] = True
            left -= int(sizes[number])
        if not left:
            break
    if taken.sum() < 2:
        raise UserError(
            f"data.hold_out = {share:g}: of {corpus.num_rows:,} rows that is {wanted:,}, and the smallest of "
            f"{len(sizes):,} clusters of rows that mean the same have {', '.join(map(str, np.sort(sizes)[:2]))}; at "
            "least two clusters are held out: raise it, or leave it out"
        )
    return np.flatnonzero(taken[cluster])


def row_clusters(corpus: "Corpus") -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " clusters"]]:
    """The cluster of every row, and how many rows each has."""
    ids = np.unique(corpus.identity, return_inverse=True)[1]
    anchors, (first, second) = ids[corpus.anchors], corpus.pairs
    labels = [] if corpus.label is None else [pairs_of_labels(anchors, corpus.label)]
    group = joined_by_pairs([(ids[first], ids[second]), *labels], int(ids.max(initial=-1)) + 1)[anchors]
    cluster = np.unique(group, return_inverse=True)[1]
    return cluster, np.bincount(cluster)


def write_evaluation_set(corpus: "Corpus", rows: Int[np.ndarray, " h"], folder: Path) -> None:
    """The held-out rows as a retrieval set: each anchor is asked for the positives of its cluster, among the positives
    of all held-out rows. A text that differs from the query alone counts: one that is it is no finding."""
    cluster = row_clusters(corpus)[0][rows]
    queries = _distinct(corpus, corpus.anchors[rows], cluster)
    positives = np.concatenate([corpus.positives[rows], corpus.further_of(rows)])
    documents = _distinct(corpus, positives, np.concatenate([cluster, np.repeat(cluster, corpus.num_further[rows])]))
    members: dict[int, list[str]] = {}
    for name, of in documents.values():
        members.setdefault(of, []).append(name)
    relevant, asked = list[str](), list[str]()
    for text, (name, of) in queries.items():
        own = documents.get(text, ("", 0))[0]
        found = [document for document in members[of] if document != own]
        if found:
            asked.append(json.dumps({"_id": name, "text": text}, ensure_ascii=False))
            relevant += [json.dumps({"query-id": name, "corpus-id": document, "score": 1}) for document in found]
    if not asked:
        raise UserError("data.hold_out: every held-out anchor equals its positive, so that there is nothing to find")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"_id": name, "text": text}, ensure_ascii=False) for text, (name, _) in documents.items()]
    for name, content in {"corpus": lines, "queries": asked, "qrels": relevant}.items():
        write_text(folder / f"{name}.jsonl", "\n".join(content) + "\n")


def _distinct(corpus: "Corpus", texts: np.ndarray, cluster: np.ndarray) -> dict[str, tuple[str, int]]:
    """Text -> its name and its cluster; texts that are equal but for their prompts are one."""
    found: dict[str, tuple[str, int]] = {}
    for text, of in zip(texts.tolist(), cluster.tolist(), strict=True):
        found.setdefault(corpus.text(text), (f"t{text}", of))
    return found
