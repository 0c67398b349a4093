"""What does a larger global batch cost, and what is it worth?

Two parts, chosen with --parts:

steps     One training step at each global batch, each size in a process of its own: rows/s, peak memory, time by phase.
quality   Equal numbers of rows seen (one pass over the same rows) at every batch size, with and without the guide: MTEB
          after training. Every run is a run of gist_dist on Ray, under --work, with its report; a run that has finished
          is not repeated, and one that was stopped goes on. The learning rate grows with the square root of the batch.
          Needs the data pack: sources in --data-folder, tasks in --tasks-folder.

    python benchmarks/batch_scaling.py                       about 2.5 hours on 2 cores (steps 60 minutes, quality 90)
    python benchmarks/batch_scaling.py --steps-sizes 32 512 4096 --sizes 32 512 2048 --rows 6144   about 10 minutes
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from harness import (
    SHARED,
    Claim,
    gigabytes,
    interleave,
    model_flags,
    number,
    parser,
    publish,
    say,
    short,
    spread,
    start,
)
from sides import Ours, can_cache, find_model, setting_of

SOURCES = ("qqp_duplicates", "multi30k_captions", "squad_question_sentence")
"""Short texts, where other rows of a source often are false negatives."""


def main() -> None:
    arguments = parse()
    start(arguments)
    if arguments.one:
        print(json.dumps(one_size(arguments.one, arguments)))
        return
    if "steps" in arguments.parts:
        steps(arguments)
    if "quality" in arguments.parts:
        quality(arguments)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    model_flags(flags)
    flags.set_defaults(student="minilm-l2", max_tokens=64, repeats=3, budget=120)
    flags.add_argument("--parts", nargs="+", choices=["steps", "quality"], default=["steps", "quality"])
    flags.add_argument("--steps-sizes", type=int, nargs="+", default=[32, 128, 512, 2048, 8192, 32768, 65536])
    flags.add_argument("--mode", choices=["online", "cache", "none"], help="of the steps' guide; default cache")
    flags.add_argument("--one", type=int, help="measure one size in this process and print JSON")
    flags.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512, 2048, 8192], help="of the quality runs")
    flags.add_argument("--rows", type=int, default=49152, help="that every quality run sees; a multiple of its sizes")
    flags.add_argument("--sources", nargs="+", default=list(SOURCES), help="files in the data folder")
    flags.add_argument("--tasks", nargs="+", default=["STSBenchmark", "SICK-R", "Banking77Classification"])
    flags.add_argument("--tasks-folder", type=Path, default=SHARED / "mteb")
    flags.add_argument("--learning-rate", type=float, default=2e-4, help="at a batch of 256")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--address", help="of a Ray cluster; by default a local Ray")
    arguments = flags.parse_args()
    arguments.mode = arguments.mode or ("cache" if can_cache() else "online")
    if any(arguments.rows % size for size in arguments.sizes):
        flags.error(f"--rows {arguments.rows} is not a multiple of all --sizes {arguments.sizes}")
    return arguments


# ---- steps ---------------------------------------------------------------------------------------


def steps(arguments: argparse.Namespace) -> None:
    results = []
    for size in arguments.steps_sizes:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        told = results[-1]
        say(f"{size:,} rows: {spread(told['step']['seconds'], ' s')}, {gigabytes(told['step']['peak_bytes'])} GB")
    fastest, largest = max(r["rows_per_second"] for r in results), results[-1]
    claims = [
        Claim(f"rows/s at {largest['rows']:,} rows ÷ at the fastest size", largest["rows_per_second"] / fastest),
        Claim(f"peak memory of a step of {largest['rows']:,} rows", largest["step"]["peak_bytes"] / 1e9, unit=" GB"),
    ]
    phases = list(largest["phases"])
    document = {
        "question": "How do speed, memory and the phases of a step change with the global batch?",
        "control": "the same student, guide, lengths of texts and worker at every size, each in a process of its own",
        "settings": {
            "student": arguments.student,
            "guide": arguments.guide,
            "mode": arguments.mode,
            "max_tokens": arguments.max_tokens,
            "rows": largest["origin"],
        },
        "results": results,
    }
    columns = {
        "rows": lambda r: f"{r['rows']:,}",
        "texts": lambda r: f"{r['texts']:,}",
        "step s": lambda r: spread(r["step"]["seconds"]),
        "rows/s": lambda r: number(r["rows_per_second"]),
        "peak GB": lambda r: gigabytes(r["step"]["peak_bytes"]),
        "before the step GB": lambda r: gigabytes(r["step"]["peak_bytes"] - r["step"]["added_bytes"]),
        **{f"{phase} s": partial(lambda phase, r: number(r["phases"][phase]), phase) for phase in phases},
    }
    publish("batch_scaling", document, columns, claims, lambda axes: draw_steps(axes, results), arguments.results)


def one_size(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    # All sizes take their rows, and the guide's embeddings, from one corpus.
    setting, origin = setting_of(arguments, "short", max(arguments.steps_sizes))
    ours = Ours(setting, mode=arguments.mode)
    ours.step(min(32, size))
    told = []
    taken = interleave(
        {"step": lambda: told.append(ours.step(size))}, arguments.repeats, arguments.budget, ["step"] * (size > 2048)
    )["step"]
    return {
        "rows": size,
        "origin": origin,
        "texts": len(ours.plan(size).texts),
        "step": taken.told(),
        "rows_per_second": size / taken.median,
        "phases": {phase: median(result.seconds[phase] for result in told) for phase in told[0].seconds},
    }


def draw_steps(axes: Any, results: list[dict[str, Any]]) -> None:
    sizes = [r["rows"] for r in results]
    bottom = [0.0] * len(sizes)
    for phase in results[0]["phases"]:
        heights = [1000 * r["phases"][phase] / r["rows"] for r in results]
        if max(heights) > 0.01 * max(1000 / r["rows_per_second"] for r in results):
            axes.bar(range(len(sizes)), heights, bottom=bottom, label=phase)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set(xlabel="rows of the global batch", ylabel="milliseconds a row", title="time by phase")


# ---- quality -------------------------------------------------------------------------------------


def quality(arguments: argparse.Namespace) -> None:
    from gist_dist.on_ray.cluster.connect import connected
    from gist_dist.on_ray.driver import train_and_evaluate
    from gist_dist.recipe import parse_config

    if not (arguments.data_folder.is_dir() and arguments.tasks_folder.is_dir()):
        sys.exit(
            f"quality needs {arguments.data_folder} and {arguments.tasks_folder}: set --data-folder, --tasks-folder"
        )
    runs = [(s, guided, seed) for seed in arguments.seeds for s in arguments.sizes for guided in (True, False)]
    configs = [parse_config(recipe(arguments, *run, is_first=run == runs[0])) for run in runs]
    with connected(configs[0].cluster):  # one Ray for all runs
        for config in configs:
            if is_finished(config.run_dir):
                say(f"{config.name}: finished before")
            else:
                say(f"{config.name}: {config.optim.steps} steps of {config.batch.global_size}")
                train_and_evaluate(config)
    reports = [json.loads((config.run_dir / "report.json").read_text()) for config in configs]
    scores = {task["task"]: task for task in reports[0]["tasks"]}
    results = [
        result_of(*run, config.run_dir, report) for run, config, report in zip(runs, configs, reports, strict=True)
    ]
    document = {
        "question": "At equal numbers of rows seen, how good is the student after training with a larger global batch?",
        "control": "the same rows, seeds and schedule without the guide, and at the other batch sizes",
        "settings": {
            "student": arguments.student,
            "guide": arguments.guide,
            "rows": arguments.rows,
            "sources": arguments.sources,
            "learning_rate": f"{arguments.learning_rate} × √(batch / 256)",
            "untrained": {task: row["before"] for task, row in scores.items()},
            "guide_scores": {task: row["guide"] for task, row in scores.items()},
        },
        "results": results,
    }
    columns = {
        "batch": lambda r: f"{r['batch']:,}",
        "guide": lambda r: "yes" if r["guided"] else "no",
        "seed": "seed",
        "steps": "steps",
        **{task: partial(lambda task, r: f"{r['scores'][task]:.2f}", task) for task in arguments.tasks},
        "mean": lambda r: f"{r['mean']:.2f}",
        "masked": lambda r: f"{r['masked_fraction']:.2%}",
        "rows/s": lambda r: number(r["rows_per_second"]),
        "peak GB a worker": lambda r: gigabytes(r["peak_memory_bytes"]),
    }
    draw = partial(draw_quality, results=results, untrained=fmean(row["before"] for row in scores.values()))
    publish("batch_quality", document, columns, quality_claims(results), draw, arguments.results)


def recipe(arguments: argparse.Namespace, size: int, guided: bool, seed: int, is_first: bool) -> dict[str, Any]:
    """Named so that another setting is another folder: what has finished there can be trusted."""
    each = math.ceil(arguments.rows / len(arguments.sources))
    student, guide = (str(find_model(name, arguments.work)) for name in (arguments.student, arguments.guide))
    tree: dict[str, Any] = {
        "student": {"model": student, "max_tokens": arguments.max_tokens},
        "data": {
            "root": str(arguments.data_folder.absolute()),
            "sources": [{"path": f"{name}.parquet", "max_rows": each} for name in arguments.sources],
        },
        "optim": {"steps": arguments.rows // size, "learning_rate": arguments.learning_rate * math.sqrt(size / 256)},
        "batch": {"global_size": size},
        "seed": seed,
    }
    folder = arguments.work / "quality" / _digest([student, guide, tree["data"], arguments.max_tokens, arguments.rows])
    if guided:
        mode = {"mode": "cache"} if can_cache() else {}
        tree["guide"] = {"model": guide, "max_tokens": arguments.max_tokens, **mode}
    return tree | {
        "name": f"batch-{size}-{'guided' if guided else 'unguided'}-{seed}-{_digest(tree['optim'])}",
        "output_dir": str(folder),
        "checkpoint": {"every_steps": 100},
        "evaluate": {
            "tasks": arguments.tasks,
            "local_tasks": str(arguments.tasks_folder.absolute()),
            "baseline": is_first,
            "guide": is_first,
        },
        "cluster": {"num_workers": arguments.workers, "address": arguments.address},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def is_finished(run_dir: Path) -> bool:
    """Trained and, as far as it could be, evaluated."""
    if not (run_dir / "report.json").exists():
        return False
    environment = yaml.safe_load((run_dir / "config.yaml").read_text())["environment"]
    return bool(environment["finished"]) and not json.loads((run_dir / "report.json").read_text())["failures"]


def result_of(size: int, guided: bool, seed: int, run_dir: Path, report: dict[str, Any]) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = {task["task"]: task["after"] for task in report["tasks"]}
    steady = lines[1:] or lines  # the first step warms up
    return {
        "batch": size,
        "guided": guided,
        "seed": seed,
        "steps": len(lines),
        "rows": sum(line["rows"] for line in lines),
        "learning_rate": max(line["learning_rate"] for line in lines),
        "scores": scores,
        "mean": fmean(scores.values()),
        "masked_fraction": fmean(line["masked_fraction"] for line in lines),
        "rows_per_second": sum(line["rows"] for line in steady) / sum(line["seconds"]["step"] for line in steady),
        "seconds": {phase: sum(line["seconds"].get(phase, 0) for line in lines) for phase in lines[0]["seconds"]},
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "commit": short(report["environment"].get("git_commit")),
    }


def quality_claims(results: list[dict[str, Any]]) -> list[Claim]:
    """What the largest batch is worth, and what the guide is."""
    mean = {(r["batch"], r["guided"], r["seed"]): r["mean"] for r in results}
    sizes, seeds = sorted({r["batch"] for r in results}), sorted({r["seed"] for r in results})
    best = max(sizes, key=lambda size: fmean(mean[size, True, seed] for seed in seeds))
    grown = fmean(mean[best, True, seed] - mean[sizes[0], True, seed] for seed in seeds)
    guide = fmean(mean[best, True, seed] - mean[best, False, seed] for seed in seeds)
    return [
        Claim(f"mean MTEB score at the best batch ({best:,}) − at {sizes[0]:,} rows, guided", grown, unit=" points"),
        Claim(f"mean MTEB score with the guide − without it, at {best:,} rows", guide, unit=" points"),
    ]


def draw_quality(axes: Any, results: list[dict[str, Any]], untrained: float) -> None:
    for guided, label in ((True, "guided"), (False, "no guide")):
        sizes = sorted({r["batch"] for r in results})
        means = [fmean(r["mean"] for r in results if r["batch"] == s and r["guided"] == guided) for s in sizes]
        axes.plot(sizes, means, marker="o", label=label)
    axes.axhline(untrained, color="gray", linewidth=1, linestyle=":", label="untrained")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows of the global batch", ylabel="mean of the tasks' scores", title="equal numbers of rows seen")


if __name__ == "__main__":
    main()
