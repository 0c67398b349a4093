"""Global batches: every row once, no text twice where that can be had, and nothing but (data, seed, step) decides."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tiny

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import SMALLEST_BATCH, Sampler, share_epoch
from gist_dist.data.statistics import repeated_texts, source_accounts
from gist_dist.recipe import parse_config


class Rows(Corpus):
    """What a sampler needs of a corpus, made of plain lists: (anchor, positive, [negatives], source)."""

    def __init__(self, rows, num_texts: int, identity=None) -> None:
        self.rows = rows
        self.anchors = np.array([row[0] for row in rows])
        self.positives = np.array([row[1] for row in rows])
        self.source = np.array([row[3] for row in rows], dtype=np.int32)
        self.num_own_negatives = np.array([len(row[2]) for row in rows])
        self.identity = np.arange(num_texts) * 7 - 5 if identity is None else np.asarray(identity)
        self.manifest = {"sources": [{"name": f"s{n}"} for n in range(1 + int(self.source.max()))]}

    _further = np.empty(0, np.int64)

    @property
    def _further_offsets(self) -> np.ndarray:
        return np.zeros(len(self.anchors) + 1, np.int64)

    def own_negatives_of(self, rows: np.ndarray) -> np.ndarray:
        return np.array([text for row in rows for text in self.rows[row][2]], dtype=np.int64)


def config(
    num_sources: int, size: int, mixing="homogeneous", weights=None, seed=0, temperature=1, **optim
) -> RunConfig:
    sources = [{"path": "x", "weight": w} for w in weights or [1] * num_sources]
    return parse_config(
        {
            "name": "x", "seed": seed, "student": {"model": "m"},
            "data": {"sources": sources, "mixing": mixing, "temperature": temperature},
            "batch": {"global_size": size}, "optim": optim,
        }
    )  # fmt: skip


def random_rows(rng, num_rows: int, num_texts: int, num_sources: int = 1, negatives: int = 2) -> Rows:
    def text() -> int:
        return int(rng.integers(num_texts))

    rows = [
        (text(), text(), [text() for _ in range(rng.integers(negatives + 1))], int(rng.integers(num_sources)))
        for _ in range(num_rows)
    ]
    rows = sorted([*rows, *((text(), text(), [], source) for source in range(num_sources))], key=lambda row: row[3])
    return Rows(rows, num_texts)


def repeated(rows: Rows, batch) -> int:
    """How often a text comes once more into the batch, in another row."""
    seen = Counter()
    for row in batch:
        anchor, positive, negatives, _ = rows.rows[row]
        seen.update({int(rows.identity[text]) for text in (anchor, positive, *negatives)})
    return sum(count - 1 for count in seen.values())


def sizes_of(sampler: Sampler) -> list[int]:
    return [len(batch) for batch in sampler.epoch(0).batches]


@pytest.mark.parametrize("mixing", ["homogeneous", "mixed"])
def test_an_epoch_takes_every_row_once_in_full_batches_but_one(mixing):
    rng = np.random.default_rng(0)
    for _ in range(60):
        num_sources = int(rng.integers(1, 4))
        rows = random_rows(rng, int(rng.integers(20, 300)), int(rng.integers(10, 900)), num_sources)
        size = int(rng.integers(2, 24))
        sampler = Sampler(rows, config(num_sources, size, mixing))
        for number in (0, 1):
            epoch = sampler.epoch(number)
            assert sorted(np.concatenate(epoch.batches).tolist()) == list(range(len(rows.rows)))
            assert len(epoch.batches) == sampler.steps_per_epoch
            odd = [len(batch) for batch in epoch.batches if len(batch) != size]
            assert len(odd) <= 1
            assert all(SMALLEST_BATCH * size <= other < (1 + SMALLEST_BATCH) * size for other in odd)
            assert epoch.duplicates_admitted == sum(repeated(rows, batch) for batch in epoch.batches)
            assert epoch.duplicates_admitted == sum(repeated_texts(rows, batch) for batch in epoch.batches)
            assert len(epoch.moved) == len(epoch.duplicates) == num_sources


def test_a_rest_too_small_to_contrast_enlarges_another_batch():
    for mixing in ("homogeneous", "mixed"):
        for extra, expected in ((1, [64, 65]), (3, [64, 67]), (4, [4, 64, 64]), (0, [64, 64]), (63, [63, 64, 64])):
            num_rows = 128 + extra
            rows = Rows([(2 * i, 2 * i + 1, [], 0) for i in range(num_rows)], 2 * num_rows)
            sampler = Sampler(rows, config(1, 64, mixing))
            assert sorted(sizes_of(sampler)) == expected
            assert sampler.steps_per_epoch == len(expected)
    rows = Rows([(2 * i, 2 * i + 1, [], 0) for i in range(3)], 6)
    assert sizes_of(Sampler(rows, config(1, 2))) in ([2, 1], [1, 2])  # one of two is more than a sixteenth


def test_homogeneous_batches_are_of_one_source_but_the_last_mixed_ones():
    rng = np.random.default_rng(1)
    rows = random_rows(rng, 1000, 3000, num_sources=4)
    sampler = Sampler(rows, config(4, 32))
    mixed = [batch for batch in sampler.epoch(0).batches if len(set(rows.source[batch].tolist())) > 1]
    leftover = sum(int(n) % 32 for n in np.bincount(rows.source))
    assert 0 < len(mixed) <= -(-leftover // 32)
    sampler = Sampler(rows, config(4, 32, "mixed"))
    assert all(len(set(rows.source[batch].tolist())) > 1 for batch in sampler.epoch(0).batches)


def test_weights_say_how_often_a_row_comes():
    rows = Rows([(2 * i, 2 * i + 1, [], i // 100) for i in range(300)], 600)
    sampler = Sampler(rows, config(3, 16, weights=[2, 0.5, 1]))
    halves = []
    for number in (0, 1):
        epoch = sampler.epoch(number)
        count = np.bincount(np.concatenate(epoch.batches), minlength=300)
        assert (count[:100] == 2).all() and (count[200:] == 1).all()
        assert set(count[100:200].tolist()) == {0, 1} and count[100:200].sum() == 50
        assert epoch.duplicates_admitted == sum(repeated(rows, batch) for batch in epoch.batches) == 0
        halves.append(np.flatnonzero(count[100:200]).tolist())
    assert halves[0] != halves[1]
    assert sampler.rows_per_source == [200, 50, 100]


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    rows = random_rows(np.random.default_rng(2), 200, 150)
    sampler = Sampler(rows, config(1, 16))
    first, second = sampler.epoch(0), sampler.epoch(1)
    assert [b.tolist() for b in first.batches] != [b.tolist() for b in second.batches]
    assert [b.tolist() for b in Sampler(rows, config(1, 16, seed=1)).epoch(0).batches] != [
        b.tolist() for b in first.batches
    ]
    steps = list(range(1, 3 * sampler.steps_per_epoch + 1))
    forward = {step: sampler.rows(step).tolist() for step in steps}
    fresh = Sampler(rows, config(1, 16, steps=9, learning_rate=1))
    assert forward == {step: fresh.rows(step).tolist() for step in reversed(steps)}


def test_another_process_draws_the_same(tmp_path):
    student = tiny.save_tiny_model(tmp_path / "student")
    words = [f"{a} {b}" for a in tiny.WORDS[:12] for b in tiny.WORDS[:12]]
    rows = [{"anchor": words[i], "positive": words[(7 * i) % 144]} for i in range(144)]
    recipe = tiny.recipe(
        tmp_path, student, None, tiny.write_jsonl(tmp_path / "x.jsonl", rows), batch={"global_size": 20}
    )
    code = (
        "import sys, json, pathlib\n"
        "from gist_dist.config import parse_config\n"
        "from gist_dist.data.corpus import Corpus\n"
        "from gist_dist.data.sampler import Sampler\n"
        "sampler = Sampler(Corpus(pathlib.Path(sys.argv[2])), parse_config(json.loads(sys.argv[1])))\n"
        "print(json.dumps([sampler.rows(step).tolist() for step in (1, 5, 11)]))"
    )
    config, corpus = tiny.prepared(recipe)
    command = [sys.executable, "-c", code, json.dumps(recipe), str(corpus.folder)]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    theirs = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    sampler = Sampler(corpus, config)
    assert json.loads(theirs) == [sampler.rows(step).tolist() for step in (1, 5, 11)]


@pytest.mark.parametrize("mixing", ["homogeneous", "mixed"])
def test_no_text_is_twice_in_a_batch_where_that_is_easy(mixing):
    rng = np.random.default_rng(3)
    moved = 0
    for _ in range(40):
        # 30 batches, texts in about four rows each: there is always room elsewhere.
        rows = random_rows(rng, 480, 480, negatives=1)
        epoch = Sampler(rows, config(1, 16, mixing)).epoch(0)
        assert [repeated(rows, batch) for batch in epoch.batches] == [0] * len(epoch.batches)
        assert epoch.duplicates_admitted == 0
        moved += epoch.rows_moved
    assert moved > 400


def test_texts_that_the_student_cannot_tell_apart_are_one_text():
    rows = Rows([(i, 40 + i, [], 0) for i in range(40)], 80, identity=[*(i // 4 for i in range(40)), *range(100, 140)])
    epoch = Sampler(rows, config(1, 10)).epoch(0)
    assert epoch.duplicates_admitted == 0 == sum(repeated(rows, batch) for batch in epoch.batches)
    assert epoch.rows_moved > 0


@pytest.mark.parametrize("copies", [8, 9, 13, 40])
def test_a_text_in_more_rows_than_batches_is_admitted_as_often_as_it_must(copies):
    rows = Rows([(i, 100 if i < copies else 101 + i, [], 0) for i in range(80)], 200)
    for number in range(5):
        epoch = Sampler(rows, config(1, 10, seed=number)).epoch(number)
        assert epoch.duplicates_admitted == max(0, copies - 8) == sum(repeated(rows, batch) for batch in epoch.batches)


def test_what_is_left_of_a_source_helps_to_part_its_duplicates():
    # Ten rows in one full batch and a rest of ten: every text twice, once for each.
    rows = Rows([(i, 100 + i // 2, [], 0) for i in range(20)] + [(200 + i, 300 + i, [], 1) for i in range(3)], 400)
    for seed in range(5):
        assert Sampler(rows, config(2, 11, seed=seed)).epoch(0).duplicates_admitted <= 1


def fewest(rows: Rows, sizes: list[int]) -> int:
    """Over all ways to fill the batches."""
    best = 10**9
    for order in permutations(range(len(rows.rows))):
        batches, start = [], 0
        for size in sizes:
            batches.append(order[start : start + size])
            start += size
        if all(list(batch) == sorted(batch) for batch in batches):
            best = min(best, sum(repeated(rows, batch) for batch in batches))
    return best


def test_near_the_fewest_duplicates_that_are_possible():
    rng = np.random.default_rng(4)
    excess, hard = [], 0
    for _ in range(60):
        rows = random_rows(rng, int(rng.integers(4, 7)), int(rng.integers(4, 12)), negatives=1)
        sampler = Sampler(rows, config(1, int(rng.integers(2, 4)), "mixed"))
        optimum = fewest(rows, sizes_of(sampler))
        excess.append(sampler.epoch(0).duplicates_admitted - optimum)
        hard += optimum > 0
    assert min(excess) >= 0 and sum(excess) <= 3 and hard > 10


def test_real_sources_come_near_the_lower_bound(shared_data: Path):
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data / "train" / "qqp_duplicates.parquet", columns=["anchor", "positive"]).to_pydict()
    numbers = {text: i for i, text in enumerate(dict.fromkeys(table["anchor"] + table["positive"]))}
    rows = Rows([(numbers[a], numbers[p], [], 0) for a, p in zip(*table.values(), strict=True)], len(numbers))
    times = Counter(text for a, p, _, _ in rows.rows for text in {a, p})
    for size in (1024, 2048):
        sampler = Sampler(rows, config(1, size, "mixed"))
        least = sum(max(0, count - sampler.steps_per_epoch) for count in times.values())
        epoch = sampler.epoch(0)
        assert least <= epoch.duplicates_admitted <= 1.15 * least
        assert epoch.rows_moved > 1000


def plain_rows(anchors: np.ndarray, positives: np.ndarray) -> Rows:
    """Of one source, without negatives; quickly made."""
    rows = Rows([(0, 0, [], 0)], int(max(anchors.max(), positives.max())) + 1)
    rows.anchors, rows.positives = anchors, positives
    rows.source, rows.num_own_negatives = np.zeros(len(anchors), np.int32), np.zeros(len(anchors), np.int64)
    rows.own_negatives_of = lambda chosen: np.empty(0, np.int64)
    return rows


def test_a_million_rows_with_duplicates_take_seconds():
    rng = np.random.default_rng(5)
    n = 1_000_000
    positives = n + np.arange(n)
    copies = rng.random(n) < 0.1
    positives[copies] = n + rng.integers(0, n, copies.sum())
    sampler = Sampler(plain_rows(np.arange(n), positives), config(1, 4096))
    started = time.process_time()
    epoch = sampler.epoch(0)
    assert time.process_time() - started < 5
    assert epoch.duplicates_admitted == 0 and epoch.rows_moved > 100
    sampler.rows(1)
    sampler.epoch(1)
    started = time.process_time()
    for step in range(1, 200):
        sampler.rows(step)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize(
    ("anchors", "positives", "size", "excess"),
    [("own", 1, 4096, 0), ("own", 2, 4096, 0), ("own", 40, 256, 0), ("own", 300, 256, 0), ("own", 4200, 4096, 0),
     ("fifty", "own", 4096, 0), ("fifty", "fifty", 4096, 500)],
)  # fmt: skip
def test_few_distinct_texts_do_not_make_it_slow(anchors, positives, size, excess):
    """Labels for positives, anchors that come fifty times in 61 batches: nearly all of 250,000 rows are crowded.

    Where both texts of every row are in four fifths of the batches, one row in a thousand finds no place.
    """
    rng, n = np.random.default_rng(6), 250_000

    def texts(kind: str | int) -> np.ndarray:
        if kind == "fifty":
            return rng.permutation(n) // 50
        return np.arange(n) if kind == "own" else rng.integers(0, kind, n)

    rows = plain_rows(texts(anchors), n + texts(positives))
    sampler = Sampler(rows, config(1, size))
    started = time.process_time()
    epoch = sampler.epoch(0)
    assert time.process_time() - started < 8
    times = np.bincount(np.concatenate([rows.anchors, rows.positives]))
    least = int(np.maximum(0, times - sampler.steps_per_epoch).sum())
    assert least <= epoch.duplicates_admitted <= least + excess
    distinct = sum(len(np.unique([rows.anchors[batch], rows.positives[batch]])) for batch in epoch.batches)
    assert epoch.duplicates_admitted == 2 * n - distinct


def test_shares_of_an_epoch():
    rows, ones = np.array([1_000_000, 10_000, 100, 1]), np.ones(4)
    assert share_epoch(rows, ones, 1.0) == rows.tolist()
    assert share_epoch(rows, np.array([0.5, 2, 1.5, 1]), 1.0) == [500_000, 20_000, 150, 1]
    assert share_epoch(rows, ones / 3, 1.0) == [333_333, 3333, 33, 1]  # a third of a row is one
    for temperature in (1.5, 2.0, 5.0, 1000.0):
        shares = share_epoch(rows, ones, temperature)
        expected = rows ** (1 / temperature) / (rows ** (1 / temperature)).sum() * rows.sum()
        assert np.abs(shares - expected).max() < 1 and sum(shares) == rows.sum()
    assert share_epoch(np.array([10, 0, 5]), np.ones(3), 2.0)[1] == 0


@pytest.mark.parametrize("mixing", ["homogeneous", "mixed"])
@pytest.mark.parametrize(("weights", "temperature"), [([0.3, 2.5, 1], 1), ([1, 1, 1], 3), ([0.7, 1, 3], 1.7)])
def test_no_row_comes_again_before_all_of_its_source_came(mixing, weights, temperature):
    rows = Rows([(2 * i, 2 * i + 1, [], 0 if i < 200 else 1 if i < 230 else 2) for i in range(247)], 494)
    sampler = Sampler(rows, config(3, 16, mixing, weights, temperature=temperature))
    total = np.zeros(247, dtype=int)
    for number in range(7):
        epoch = sampler.epoch(number)
        total += np.bincount(np.concatenate(epoch.batches), minlength=247)
        # Copies of a row, where an epoch ends one pass and begins the next, are parted and counted like other texts.
        assert epoch.duplicates_admitted == sum(repeated(rows, batch) for batch in epoch.batches)
        for source in range(3):
            counts = total[rows.source == source]
            assert counts.max() - counts.min() <= 1
            assert counts.sum() == (number + 1) * sampler.rows_per_source[source]
    direct = Sampler(rows, config(3, 16, mixing, weights, temperature=temperature)).epoch(6)
    assert [b.tolist() for b in direct.batches] == [b.tolist() for b in epoch.batches]
    assert len({tuple(sampler.epoch(n).batches[0]) for n in range(7)}) == 7


def test_a_source_smaller_than_a_batch_fills_none_alone():
    # 12 rows five times an epoch would be nearly four batches of five copies each.
    small = [(2 * i, 2 * i + 1, [], 0) for i in range(12)]
    large = [(2 * i, 2 * i + 1, [], 1 + i % 2) for i in range(12, 106)]
    rows = Rows(sorted(small + large, key=lambda row: row[3]), 300)
    sampler = Sampler(rows, config(3, 16, weights=[5, 1, 1]))
    epoch = sampler.epoch(0)
    with_small = [batch for batch in epoch.batches if (rows.source[batch] == 0).any()]
    assert all(len(set(rows.source[batch].tolist())) > 1 for batch in with_small)
    assert np.bincount(np.concatenate(epoch.batches))[:12].tolist() == [5] * 12
    assert sum(repeated(rows, batch) for batch in epoch.batches) == 0
    assert len(with_small) >= 5 and epoch.duplicates_admitted == 0


NAMED = (("labels", 40), ("all", 24))


def test_accounts_say_what_repeats_and_why():
    rows = [(i, 200 + i % 3, [], 0) for i in range(40)] + [(300 + i, 400 + i, [500], 1) for i in range(24)]
    rows = Rows(rows, 600)
    reports = [{"name": name, "rows_read": n + 1, "rows_used": n, "dropped": {"empty": 1}} for name, n in NAMED]
    rows.manifest = {"sources": reports}
    sampler = Sampler(rows, config(2, 8))
    labels, others = source_accounts(rows, sampler)
    epoch = sampler.epoch(0)
    assert labels["duplicates_admitted"] == 40 - 3 * 5 == epoch.duplicates[0]  # five batches with three positives
    assert others["duplicates_admitted"] == 24 - 3 == epoch.duplicates[1]
    assert epoch.duplicates_admitted == sum(repeated(rows, batch) for batch in epoch.batches)
    assert (labels["distinct_anchors"], labels["distinct_positives"], labels["distinct_texts"]) == (40, 3, 43)
    assert (others["distinct_texts"], others["rows_of_commonest_text"]) == (49, 24)
    assert (labels["batches"], labels["batches_alone"], labels["rows_dropped"]) == (5, 5, 1)
    assert labels["why_duplicates"] == (
        "3 distinct positives in 40 rows and the commonest text in 14 of an epoch's; batches of its own: 5, "
        "mixed ones with some of its rows: 0"
    )
    assert labels["share_of_epoch"] == 40 / 64


def test_the_next_epoch_is_drawn_while_this_one_is_served(monkeypatch):
    rows = random_rows(np.random.default_rng(7), 200, 300)
    sampler = Sampler(rows, config(1, 16, epochs=3))
    drawn, may_draw = [], threading.Event()
    draw = Sampler._draw

    def slow_draw(self, number):
        if number == 1:
            assert may_draw.wait(30)
        drawn.append((number, threading.current_thread().name))
        return draw(self, number)

    monkeypatch.setattr(Sampler, "_draw", slow_draw)
    per_epoch = sampler.steps_per_epoch
    first = sampler.rows(1)  # comes although epoch 1 can't be drawn yet
    assert np.array_equal(first, sampler.epoch(0).batches[0])
    may_draw.set()
    served = [sampler.rows(step).tolist() for step in range(1, 3 * per_epoch + 1)]
    assert sorted(drawn) == [(0, "epoch"), (1, "epoch"), (2, "epoch")]  # each once, and none after the last step
    assert len(sampler._epochs) <= 2
    monkeypatch.undo()
    fresh = Sampler(rows, config(1, 16, epochs=3))
    assert served == [fresh.rows(step).tolist() for step in range(1, 3 * per_epoch + 1)]


def test_what_drawing_raises_is_raised_where_the_batch_is_asked_for(monkeypatch):
    sampler = Sampler(random_rows(np.random.default_rng(8), 100, 300), config(1, 16, epochs=2))
    draw = Sampler._draw

    def failing(self, number):
        if number == 1:
            raise MemoryError("no room for an epoch")
        return draw(self, number)

    monkeypatch.setattr(Sampler, "_draw", failing)
    for step in range(1, sampler.steps_per_epoch + 1):
        sampler.rows(step)
    with pytest.raises(MemoryError, match="no room for an epoch"):
        sampler.rows(sampler.steps_per_epoch + 1)


def test_steps_and_epochs():
    rows = Rows([(2 * i, 2 * i + 1, [], 0) for i in range(100)], 200)
    assert Sampler(rows, config(1, 32)).num_steps == Sampler(rows, config(1, 32)).steps_per_epoch == 4
    assert Sampler(rows, config(1, 32, epochs=2.5)).num_steps == 10
    assert Sampler(rows, config(1, 32, epochs=0.01)).num_steps == 1
    assert Sampler(rows, config(1, 32, steps=7)).num_steps == 7


def test_weights_that_leave_less_than_a_batch_are_refused():
    rows = Rows([(2 * i, 2 * i + 1, [], 0) for i in range(100)], 200)
    with pytest.raises(
        UserError, match=r"batch.global_size = 64: an epoch has only 50 rows, with the weights of data.sources"
    ):
        Sampler(rows, config(1, 64, weights=[0.5]))
