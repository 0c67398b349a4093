"""What is trained is what is saved and used, for every kind of model: one property over a matrix of tiny ones.

The default run takes every architecture with both padding sides and rotates the other axes through them, another way
on every day; MATRIX_TURN=n repeats that of day n. The whole matrix is behind the marker slow.
"""

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from sentence_transformers import SentenceTransformer
from tiny import recipe, words, write_jsonl
from zoo import Kind

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.models.encoder import Student, save_model
from gist_dist.recipe import parse_config

TURN = int(os.environ.get("MATRIX_TURN", time.time() // 86400))
ROWS = 6


def run_of(folder: Path, kind: Kind) -> RunConfig:
    """Two sources; the second has prompts of its own where the kind says so."""
    rng = random.Random(0)
    files = []
    for name in ("one", "two"):
        rows = [
            {"anchor": words(rng, 1, 5), "positive": words(rng, 3, 30), "negatives": [words(rng, 1, 9)]}
            for _ in range(ROWS)
        ]
        files.append(write_jsonl(folder / f"{name}.jsonl", rows))
    sources = [{"path": str(file)} for file in files]
    student = {}
    if kind.prompts == "recipe":
        student["prompts"] = {"anchor": "amber : ", "positive": "delta : "}
    if kind.prompts == "source":
        sources[1]["prompts"] = {"student": {"anchor": "cold : "}}
    sections = {"student": student, "data": {"sources": sources}, "batch": {"global_size": 4}}
    tree = recipe(folder, folder / "model", None, **sections)
    return parse_config(tree)


def moved(student: Student) -> Student:
    """As if it had been trained."""
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    return student


def trained_embeddings(student: Student, corpus: Corpus, texts: np.ndarray) -> np.ndarray:
    """As in a step: from the prepared tokens, in chunks that mix texts and prompts."""
    student.model.eval()
    with torch.no_grad():
        return np.concatenate([student.embed(corpus.student_tokens(part)).numpy() for part in np.array_split(texts, 2)])


def used_embeddings(saved: SentenceTransformer, how: str, texts: list[str], **options) -> np.ndarray:
    return getattr(saved, how)(texts, normalize_embeddings=True, batch_size=5, show_progress_bar=False, **options)


def check(folder: Path, kind: Kind) -> str:
    """The property; "refused" for a kind that can't have it."""
    zoo.save(folder / "model", kind)
    config = run_of(folder, kind)
    try:
        student = Student(config.student)
    except UserError as error:
        assert kind.is_refused, error
        assert "student.model" in str(error) and "padded" in str(error)
        return "refused"
    assert not kind.is_refused
    corpus = prepare(config, student, None, progress=lambda line: None)
    save_model(moved(student), folder / "saved", config)
    saved = SentenceTransformer(str(folder / "saved"), device="cpu")
    again = SentenceTransformer(str(folder / "model"), device="cpu")
    rows = np.arange(corpus.num_rows)
    second = kind.prompts == "source"
    for role, numbers in (
        ("query", corpus.anchors), ("document", corpus.positives), ("document", corpus.own_negatives_of(rows)),
    ):  # fmt: skip
        texts = [corpus.text(number) for number in numbers.tolist()]
        trained = trained_embeddings(student, corpus, numbers)
        assert np.isfinite(trained).all()
        if not second:
            np.testing.assert_allclose(trained, used_embeddings(saved, f"encode_{role}", texts), atol=2e-5)
            continue
        np.testing.assert_allclose(trained[:ROWS], used_embeddings(saved, f"encode_{role}", texts[:ROWS]), atol=2e-5)
        named = used_embeddings(saved, "encode", texts[ROWS:], prompt_name=f"two-{role}")
        np.testing.assert_allclose(trained[ROWS:], named, atol=2e-5)
    if student.prompts["anchor"] == student.prompts["positive"]:
        numbers = corpus.anchors
        texts = [corpus.text(number) for number in numbers.tolist()]
        trained = trained_embeddings(student, corpus, numbers)
        np.testing.assert_allclose(trained, used_embeddings(saved, "encode", texts), atol=2e-5)
    keeps_what_it_brought(again, saved, kind)
    return "equal"


def keeps_what_it_brought(before: SentenceTransformer, after: SentenceTransformer, kind: Kind) -> None:
    assert after.prompts.get("other") == before.prompts.get("other")
    assert after.truncate_dim == before.truncate_dim
    assert [type(module) for module in after] == [type(module) for module in before]
    if kind.extra == "dot":
        assert after.similarity_fn_name == "cosine"
    else:
        assert after.similarity_fn_name == before.similarity_fn_name
    if kind.prompts == "default":
        assert after.default_prompt_name == "task" and after.prompts["task"] == "wide : "
    for setting in ("padding_side", "truncation_side", "pad_token", "eos_token", "add_prefix_space"):
        assert getattr(after.tokenizer, setting, None) == getattr(before.tokenizer, setting, None)
    assert [getattr(module, "include_prompt", None) for module in after] == [
        getattr(module, "include_prompt", None) for module in before
    ]
    assert next(after.parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", list(zoo.design(TURN)), ids=str)
def test_trained_embeddings_are_those_of_the_saved_model(tmp_path, kind):
    check(tmp_path, kind)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_the_whole_matrix(tmp_path, architecture):
    """250 cells of each architecture, half a second each."""
    wrong = []
    for number, kind in enumerate(kind for kind in zoo.matrix() if kind.architecture == architecture):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(folder, kind)
        except Exception as error:  # all of them are told together
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_embeddings_and_gradients_are_finite_with_and_without_dropout(tmp_path, architecture, dropout):
    """Left padding where the architecture bears it, and texts far beyond a local window."""
    kind = Kind(architecture, "left")
    kind = zoo.replace(kind, side="right") if kind.is_refused else kind
    folder = zoo.save(tmp_path / "model", kind)
    config = {"model": str(folder)} | ({"dropout": dropout} if dropout else {})
    student = Student(parse_config(recipe(tmp_path, folder, None, tmp_path / "x.jsonl", student=config)).student)
    ids, lengths = student.tokenize(["old", "amber " * 50, "cold red river"])
    embeddings = student.encode(np.split(ids, np.cumsum(lengths)[:-1]), dropout_seed=(1,))
    embeddings.sum(dim=0).sin().sum().backward()
    assert bool(torch.isfinite(embeddings).all())
    for parameter in student.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            assert bool(torch.isfinite(gradient).all())
