"""What a run shows: report.html, report.json and plots/, made from the files in its folder; and several runs beside
each other (compare.py).

Works on whatever is there: a run that still trains, one without guide, baseline or evaluation. Imports neither torch
nor ray nor mteb, so that `gist-dist report RUN` answers at once.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.text import duration, percent, plain, plural, text_table
from gist_dist.report.page import render_report
from gist_dist.report.plots import write_plots
from gist_dist.report.run import Run, TaskRow, jsonable, read_run
from gist_dist.report.scores import score_lines, summarize_scores
from gist_dist.report.suites import summarize_languages, summarize_suites
from gist_dist.report.training import summarize_training
from gist_dist.report.verdict import judge
from gist_dist.report.warnings import find_warnings

__all__ = ["Run", "Summary", "TaskRow", "build_report", "judge", "read_run", "summarize"]


MANY_STEPS = 100
"""From here on first and last loss are means of several steps; before, they say which batch was the harder one."""


@dataclass(frozen=True)
class Summary:
    """What the command line prints when a run ends."""

    name: str
    headline: str
    tasks: list[TaskRow]
    overall: dict[str, Any]
    details: list[str]
    warnings: list[str]
    num_failed: int
    """Evaluations that failed; the run is not complete, and the same command tries them again."""
    training: str | None
    """What the steps did, in a sentence; None before the first."""
    model: Path | None
    report: Path

    def lines(self) -> list[str]:
        """Plain ASCII text, at most a line a task plus the verdict and where things are."""
        lines = self._table() if self.tasks else []
        lines += [plain(self.headline), *(plain(text) for text in self.details)]
        lines += [plain(self.training)] if self.training else []
        lines += [f"warning: {plain(text)}" for text in self.warnings]
        return [*lines, *(f"{name:9}{path}" for name, path in self._places().items())]

    def _places(self) -> dict[str, Path]:
        folder = self.report.parent
        places = {"model": self.model, "report": self.report, "metrics": folder / "metrics.jsonl"}
        places |= {"scores": folder / "mteb"} if self.tasks else {}
        return {name: path for name, path in places.items() if path is not None and path.exists()}

    def _table(self) -> list[str]:
        columns = ["before", "after", "change"] + ["guide"] * any(row.guide is not None for row in self.tasks)
        rows = [["task", "type", *columns]]
        rows += [[row.task, row.type, *_cells(asdict(row), columns)] for row in self.tasks]
        rows += [[f"mean of {self.overall['num_tasks']}", "", *_cells(self.overall, columns)]]
        return text_table(rows, num_text_columns=2)


def build_report(run_dir: Path) -> Summary:
    """Write run_dir/report.html, report.json and plots/*.png from what the run left so far.

    Raises UserError when run_dir is no run, when one of its files is damaged or when it can't be written to.
    """
    run = read_run(run_dir)
    contents = summarize(run)
    try:
        moved = [(r.task, r.before, r.after) for r in run.tasks if r.before is not None and r.after is not None]
        limit = run.section("optim").get("max_grad_norm")
        scored = score_lines(contents["evaluations"])
        plots = write_plots(run.folder / "plots", run.metrics, contents["training"]["seconds"], moved, limit, scored)
        page = render_report(run, contents, plots)
        numbers = json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(run.folder / "report.json", numbers)
        write_text(run.folder / "report.html", page)
    except OSError as error:
        raise UserError(f"{run.folder}: the report can't be written: {error}") from None
    return Summary(
        name=run.name,
        headline=contents["verdict"]["headline"],
        tasks=run.tasks,
        overall=contents["verdict"]["overall"],
        details=[detail["text"] for detail in contents["verdict"]["details"]],
        warnings=[warning["text"] for warning in contents["warnings"]],
        num_failed=sum(len(tasks) for tasks in run.failures.values()),
        training=_training_sentence(contents["training"]),
        model=run.folder / "model" if run.has_model else None,
        report=run.folder / "report.html",
    )


def summarize(run: Run) -> dict[str, Any]:
    """The report in numbers: what report.json holds and report.html shows. JSON values only, no NaN."""
    verdict = judge(run.tasks, tuple(run.section("evaluate").get("tasks") or ()), run.failures)
    suites = summarize_suites(run)
    verdict["details"][:0] = [{"about": "benchmark", "text": suite["sentence"]} for suite in suites]
    training, scores = summarize_training(run), summarize_scores(run)
    if scores and not run.tasks:
        verdict["headline"] = scores["sentence"]
    elif scores:
        verdict["details"].append({"about": "scores", "text": scores["sentence"]})
    return {
        "name": run.name,
        "verdict": verdict,
        "tasks": [asdict(row) for row in run.tasks],
        "benchmarks": suites,
        "languages": summarize_languages(run),
        "training": training,
        "evaluations": scores,
        "data": jsonable(run.data),
        "warnings": find_warnings(run, training, verdict),
        "failures": run.failures,
        "config": jsonable(run.config),
        "environment": jsonable(run.environment),
    }


def _training_sentence(training: dict[str, Any]) -> str | None:
    """The wall time is that of the steps: neither start-up nor evaluation."""
    if not training["steps"] or not training["pairs_per_second"]:
        return None
    first, last, masked = training["loss_first"], training["loss_last"], training["masked_fraction"]["all"]
    is_long = training["steps"] >= MANY_STEPS and first is not None and last is not None
    loss = f", loss {first:.3f} → {last:.3f}" if is_long else ""
    weight = training["masked_weight"]["all"]
    guided = f"; the guide took out {percent(masked)} of the candidates" if masked else ""
    if guided and weight is not None:
        guided += f", {percent(weight)} of the negatives' weight"
    took = f"in {duration(training['seconds']['step'])} at {training['pairs_per_second']:,.0f} pairs/s"
    return f"{plural(training['steps'], 'step')} {took}{loss}{guided}."


def _cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    formats = {"change": "+.2f"}
    return ["-" if row[column] is None else format(row[column], formats.get(column, ".2f")) for column in columns]
