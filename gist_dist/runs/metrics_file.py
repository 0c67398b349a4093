"""metrics.jsonl: a line of JSON a step, and one for each evaluation while it trains: {"step": …, "evaluation": …}.

One writes it, rank 0; many read it, also while it is written.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.untrusted import load_plain_json

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""In a run's folder."""
LAST_BYTES = 65536
"""Bytes at the end of the file that surely hold its last line."""


EVALUATION = "evaluation"
"""The key of a line that tells of no training step but of its scores."""


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """None for a line that a kill has torn, or that is of no step."""
    try:
        line = load_plain_json(text if isinstance(text, str) else text.decode())
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def parse_lines(text: str) -> Iterator[dict[str, Any] | None]:
    """The lines of steps; those of scores are left out."""
    return (line for line in map(parse_line, text.splitlines()) if not (line and EVALUATION in line))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of steps; a line torn by a kill is left out."""
    return [line for line in parse_lines(_read(path)) if line]


def evaluation_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that tell of scores while the run trains."""
    return [line for line in map(parse_line, _read(path).splitlines()) if line and EVALUATION in line]


def add_evaluations(path: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add those that are not there yet, once nobody else writes the file; gives them."""
    known = {line["step"] for line in evaluation_lines(path)}
    missing = [line for line in lines if line["step"] not in known]
    if missing:
        write_text(path, _read(path) + "".join(map(_as_text, missing)))
    return missing


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def last_step(run_dir: Path) -> int:
    """The last complete line's; 0 before the first."""
    try:
        with open(run_dir / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    parsed = (parse_line(text) for text in reversed(lines))
    return next((line["step"] for line in parsed if line and EVALUATION not in line), 0)


class Tail:
    """The newest lines that have been written since it was made."""

    def __init__(self, file: Path, num_lines: int) -> None:
        self.file, self.position = file, file.stat().st_size if file.is_file() else 0
        self.steps: deque[dict[str, Any]] = deque(maxlen=num_lines)

    def newest(self) -> list[dict[str, Any]]:
        """Up to num_lines, the last at the end; read from where the last call stopped."""
        try:
            if self.file.stat().st_size < self.position:  # a run that goes on drops the steps that it will do again
                self.position = 0
                self.steps.clear()
            with self.file.open("rb") as file:
                file.seek(self.position)
                while (line := file.readline()).endswith(b"\n"):
                    self.position = file.tell()
                    if (row := parse_line(line)) and EVALUATION not in row:
                        self._add(row)
        except OSError:  # not there yet, or a file server that is away for a moment
            pass
        return list(self.steps)

    def _add(self, row: dict[str, Any]) -> None:
        if self.steps and row["step"] <= self.steps[-1]["step"]:
            self.steps.clear()
        self.steps.append(row)


class MetricsFile:
    """Appends lines; a resumed run first drops those of the steps that it will do again, but not their scores.

    A disk that is full for a while costs no line: what can't be written is kept and written with the next one.
    """

    def __init__(self, path: Path, resume_after: int) -> None:
        lines = [line for line in map(parse_line, _read(path).splitlines()) if line]
        kept = [line for line in lines if EVALUATION in line or line["step"] <= resume_after]
        text = "".join(_as_text(line) for line in kept)
        write_text(path, text)
        self.path = path
        self._file = open(path, "ab", buffering=0)
        self._unwritten = b""
        self._lock = Lock()

    def write(self, line: dict[str, Any]) -> None:
        was_behind = bool(self._unwritten)
        with self._lock:
            self._unwritten += _as_text(line).encode()
        try:
            self._catch_up()
        except OSError as error:
            if not was_behind:
                logger.warning("%s can't be written (%s); its lines are kept and written later", self.path, error)

    def sync(self) -> None:
        """Have all lines on the disk itself, unless it is full; from any thread."""
        with suppress(OSError, ValueError):  # write() has told of the one; the other means closed, with all lines
            self._catch_up()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """UserError for lines that can't be written."""
        if self._file.closed:
            return
        with self._file:
            try:
                self._catch_up()
            except OSError as error:
                raise UserError(
                    f"{self.path}: its last lines can't be written: {error}; free space, and the same command goes on"
                ) from error

    def _catch_up(self) -> None:
        with self._lock:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
