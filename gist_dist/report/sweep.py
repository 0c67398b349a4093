"""The page of `gist-dist sweep`: scores by setting, and the contrasts that its file names, tested over paired seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.text import duration, plain, plural, signed, text_table
from gist_dist.report.page import render
from gist_dist.report.plots import LINES, contrast_plot, overlay_plots
from gist_dist.report.run import Run, jsonable, read_run
from gist_dist.report.scores import summarize_scores
from gist_dist.report.statistics import bootstrap, holm, paired
from gist_dist.report.training import summarize_training

SHOWN_CURVES = len(LINES) - 1
"""Settings whose curves are drawn, as many as there are colours."""
CLEAR = 0.05


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of the sweep."""

    arm: str
    values: Mapping[str, Any]
    """Dotted key -> value, of what is swept."""
    seed: int
    folder: Path
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Likewise, of what was chosen for the setting on a seed of its own."""
    failure: str | None = None

    @property
    def setting(self) -> tuple[str, str]:
        return self.arm, json.dumps(dict(self.values), sort_keys=True)


@dataclass(frozen=True)
class Sweep:
    contents: dict[str, Any]
    page: Path

    @property
    def num_failed(self) -> int:
        return len(self.contents["failures"])

    def lines(self) -> list[str]:
        rows = [["setting", "runs", self.contents["metric"], "sd"]]
        for setting in self.contents["settings"]:
            rows.append([setting["label"], str(setting["number"]), _points(setting["mean"]), _points(setting["sd"])])
        lines = text_table([[plain(cell) for cell in row] for row in rows])
        lines += ["", *(plain(contrast["sentence"]) for contrast in self.contents["contrasts"])]
        lines += [f"failed: {name}: {why}" for name, why in self.contents["failures"].items()]
        return [*lines, plain(self.contents["headline"]), f"report   {self.page}"]


def write_sweep(
    name: str, trials: Sequence[Trial], contrasts: Sequence[tuple[str, str]], metric: str, page: Path
) -> Sweep:
    """UserError for a place that can't be written to. A run that is not done counts as far as it has scores."""
    runs = {trial: read_run(trial.folder) for trial in trials if (trial.folder / "config.yaml").is_file()}
    contents = jsonable(sweep_of(name, runs, contrasts, metric))
    contents["failures"] = {trial.folder.name: trial.failure for trial in trials if trial.failure}
    contents["missing"] = [trial.folder.name for trial in trials if trial not in runs and not trial.failure]
    first_runs = [runs[trial] for trial in _first_of_settings(runs)][:SHOWN_CURVES]
    sizes = {run.section("batch").get("global_size") for run in first_runs}
    plots = overlay_plots([run.metrics for run in first_runs], over_rows=len(sizes) > 1)
    plots += contrast_plot(contents["contrasts"])
    texts = {
        page: render("sweep.html.j2", plots, **contents, colors=list(LINES)[1:], shown_curves=SHOWN_CURVES),
        page.with_suffix(".json"): json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            write_text(file, text)
    except OSError as error:
        raise UserError(f"{page}: the page can't be written: {error}") from None
    return Sweep(contents, page)


def sweep_of(name: str, runs: Mapping[Trial, Run], contrasts: Sequence[tuple[str, str]], metric: str) -> dict[str, Any]:
    """In numbers: JSON values only."""
    scores = {trial: points_of(run) for trial, run in runs.items()}
    tasks = sorted({task for points in scores.values() for task in points})
    by_setting: dict[tuple[str, str], list[Trial]] = {}
    for trial in runs:
        by_setting.setdefault(trial.setting, []).append(trial)
    settings = [_setting(trials, runs, scores, tasks, metric) for trials in by_setting.values()]
    found = [
        contrast
        for pair in contrasts
        for values in dict.fromkeys(values for arm, values in by_setting if arm == pair[0])
        if (contrast := _contrast(pair, values, by_setting, scores, tasks, metric))
    ]
    adjusted = holm([contrast["p"] for contrast in found])
    for contrast, p in zip(found, adjusted, strict=True):
        contrast["p_holm"] = p
        contrast["sentence"] = _sentence(contrast)
    seconds = sum(setting["seconds"] for setting in settings)
    environments = [run.environment for run in runs.values()]
    return {
        "name": name,
        "headline": _headline(settings, found, len(runs), seconds),
        "metric": metric,
        "tasks": tasks,
        "settings": settings,
        "contrasts": found,
        "seconds": seconds,
        "versions": {key: _distinct(environments, key) for key in ("gist_dist", "git_commit", "torch", "platform")},
    }


def points_of(run: Run) -> dict[str, float]:
    """Task -> points of the run's model: MTEB's after training, and what was scored while it trained at its step."""
    points = {}
    scores = summarize_scores(run)
    if scores:
        step = scores["last"] if scores["best"] is None else scores["best"]
        row = next((row for row in scores["rows"] if row["step"] == step), None)
        points = {task: value for task, value in (row["scores"] if row else {}).items() if value is not None}
    return points | {row.task: row.after for row in run.tasks if row.after is not None}


def value_of(points: Mapping[str, float], tasks: Sequence[str], metric: str) -> float | None:
    """The mean over all tasks, or one of them; None where a score is missing."""
    wanted = tasks if metric == "mean" else [metric]
    return fmean(points[task] for task in wanted) if wanted and all(task in points for task in wanted) else None


def _setting(
    trials: list[Trial],
    runs: Mapping[Trial, Run],
    scores: Mapping[Trial, Mapping[str, float]],
    tasks: list[str],
    metric: str,
) -> dict[str, Any]:
    lines, first = list[dict[str, Any]](), trials[0]
    for trial in sorted(trials, key=lambda trial: trial.seed):
        training = summarize_training(runs[trial])
        lines.append({
            "seed": trial.seed, "run": trial.folder.name, "value": value_of(scores[trial], tasks, metric),
            "scores": scores[trial], "steps": training["steps"], "seconds": training["seconds"]["step"],
            "masked_weight": training["masked_weight"]["all"], "peak_memory_bytes": training["peak_memory_bytes"],
        })  # fmt: skip
    values = [line["value"] for line in lines if line["value"] is not None]
    means = {task: [line["scores"][task] for line in lines if task in line["scores"]] for task in tasks}
    return {
        "arm": first.arm, "values": dict(first.values), "chosen": dict(first.chosen),
        "label": label_of(first.arm, first.values),
        "number": len(values), "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "tasks": {task: fmean(points) if points else None for task, points in means.items()},
        "seconds": sum(line["seconds"] for line in lines),
        "masked_weight": _mean([line["masked_weight"] for line in lines]),
        "peak_memory_bytes": max((line["peak_memory_bytes"] or 0 for line in lines), default=0) or None,
        "runs": lines,
    }  # fmt: skip


def _contrast(
    pair: tuple[str, str],
    values: str,
    by_setting: Mapping[tuple[str, str], list[Trial]],
    scores: Mapping[Trial, Mapping[str, float]],
    tasks: list[str],
    metric: str,
) -> dict[str, Any] | None:
    """One arm less another, over the seeds that both have, at equal values; None where they share none."""
    sides = [{trial.seed: trial for trial in by_setting.get((arm, values), [])} for arm in pair]
    seeds, by_task = list[int](), dict[str, list[float]]()
    differences = list[float]()
    for seed in sorted(sides[0].keys() & sides[1].keys()):
        one, other = (value_of(scores[side[seed]], tasks, metric) for side in sides)
        if one is not None and other is not None:
            seeds.append(seed)
            differences.append(one - other)
    if not seeds:
        return None
    for task in tasks if metric == "mean" else [metric]:
        by_task[task] = [scores[sides[0][seed]][task] - scores[sides[1][seed]][task] for seed in seeds]
    where = json.loads(values)
    return {
        "arms": list(pair), "values": where, "label": f"{pair[0]} − {pair[1]}{_at(where)}", "seeds": seeds,
        "differences": differences, **asdict(paired(differences)), "bootstrap": bootstrap(by_task),
        "tasks": {task: asdict(paired(values)) for task, values in by_task.items()},
    }  # fmt: skip


def label_of(arm: str, values: Mapping[str, Any]) -> str:
    """guide, global_size 256."""
    return ", ".join(filter(None, [arm, *(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items())]))


def _at(values: Mapping[str, Any]) -> str:
    return f" at {label_of('', values)}" if values else ""


def _sentence(contrast: dict[str, Any]) -> str:
    text = f"{contrast['label']}: {signed(contrast['mean'])} points over {plural(contrast['number'], 'seed')}"
    if contrast["low"] is None:
        return f"{text}; one seed tells nothing of chance."
    text += f" (95 % interval {signed(contrast['low'])} to {signed(contrast['high'])}"
    p = contrast["p_holm"]
    if p is None:
        return f"{text}); all seeds differ by the same."
    return f"{text}, p = {p:.2g} after Holm): {'a clear difference' if p < CLEAR else 'no clear difference'}."


def _headline(settings: list[dict[str, Any]], contrasts: list[dict[str, Any]], number: int, seconds: float) -> str:
    scored = [setting for setting in settings if setting["mean"] is not None]
    told = f"{plural(number, 'run')}, {duration(seconds)} in steps"
    if not scored:
        return f"{told}; nothing was scored: set evaluate.tasks, or data.hold_out."
    best = max(scored, key=lambda setting: setting["mean"])
    text = f"{told}. Highest: {best['label']} with {best['mean']:.2f}"
    if contrasts:
        clear = sum(1 for contrast in contrasts if contrast["p_holm"] is not None and contrast["p_holm"] < CLEAR)
        told = (
            "no contrast is"
            if not clear
            else f"{clear} of {plural(len(contrasts), 'contrast')} " + ("is" if clear == 1 else "are")
        )
        text += f"; {told} clear"
    return f"{text}."


def _first_of_settings(runs: Mapping[Trial, Run]) -> list[Trial]:
    first: dict[tuple[str, str], Trial] = {}
    for trial in sorted(runs, key=lambda trial: trial.seed):
        first.setdefault(trial.setting, trial)
    return [first[setting] for setting in dict.fromkeys(trial.setting for trial in runs)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _distinct(environments: list[dict[str, Any]], key: str) -> list[str]:
    return sorted({str(environment.get(key)) for environment in environments})


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
