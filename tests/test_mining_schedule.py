"""data.mine: hard negatives in training, by the guide first and then by the student, as a function of the step."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import recipe, run_group, save_tiny_model, words, write_jsonl
from tiny_runs import assert_same_run, checkpoints, curve

from gist_dist.common.errors import UserError
from gist_dist.core.collectives import World
from gist_dist.core.plan import plan_batch
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.data.mining import by_row, minable_rows, mine_block, options_of, plan_corpus_search
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import encode_inputs
from gist_dist.planning.preview import preview
from gist_dist.recipe import parse_config
from gist_dist.training.mining_schedule import MiningSchedule
from gist_dist.training.train_state import RunTrainState
from gist_dist.training.trainer import train

EVERY, STEPS = 3, 8


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("mine"), random.Random(4)
    rows = [{"anchor": words(rng, 2, 6), "positive": words(rng, 3, 9)} for _ in range(60)]
    rows[0]["negatives"] = [words(rng, 3, 5)]
    return recipe(
        folder, save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=1),
        write_jsonl(folder / "rows.jsonl", rows), student={"dropout": 0.1},
        data={"mine": {"negatives": 2, "every_steps": EVERY, "relative_margin": None}},
        batch={"global_size": 16, "chunk_tokens": 64}, optim={"steps": STEPS, "learning_rate": 1e-3},
        checkpoint={"every_steps": 2, "keep": 9, "retry_seconds": 0},
    )  # fmt: skip


def opened(config, encoders=None) -> Corpus:
    """With what the guide mines before training."""
    student, guide = encoders or (Student(config.student), Guide(config.guide))
    corpus = prepare(config, student, guide, progress=lambda line: None)
    vectors = encode_inputs(guide, corpus.guide_tokens(np.arange(corpus.num_texts)), 64)
    mined = mined_by(config, corpus, vectors)
    corpus = Corpus(corpus.folder)
    corpus.adopt(mined)
    corpus.mined_digest = "of the guide"
    return corpus


def mined_by(config, corpus, vectors):
    rows, options = minable_rows(config, corpus), options_of(config.data.mine)
    search = plan_corpus_search(corpus, options, rows)
    texts = [mine_block(search, b, lambda wanted: vectors[wanted], options, config.seed).texts for b in search.blocks()]
    return by_row(corpus, rows, search, np.concatenate(texts))


def run(world: World, tree, requests=lambda: None, dtype=torch.float32) -> str:
    config = parse_config(tree)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    encoders = Student(config.student), Guide(config.guide)
    for encoder in encoders:
        encoder.model.to(dtype)
    return train(config, opened(config), *encoders, world, requests)


def run_in_fp64(world: World, tree) -> str:
    return run(world, tree, dtype=torch.float64)


def test_rows_have_their_own_negatives_and_then_the_mined_ones(tree):
    corpus = opened(parse_config(tree))
    assert (corpus.num_own_negatives.sum(), corpus.num_negatives.sum()) == (1, 1 + 2 * 60)
    own = corpus.own_negatives_of(np.array([0]))
    rows = np.array([5, 0, 7])
    expected = [*corpus.mined[5], *own, *corpus.mined[0], *corpus.mined[7]]
    assert corpus.negatives_of(rows).tolist() == expected
    plan = plan_batch(corpus, rows, 1, 64, with_guide=True)
    assert plan.texts[plan.negatives].tolist() == expected
    positives = set(corpus.positives.tolist())
    assert set(corpus.mined.ravel().tolist()) <= positives
    assert not any(corpus.positives[row] in corpus.mined[row] for row in range(60))


def test_batches_do_not_depend_on_what_is_mined(tree):
    config = parse_config(tree)
    with_mined = opened(config)
    without = Corpus(with_mined.folder)
    for one, other in zip(*(Sampler(c, config).epoch(0).batches for c in (with_mined, without)), strict=True):
        assert np.array_equal(one, other)


def test_the_student_finds_its_own_nearest_texts(tree):
    """By brute force over its embeddings, without dropout, on the step's weights."""
    config = parse_config(tree)
    corpus, student = opened(config), Student(config.student)
    before = corpus.mined.copy()
    schedule = MiningSchedule(
        RunTrainState(config, corpus, student, None, torch.optim.SGD(student.parameters(), 0.1), World()), 9
    )
    assert [step for step in range(1, 10) if schedule.changes_after(step)] == [3, 6]
    schedule.renew(3)
    assert student.model.training
    student.model.eval()
    with torch.inference_mode():
        vectors = student.embed(corpus.student_tokens(np.arange(corpus.num_texts))).half().double()
    vectors = vectors.numpy()
    scores = vectors[corpus.anchors] @ vectors[corpus.positives].T
    for row in range(60):
        same = corpus.identity[corpus.positives]
        own = (same == corpus.identity[corpus.positives[row]]) | (same == corpus.identity[corpus.anchors[row]])
        nearest = np.sort(np.where(own, -np.inf, scores[row]))[:-3:-1]
        found = vectors[corpus.mined[row]] @ vectors[corpus.anchors[row]]
        assert found.tolist() == pytest.approx(nearest.tolist(), abs=2e-3)
    assert (corpus.mined != before).any()


def test_curves_do_not_depend_on_the_number_of_workers(tree, tmp_path):
    one, two = (tree | {"name": name} for name in ("one", "two"))
    assert run_in_fp64(World(), one) == "finished"
    assert run_group(run_in_fp64, 2, tmp_path, two) == ["finished", "finished"]
    assert_same_run(one, two, tolerance=1e-9)
    assert all(line["masked_fraction_an"] is not None for line in curve(one))


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_resumed_run_is_the_run(tree, stop_after):
    """Stopped before, at and after the first renewal."""
    whole, cut = tree | {"name": f"whole-{stop_after}"}, tree | {"name": f"cut-{stop_after}"}
    assert run(World(), whole) == "finished"
    requests = iter([None] * (stop_after - 1) + ["stop"])
    assert run(World(), cut, lambda: next(requests)) == "stopped"
    assert stop_after in checkpoints(cut)
    mined = parse_config(cut).run_dir / "checkpoints" / f"step-{stop_after:08d}" / "mined.safetensors"
    assert any(Path(mined).parent.parent.glob(f"step-*{stop_after}/mined.safetensors")) == (stop_after >= EVERY)
    assert run(World(), cut) == "finished"
    assert_same_run(whole, cut)


def test_mining_again_changes_the_run(tree):
    again, once = tree | {"name": "again"}, tree | {"name": "once"}
    once["data"] = tree["data"] | {"mine": tree["data"]["mine"] | {"every_steps": None}}
    assert run(World(), again) == run(World(), once) == "finished"
    losses = [[line["loss"] for line in curve(t)] for t in (again, once)]
    assert losses[0][:EVERY] == losses[1][:EVERY] and losses[0][EVERY] != losses[1][EVERY]


def test_other_negatives_to_begin_with_are_another_run(tree):
    cut = tree | {"name": "other"}
    requests = iter([None, "stop"])
    assert run(World(), cut, lambda: next(requests)) == "stopped"
    config = parse_config(cut)
    corpus = opened(config)
    corpus.mined_digest = "of another guide"
    with pytest.raises(UserError, match=r"mined .*'of the guide' .*'of another guide'"):
        train(config, corpus, Student(config.student), Guide(config.guide), World())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"guide": None}, r"data\.mine .*guide.*none; set guide\.model"),
        ({"guide": {"mode": "self"}}, r"data\.mine .*guide.*student is its own"),
        ({"data": {"mine": {"negatives": 0}}}, r"data\.mine\.negatives = 0.* 1"),
        (
            {"data": {"sources": [{"path": "x", "columns": {"text": "t", "label": "l"}}]}},
            r"data\.mine.*classification sets",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_read(tree, changes, complaint):
    changed = {key: tree[key] | value if key == "data" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=complaint):
        parse_config(tree | changed)


def test_plan_tells_of_it(tree):
    config = parse_config(tree)
    student, guide = Student(config.student), Guide(config.guide)
    page = "\n".join(preview(config, student, guide, opened(config, (student, guide))).lines())
    assert "2 hard negatives more a row, by the guide before training and by the student after every 3 steps" in page
