"""One place for all scenarios: models, rows, the undisturbed run, and what a plain start takes here."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny

from faults import records
from faults.product import Run, compare
from faults.records import Record
from gist_dist.runs.folder import describe_environment

STEPS = 300
CHECKPOINT_EVERY = 20
SEED = int(os.environ.get("GIST_CHAOS_SEED", "1"))
REPEATS = int(os.environ.get("GIST_CHAOS_REPEATS", "0"))
"""How often the repeated scenarios inject their fault; 0: each its own number."""


@dataclass
class Site:
    folder: Path
    recipe: dict[str, Any]
    undisturbed: Run
    plain_start: float
    """Seconds from the command to the first step."""
    commit: str

    def run(self, name: str, environment: dict[str, str] | None = None, **sections: Any) -> Run:
        """A run of the same recipe under another name; sections are added to."""
        return Run(self.folder, _with(self.recipe, name=name, **sections), environment)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("chaos")
    student = tiny.save_tiny_model(folder / "student")
    guide = tiny.save_tiny_model(folder / "guide", seed=1)
    recipe = tiny.recipe(
        folder / "runs", student, guide, rows(folder / "rows.jsonl"),
        name="undisturbed",
        student={"dropout": 0.1},
        batch={"global_size": 32, "chunk_tokens": 256},
        optim={"steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1.0},
        checkpoint={"every_steps": CHECKPOINT_EVERY, "keep": 3},
        cluster={"num_workers": 2},
    )  # fmt: skip
    run = Run(folder, recipe)
    run.start()
    plain_start = run.wait_for_step(1).time - run.started
    assert run.finish() == 0, run.tail()
    return Site(
        folder,
        recipe,
        run,
        plain_start,
        os.environ.get("GIST_DIST_COMMIT") or describe_environment()["git_commit"] or "",
    )


@pytest.fixture
def random_moments(request: pytest.FixtureRequest) -> random.Random:
    """Draws the moments of one scenario: the same for the same seed, whichever scenarios run."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def noted() -> list[Record]:
    """The faults of one scenario."""
    return []


@pytest.fixture
def record(site: Site, noted: list[Record], request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note a fault: record(fault=…, moment=…, recomputed=…, seconds=…)."""

    def note(**values: Any) -> None:
        values = {"recomputed": None, "seconds": None, "notes": "", **values}
        values["notes"] = values["notes"].replace(f"{site.folder}/", "")
        noted.append(Record(request.node.name, seed=SEED, plain_start=site.plain_start, commit=site.commit, **values))

    return note


@pytest.fixture
def ends_as_undisturbed(site: Site, noted: list[Record]) -> Callable[..., None]:
    """Write the records of the scenario, and see that the run ended as the undisturbed one did."""

    def check(run: Run, tolerance: float = 0.0) -> None:
        outcome = compare(run, site.undisturbed)
        for record in noted:
            record.steps_complete = outcome.steps_complete
            record.loss_difference, record.weight_difference = outcome.loss_difference, outcome.weight_difference
        records.append(noted)
        assert outcome.steps_complete
        assert outcome.loss_difference <= tolerance and outcome.weight_difference <= tolerance, outcome

    return check


@pytest.fixture
def started(site: Site) -> Iterator[Callable[..., Run]]:
    """Make runs whose processes are ended with the test."""
    runs: list[Run] = []

    def make(name: str, environment: dict[str, str] | None = None, **sections: Any) -> Run:
        runs.append(site.run(name, environment, **sections))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = {item.name for item in session.items if item.get_closest_marker("chaos")}
    if chosen and not session.config.option.collectonly:
        records.forget(chosen)


def _with(recipe: dict[str, Any], **sections: Any) -> dict[str, Any]:
    tree = dict(recipe)
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return tree


def rows(path: Path) -> Path:
    """Ragged rows, some with hard negatives."""
    draw = random.Random(0)
    made = []
    for _ in range(600):
        row = {"anchor": tiny.words(draw, 2, 6), "positive": tiny.words(draw, 2, 14)}
        made.append(row | {"negatives": [tiny.words(draw, 2, 9) for _ in range(draw.randint(0, 2))]})
    return tiny.write_jsonl(path, made)
