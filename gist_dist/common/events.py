"""Fields of log records, for programs: the message is for people, and no code looks into it.

    logger.info("…", extra=phase("training"))   a phase of the command begins
    logger.info("…", extra=PROGRESS)            how far something is; the next such line replaces this one
    logger.warning("…", extra={"problem": …})   what the report repeats, under this code
    logger.info("…", extra={"resumed": step})   training goes on after this step of a checkpoint

logs/events.jsonl of a run holds the records of rank 0 with these fields, a JSON object a line: the driver follows it
and the report reads it. Nothing else reads a log.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gist_dist.common.redact import Redacting
from gist_dist.common.untrusted import load_plain_json

EVENTS = "events.jsonl"
FIELDS = ("phase", "progress", "problem", "resumed")
PROGRESS = {"progress": True}
TRAINING = "training"
"""The phase in which the terminal shows metrics."""
CHECKPOINT_PROBLEM = {"problem": "checkpoint"}
"""A checkpoint is damaged or could not be written."""


def phase(name: str) -> dict[str, str]:
    return {"phase": name}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}


class EventFormatter(Redacting):
    """A record as a line of JSON: time, level, message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        event = {"time": round(record.created, 3), "level": record.levelname, "message": super().format(record)}
        return json.dumps(event | fields_of(record))


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Events with a message; a line that a kill has torn is passed over."""
    for line in lines:
        try:
            event = load_plain_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("message"), str):
            yield event


def log_event(logger: logging.Logger, event: dict[str, Any]) -> None:
    """Repeat a worker's event. Phases are the command's own, and are not repeated."""
    level = logging.getLevelNamesMapping().get(str(event.get("level")), logging.INFO)
    extra = {name: event[name] for name in FIELDS if name in event and name != "phase"}
    logger.log(level, "%s", event["message"], extra=extra)


def problems(file: Path, problem: dict[str, str]) -> list[str]:
    """Messages of the events of a file that name this problem, each once; none where there is no file."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = [event["message"] for event in read_events(lines) if event.get("problem") == problem["problem"]]
    return list(dict.fromkeys(found))
