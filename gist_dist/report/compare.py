"""Several runs beside each other: scores, curves, numbers of training, and the settings in which they differ.

The first run is what the others are compared with. Means are over the tasks that every run has a score for.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.text import plain, plural, signed, text_table
from gist_dist.report.page import render
from gist_dist.report.plots import BLOCKS, LINES, overlay_plots
from gist_dist.report.run import Run, difference, jsonable, read_run
from gist_dist.report.training import summarize_training
from gist_dist.report.verdict import judge, mean_of_points
from gist_dist.report.warnings import find_warnings

MAX_RUNS = len(LINES) - 1  # as many as there are colours
MAX_SETTINGS = 20  # that the terminal shows
NOT_SETTINGS = ("name", "output_dir", "environment.started", "environment.finished")
CHANGES_THE_LOSS = ("batch.global_size", "loss.", "guide.", "guide", "data.")
"""Settings (prefixes) with which the loss is another quantity, so that its curves can't be compared."""


@dataclass(frozen=True)
class Comparison:
    """What the command line prints of several runs."""

    contents: dict[str, Any]
    page: Path

    def lines(self) -> list[str]:
        """Plain ASCII text: a line a task, a line a differing setting."""
        labels = [run["label"] for run in self.contents["runs"]]
        lines = []
        if self.contents["tasks"]:
            rows = [["task", *labels]]
            rows += [[task["task"], *_beside(task)] for task in self.contents["tasks"]]
            if mean := self.contents["mean"]:
                rows += [[f"mean of {mean['num_tasks']}", *_beside(mean)]]
            lines += text_table([[plain(cell) for cell in row] for row in rows])
        lines += [plain(self.contents["headline"])]
        if settings := self.contents["settings"]:
            rows = [["differs", *labels]]
            rows += [[s["key"], *(_short(value) for value in s["values"])] for s in settings[:MAX_SETTINGS]]
            lines += ["", *text_table([[plain(cell) for cell in row] for row in rows])]
            lines += [f"and {len(settings) - MAX_SETTINGS} more, on the page"] * (len(settings) > MAX_SETTINGS)
        return [*lines, f"report   {self.page}"]


def compare_runs(run_dirs: Sequence[Path], out: Path | None = None) -> Comparison:
    """Write one page (and the same in numbers, as .json beside it) on several runs.

    out: the page; by default compare-A-B-C.html in the folder that holds the first run. UserError for a folder that is
    no run, for the same run twice, for more than 8 runs and for a place that can't be written to.
    """
    folders = [Path(run_dir).absolute() for run_dir in run_dirs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; give every run to compare once")
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs to compare: at most {MAX_RUNS} fit one page; leave some out")
    runs = [read_run(folder) for folder in folders]
    labels = _labels(runs)
    page = out.absolute() if out else folders[0].parent / f"compare-{_file_name(labels)}.html"
    contents = compare(runs, labels)
    over_rows = len({run.section("batch").get("global_size") for run in runs}) > 1
    plots = overlay_plots([run.metrics for run in runs], over_rows)
    html = render(
        "compare.html.j2",
        plots,
        **contents,
        colors=list(LINES)[1:],
        with_untrained=any(task["before"] is not None for task in contents["tasks"]),
        in_words=in_words,
    )
    numbers = json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_text(page.with_suffix(".json"), numbers)
        write_text(page, html)
    except OSError as error:
        raise UserError(f"{page}: the comparison can't be written: {error}; give another place with --out") from None
    return Comparison(contents, page)


def compare(runs: list[Run], labels: list[str]) -> dict[str, Any]:
    """The comparison in numbers: JSON values only. Values and differences are in the order of the runs."""
    trainings = [summarize_training(run) for run in runs]
    tasks = _tasks(runs)
    mean = _mean([task for task in tasks if None not in task["after"]])
    settings = list(_differing_settings(runs))
    return {
        "headline": _headline(labels, tasks, mean),
        "runs": [_describe(*each) for each in zip(runs, labels, trainings, strict=True)],
        "tasks": tasks,
        "by_type": list(_by_type(tasks)),
        "mean": mean,
        "numbers": list(_numbers(trainings)),
        "settings": settings,
        "same_loss": not any(setting["key"].startswith(CHANGES_THE_LOSS) for setting in settings),
    }


# ---- scores --------------------------------------------------------------------------------------


def _tasks(runs: list[Run]) -> list[dict[str, Any]]:
    """Every task that some trained run has a score for; "before" where all runs started from the same score."""
    by_name = [{row.task: row for row in run.tasks} for run in runs]
    rows = {row.task: row for run in runs for row in run.tasks if row.after is not None}
    tasks = []
    for task, some in sorted(rows.items(), key=lambda item: (item[1].type, item[0])):
        found = [by[task] if task in by else None for by in by_name]
        before = {row.before for row in found if row is not None and row.before is not None}
        start = before.pop() if len(before) == 1 else None
        after = [row.after if row else None for row in found]
        tasks.append({
            "task": task, "type": some.type, "metric": some.metric, "before": start,
            "after": after, "change": [difference(after[0], points) for points in after],
        })  # fmt: skip
    return tasks


def _mean(tasks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Over tasks with a score of every run; None without any."""
    if not tasks:
        return None
    after = [mean_of_points([task["after"][i] for task in tasks]) for i in range(len(tasks[0]["after"]))]
    change = [difference(after[0], points) for points in after]
    columns = list(zip(*(task["change"] for task in tasks), strict=True))
    up, down = (
        [sum(by > 0 for by in column) for column in columns],
        [sum(by < 0 for by in column) for column in columns],
    )
    before = mean_of_points([task["before"] for task in tasks])
    return {"num_tasks": len(tasks), "before": before, "after": after, "change": change, "up": up, "down": down}


def _by_type(tasks: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for kind in dict.fromkeys(task["type"] for task in tasks):
        mean = _mean([task for task in tasks if task["type"] == kind and None not in task["after"]])
        if mean:
            yield {"type": kind} | mean


def _headline(labels: list[str], tasks: list[dict[str, Any]], mean: dict[str, Any] | None) -> str:
    if not mean:
        return "No task has a score of every run." if tasks else "None of these runs was evaluated."
    best = max(range(len(labels)), key=lambda i: mean["after"][i])
    over = f"over {plural(mean['num_tasks'], 'task')} that all runs share"
    if len(set(mean["after"])) == 1:
        return f"All runs have the same mean {over}: {mean['after'][0]:.2f}."
    return f"{labels[best]} has the best mean {over}: {mean['after'][best]:.2f}."


# ---- runs and their training ---------------------------------------------------------------------


def _describe(run: Run, label: str, training: dict[str, Any]) -> dict[str, Any]:
    verdict = judge(run.tasks, tuple(run.section("evaluate").get("tasks") or ()), run.failures)
    return {
        "label": label,
        "folder": str(run.folder),
        "student": run.section("student").get("model"),
        "guide": (run.section("guide").get("model") or "itself") if run.section("guide") else None,
        "global_size": run.section("batch").get("global_size"),
        "steps": training["steps"],
        "planned_steps": training["planned_steps"],
        "headline": verdict["headline"],
        "warnings": find_warnings(run, training, verdict),
    }


NUMBERS = {
    "rows": ("Rows seen", "count"),
    "loss_last": ("Loss, last steps", "number"),
    "grad_norm_median": ("Gradient norm, median", "number"),
    "clipped_fraction": ("Steps with clipped gradient", "percent"),
    "masked_fraction.all": ("Masked, all candidates", "percent"),
    **{f"masked_fraction.{block}": (f"Masked, {words}", "percent") for block, words in BLOCKS.items()},
    "masked_weight.all": ("Masked weight", "percent"),
    "known_weight": ("Known positives' weight", "percent"),
    "rows_without_negatives_fraction": ("Rows without a negative", "percent"),
    "positive_similarity": ("Cosine of positives, last steps", "cosine"),
    "padding_fraction": ("Padding", "percent"),
    "pairs_per_second": ("Pairs per second, median", "number"),
    "tokens_per_second": ("Tokens per second, median", "count"),
    "peak_memory_bytes": ("Peak memory of a worker", "gigabytes"),
    "seconds.step": ("Time in steps", "duration"),
}
"""Keys of summarize_training -> words and form."""


def _numbers(trainings: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for key, (title, form) in NUMBERS.items():
        values = [_at(training, key) for training in trainings]
        values = [value[-1] if isinstance(value, list) else value for value in values]
        if any(value is not None for value in values):
            yield {"key": key, "title": title, "form": form, "values": values}


def _at(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


# ---- settings ------------------------------------------------------------------------------------


def _differing_settings(runs: list[Run]) -> Iterable[dict[str, Any]]:
    """Dotted keys of recipe and environment that are not the same in all runs; None where a run lacks the key.

    Of what some runs do without, a guide or a source, only the model or path is told, unless those that have it differ.
    """
    flat = [dict(_flat(jsonable(run.config | {"environment": run.environment}))) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    for key in keys:
        values, parent = [settings.get(key) for settings in flat], key.rpartition(".")[0]
        compared = values
        if parent and not key.endswith((".model", ".path")):
            compared = [s.get(key) for s in flat if any(other.startswith(f"{parent}.") for other in s)]
        differs = any(value != compared[0] for value in compared)
        if differs and key not in sections and key not in NOT_SETTINGS:
            yield {"key": key, "values": values}
    content = [run.data.get("content") for run in runs]
    if len(set(content)) > 1:
        yield {"key": "data.content (hash of the prepared rows)", "values": [c and c[:12] for c in content]}


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves by dotted key; items of a list by name or number."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        names = [str(item.get("name") or item.get("path") or number) for number, item in enumerate(tree)]
        for number, (name, item) in enumerate(zip(names, tree, strict=True)):
            yield from _flat(item, f"{prefix}[{name if names.count(name) == 1 else number}]")
    else:
        yield prefix, tree


# ---- names ---------------------------------------------------------------------------------------


def _labels(runs: list[Run]) -> list[str]:
    """Names of the runs; where two have the same, as much of their folder as tells them apart."""
    labels, depth = [run.name for run in runs], 1
    while len(set(labels)) < len(runs):
        labels = ["/".join(run.folder.parts[-depth:]) for run in runs]
        depth += 1
    return labels


def _file_name(labels: list[str]) -> str:
    return re.sub(r"[^\w.-]+", "-", "-".join(labels)).strip("-.")[:120] or "runs"


def _beside(task: dict[str, Any]) -> list[str]:
    """The first run's points, then the others' with their difference."""
    cells = ["-" if points is None else f"{points:.2f}" for points in task["after"]]
    changes = [None, *task["change"][1:]]
    return [f"{cell} ({signed(by)})" if by is not None else cell for cell, by in zip(cells, changes, strict=True)]


def in_words(value: Any) -> str:
    """A setting as it is shown."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _short(value: Any, limit: int = 40) -> str:
    text = " ".join(in_words(value).split())
    return text if len(text) <= limit else f"…{text[1 - limit :]}"
