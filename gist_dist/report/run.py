"""A run's folder, read: what it holds, not yet judged. Whatever is not there yet is empty."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.events import CHECKPOINT_PROBLEM, EVENTS, problems
from gist_dist.common.plain_yaml import load_plain
from gist_dist.common.redact import redact, redact_text
from gist_dist.common.untrusted import check_plain, load_plain_json, problem
from gist_dist.evaluation.evaluate import Score, read_results
from gist_dist.evaluation.names import SUITES
from gist_dist.report.shapes import BENCHMARKS, DATA, EXAMPLES, FAILURES, RECIPE, STEP
from gist_dist.runs.evaluations import Evaluation, read_evaluations
from gist_dist.runs.metrics_file import METRICS, parse_lines


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
    """What a run folder holds."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    """A dict a step, by step."""
    unreadable_lines: int
    """Lines of metrics.jsonl that tell of no step (a writer was killed within a line)."""
    data: dict[str, Any]
    tasks: list[TaskRow]
    failures: dict[str, dict[str, str]]
    """Label (baseline, trained, guide) -> task -> error."""
    masked_examples: dict[str, Any] = field(default_factory=dict)
    """masked_examples.json; {} without a guide or before it was written."""
    logged: list[str] = field(default_factory=list)
    """What rank 0 said of checkpoints that were damaged or could not be written: each once, the last few."""

    evaluations: list[Evaluation] = field(default_factory=list)
    """While it trained, by step."""
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Label (baseline, trained, guide) -> task -> what MTEB found."""
    suites: list[dict[str, Any]] = field(default_factory=list)
    """mteb/benchmarks.json: benchmarks and their tasks."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def has_model(self) -> bool:
        return (self.folder / "model").is_dir()

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe; {} where it is null."""
        return self.config.get(name) or {}


def read_run(run_dir: Path) -> Run:
    """Read a run folder; what is not there yet is empty. UserError: no run, or a damaged file."""
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no config.yaml in {folder}: it is no run; give the folder output_dir/name of one")
    config = _read_config(folder / "config.yaml")
    environment = config.pop("environment", None) or {}
    metrics, unreadable = _read_metrics(folder / METRICS)
    if not config.get("guide"):
        # Nothing can be masked then, and 0 % would read as a finding.
        metrics = [{key: row[key] for key in row if not key.startswith("masked_")} for row in metrics]
    scores = {label: read_results(folder / "mteb" / label) for label in ("baseline", "trained", "guide")}
    return Run(
        folder=folder,
        environment=environment,
        config=redact(config),
        metrics=metrics,
        unreadable_lines=unreadable,
        data=redact(read_json(folder / "data.json", DATA)),
        tasks=_task_rows(scores),
        failures=_read_failures(folder / "mteb" / "failures.json"),
        masked_examples=read_json(folder / "masked_examples.json", EXAMPLES),
        evaluations=read_evaluations(folder),
        scores=scores,
        suites=read_json(folder / "mteb" / SUITES, BENCHMARKS) or [],
        logged=problems(folder / "logs" / EVENTS, CHECKPOINT_PROBLEM)[-5:],
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = load_plain(_read_text(path))
        check_plain(config)
    except ValueError as error:
        raise UserError(f"{path}: can't be read: {' '.join(str(error).split())}") from None
    if wrong := problem(RECIPE, config):
        raise UserError(f"{path}: is no recipe that was run: {wrong}; repair it")
    return config


def read_json(path: Path, shape: Any, remedy: str = "remove it, and the report goes without it") -> Any:
    """{} where there is no such file. UserError for one that is no JSON of this shape, a TypeAdapter."""
    if not path.is_file():
        return {}
    try:
        content = load_plain_json(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: can't be read as JSON: {error}; {remedy}") from None
    if wrong := problem(shape, content):
        raise UserError(f"{path}: is damaged: {wrong}; {remedy}")
    return content


def _read_text(path: Path, errors: str = "strict") -> str:
    """ValueError for what is no UTF-8, unless errors are replaced."""
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def _read_failures(path: Path) -> dict[str, dict[str, str]]:
    failures = read_json(path, FAILURES)
    return {
        label: {task: redact_text(str(error)) for task, error in errors.items()} for label, errors in failures.items()
    }


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines by step (the last of a step counts), and how many lines could not be read."""
    by_step: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for row in parse_lines(_read_text(path, "replace") if path.is_file() else ""):
        if row is None or problem(STEP, row):
            unreadable += 1
        else:
            by_step[row["step"]] = {"sources": {}, "seconds": {}} | row
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
        rows.append(TaskRow(task, any_score.kind, any_score.metric, before, after, guide, difference(before, after)))
    return sorted(rows, key=lambda row: (row.type, row.task))


def _points(main_score: float) -> float | None:
    return round(100 * float(main_score), 2) if math.isfinite(main_score) else None


def difference(before: float | None, after: float | None) -> float | None:
    """The difference of rounded points, rounded; None where one of them is missing."""
    return round(after - before, 2) if before is not None and after is not None else None


def jsonable(value: Any) -> Any:
    """YAML's dates become text, non-finite numbers None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
