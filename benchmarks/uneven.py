"""What does a slow node cost, and how much of that does dealing by measured speed win back?

Two processes of one gloo group, one thread each. The second is given a part of the first one's core (the kernel's CPU
quota, which needs a writable cgroup), and steps with equal dealing and with cluster.deal_by_speed are taken in turns,
after a few steps in which the speeds are learnt. Beside them: the part of a step that the fast one waits, and what
dealing could win at best, (1 + s) / 2s for a worker of speed s.

    python benchmarks/uneven.py                                                  about 15 minutes on 2 cores
    python benchmarks/uneven.py --rows 128 --student minilm-l2 --mode none       about 2 minutes
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from harness import Claim, interleave, model_flags, number, parser, publish, ratio, run_group, say, spread, start
from sides import DATA, Ours, Setting, setting_of

from gist_dist.core.collectives import World, all_reduce_max
from gist_dist.core.step import StepResult, prepare_inputs, train_step
from gist_dist.training.worker_speeds import WorkerSpeeds

LEARNING_STEPS = 4
WAITING = ("gather", "scatter", "reduce")
"""Phases that end when the slowest is there."""
PERIOD_US = 50_000


class Quota:
    """A part of one core for the process that joins."""

    def __init__(self, name: str) -> None:
        old, new = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
        self.is_old = old.is_dir()
        self.folder = (old if self.is_old else new) / name

    def __enter__(self) -> "Quota":
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()

    def join(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def set(self, part: float) -> None:
        quota = int(part * PERIOD_US) if part < 1 else None
        if self.is_old:
            (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota or -1))
        else:
            (self.folder / "cpu.max").write_text(f"{quota or 'max'} {PERIOD_US}")


def main() -> None:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--data", choices=list(DATA), default="short")
    flags.add_argument("--rows", type=int, default=512)
    flags.add_argument("--mode", choices=["online", "cache", "none"], default="cache", help="the guide")
    flags.add_argument(
        "--parts", type=float, nargs="+", default=[1, 0.75, 0.5, 0.25], help="of the first one's core, for the second"
    )
    flags.add_argument("--core", type=float, default=1, help="of a core, for the first; less beside other work")
    arguments = flags.parse_args()
    start(arguments)
    setting, _ = setting_of(arguments, arguments.data, arguments.rows)
    with Quota(f"gist-dist-even-{os.getpid()}") as first, Quota(f"gist-dist-uneven-{os.getpid()}") as second:
        by_rank = run_group(measure, 2, 1, setting, arguments, (first, second))
    results = [joined(part, told) for part, *told in zip(arguments.parts, *by_rank, strict=True)]
    document = {
        "question": "What does a slow worker cost, and what does dealing by measured speed win back?",
        "control": "the same workers and batch with equal dealing, in turns",
        "settings": {
            "student": arguments.student, "guide": arguments.guide, "mode": arguments.mode, "data": arguments.data,
            "rows": arguments.rows, "core": arguments.core,
        },
        "results": results,
    }  # fmt: skip
    columns = {
        "second worker's speed": lambda r: f"{r['part']:g}",
        "equal dealing s": lambda r: spread(r["equal"]["seconds"]),
        "the fast one waits": lambda r: f"{r['waits']['equal']:.0%}",
        "by speed s": lambda r: spread(r["by_speed"]["seconds"]),
        "it waits": lambda r: f"{r['waits']['by_speed']:.0%}",
        "speeds learnt": lambda r: ", ".join(map(number, r["speeds"])),
        "equal ÷ by speed": lambda r: spread(r["ratio"], "×"),
        "at best": lambda r: f"{(1 + r['part']) / (2 * r['part']):.2f}×",
    }
    claims = [
        Claim(f"dealing by speed, second worker at {r['part']:g} of the first one's speed", r["ratio"]["median"])
        for r in results
    ]  # fmt: skip
    publish("uneven", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def measure(
    world: World, setting: Setting, arguments: argparse.Namespace, quotas: tuple[Quota, Quota]
) -> list[dict[str, Any]]:
    """On both workers, for each part of a core."""
    ours, told, quota = Ours(setting, world, mode=arguments.mode), [], quotas[world.rank]
    quota.join()
    for part in arguments.parts:
        quota.set(arguments.core * (part if world.rank else 1))
        speeds_of = {"equal": WorkerSpeeds(world, is_on=False), "by_speed": WorkerSpeeds(world, is_on=True)}
        for _ in range(LEARNING_STEPS):
            step(ours, arguments.rows, speeds_of["by_speed"], [])
        phases: dict[str, list[dict[str, float]]] = {name: [] for name in speeds_of}
        sides = {
            name: partial(step, ours, arguments.rows, worker_speeds, phases[name])
            for name, worker_speeds in speeds_of.items()
        }
        samples = interleave(sides, arguments.repeats, arguments.budget, world=world)
        told.append({"samples": samples, "phases": phases, "speeds": speeds_of["by_speed"].speeds})
        if world.rank == 0:
            say(f"{part:g}: {[f'{name} {taken.median:.2f} s' for name, taken in samples.items()]}")
    return told


def step(ours: Ours, rows: int, worker_speeds: WorkerSpeeds, into: list[dict[str, float]]) -> StepResult:
    """As trainer.train() takes one."""
    plan, train_state = ours.plan(rows), ours.train_state
    inputs = prepare_inputs(train_state, plan, worker_speeds.speeds)
    result = train_step(train_state, plan, inputs)
    worker_speeds.adopt(
        all_reduce_max(worker_speeds.of_step(plan, inputs, result), train_state.student.device, train_state.world)
    )
    into.append(result.seconds)
    return result


def joined(part: float, by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    fast = by_rank[0]
    samples, waits = fast["samples"], {}
    for name, steps in fast["phases"].items():
        steps = steps[1:]  # the first was for its memory
        waits[name] = sum(s[p] for s in steps for p in WAITING) / sum(sum(s.values()) for s in steps)
    return {
        "part": part,
        **{name: taken.told() for name, taken in samples.items()},
        "waits": waits,
        "speeds": fast["speeds"],
        "ratio": ratio(samples["equal"], samples["by_speed"]),
    }


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    parts = [r["part"] for r in results]
    for name, label in (("equal", "equal dealing"), ("by_speed", "by measured speed")):
        axes.plot(parts, [r[name]["seconds"]["median"] for r in results], marker="o", label=label)
    axes.set(
        xlabel="second worker's part of the first one's core", ylabel="seconds a step", title="uneven", ylim=(0, None)
    )


if __name__ == "__main__":
    main()
