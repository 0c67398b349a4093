"""Whole runs of trainer.train with tiny models, in this process or in a group of workers."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tiny import recipe, run_group, save_tiny_model, words, write_jsonl

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.core.collectives import World
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config
from gist_dist.training.trainer import train

STEPS = 6
Requests = Callable[[], str | None]


class Runs:
    """Recipes of one small corpus: dropout on, batches of 16 of 60 rows, a checkpoint at every second step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student, self.guide = save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=3)
        rng = random.Random(5)
        rows: list[dict[str, Any]] = [{"anchor": words(rng, 1, 6), "positive": words(rng, 3, 12)} for _ in range(60)]
        for row in rows[::4]:
            row["negatives"] = [words(rng, 2, 8)]
        self.source = write_jsonl(folder / "rows.jsonl", rows)

    def tree(self, name: str, **sections: Any) -> dict[str, Any]:
        sections = {"output_dir": str(self.folder / "runs"), **sections}
        fixed: dict[str, Any] = {
            "student": {"dropout": 0.1},
            "batch": {"global_size": 16, "chunk_tokens": 64},
            "optim": {"steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1.0},
            "checkpoint": {"every_steps": 2, "keep": 2, "retry_seconds": 0},
            "data": {"cache_dir": str(self.folder / "corpora")},
        }
        for key, values in sections.items():
            fixed[key] = {**fixed[key], **values} if key in fixed else values
        return recipe(self.folder, self.student, self.guide, self.source, name=name, **fixed)

    def train(self, tree: dict[str, Any], requests: Requests = lambda: None, student: type[Student] = Student) -> str:
        return run(World(), tree, requests, student)

    def train_on(self, world_size: int, name: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return run_group(function, world_size, self.folder / "groups" / name, *arguments)

    def from_checkpoint(self, tree: dict[str, Any], step: int, name: str) -> dict[str, Any]:
        """A copy of a run as if it had been killed after the checkpoint of that step."""
        before, copied = parse_config(tree), parse_config(tree | {"name": name})
        shutil.copytree(before.run_dir, copied.run_dir)
        shutil.rmtree(copied.run_dir / "model", ignore_errors=True)
        for folder in (copied.run_dir / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)
        return tree | {"name": name}


def run(
    world: World,
    tree: dict[str, Any],
    requests: Requests = lambda: None,
    student: type[Student] = Student,
    dtype: torch.dtype = torch.float32,
) -> str:
    config = parse_config(tree)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    encoders = student(config.student), Guide(config.guide_or_student)
    corpus = prepare(config, *encoders, progress=lambda line: None)
    for encoder in encoders:
        encoder.model.to(dtype)
    return train(config, Corpus(corpus.folder), *encoders, world, requests)


def run_in_fp64(world: World, tree: dict[str, Any]) -> str:
    return run(world, tree, dtype=torch.float64)


def complaint(world: World, tree: dict[str, Any], student: type[Student] = Student) -> str:
    """What the user is told, on this rank."""
    try:
        return run(world, tree, student=student)
    except UserError as error:
        return f"UserError: {error}"


def run_dir(tree: dict[str, Any]) -> Path:
    return parse_config(tree).run_dir


def checkpoints(tree: dict[str, Any] | RunConfig, folder: Path | None = None) -> list[int]:
    """Steps that have a committed checkpoint; nothing else lies there."""
    folder = folder or run_dir(tree) / "checkpoints"
    assert all((path / "COMMIT.json").exists() for path in folder.iterdir()), list(folder.iterdir())
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def weights(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return load_file(run_dir(tree) / "model" / "model.safetensors")


def curve(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """metrics.jsonl, read strictly, without what is measured by a clock or counts workers."""
    varying = ("seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes", "world_size")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (run_dir(tree) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines if '"evaluation"' not in line]
    return [{key: value for key, value in line.items() if key not in varying} for line in parsed]


def assert_same_run(tree: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    """tolerance 0: bit for bit."""
    mine, theirs = curve(tree), curve(other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, expected in zip(mine, theirs, strict=True):
        assert line.keys() == expected.keys()
        for key, value in line.items():
            if tolerance and isinstance(value, float):
                np.testing.assert_allclose(value, expected[key], rtol=tolerance, atol=tolerance, err_msg=key)
            else:
                assert value == expected[key], (line["step"], key)
    for name, weight in weights(other).items():
        np.testing.assert_allclose(weights(tree)[name], weight, rtol=0, atol=tolerance, err_msg=name)
