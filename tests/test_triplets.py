"""Triplets of classification sets: near positives of the same label, negatives of others, the same every time."""

import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from facts import assert_tells

from gist_dist.common.errors import UserError
from gist_dist.config import DataConfig, SourceConfig, Triplets
from gist_dist.data import triplets as module
from gist_dist.data.sources import open_sources
from gist_dist.data.triplets import make_triplets, triplet_source, write_triplets


def clustered(n=400, num_labels=7, width=24, copies=60, seed=0):
    """Labels, identities (some texts are there twice or more, some under two labels), unit embeddings."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_labels, size=n)
    identity = np.arange(n)
    identity[generator.choice(n, copies, replace=False)] = generator.integers(n // 4, size=copies)
    vectors = generator.normal(size=(n, width)) + 1.5 * generator.normal(size=(num_labels, width))[labels]
    vectors = vectors[np.unique(identity, return_index=True)[1]][np.unique(identity, return_inverse=True)[1]]
    return labels, identity, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def admissible(i, labels, identity, embeddings, config):
    """By the definition, one text at a time: {identity: probability} of the positive, identities of negatives."""
    others = {identity[j]: j for j in range(len(labels)) if labels[j] == labels[i] and identity[j] != identity[i]}
    nearest = sorted(others, key=lambda text: -float(embeddings[others[text]] @ embeddings[i]))[: config.neighbors]
    scores = np.array([float(embeddings[others[text]] @ embeddings[i]) for text in nearest]) / config.temperature
    weights = np.exp(scores - scores.max()) if len(scores) else scores
    of_label = set(identity[labels == labels[i]])
    return dict(zip(nearest, weights / weights.sum(), strict=True)), set(identity) - of_label


def test_every_triplet_is_of_the_definition():
    labels, identity, embeddings = clustered()
    config = Triplets(neighbors=5)
    anchor, positive, negative = make_triplets(labels, identity, embeddings, config, seed=1)
    assert anchor.tolist() == list(range(len(labels)))
    for i, p, n in zip(anchor, positive, negative, strict=True):
        chances, negatives = admissible(i, labels, identity, embeddings, config)
        assert identity[p] in chances and len(chances) == 5
        assert identity[n] in negatives and labels[n] != labels[i]
        assert len({identity[i], identity[p], identity[n]}) == 3
    # Copies were in the way: of some text under its own label, and of some under another.
    own_copies = [(labels == labels[i]) & (identity == identity[i]) for i in anchor]
    assert max(map(np.sum, own_copies)) > 1
    assert any(len(set(labels[identity == text])) > 1 for text in identity)


def test_draws_follow_the_softmax_and_the_uniform_distribution():
    """Of one text with many copies, each of which draws for itself."""
    labels, identity, embeddings = clustered(n=60, num_labels=3, copies=6)
    config, times = Triplets(neighbors=4, temperature=0.1), 8000
    chances, negatives = admissible(7, labels, identity, embeddings, config)
    labels, identity = np.append(labels, [labels[7]] * times), np.append(identity, [identity[7]] * times)
    embeddings = np.append(embeddings, np.repeat(embeddings[7:8], times, axis=0), axis=0)
    _, positive, negative = make_triplets(labels, identity, embeddings, config, seed=0)
    assert max(chances.values()) > 1.5 * min(chances.values())
    for text, chance in chances.items():
        assert abs((identity[positive[60:]] == text).mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / times)
    texts, counts = np.unique(identity[negative[60:]], return_counts=True)
    assert set(texts) == negatives
    expected = times / len(negatives)
    assert ((counts - expected) ** 2 / expected).sum() < len(negatives) + 4 * np.sqrt(2 * len(negatives))  # χ²


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_neither_blocks_nor_threads_change_a_triplet(monkeypatch, dtype):
    labels, identity, embeddings = clustered(n=600, num_labels=2, width=384)
    embeddings = embeddings.astype(dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for block_bytes, num_threads in ((2**26, 1), (2**26, 2), (40_000, 1), (1, 1)):
            monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
            torch.set_num_threads(num_threads)
            results.append(make_triplets(labels, identity, embeddings, Triplets(), seed=3))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not np.array_equal(results[0][1], make_triplets(labels, identity, embeddings, Triplets(), seed=4)[1])


def test_similarities_are_exact_on_the_grid():
    """In whatever order they are summed, which those of fp32 numbers are not; fp16 numbers are on the grid."""
    _, _, embeddings = clustered(n=200, width=384)
    other_way = np.random.default_rng(0).permutation(384)

    def sums_agree(vectors):
        return np.array_equal(vectors @ vectors.T, vectors[:, other_way] @ vectors[:, other_way].T)

    embeddings = embeddings.astype(np.float64)
    assert sums_agree(np.round(embeddings * module.GRID) / module.GRID) and not sums_agree(embeddings)
    halves = embeddings.astype(np.float16).astype(np.float64)
    assert np.array_equal(np.round(halves * module.GRID) / module.GRID, halves)


def test_texts_alone_with_their_label_are_left_out_and_counted(caplog):
    labels, identity = np.array([0, 0, 1, 2, 2, 2]), np.array([10, 11, 12, 13, 13, 13])
    with caplog.at_level(logging.INFO):
        anchor, positive, negative = make_triplets(labels, identity, np.eye(6), Triplets(), 0, "data.sources[3]")
    assert anchor.tolist() == [0, 1] and positive.tolist() == [1, 0] and set(negative) <= {2, 3}
    assert caplog.messages == ["data.sources[3]: 4 of 6 texts left out, alone with their label"]


def test_sets_that_give_no_triplets_are_refused():
    with pytest.raises(UserError) as caught:
        make_triplets(np.zeros(4, int), np.arange(4), np.eye(4), Triplets(), 0, "data.sources[0]")
    assert_tells(str(caught.value), "data.sources[0] … 4 texts … same label … second")
    for labels, identity in ((np.arange(4), np.arange(4)), (np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))):
        with pytest.raises(UserError, match="two distinct texts"):
            make_triplets(labels, identity, np.eye(4), Triplets(), 0)


def test_a_classification_set_becomes_a_source_of_triplets(tmp_path, shared_data):
    """Banking77 as it is: read, made into triplets, written, and read as a source like others."""
    config = SourceConfig(
        path=str(shared_data / "mteb" / "Banking77Classification" / "default"),
        split="train",
        columns={"text": "text", "label": "label"},
        name="banking",
        weight=2.0,
        filters={"max_words": 12},
        prompts={"student": {"anchor": "intent: "}},
    )
    source = open_sources(DataConfig(sources=(config,)))[0]
    texts, classes = map(list, zip(*source.labelled(), strict=True))
    assert source.report.rows_read == 10_003 and source.report.rows_used == len(texts) < 8000
    assert list(source.report.dropped) == ["text has more than 12 words (filters.max_words)"]
    labels, identity = (np.unique(values, return_inverse=True)[1] for values in (classes, texts))
    vectors = np.random.default_rng(0).normal(size=(len(texts), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    triplets = make_triplets(labels, identity, vectors, config.triplets, seed=0)
    write_triplets(tmp_path / "deep" / "banking.parquet", texts, classes, triplets)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["banking.parquet"]
    assert pq.read_schema(tmp_path / "deep" / "banking.parquet").names == ["anchor", "positive", "negative", "label"]

    made = triplet_source(config, tmp_path / "deep" / "banking.parquet")
    assert (made.label, made.weight, made.prompts) == ("banking", 2.0, config.prompts)
    rows = list(open_sources(DataConfig(sources=(made,), root="elsewhere"))[0].read())
    assert [(row.anchor, row.positive, *row.negatives) for row in rows] == [
        (texts[a], texts[p], texts[n]) for a, p, n in zip(*triplets, strict=True)
    ]
    assert [row.label for row in rows] == [classes[a] for a in triplets[0]]
    label_of = dict(zip(texts, classes, strict=True))
    assert len(rows) > 6000 and all(label_of[row.anchor] != label_of[row.negatives[0]] for row in rows[:500])
