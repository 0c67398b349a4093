"""tracking.profile_steps: traces of chosen steps in the run folder."""

import gzip
import json

import pytest
import tiny_runs
import torch

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.recipe import parse_config
from gist_dist.training.profiling import StepProfiler


def config_of(folder, **tracking) -> RunConfig:
    return parse_config(
        {
            "name": "run",
            "output_dir": str(folder),
            "student": {"model": "m"},
            "data": {"sources": [{"path": "p"}]},
            "tracking": tracking,
        }
    )


def events_of(file) -> set[str]:
    return {event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if "name" in event}


def test_chosen_steps_of_a_run_are_traced_with_their_phases_and_change_nothing(tmp_path):
    runs = tiny_runs.Runs(tmp_path)
    plain = runs.tree("plain", optim={"steps": 3})
    traced = runs.tree("traced", optim={"steps": 3}, tracking={"profile_steps": [2, 3, 9], "profile_ranks": "all"})
    for tree in (plain, traced):
        runs.train_on(2, tree["name"], tiny_runs.run, tree)
    tiny_runs.assert_same_run(plain, traced)
    folder = parse_config(traced).run_dir / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"step-{step:08d}-rank-{rank}.json.gz" for step in (2, 3) for rank in (0, 1)
    ]
    assert {"encode", "gather", "loss", "backward", "aten::mm"} <= events_of(folder / "step-00000002-rank-1.json.gz")
    assert not (parse_config(plain).run_dir / "profile").exists()


def test_only_rank_0_is_traced_unless_all_are(tmp_path):
    cpu = torch.device("cpu")
    first, every = config_of(tmp_path, profile_steps=5), config_of(tmp_path, profile_steps=[5], profile_ranks="all")
    assert [StepProfiler(first, rank, cpu).steps for rank in (0, 1)] == [{5}, frozenset()]
    assert [StepProfiler(every, rank, cpu).steps for rank in (0, 1)] == [{5}, {5}]


def test_a_full_disk_costs_the_trace_and_not_the_run(tmp_path, caplog):
    config = config_of(tmp_path, profile_steps=[1])
    config.run_dir.mkdir()
    (config.run_dir / "profile").write_text("a file where the folder should be")
    with StepProfiler(config, 0, torch.device("cpu")).recording(1):
        torch.ones(2).sum()
    assert "step-00000001-rank-0.json.gz can't be written" in caplog.text


@pytest.mark.parametrize("steps", [[0], ["x"], list(range(1, 102))])
def test_steps_that_there_can_not_be_are_refused(tmp_path, steps):
    with pytest.raises(UserError, match="profile_steps"):
        config_of(tmp_path, profile_steps=steps)
