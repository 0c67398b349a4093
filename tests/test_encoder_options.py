"""student.compile, gradient_checkpointing and attention: other ways to the same embeddings and gradients."""

import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import prepared, recipe, save_tiny_model, words, write_jsonl
from torch._dynamo.utils import counters

from gist_dist.common.errors import UserError
from gist_dist.config import GuideConfig, StudentConfig
from gist_dist.core.collectives import World
from gist_dist.core.gradcache import ActivationBudget, GradientSums, first_pass, second_pass
from gist_dist.core.step import TrainState
from gist_dist.models import compiled
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config

SIZES = [(9, 30), (5, 24), (7, 17), (12, 9), (3, 9), (20, 5)]
"""Texts and tokens a text of every chunk."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("options") / "student", width=32, layers=2)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> Path:
    """Whose tracing takes half as long."""
    return save_tiny_model(tmp_path_factory.mktemp("options") / "student", width=32, layers=1)


def student_of(model: Path, **options) -> Student:
    student = Student(StudentConfig(model=str(model), dropout=0.2, **options))
    student.get_ready()
    return student


def plain_student_of(model: Path) -> Student:
    """Its dropout is torch's own, as with the options."""
    student = student_of(model)
    student.dropout = nullcontext()
    return student


class Outcome:
    """Embeddings of the first and second encode of every chunk, gradients, and what a kept token costs."""

    def __init__(self, student: Student, keep: bool) -> None:
        rng = np.random.default_rng(0)
        chunks = [[rng.integers(5, 60, length).astype(np.int32) for _ in range(n)] for n, length in SIZES]
        self.second: dict[int, torch.Tensor] = {}

        def encode(chunk: int) -> torch.Tensor:
            self.second[chunk] = student.encode(chunks[chunk], dropout_seed=(3, 1, chunk))
            return self.second[chunk]

        budget = ActivationBudget(1e12 if keep else 0.0, student.model)
        embeddings = first_pass(encode, range(len(SIZES)), [n * length for n, length in SIZES], budget)
        self.first = {chunk: embedding.detach() for chunk, embedding in embeddings.items()}
        gradients = {chunk: embedding.sin() + chunk for chunk, embedding in self.first.items()}
        sums = GradientSums(student.model)
        second_pass(encode, embeddings, gradients, sums)
        sums.write_to_grad()
        self.bytes_per_token = budget.bytes_per_token
        self.gradients = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
        student.model.zero_grad(set_to_none=True)


def assert_same(outcome: Outcome, expected: Outcome, tolerance: float) -> None:
    for chunk, embedding in expected.first.items():
        assert torch.equal(outcome.second[chunk], outcome.first[chunk])  # or the gradient is of another function
        torch.testing.assert_close(outcome.first[chunk], embedding, rtol=0, atol=tolerance)
    assert outcome.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.abs().sum() > 0 or "key.bias" in name
        torch.testing.assert_close(outcome.gradients[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def test_gradient_checkpointing_gives_the_same_gradients_in_less_memory(model):
    """Bit for bit, with dropout on, whether chunks are kept or encoded twice."""
    plain, student = plain_student_of(model), student_of(model, gradient_checkpointing=True)
    for keep in (True, False):
        assert_same(Outcome(student, keep), Outcome(plain, keep), 0.0)
    assert Outcome(student, True).bytes_per_token < 0.4 * Outcome(plain, True).bytes_per_token


def test_model_without_gradient_checkpointing_is_refused(model, monkeypatch):
    from transformers import BertModel

    monkeypatch.setattr(BertModel, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"student\.gradient_checkpointing: .* does not offer it"):
        student_of(model, gradient_checkpointing=True)


@pytest.fixture
def traced_only(monkeypatch):
    """Compiling but for the C++ compiler, which takes minutes."""
    monkeypatch.setattr(compiled, "COMPILE", {"dynamic": True, "backend": "aot_eager"})
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by Dynamo, of a layer's input
@pytest.mark.slow
def test_compiled_student_and_guide_give_the_same_without_compiling_for_every_length(one_layer, traced_only, tmp_path):
    student = student_of(one_layer, compile=True)
    expected = Outcome(plain_student_of(one_layer), False)
    assert_same(Outcome(student, False), expected, 1e-5)
    num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs <= 2  # with and without gradients
    assert_same(Outcome(student, True), expected, 1e-5)
    texts = [np.arange(5, 5 + length, dtype=np.int32) for length in (12, 7, 3)]
    guides = [Guide(GuideConfig(model=str(one_layer), compile=compile)) for compile in (True, False)]
    for guide in guides:
        guide.get_ready()
    torch.testing.assert_close(*(guide.encode(texts) for guide in guides), rtol=0, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == num_graphs + 1
    student.save(tmp_path / "saved")
    again = Student(StudentConfig(model=str(tmp_path / "saved"), dropout=0.2))
    again.dropout = nullcontext()
    assert_same(Outcome(again, False), expected, 0.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by Dynamo, of a layer's input
@pytest.mark.slow
def test_compiled_student_saves_a_stock_model(one_layer, traced_only, tmp_path):
    student = student_of(one_layer, compile=True, gradient_checkpointing=True)
    Outcome(student, False)
    student.save(tmp_path / "saved")
    again = Student(StudentConfig(model=str(tmp_path / "saved"), dropout=0.2))
    assert not any(module.__dict__.get("gradient_checkpointing") for module in again.model.modules())
    assert_same(Outcome(again, False), Outcome(student_of(one_layer), False), 0.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_what_the_recipe_says(model, attention):
    student = student_of(model, attention=attention)
    assert student.model[0].model.config._attn_implementation == attention
    if attention == "sdpa":
        assert_same(Outcome(student, False), Outcome(student_of(model), False), 0.0)


def test_flash_attention_is_refused_where_it_can_not_run(model, tmp_path):
    rng = random.Random(0)
    rows = [{"anchor": words(rng, 2, 5), "positive": words(rng, 2, 5)} for _ in range(4)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    flash = {"attention": "flash_attention_2", "precision": "bf16"}
    with pytest.raises(UserError, match="flash_attention_2 works in bf16 only"):
        parse_config(recipe(tmp_path, model, None, source, student=flash | {"precision": "fp32"}))
    config, corpus = prepared(recipe(tmp_path, model, None, source, student=flash, batch={"global_size": 2}))
    student = Student(config.student)  # a driver without a GPU can still tokenize
    with pytest.raises(UserError, match=r"student\.attention: flash_attention_2 needs a GPU"):
        TrainState(config, corpus, student, None, torch.optim.SGD(student.parameters()), World())


def test_compile_without_a_compiler_is_refused(model, traced_only, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"student\.compile needs a C\+\+ compiler"):
        student_of(model, compile=True)
    student_of(model)
