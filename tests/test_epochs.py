"""Whole epochs over real sources, walked with nothing of the sampler's own: what `plan` announces is what comes.

By default over a part of the developers' data pack; the whole of it is `slow`.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler
from gist_dist.data.statistics import data_summary
from gist_dist.runs.folder import RunFolder

TRIPLETS = ("banking77_train", "clinc150_train", "hwu64", "emotion_train")
"""Their positives and negatives are drawn from few texts: the hard part."""


class Real(NamedTuple):
    config: RunConfig
    corpus: Corpus
    files: list[Path]
    row_texts: list[set[bytes]]
    """Of every row of the corpus: its texts, as the token ids that the student sees."""

    def announced(self, config: RunConfig | None = None) -> dict:
        """data.json, as a run of this recipe writes it."""
        config = config or self.config
        run = RunFolder(config)
        run.folder.mkdir(exist_ok=True, parents=True)
        run.write_data_summary(data_summary(self.corpus, Sampler(self.corpus, config)))
        return json.loads((run.folder / "data.json").read_text())

    def changed(self, weights: dict[str, float] | None = None, **data) -> RunConfig:
        sources = tuple(
            source.model_copy(update={"weight": (weights or {}).get(source.label, 1.0)})
            for source in self.config.data.sources
        )
        return self.config.model_copy(update={"data": self.config.data.model_copy(update={"sources": sources, **data})})


def load(folder: Path, model: Path, files: list[Path], max_rows: int | None, size: int) -> Real:
    """The files as sources, some of them with prompts; prepared with the tokenizer of MiniLM."""
    sources = [{"path": str(file), "max_rows": max_rows} for file in files]
    for source in sources[::3]:
        source["prompts"] = {"student": {"anchor": "query: ", "positive": "passage: "}}
    recipe = tiny.recipe(folder, model, None, data={"sources": sources}, batch={"global_size": size})
    recipe["student"] = {"model": str(model), "max_tokens": 64}
    config, corpus = tiny.prepared(recipe)
    ids = [tokens.tobytes() for tokens in corpus.student_tokens(np.arange(corpus.num_texts))]
    negatives = corpus.negatives_of(np.arange(corpus.num_rows)).tolist()
    row_texts, start = [], 0
    for anchor, positive, count in zip(corpus.anchors, corpus.positives, corpus.num_negatives, strict=True):
        row_texts.append({ids[text] for text in (anchor, positive, *negatives[start : start + count])})
        start += count
    return Real(config, corpus, files, row_texts)


@pytest.fixture(scope="module")
def part(shared_data, minilm_l2, tmp_path_factory) -> Real:
    names = (*TRIPLETS, "qqp_duplicates", "simplification", "wikiqa_train", "snli_dev_test", "parade_train")
    files = [shared_data / "train" / f"{name}.parquet" for name in names]
    return load(tmp_path_factory.mktemp("part"), minilm_l2, files, 1500, 256)


def repeats(real: Real, batches: list[np.ndarray]) -> np.ndarray:
    """Of every batch: how often a text comes once more, in another row."""
    counts = (Counter(text for row in batch.tolist() for text in real.row_texts[row]) for batch in batches)
    return np.array([sum(count - 1 for count in texts.values()) for texts in counts])


def walk(real: Real, config: RunConfig, number: int) -> list[np.ndarray]:
    """The batches of an epoch, as the trainer asks for them."""
    sampler = Sampler(real.corpus, config)
    return [sampler.rows(number * sampler.steps_per_epoch + step) for step in range(1, sampler.steps_per_epoch + 1)]


def check_an_epoch(real: Real) -> None:
    corpus, data = real.corpus, real.announced()
    batches = walk(real, real.config, 0)
    # Every row once: (source, number in its file) are those of the files.
    rows = np.concatenate(batches)
    came = Counter(zip(corpus.source[rows].tolist(), corpus.number[rows].tolist(), strict=True))
    assert set(came.values()) == {1}
    per_source = Counter(source for source, _ in came)
    for number, (file, source) in enumerate(zip(real.files, data["sources"], strict=True)):
        limit = real.config.data.sources[number].max_rows
        in_file = pq.ParquetFile(file).metadata.num_rows
        assert source["rows_read"] == (min(in_file, limit) if limit else in_file)
        assert per_source[number] == source["rows_read"] - sum(source["dropped"].values()) == source["rows_per_epoch"]
    # No text twice within a global batch, but as often as was announced.
    repeated = repeats(real, batches)
    assert repeated.sum() == data["duplicates_admitted"] == sum(s["duplicates_admitted"] for s in data["sources"])
    assert data["rows_moved"] == sum(s["rows_moved"] for s in data["sources"]) > 100  # there was something to part
    size = real.config.batch.global_size
    assert sorted(map(len, batches))[1] == size and len(batches) == data["steps_per_epoch"]
    alone = [len(np.unique(corpus.source[batch])) == 1 for batch in batches]
    assert sum(alone) == sum(n // size for n in per_source.values())
    # No fewer than there must be: a text in more rows of a source than there are batches for them. And no more than if
    # what is left of the source, less than a batch, could take none of them.
    mixed, least, most = len(batches) - sum(alone), 0, 0
    for number, count in per_source.items():
        own = count // size
        texts = Counter(t for row in np.flatnonzero(corpus.source == number) for t in real.row_texts[row])
        least += sum(max(0, times - own - mixed) for times in texts.values())
        most += sum(max(0, times - (own or mixed)) for times in texts.values())
    assert least <= repeated.sum() <= most


def test_an_epoch_is_what_was_announced(part):
    check_an_epoch(part)


@pytest.mark.slow
def test_an_epoch_of_the_whole_pack_is_what_was_announced(shared_data, minilm_l2, tmp_path):
    files = sorted((shared_data / "train").glob("*.parquet"))
    real = load(tmp_path, minilm_l2, files, None, 1024)
    assert real.corpus.num_rows > 330_000
    check_an_epoch(real)


def test_mixed_batches_too(part):
    config = part.changed(mixing="mixed")
    batches = walk(part, config, 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(part.corpus.num_rows))
    assert repeats(part, batches).sum() == part.announced(config)["duplicates_admitted"]
    assert min(len(np.unique(part.corpus.source[batch])) for batch in batches) > 5


def test_epochs_differ_in_order_and_in_company(part):
    first, second = walk(part, part.config, 0), walk(part, part.config, 1)
    assert sorted(np.concatenate(second).tolist()) == list(range(part.corpus.num_rows))
    company = [{frozenset(batch.tolist()) for batch in batches} for batches in (first, second)]
    assert not company[0] & company[1]
    order = [[int(part.corpus.source[batch[0]]) for batch in batches] for batches in (first, second)]
    assert order[0] != order[1]
    same_place = np.concatenate(first) == np.concatenate(second)
    assert same_place.mean() < 0.01


@pytest.mark.parametrize(
    ("weights", "temperature"), [({"qqp_duplicates": 2.0, "hwu64": 0.3}, 1.0), ({}, 2.0), ({"wikiqa_train": 3.0}, 1.5)]
)
def test_sources_have_the_shares_that_were_announced(part, weights, temperature):
    config = part.changed(weights, temperature=temperature)
    data, num_rows = part.announced(config), np.bincount(part.corpus.source)
    wanted = num_rows * np.array([weights.get(source["name"], 1.0) for source in data["sources"]])
    shares = wanted ** (1 / temperature) / (wanted ** (1 / temperature)).sum()
    total = np.zeros(part.corpus.num_rows, dtype=int)
    for number in range(3):
        batches = walk(part, config, number)
        assert repeats(part, batches).sum() == Sampler(part.corpus, config).epoch(number).duplicates_admitted
        rows = np.concatenate(batches)
        came = np.bincount(part.corpus.source[rows])
        assert came.tolist() == [source["rows_per_epoch"] for source in data["sources"]]
        assert len(rows) == data["rows_per_epoch"] == round(wanted.sum())
        assert np.abs(came - shares * len(rows)).max() <= 1
        total += np.bincount(rows, minlength=part.corpus.num_rows)
        for source in range(len(num_rows)):  # no row comes again before all of its source came
            times = total[part.corpus.source == source]
            assert times.max() - times.min() <= 1
    assert total.max() > total.min()
    smallest = int(wanted.argmin())
    if temperature > 1:
        assert came[smallest] > wanted[smallest]


def test_a_resumed_run_gets_the_same_batches(part):
    """From a step in the middle of an epoch, and whatever was asked for before."""
    config = part.changed({"qqp_duplicates": 0.7}, temperature=1.3)
    sampler = Sampler(part.corpus, config)
    steps = list(range(1, 3 * sampler.steps_per_epoch + 1))
    undisturbed = {step: sampler.rows(step) for step in steps}
    middle = sampler.steps_per_epoch + sampler.steps_per_epoch // 2
    resumed = Sampler(Corpus(part.corpus.folder), config)
    for step in (*range(middle, 3 * sampler.steps_per_epoch + 1), 2, 1):
        assert np.array_equal(resumed.rows(step), undisturbed[step])
