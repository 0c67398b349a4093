"""The verdict on a run: means by type and overall, and every task that lost, by name.

Scores are points: main score × 100, rounded to two decimals as on MTEB's leaderboard; every mean and change is of
those rounded numbers, so that a reader who adds up the page finds what it says.
"""

from collections.abc import Iterable
from dataclasses import asdict
from statistics import fmean
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.text import plural, signed
from gist_dist.evaluation.names import parse_task
from gist_dist.report.run import TaskRow, difference

SIDES = ("before", "after", "guide")


def judge(
    rows: list[TaskRow], wanted: tuple[str, ...] = (), failures: dict[str, dict[str, str]] | None = None
) -> dict[str, Any]:
    """Means by type and overall over the tasks scored on both sides, and every loss by name.

    wanted: the recipe's tasks, to say which are still missing; failures: those known to have failed.
    """
    compared = [row for row in rows if row.change is not None]
    after = [row for row in rows if row.after is not None]
    counted = compared or after or [row for row in rows if row.before is not None]
    overall = _mean_row(counted)
    by_type = [
        {"type": kind, **_mean_row([row for row in counted if row.type == kind])}
        for kind in dict.fromkeys(row.type for row in counted)
    ]
    losses = sorted((row for row in compared if (row.change or 0) < 0), key=lambda row: row.change or 0)
    settled = {row.task for row in after} | {_name(task) for task in (failures or {}).get("trained", {})}
    verdict = {
        "headline": _headline(rows, counted, overall, wanted),
        "overall": overall,
        "mean_of_types": _mean_of_types(by_type),
        "by_type": by_type,
        "losses": [asdict(row) for row in losses],
        "retrieval_losses": [asdict(row) for row in losses if _is_retrieval(row)],
        "not_compared": [row.task for row in rows if row not in counted],
        "not_evaluated": [task for task in wanted if _name(task) not in settled],
    }
    details = _details(verdict, bool(compared))
    return verdict | {"details": [{"about": about, "text": text} for about, text in details]}


def _name(task: str) -> str:
    """Without the part of it that was scored."""
    try:
        return parse_task(task).name
    except UserError:  # of an older recipe
        return task


def _mean_row(rows: list[TaskRow]) -> dict[str, Any]:
    before, after, guide = (
        mean_of_points([getattr(row, side) for row in rows]) for side in ("before", "after", "guide")
    )
    changes = [row.change for row in rows if row.change is not None]
    return {
        "num_tasks": len(rows),
        "before": before,
        "after": after,
        "change": difference(before, after),
        "guide": guide,
        "up": sum(change > 0 for change in changes),
        "down": sum(change < 0 for change in changes),
    }


def _mean_of_types(by_type: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Every type counts the same, however many tasks it has (MTEB's Mean (TaskType))."""
    if len(by_type) < 2:
        return None
    before, after, guide = (mean_of_points([kind[side] for kind in by_type]) for side in SIDES)
    return {"before": before, "after": after, "change": difference(before, after), "guide": guide}


def mean_of_points(values: list[float | None]) -> float | None:
    """None unless every value is there: over fewer tasks than its neighbour it would compare nothing."""
    known = [value for value in values if value is not None]
    return round(fmean(known), 2) if known and len(known) == len(values) else None


def _is_retrieval(row: TaskRow) -> bool:
    return "retrieval" in row.type.lower()


def _headline(rows: list[TaskRow], counted: list[TaskRow], overall: dict[str, Any], wanted: tuple[str, ...]) -> str:
    if not counted:
        return (
            f"None of {plural(len(wanted), 'MTEB task')} has a score yet." if wanted else "No MTEB task was evaluated."
        )
    before, after, change = overall["before"], overall["after"], overall["change"]
    tasks = plural(len(counted), "task")
    if change is None:
        if after is None:
            return f"The mean over {tasks} is {before:.2f} before training; the trained model has no scores yet."
        unknown = "the untrained student was not evaluated, so the change is unknown"
        return f"The mean over {tasks} is {after:.2f}; {unknown}."
    if change == 0:
        return f"The mean over {tasks} stayed at {after:.2f}."
    verb = "rose" if change > 0 else "fell"
    return f"The mean over {tasks} {verb} from {before:.2f} to {after:.2f} ({signed(change)})."


def _details(verdict: dict[str, Any], compared: bool) -> Iterable[tuple[str, str]]:
    """Sentences behind the headline, losses of retrieval first: a mean must not hide them."""
    overall = verdict["overall"]
    if compared:
        same = overall["num_tasks"] - overall["up"] - overall["down"]
        unchanged = f", {same} unchanged" if same else ""
        yield "counts", f"{plural(overall['up'], 'task')} went up, {overall['down']} down{unchanged}."
    if verdict["retrieval_losses"]:
        yield "loss", f"Retrieval lost: {_name_losses(verdict['retrieval_losses'])}."
    others = [row for row in verdict["losses"] if row not in verdict["retrieval_losses"]]
    if others:
        yield "loss", f"{'Also lost' if verdict['retrieval_losses'] else 'Lost'}: {_name_losses(others)}."
    for kind in verdict["by_type"]:
        if (kind["change"] or 0) < 0 <= (overall["change"] or 0):
            fell = -kind["change"]
            yield (
                "loss",
                f"The mean of {kind['type']} fell by {fell:.2f} although the mean over all tasks did not.",
            )
    if overall["guide"] is not None:
        yield "guide", f"The guide itself scores {overall['guide']:.2f} on these tasks."
    if verdict["not_compared"]:
        yield (
            "coverage",
            f"Scored on one side only and left out of the means: {', '.join(verdict['not_compared'])}.",
        )
    if verdict["not_evaluated"]:
        yield "coverage", f"In the recipe but not evaluated yet: {', '.join(verdict['not_evaluated'])}."


def _name_losses(losses: list[dict[str, Any]], limit: int = 8) -> str:
    named = ", ".join(
        f"{row['task']} {row['before']:.2f} → {row['after']:.2f} ({signed(row['change'])})" for row in losses[:limit]
    )
    return named if len(losses) <= limit else f"{named} and {len(losses) - limit} more, below"
