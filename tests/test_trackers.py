"""TensorBoard, Weights & Biases and MLflow: the same names and numbers as metrics.jsonl, one run however often it goes
on, and never a reason to lose one."""

import json
import logging
from pathlib import Path

import pytest
from tiny_runs import STEPS, Runs, curve, run_dir

from gist_dist.common.errors import UserError
from gist_dist.recipe import parse_config
from gist_dist.training.trackers import Trackers, check_trackers, flat, track_scores


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("trackers"))


def stop_after(step: int):
    calls = iter([None] * (step - 1) + ["stop"])
    return lambda: next(calls)


def metrics_of(tree: dict) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (run_dir(tree) / "metrics.jsonl").read_text().splitlines())
    flattened = {line["step"]: dict(flat(line, "/")) for line in lines}
    return {
        step: {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        for step, line in flattened.items()
    }


def interrupted_run(runs: Runs, name: str, **tracking) -> dict:
    """Stopped after step 3, and continued."""
    tree = runs.tree(name, tracking={"tensorboard": False, **tracking})
    assert runs.train(tree, stop_after(3)) == "stopped"
    assert runs.train(tree) == "finished"
    return tree


def test_tensorboard_has_every_step_once(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tree = interrupted_run(runs, "tensorboard", tensorboard=True)
    events = EventAccumulator(str(run_dir(tree) / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    for name in ("loss", "masked_fraction_ap", "seconds/encode"):
        told = {event.step: event.value for event in events.Scalars(name)}
        assert told == {step: pytest.approx(line[name], rel=1e-6) for step, line in metrics_of(tree).items()}
        assert len(events.Scalars(name)) == STEPS


@pytest.mark.filterwarnings("ignore")  # MLflow's, at SQLAlchemy's
def test_mlflow_has_one_run_with_recipe_metrics_and_scores(runs, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    tree = interrupted_run(runs, "mlflow", mlflow={"uri": uri, "experiment": "tests"})
    track_scores(parse_config(tree), {"trained": {"STS12": 0.5}, "baseline": {"STS12": 0.25}})
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.run_name == "mlflow" and found.info.status == "FINISHED"
    assert found.data.params["batch.global_size"] == "16" and found.data.params["loss.temperature"] == "0.05"
    assert found.data.metrics["mteb/trained/STS12"] == 0.5 and found.data.metrics["mteb/baseline/STS12"] == 0.25
    for name in ("loss", "grad_norm", "seconds/step"):
        told = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}
        assert told == {step: line[name] for step, line in metrics_of(tree).items()}


def test_wandb_keeps_one_run_offline(runs):
    """What `wandb sync` would send, read back from its own file."""
    tree = interrupted_run(runs, "wandb", wandb={"mode": "offline", "project": "tests"})
    track_scores(parse_config(tree), {"trained": {"STS12": 0.5}})
    told, scores, ids = {}, {}, set()
    for file in sorted(run_dir(tree).rglob("run-*.wandb")):
        ids.add(file.stem.removeprefix("run-"))
        for record in records_of(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                line = values_of(record.history.item)
                told[int(line["_step"])] = line
            elif kind == "summary":
                changed = values_of(record.summary.update)
                scores |= {name: value for name, value in changed.items() if name.startswith("mteb")}
    assert len(ids) == 1 and ids == {json.loads((run_dir(tree) / "tracking.json").read_text())["wandb"]}
    expected = metrics_of(tree)
    assert told.keys() == expected.keys()
    for step, line in expected.items():
        assert {name: told[step][name] for name in line} == line
    assert scores == {"mteb/trained/STS12": 0.5}


def values_of(items) -> dict:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def records_of(file: Path):
    """W&B's file is a log as LevelDB's: blocks of 32 KiB, in them pieces of records behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, record = file.read_bytes()[7:], b""  # W&B's own header is the start of the first block
    position = 7
    while len(data) >= 7:
        if (rest := 32768 - position % 32768) < 7:
            data, position = data[rest:], position + rest
            continue
        size, kind = int.from_bytes(data[4:6], "little"), data[6]
        record += data[7 : 7 + size]
        data, position = data[7 + size :], position + 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_a_tracker_that_is_away_ends_a_new_run_before_it_trains_and_no_later_one(runs, tmp_path, caplog):
    (tmp_path / "file").write_text("a file, so no folder of a store can be made in it")
    uri = f"sqlite:///{tmp_path}/file/store.db"
    tree = runs.tree("away", tracking={"tensorboard": False, "mlflow": {"uri": uri}})
    with pytest.raises(UserError, match=r"^tracking.mlflow can't be opened: .*; fix that, or leave it out$"):
        runs.train(tree)
    assert not curve(tree)

    runs.train(runs.tree("away", tracking={"tensorboard": False}), stop_after(3))
    with caplog.at_level(logging.WARNING):
        assert runs.train(tree) == "finished"
    assert "tracking.mlflow can't be opened" in caplog.text and len(curve(tree)) == STEPS


def test_a_tracker_that_fails_is_left_and_said_once(runs, caplog):
    class Failing:
        def log(self, values, step):
            raise OSError("no space, says hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")

    config = parse_config(runs.tree("failing"))
    trackers = Trackers(config)
    trackers.open["wandb"] = Failing()
    trackers.log({"loss": 1.0}, 1)
    trackers.log({"loss": 1.0}, 2)
    (message,) = caplog.messages
    assert message.startswith("tracking.wandb ends here: no space") and "abcdefghij" not in message
    assert trackers.open == {}


def test_a_missing_package_is_named_before_anything_runs(runs, monkeypatch):
    monkeypatch.setattr("gist_dist.training.trackers.find_spec", lambda name: None)
    config = parse_config(runs.tree("missing", tracking={"tensorboard": False, "wandb": {}}))
    with pytest.raises(UserError, match=r"tracking.wandb: the package wandb is missing; .*gist-dist\[wandb\]"):
        check_trackers(config)
