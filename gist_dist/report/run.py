"""A run's folder, read: what it holds, not yet judged. Whatever is not there yet is empty."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gist_dist.errors import UserError
from gist_dist.evaluation import Score, read_results
from gist_dist.plain_yaml import load_plain
from gist_dist.redact import redact, redact_text

EXAMPLE_TEXTS = {"chosen", "source", "block", "anchor", "positive", "candidate"}
EXAMPLE_NUMBERS = {"row", "threshold", "guide_positive", "guide_candidate", "student_positive", "student_candidate"}
EXAMPLE_KEYS = EXAMPLE_TEXTS | EXAMPLE_NUMBERS
"""Of an example in masked_examples.json (masked_examples.py writes it)."""
CHECKPOINT_COMPLAINTS = (" is damaged (", "the next checkpoint tries again")
"""In lines of the log (checkpoint.py writes them)."""


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
    """Lines of metrics.jsonl that are no JSON object (a writer was killed within a line)."""
    data: dict[str, Any]
    tasks: list[TaskRow]
    failures: dict[str, dict[str, str]]
    """Label (baseline, trained, guide) -> task -> error."""
    masked_examples: dict[str, Any] = field(default_factory=dict)
    """masked_examples.json; {} without a guide or before it was written."""
    logged: list[str] = field(default_factory=list)
    """What the log of rank 0 says of checkpoints that were damaged or could not be written."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def has_model(self) -> bool:
        return (self.folder / "model").is_dir()

    def section(self, name: str) -> dict[str, Any]:
        """Of the recipe; {} where it is null."""
        return self.config.get(name) or {}


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
        config=redact(config),
        metrics=metrics,
        unreadable_lines=unreadable,
        data=redact(_read_json(folder / "data.json")),
        tasks=_task_rows(scores),
        failures=_read_failures(folder / "mteb" / "failures.json"),
        masked_examples=_read_examples(folder / "masked_examples.json"),
        logged=_read_logged(folder / "logs" / "train.log"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = load_plain(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not the sections of a recipe")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def _read_failures(path: Path) -> dict[str, dict[str, str]]:
    failures = _read_json(path)
    if not all(isinstance(errors, dict) for errors in failures.values()):
        raise UserError(f"{path}: is damaged; remove it, and the next evaluation writes it")
    return {
        label: {task: redact_text(str(error)) for task, error in errors.items()} for label, errors in failures.items()
    }


def _read_examples(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    if not all(_is_example(example) for example in found.get("examples", [])):
        raise UserError(f"{path}: is damaged; remove it, and the report goes without it")
    return found


def _is_example(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= EXAMPLE_KEYS:
        return False
    numbers = all(isinstance(value[key], int | float) for key in EXAMPLE_NUMBERS)
    return numbers and all(isinstance(value[key], str) for key in EXAMPLE_TEXTS)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines by step (the last of a step counts), and how many lines could not be read."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    by_step: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in lines:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row["step"], int):
                raise ValueError("it is of no step")
            by_step[row["step"]] = row | {
                key: {} for key in ("sources", "seconds") if not isinstance(row.get(key), dict)
            }
        except (ValueError, KeyError, RecursionError):
            unreadable += 1
    return [by_step[step] for step in sorted(by_step)], unreadable


def _read_logged(path: Path) -> list[str]:
    """Each complaint once; the last few of them."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    complaints = [line for line in text.splitlines() if any(words in line for words in CHECKPOINT_COMPLAINTS)]
    return list(dict.fromkeys(complaints))[-5:]


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
    """Of rounded points, rounded; None where one of them is missing."""
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
