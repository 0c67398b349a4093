"""Scores while a run trained: a row for every step that was scored, and what came of them."""

from typing import Any

from gist_dist.report.run import Run
from gist_dist.runs.evaluations import LOSS, judge

MANY_TASKS = 7
"""More are not drawn one by one, but as their mean."""


def summarize_scores(run: Run) -> dict[str, Any] | None:
    """Points by step, the mean over tasks among them; the step whose model is the run's, and the last one. None where
    nothing was scored."""
    if not run.evaluations:
        return None
    evaluate = run.section("evaluate")
    keep_best, stop_after = evaluate.get("keep_best"), evaluate.get("stop_after")
    verdict = judge(run.evaluations, keep_best, stop_after, evaluate.get("least_gain") or 0.0)
    tasks = list(dict.fromkeys(task for evaluation in run.evaluations for task in evaluation.scores))
    rows = []
    for evaluation in run.evaluations:
        values = {task: _rounded(evaluation.value(task)) for task in tasks}
        mean = _rounded(evaluation.value("mean")) if len(tasks) > 1 else None
        failed = sorted(evaluation.failed)
        rows.append(
            {"step": evaluation.step, "mean": mean, "scores": values, "loss": evaluation.loss, "failed": failed}
        )
    return {
        "tasks": tasks,
        "rows": rows,
        "by": keep_best,
        "best": verdict.best,
        "last": rows[-1]["step"] if verdict.stop is None else verdict.stop,
        "stopped_early": verdict.stop is not None,
        "stop_after": stop_after,
        "sentence": _sentence(run, tasks, verdict.best, verdict.stop),
    }


def score_lines(scores: dict[str, Any] | None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For a plot: a dict a step, and its keys with their labels."""
    if scores is None:
        return [], {}
    tasks = scores["tasks"]
    shown = tasks if len(tasks) <= MANY_TASKS else []
    keys = ({"mean": "mean"} if len(tasks) > 1 else {}) | {f"task {task}": task for task in shown}
    rows = [
        {"step": row["step"], "mean": row["mean"], LOSS: row["loss"]}
        | {f"task {task}": row["scores"][task] for task in shown}
        for row in scores["rows"]
    ]
    return rows, keys


def _sentence(run: Run, tasks: list[str], best: int | None, stop: int | None) -> str:
    first, last = run.evaluations[0], run.evaluations[-1]
    if best is not None:
        last = next(evaluation for evaluation in run.evaluations if evaluation.step == best)
    of = "mean" if len(tasks) > 1 else (tasks or [LOSS])[0]
    what = {"mean": f"the mean of {len(tasks)} tasks", LOSS: "the held-out loss"}.get(of, of)
    before, after = (_shown(evaluation.value(of), of) for evaluation in (first, last))
    text = f"While it trained, {what} went from {before} to {after} after step {last.step}"
    text += ", whose model is the run's" if best is not None else ""
    return f"{text}; training ended early, after step {stop}." if stop is not None else f"{text}."


def _shown(value: float | None, of: str) -> str:
    if value is None:
        return "an unknown value"
    return f"{-value:.4f}" if of == LOSS else f"{value:.2f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
