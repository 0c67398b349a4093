"""Batches into chunks, chunks to workers: a partition, within budget, near the least padding, nearly equal work."""

import time
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from gist_dist.core.plan import CHUNK_START_TOKENS, assign_chunks, cut_chunks, plan_batch


def lengths(seed: int, n: int, longest: int = 256) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(3, 0.8, n), 3, longest).astype(np.int32)


def cost(chunks) -> int:
    return sum(chunk.padded_tokens + CHUNK_START_TOKENS["cpu"] for chunk in chunks)


def padding(lengths: np.ndarray, padded: int) -> float:
    return 1 - int(lengths.sum()) / padded


def greedy_tokens(lengths: np.ndarray, budget: int) -> int:
    """Padded tokens when each chunk takes as many of the longest texts as fit."""
    descending, padded, start = np.sort(lengths)[::-1], 0, 0
    while start < len(descending):
        room = max(1, budget // int(descending[start]))
        padded += int(descending[start]) * len(descending[start : start + room])
        start += room
    return padded


def cheapest(lengths: np.ndarray, budget: int) -> int:
    """Over all ways to cut the sorted texts."""
    descending, n, best = np.sort(lengths)[::-1].tolist(), len(lengths), float("inf")
    for count in range(n):
        for cuts in combinations(range(1, n), count):
            bounds = [0, *cuts, n]
            sizes = [(descending[i] * (j - i), j - i) for i, j in pairwise(bounds)]
            if all(padded <= budget or texts == 1 for padded, texts in sizes):
                best = min(best, sum(padded + CHUNK_START_TOKENS["cpu"] for padded, _ in sizes))
    return int(best)


@pytest.mark.parametrize("budget", [1, 60, 252, 507, 4096, 10**6])
@pytest.mark.parametrize("n", [1, 2, 123, 1000])
def test_chunks_are_a_partition_of_descending_length_within_budget(n, budget):
    given = lengths(n, n)
    chunks = cut_chunks(given, budget)
    texts = np.concatenate([chunk.texts for chunk in chunks])
    assert sorted(texts.tolist()) == list(range(n))
    assert (np.diff(given[texts]) <= 0).all()
    for chunk in chunks:
        assert chunk.padded_tokens <= budget or len(chunk.texts) == 1
        assert chunk.longest == given[chunk.texts].max()
        assert chunk.num_tokens == given[chunk.texts].sum()
        assert chunk.padded_tokens == len(chunk.texts) * chunk.longest


def test_chunks_are_the_cheapest_or_nearly():
    rng = np.random.default_rng(0)
    excess = []
    for _ in range(150):
        given = rng.integers(3, rng.choice([6, 40, 200]), rng.integers(1, 11)).astype(np.int32)
        budget = int(rng.integers(3, 500))
        excess.append(cost(cut_chunks(given, budget)) / cheapest(given, budget) - 1)
    assert max(excess) < 0.1
    assert np.mean(excess) < 0.005


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
@pytest.mark.parametrize("name", ["qqp_duplicates", "paper_title_abstract", "squad_question_sentence", "all"])
def test_real_lengths_are_padded_by_less_than_a_twentieth(shared_data: Path, name, budget):
    names = ["qqp_duplicates", "paper_title_abstract", "squad_question_sentence"] if name == "all" else [name]
    tables = [pq.read_table(shared_data / "train" / f"{n}.parquet", columns=["anchor", "positive"]) for n in names]
    words = np.array([len(text.split()) for t in tables for column in t.columns for text in column.to_pylist()])
    tokens = np.minimum(2 + words * 4 // 3, 256).astype(np.int32)
    for num_rows in (1024, 4096):
        given = np.random.default_rng(1).choice(tokens, 2 * num_rows, replace=False)
        ours = sum(chunk.padded_tokens for chunk in cut_chunks(given, budget))
        assert padding(given, ours) < 0.05
        assert ours < greedy_tokens(given, budget)


def test_equal_lengths_fill_every_chunk():
    chunks = cut_chunks(np.full(1000, 10, np.int32), 100)
    assert [len(chunk.texts) for chunk in chunks] == [10] * 100


def test_chunks_are_deterministic_and_blind_to_ties():
    given = lengths(3, 500, longest=20)
    first, second = cut_chunks(given, 512), cut_chunks(given.copy(), 512)
    assert all(np.array_equal(a.texts, b.texts) for a, b in zip(first, second, strict=True))
    assert all((np.diff(c.texts)[np.diff(given[c.texts]) == 0] > 0).all() for c in first)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8, 64, 1000])
def test_work_is_dealt_equally(num_workers):
    chunks = cut_chunks(lengths(5, 3000), 2048)
    chunks_by_rank = assign_chunks(chunks, num_workers)
    assert len(chunks_by_rank) == num_workers
    assert sorted(number for own in chunks_by_rank for number in own) == list(range(len(chunks)))
    loads = [sum(chunks[number].padded_tokens for number in own) for own in chunks_by_rank]
    assert max(loads) - min(loads) <= max(chunk.padded_tokens for chunk in chunks)
    assert all(own == sorted(own) for own in chunks_by_rank)
    assert chunks_by_rank == assign_chunks(chunks, num_workers)
    if num_workers > len(chunks):
        assert [] in chunks_by_rank


def test_a_large_batch_is_planned_in_well_under_a_second():
    given = lengths(0, 131_072, longest=512)
    started = time.process_time()
    chunks = cut_chunks(given, 4096)
    assign_chunks(chunks, 64)
    assert time.process_time() - started < 1
    assert padding(given, sum(chunk.padded_tokens for chunk in chunks)) < 0.01


def test_a_plan_has_every_text_of_its_rows_once(tmp_path):
    rows = [
        {"anchor": "amber basin", "positive": "cedar", "negatives": ["delta", "ember"]},
        {"anchor": "cedar", "positive": "amber basin", "negatives": []},
        {"anchor": "fjord", "positive": "Fjord", "negatives": ["delta"]},
        {"anchor": "grove", "positive": "kelp kelp kelp kelp"},
    ]
    student = tiny.save_tiny_model(tmp_path / "student")
    data = tiny.write_jsonl(tmp_path / "x.jsonl", rows)
    _, corpus = tiny.prepared(tiny.recipe(tmp_path, student, student, data, batch={"global_size": 3}))
    chosen = np.array([2, 0, 1])
    plan = plan_batch(corpus, chosen, step=7, rule=8, with_guide=True)
    texts = [corpus.text(text) for text in plan.texts.tolist()]
    assert sorted(texts) == sorted(["amber basin", "cedar", "delta", "ember", "fjord", "Fjord"])
    assert [texts[i] for i in plan.anchors] == ["fjord", "amber basin", "cedar"]
    assert [texts[i] for i in plan.positives] == ["Fjord", "cedar", "amber basin"]
    assert [texts[i] for i in plan.negatives] == ["delta", "delta", "ember"]
    same = {(texts[i], texts[j]) for i, j in combinations(range(6), 2) if plan.identity[i] == plan.identity[j]}
    assert same in ({("fjord", "Fjord")}, {("Fjord", "fjord")})  # equal to the uncased student
    inputs = [texts[i] for i in np.searchsorted(plan.texts, plan.guide_inputs)]
    assert [inputs[i].lower() for i in plan.guide_input_of] == [text.lower() for text in texts]
    assert len(inputs) == 5  # the guide is uncased as well
    for chunks, lengths in (
        (plan.student_chunks, corpus.student_lengths[plan.texts]),
        (plan.guide_chunks, corpus.guide_lengths[plan.guide_inputs]),
    ):
        assert sorted(np.concatenate([c.texts for c in chunks]).tolist()) == list(range(len(lengths)))
        assert sum(c.num_tokens for c in chunks) == lengths.sum()
    assert plan.num_tokens <= plan.padded_tokens == sum(c.padded_tokens for c in plan.student_chunks)
    assert plan_batch(corpus, chosen, 7, 8, with_guide=False).guide_chunks == ()
