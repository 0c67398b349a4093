"""Rows with several positives, from the file to the batch."""

import json

import numpy as np
import pytest
import torch
from tiny import prepared, recipe, save_tiny_model, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.core.candidates import further_places
from gist_dist.core.plan import PreparedRows, plan_batch
from gist_dist.core.step import batch_index
from gist_dist.data.corpus import Corpus
from gist_dist.data.mining import MineOptions, plan_corpus_search
from gist_dist.data.sampler import Sampler
from gist_dist.data.sources import SourceReport
from gist_dist.data.statistics import data_summary, repeated_texts
from gist_dist.planning import inspect
from gist_dist.recipe import parse_config

ROWS = [
    {"anchor": "amber", "positive": ["basin", "cedar", "BASIN ", "amber"], "negatives": ["delta"]},
    {"anchor": "ember", "positive": ["fjord"]},
    {"anchor": "grove", "positive": ["harbor", "fjord", "island"], "negatives": ["kelp", "lagoon"]},
    {"anchor": "meadow", "positive": ["nectar", "\u2603"]},
    {"anchor": "orchid", "positive": "pebble"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "student")


def corpus_of(folder, model, rows=ROWS, guide=None, **sections):
    source = write_jsonl(folder / "rows.jsonl", rows)
    return prepared(recipe(folder, model, guide, source, batch={"global_size": 2}, **sections))


def texts(corpus, numbers) -> list[str]:
    return [corpus.text(int(number)) for number in numbers]


def test_a_row_keeps_its_positives_each_once(tmp_path, model):
    config, corpus = corpus_of(tmp_path, model)
    assert texts(corpus, corpus.anchors) == ["amber", "ember", "grove", "orchid"]
    assert texts(corpus, corpus.positives) == ["basin", "fjord", "harbor", "pebble"]
    assert corpus.num_further.tolist() == [1, 0, 2, 0]
    assert texts(corpus, corpus.further_of(np.array([2, 0]))) == ["fjord", "island", "cedar"]
    assert isinstance(corpus, PreparedRows)
    (report,) = corpus.manifest["reports"]
    assert (report["rows_read"], report["rows_used"]) == (5, 4)
    assert report["dropped"] == {"positive has no token that the student knows": 1}
    assert data_summary(corpus, Sampler(corpus, config))["num_positives"] == 7
    again = Corpus(corpus.folder)
    assert texts(again, again.further_of(np.arange(4))) == ["cedar", "fjord", "island"]


def test_apart_each_makes_a_row(tmp_path, model):
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "several_positives": "apart"}
    corpus = corpus_of(tmp_path, model, data={"sources": [source]})[1]
    assert not corpus.num_further.any() and corpus.num_rows == 10  # of 11, one is unknown to the student
    assert "further" not in corpus.manifest["arrays"]


def test_data_with_one_positive_a_row_is_as_before(tmp_path, model):
    """So that runs on it go on from older checkpoints."""
    one = [{**row, "positive": row["positive"][:1] if isinstance(row["positive"], list) else row["positive"]}
           for row in ROWS]  # fmt: skip
    lists = corpus_of(tmp_path, model, one)[1]
    (tmp_path / "plain").mkdir()
    plain = [{**row, "positive": "".join(row["positive"])} for row in one]
    assert corpus_of(tmp_path / "plain", model, plain)[1].manifest["content"] == lists.manifest["content"]
    assert not {"further", "further_offsets"} & set(lists.manifest["arrays"])
    several = corpus_of(tmp_path, model)[1]
    assert several.manifest["content"] != lists.manifest["content"]


def test_a_batch_has_all_positives_and_knows_whose_they_are(tmp_path, model):
    corpus = corpus_of(tmp_path, model)[1]
    plan = plan_batch(corpus, np.array([2, 1, 0]), 1, 64, with_guide=False)
    batch = batch_index(plan, torch.device("cpu"))
    table = texts(corpus, plan.texts[batch.texts.numpy()])
    assert table == ["harbor", "fjord", "basin", "fjord", "island", "cedar", "kelp", "lagoon", "delta",
                     "grove", "ember", "amber"]  # fmt: skip
    assert batch.further_positives.tolist() == [[3, 4], [-1, -1], [5, -1]]
    known = set(zip(batch.known_rows.tolist(), batch.known_places.tolist(), strict=True))
    assert known == {
        (0, 1),
        (0, 10),
        (1, 9),
    }  # a copy of grove's second positive, and its other anchor; grove for ember
    assert further_places(torch.tensor([1, 1]), 3).tolist() == [[-1, -1], [3, 4], [-1, -1]]


def test_rows_that_share_any_positive_are_parted(tmp_path, model):
    letters = "abcdefgh"
    rows = [{"anchor": f"a {x}", "positive": [f"b {x}", f"c {y}"]} for x, y in zip(letters, "aabbccdd", strict=True)]
    config, corpus = corpus_of(tmp_path, model, rows)
    assert repeated_texts(corpus, np.array([0, 1])) == 1 and repeated_texts(corpus, np.array([0, 2])) == 0
    for epoch in range(4):
        batches = Sampler(corpus, config).epoch(epoch).batches
        assert [repeated_texts(corpus, batch) for batch in batches] == [0] * 4


def test_no_positive_is_mined(tmp_path, model):
    corpus = corpus_of(tmp_path, model, guide=model)[1]
    search = plan_corpus_search(corpus, MineOptions(negatives=1))
    assert {"cedar", "island"} <= set(texts(corpus, search.pool))
    assert len(search.positives) == 7


def test_the_plan_counts_them(tmp_path, model):
    corpus = corpus_of(tmp_path, model)[1]
    told = SourceReport(**corpus.manifest["reports"][0]).told()
    assert any("rows have several positives" in line for line in told), json.dumps(told)


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("data.known_positives", True, "data.known_positives = True"),
        ("data.mixing", "cluster", "data.mixing = 'cluster'"),
        ("data.clustering", {"hardness": 2}, "data.clustering.hardness = 2"),
        ("data.clustering", {"rows_per_cluster": 0}, "data.clustering.rows_per_cluster = 0"),
        ("data.mine", {"negatives": 0}, "data.mine.negatives = 0"),
        ("data.mine", {"every_steps": 0}, "data.mine.every_steps = 0"),
        ("data.mine", {"relative_margin": "big"}, "data.mine.relative_margin = 'big'"),
        ("loss.positives", "max", "loss.positives = 'max'"),
        ("loss.false_negatives", "keep", "loss.false_negatives = 'keep'"),
        ("loss.promotion", {"most": 0}, "loss.promotion.most = 0"),
        ("loss.promotion", {"at_most": 3}, "did you mean 'most'"),
        ("loss.negatives", "none", "loss.negatives = 'none'"),
        ("loss.guard_negatives", "maybe", "loss.guard_negatives = 'maybe'"),
        ("loss.in_batch", "some", "loss.in_batch = 'some'"),
        ("source.loss", {"temperature": 0}, r"data.sources\[0\].loss.temperature = 0"),
        ("source.loss", {"nope": 1}, r"unknown key 'data.sources\[0\].loss.nope'"),
        ("source.columns", {"positive": []}, r"data.sources\[0\].columns.positive"),
        ("source.columns", {"positive": ["a", 3]}, r"data.sources\[0\].columns.positive\[1\] = 3"),
        ("source.columns", {"positive": ["a", "b", "a"]}, "positive names the column 'a' twice"),
        ("source.columns", {"negatives": ["a", "a"]}, "negatives names the column 'a' twice"),
    ],
)
def test_what_no_batch_can_be_made_by_is_named(tmp_path, section, value, named):
    """Of the fields that say who is a positive, who a candidate and who meets in a batch."""
    tree = recipe(tmp_path, "student", "guide", tmp_path / "rows.jsonl", batch={"global_size": 2})
    name, field = section.split(".")
    place = tree["data"]["sources"][0] if name == "source" else tree.setdefault(name, {})
    place[field] = value
    with pytest.raises(UserError, match=named):
        parse_config(tree)


def test_a_sample_to_inspect_counts_all_texts_of_a_row(tmp_path, model, monkeypatch):
    monkeypatch.setattr(inspect, "FEWEST_ROWS", 1)
    monkeypatch.setattr(inspect, "TOKENS_OF_SOURCE", 60)
    kinds = {
        "one": {},
        "many": {"positive": ["basin", "cedar delta", "cedar ember", "cedar fjord"]},
        "negatives": {"negatives": ["grove", "harbor", "island"]},
    }
    sizes = {}
    for name, more in kinds.items():
        (folder := tmp_path / name).mkdir()
        rows = [{"anchor": f"amber {i % 7} basin", "positive": ["kelp"]} | more for i in range(40)]
        config, corpus = corpus_of(folder, model, rows)
        sizes[name] = len(inspect._sample(config, corpus, 0, None))
    assert 0 < sizes["many"] < sizes["one"] > sizes["negatives"] > 0, sizes
