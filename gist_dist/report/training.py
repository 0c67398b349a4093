"""The steps of a run in numbers."""

import math
from statistics import fmean, median
from typing import Any

from gist_dist.report.plots import BLOCKS, is_finite
from gist_dist.report.run import Run


def summarize_training(run: Run) -> dict[str, Any]:
    """Totals and averages of the steps so far; fractions in 0..1, seconds, bytes; None if nothing is known.

    Masked fractions and weights, and padding, are means over steps; first and last are over a twentieth of the steps.
    """
    metrics = run.metrics
    loss_first, loss_last = _first_last(metrics, "loss") or (None, None)
    grad_norms = _values(metrics, "grad_norm")
    limit = run.section("optim").get("max_grad_norm")
    rows = math.fsum(_values(metrics, "rows"))
    lonely = math.fsum(_values(metrics, "rows_without_negatives"))
    masked = {"all": _average(metrics, "masked_fraction")}
    masked |= {block: _average(metrics, f"masked_fraction_{block}") for block in BLOCKS}
    weight = {"all": _average(metrics, "masked_weight")}
    weight |= {block: _average(metrics, f"masked_weight_{block}") for block in BLOCKS}
    return {
        "steps": metrics[-1]["step"] if metrics else 0,
        "planned_steps": run.data.get("steps"),
        "epochs": metrics[-1].get("epoch") if metrics else None,
        "rows": int(rows),
        "loss_first": loss_first,
        "loss_last": loss_last,
        "non_finite_steps": [row["step"] for row in metrics if _is_non_finite(row)],
        "grad_norm_median": median(grad_norms) if grad_norms else None,
        "clipped_fraction": fmean(norm > limit for norm in grad_norms) if grad_norms and limit else None,
        "learning_rate_peak": max(_values(metrics, "learning_rate"), default=None),
        "masked_fraction": masked,
        "masked_weight": weight,
        "identical_weight": _average(metrics, "identical_weight"),
        "known_weight": _average(metrics, "known_weight"),
        "known_dropped": int(sum(_values(metrics, "known_dropped"))),
        "promoted": int(sum(_values(metrics, "promoted"))),
        "identical_dropped": int(sum(_values(metrics, "identical_dropped"))),
        "rows_without_negatives": int(lonely),
        "rows_without_negatives_fraction": lonely / rows if rows else None,
        "positive_similarity": _first_last(metrics, "positive_similarity"),
        "guide_positive_similarity": _first_last(metrics, "guide_positive_similarity"),
        "pairs_per_second": _median(metrics, "pairs_per_second"),
        "tokens_per_second": _median(metrics, "tokens_per_second"),
        "padding_fraction": _average(metrics, "padding_fraction"),
        "peak_memory_bytes": int(max(_values(metrics, "peak_memory_bytes"), default=0)) or None,
        "world_sizes": list(dict.fromkeys(int(size) for size in _values(metrics, "world_size"))),
        "workers": _worker_changes(metrics),
        "seconds": _phase_seconds(metrics),
        "repeated_texts": int(sum(repeated)) if (repeated := _values(metrics, "repeated_texts")) else None,
        "source_rows": _source_rows(metrics),
    }


def _is_non_finite(row: dict[str, Any]) -> bool:
    """A step whose loss or gradient overflowed, skipped or not; what JSON can't hold is written as null."""
    return bool(row.get("skipped")) or any(key in row and not is_finite(row[key]) for key in ("loss", "grad_norm"))


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if is_finite(row.get(key))]


def _average(rows: list[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return fmean(values) if values else None


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return median(values) if values else None


def _first_last(rows: list[dict[str, Any]], key: str) -> list[float] | None:
    """Means over the first and the last twentieth of the steps."""
    values = _values(rows, key)
    edge = max(1, len(values) // 20)
    return [fmean(values[:edge]), fmean(values[-edge:])] if values else None


def _worker_changes(metrics: list[dict[str, Any]]) -> list[dict[str, int]]:
    """[{from_step, world_size}]: one, and one more for every change."""
    changes: list[dict[str, int]] = []
    for row in metrics:
        if is_finite(size := row.get("world_size")) and (not changes or changes[-1]["world_size"] != size):
            changes.append({"from_step": row["step"], "world_size": int(size)})
    return changes


def _phase_seconds(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over the steps by phase; "step" is the whole, "other" what no phase accounts for."""
    steps = [row["seconds"] for row in metrics]
    phases = dict.fromkeys(phase for row in steps for phase in row if phase != "step")
    seconds = {phase: math.fsum(_values(steps, phase)) for phase in phases}
    whole = math.fsum(_values(steps, "step"))
    return seconds | {"other": max(0.0, whole - math.fsum(seconds.values())), "step": whole}


def _source_rows(metrics: list[dict[str, Any]]) -> dict[str, int]:
    """Rows trained on by source; a row that came twice counts twice."""
    totals: dict[str, int] = {}
    for row in metrics:
        for name in row["sources"]:
            totals[name] = totals.get(name, 0) + int(math.fsum(_values([row["sources"]], name)))
    return totals
