"""Runs over several nodes, each with a home, temporary files and a working folder of its own: what one process does.

The nodes share the recipe's folders and nothing else. Nodes that go and come: tests/faults/test_nodes.py.
"""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from several_nodes import BIN, Machine, Nodes, machines_apart, machines_side_by_side, nodes_on, why_not_apart
from tiny import words
from tiny_runs import Runs, assert_same_run, run_dir

from gist_dist.config import EvaluateConfig
from gist_dist.evaluation.evaluate import evaluate_task, read_results
from gist_dist.on_ray.cluster.network import interface_of
from gist_dist.recipe import parse_config

pytestmark = pytest.mark.ray

TASKS = [f"Pairs{number}" for number in range(3)]


@dataclass
class Site:
    """The storage that all nodes share."""

    runs: Runs
    tasks: Path

    def recipe(self, name: str, **sections: Any) -> dict[str, Any]:
        evaluate = {"tasks": TASKS, "local_tasks": str(self.tasks)}
        sections = {"cluster": {"num_workers": 2}, "evaluate": evaluate, **sections}
        tree = self.runs.tree(name, data={"local_copy": "~/copies"}, **sections)
        (self.runs.folder / f"{name}.yaml").write_text(json.dumps(tree))
        return tree

    def file(self, tree: dict[str, Any]) -> str:
        return str(self.runs.folder / f"{tree['name']}.yaml")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    folder, draw = tmp_path_factory.mktemp("shared"), random.Random(3)
    for task in TASKS:
        (folder / "tasks" / task).mkdir(parents=True)
        with (folder / "tasks" / task / "test.csv").open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["sentence1", "sentence2", "score"])
            lines.writerows([words(draw, 2, 9), words(draw, 2, 9), i % 6] for i in range(40))
    return Site(Runs(folder), folder / "tasks")


@pytest.fixture(scope="module")
def alone(site) -> dict[str, Any]:
    """Trained and evaluated by one process each, without Ray."""
    tree = site.recipe("alone")
    site.runs.train_on(1, "alone", tiny_runs.run, tree)
    evaluate = EvaluateConfig(**tree["evaluate"])
    models = {"baseline": tree["student"]["model"], "trained": run_dir(tree) / "model"}
    for label, model in models.items():
        for task in TASKS:
            evaluate_task(model, task, evaluate, run_dir(tree) / "mteb" / label)
    return tree


def scores(tree: dict[str, Any]) -> dict[str, float]:
    folder = run_dir(tree) / "mteb"
    return {
        f"{label} {task}": score.main_score
        for label in ("baseline", "trained")
        for task, score in read_results(folder / label).items()
    }


def assert_same_results(tree: dict[str, Any], alone: dict[str, Any]) -> None:
    """Losses and weights bit for bit, and the same scores."""
    assert_same_run(tree, alone)
    sizes = [json.loads(line)["world_size"] for line in (run_dir(tree) / "metrics.jsonl").read_text().splitlines()]
    assert sizes == [2] * tiny_runs.STEPS
    assert len(scores(tree)) == 2 * len(TASKS)
    assert scores(tree) == pytest.approx(scores(alone), rel=1e-5)


def assert_on_both(nodes: Nodes, listed: str, name: str) -> None:
    """That the newest run's workers, or tasks, were on both nodes."""
    found = [each for each in nodes.listed(listed) if name in (each.get("class_name"), each.get("name"))]
    newest = max(each["job_id"] for each in found)
    used = {each["node_id"] for each in found if each["job_id"] == newest}
    assert used == {node["node_id"] for node in nodes.listed("nodes")}, found


def holds_copies(machine: Machine) -> bool:
    return "corpora" in machine.run(["find", str(machine.private / "home")])


# ------------------------------------------------------------------------------- raylets side by side on this machine


@dataclass
class Cluster:
    nodes: Nodes
    desk: Machine
    """Where commands are typed."""


@pytest.fixture(scope="module")
def side_by_side() -> Iterator[Cluster]:
    with machines_side_by_side(3) as machines, nodes_on(machines[:2]) as nodes:
        yield Cluster(nodes, machines[2])


@pytest.fixture(scope="module")
def on_two_nodes(side_by_side, site) -> dict[str, Any]:
    tree, nodes = site.recipe("on-two-nodes"), side_by_side.nodes
    command = [str(BIN / "gist-dist"), "train", site.file(tree), "--address", nodes.address]
    side_by_side.desk.run(command, nodes.environment)
    return tree


@pytest.mark.slow
def test_two_nodes_train_and_evaluate_as_one_process(side_by_side, on_two_nodes, alone):
    nodes, desk = side_by_side.nodes, side_by_side.desk
    assert_same_results(on_two_nodes, alone)
    assert_on_both(nodes, "actors", "RayTrainWorker")
    assert_on_both(nodes, "tasks", "_evaluate")
    for machine in (*nodes.machines, desk):
        assert holds_copies(machine)
        left = [path.name for name in ("tmp", "work") for path in (machine.private / name).iterdir()]
        assert not [name for name in left if "gist" in name], left  # libraries leave things of theirs


@pytest.mark.slow
def test_train_submit_and_two_nodes_give_the_same_losses(side_by_side, on_two_nodes, alone, site):
    nodes, desk = side_by_side.nodes, side_by_side.desk
    trained, submitted = site.recipe("trained"), site.recipe("submitted")
    desk.run([str(BIN / "gist-dist"), "train", site.file(trained)])
    command = [str(BIN / "gist-dist"), "submit", site.file(submitted), "--address", nodes.dashboard]
    assert "job submitted: SUCCEEDED" in desk.run(command, nodes.environment)
    assert_on_both(nodes, "actors", "RayTrainWorker")
    for tree in (trained, submitted, on_two_nodes):
        assert_same_results(tree, alone)


# --------------------------------------------------------------------------------- nodes with addresses of their own


@pytest.fixture(scope="module")
def apart() -> Iterator[Cluster]:
    if reason := why_not_apart():
        pytest.skip(reason)
    with machines_apart(3) as machines, nodes_on(machines[:2]) as nodes:
        yield Cluster(nodes, machines[2])


@pytest.mark.slow
def test_nodes_behind_addresses_of_their_own_train_as_one_process(apart, alone, site):
    """The driver is on the head; the nodes have disks of their own, and names that resolve to nothing."""
    nodes = apart.nodes
    head, other = nodes.machines
    assert {node["node_ip"] for node in nodes.listed("nodes")} == {"10.77.0.1", "10.77.0.2"}
    head.run(["touch", str(head.private / "tmp" / "private")])
    assert other.run(["ls", str(other.private / "tmp")]) == ""

    tree = site.recipe("apart", guide={"mode": "cache"})
    head.run([str(BIN / "gist-dist"), "train", site.file(tree), "--address", nodes.address], nodes.environment)
    assert_on_both(nodes, "actors", "RayTrainWorker")
    assert_on_both(nodes, "tasks", "_evaluate")
    assert holds_copies(head) and holds_copies(other)
    cached = site.recipe("alone-cached", guide={"mode": "cache"}, evaluate={"tasks": []})
    head.run([str(BIN / "gist-dist"), "train", site.file(cached), "cluster.num_workers=1"])
    assert_same_run(tree, cached)


@pytest.mark.slow
def test_a_machine_outside_submits_to_nodes_behind_addresses_of_their_own(apart, alone, site):
    nodes, laptop = apart.nodes, apart.desk
    tree = site.recipe("from-outside")
    command = [str(BIN / "gist-dist"), "submit", site.file(tree), "--address", nodes.dashboard]
    assert "job from-outside: SUCCEEDED" in laptop.run(command, nodes.environment)
    assert_on_both(nodes, "actors", "RayTrainWorker")
    assert_same_results(tree, alone)
    assert not holds_copies(laptop)


PLACES = {
    "output_dir": "runs",
    "data.cache_dir": "~/corpora",
    "guide.cache_dir": "cache",
    "checkpoint.dir": "checkpoints",
    "evaluate.local_tasks": "~/tasks",
    "student.model": "student",
    "guide.model": "~/guide",
}


def test_paths_mean_the_same_to_a_worker_with_another_home_and_folder(tmp_path, monkeypatch):
    for name in ("home/guide", "here/student", "other"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    tree: dict[str, Any] = {"name": "x", "data": {"sources": [{"path": "rows.jsonl"}]}}
    for key, place in PLACES.items():
        *section, last = key.split(".")
        (tree.setdefault(section[0], {}) if section else tree)[last] = place
    driver = parse_config(tree).absolute_paths()
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path / "other")
    worker = parse_config(driver.model_dump(mode="json"))
    homes = {key: tmp_path / ("home" if place[0] == "~" else "here") for key, place in PLACES.items()}
    for key, place in PLACES.items():
        value = worker
        for part in key.split("."):
            value = getattr(value, part)
        assert value == str(homes[key] / place.removeprefix("~/")), key
    assert (worker.corpora_dir, worker.guide_cache_dir) == (driver.corpora_dir, driver.guide_cache_dir)


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.254") is None
