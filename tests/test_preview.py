"""`gist-dist plan`: its numbers are those of the run."""

import re

import numpy as np
import pytest
import tiny
import yaml

from gist_dist import preview as module
from gist_dist.cli import main
from gist_dist.config import parse_config
from gist_dist.data.sampler import Sampler
from gist_dist.preview import preview


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("preview")
    words = [f"{a} {b} {'cold ' * (i % 9)}" for i, a in enumerate(tiny.WORDS) for b in tiny.WORDS[:8]]
    first = [{"anchor": words[i], "positive": words[(3 * i + 1) % len(words)]} for i in range(120)]
    second = [{"anchor": words[i], "positive": words[i + 1], "negatives": [words[i + 2]]} for i in range(120, 180)]
    return tiny.recipe(
        folder, tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", width=16, layers=1),
        data={"sources": [
            {"path": str(tiny.write_jsonl(folder / "first.jsonl", [*first, {"anchor": "x"}]))},
            {"path": str(tiny.write_jsonl(folder / "second.jsonl", second)), "weight": 2}]},
        batch={"global_size": 32, "chunk_tokens": 100}, optim={"epochs": 3}, cluster={"num_workers": 3},
    )  # fmt: skip


def test_numbers_are_those_of_the_run(recipe):
    config = parse_config(recipe)
    seen = preview(config)
    _, corpus = tiny.prepared(recipe)
    sampler = Sampler(corpus, config)
    assert (seen.num_rows, seen.num_texts) == (corpus.num_rows, corpus.num_texts) == (180, seen.num_texts)
    assert seen.rows_per_epoch == 240 and [source["rows_per_epoch"] for source in seen.sources] == [120, 120]
    assert (seen.num_steps, seen.steps_per_epoch) == (sampler.num_steps, sampler.steps_per_epoch) == (24, 8)
    assert len(seen.plans) == 8
    for plan in seen.plans:
        assert np.array_equal(plan.rows, sampler.rows(plan.step))
        assert plan.guide_chunks
    student = sum(p.numel() for p in module.Student(config.student).parameters())
    assert seen.student.num_parameters == student > seen.student.num_encoding > 0
    assert seen.guide.num_bytes == 4 * seen.guide.num_parameters
    # Two layers keep at least their inputs and outputs, and little more than forty vectors of width a token.
    assert 2 * 2 * 32 * 4 < seen.activation_bytes_per_token < 2 * 100 * 32 * 4


def test_the_page_says_them_in_words(recipe, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(path)]) == 0
    page = capsys.readouterr().out
    assert page.startswith("tiny: 24 steps of 32 rows on 3 workers")
    for expected in (
        r"first +121 +1 +120 +1 +50\.0%", r"second +60 +0 +60 +2 +50\.0%", "first: dropped positive is missing: 1 row",
        r"180 rows with \d+ distinct texts", r"240 rows = 8 steps of 32 rows, but one of 16",
        r"24 steps = 3\.00 epochs = \d+ pairs",
        r"student +\d+\.\d MB", r"embeddings +\d+\.\d MB", r"\d+% of that is the guide", r"\d+\.\d% padding",
    ):  # fmt: skip
        assert re.search(expected, page), (expected, page)
    assert max(map(len, page.splitlines())) < 160


def test_without_a_guide(recipe):
    page = "\n".join(preview(parse_config({**recipe, "guide": None})).lines())
    assert "none: plain InfoNCE" in page and "there is no guide" in page


def test_sizes_are_readable():
    assert [module._size(n) for n in (5e5, 2e7, 3.2e9)] == ["0.5 MB", "20.0 MB", "3.20 GB"]
    assert [module._flops(n) for n in (3e8, 5e12, 2e16, 9e20)] == [
        "0.3 GFLOP",
        "5.0 TFLOP",
        "20.0 PFLOP",
        "900.0 EFLOP",
    ]
    assert module._aligned([("a", "10"), ("bbb", "5")]) == ["a    10", "bbb   5"]
