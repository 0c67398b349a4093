"""What does it cost and save to send the student's embeddings between workers as bf16 or fp16?

One batch, dropout off, on so many processes: loss and parameter gradient beside those of fp32, the bytes that a worker
receives, and the share of the step that gathering takes.

    python benchmarks/gather_precision.py              about 2 minutes on 2 cores
"""

import argparse
from typing import Any

import torch
from harness import Claim, model_flags, number, parser, publish, run_group, start
from sides import DATA, Ours, Setting, setting_of

from gist_dist.core.collectives import World

PRECISIONS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""batch.gather_precision → bytes of a number."""


def main() -> None:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--data", choices=list(DATA), default="short")
    flags.add_argument("--rows", type=int, default=512)
    flags.add_argument("--processes", type=int, default=2)
    arguments = flags.parse_args()
    start(arguments)
    setting, origin = setting_of(arguments, arguments.data, arguments.rows, dropout=0.0, margin=0.05)
    threads = max(1, arguments.threads // arguments.processes)
    results = run_group(measure, arguments.processes, threads, setting, arguments)[0]
    document = {
        "question": "What do embeddings gathered as bf16 or fp16 change, and what do they save?",
        "control": "the same batch, weights and processes with fp32",
        "settings": {"student": arguments.student, "guide": arguments.guide, "rows": origin},
        "results": results,
    }
    columns = {
        "sent as": "precision",
        "rows": lambda r: f"{r['rows']:,}",
        "MB received a worker": lambda r: number(r["bytes"] / 1e6),
        "gather s": lambda r: number(r["gather_seconds"]),
        "share of the step": lambda r: f"{r['gather_share']:.2%}",
        "loss, relative difference": lambda r: f"{r['loss_difference']:.1e}",
        "gradient, relative difference": lambda r: f"{r['gradient_difference']:.1e}",
    }
    claims = [
        Claim(f"gradient with embeddings gathered in {r['precision']}: relative difference", r["gradient_difference"])
        for r in results[1:]
    ]
    publish("gather_precision", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


class Recorder(torch.optim.SGD):
    """Keeps the gradient that it is given, and moves nothing."""

    def step(self) -> None:  # type: ignore[override]
        held = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.gradient = torch.cat(held).double()


def measure(world: World, setting: Setting, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results, exact = [], None
    for precision, size in PRECISIONS.items():
        ours = Ours(setting, world, gather_precision=precision)
        recorder = Recorder(ours.student.parameters(), lr=0.0)
        ours.train_state.optimizer = recorder
        told = [ours.step(arguments.rows) for _ in range(arguments.repeats)][-1]
        exact = exact or (told.loss, recorder.gradient)
        difference = (recorder.gradient - exact[1]).norm() / exact[1].norm()
        plan = ours.plan(arguments.rows)
        results.append(
            {
                "precision": precision,
                "rows": arguments.rows,
                "bytes": len(plan.texts) * ours.student.width * size,
                "gather_seconds": told.seconds["gather"],
                "gather_share": told.seconds["gather"] / sum(told.seconds.values()),
                "loss_difference": abs(told.loss - exact[0]) / exact[0],
                "gradient_difference": difference.item(),
            }
        )
    return results


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    axes.bar([r["precision"] for r in results], [r["gradient_difference"] for r in results])
    axes.set(ylabel="relative difference of the gradient", title="embeddings gathered in low precision")


if __name__ == "__main__":
    main()
