"""A step's line of metrics.jsonl (runs/metrics_file.py), and the memory it tells of."""

import math
import resource
import sys
from typing import Any

import numpy as np
import torch

from gist_dist.core.candidates import PARTS
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import StepResult
from gist_dist.data.corpus import Corpus
from gist_dist.data.statistics import repeated_texts


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
        "masked_weight": counts["masked_weight"] / rows,
        **{f"masked_weight_{p}": counts[f"masked_weight_{p}"] / rows if candidates[p] else None for p in PARTS},
        "identical_weight": counts["identical_weight"] / rows,
        "known_weight": counts["known_weight"] / rows,
        "known_dropped": int(counts["known_dropped"]),
        "promoted": int(counts["promoted"]),
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
    """Most memory that this process has used: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
