"""What guides a step: a model, the cache, the student itself, or a frozen copy of it that is renewed."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Row, reference_loss
from safetensors.numpy import load_file
from tiny import one_step, prepared, recipe, run_group, save_tiny_model, wait_for, words, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.core.collectives import World
from gist_dist.core.plan import plan_batch
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import GuideCache, embedding_fingerprint, fill
from gist_dist.recipe import parse_config
from gist_dist.runs.metrics_file import read_metrics
from gist_dist.training.trainer import train

STEPS = 8
DEATH = 9


class Stage:
    """Tiny models, 90 rows with hard negatives and texts that only the student can tell apart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student = save_tiny_model(folder / "student")
        self.guide = save_tiny_model(folder / "guide", width=24, seed=3)
        rng = random.Random(1)
        rows: list[dict[str, Any]] = [{"anchor": words(rng, 1, 6), "positive": words(rng, 3, 12)} for _ in range(90)]
        for i, row in enumerate(rows[::3]):
            row["negatives"] = [words(rng, 2, 8)]
            # The guide reads 10 tokens: these two are the same to it.
            row["positive"] = f"{words(random.Random(i // 2), 9, 9)} {words(rng, 2, 3)}"
        self.source = write_jsonl(folder / "rows.jsonl", rows)

    def tree(self, name: str, guide: dict[str, Any], **sections: Any) -> dict[str, Any]:
        fixed = {
            "name": name,
            "student": {"dropout": 0.1},
            "batch": {"global_size": 16, "chunk_tokens": 64},
            "optim": {"steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1.0},
            "checkpoint": {"every_steps": 2, "keep": 2},
        }
        tree = recipe(self.folder, self.student, None, self.source, **{**fixed, **sections})
        return tree | {"guide": guide}

    def run(self, name: str, guide: dict[str, Any], world_size: int = 1, die_at: int = 0) -> Path:
        tree = self.tree(name, guide)
        config = parse_config(tree)
        config.run_dir.mkdir(exist_ok=True)
        model = Guide(config.guide_or_student) if config.has_guide_model else None
        corpus = prepared_with(tree, model)
        cache = None
        if config.guide.mode == "cache":
            cache = {"fingerprint": embedding_fingerprint(model), "width": model.width}
            fill_whole(GuideCache(config.guide_cache_dir, **cache), corpus, model)
        rendezvous = self.folder / f"{name}-{world_size}-{die_at}"
        arguments = (tree, str(corpus.folder), cache, die_at)
        run_group(run_train, world_size, rendezvous, *arguments, exit_code=DEATH if die_at else 0)
        return config.run_dir


def prepared_with(tree: dict[str, Any], guide: Guide | None) -> Corpus:
    config = parse_config(tree)
    return prepare(config, Student(config.student), guide, progress=lambda line: None)


def fill_whole(cache: GuideCache, corpus: Corpus, guide: Guide) -> None:
    texts = corpus.texts_in_use
    lengths = corpus.guide_lengths[texts]
    fill(cache, corpus.guide_keys[texts], lambda chosen: corpus.guide_tokens(texts[chosen]), lengths, guide, 512)


def run_train(world: World, tree: dict[str, Any], corpus: str, cache: dict[str, Any] | None, die_at: int) -> None:
    class Mortal(Student):
        def encode(self, tokens, dropout_seed):
            if dropout_seed[1] == die_at:
                wait_for(config.run_dir / "checkpoints" / f"step-{die_at - 2:08d}" / "COMMIT.json")
                os._exit(DEATH)
            return super().encode(tokens, dropout_seed)

    config = parse_config(tree)
    guide: Guide | GuideCache | None = None
    if cache:
        guide = GuideCache(config.guide_cache_dir, **cache)
    elif config.has_guide_model:
        guide = Guide(config.guide_or_student)
    train(config, Corpus(Path(corpus)), Mortal(config.student), guide, world)


def curve(run_dir: Path, *keys: str) -> np.ndarray:
    return np.array([[line[key] for key in keys] for line in read_metrics(run_dir / "metrics.jsonl")])


def weights(run_dir: Path) -> dict[str, np.ndarray]:
    return load_file(run_dir / "model" / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    for name, weight in weights(one).items():
        np.testing.assert_array_equal(weight, weights(other)[name], err_msg=name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("guidance"))


@pytest.fixture(scope="module")
def online(stage) -> Path:
    return stage.run("online", {"model": str(stage.guide), "max_tokens": 10})


@pytest.fixture(scope="module")
def refreshed(stage) -> Path:
    return stage.run("refreshed", {"refresh": 3})


def test_texts_that_are_one_to_the_guide_are_encoded_once(stage):
    tree = stage.tree("inputs", {"model": str(stage.guide), "max_tokens": 10})
    _, corpus = prepared(tree)
    plan = plan_batch(corpus, np.arange(corpus.num_rows), 1, 64, with_guide=True)
    assert len(plan.guide_inputs) < len(plan.texts) == corpus.num_texts
    for text, position in zip(plan.texts, plan.guide_input_of, strict=True):
        theirs, own = corpus.guide_tokens(np.array([plan.guide_inputs[position], text]))
        np.testing.assert_array_equal(theirs, own)
    assert sum(len(chunk.texts) for chunk in plan.guide_chunks) == len(plan.guide_inputs)


def test_cached_run_masks_what_an_online_run_masks(stage, online):
    cached = stage.run("cached", {"model": str(stage.guide), "max_tokens": 10, "mode": "cache"})
    keys = ("loss", "grad_norm", "masked_fraction", "guide_positive_similarity", "identical_dropped")
    np.testing.assert_allclose(curve(cached, *keys), curve(online, *keys), rtol=1e-5)
    np.testing.assert_array_equal(curve(cached, "masked_fraction"), curve(online, "masked_fraction"))
    assert (curve(cached, "masked_fraction") > 0).all()
    two = stage.run("cached-2", {"model": str(stage.guide), "max_tokens": 10, "mode": "cache"}, world_size=2)
    assert_equal_weights(two, cached)


def test_cache_that_lacks_a_text_is_refused(stage):
    guide = {"model": str(stage.guide), "max_tokens": 9, "mode": "cache"}
    tree = stage.tree("lacking", guide)
    config, corpus = prepared(tree)
    model = Guide(config.guide)
    cache = GuideCache(config.guide_cache_dir, embedding_fingerprint(model), model.width)
    with pytest.raises(UserError, match=f"lacks {corpus.num_texts} of {corpus.num_texts} texts"):
        train(config, corpus, Student(config.student), cache, World())


def test_mode_self_is_guided_by_the_students_own_embeddings(stage):
    tree = stage.tree("self", {"mode": "self"}, student={"dropout": 0.0})
    tree["data"] = tree["data"] | {"known_positives": "off"}
    config = parse_config(tree)
    corpus = prepared_with(tree, None)
    student = Student(config.student)
    student.model.double()
    outcome = one_step(World(), config, corpus, student, None)

    texts = corpus.texts_in_use
    number = {text: i for i, text in enumerate(texts.tolist())}
    with torch.no_grad():
        embeddings = student.encode(corpus.student_tokens(texts), (0,))
    rows = [
        Row(
            number[int(corpus.anchors[i])],
            number[int(corpus.positives[i])],
            tuple(number[n] for n in corpus.negatives_of(np.array([i])).tolist()),
        )
        for i in range(corpus.num_rows)
    ]
    identity = corpus.identity[texts].tolist()
    loss, _ = reference_loss(rows, embeddings, embeddings, identity, config.loss)
    assert outcome["loss"] == pytest.approx(loss.item(), abs=1e-10)
    unguided, _ = reference_loss(rows, embeddings, None, identity, config.loss)
    assert abs(outcome["loss"] - unguided.item()) > 1e-3


def test_mode_self_does_not_depend_on_the_number_of_workers(stage):
    one, two = (stage.run(f"self-{n}", {"mode": "self"}, world_size=n) for n in (1, 2))
    assert (curve(one, "masked_fraction") > 0).all()
    assert_equal_weights(one, two)


def test_refreshed_guide_is_the_student_of_the_last_renewal(stage, refreshed):
    """Up to step 3 the untrained student guides; then copies of steps 3 and 6, which change the masks."""
    never = stage.run("never-refreshed", {"model": str(stage.student)})
    masked, fixed = curve(refreshed, "masked_fraction"), curve(never, "masked_fraction")
    np.testing.assert_array_equal(masked[:3], fixed[:3])
    assert (masked[3:] != fixed[3:]).any()
    checkpoints = refreshed / "checkpoints"
    copy, student = (
        load_file(checkpoints / file) for file in ("step-00000008/guide.safetensors", "step-00000006/model.safetensors")
    )
    assert copy.keys() == student.keys() and all(np.array_equal(copy[name], student[name]) for name in student)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_takes_up_its_refreshed_guide(stage, refreshed, world_size):
    """Dead in step 6: it goes on from the checkpoint of step 4, guided by the copy of step 3."""
    name = f"refreshed-resumed-{world_size}"
    run_dir = stage.run(name, {"refresh": 3}, world_size=2, die_at=6)
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 5
    stage.run(name, {"refresh": 3}, world_size=world_size)
    assert_equal_weights(run_dir, refreshed)


def test_cache_is_rebuilt_for_a_refreshed_guide(stage, refreshed):
    run_dir = stage.run("refreshed-cached", {"refresh": 3, "mode": "cache"}, world_size=2)
    keys = ("loss", "masked_fraction")
    np.testing.assert_allclose(curve(run_dir, *keys), curve(refreshed, *keys), rtol=1e-5)
