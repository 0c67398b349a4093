"""batch.chunk_tokens and batch.activation_gb where the recipe leaves them open."""

from types import SimpleNamespace

import pytest
import torch
from tiny import prepared, recipe, save_tiny_model, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.config import BatchConfig
from gist_dist.core.budgets import GRAPH_BYTES, fitted
from gist_dist.core.collectives import World
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config
from gist_dist.training import budgets

BASE = {"num_parameters": 109_000_000, "guide_bytes": 0.0, "width": 768, "layers": 12, "bf16": True, "own_tokens": 1e9}


def test_a_cpu_has_the_numbers_of_always_and_auto_is_null():
    batch = BatchConfig()
    assert (batch.tokens_at_once, batch.kept_bytes) == (4096, 1e9)
    assert BatchConfig(chunk_tokens="auto", activation_gb="auto") == batch
    assert (BatchConfig(chunk_tokens=7).tokens_at_once, BatchConfig(activation_gb=0).kept_bytes) == (7, 0.0)


@pytest.mark.parametrize(("field", "value"), [("chunk_tokens", "all"), ("chunk_tokens", 0), ("activation_gb", -1)])
def test_what_is_no_budget_is_named(tmp_path, field, value):
    with pytest.raises(UserError, match=rf"batch\.{field} = {value!r}"):
        parse_config(recipe(tmp_path, "m", None, tmp_path / "rows.jsonl", batch={"global_size": 2, field: value}))


def test_a_gpu_has_more_by_its_memory_and_less_for_larger_models():
    small, large = (fitted(BatchConfig(), memory, **BASE) for memory in (24e9, 141e9))
    assert 4096 <= small.tokens_at_once < large.tokens_at_once and small.kept_bytes < large.kept_bytes
    # A chunk's graph and those that are kept leave a third of the memory beside the weights.
    free = 141e9 - 24 * BASE["num_parameters"]
    assert large.tokens_at_once * GRAPH_BYTES * 768 * 12 + large.kept_bytes < 0.65 * free
    assert fitted(BatchConfig(), 141e9, **BASE | {"width": 1024, "layers": 24}).tokens_at_once < large.tokens_at_once
    assert fitted(BatchConfig(), 141e9, **BASE | {"bf16": False}).tokens_at_once < 0.6 * large.tokens_at_once
    assert fitted(BatchConfig(), 141e9, **BASE | {"guide_bytes": 60e9}).kept_bytes < large.kept_bytes
    # Every worker has two chunks at least, and a small batch is not cut into small ones for that.
    assert fitted(BatchConfig(), 141e9, **BASE | {"own_tokens": 50e3}).tokens_at_once == 24_576
    assert fitted(BatchConfig(), 141e9, **BASE | {"own_tokens": 500.0}).tokens_at_once == 4096
    # A model that leaves nothing is left to fail with its own sentence.
    assert fitted(BatchConfig(), 8e9, **BASE | {"num_parameters": 10**9}) == BatchConfig(
        chunk_tokens=4096, activation_gb=0
    )


def test_what_the_recipe_says_stays():
    batch = fitted(BatchConfig(chunk_tokens=100), 141e9, **BASE)
    assert batch.chunk_tokens == 100 and batch.kept_bytes > 1e10
    assert fitted(BatchConfig(activation_gb=0.0), 141e9, **BASE).kept_bytes == 0


def test_workers_take_the_budgets_of_the_least_gpu_and_of_the_batch(tmp_path, monkeypatch):
    """Of what torch tells of a GPU: a student there, one of two workers' cards having less memory."""
    folder = save_tiny_model(tmp_path / "student", width=32)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"anchor": "amber basin", "positive": "cedar"}] * 3)
    tree = recipe(tmp_path, folder, folder, rows, batch={"global_size": 2})
    config, corpus = prepared(tree)
    student, guide = Student(config.student), Guide(config.guide)
    assert budgets.with_budgets(config, student, guide, corpus, World()) is config
    monkeypatch.setattr(Student, "device", torch.device("cuda", 0))
    card = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    alone = budgets.with_budgets(config, student, guide, corpus, World()).batch
    assert (alone.chunk_tokens, alone.activation_gb) == (4096, 23)
    many = config.model_copy(update={"batch": config.batch.model_copy(update={"global_size": 100_000})})
    assert budgets.with_budgets(many, student, guide, corpus, World()).batch.chunk_tokens == 131_072
    monkeypatch.setattr(budgets, "all_reduce_max", lambda values, device, world: {"memory": -24e9})
    assert budgets.with_budgets(config, student, guide, corpus, World()).batch.activation_gb == 7
