"""The first and second pass, with a real student whose dropout is on."""

import numpy as np
import pytest
import torch
from tiny import save_tiny_model

from gist_dist.config import StudentConfig
from gist_dist.core.gradcache import ActivationBudget, GradientSums, first_pass, second_pass
from gist_dist.models.encoder import Student

SIZES = [(3, 20), (5, 12), (4, 12), (8, 7), (6, 3)]
"""Texts and tokens a text of every chunk, longest first."""


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Student:
    folder = save_tiny_model(tmp_path_factory.mktemp("gradcache") / "student")
    return Student(StudentConfig(model=str(folder), dropout=0.2))


class Passes:
    """One run of both passes: what was encoded when, what it held, and which gradients came out."""

    def __init__(self, student: Student, budget_bytes: float, sizes=SIZES, seed: int = 7) -> None:
        chunks = chunks_of(sizes)
        self.encoded: list[int] = []

        def encode(chunk: int) -> torch.Tensor:
            self.encoded.append(chunk)
            return student.encode(chunks[chunk], dropout_seed=(seed, 1, chunk))

        self.budget = ActivationBudget(float(budget_bytes), student.model)
        tokens = [n * length for n, length in sizes]
        embeddings = first_pass(encode, range(len(sizes)), tokens, self.budget)
        self.kept = [chunk for chunk, embedding in embeddings.items() if embedding.requires_grad]
        self.embeddings = {chunk: embedding.detach().clone() for chunk, embedding in embeddings.items()}
        # Any gradient will do, as long as it depends on the embeddings.
        gradients = {chunk: embedding.sin() + chunk for chunk, embedding in self.embeddings.items()}
        sums = GradientSums(student.model)
        second_pass(encode, embeddings, gradients, sums)
        assert not embeddings  # no graph outlives the second pass
        sums.write_to_grad()
        parameters = student.model.named_parameters()
        self.gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        student.model.zero_grad(set_to_none=True)


def chunks_of(sizes) -> list[list[np.ndarray]]:
    random = np.random.default_rng(0)
    return [[random.integers(5, 60, length).astype(np.int32) for _ in range(n)] for n, length in sizes]


def bytes_of_everything(student: Student) -> float:
    return Passes(student, 1e12).budget.used_bytes


def test_gradients_do_not_depend_on_the_activation_budget(student):
    """Bit for bit, with dropout on: the second encode draws what the first one drew."""
    recomputed = Passes(student, 0)
    assert any(gradient.abs().sum() > 0 for gradient in recomputed.gradients.values())
    everything = bytes_of_everything(student)
    for share in (0.3, 0.6, 10.0):
        passes = Passes(student, share * everything)
        assert passes.gradients.keys() == recomputed.gradients.keys()
        for chunk, embedding in passes.embeddings.items():
            assert torch.equal(embedding, recomputed.embeddings[chunk])
        for name, gradient in passes.gradients.items():
            assert torch.equal(gradient, recomputed.gradients[name]), name


def test_gradients_equal_those_of_one_graph(student):
    """Against plain autograd through all chunks at once; also where dropout is drawn anew, they differ."""
    cached = Passes(student, 0)
    total = 0.0
    for number, chunk in enumerate(chunks_of(SIZES)):
        embedding = student.encode(chunk, dropout_seed=(7, 1, number))
        total = total + (embedding * (embedding.detach().sin() + number)).sum()
    total.backward()
    for name, gradient in cached.gradients.items():
        torch.testing.assert_close(gradient, student.model.get_parameter(name).grad.to_dense(), rtol=1e-4, atol=1e-5)
    student.model.zero_grad(set_to_none=True)
    other_masks = Passes(student, 0, seed=8)
    assert not torch.allclose(other_masks.embeddings[0], cached.embeddings[0], atol=1e-2)


def test_kept_chunks_are_encoded_once(student):
    everything = bytes_of_everything(student)
    for budget, least, most in ((0, 0, 0), (0.5 * everything, 1, 4), (10 * everything, 5, 5)):
        passes = Passes(student, budget)
        assert least <= len(passes.kept) <= most
        again = [chunk for chunk in range(5) if chunk not in passes.kept]
        assert passes.encoded == [0, 1, 2, 3, 4, *again]


def test_budget_of_zero_keeps_nothing_and_measures_nothing(student):
    passes = Passes(student, 0)
    assert passes.kept == [] and passes.budget.used_bytes == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_activations_stay_within_the_budget(student, share):
    """But for the very first chunk, whose cost nobody knows yet."""
    budget_bytes = share * bytes_of_everything(student)
    passes = Passes(student, budget_bytes)
    first_chunk = Passes(student, 1.0).budget.used_bytes
    assert 0 < passes.budget.used_bytes <= max(budget_bytes, first_chunk)


def test_used_bytes_are_the_activations_alive(student):
    """The estimate counts what autograd really holds: tensors freed when the graph goes, no weights."""
    used = bytes_of_everything(student)
    weights = sum(p.nbytes for p in student.model.parameters())
    chunk = [np.full(20, 9, dtype=np.int32)] * 40
    budget = ActivationBudget(1e12, student.model)
    for _ in range(2):  # equal both times, but for what a graph that nobody needs leaves: the count starts anew
        embeddings = first_pass(lambda _: student.encode(chunk, (0, 0, 0)), [0], [800], budget)
        measured = budget.used_bytes
        assert embeddings[0].requires_grad and measured > 20 * 40 * 32 * 4 * 10
        assert budget.bytes_per_token == pytest.approx(measured / 800, rel=0.01)
    held = held_bytes(lambda: first_pass(lambda _: student.encode(chunk, (0, 0, 0)), [0], [800], budget))
    assert 0.9 * held <= measured <= 1.1 * held
    assert used > weights / 10


def held_bytes(function) -> int:
    """Bytes of CPU tensors still alive after the call, its result kept."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    held, pending = 0, list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            held += event.extra_fields.alloc_size
    del result
    return held
