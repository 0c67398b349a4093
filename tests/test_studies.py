"""The studies: their files are sweeps of the recipe, their results are of them, and runs without Ray are runs."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import recipe, save_tiny_model, words, write_jsonl

from gist_dist.on_ray.sweep_plan import load_sweep, plan_choices, plan_trials
from gist_dist.recipe import load_recipe
from gist_dist.report.run import read_run

STUDIES = Path(__file__).parents[1] / "studies"
FILES = sorted(STUDIES.glob("*/sweep.yaml"))


def test_every_study_is_a_sweep_of_the_recipe_and_its_results_are_of_it():
    base = load_recipe(str(STUDIES / "recipe.yaml"))
    assert FILES
    for file in FILES:
        over = load_sweep(file)
        planned = [*plan_choices(base, over), *plan_trials(base, over, {})]
        assert planned and over.contrasts, file
        results = file.with_name("results.json")
        if results.exists():
            settings = json.loads(results.read_text())["settings"]
            run = {(s["arm"], json.dumps(s["values"]), run["seed"]) for s in settings for run in s["runs"]}
            assert run and run <= {(one.arm, json.dumps(one.values), one.seed) for one in planned}, file


@pytest.mark.slow
def test_a_sweep_without_ray_gives_runs_with_scores_and_goes_on(tmp_path):
    rng = random.Random(0)
    student, guide = save_tiny_model(tmp_path / "student"), save_tiny_model(tmp_path / "guide", seed=3)
    rows = [{"anchor": words(rng, 3, 6), "positive": words(rng, 3, 8)} for _ in range(64)]
    tree = recipe(
        tmp_path, student, guide, write_jsonl(tmp_path / "rows.jsonl", rows), name="base",
        guide={"model": str(guide), "mode": "cache"}, batch={"global_size": 8}, optim={"steps": 2},
        evaluate={"tasks": ["Topics"], "local_tasks": str(tmp_path / "sets"), "baseline": False},
    )  # fmt: skip
    output = Path(tree["output_dir"])
    (tmp_path / "sets" / "Topics").mkdir(parents=True)
    for part in ("train", "test"):
        with (tmp_path / "sets" / "Topics" / f"{part}.csv").open("w") as file:
            csv.writer(file).writerows([["text", "label"], *([words(rng, 3, 5), f"c{n % 2}"] for n in range(40))])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "sweep.yaml").write_text("arms: {none: {guide: null}, guide: {}}\ncontrasts: [[guide, none]]")
    command = [sys.executable, str(STUDIES / "one_gpu.py"), str(tmp_path / "recipe.yaml"), "--over"]
    command += [str(tmp_path / "sweep.yaml"), "--processes", "1"]

    def told() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=STUDIES.parent).stdout

    assert "2 of 2" in told()
    run = read_run(output / "base-sweep-guide-seed-0")
    assert len(run.metrics) == 2 and run.tasks[0].after is not None and not run.has_model
    again = told()
    assert "to train" not in again and "sweep: 2 of 2 runs" in again
    assert (output / "sweep-sweep" / "report.html").exists()
