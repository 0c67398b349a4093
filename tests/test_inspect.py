"""`gist-dist inspect`: its numbers are those of the loss's rules, and its advice follows from them."""

import json
import random

import numpy as np
import pytest
import tiny
import torch

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.core.candidates import PARTS, BatchIndex, row_blocks
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import plan_batch
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import encode_inputs
from gist_dist.on_ray.driver import prepare
from gist_dist.planning import inspect as module
from gist_dist.planning.advice import advise, judge_guide
from gist_dist.planning.inspect import inspect
from gist_dist.recipe import parse_config

ROWS = 48


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Pairs of 8 topics that share positives, and a classification set of 4 labels."""
    folder, rng = tmp_path_factory.mktemp("inspect"), random.Random(1)
    topics = [tiny.words(rng, 3, 5) for _ in range(8)]
    pairs = [{"anchor": f"{topics[i % 8]} {tiny.words(rng, 1, 3)}", "positive": topics[i % 8]} for i in range(ROWS - 8)]
    pairs += [{"anchor": topics[i], "positive": f"{topics[i]} {tiny.words(rng, 2, 3)}"} for i in range(8)]
    labelled = [{"text": f"{tiny.WORDS[i % 4]} {tiny.words(rng, 2, 4)}", "label": f"l{i % 4}"} for i in range(40)]
    sources = [
        {"path": str(tiny.write_jsonl(folder / "pairs.jsonl", pairs)), "name": "pairs"},
        {"path": str(tiny.write_jsonl(folder / "labels.jsonl", labelled)), "name": "labels",
         "columns": {"text": "text", "label": "label"}},
    ]  # fmt: skip
    return tiny.recipe(
        folder, tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", seed=1),
        data={"sources": sources}, batch={"global_size": 8, "chunk_tokens": 128}, loss={"temperature": 0.1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def inspected(tree):
    config = parse_config(tree)
    return inspect(config, *prepare(config)).contents


def test_counts_are_those_of_the_loss(tree, inspected):
    config = parse_config(tree)
    student, guide, corpus = prepare(config)
    rows = module._sample(config, corpus, 0, None)[:16]
    plan = plan_batch(corpus, rows, 0, 128, False)
    batch = BatchIndex(*(torch.from_numpy(a) for a in (plan.anchors, plan.positives, plan.negatives, plan.identity)))
    frozen = Guide.copy_of(student, config.guide)
    ours = torch.from_numpy(encode_inputs(frozen, corpus.student_tokens(plan.texts), 128)).float()
    theirs = torch.from_numpy(encode_inputs(guide, corpus.guide_tokens(plan.texts), 128)).float()
    counts = gist_loss(ours, theirs, batch, row_blocks(batch, config.loss, 1e6), config.loss).counts
    expected = {
        name: sum(float(counts.get(f"{name}{part}", 0)) for part in PARTS) for name in ("masked_", "candidates_")
    }

    truth, cluster = module._known_clusters(config, corpus, 0)
    sample = module._Sample(config, corpus, rows, plan.texts, ours, theirs, cluster)
    assert truth == "pairs"
    (measured,) = [sample.measure(16)]
    assert 0 < expected["masked_"] < expected["candidates_"]
    assert measured["masked_fraction"] == pytest.approx(expected["masked_"] / expected["candidates_"])


@pytest.mark.parametrize("loss", [{"negatives": "own"}, {"guard_negatives": True, "margin": 0.3}], ids=str)
def test_rules_of_hard_negatives_are_followed(tree, loss):
    config = parse_config(tree | {"loss": tree["loss"] | loss})
    student, guide, corpus = prepare(config)
    rows = module._sample(config, corpus, 1, None)[:12]
    plan = plan_batch(corpus, rows, 0, 128, False)
    arrays = (plan.anchors, plan.positives, plan.negatives, plan.identity, plan.negative_rows)
    batch = BatchIndex(*map(torch.from_numpy, arrays))
    ours = torch.from_numpy(
        encode_inputs(Guide.copy_of(student, config.guide), corpus.student_tokens(plan.texts), 128)
    ).float()
    theirs = torch.from_numpy(encode_inputs(guide, corpus.guide_tokens(plan.texts), 128)).float()
    counts = gist_loss(ours, theirs, batch, row_blocks(batch, config.loss, 1e6), config.loss).counts
    masked, candidates = (sum(float(counts[f"{name}_{part}"]) for part in PARTS) for name in ("masked", "candidates"))
    sample = module._Sample(config, corpus, rows, plan.texts, ours, theirs, None)
    assert len(plan.negatives) and 0 < masked < candidates
    assert sample.measure(12)["masked_fraction"] == pytest.approx(masked / candidates)


def test_weights_are_those_of_a_loop_over_candidates(tree):
    """Rows, candidates and rules one by one, in plain Python."""
    config = parse_config(tree)
    student, guide, corpus = prepare(config)
    rows = np.arange(12)
    plan = plan_batch(corpus, rows, 0, 128, False)
    frozen = Guide.copy_of(student, config.guide)
    ours = torch.from_numpy(encode_inputs(frozen, corpus.student_tokens(plan.texts), 128)).float()
    theirs = torch.from_numpy(encode_inputs(guide, corpus.guide_tokens(plan.texts), 128)).float()
    _, cluster = module._known_clusters(config, corpus, 0)
    sample = module._Sample(config, corpus, rows, plan.texts, ours, theirs, cluster)
    at = next(t for t in sample.measure(12)["temperatures"] if t["temperature"] == 0.1)

    topic = {int(t): int(c) for t, c in enumerate(cluster[plan.texts])}
    s, g = ours @ ours.T, theirs @ theirs.T
    sums = dict.fromkeys(("masked_weight", "known_weight", "known_weight_left", "wrong_weight", "hardness"), 0.0)
    for a, p in zip(plan.anchors.tolist(), plan.positives.tolist(), strict=True):
        pairs = [(a, x) for x in plan.positives.tolist()] + [(a, x) for x in plan.anchors.tolist()]
        pairs += [(p, x) for x in plan.positives.tolist()]
        pairs = [(q, x) for q, x in pairs if plan.identity[x] not in (plan.identity[a], plan.identity[p])]
        weight = {(n, q, x): np.exp(float(s[q, x]) / 0.1) for n, (q, x) in enumerate(pairs)}
        total = sum(weight.values())
        masked = {key for key in weight if g[key[1], key[2]] > g[a, p] + 2e-6}
        known = {key for key in weight if topic[key[2]] == topic[a]}
        sums["masked_weight"] += sum(weight[k] for k in masked) / total / 12
        sums["known_weight"] += sum(weight[k] for k in known) / total / 12
        sums["known_weight_left"] += sum(weight[k] for k in known - masked) / total / 12
        sums["wrong_weight"] += sum(weight[k] for k in masked - known) / total / 12
        kept = sum(weight[k] for k in weight.keys() - masked)
        sums["hardness"] += kept / (kept + np.exp(float(s[a, p]) / 0.1)) / 12
    assert sums["known_weight"] > 0.01 and sums["masked_weight"] > 0.01
    assert {key: at[key] for key in sums} == pytest.approx(sums, rel=1e-3)


def test_labels_and_shared_texts_tell_what_belongs_together(inspected):
    pairs, labels = inspected["sources"]
    assert (pairs["truth"], pairs["clusters"], labels["truth"], labels["clusters"]) == ("pairs", 8, "labels", 4)
    for source in (pairs, labels):
        assert [size["rows"] for size in source["sizes"]] == [8]  # the recipe's; 64 rows are not there
        (size,) = source["sizes"]
        assert 0 < size["precision"] <= 1 and 0 < size["recall"] <= 1
        known = [at["known_weight"] for at in size["temperatures"]]
        assert 0 < min(known) and len(known) == 4
        # A higher margin takes out more, and so leaves less on false negatives.
        left = [at["known_weight_left"] for at in source["margins"]]
        masked = [at["masked_fraction"] for at in source["margins"]]
        assert left == sorted(left, reverse=True) and masked == sorted(masked) and left[0] > left[-1]
        assert -1 <= source["agreement"]["correlation"] <= 1
        assert {example["kind"] for example in source["examples"]} & {"dropped, known", "kept, known"}


def test_clustered_batches_are_nearer_to_the_guide(inspected):
    """Rows of one topic come together, and so more known false negatives."""
    (random,), near = inspected["sources"][0]["sizes"], inspected["sources"][0]["clustered"]
    assert near["rows"] == 8 and near["known_fraction"] > 1.3 * random["known_fraction"]
    for source in inspected["sources"]:
        assert any(sentence.startswith("Clustered batches of 8 rows have hardness") for sentence in source["advice"])


def test_a_guide_that_sees_as_the_student_agrees_with_it(tree):
    config = parse_config(tree | {"guide": {"mode": "self"}, "data": {"sources": tree["data"]["sources"][:1]}})
    (source,) = inspect(config, *prepare(config)).contents["sources"]
    assert source["agreement"] == pytest.approx({"correlation": 1.0, "nearest_in_common": 1.0})


def test_advice_follows_the_weights():
    recipe = {"temperature": 0.02, "global_size": 64, "mixing": "homogeneous", "margin": 0.0}

    def source(name, known, left, masked, hardness):
        weight = {"temperature": 0.02, "known_weight": known, "known_weight_left": left}
        weight |= {"masked_weight": masked, "hardness": hardness}
        return {"name": name, "sizes": [{"rows": 64, "temperatures": [weight]}]}

    sources = [
        source("good", 0.5, 0.05, 0.6, 0.9), source("poor", 0.5, 0.4, 0.1, 0.9),
        source("unknown", None, None, 0.3, 0.9), source("clean", 0.01, 0.0, 0.01, 0.1),
    ]  # fmt: skip
    verdicts = [judge_guide(s, recipe)[0] for s in sources]
    assert verdicts == ["worth it", "leaves much", "to be judged", "not needed"]
    text = " ".join(advise(sources, recipe))
    assert "worth it at temperature 0.02 for good." in text and "for clean." in text
    assert "easy for the untrained student in clean: data.mixing=clustered" in text


def test_page_and_numbers_are_written(tree, tmp_path, capsys):
    """Of a recipe whose batches are clustered too, without the guide encoding more than the sample and the set."""
    file, page = tmp_path / "recipe.yaml", tmp_path / "seen.html"
    clustered = tree | {"output_dir": str(tmp_path), "data": tree["data"] | {"mixing": "clustered"}}
    file.write_text(json.dumps(clustered))
    assert main(["inspect", str(file), "--out", str(page), "--rows", "20"]) == 0
    out = capsys.readouterr().out
    assert "weights at temperature 0.1" in out and str(page) in out
    assert not (tmp_path / "corpora" / "clusters").exists()
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert [source["sampled_rows"] for source in numbers["sources"]] == [20, 20]
    html = page.read_text()
    assert "pairs" in html and "known, " not in html.split("<main>")[0] and "<script" not in html


@pytest.mark.parametrize(
    ("changes", "rows", "complaint"),
    [({"guide": None}, 100, r"set guide\.model"), ({}, 1, "--rows 1.* 2")],
)
def test_what_cannot_be_measured_is_said_before_models_are_loaded(tree, changes, rows, complaint):
    with pytest.raises(UserError, match=complaint):
        module.check_inspect(parse_config(tree | changes), rows)


def test_long_texts_are_sampled_less_unless_rows_are_asked_for(tree, monkeypatch):
    config = parse_config(tree)
    corpus = prepare(config).corpus
    lengths = corpus.student_lengths[corpus.anchors] + corpus.student_lengths[corpus.positives]
    monkeypatch.setattr(module, "FEWEST_ROWS", 5)
    monkeypatch.setattr(module, "TOKENS_OF_SOURCE", 200)
    rows = module._sample(config, corpus, 0, None)
    assert 5 < len(rows) < ROWS and lengths[rows].sum() <= 200
    assert np.array_equal(module._sample(config, corpus, 0, 30)[: len(rows)], rows)
    assert len(module._sample(config, corpus, 0, 30)) == 30


def test_texts_stay_out_of_a_page_that_shall_show_none(tree):
    config = parse_config(tree | {"tracking": {"report_texts": False, "tensorboard": False}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": config.data.sources[:1]})})
    assert [source["examples"] for source in inspect(config, *prepare(config)).contents["sources"]] == [[]]
