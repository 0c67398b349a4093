"""metrics.jsonl: a line a step, written by rank 0."""

import json
import logging
import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.untrusted import step_line
from gist_dist.core.candidates import PARTS
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import StepResult
from gist_dist.data.corpus import Corpus
from gist_dist.data.statistics import repeated_texts

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends lines; a resumed run first drops those of the steps that it will do again.

    A disk that is full for a while costs no line: what can't be written is kept and written with the next one.
    """

    def __init__(self, path: Path, resume_after: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_after]
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line torn by a kill is left out."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [line for text in texts if (line := step_line(text))]


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def metrics_line(
    plan: BatchPlan,
    result: StepResult,
    corpus: Corpus,
    learning_rate: float,
    world_size: int,
    step_seconds: float,
    steps_per_epoch: int,
    peak_memory: float,
) -> dict[str, Any]:
    """Numbers that are not finite are null; "skipped" then says which made the step change nothing."""
    counts, rows = result.counts, len(plan.rows)
    candidates = {part: counts.get(f"candidates_{part}", 0.0) for part in PARTS}
    masked = {part: counts.get(f"masked_{part}", 0.0) for part in PARTS}
    sources = np.bincount(corpus.source[plan.rows], minlength=len(corpus.source_names)).tolist()
    line = {
        "step": plan.step,
        "epoch": plan.step / steps_per_epoch,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "skipped": result.non_finite,
        "learning_rate": learning_rate,
        "world_size": world_size,
        "rows": rows,
        "pairs_per_second": rows / step_seconds,
        "tokens_per_second": plan.num_tokens / step_seconds,
        "padding_fraction": 1 - plan.num_tokens / plan.padded_tokens,
        "masked_fraction": sum(masked.values()) / max(1.0, sum(candidates.values())),
        **{f"masked_fraction_{p}": masked[p] / candidates[p] if candidates[p] else None for p in PARTS},
        "repeated_texts": repeated_texts(corpus, plan.rows),
        "identical_dropped": int(counts["identical_dropped"]),
        "rows_without_negatives": int(counts["rows_without_negatives"]),
        "positive_similarity": counts["positive_similarity"] / rows,
        "guide_positive_similarity": counts["guide_positive_similarity"] / rows if result.is_guided else None,
        "guide_candidate_similarity": result.guide_candidate_similarity,
        "sources": {name: n for name, n in zip(corpus.source_names, sources, strict=True) if n},
        "seconds": {phase: round(seconds, 6) for phase, seconds in result.seconds.items()}
        | {"step": round(step_seconds, 6)},
        "peak_memory_bytes": int(peak_memory),
    }
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process: allocated device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
