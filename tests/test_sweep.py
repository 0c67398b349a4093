"""`gist-dist sweep`: what is run, what is refused, what its page says, and a sweep on Ray Tune that goes on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import recipe, save_tiny_model, words, write_jsonl

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.on_ray.sweep import check_sweep
from gist_dist.on_ray.sweep_plan import SweepConfig, load_sweep, plan_choices, plan_trials, settings_of
from gist_dist.recipe import parse_config, parse_section
from gist_dist.report import sweep as report_sweep
from gist_dist.report.run import Run, TaskRow
from gist_dist.report.sweep import Trial, sweep_of, value_of, write_sweep

ARMS = {"none": {"guide": None}, "guide": {}}


def over(**fields: Any) -> SweepConfig:
    return parse_section(SweepConfig, {"name": "study"} | fields, "over.yaml")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=3)


def base(folder: Path, models: tuple[Path, Path], **sections: Any) -> RunConfig:
    rng = random.Random(4)
    rows = [{"anchor": words(rng, 3, 6), "positive": words(rng, 3, 8)} for _ in range(48)]
    tree: dict[str, Any] = {
        "data": {"hold_out": 0.25, "cache_dir": str(folder / "corpora")},
        "batch": {"global_size": 8},
        "optim": {"steps": 2, "learning_rate": 1e-3},
        "checkpoint": {"every_steps": None},
        "tracking": {"tensorboard": False},
    }
    path = write_jsonl(folder / "rows.jsonl", rows)
    return parse_config(recipe(folder, *models, path, name="base", **(tree | sections)))


# What is run


def test_every_arm_value_and_seed_is_a_run_of_its_own(tmp_path, models):
    planned = list(plan_trials(base(tmp_path, models), over(
        arms=ARMS, over={"batch.global_size": [8, 16], "loss.temperature": [0.02, 0.05]}, seeds=[1, 2],
    ), {}))  # fmt: skip
    assert len(planned) == len({one.config.name for one in planned}) == 2 * 2 * 2 * 2
    assert {(one.config.guide is None) for one in planned if one.arm == "none"} == {True}
    assert {one.config.guide.model for one in planned if one.arm == "guide" and one.config.guide} == {str(models[1])}
    for one in planned:
        assert one.config.batch.global_size == one.values["batch.global_size"]
        assert one.config.loss.temperature == one.values["loss.temperature"]
        assert one.config.seed == one.seed
    assert [one.seed for one in planned] == [1] * 8 + [2] * 8, "whatever ends a sweep leaves pairs"


def test_what_random_draws_is_a_function_of_the_file():
    space = {
        "optim.learning_rate": {"loguniform": [1e-5, 1e-3]}, "loss.margin": {"uniform": [-0.1, 0.1]},
        "batch.global_size": {"choice": [32, 64]}, "optim.steps": {"randint": [5, 8]},
    }  # fmt: skip
    drawn = [values for _, values in settings_of(over(search="random", over=space, samples=50))]
    assert drawn == [values for _, values in settings_of(over(search="random", over=space, samples=50))]
    rates = [values["optim.learning_rate"] for values in drawn]
    assert 1e-5 <= min(rates) < 5e-5 and 3e-4 < max(rates) <= 1e-3 and len(set(rates)) > 40
    assert {values["batch.global_size"] for values in drawn} == {32, 64}
    assert {values["optim.steps"] for values in drawn} == {5, 6, 7}


def test_choices_are_tried_on_a_seed_that_is_not_scored(tmp_path, models):
    rates = {"optim.learning_rate": [1e-4, 2e-4, 4e-4]}
    swept = over(arms=ARMS, choose=rates, seeds=[1, 2])
    tried = list(plan_choices(base(tmp_path, models), swept))
    assert len(tried) == 6 and {one.seed for one in tried} == {1000}
    chosen = {("none", "{}"): {"optim.learning_rate": 1e-4}, ("guide", "{}"): {"optim.learning_rate": 4e-4}}
    runs = list(plan_trials(base(tmp_path, models), swept, chosen))
    assert {(one.arm, one.config.optim.learning_rate) for one in runs} == {("none", 1e-4), ("guide", 4e-4)}


def test_a_long_setting_has_a_short_name_of_its_own(tmp_path, models):
    many = {f"optim.{key}": [1e-5, 2e-5] for key in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio")}
    planned = list(plan_trials(base(tmp_path, models), over(name="a" * 40, over=many), {}))
    names = {one.config.name for one in planned}
    assert len(names) == 16 and max(map(len, names)) <= 100


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"arms": {"none": {}}, "contrasts": [["guide", "none"]]}, ["contrasts", "'guide'", "none"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds"]),
        ({"over": {"batch.global_size": 8}}, ["over.batch.global_size", "list"]),
        ({"over": {"batch.global_size": {"uniform": [1, 2]}}}, ["over.batch.global_size", "search"]),
        ({"search": "random", "over": {"loss.margin": {"uniform": [2, 1]}}}, ["over.loss.margin.uniform"]),
        ({"search": "random", "over": {"loss.margin": {"gauss": [0, 1]}}}, ["over.loss.margin", "loguniform"]),
        ({"search": "random", "over": {"loss.margin": {"loguniform": [0, 1]}}}, ["over.loss.margin", "above 0"]),
        ({"search": "random", "over": {"optim.steps": {"randint": [0.5, 1.5]}}}, ["over.optim.steps", "whole"]),
        ({"search": "random"}, ["over"]),
        ({"search": "optuna", "over": {"loss.margin": [0, 1]}, "seeds": [1, 2]}, ["optuna", "one seed"]),
        ({"choose": {"loss.margin": [0, 1]}, "seeds": [1000]}, ["choose_seed", "1000"]),
        ({"choose": {"loss.margin": []}}, ["choose.loss.margin"]),
        ({"arms": {"no guide": {}}}, ["arms"]),
        ({"repeats": 3}, ["repeats"]),
    ],
)
def test_a_file_that_says_no_sweep_is_refused_with_its_field(fields, named):
    with pytest.raises(UserError) as refused:
        over(**fields)
    assert all(word in str(refused.value) for word in [*named, "over.yaml"]), refused.value


@pytest.mark.parametrize(
    ("fields", "sections", "named"),
    [
        ({"over": {"batch.size": [8]}}, {}, ["batch.size", "sweep study"]),
        ({"over": {"batch.global_size": [8, "many"]}}, {}, ["global_size", "many"]),
        ({"over": {"name.first": ["a"]}}, {}, ["name.first"]),
        ({"metric": "STS99"}, {}, ["metric", "STS99", "held_out"]),
        ({}, {"data": {}}, ["evaluate.tasks", "data.hold_out"]),
        ({}, {"evaluate": {"tasks": ["STS99"]}}, ["STS99"]),
        ({"stop_early": {"grace": 1}}, {}, ["stop_early", "evaluate.every_steps"]),
    ],
)
def test_a_setting_that_is_no_run_is_named_before_any_is_trained(tmp_path, models, fields, sections, named):
    with pytest.raises(UserError) as refused:
        check_sweep(base(tmp_path, models, **sections), over(**fields))
    assert all(word in str(refused.value) for word in named), refused.value


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    for text, word in (("- 1", "mapping"), ("a: [", "can't be read")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"bad\.yaml.*{word}"):
            load_sweep(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="missing"):
        load_sweep(tmp_path / "missing.yaml")
    (tmp_path / "my study.yaml").write_text("seeds: [1]")
    assert load_sweep(tmp_path / "my study.yaml").name == "my-study"


# What its page says


def run_with(folder: Path, points: dict[str, float]) -> Run:
    rows = [TaskRow(task, "STS", "cosine_spearman", None, value, None, None) for task, value in points.items()]
    return Run(folder, {}, {}, [], 0, {}, rows, {})


def runs_of(scores: dict[str, list[dict[str, float]]], values: dict[str, Any] | None = None) -> dict[Trial, Run]:
    """Arm -> the points of each seed."""
    runs = {}
    for arm, seeds in scores.items():
        for seed, points in enumerate(seeds):
            folder = Path(f"{arm}-{seed}")
            runs[Trial(arm, values or {}, seed, folder)] = run_with(folder, points)
    return runs


def test_contrasts_are_paired_by_seed():
    runs = runs_of({
        "guide": [{"A": 60.0, "B": 50.0}, {"A": 71.0, "B": 50.5}, {"A": 65.0, "B": 52.0}],
        "none": [{"A": 58.0, "B": 50.0}, {"A": 69.0, "B": 49.0}, {"A": 63.5, "B": 51.0}],
    })  # fmt: skip
    contents = sweep_of("study", runs, [("guide", "none")], "mean")
    (contrast,) = contents["contrasts"]
    assert contrast["differences"] == pytest.approx([1.0, 1.75, 1.25]) and contrast["number"] == 3
    assert contrast["mean"] == pytest.approx(4 / 3) and contrast["p_holm"] == contrast["p"] < 0.05
    assert contrast["tasks"]["A"]["mean"] == pytest.approx(5.5 / 3)
    assert "a clear difference" in contrast["sentence"]
    assert {setting["arm"]: round(setting["mean"], 2) for setting in contents["settings"]} == {
        "guide": 58.08,
        "none": 56.75,
    }


def test_a_seed_that_only_one_side_has_is_no_pair():
    runs = runs_of({"guide": [{"A": 60.0}, {"A": 61.0}], "none": [{"A": 58.0}]})
    (contrast,) = sweep_of("study", runs, [("guide", "none")], "A")["contrasts"]
    assert contrast["seeds"] == [0] and contrast["p"] is None and "one seed" in contrast["sentence"]


def test_a_mean_over_fewer_tasks_is_none():
    assert value_of({"A": 1.0}, ["A", "B"], "mean") is None
    assert value_of({"A": 1.0}, ["A", "B"], "A") == 1.0
    runs = runs_of({"guide": [{"A": 60.0}], "none": [{"A": 58.0, "B": 1.0}]})
    assert sweep_of("study", runs, [("guide", "none")], "mean")["contrasts"] == []


def test_a_page_of_a_sweep_that_was_stopped_has_settings_without_scores(tmp_path, monkeypatch):
    runs = runs_of({"none": [{"A": 58.0}], "guide": [{"A": 60.0}], "labels": [{}]})
    for trial in runs:
        (tmp_path / trial.folder).mkdir()
        (tmp_path / trial.folder / "config.yaml").touch()
    monkeypatch.setattr(report_sweep, "read_run", lambda folder: next(r for t, r in runs.items() if t.folder == folder))
    monkeypatch.chdir(tmp_path)
    written = write_sweep("study", list(runs), [("guide", "none")], "mean", tmp_path / "report.html")
    assert [setting["mean"] for setting in written.contents["settings"]] == [58.0, 60.0, None]
    assert "labels" in written.page.read_text() and "+2.00 points over 1 seed" in "".join(written.lines())


def test_all_contrasts_are_one_family():
    scores = {"guide": [{"A": 60.0}, {"A": 61.2}, {"A": 60.4}], "none": [{"A": 58.0}, {"A": 59.0}, {"A": 58.8}]}
    runs = runs_of(scores, {"batch.global_size": 8}) | runs_of(scores, {"batch.global_size": 16})
    contrasts = sweep_of("study", runs, [("guide", "none")], "mean")["contrasts"]
    assert [contrast["values"] for contrast in contrasts] == [{"batch.global_size": 8}, {"batch.global_size": 16}]
    assert all(contrast["p_holm"] == pytest.approx(2 * contrast["p"]) for contrast in contrasts)


# On Ray


@pytest.mark.ray
def test_a_sweep_ends_in_a_page_and_goes_on_where_it_was(ray_session, tmp_path, models, capsys):
    config = base(tmp_path, models)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    file = tmp_path / "study.yaml"
    command = ["sweep", str(tmp_path / "recipe.yaml"), "--over", str(file)]
    broken = {"broken": {"data.sources.0.path": str(tmp_path / "none.jsonl")}}

    file.write_text(yaml.safe_dump({"arms": {"none": ARMS["none"]} | broken, "seeds": [1]}))
    assert main(command) == 1
    assert "failed: base-study-broken-seed-1" in capsys.readouterr().out
    folder = Path(config.output_dir) / "sweep-study"
    contents = json.loads((folder / "report.json").read_text())
    assert {setting["arm"]: setting["number"] for setting in contents["settings"]} == {"none": 1}
    assert "none.jsonl" in contents["failures"]["base-study-broken-seed-1"]
    done = folder.parent / "base-study-none-seed-1" / "config.yaml"
    ended = done.stat().st_mtime_ns

    file.write_text(yaml.safe_dump({"arms": ARMS, "seeds": [1], "contrasts": [["guide", "none"]]}))
    assert main(command) == 0, "an arm that the file no longer has counts no more"
    contents = json.loads((folder / "report.json").read_text())
    assert [contrast["number"] for contrast in contents["contrasts"]] == [1] and contents["failures"] == {}
    assert done.stat().st_mtime_ns == ended, "what was done is not done again"
    assert "guide − none" in (folder / "report.html").read_text()
