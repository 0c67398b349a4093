"""A whole step on a GPU that isn't there: nothing is mixed between devices, and the host seldom waits."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import DEVICE, FakeCuda, install, move, without_cpu_dropout
from tiny import prepared, recipe, save_tiny_model, words, write_jsonl

from gist_dist.config import RunConfig
from gist_dist.core.collectives import World
from gist_dist.core.optim import build_optimizer
from gist_dist.core.plan import plan_batch
from gist_dist.core.step import StepResult, TrainState, train_step
from gist_dist.data.corpus import Corpus
from gist_dist.models.encoder import Guide, Student


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fake")
    rng = random.Random(1)
    rows = [
        {"anchor": words(rng, 1, 6), "positive": words(rng, 2, 18), "negatives": [words(rng, 1, 9)]} for _ in range(24)
    ]
    return {
        "folder": folder,
        "student": save_tiny_model(folder / "student", width=32, seed=1),
        "guide": save_tiny_model(folder / "guide", width=16, layers=1, seed=2),
        "source": write_jsonl(folder / "rows.jsonl", rows),
    }


class Steps:
    """Of one recipe, on either device."""

    def __init__(self, made: dict[str, Any], precision: str, mode: str, **batch: Any) -> None:
        models = {"precision": precision}
        tree = recipe(
            made["folder"],
            made["student"],
            made["guide"],
            made["source"],
            student=models,
            batch={"global_size": 24} | batch,
        )
        tree["guide"] |= models
        self.config: RunConfig
        self.corpus: Corpus
        self.config, self.corpus = prepared(tree)
        self.is_cached = mode == "cached"

    def run(self, watched: FakeCuda | None, count: int = 2) -> tuple[StepResult, int]:
        """The last of so many steps, and how many chunks it had."""
        assert self.config.guide
        student, guide = Student(self.config.student), Guide(self.config.guide)
        plan_of_guide = None
        if self.is_cached:
            tokens = self.corpus.guide_tokens(np.arange(self.corpus.num_texts))
            plan_of_guide = guide.encode(tokens).numpy()
        if watched:
            for encoder in (student, guide):
                move(encoder.model)
            without_cpu_dropout(student)
        optimizer = build_optimizer(student.model, self.config.optim)
        online = None if self.is_cached else guide
        state = TrainState(self.config, self.corpus, student, online, optimizer, World())
        for step in range(1, count + 1):
            plan = plan_batch(self.corpus, np.arange(24), step, state.chunk_rule, online is not None)
            if plan_of_guide is not None:
                plan = replace(plan, guide_embeddings=plan_of_guide[plan.guide_inputs])
            if watched:
                watched.reset()
            result = train_step(state, plan)
        return result, len(plan.student_chunks)


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp32, guide online": ("fp32", "online", {}),
    "fp32, guide cached": ("fp32", "cached", {}),
    "bf16, packed, guide online": ("bf16", "online", {"packing": True}),
    "bf16, padded, guide cached": ("bf16", "cached", {"packing": False}),
}
CUTS: list[dict[str, Any]] = [
    {"chunk_tokens": 60, "chunk_start_tokens": 0, "activation_gb": 0},
    {"chunk_tokens": 10**6, "activation_gb": 1},
]
"""Many chunks, each encoded twice, and one that is kept."""

MOST_WAITS = 4
"""For counts and loss, the norm, the guide's similarity and the clock: three of them are metrics."""
MOST_KERNELS = {"step": 420, "fp32 chunk": 270, "bf16 chunk": 370}
"""Of a student of two layers and a guide of one; a chunk that is encoded twice."""
MOST_COPIES = {"step": 12, "chunk": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_mixes_no_devices_and_waits_four_times_however_many_chunks_it_has(made, kind, monkeypatch):
    precision, mode, batch = KINDS[kind]
    losses, chunks = [], []
    close, near = (1e-5, 1e-4) if precision == "fp32" else (2e-2, 5e-2)
    for cut in CUTS:
        steps = Steps(made, precision, mode, **batch, **cut)
        on_cpu, _ = steps.run(None)
        with monkeypatch.context() as patched:
            install(patched)
            with FakeCuda() as watched:
                result, num_chunks = steps.run(watched)
        assert sum(watched.waits.values()) <= MOST_WAITS, watched.waits
        kernels, copies = sum(watched.kernels.values()), sum(watched.copies.values())
        assert kernels <= MOST_KERNELS["step"] + num_chunks * MOST_KERNELS[f"{precision} chunk"], watched.kernels
        assert copies <= MOST_COPIES["step"] + num_chunks * MOST_COPIES["chunk"], watched.copies
        assert result.loss == pytest.approx(on_cpu.loss, rel=close)
        assert result.grad_norm == pytest.approx(on_cpu.grad_norm, rel=near)
        losses.append(result.loss)
        chunks.append(num_chunks)
    assert chunks[0] > 4 * chunks[1] and losses[0] == pytest.approx(losses[1], rel=close)


def test_the_watch_sees_what_it_is_there_for(monkeypatch):
    """Two devices in one operation, questions of the host, copies; and views are no kernels."""
    install(monkeypatch)
    with FakeCuda() as watched:
        here, there = torch.ones(3), torch.zeros(3, device="cuda")
        with pytest.raises(RuntimeError, match="all tensors to be on the same device: add"):
            here + there
        watched.reset()
        there.view(1, 3)[:, :2]
        assert not watched.kernels and not watched.waits
        assert bool((there.unsqueeze(0) == 0).all()) and there.sum().item() == 0
        assert sum(watched.waits.values()) == 2
        there[there > 1]
        here.to(DEVICE)
        assert sum(watched.waits.values()) == 4 and sum(watched.copies.values()) == 1
        here.to(DEVICE, non_blocking=True)
        assert sum(watched.waits.values()) == 4 and sum(watched.copies.values()) == 2
