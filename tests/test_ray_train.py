"""Real runs through Ray with real models: the law, the run folder, resume, and errors before any worker starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig, RunConfig
from gist_dist.on_ray.cluster.capacity import check_resources
from gist_dist.on_ray.driver import train_and_evaluate
from gist_dist.recipe import parse_config
from gist_dist.runs.metrics_file import read_metrics

pytestmark = pytest.mark.ray

STEPS = 4
TOPICS = ("river", "engine", "sonata", "vaccine", "glacier", "theorem", "harvest", "satellite")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Ragged rows: different lengths, some with hard negatives, some texts in several rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(120):
            topic, other = TOPICS[i % 8], TOPICS[(i + 3) % 8]
            row = {
                "anchor": f"what does number {i} say about the {topic}",
                "positive": f"the {topic} in entry {i // 2} " + f"is described at length with {other} " * (i % 5),
                "negatives": [f"{other} entry {i + k}" for k in range(i % 3)],
            }
            file.write(json.dumps(row) + "\n")
    return path


def recipe(output_dir: Path, rows: Path, minilm: Path, minilm_l2: Path, num_workers: int, **changes) -> RunConfig:
    tree = {
        "name": f"workers-{num_workers}",
        "output_dir": str(output_dir),
        "student": {"model": str(minilm_l2), "max_tokens": 32},
        "guide": {"model": str(minilm), "max_tokens": 32},
        "data": {"sources": [{"path": str(rows)}]},
        "batch": {"global_size": 48, "chunk_tokens": 256},
        "optim": {"steps": STEPS, "learning_rate": 1e-4},
        "checkpoint": {"every_steps": 2},
        "cluster": {"num_workers": num_workers},
    }
    return parse_config(tree | changes)


class Runs(dict[int, RunConfig]):
    """The same recipe by number of workers, trained when it is first asked for."""

    def __init__(self, *settings: Path) -> None:
        self.settings = settings

    def __missing__(self, num_workers: int) -> RunConfig:
        self[num_workers] = recipe(*self.settings, num_workers)
        train_and_evaluate(self[num_workers])
        return self[num_workers]


@pytest.fixture(scope="module")
def runs(ray_session, tmp_path_factory, rows, minilm, minilm_l2) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), rows, minilm, minilm_l2)


SEVERAL = [2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_workers", SEVERAL)
def test_losses_and_gradient_norms_do_not_depend_on_world_size(runs, num_workers):
    alone, together = (read_metrics(runs[n].run_dir / "metrics.jsonl") for n in (1, num_workers))
    assert [line["world_size"] for line in together] == [num_workers] * STEPS
    for one, many in zip(alone, together, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
        assert many["masked_fraction"] == one["masked_fraction"]
    assert any(line["masked_fraction"] > 0 for line in alone)


@pytest.mark.parametrize("num_workers", SEVERAL)
def test_models_do_not_depend_on_world_size(runs, minilm_l2, num_workers):
    before = load_file(minilm_l2 / "model.safetensors")
    alone, together = (load_file(runs[n].run_dir / "model" / "model.safetensors") for n in (1, num_workers))
    assert max((alone[name] - before[name]).abs().max().item() for name in alone) > 1e-5
    # Sums in fp64 make even the noise agree that Adam takes for the gradient of key biases.
    assert sum((together[name] != tensor).sum().item() for name, tensor in alone.items()) == 0


def test_run_leaves_what_the_design_lists(runs):
    folder = runs[2].run_dir
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model/README.md",
        "report.html",
        "report.json",
        "plots",
    ):
        assert (folder / name).exists(), name
    assert SentenceTransformer(str(folder / "model"), device="cpu").encode(["text"]).shape == (1, 384)
    line = read_metrics(folder / "metrics.jsonl")[0]
    for key in (
        "step loss grad_norm learning_rate world_size pairs_per_second tokens_per_second padding_fraction "
        "masked_fraction masked_fraction_ap masked_fraction_aa masked_fraction_pp masked_fraction_an "
        "rows_without_negatives seconds peak_memory_bytes"
    ).split():
        assert key in line, key
    assert {"encode", "guide", "gather", "loss", "scatter", "backward", "optimizer", "step"} <= line["seconds"].keys()


def test_finished_run_trains_no_more(runs):
    model = runs[1].run_dir / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    started = time.monotonic()
    train_and_evaluate(runs[1])
    assert model.stat().st_mtime_ns == written
    assert time.monotonic() - started < 20


def test_another_recipe_under_the_same_name_is_refused(runs):
    changed = runs[1].model_copy(update={"seed": 7})
    with pytest.raises(UserError, match=r"holds a run with seed = 0, not 7"):
        train_and_evaluate(changed)


@pytest.mark.slow
def test_killed_run_ends_with_the_undisturbed_model(runs, tmp_path, rows, minilm, minilm_l2):
    """The driver is killed after the first checkpoint; the same recipe, now on one worker, does the rest."""
    killed = recipe(tmp_path, rows, minilm, minilm_l2, 2, name="killed")
    command = [sys.executable, "-m", "gist_dist.cli", "train", str(_write_recipe(killed, tmp_path))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = killed.run_dir / "checkpoints" / "step-00000002" / "COMMIT.json"
    deadline = time.monotonic() + 240
    while not first.exists():
        assert driver.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    train_and_evaluate(killed.model_copy(update={"cluster": ClusterConfig(num_workers=1)}))
    lines, undisturbed = (read_metrics(c.run_dir / "metrics.jsonl") for c in (killed, runs[2]))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected in zip(lines, undisturbed, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.slow
def test_cached_guide_gives_the_online_run(runs, tmp_path, rows, minilm, minilm_l2):
    """Filled before training; the worker loads no guide."""
    guide = {"model": str(minilm), "max_tokens": 32, "mode": "cache"}
    cached = recipe(tmp_path, rows, minilm, minilm_l2, 1, name="cached", guide=guide)
    train_and_evaluate(cached)
    lines, online = (read_metrics(c.run_dir / "metrics.jsonl") for c in (cached, runs[1]))
    for line, expected in zip(lines, online, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["masked_fraction"] == pytest.approx(expected["masked_fraction"], abs=1e-3)
        assert line["seconds"]["guide"] < expected["seconds"]["guide"] / 5
    assert list((tmp_path / "guide_cache").glob("*/*.arrow"))


def test_precompute_and_mine_from_the_command_line(ray_session, tmp_path, rows, minilm, minilm_l2, capsys):
    path = _write_recipe(recipe(tmp_path, rows, minilm, minilm_l2, 1), tmp_path)
    assert main(["precompute", str(path)]) == 0
    assert " were there before" in capsys.readouterr().out
    assert main(["precompute", str(path)]) == 0
    assert "; 0 encoded" in capsys.readouterr().out
    assert main(["mine", str(path), "--output", str(tmp_path / "mined"), "--negatives", "2"]) == 0
    sources = yaml.safe_load((tmp_path / "mined" / "sources.yaml").read_text())["sources"]
    assert main(["plan", str(path), f"data.sources={json.dumps(sources)}"]) == 0
    assert "rows.parquet" in (tmp_path / "mined" / "sources.yaml").read_text()
    mined = pq.read_table(tmp_path / "mined" / "rows.parquet").to_pylist()
    before = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [len(row["negatives"]) for row in mined] == [len(row["negatives"]) + 2 for row in before]


@pytest.mark.slow
def test_user_error_in_a_worker_is_one_sentence_and_is_not_retried(ray_session, tmp_path, rows, minilm, minilm_l2):
    config = recipe(tmp_path, rows, minilm, minilm_l2, 2, name="explodes", loss={"temperature": 1e-45})
    with pytest.raises(UserError, match=r"step 1: the loss is (nan|inf)"):
        train_and_evaluate(config)


@pytest.mark.slow
def test_a_local_ray_leaves_another_one_alone(ray_session):
    """A second driver on this machine starts its own Ray, runs a task on it and stops it, and ours lives on."""
    nodes = ray.nodes()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "gist_dist.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert "started, ran a task and stopped" in done.stdout, done.stdout + done.stderr
    assert ray.get(ray.remote(lambda: "alive").remote(), timeout=60) == "alive"
    assert [node["NodeID"] for node in ray.nodes() if node["Alive"]] == [node["NodeID"] for node in nodes]


def test_more_workers_than_the_cluster_has_are_refused():
    with pytest.raises(UserError, match=r"num_workers = 3 with cpus_per_worker = 1 needs 3 CPUs; the cluster has 2"):
        check_resources(ClusterConfig(num_workers=3, cpus_per_worker=1), {"CPU": 2.0})
    check_resources(ClusterConfig(num_workers=4), {"CPU": 2.0})  # half a core each
    with pytest.raises(UserError, match=r"num_workers = 5 with cpus_per_worker = 0.5 needs 2.5 CPUs"):
        check_resources(ClusterConfig(num_workers=5), {"CPU": 2.0})
    with pytest.raises(UserError, match="needs 2 GPUs; the cluster has 0"):
        check_resources(ClusterConfig(num_workers=2, gpus_per_worker=1), {"CPU": 8.0})


def _write_recipe(config: RunConfig, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path
