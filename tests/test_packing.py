"""Packed chunks: what is joined without padding is embedded, and trained on, as if it were padded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import double, one_step, prepared, recipe, save_tiny_model, write_jsonl

from gist_dist.config import StudentConfig
from gist_dist.core.collectives import World
from gist_dist.core.plan import CHUNK_START_TOKENS, cut_chunks, pack_chunks

TEXTS = [np.arange(5, 5 + length) % 30 + 5 for length in (9, 3, 3, 17, 1)]


@pytest.fixture(params=["mean", "cls"])
def student(request, tmp_path):
    made = double(StudentConfig(model=str(save_tiny_model(tmp_path / "student"))))
    made.model[1].pooling_mode = request.param
    return made


def test_packed_texts_have_the_embeddings_and_gradients_of_padded_ones(student):
    student.model.eval()

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor]]:
        embeddings = student.encode(student.inputs(TEXTS), dropout_seed=(1,))
        (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
        gradients = [p.grad.to_dense() for p in student.parameters() if p.grad is not None]
        student.model.zero_grad(set_to_none=True)
        return embeddings.detach(), gradients

    padded, padded_gradients = outcome()
    student.get_ready(packing=True)
    assert student.packs
    packed, packed_gradients = outcome()
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)
    for mine, theirs in zip(packed_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    alone = torch.cat([student.encode(student.inputs([text]), dropout_seed=(1,)) for text in TEXTS])
    torch.testing.assert_close(alone, packed, rtol=0, atol=1e-12)


def test_a_packing_model_still_takes_padded_texts(student):
    student.model.eval()
    before = student.embed(TEXTS)
    student.get_ready(packing=True)
    torch.testing.assert_close(student.embed(TEXTS), before, rtol=0, atol=1e-12)


def test_the_second_encode_of_a_packed_chunk_repeats_the_first_ones_dropout(student):
    student.get_ready(packing=True)
    inputs = student.inputs(TEXTS)
    with torch.no_grad():
        first = student.encode(inputs, dropout_seed=(1, 2))
    assert torch.equal(first, student.encode(inputs, dropout_seed=(1, 2)))
    assert not torch.equal(first, student.encode(inputs, dropout_seed=(1, 3)))


def test_a_step_is_the_same_packed_and_padded(tmp_path):
    models = save_tiny_model(tmp_path / "student"), save_tiny_model(tmp_path / "guide", width=16, layers=1, seed=2)
    rows = [{"anchor": " ".join("abc"[: n % 3 + 1]), "positive": "word " * (n + 1)} for n in range(12)]
    source = write_jsonl(Path(tmp_path) / "rows.jsonl", rows)
    outcomes = []
    for packing in (False, True):
        batch = {"global_size": 12, "chunk_tokens": 40, "packing": packing}
        tree = recipe(tmp_path, *models, source, batch=batch)
        config, corpus = prepared(tree)
        student, guide = double(config.student), double(config.guide)
        outcomes.append(one_step(World(), config, corpus, student, guide))
    padded, packed = outcomes
    assert packed["loss"] == pytest.approx(padded["loss"], abs=1e-12)
    for name, gradient in padded["gradients"].items():
        np.testing.assert_allclose(packed["gradients"][name], gradient, rtol=0, atol=1e-11)


def test_packed_chunks_are_full_and_hold_every_text_once():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    chunks = pack_chunks(lengths, 256)
    assert sorted(np.concatenate([c.texts for c in chunks])) == list(range(500))
    assert all(c.padded_tokens == c.num_tokens == lengths[c.texts].sum() <= 256 for c in chunks)
    assert all(c.num_tokens + lengths.max() > 256 for c in chunks[:-1])
    assert [c.num_tokens for c in pack_chunks(np.array([300, 5]), 256)] == [300, 5]


def test_where_starting_a_chunk_is_dear_there_are_few_and_they_are_padded():
    lengths = np.random.default_rng(0).integers(4, 200, 2000)
    cheap, dear = (cut_chunks(lengths, 32768, CHUNK_START_TOKENS[kind]) for kind in ("cpu", "cuda"))
    assert len(dear) < len(cheap) / 5
    assert sum(c.padded_tokens for c in dear) < 1.2 * lengths.sum()
