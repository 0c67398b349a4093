"""`gist-dist cotrain`: who guides whom in which round, and what its page says."""

import json
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
from tiny_runs import curve, run, weights

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.core.collectives import World
from gist_dist.on_ray import cotrain as module
from gist_dist.on_ray.cotrain import cotrain, plan_rounds
from gist_dist.recipe import parse_config
from gist_dist.report.rounds import rounds_of, write_rounds
from gist_dist.report.run import TaskRow, read_run
from gist_dist.runs.folder import RunFolder

ROUNDS = 2


@pytest.fixture
def pair(tmp_path):
    rng = random.Random(3)
    rows = [{"anchor": tiny.words(rng, 2, 6), "positive": tiny.words(rng, 3, 9)} for _ in range(40)]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    students = [tiny.save_tiny_model(tmp_path / name, width, seed=width) for name, width in (("a", 32), ("b", 24))]
    trees = [
        tiny.recipe(tmp_path, student, None, source, name=student.name, batch={"global_size": 16, "chunk_tokens": 64},
                    optim={"steps": 3, "learning_rate": 1e-3}, checkpoint={"every_steps": None})
        for student in students
    ]  # fmt: skip
    trees[0]["guide"] = {"model": str(tiny.save_tiny_model(tmp_path / "guide", seed=7)), "mode": "cache"}
    trees[1]["student"] |= {"max_tokens": 20, "prompts": {"anchor": "query "}}
    return [parse_config(tree) for tree in trees]


def by_name(plans):
    return {plan.config.name: plan.config for plan in plans}


def test_each_is_guided_by_the_others_last_state(pair):
    a, b = pair
    runs = by_name(plan_rounds(a, b, 3))
    assert list(runs)[:4] == ["a-round-1", "b-round-1", "a-round-2", "b-round-2"]
    assert (runs["a-round-1"].student.model, runs["a-round-1"].guide.model) == (a.student.model, b.student.model)
    assert (runs["b-round-1"].student.model, runs["b-round-1"].guide.model) == (b.student.model, a.student.model)
    for own, other in ("ab", "ba"):
        third = runs[f"{own}-round-3"]
        assert third.student.model == str(runs[f"{own}-round-2"].run_dir / "model")
        assert third.guide.model == str(runs[f"{other}-round-2"].run_dir / "model")
        assert third.seed == 2 and runs[f"{own}-round-1"].seed == 0
    # As the other student encodes; in the mode of the own recipe's guide.
    guide = runs["a-round-2"].guide
    assert (guide.max_tokens, guide.prompts.anchor, guide.mode) == (20, "query ", "cache")
    assert runs["b-round-2"].guide.mode == "online"


def test_the_control_differs_in_the_guide_alone(pair):
    a, b = pair
    runs = by_name(plan_rounds(a, b, 2))
    for name in ("a", "b"):
        first, fixed = runs[f"{name}-round-1"], runs[f"{name}-fixed-round-1"]
        same = ("seed", "student", "data", "batch", "loss", "optim")
        assert all(getattr(first, key) == getattr(fixed, key) for key in same)
        second = runs[f"{name}-fixed-round-2"]
        assert second.student.model == str(fixed.run_dir / "model") and second.guide == fixed.guide
        assert second.seed == runs[f"{name}-round-2"].seed
    assert runs["a-fixed-round-1"].guide == a.guide  # its recipe has one
    assert runs["b-fixed-round-2"].guide.model == a.student.model  # and this one has none
    assert len(by_name(plan_rounds(a, b, 2, with_fixed=False))) == 4


def test_only_the_first_run_of_each_scores_the_untrained_student_and_none_is_pushed(pair):
    a = pair[0].model_copy(update={"evaluate": pair[0].evaluate.model_copy(update={"guide": True})})
    hub = a.tracking.model_copy(update={"hub": a.tracking.hub.model_copy(update={"repo_id": "me/model"})})
    runs = by_name(plan_rounds(a.model_copy(update={"tracking": hub}), pair[1], 2))
    assert [name for name, config in runs.items() if config.evaluate.baseline] == ["a-round-1", "b-round-1"]
    assert not any(config.evaluate.guide or config.tracking.hub.repo_id for config in runs.values())


@pytest.fixture
def in_process(monkeypatch):
    """Trainings without Ray; what was trained, in order."""
    trained = []

    def train(config):
        folder = RunFolder(config)
        folder.refuse_other_recipe()
        if not folder.is_trained():
            tree = config.model_dump(mode="json")
            tree["guide"]["mode"] = "online"
            folder.create(config)
            run(World(), tree)
            folder.mark_trained(3)
            trained.append(config.name)

    monkeypatch.setattr(module, "train_and_evaluate", train)
    monkeypatch.setattr(module, "connected", lambda cluster: nullcontext())
    return trained


def test_rounds_train_on_and_the_same_command_does_what_is_left(pair, in_process, monkeypatch):
    told = cotrain(*pair, ROUNDS)
    assert in_process[:4] == ["a-round-1", "b-round-1", "a-round-2", "b-round-2"] and len(in_process) == 8
    runs = by_name(plan_rounds(*pair, ROUNDS))
    trees = {name: config.model_dump(mode="json") for name, config in runs.items()}
    assert len(curve(trees["a-round-2"])) == 3
    # Other guides, other weights: the second round is where they part at the latest.
    moved, fixed = weights(trees["a-round-2"]), weights(trees["a-fixed-round-2"])
    assert any((moved[name] != fixed[name]).any() for name in moved)
    page = Path(pair[0].output_dir) / "cotrain-a-b.html"
    assert told.page == page and "a-fixed-round-2" in page.read_text()
    in_process.clear()
    again = cotrain(*pair, ROUNDS)
    assert not in_process and again.contents == told.contents
    cotrain(*pair, ROUNDS + 1)  # a round more
    assert in_process == ["a-round-3", "b-round-3", "a-fixed-round-3", "b-fixed-round-3"]


def test_the_page_sets_rounds_beside_the_fixed_guide(pair, tmp_path):
    folders = []
    for planned in plan_rounds(*pair, ROUNDS):
        RunFolder(planned.config).create(planned.config)
        folders.append((planned.student, planned.kind, planned.round, planned.config.run_dir))
    runs = [(student, kind, number, read_run(folder)) for student, kind, number, folder in folders]
    for _, kind, number, found in runs:
        row = {"task": "T", "type": "STS", "metric": "m", "before": 50.0, "guide": None, "change": None}
        after = {"cotrained": 60.0, "fixed": 58.5}[kind] + number
        found.tasks.append(TaskRow(**row, after=after))
    contents = rounds_of(runs)
    first, second = contents["students"][0]["rounds"]
    assert (first["cotrained"]["mean"], first["fixed"]["mean"], first["difference"]) == (61.0, 59.5, 1.5)
    assert second["difference"] == 1.5 and contents["students"][1]["before"]["mean"] == 50.0
    assert contents["headline"].startswith("Compared with a fixed guide, after the last round: a +1.50, b +1.50")
    rounds = write_rounds(folders, tmp_path / "page.html")  # no scores on the disk
    assert "No task was evaluated" in rounds.contents["headline"]
    assert json.loads((tmp_path / "page.json").read_text())["students"][0]["name"] == "a"
    assert rounds.lines()[0].split() == ["student", "round", "co-trained", "fixed", "guide", "difference"]


@pytest.mark.parametrize(
    ("changes", "rounds", "complaint"),
    [
        ({}, 0, "--rounds 0: at least 1"),
        ({"name": "a"}, 1, "name a.*share folders"),
        ({"guide": {"refresh": 5}}, 1, r"b: guide\.refresh = 5"),
    ],
)
def test_bad_input_is_named_before_anything_is_loaded(pair, changes, rounds, complaint):
    a, b = pair
    changed = parse_config(b.model_dump(mode="json") | changes)
    with pytest.raises(UserError, match=complaint):
        cotrain(a, changed, rounds)
    assert not list(Path(a.output_dir).glob("*-round-*"))


def test_the_second_recipes_mistakes_are_named_before_the_first_is_trained(pair, in_process, tmp_path):
    a, b = pair
    tree = b.model_dump(mode="json")
    tree["data"]["sources"][0]["path"] = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="nowhere"):
        cotrain(a, parse_config(tree), 1)
    assert not in_process


def test_the_command_line_takes_two_recipes_and_overrides_of_both(pair, in_process, tmp_path, capsys):
    files = []
    for config in pair:
        files.append(tmp_path / f"{config.name}.yaml")
        files[-1].write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["cotrain", *map(str, files), "optim.steps=2", "--rounds", "1", "--no-fixed"]) == 0
    assert in_process == ["a-round-1", "b-round-1"]
    out = capsys.readouterr().out
    assert "co-trained" in out and "cotrain-a-b.html" in out
    assert main(["cotrain", *map(str, files), "--rounds", "0"]) == 1
