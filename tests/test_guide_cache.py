"""The guide cache: nothing encoded twice, nothing lost, nothing damaged trusted."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_tiny_model

from gist_dist.common.errors import UserError
from gist_dist.config import GuideConfig
from gist_dist.models import guide_cache
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import GuideCache, embedding_fingerprint, fill, missing_inputs
from gist_dist.models.tokenizer import token_keys

WIDTH = 32
CHUNK_TOKENS = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("guide") / "guide", WIDTH)


@pytest.fixture(scope="module")
def guide(model) -> Guide:
    torch.set_num_threads(1)
    return Guide(GuideConfig(model=str(model)))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(guide_cache, "MIN_SHARD_TOKENS", 1024)


class Inputs:
    """Token ids of random lengths, with their keys, every fifth as an earlier one."""

    def __init__(self, num: int, seed: int = 0, first: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.tokens = [random.integers(5, 80, random.integers(3, 40)).astype(np.int32) for _ in range(num)]
        self.tokens[4::5] = self.tokens[0::5][: len(self.tokens[4::5])]
        self.lengths = np.array([len(ids) for ids in self.tokens], np.int32)
        self.keys = token_keys((np.concatenate(self.tokens), self.lengths))

    @property
    def num_distinct(self) -> int:
        return len({ids.tobytes() for ids in self.tokens})

    def of(self, chosen: np.ndarray) -> list[np.ndarray]:
        return [self.tokens[i] for i in chosen]

    def fill(self, cache: GuideCache, guide: Guide, **options) -> guide_cache.Filled:
        return fill(cache, self.keys, self.of, self.lengths, guide, CHUNK_TOKENS, **options)


def open_cache(folder: Path, guide: Guide, **options) -> GuideCache:
    return GuideCache(str(folder), embedding_fingerprint(guide), guide.width, **options)


def assert_whole(cache: GuideCache, inputs: Inputs, guide: Guide) -> None:
    """Every input has the embedding that the guide alone gives it, to the last bit of fp16 but one."""
    positions = cache.find(inputs.keys)
    assert (positions >= 0).all()
    expected = torch.cat([guide.encode([ids]) for ids in inputs.tokens]).numpy()
    np.testing.assert_allclose(cache.embeddings(positions).astype(np.float32), expected, rtol=2**-9, atol=2**-15)


def test_fill_encodes_every_distinct_input_once(tmp_path, guide, monkeypatch):
    inputs, encoded = Inputs(500), []
    encode = Guide.encode
    monkeypatch.setattr(Guide, "encode", lambda self, tokens: encoded.extend(tokens) or encode(self, tokens))
    cache = open_cache(tmp_path, guide)
    filled = inputs.fill(cache, guide)
    assert len(cache.shards) > 3
    assert len(encoded) == len({ids.tobytes() for ids in encoded}) == inputs.num_distinct < 450
    assert (filled.num_texts, filled.num_inputs, filled.num_encoded) == (500, inputs.num_distinct, len(encoded))
    assert filled.num_bytes == sum(file.stat().st_size for file in Path(cache.place).glob("*.arrow"))
    assert json.loads((Path(cache.place) / "meta.json").read_text())["width"] == WIDTH

    assert inputs.fill(open_cache(tmp_path, guide), guide).num_encoded == 0
    more = Inputs(200, seed=1)
    more.tokens, more.keys = inputs.tokens[:100] + more.tokens, np.concatenate([inputs.keys[:100], more.keys])
    more.lengths = np.concatenate([inputs.lengths[:100], more.lengths])
    encoded.clear()
    cache = open_cache(tmp_path, guide)
    more.fill(cache, guide)
    assert len(encoded) == Inputs(200, seed=1).num_distinct
    monkeypatch.undo()
    assert_whole(cache, inputs, guide)
    assert_whole(cache, more, guide)


def test_find_agrees_with_a_dictionary(tmp_path, guide):
    """With first halves that many keys share, keys in several shards, and keys that are not there."""
    random = np.random.default_rng(0)
    keys = np.stack([random.integers(0, 40, 600), random.integers(0, 2**63, 600)], axis=1).astype(np.uint64)
    keys[::7, 0] += np.uint64(2**63)
    cache = open_cache(tmp_path, guide)
    assert (cache.find(keys) == -1).all() and len(cache) == 0
    vectors = random.standard_normal((600, WIDTH)).astype(np.float16)
    expected = {}
    for start, end in ((0, 200), (150, 300), (300, 301), (301, 400)):
        cache.write(keys[start:end], vectors[start:end])
        expected |= {tuple(key): vector for key, vector in zip(keys[start:end], vectors[start:end], strict=True)}
    cache.refresh()
    wanted = np.concatenate([keys, keys[::-3]])
    positions = cache.find(wanted)
    assert ((positions >= 0) == [tuple(key) in expected for key in wanted]).all() and (positions < 0).sum() > 200
    found = wanted[positions >= 0]
    np.testing.assert_array_equal(cache.embeddings(positions[positions >= 0]), [expected[tuple(key)] for key in found])
    assert cache.embeddings(positions[:0]).shape == (0, WIDTH)
    with pytest.raises(AssertionError, match="has not given"):
        cache.embeddings(positions)


def test_positions_stay_right_when_others_write(tmp_path, guide):
    first, second = Inputs(300), Inputs(300, seed=1)
    cache = open_cache(tmp_path, guide)
    first.fill(cache, guide)
    positions = cache.find(first.keys)
    before = cache.embeddings(positions)
    second.fill(open_cache(tmp_path, guide), guide)
    cache.refresh()
    np.testing.assert_array_equal(cache.embeddings(positions), before)
    assert_whole(cache, second, guide)


def test_of_an_input_in_two_shards_the_older_counts(tmp_path, guide):
    """Whenever a process looks: workers that open the cache while another job writes agree."""
    inputs = Inputs(50)
    cache = open_cache(tmp_path, guide)
    for value in (0.5, 0.25, 0.125):
        cache.write(inputs.keys, np.full((50, WIDTH), value, np.float16))
        cache.refresh()
        for seen in (cache, open_cache(tmp_path, guide)):
            assert (seen.embeddings(seen.find(inputs.keys)) == 0.5).all()
    assert len(cache) == 150


def test_a_thousand_shards_need_no_open_files(tmp_path, guide):
    cache = open_cache(tmp_path, guide)
    for seed in range(20):
        inputs = Inputs(20, seed)
        cache.write(inputs.keys, np.full((20, WIDTH), seed, np.float16))
    before = len(os.listdir("/proc/self/fd"))
    cache.refresh()
    assert len(cache.shards) == 20 and len(os.listdir("/proc/self/fd")) <= before
    assert (cache.embeddings(cache.find(inputs.keys)) == 19).all()


def test_work_is_cut_by_length_into_shards_of_equal_tokens(tmp_path, guide, monkeypatch):
    inputs = Inputs(3000)
    work = missing_inputs(open_cache(tmp_path, guide), inputs.keys, inputs.lengths)
    chosen = np.concatenate(work.shards)
    assert len(chosen) == work.num_inputs == work.num_missing == inputs.num_distinct
    assert (np.diff(inputs.lengths[chosen]) <= 0).all()
    tokens = [int(inputs.lengths[shard].sum()) for shard in work.shards]
    assert len(tokens) > 20 and all(abs(t - 1024) <= 40 for t in tokens[:-1])
    monkeypatch.setattr(guide_cache, "MAX_SHARD_TEXTS", 50)
    work = missing_inputs(open_cache(tmp_path, guide), inputs.keys, inputs.lengths)
    assert max(map(len, work.shards)) == 50 and work.num_missing == inputs.num_distinct


# ------------------------------------------------------------------------------------------ damage


def truncate(file: Path, **_) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path, **_) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def rewrite(file: Path, cache: GuideCache, content: bytes) -> None:
    """Under a name that fits the content: written by a program that was wrong."""
    file.unlink()
    (file.parent / f"{hashlib.sha256(content).hexdigest()}-{len(content)}.arrow").write_bytes(content)


def other_vectors(file: Path, cache: GuideCache, vectors: np.ndarray) -> None:
    keys = cache.shards[cache.names.index(file.name)].keys
    file.unlink()
    guide_cache.write_shard(cache.store, keys[: len(vectors)], vectors)


DAMAGES = {
    "truncated": (truncate, "bytes and was written with"),
    "a bit flipped": (flip_a_bit, "the checksum of"),
    "no Arrow file": (lambda file, cache: rewrite(file, cache, b"x" * 3000), "no Arrow file"),
    "another width": (
        lambda file, cache: other_vectors(file, cache, np.ones((20, WIDTH // 2), np.float16)),
        "not vectors of width 32",
    ),
    "not a number": (
        lambda file, cache: other_vectors(file, cache, np.full((20, WIDTH), np.nan, np.float16)),
        "not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_and_encoded_again(tmp_path, guide, caplog, damage):
    inputs = Inputs(400)
    inputs.fill(open_cache(tmp_path, guide), guide)
    cache = open_cache(tmp_path, guide)
    file = Path(cache.place) / cache.names[1]
    harm, reason = DAMAGES[damage]
    num_lost = len(cache.shards[1].keys)
    harm(file, cache=cache)

    with caplog.at_level(logging.WARNING):
        cache = open_cache(tmp_path, guide, verify=True)
    (record,) = caplog.records
    assert reason in record.message and ".arrow is left out" in record.message
    assert (cache.find(inputs.keys) < 0).any()
    assert inputs.fill(cache, guide).num_encoded == num_lost
    caplog.clear()
    assert_whole(open_cache(tmp_path, guide, verify=True), inputs, guide)
    assert not caplog.records


@pytest.mark.parametrize("damage", ["truncated", "no Arrow file", "another width"])
def test_a_shard_of_the_wrong_form_is_left_out_even_unverified(tmp_path, guide, caplog, damage):
    inputs = Inputs(400)
    cache = open_cache(tmp_path, guide)
    inputs.fill(cache, guide)
    lost = cache.shards[1].keys.copy()
    DAMAGES[damage][0](Path(cache.place) / cache.names[1], cache=cache)
    assert (open_cache(tmp_path, guide).find(lost) == -1).all()
    assert "is left out" in caplog.text


def test_a_place_that_is_a_uri_is_read_through_verified_copies(tmp_path, guide, caplog):
    import fsspec

    fsspec.filesystem("memory").store.clear()
    inputs, node = Inputs(400), str(tmp_path / "node")
    options = {"fingerprint": embedding_fingerprint(guide), "width": WIDTH, "local_copy": node}
    inputs.fill(GuideCache("memory://guides", **options), guide)
    worker = GuideCache("memory://guides", **options)
    assert_whole(worker, inputs, guide)
    copies = sorted(Path(node).rglob("*.arrow"))
    assert [copy.name for copy in copies] == sorted(worker.names) and len(copies) > 3
    assert not any(tmp_path.rglob("*.tmp"))

    flip_a_bit(copies[0])  # of the copy alone: read again
    assert_whole(GuideCache("memory://guides", **options), inputs, guide)
    flip_a_bit(copies[0])
    assert_whole(GuideCache("memory://guides", **options, verify=True), inputs, guide)
    assert not caplog.records

    flip_a_bit(copies[1])  # and of the original
    worker.store.write_bytes(copies[1].name, copies[1].read_bytes())
    with pytest.raises(UserError, match="is damaged"):
        GuideCache("memory://guides", **options)
    cache = GuideCache("memory://guides", **options, verify=True)
    assert "is left out" in caplog.text
    assert inputs.fill(cache, guide).num_encoded > 0
    assert_whole(GuideCache("memory://guides", **options), inputs, guide)
    cache.remove()
    assert not cache.store.list() and not any(Path(node).rglob("*.arrow"))


def test_a_local_place_may_be_copied_too(tmp_path, guide):
    inputs = Inputs(200)
    inputs.fill(open_cache(tmp_path / "shared", guide), guide)
    cache = open_cache(tmp_path / "shared", guide, local_copy=str(tmp_path / "node"))
    assert_whole(cache, inputs, guide)
    assert cache.folder.is_relative_to(tmp_path / "node")


def test_a_place_that_cannot_be_written_is_named(tmp_path, guide):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/\w+.* can't be (read|written)"):
        Inputs(50).fill(open_cache(tmp_path / "file", guide), guide)


def test_broken_guide_is_refused(tmp_path, model):
    guide = Guide(GuideConfig(model=str(model)))
    guide.model[0].model.embeddings.word_embeddings.weight[20] = torch.nan
    inputs = Inputs(200)
    with pytest.raises(UserError, match=r"guide.model: '.*' gives embeddings that are not finite for \d+ of \d+ texts"):
        inputs.fill(open_cache(tmp_path, guide), guide)


# ------------------------------------------------------------------------------------------ several processes


def start(function, *arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "sentence_transformers", "gist_dist.training.trainer"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def fill_slowly(folder: Path, model: Path, num: int, pause_s: float = 0.0) -> None:
    torch.set_num_threads(1)
    guide_cache.MIN_SHARD_TOKENS = 1024
    guide, inputs = Guide(GuideConfig(model=str(model))), Inputs(num)

    def tokens_of(chosen: np.ndarray) -> list[np.ndarray]:
        time.sleep(pause_s)
        return inputs.of(chosen)

    fill(open_cache(folder, guide), inputs.keys, tokens_of, inputs.lengths, guide, CHUNK_TOKENS)


def shards_in(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.arrow"))


def test_a_killed_job_goes_on_where_it_was(tmp_path, model, guide):
    inputs = Inputs(2000)
    process = start(fill_slowly, tmp_path, model, 2000, 0.02)
    while len(shards_in(tmp_path)) < 5:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

    cache = open_cache(tmp_path, guide, verify=True)
    assert len(cache.shards) >= 5
    num_before = len(cache)
    assert num_before < inputs.num_distinct
    assert inputs.fill(cache, guide).num_encoded == inputs.num_distinct - num_before
    assert_whole(open_cache(tmp_path, guide, verify=True), inputs, guide)


def test_two_jobs_may_fill_at_once(tmp_path, model, guide):
    jobs = [start(fill_slowly, tmp_path, model, num, 0.005) for num in (1000, 1500)]
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0, 0]
    cache = open_cache(tmp_path, guide, verify=True)
    assert_whole(cache, Inputs(1000), guide)
    assert_whole(cache, Inputs(1500), guide)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("size", [2, 3])
def test_the_workers_shares_are_the_whole(tmp_path, guide, size):
    """Also where one sees what others have written already."""
    inputs = Inputs(600)
    early = [open_cache(tmp_path, guide) for _ in range(size - 1)]
    filled = [inputs.fill(cache, guide, share=(rank, size)) for rank, cache in enumerate(early)]
    filled.append(inputs.fill(open_cache(tmp_path, guide), guide, share=(size - 1, size)))
    assert sum(share.num_encoded for share in filled) == inputs.num_distinct
    assert all(share.num_encoded > inputs.num_distinct / size / 2 for share in filled)
    early[0].refresh()
    assert_whole(early[0], inputs, guide)


# ------------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_is_of_what_the_guide_computes_and_not_of_its_folder(tmp_path, model, guide):
    shutil.copytree(model, tmp_path / "elsewhere")
    guide.model.save(str(tmp_path / "saved"), create_model_card=False)
    for folder in ("elsewhere", "saved"):
        assert embedding_fingerprint(Guide(GuideConfig(model=str(tmp_path / folder)))) == embedding_fingerprint(guide)


def change_weight(guide: Guide) -> None:
    weight = guide.model[0].model.encoder.layer[1].output.dense.weight
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))


def change_pooling(guide: Guide) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    guide.model[1] = Pooling(WIDTH, "cls")


def change_epsilon(guide: Guide) -> None:
    guide.model[0].model.config.layer_norm_eps = 1e-6


@pytest.mark.parametrize(
    "change", [change_weight, change_pooling, change_epsilon, {"max_tokens": 9}, {"precision": "bf16"}]
)
def test_fingerprint_sees_every_change(model, guide, change):
    other = Guide(GuideConfig(model=str(model), **(change if isinstance(change, dict) else {})))
    if callable(change):
        assert embedding_fingerprint(other) == embedding_fingerprint(guide)
        change(other)
    assert embedding_fingerprint(other) != embedding_fingerprint(guide)


def test_another_guide_finds_nothing_of_this_one(tmp_path, guide):
    inputs = Inputs(100)
    inputs.fill(open_cache(tmp_path, guide), guide)
    other = GuideCache(str(tmp_path), "another", WIDTH)
    assert (other.find(inputs.keys) == -1).all()
    cache = open_cache(tmp_path, guide)
    cache.remove()
    assert not shards_in(tmp_path)
