"""Benchmarks of a run as the leaderboard takes them, and its scores by language.

Unlike the verdict's, means are of scores as they are, and rounded last: a benchmark's mean is the one that MTEB shows.
"""

import math
from statistics import fmean
from typing import Any

from gist_dist.evaluation.evaluate import Score
from gist_dist.evaluation.names import parse_task
from gist_dist.report.run import Run, difference
from gist_dist.report.verdict import SIDES

LABELS = dict(zip(("baseline", "trained", "guide"), SIDES, strict=True))


def summarize_suites(run: Run) -> list[dict[str, Any]]:
    """Of every benchmark of the run its means: over tasks, over types, and of each type. A mean is None for a model
    that lacks one of its tasks, as on the leaderboard."""
    return [_summary(suite, run.scores) for suite in run.suites]


def _summary(suite: dict[str, Any], scores: dict[str, dict[str, Score]]) -> dict[str, Any]:
    names = [parse_task(task).name for task in suite["tasks"]]
    found = {label: [results[name] for name in names if name in results] for label, results in scores.items()}
    means = {label: _means(results) if len(results) == len(names) else {} for label, results in found.items()}
    titles = dict.fromkeys(title for of_label in means.values() for title in of_label)
    rows = [{"mean": title, **_beside({label: of.get(title) for label, of in means.items()})} for title in titles]
    scored = len(found.get("trained") or found.get("baseline") or [])
    return {
        "name": suite["name"],
        "num_tasks": len(names),
        "num_scored": scored,
        "rows": rows,
        "left_out": suite.get("left_out") or [],
        "private": suite.get("private") or [],
        "sentence": _sentence(suite, len(names), scored, rows),
    }


def _means(results: list[Score]) -> dict[str, float]:
    """Mean (Task), Mean (TaskType) and that of every type."""
    by_type: dict[str, list[float]] = {}
    for score in results:
        by_type.setdefault(score.kind, []).append(score.main_score)
    types = {kind: fmean(by_type[kind]) for kind in sorted(by_type)}
    return {
        "Mean (Task)": fmean(score.main_score for score in results),
        "Mean (TaskType)": fmean(types.values()),
        **types,
    }


def _sentence(suite: dict[str, Any], num_tasks: int, scored: int, rows: list[dict[str, Any]]) -> str:
    name = suite["name"]
    if not rows:
        return f"{name} has no mean: {scored} of its {num_tasks} tasks have a score."
    before, after = rows[0]["before"], rows[0]["after"]
    if after is None:
        return f"{name}: the mean over {num_tasks} tasks is {before:.2f} before training."
    part = " (a part of it)" if suite.get("left_out") else ""
    change = f", from {before:.2f} ({rows[0]['change']:+.2f})" if before is not None else ""
    return f"{name}{part}: the mean over {num_tasks} tasks is {after:.2f}{change}."


def summarize_languages(run: Run) -> list[dict[str, Any]]:
    """Means over the tasks that have a language on every side; [] where all is in one language."""
    known = [
        {score.task: score.languages for score in results.values() if score.languages}
        for results in run.scores.values()
        if results
    ]
    languages = sorted({language for tasks in known for found in tasks.values() for language in found} - {"und"})
    return [_in_language(run, language) for language in languages] if len(languages) > 1 else []


def _in_language(run: Run, language: str) -> dict[str, Any]:
    found = {
        label: {task: score.languages[language] for task, score in results.items() if language in score.languages}
        for label, results in run.scores.items()
    }
    present = [set(tasks) for tasks in found.values() if tasks]
    shared = set.intersection(*present)
    means = {label: fmean(tasks[t] for t in shared) if tasks and shared else None for label, tasks in found.items()}
    return {"language": language, "num_tasks": len(shared), **_beside(means)}


def _beside(values: dict[str, float | None]) -> dict[str, float | None]:
    """In points."""
    points = {side: _points(values.get(label)) for label, side in LABELS.items()}
    return points | {"change": difference(points["before"], points["after"])}


def _points(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else round(100 * score, 2)
