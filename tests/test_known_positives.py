"""Known positives and each source's loss, from the recipe to the step."""

import numpy as np
import pytest
import torch
from tiny import prepared, recipe, save_tiny_model, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.config import LossConfig
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import plan_batch
from gist_dist.core.step import batch_index
from gist_dist.data.row_rules import check_negatives, known_positives_lines
from gist_dist.recipe import parse_config

PAIRS = [
    ("a b", "c d"), ("a b", "e f"), ("g h", "c d"), ("e f", "i j"), ("k l", "m n"), ("o p", "q r"), ("s t", "u v"),
]  # fmt: skip


def corpus_of(folder, rows, **settings):
    model = save_tiny_model(folder / "student")
    source = write_jsonl(folder / "rows.jsonl", rows)
    return prepared(recipe(folder, model, None, source, batch={"global_size": 4}, **settings))[1]


def known(corpus, rows=None) -> set[tuple[str, str, str]]:
    """(anchor, positive, text) of every row of a batch and each of its known positives in that batch."""
    rows = np.arange(corpus.num_rows) if rows is None else np.array(rows)
    plan = plan_batch(corpus, rows, 1, 64, with_guide=False)
    texts = [corpus.text(int(text)) for text in plan.texts]
    table = np.concatenate([plan.positives, plan.negatives, plan.anchors])
    found = plan.known or ((), ())
    pairs = {
        (texts[plan.anchors[row]], texts[plan.positives[row]], texts[table[place]])
        for row, place in zip(*found, strict=True)
    }
    if plan.groups is not None:
        for row, anchor in enumerate(plan.anchors):
            for text in np.flatnonzero(plan.groups == plan.groups[anchor]):
                own = texts[anchor], texts[plan.positives[row]]
                if texts[text] not in own:
                    pairs.add((*own, texts[text]))
    return pairs


def brute_force(pairs) -> set[tuple[str, str, str]]:
    """For row (a, p), every text of a pair with a or p, in either order, but a and p themselves."""
    found = set()
    for a, p in pairs:
        for one, other in pairs:
            found |= {(a, p, other)} if one in (a, p) else set()
            found |= {(a, p, one)} if other in (a, p) else set()
    return {(a, p, text) for a, p, text in found if text not in (a, p)}


def test_a_pair_that_is_a_row_is_a_negative_nowhere(tmp_path):
    corpus = corpus_of(tmp_path, [{"anchor": a, "positive": p} for a, p in PAIRS])
    assert known(corpus) == brute_force(PAIRS)
    assert ("a b", "c d", "e f") in known(corpus) and ("a b", "c d", "g h") in known(corpus)
    assert known(corpus, [0, 3, 4]) == {
        ("a b", "c d", "e f"),
        ("e f", "i j", "a b"),
    }  # what the batch holds, by all rows
    assert known(corpus, [4, 5, 6]) == set()
    assert "3 texts of 11 stand in several pairs" in known_positives_lines(corpus)[0]


def test_clusters_join_pairs_over_any_number_of_steps(tmp_path):
    rows = [{"anchor": a, "positive": p} for a, p in PAIRS]
    corpus = corpus_of(tmp_path, rows, data={"known_positives": "clusters"})
    assert ("g h", "c d", "i j") in known(corpus) and ("k l", "m n", "a b") not in known(corpus)
    assert "4 clusters" in (line := known_positives_lines(corpus)[0]) and "the largest of 5 texts" in line


def test_off_drops_identical_texts_only(tmp_path):
    corpus = corpus_of(tmp_path, [{"anchor": a, "positive": p} for a, p in PAIRS], data={"known_positives": "off"})
    assert known(corpus) == set() and not known_positives_lines(corpus)


def test_rows_of_one_label_are_no_negatives_of_each_other(tmp_path):
    labels = ["x", "x", 7, 7, None, " ", "y"]
    rows = [{"anchor": f"{a} {b}", "positive": f"{b} {a}", "intent": label}
            for a, b, label in zip("abcdefg", "hijklmn", labels, strict=True)]  # fmt: skip
    sources = [{"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "columns": {"label": "intent"}}]
    corpus = corpus_of(tmp_path, rows, data={"sources": sources})
    assert {(a, text) for a, _, text in known(corpus)} == {
        ("a h", "b i"), ("b i", "a h"), ("c j", "d k"), ("d k", "c j"),
    }  # fmt: skip


def test_what_is_known_is_dropped_counted_and_weighed(tmp_path):
    corpus = corpus_of(tmp_path, [{"anchor": a, "positive": p} for a, p in PAIRS])
    plan = plan_batch(corpus, np.arange(corpus.num_rows), 1, 64, with_guide=False)
    batch = batch_index(plan, torch.device("cpu"))
    embeddings = torch.nn.functional.normalize(torch.randn(len(plan.texts), 6, dtype=torch.float64), dim=1)
    counts = gist_loss(embeddings, None, batch, [range(len(PAIRS))], LossConfig()).counts
    table = np.concatenate([plan.positives, plan.anchors])
    places = sum(1 for _, place in zip(*plan.known, strict=True))
    in_pp = sum(1 for place in plan.known[1] if place < len(PAIRS))
    assert len(table) == 2 * len(PAIRS)
    assert counts["known_dropped"] == places + in_pp > 10 and 0 < counts["known_weight"] < len(PAIRS)


def test_each_source_has_its_loss_in_a_mixed_batch(tmp_path):
    model = save_tiny_model(tmp_path / "student")
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"anchor": f"{a} {n}", "positive": f"{a} {a}"} for a in "abcdefgh"])
             for n in "xyz"]  # fmt: skip
    sources = [{"path": str(path)} for path in paths]
    sources[1]["loss"] = {"temperature": 0.2, "contrast_anchors": False}
    data = {"sources": sources, "mixing": "mixed"}
    _, corpus = prepared(recipe(tmp_path, model, None, data=data, batch={"global_size": 4}))
    rows = np.random.default_rng(0).permutation(corpus.num_rows)[:15]
    plan = plan_batch(corpus, rows, 1, 64, with_guide=False)
    assert sorted(plan.rows) == sorted(rows)
    assert [loss.temperature for _, loss in plan.sections] == [0.05, 0.2]
    for section, loss in plan.sections:
        assert {corpus.source[row] == 1 for row in plan.rows[section.start : section.stop]} == {loss.temperature == 0.2}


@pytest.mark.parametrize("loss, part", [
    ({"promotion": {"most": 2}}, "false_negatives: positive"), ({"temperature": 0}, "temperature"),
    ({"temprature": 0.1}, "did you mean 'temperature'"),
])  # fmt: skip
def test_bad_loss_of_a_source_names_the_source(loss, part):
    tree = {"name": "x", "student": {"model": "m"}, "data": {"sources": [{"path": "a"}, {"path": "b", "loss": loss}]}}
    with pytest.raises(UserError) as error:
        parse_config(tree)
    assert "data.sources[1].loss" in str(error.value) and part in str(error.value)


def test_without_in_batch_negatives_a_source_needs_hard_ones(tmp_path):
    corpus = corpus_of(tmp_path, [{"anchor": a, "positive": p} for a, p in PAIRS])
    config = corpus.recipe.model_copy(update={"loss": LossConfig(in_batch=False)})
    with pytest.raises(UserError, match=r"data.sources\[0\].*in_batch.*columns.negatives"):
        check_negatives(config, corpus)
    check_negatives(corpus.recipe, corpus)
