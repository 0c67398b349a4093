"""The page of `gist-dist cotrain`: both students over the rounds, beside as many steps with a fixed guide."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.text import plain, signed, text_table
from gist_dist.report.page import render
from gist_dist.report.run import Run, difference, jsonable, read_run
from gist_dist.report.training import summarize_training
from gist_dist.report.verdict import mean_of_points

Folder = tuple[str, str, int, Path]
"""Student, "cotrained" or "fixed", round, and the run's folder."""


@dataclass(frozen=True)
class Rounds:
    contents: dict[str, Any]
    page: Path

    def lines(self) -> list[str]:
        """A line a student and round."""
        rows = [["student", "round", "co-trained", "fixed guide", "difference"]]
        for student in self.contents["students"]:
            for line in student["rounds"]:
                points = [_text(line[kind] and line[kind]["mean"]) for kind in ("cotrained", "fixed")]
                gain = "" if line["difference"] is None else signed(line["difference"])
                rows.append([student["name"], str(line["round"]), *points, gain])
        table = text_table([[plain(cell) for cell in row] for row in rows])
        return [*table, plain(self.contents["headline"]), f"report   {self.page}"]


def write_rounds(folders: Sequence[Folder], page: Path) -> Rounds:
    """UserError for a place that can't be written to."""
    contents = jsonable(rounds_of([(s, kind, number, read_run(folder)) for s, kind, number, folder in folders]))
    texts = {
        page: render("rounds.html.j2", [], **contents),
        page.with_suffix(".json"): json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    try:
        for file, text in texts.items():
            write_text(file, text)
    except OSError as error:
        raise UserError(f"{page}: the page can't be written: {error}") from None
    return Rounds(contents, page)


def rounds_of(runs: Sequence[tuple[str, str, int, Run]]) -> dict[str, Any]:
    """In numbers: JSON values only."""
    students = []
    for name in dict.fromkeys(student for student, *_ in runs):
        of_student = {(kind, number): run for student, kind, number, run in runs if student == name}
        tasks = sorted({row.task for run in of_student.values() for row in run.tasks if row.after is not None})
        first = of_student["cotrained", 1]
        before = {row.task: row.before for row in first.tasks if row.before is not None}
        lines = []
        for number in sorted({number for _, number in of_student}):
            line: dict[str, Any] = {"round": number}
            for kind in ("cotrained", "fixed"):
                run = of_student.get((kind, number))
                line[kind] = None if run is None else _round(run, tasks)
            means = [line[kind] and line[kind]["mean"] for kind in ("fixed", "cotrained")]
            lines.append(line | {"difference": difference(*means)})
        students.append({
            "name": name, "model": first.section("student").get("model"), "tasks": tasks,
            "before": {"mean": _mean(before, tasks), "scores": before}, "rounds": lines,
        })  # fmt: skip
    return {"headline": _headline(students), "students": students}


def _round(run: Run, tasks: list[str]) -> dict[str, Any]:
    training = summarize_training(run)
    scores = {row.task: row.after for row in run.tasks if row.after is not None}
    return {
        "folder": run.folder.name,
        "guide": run.section("guide").get("model"),
        "mean": _mean(scores, tasks),
        "scores": scores,
        "steps": training["steps"],
        "loss": training["loss_last"],
        "masked_fraction": training["masked_fraction"]["all"],
    }


def _mean(scores: Mapping[str, float | None], tasks: list[str]) -> float | None:
    """Over all tasks, or none: a mean of some would not compare."""
    points = [scores.get(task) for task in tasks]
    return None if not points or None in points else mean_of_points(points)


def _headline(students: list[dict[str, Any]]) -> str:
    last = {student["name"]: student["rounds"][-1]["difference"] for student in students}
    told = [f"{name} {signed(change)}" for name, change in last.items() if change is not None]
    if not told:
        return "No task was evaluated of all runs; set evaluate.tasks to compare them."
    return f"Compared with a fixed guide, after the last round: {', '.join(told)} points in the mean."


def _text(points: float | None) -> str:
    return "-" if points is None else f"{points:.2f}"
