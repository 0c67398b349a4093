"""A run's folder knows its recipe again, also one that an older version has written."""

import pytest
import tiny_runs
import yaml
from tiny import recipe

from gist_dist.common.errors import UserError
from gist_dist.models import precision
from gist_dist.recipe import parse_config
from gist_dist.runs.folder import RunFolder


@pytest.fixture
def written(tmp_path):
    """The recipe of a run, and its config.yaml as 0.1 wrote it: prompts and column names spelled out."""
    source = {"path": "pairs.jsonl", "name": "pairs"}
    tree = {"name": "run", "output_dir": str(tmp_path), "student": {"model": "m"}, "guide": {"model": "g"}}
    tree |= {"data": {"sources": [source, source | {"columns": {"anchor": "question"}}]}}
    run = RunFolder(parse_config(tree))
    run.create(run.config)
    file = run.folder / "config.yaml"
    old = yaml.safe_load(file.read_text())
    for section in ("student", "guide"):
        old[section]["prompts"] = dict.fromkeys(("anchor", "positive", "negatives"), "")
    for columns in (source["columns"] for source in old["data"]["sources"]):
        columns["anchor"], columns["positive"] = columns["anchor"] or "anchor", "positive"
    del old["data"]["sources"][0]["format"]  # a field of today
    file.write_text(yaml.safe_dump(old))
    return tree


def test_values_that_null_stands_for_by_now_are_no_change(written):
    RunFolder(parse_config(written)).refuse_other_recipe()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("student", "prompts", {"anchor": "query: "}),
        ("guide", "prompts", {"positive": "passage: "}),
        ("data", "sources", [{"path": "pairs.jsonl", "name": "pairs", "columns": {"anchor": "title"}}] * 2),
        ("data", "sources", [{"path": "other.jsonl", "name": "pairs"}] * 2),
    ],
)
def test_values_that_are_others_are_a_change(written, section, key, value):
    changed = written | {section: written[section] | {key: value}}
    with pytest.raises(UserError, match=f"holds a run with {section}.{key}.* choose another name="):
        RunFolder(parse_config(changed)).refuse_other_recipe()


def test_a_precision_left_open_is_that_of_the_run(tmp_path, written, monkeypatch):
    """Whatever the machine is that it goes on with; a new run takes what suits the machine."""
    before = parse_config(written | {"name": "other"})
    before = before.model_copy(update={"student": before.student.model_copy(update={"precision": "bf16"})})
    run = RunFolder(before)
    run.create(before)
    left_open = {section: written[section] | {"precision": "auto"} for section in ("student", "guide")}
    config = parse_config(written | {"name": "other"} | left_open)
    RunFolder(config).refuse_other_recipe()
    for fast, new in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "has_bf16", lambda device, fast=fast: fast)
        kept, settled = precision.settled(config, RunFolder(config).recorded()), precision.settled(config)
        assert kept.guide and settled.guide
        assert (kept.student.precision, kept.guide.precision) == ("bf16", "fp32")
        assert (settled.student.precision, settled.guide.precision) == (new, new)
        RunFolder(kept).refuse_other_recipe()
    with pytest.raises(UserError, match=r"holds a run with student.precision = 'bf16', not 'fp32'"):
        RunFolder(parse_config(written | {"name": "other"})).refuse_other_recipe()


def test_other_prompts_are_other_data_to_a_checkpoint(tmp_path):
    """Which has no key for prompts: the token ids tell them apart."""
    runs = tiny_runs.Runs(tmp_path)
    tree = runs.tree("run", optim={"steps": 2})
    runs.train(tree)
    prompted = tree | {"student": tree["student"] | {"prompts": {"anchor": "the "}}}
    told = tiny_runs.complaint(tiny_runs.World(), prompted)
    assert told.startswith("UserError: ") and "step-00000002: data was" in told


def test_asking_whether_a_run_may_begin_leaves_no_folder(tmp_path):
    config = parse_config(recipe(tmp_path, "student", None, tmp_path / "rows.jsonl"))
    RunFolder(config).refuse_other_recipe()
    assert not config.run_dir.exists() and config.run_dir.parent.is_dir()
