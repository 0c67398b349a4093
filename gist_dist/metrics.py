"""metrics.jsonl: a line a step, written by rank 0."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gist_dist.data.accounts import repeated_texts
from gist_dist.data.corpus import Corpus
from gist_dist.data.plan import BatchPlan
from gist_dist.files import write_atomically
from gist_dist.loss import PARTS
from gist_dist.step import StepResult


class MetricsFile:
    """Appends lines; a resumed run first drops those of the steps that it will do again."""

    def __init__(self, path: Path, resume_after: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_after]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line torn by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


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
    counts, rows = result.counts, len(plan.rows)
    candidates = {part: counts.get(f"candidates_{part}", 0.0) for part in PARTS}
    masked = {part: counts.get(f"masked_{part}", 0.0) for part in PARTS}
    sources = np.bincount(corpus.source[plan.rows], minlength=len(corpus.source_names)).tolist()
    return {
        "step": plan.step,
        "epoch": plan.step / steps_per_epoch,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
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
        "sources": {name: n for name, n in zip(corpus.source_names, sources, strict=True) if n},
        "seconds": {phase: round(seconds, 6) for phase, seconds in result.seconds.items()}
        | {"step": round(step_seconds, 6)},
        "peak_memory_bytes": int(peak_memory),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process: allocated device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
