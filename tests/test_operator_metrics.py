"""The series that operators see: scraped from the metrics port of a real node while a worker reports."""

import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from tiny import recipe, save_tiny_model, write_jsonl

from gist_dist.on_ray.driver import Stopped, train_and_evaluate
from gist_dist.on_ray.train.prometheus import SERIES, OperatorMetrics
from gist_dist.recipe import parse_config
from gist_dist.runs.metrics_file import read_metrics

LINE = {
    "step": 7, "epoch": 0.5, "loss": 1.25, "grad_norm": 3.0, "learning_rate": 2e-5, "pairs_per_second": 310.0,
    "tokens_per_second": 9000.0, "masked_fraction": 0.125,
    "masked_weight": 0.375, "padding_fraction": 0.0625, "rows_without_negatives": 2,
    "peak_memory_bytes": 2**31, "world_size": 4, "seconds": {"encode": 0.5, "loss": 0.25, "step": 1.0},
    "sources": {"a": 7}, "skipped": None,
}  # fmt: skip


def start_reporter():
    """An actor that reports lines; its class goes to the worker, which knows no tests."""

    class Reporter:
        def report(self, run: str, lines: list[dict]) -> None:
            observe = OperatorMetrics(run)
            for line in lines:
                observe(line)

    return ray.remote(num_cpus=0)(Reporter).remote()


def scraped(run: str, wanted: set[str], timeout_s: float = 60) -> dict[str, float]:
    """What Prometheus would read of a run, once all that is wanted is there: name, or name:phase → value."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + timeout_s
    while True:
        found = {}
        page = urllib.request.urlopen(address, timeout=10).read().decode()
        for name, labels, value in re.findall(r"^(ray_gist_dist_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if tags.get("run") == run:
                found[name + (f":{tags['phase']}" if "phase" in tags else "")] = float(value)
        if wanted <= found.keys() or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


@pytest.mark.ray
def test_prometheus_finds_every_series_of_the_last_line(ray_session):
    """A number that was not finite, null in the line, leaves the last finite one."""
    reporter = start_reporter()
    ray.get(reporter.report.remote("mine", [LINE | {"step": 6, "loss": 9.0}, LINE | {"grad_norm": None}]))
    seconds = {f"ray_gist_dist_seconds:{phase}": value for phase, value in LINE["seconds"].items()}
    expected = {f"ray_gist_dist_{key}": LINE[key] for key in SERIES} | seconds
    assert scraped("mine", set(expected)) == pytest.approx(expected)


def test_the_dashboard_of_grafana_shows_no_other_series():
    dashboard = (Path(__file__).parent.parent / "cluster" / "grafana" / "gist_dist.json").read_text()
    shown = set(re.findall(r"ray_gist_dist_([a-z_]+)", dashboard))
    assert shown and shown <= {*SERIES, "seconds"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_training_is_seen(ray_session, tmp_path):
    """Through Ray Train: what the worker's rank 0 gives its observer."""
    model = save_tiny_model(tmp_path / "model")
    rows = [{"anchor": f"amber {a}", "positive": f"cedar {a}"} for a in ("basin", "delta", "ember", "fjord")]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    tree = recipe(tmp_path / "runs", model, None, source, name="whole", batch={"global_size": 4}, optim={"steps": 4000})
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_and_evaluate, parse_config(tree))
        found = scraped("whole", {"ray_gist_dist_loss", "ray_gist_dist_seconds:step"}, timeout_s=120)
        (tmp_path / "runs" / "whole" / "STOP").touch()
        with pytest.raises(Stopped):
            training.result(timeout=120)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "runs" / "whole" / "metrics.jsonl")}
    assert found["ray_gist_dist_loss"] in [line["loss"] for line in lines.values()]
    assert 1 <= found["ray_gist_dist_step"] <= max(lines) < 4000
    assert found["ray_gist_dist_world_size"] == 1
