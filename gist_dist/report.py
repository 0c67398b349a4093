"""What a run shows: report.html, report.json and plots/, made from the files in its folder.

Works on whatever is there: a run that still trains, one without guide, baseline or evaluation. Imports
neither torch nor ray nor mteb, so that `gist-dist report RUN` answers at once. Scores are points: main score
× 100, rounded to two decimals as on MTEB's leaderboard; every mean and change is of those rounded numbers, so
that a reader who adds up the page finds what it says.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from gist_dist.errors import UserError
from gist_dist.evaluation import Score, read_results
from gist_dist.files import write_atomically
from gist_dist.plots import BLOCKS, Plot, write_plots


@dataclass(frozen=True)
class TaskRow:
    """One MTEB task in points; None where it was not evaluated (or has no finite score)."""

    task: str
    type: str
    metric: str
    before: float | None
    after: float | None
    guide: float | None
    change: float | None


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read but not yet judged."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    """A dict a step, by step."""
    unreadable_lines: int
    """Lines of metrics.jsonl that are no JSON object (a writer was killed within a line)."""
    data: dict[str, Any]
    tasks: list[TaskRow]
    failures: dict[str, dict[str, str]]
    """Label (baseline, trained, guide) -> task -> error."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def has_model(self) -> bool:
        return (self.folder / "model").is_dir()


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
    model: Path | None
    report: Path

    def lines(self) -> list[str]:
        """Plain ASCII text, at most a line a task plus the verdict and where things are."""
        lines = self._table() if self.tasks else []
        lines += [_ascii(self.headline), *(_ascii(text) for text in self.details)]
        lines += [f"warning: {_ascii(text)}" for text in self.warnings]
        lines += [f"model    {self.model}"] if self.model else []
        return [*lines, f"report   {self.report}"]

    def _table(self) -> list[str]:
        columns = ["before", "after", "change"] + ["guide"] * any(row.guide is not None for row in self.tasks)
        rows = [("task", "type", columns)]
        rows += [(row.task, row.type, _cells(asdict(row), columns)) for row in self.tasks]
        rows += [(f"mean of {self.overall['num_tasks']}", "", _cells(self.overall, columns))]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return [
            f"{task:<{widths[0]}}  {kind:<{widths[1]}}" + "".join(f"{cell:>8}" for cell in cells)
            for task, kind, cells in rows
        ]


def build_report(run_dir: Path) -> Summary:
    """Write run_dir/report.html, report.json and plots/*.png from what the run left so far.

    Raises UserError when run_dir is no run, when one of its files is damaged or when it can't be written to.
    """
    run = read_run(run_dir)
    contents = summarize(run)
    try:
        moved = [(row.task, row.before, row.after) for row in run.tasks if row.change is not None]
        limit = _section(run.config, "optim").get("max_grad_norm")
        plots = write_plots(run.folder / "plots", run.metrics, contents["training"]["seconds"], moved, limit)
        page = _render(run, contents, plots)
        numbers = json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(run.folder / "report.json", lambda file: file.write_text(numbers, encoding="utf-8"))
        write_atomically(run.folder / "report.html", lambda file: file.write_text(page, encoding="utf-8"))
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
        model=run.folder / "model" if run.has_model else None,
        report=run.folder / "report.html",
    )


def summarize(run: Run) -> dict[str, Any]:
    """The report in numbers: what report.json holds and report.html shows. JSON values only, no NaN."""
    verdict = judge(run.tasks, tuple(_section(run.config, "evaluate").get("tasks") or ()), run.failures)
    training = summarize_training(run)
    return {
        "name": run.name,
        "verdict": verdict,
        "tasks": [asdict(row) for row in run.tasks],
        "training": training,
        "data": _jsonable(run.data),
        "warnings": find_warnings(run, training),
        "failures": run.failures,
        "config": _jsonable(run.config),
        "environment": _jsonable(run.environment),
    }


# ---- reading -------------------------------------------------------------------------------------


def read_run(run_dir: Path) -> Run:
    """Read a run folder; what is not there yet is empty. UserError: no run, or a damaged file."""
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no config.yaml in {folder}: it is no run; give the folder output_dir/name of one")
    config = _read_config(folder / "config.yaml")
    environment = config.pop("environment", None) or {}
    metrics, unreadable = _read_metrics(folder / "metrics.jsonl")
    if not config.get("guide"):
        # Nothing can be masked then, and 0 % would read as a finding.
        metrics = [{key: row[key] for key in row if not key.startswith("masked_fraction")} for row in metrics]
    scores = {label: read_results(folder / "mteb" / label) for label in ("baseline", "trained", "guide")}
    return Run(
        folder=folder,
        environment=environment,
        config=_without_secrets(config),
        metrics=metrics,
        unreadable_lines=unreadable,
        data=_without_secrets(_read_json(folder / "data.json")),
        tasks=_task_rows(scores),
        failures=_without_secrets(_read_json(folder / "mteb" / "failures.json")),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not the sections of a recipe")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines by step (the last of a step counts), and how many lines could not be read."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    by_step: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in lines:
        try:
            row = json.loads(line)
            by_step[int(row["step"])] = row
        except (ValueError, TypeError, KeyError):
            unreadable += 1
    return [by_step[step] for step in sorted(by_step)], unreadable


def _task_rows(scores: dict[str, dict[str, Score]]) -> list[TaskRow]:
    """By type, then by name."""
    rows = []
    for task in {task for results in scores.values() for task in results}:
        found = {label: results[task] for label, results in scores.items() if task in results}
        any_score = next(iter(found.values()))
        before, after, guide = (
            _points(found[label].main_score) if label in found else None for label in ("baseline", "trained", "guide")
        )
        rows.append(TaskRow(task, any_score.kind, any_score.metric, before, after, guide, _change(before, after)))
    return sorted(rows, key=lambda row: (row.type, row.task))


def _points(main_score: float) -> float | None:
    return round(100 * float(main_score), 2) if math.isfinite(main_score) else None


def _change(before: float | None, after: float | None) -> float | None:
    return round(after - before, 2) if before is not None and after is not None else None


# ---- judging -------------------------------------------------------------------------------------


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
    losses = sorted((row for row in compared if row.change < 0), key=lambda row: row.change)
    settled = {row.task for row in after} | (failures or {}).get("trained", {}).keys()
    verdict = {
        "headline": _headline(rows, counted, overall, wanted),
        "overall": overall,
        "mean_of_types": _mean_of_types(by_type),
        "by_type": by_type,
        "losses": [asdict(row) for row in losses],
        "retrieval_losses": [asdict(row) for row in losses if _is_retrieval(row)],
        "not_compared": [row.task for row in rows if row not in counted],
        "not_evaluated": [task for task in wanted if task not in settled],
    }
    details = _details(verdict, bool(compared))
    return verdict | {"details": [{"about": about, "text": text} for about, text in details]}


def _mean_row(rows: list[TaskRow]) -> dict[str, Any]:
    before, after, guide = (_mean([getattr(row, side) for row in rows]) for side in ("before", "after", "guide"))
    changes = [row.change for row in rows if row.change is not None]
    return {
        "num_tasks": len(rows),
        "before": before,
        "after": after,
        "change": _change(before, after),
        "guide": guide,
        "up": sum(change > 0 for change in changes),
        "down": sum(change < 0 for change in changes),
    }


def _mean_of_types(by_type: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Every type counts the same, however many tasks it has (MTEB's Mean (TaskType))."""
    if len(by_type) < 2:
        return None
    before, after, guide = (_mean([kind[side] for kind in by_type]) for side in ("before", "after", "guide"))
    return {"before": before, "after": after, "change": _change(before, after), "guide": guide}


def _mean(values: list[float | None]) -> float | None:
    """None unless every value is there: over fewer tasks than its neighbour it would compare nothing."""
    return round(fmean(values), 2) if values and None not in values else None


def _is_retrieval(row: TaskRow) -> bool:
    return "retrieval" in row.type.lower()


def _headline(rows: list[TaskRow], counted: list[TaskRow], overall: dict[str, Any], wanted: tuple[str, ...]) -> str:
    if not counted:
        return (
            f"None of {_plural(len(wanted), 'MTEB task')} has a score yet." if wanted else "No MTEB task was evaluated."
        )
    before, after, change = overall["before"], overall["after"], overall["change"]
    tasks = _plural(len(counted), "task")
    if change is None:
        if after is None:
            return f"The mean over {tasks} is {before:.2f} before training; the trained model has no scores yet."
        unknown = "the untrained student was not evaluated, so no change can be told"
        return f"The mean over {tasks} is {after:.2f}; {unknown}."
    if change == 0:
        return f"The mean over {tasks} stayed at {after:.2f}."
    verb = "rose" if change > 0 else "fell"
    return f"The mean over {tasks} {verb} from {before:.2f} to {after:.2f} ({_signed(change)})."


def _details(verdict: dict[str, Any], compared: bool) -> Iterable[tuple[str, str]]:
    """Sentences behind the headline, losses of retrieval first: a mean must not hide them."""
    overall = verdict["overall"]
    if compared:
        same = overall["num_tasks"] - overall["up"] - overall["down"]
        unchanged = f", {same} unchanged" if same else ""
        yield "counts", f"{_plural(overall['up'], 'task')} went up, {overall['down']} down{unchanged}."
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
        f"{row['task']} {row['before']:.2f} → {row['after']:.2f} ({_signed(row['change'])})" for row in losses[:limit]
    )
    return named if len(losses) <= limit else f"{named} and {len(losses) - limit} more, below"


def summarize_training(run: Run) -> dict[str, Any]:
    """Totals and averages of the steps so far; fractions in 0..1, seconds, bytes; None if nothing is known.

    Masked fractions and padding are means over steps; first and last are over a twentieth of the steps.
    """
    metrics = run.metrics
    loss = _first_last(metrics, "loss") or [None, None]
    grad_norms = _values(metrics, "grad_norm")
    limit = _section(run.config, "optim").get("max_grad_norm")
    rows = math.fsum(_values(metrics, "rows"))
    lonely = math.fsum(_values(metrics, "rows_without_negatives"))
    masked = {"all": _average(metrics, "masked_fraction")}
    masked |= {block: _average(metrics, f"masked_fraction_{block}") for block in BLOCKS}
    return {
        "steps": metrics[-1]["step"] if metrics else 0,
        "planned_steps": run.data.get("steps"),
        "epochs": metrics[-1].get("epoch") if metrics else None,
        "rows": int(rows),
        "loss_first": loss[0],
        "loss_last": loss[1],
        "non_finite_steps": [row["step"] for row in metrics if not _finite(row.get("loss"))],
        "grad_norm_median": median(grad_norms) if grad_norms else None,
        "clipped_fraction": fmean(norm > limit for norm in grad_norms) if grad_norms and limit else None,
        "learning_rate_peak": max(_values(metrics, "learning_rate"), default=None),
        "masked_fraction": masked,
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
        "seconds": _phase_seconds(metrics),
        "repeated_texts": int(sum(repeated)) if (repeated := _values(metrics, "repeated_texts")) else None,
        "source_rows": _source_rows(metrics),
    }


def find_warnings(run: Run, training: dict[str, Any]) -> list[dict[str, str]]:
    """What a careful reader would point at: [{code, text}], codes stable for scripts."""
    return [{"code": code, "text": text} for code, text in _warnings(run, training)]


def _warnings(run: Run, training: dict[str, Any]) -> Iterable[tuple[str, str]]:
    steps, planned = training["steps"], training["planned_steps"]
    first, last = training["loss_first"], training["loss_last"]
    if planned and steps < planned:
        yield "unfinished", f"Training stands at step {steps} of {planned}; what follows is of those steps."
    if bad := training["non_finite_steps"]:
        yield (
            "non_finite_loss",
            f"The loss was not finite at {_plural(len(bad), 'step')}, first at step {bad[0]}.",
        )
    elif steps >= 40 and last >= first:
        yield (
            "loss_not_falling",
            f"The loss did not fall: {first:.4g} in the first steps, {last:.4g} in the last.",
        )
    yield from _guide_warnings(run, training)
    if (training["rows_without_negatives_fraction"] or 0) > 0.01:
        share = _percent(training["rows_without_negatives_fraction"])
        remedy = "raise batch.global_size" + (" or lower loss.margin" if run.config.get("guide") else "")
        yield (
            "rows_without_negatives",
            f"{share} of the rows had no negative left and taught nothing: {remedy}.",
        )
    if (training["padding_fraction"] or 0) > 0.3:
        share = _percent(training["padding_fraction"])
        yield (
            "padding",
            f"{share} of the encoded tokens were padding: lower batch.chunk_tokens or raise "
            "batch.global_size, so that the texts of a chunk are of one length.",
        )
    for source in run.data.get("reports") or run.data.get("sources", ()):
        read, used = source.get("rows_read") or 0, source.get("rows_used") or 0
        if read and (read - used) / read > 0.05:
            share = _percent((read - used) / read)
            yield "rows_dropped", f"{share} of the rows of {source['name']} were dropped as unusable."
    for label, errors in run.failures.items():
        for task, error in errors.items():
            yield "task_failed", f"MTEB task {task} failed ({label}): {_shorten(str(error))}"
    for section in ("student", "guide"):
        if _section(run.config, section).get("trust_remote_code"):
            yield "remote_code", f"{section}.trust_remote_code was on: code that came with the model was run."
    if run.unreadable_lines:
        damaged = _plural(run.unreadable_lines, "line")
        yield "metrics_damaged", f"{damaged} of metrics.jsonl can't be read; what is shown is without them."


def _guide_warnings(run: Run, training: dict[str, Any]) -> Iterable[tuple[str, str]]:
    masked = training["masked_fraction"]
    if not run.config.get("guide") or masked["all"] is None:
        return
    if masked["all"] == 0:
        yield (
            "nothing_masked",
            "The guide masked no candidate at all: it cost time and changed nothing. Raise loss.margin or "
            "take another guide.",
        )
    if masked["all"] > 0.5:
        yield (
            "much_masked",
            f"The guide masked {_percent(masked['all'])} of the candidates: it hardly tells positives from "
            "the rest, or loss.margin is too high.",
        )
    if (masked["ap"] or 0) > 0.5:
        yield (
            "guide_ranks_positives_low",
            f"To the guide, {_percent(masked['ap'])} of the other rows' positives are closer to an anchor "
            "than its own: check that it suits the data (language, domain, prompts), and that anchors and "
            "positives match.",
        )


# ---- numbers -------------------------------------------------------------------------------------


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if _finite(row.get(key))]


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


def _phase_seconds(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over the steps by phase; "step" is the whole, "other" what no phase accounts for."""
    steps = [row.get("seconds") or {} for row in metrics]
    phases = dict.fromkeys(phase for row in steps for phase in row if phase != "step")
    seconds = {phase: math.fsum(_values(steps, phase)) for phase in phases}
    whole = math.fsum(_values(steps, "step"))
    return seconds | {"other": max(0.0, whole - math.fsum(seconds.values())), "step": whole}


def _source_rows(metrics: list[dict[str, Any]]) -> dict[str, int]:
    """Rows trained on by source; a row that came twice counts twice."""
    totals: dict[str, int] = {}
    for row in metrics:
        for name, count in (row.get("sources") or {}).items():
            totals[name] = totals.get(name, 0) + int(count)
    return totals


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config.get(name) or {}


def _jsonable(value: Any) -> Any:
    """YAML's dates become text, non-finite numbers None."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _without_secrets(value: Any) -> Any:
    """Environment variables of a cluster and passwords in addresses are nobody's business."""
    if isinstance(value, dict):
        return {
            key: dict.fromkeys(item, "(hidden)") if key == "env_vars" and item else _without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return re.sub(r"://[^/@\s]+@", "://(hidden)@", value) if isinstance(value, str) else value


# ---- words ---------------------------------------------------------------------------------------


def _signed(change: float) -> str:
    return f"{change:+.2f}".replace("-", "−")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.2g} %"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _shorten(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}…"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    formats = {"change": "+.2f"}
    return ["-" if row[c] is None else format(row[c], formats.get(c, ".2f")) for c in columns]


def _ascii(text: str) -> str:
    """For a terminal of any encoding."""
    for char, plain in {"−": "-", "→": "->", "×": "x", "–": "-", "…": "..."}.items():
        text = text.replace(char, plain)
    return text


# ---- the page ------------------------------------------------------------------------------------


def _render(run: Run, contents: dict[str, Any], plots: list[Plot]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gist_dist"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "points": lambda value: "–" if value is None else f"{value:.2f}",
        "signed": lambda value: "–" if value is None else _signed(value),
        "percent": lambda value: "–" if value is None else _percent(value),
        "count": lambda value: "–" if value is None else f"{value:,.0f}",
        "number": lambda value: "–" if value is None else f"{value:.4g}",
        "duration": lambda value: "–" if value is None else _duration(value),
        "gigabytes": lambda value: "–" if value is None else f"{value / 1e9:.2f} GB",
    }
    charts = {plot.name: (plot.title, Markup(plot.svg)) for plot in plots}
    groups = {
        group: [charts[p.name] for p in plots if p.section == group] for group in ("training", "masking", "speed")
    }
    return environment.get_template("report.html.j2").render(
        **contents,
        groups=groups,
        blocks=BLOCKS,
        widest=max((abs(row.change) for row in run.tasks if row.change), default=1.0),
        config_text=yaml.safe_dump(contents["config"], sort_keys=False, allow_unicode=True, width=100),
        has_model=run.has_model,
    )
