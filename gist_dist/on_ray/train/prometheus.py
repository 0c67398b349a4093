"""The main series of a run as Ray metrics, which Prometheus finds on every node's metrics port as ray_gist_dist_….

A gauge holds the last step's number; metrics.jsonl has them all.
"""

from typing import Any

SERIES = {
    "step": "Optimizer steps done",
    "epoch": "Passes over the data",
    "loss": "Loss of the global batch",
    "grad_norm": "Norm of the global batch's gradient before clipping",
    "learning_rate": "Learning rate",
    "pairs_per_second": "Rows of the global batch per second",
    "tokens_per_second": "Student tokens per second, without padding",
    "masked_fraction": "Share of the candidates that the guide drops",
    "masked_weight": "Share of the negatives' softmax weight that the guide drops",
    "padding_fraction": "Share of the encoded tokens that is padding",
    "rows_without_negatives": "Rows of the batch that have no candidate left",
    "peak_memory_bytes": "Most memory that a worker has used: of its GPU, or resident on a CPU",
    "world_size": "Workers",
}
"""Key of metrics.jsonl → what it is."""


class OperatorMetrics:
    """Rank 0 of a training calls it with each line of metrics.jsonl. Within a Ray worker."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = {"run": run}
        self._gauges = {key: Gauge(f"gist_dist_{key}", what, ("run",)) for key, what in SERIES.items()}
        self._seconds = Gauge("gist_dist_seconds", "Seconds of a step by phase", ("run", "phase"))

    def __call__(self, line: dict[str, Any]) -> None:
        for key, gauge in self._gauges.items():
            if line.get(key) is not None:  # null is a number that was not finite: the last finite one stays
                gauge.set(line[key], self._run)
        for phase, seconds in line["seconds"].items():
            self._seconds.set(seconds, self._run | {"phase": phase})
