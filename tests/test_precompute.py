"""Guide embeddings by a pool of actors: a killed one loses nothing, a mistake is one sentence."""

import json
import logging
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_guide_cache import Inputs, assert_whole
from tiny import recipe, save_tiny_model, words, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.config import Columns, DataConfig, RunConfig, SourceConfig
from gist_dist.data.corpus import prepare
from gist_dist.models import guide_cache
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import open_guide_cache
from gist_dist.on_ray.tasks import precompute as module
from gist_dist.on_ray.tasks.precompute import precompute, precompute_inputs
from gist_dist.on_ray.tasks.triplets import resolve_classification
from gist_dist.recipe import parse_config

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def a_pool_of_small_shards(monkeypatch):
    monkeypatch.setattr(guide_cache, "MIN_SHARD_TOKENS", 2**15)
    monkeypatch.setattr(module, "IN_PROCESS_FLOPS", 0)


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "guide", width=32)


@pytest.fixture
def config(tmp_path, model) -> RunConfig:
    random = Random(0)
    rows = [{"anchor": words(random, 3, 30), "positive": words(random, 3, 40)} for _ in range(8000)]
    return parse_config(recipe(tmp_path, model, model, write_jsonl(tmp_path / "rows.jsonl", rows))).absolute_paths()


def actors(doing: str = "") -> list["psutil.Process"]:
    """Of this session's Ray, which is a child of this process; Ray shows in their titles what they do."""
    import psutil  # comes with Ray

    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # ended meanwhile
            if f"ray::_Actor{doing}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_an_actor_at_work(folder: Path, killed: list[int]) -> None:
    """As soon as a few shards are written."""
    deadline = time.monotonic() + 100
    while not killed and time.monotonic() < deadline:
        if len(list(folder.rglob("*.arrow"))) >= 3 and (busy := actors(".encode")):
            busy[0].kill()
            killed.append(busy[0].pid)
        time.sleep(0.005)


def test_killed_actor_loses_only_its_shard(ray_session, config, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    guide = Guide(config.guide)
    corpus = prepare(config, Student(config.student), guide, progress=lambda line: None)
    given, for_actor = [], module._CorpusInputs.for_actor
    monkeypatch.setattr(
        module._CorpusInputs, "for_actor", lambda self, shard: given.append(shard) or for_actor(self, shard)
    )
    killed = []
    arguments = Path(config.guide_cache_dir), killed
    killer = threading.Thread(target=kill_an_actor_at_work, args=arguments, daemon=True)
    killer.start()
    filled = precompute(config, corpus, guide)
    killer.join()

    assert len(killed) == 1 and any("on 2 actors" in message for message in caplog.messages)
    cache = open_guide_cache(config, guide, verify=True)
    num_inputs = len(np.unique(corpus.guide_keys, axis=0))
    assert filled.num_encoded == filled.num_inputs == num_inputs == len(cache)
    assert len(cache.shards) > 8 and len(given) == len(cache.shards) + 1
    again = precompute(config, corpus, guide)
    assert again.num_encoded == 0 and len(given) == len(cache.shards) + 1
    texts = corpus.texts_in_use[::50]
    expected = torch.cat([guide.encode([ids]) for ids in corpus.guide_tokens(texts)]).numpy()
    found = cache.embeddings(cache.find(corpus.guide_keys[texts]))
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-9, atol=2**-15)


def test_what_goes_wrong_in_an_actor_is_one_sentence(ray_session, config):
    guide, inputs = Guide(config.guide), Inputs(100)
    shutil.rmtree(config.guide.model)
    with pytest.raises(UserError, match=r"^guide.model: no folder '.*/guide'"):
        precompute_inputs(config, (np.concatenate(inputs.tokens), inputs.lengths), guide)
    deadline = time.monotonic() + 30
    while actors():
        assert time.monotonic() < deadline, "actors live on"
        time.sleep(0.05)


def test_little_work_is_done_without_ray(config, monkeypatch):
    monkeypatch.undo()
    guide, inputs = Guide(config.guide), Inputs(300)
    filled = precompute_inputs(config, (np.concatenate(inputs.tokens), inputs.lengths), guide)
    assert filled.num_encoded == inputs.num_distinct
    assert_whole(open_guide_cache(config, guide), inputs, guide)


# ------------------------------------------------------------------------------------------ classification sets


@pytest.fixture
def labelled(config, tmp_path, monkeypatch) -> RunConfig:
    """The recipe with a second source: texts of three classes, each with words of its own, and one copy."""
    monkeypatch.undo()
    random = Random(1)
    texts = {label: sorted({f"{word} {words(random, 1, 3)}" for _ in range(30)}) for label, word in LABELS.items()}
    rows = [{"text": text, "label": label} for label in texts for text in texts[label]]
    rows = [*rows, rows[0], {"text": rows[5]["text"].upper(), "label": rows[5]["label"]}, {"text": "", "label": "1"}]
    path = write_jsonl(tmp_path / "classes.jsonl", rows)
    source = SourceConfig(path=str(path), columns=Columns(text="text", label="label"), weight=2.0)
    return config.model_copy(update={"data": DataConfig(sources=(*config.data.sources, source))})


LABELS = {"1": "amber", "2": "basin", "3": "cedar"}


def test_a_classification_set_becomes_triplets(labelled):
    student, guide = Student(labelled.student), Guide(labelled.guide)
    resolved = resolve_classification(labelled, student, guide)
    pairs, triplets = resolved.data.sources
    assert pairs == labelled.data.sources[0] and triplets.weight == 2.0 and triplets.label == "classes"
    rows = pq.read_table(triplets.path).to_pylist()
    texts = [json.loads(line)["text"] for line in Path(labelled.data.sources[1].path).read_text().splitlines()[:-1]]
    assert [row["anchor"] for row in rows] == texts
    for row in rows:
        of = {role: row[role].lower().split()[0] for role in ("anchor", "positive", "negative")}
        assert of["anchor"] == of["positive"] != of["negative"]
        assert row["anchor"].lower() != row["positive"].lower(), "the student can't tell them apart"

    written = Path(triplets.path).stat().st_mtime_ns
    assert resolve_classification(labelled, student, guide) == resolved
    assert Path(triplets.path).stat().st_mtime_ns == written
    other = resolve_classification(labelled.model_copy(update={"seed": 7}), student, guide).data.sources[1].path
    assert other != triplets.path and pq.read_table(other).to_pylist() != rows
    corpus = prepare(resolved, student, guide, progress=lambda line: None)
    assert corpus.source_names == ["rows", "classes"] and (corpus.num_negatives[-len(rows) :] == 1).all()


def test_a_classification_set_needs_a_guide(labelled):
    with pytest.raises(UserError, match=r"data.sources\[1\]: triplets .* set guide.model"):
        resolve_classification(labelled, Student(labelled.student), None)
