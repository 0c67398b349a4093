"""Rows whose anchor is their positive, as in unsupervised SimCSE: two encodings that differ by their dropout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_layouts import write
from test_sources import source
from tiny import double, one_step, prepared, recipe, run_group, save_tiny_model, write_jsonl

from gist_dist.core.collectives import World
from gist_dist.core.plan import plan_batch

TEXTS = ["amber basin", "candle delta ember", "falcon garden", "amber candle falcon delta"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=1)


def tree(folder: Path, model: Path, rows: list[dict[str, Any]], **sections: Any) -> dict[str, Any]:
    pairs = write_jsonl(folder / "pairs.jsonl", rows)
    return recipe(folder, model, None, pairs, batch={"global_size": 4}, **sections)


def test_such_a_text_is_encoded_twice_and_every_other_once(tmp_path, student):
    rows = [{"anchor": text, "positive": text} for text in TEXTS[:2]]
    rows += [{"anchor": TEXTS[2], "positive": TEXTS[3], "negative": TEXTS[0]}] * 2
    _, corpus = prepared(tree(tmp_path, student, rows))
    plan = plan_batch(corpus, np.arange(4), 0, 64, False)
    assert len(plan.texts) == 6 and sorted(plan.texts) == [0, 0, 1, 1, 2, 3]
    for row, record in enumerate(rows):
        assert corpus.text(int(plan.texts[plan.anchors[row]])) == record["anchor"]
        assert corpus.text(int(plan.texts[plan.positives[row]])) == record["positive"]
        assert plan.anchors[row] != plan.positives[row]
    assert (plan.identity[plan.anchors[:2]] == plan.identity[plan.positives[:2]]).all()
    encoded = np.concatenate([chunk.texts for chunk in plan.student_chunks])
    assert sorted(encoded) == list(range(6))


def _with_dropout(world: World, recipe: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    config, corpus = prepared(recipe)
    found = one_step(world, config, corpus, double(config.student), None)
    return found["counts"]["positive_similarity"] / corpus.num_rows, found["gradients"]


def test_the_two_differ_by_dropout_and_are_the_same_on_any_number_of_workers(tmp_path, student):
    rows = [{"anchor": text, "positive": text} for text in TEXTS]
    similarity = {}
    for dropout in (0.0, 0.1):
        made = tree(tmp_path, student, rows, student={"dropout": dropout})
        prepared(made)
        alone, of_two = (run_group(_with_dropout, n, tmp_path / f"{n}", made) for n in (1, 2))
        similarity[dropout] = alone[0][0]
        for _, gradients in (*of_two, *alone):
            for name, gradient in gradients.items():
                np.testing.assert_allclose(gradient, alone[0][1][name], rtol=0, atol=1e-12)
    assert similarity[0.0] == pytest.approx(1) and similarity[0.1] < 0.999


def test_their_share_is_told(tmp_path):
    rows = [{"anchor": text, "positive": text} for text in TEXTS] + [{"anchor": "a", "positive": "b"}, {"anchor": None}]
    read = source(write(tmp_path, rows))
    assert len(list(read.read())) == 5
    (line,) = read.report.told()
    assert line.startswith(
        "x: 4 of 5 rows have the same text as anchor and positive, as in SimCSE: it is encoded twice"
    )
