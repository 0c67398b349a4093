"""`gist-dist plan`: its numbers are those of the run."""

import json
import re

import numpy as np
import pytest
import tiny
import yaml

from gist_dist.cli import main
from gist_dist.config import RunConfig
from gist_dist.data.sampler import Sampler
from gist_dist.data.statistics import data_summary, repeated_texts
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import fill, open_guide_cache
from gist_dist.on_ray.driver import prepare
from gist_dist.planning import preview as module
from gist_dist.planning.preview import Preview, preview
from gist_dist.recipe import parse_config
from gist_dist.report import build_report
from gist_dist.runs.folder import RunFolder


def planned(config: RunConfig) -> Preview:
    return preview(config, *prepare(config))


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
            {"path": str(tiny.write_jsonl(folder / "second.jsonl", second)), "weight": 2,
             "filters": {"max_words": 30}}]},
        batch={"global_size": 32, "chunk_tokens": 100}, optim={"epochs": 3}, cluster={"num_workers": 3},
    )  # fmt: skip


def test_numbers_are_those_of_the_run(recipe):
    config = parse_config(recipe)
    seen = planned(config)
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
    assert seen.student.max_tokens == module.Student(config.student).max_tokens
    # Two layers keep at least their inputs and outputs, and little more than forty vectors of width a token.
    assert 2 * 2 * 32 * 4 < seen.activation_bytes_per_token < 2 * 100 * 32 * 4
    # The cache holds what the guide can tell apart: equal token ids once.
    inputs = {tokens.tobytes(): len(tokens) for tokens in corpus.guide_tokens(np.arange(corpus.num_texts))}
    assert (seen.guide_inputs.number, seen.guide_inputs.num_tokens) == (len(inputs), sum(inputs.values()))
    assert seen.guide_inputs.num_missing == len(inputs)


def test_the_page_says_them_in_words(recipe, tmp_path):
    page = "\n".join(planned(parse_config(recipe)).lines())
    assert page.startswith("tiny: 24 steps of 32 rows on 3 workers")
    for expected in (
        r"first +121 +1 +120 +120 .* 1 +50\.0%", r"second +60 +0 +60 +120 .* 2 +50\.0%", r"in all +181 +1 +180 +240",
        r"first: dropped 1 of 121 rows: positive is missing \(1\); the first .*first.jsonl row 120: ",
        r"second: filtered by max words 30", r"180 rows with \d+ distinct texts",
        r"240 rows = 8 steps of 32 rows, but one of 16", r"24 steps = 3\.00 epochs = \d+ pairs",
        r"student +\d+\.\d MB", r"embeddings +\d+\.\d MB", r"\d+% of that is the guide", r"\d+\.\d% padding",
        r"cached +\d+ distinct inputs, \d+\.\d GFLOP once, \d+\.\d MB on disk as fp16", r"pays +after \d\.\d\d epochs",
        r"advice +guide.mode=cache would save about \d+% of a step's encoder work, \d+% of the run's",
    ):  # fmt: skip
        assert re.search(expected, page), (expected, page)
    assert max(map(len, page.splitlines())) < 160


def test_the_command_prints_the_page(recipe, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(path)]) == 0
    assert capsys.readouterr().out.startswith("tiny: 24 steps of 32 rows on 3 workers")


def guided(recipe, guide, **optim) -> module.Preview:
    return planned(parse_config({**recipe, "guide": guide, "optim": {"epochs": 3} | optim}))


def once_through(seen: module.Preview) -> float:
    """FLOP of the guide on every distinct input, attention at the mean length."""
    tokens, shape = seen.guide_inputs.num_tokens, seen.guide
    attention = 4 * shape.num_layers * shape.hidden * tokens / seen.guide_inputs.number
    return tokens * (2 * shape.num_encoding + attention)


def test_attention_counts_by_the_longest_text_of_each_chunk(recipe):
    seen = guided(recipe, recipe["guide"])
    shape, products, scores = seen.student, [], []
    for plan in seen.plans:
        padded = [(len(chunk.texts), chunk.longest) for chunk in plan.student_chunks]
        products.append(sum(texts * length * 2 * shape.num_encoding for texts, length in padded))
        scores.append(sum(texts * length**2 * 4 * shape.num_layers * shape.hidden for texts, length in padded))
    passes = 4 - seen.kept_share
    assert seen.student_flops == pytest.approx(passes * (np.mean(products) + np.mean(scores)))
    assert np.mean(scores) > 0


def test_a_cache_is_advised_where_it_pays(recipe):
    guide = recipe["guide"]
    # Half an epoch reads little twice: online stays. Three epochs read all texts at least three times.
    short, long = guided(recipe, guide, epochs=0.3), guided(recipe, guide)
    assert "guide.mode=online: the run reads too little twice" in short.lines()[-1]
    assert "guide.mode=cache would save" in long.lines()[-1]
    assert long.cache_flops == short.cache_flops == once_through(long)
    cached = guided(recipe, {**guide, "mode": "cache"})
    assert cached.lines()[-1].strip().startswith("advice  guide.mode=cache saves")
    memory = next(line for line in cached.lines() if line.strip().startswith("guide  "))
    assert re.search(r"guide +0\.0 MB +not loaded", "\n".join(cached.lines())), memory
    wasted = guided(recipe, {**guide, "mode": "cache"}, epochs=0.3)
    assert "guide.mode=online would save" in wasted.lines()[-1]


def test_what_the_cache_has_is_not_counted_again(recipe, tmp_path):
    guide = {**recipe["guide"], "mode": "cache", "cache_dir": str(tmp_path)}
    config, corpus = tiny.prepared({**recipe, "guide": guide})
    model, texts = Guide(config.guide), np.arange(0, corpus.num_texts, 2)
    fill(
        open_guide_cache(config, model), corpus.guide_keys[texts], lambda i: corpus.guide_tokens(texts[i]),
        corpus.guide_lengths[texts], model, 100,
    )  # fmt: skip
    seen = guided(recipe, guide)
    there = len({tokens.tobytes() for tokens in corpus.guide_tokens(texts)})
    assert seen.guide_inputs.number - seen.guide_inputs.num_missing == there > 10
    assert f"{there:,} of them are there" in "\n".join(seen.lines())
    assert 0 < seen.guide_inputs.missing_tokens < seen.guide_inputs.num_tokens


def test_a_refreshed_guide_is_cached_again(recipe):
    guide = {"refresh": 6, "mode": "cache"}
    seen = guided(recipe, guide)
    whole = once_through(seen)
    assert seen.guide.model == recipe["student"]["model"]
    assert seen.cache_flops == pytest.approx(whole + 3 * min(whole, 6 * seen.guide_flops))
    assert "with what is read after each refresh" in "\n".join(seen.lines())


def test_without_a_guide(recipe):
    page = "\n".join(guided(recipe, None).lines())
    assert "none: plain InfoNCE" in page and "there is no guide" in page


def test_the_student_as_its_own_guide(recipe):
    page = "\n".join(guided(recipe, {"mode": "self"}).lines())
    assert "the student's own embeddings (mode self)" in page
    assert "costs nothing: no second model, no second forward" in page


def test_a_hundred_sources_stay_readable(tmp_path):
    rows = [{"anchor": f"{a} {b} {i}", "positive": f"{b} {a}", "task": f"task {i:03d}"}
            for i in range(100) for a in tiny.WORDS[: 3 + i % 7] for b in tiny.WORDS[8:10]]  # fmt: skip
    source = {"path": str(tiny.write_jsonl(tmp_path / "many.jsonl", rows)), "split_by": "task"}
    recipe = tiny.recipe(
        tmp_path, tiny.save_tiny_model(tmp_path / "student"), None,
        data={"sources": [source], "temperature": 2.0}, batch={"global_size": 8},
    )  # fmt: skip
    seen = planned(parse_config(recipe))
    lines = seen.lines()
    assert len(seen.sources) == 100 and sum(s["rows_per_epoch"] for s in seen.sources) == len(rows)
    assert sum("task " in line for line in lines) < 45 and max(map(len, lines)) < 160
    assert any(re.search(r"… and 71 more +\d+", line) for line in lines)
    assert any(re.search(rf"in all +{len(rows):,} +{len(rows):,} +{len(rows):,} .*100\.0%", line) for line in lines)
    assert any("(rows × weight)^(1/2)" in line for line in lines)


def test_data_json_and_the_report_give_the_same_account(tmp_path):
    rows = [{"anchor": f"{a} {b}", "positive": tiny.WORDS[i % 3]} for i, a in enumerate(tiny.WORDS) for b in tiny.WORDS]
    path = tiny.write_jsonl(tmp_path / "labels.jsonl", [*rows, {"anchor": "x"}])
    recipe = tiny.recipe(tmp_path, tiny.save_tiny_model(tmp_path / "student"), None, path, batch={"global_size": 64})
    seen, (config, corpus) = planned(parse_config(recipe)), tiny.prepared(recipe)
    run, sampler = RunFolder(config), Sampler(corpus, config)
    run.create(config)
    run.write_data_summary(data_summary(corpus, sampler))
    data = json.loads((run.folder / "data.json").read_text())
    assert data["sources"] == json.loads(json.dumps(seen.sources))
    repeats = data["duplicates_admitted"]
    assert repeats == sum(repeated_texts(corpus, batch) for batch in seen.epoch.batches) > 900
    reason = f"3 distinct positives in {len(rows):,} rows"
    assert reason in " ".join(" ".join(seen.lines()).split())
    step = {"step": 1, "loss": 1.0, "rows": 64, "repeated_texts": repeated_texts(corpus, sampler.rows(1))}
    (run.folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    build_report(run.folder)
    page = (run.folder / "report.html").read_text()
    assert reason in page and f"{repeats:,}" in page
    contents = json.loads((run.folder / "report.json").read_text())
    assert contents["training"]["repeated_texts"] == step["repeated_texts"] > 50
    assert contents["data"]["sources"][0]["share_of_epoch"] == 1


def test_sizes_are_readable():
    assert [module._size(n) for n in (5e5, 2e7, 3.2e9)] == ["0.5 MB", "20.0 MB", "3.20 GB"]
    assert [module._flops(n) for n in (3e8, 5e12, 2e16, 9e20)] == [
        "0.3 GFLOP",
        "5.0 TFLOP",
        "20.0 PFLOP",
        "900.0 EFLOP",
    ]
    assert module._aligned([("a", "10"), ("bbb", "5")]) == ["a    10", "bbb   5"]
