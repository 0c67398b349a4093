"""How much faster are n workers than one, and where does the rest go?

In one gloo group with one thread a process: rank 0 takes a step alone while the others wait, then all take the same
step together, in turns. Shares of the joint step: communication (gather, scatter, sum of gradients, waiting for the
slowest included) and imbalance (slowest worker's encoding over the mean).

    python benchmarks/workers.py                                  about 20 minutes on 2 cores
    python benchmarks/workers.py --data short --rows 256          about 3 minutes
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from harness import Claim, interleave, model_flags, parser, publish, ratio, run_group, say, seconds_of, spread, start
from sides import DATA, Ours, Setting, can_cache, setting_of

from gist_dist.core.collectives import World

ENCODING = ("encode", "guide", "backward")
COMMUNICATION = ("gather", "scatter", "reduce")


def main() -> None:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--workers", type=int, nargs="+", default=[2])
    flags.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    flags.add_argument("--rows", type=int, nargs="+", default=[512])
    flags.add_argument("--mode", choices=["online", "cache", "none"], default="online", help="the guide")
    arguments = flags.parse_args()
    start(arguments)
    if arguments.mode == "cache" and not can_cache():
        raise SystemExit("this gist_dist has no guide cache")
    results, claims = [], []
    for data in arguments.data:
        setting, _ = setting_of(arguments, data, max(arguments.rows))
        for workers in arguments.workers:
            by_rank = run_group(measure, workers, 1, setting, arguments)
            for rows, told in zip(arguments.rows, zip(*by_rank, strict=True), strict=True):
                results.append({"data": data, "workers": workers, "rows": rows, **joined(told)})
                result = results[-1]
                say(f"{data}, {workers} workers, {rows:,} rows: {seconds_of(result)}")
                what = f"{workers} workers against one, {data}, {rows:,} rows"
                claims.append(Claim(what, result["speedup"]["median"], at_least=1.7 if workers == 2 else None))
    document = {
        "question": "How much faster are n workers than one, at the same global batch, with one thread each?",
        "control": "one of them alone on the same batch, in turns with all together",
        "settings": {"student": arguments.student, "guide": arguments.guide, "mode": arguments.mode},
        "results": results,
    }
    columns = {
        "data": "data",
        "rows": lambda r: f"{r['rows']:,}",
        "workers": "workers",
        "one s": lambda r: spread(r["one"]["seconds"]),
        "all s": lambda r: spread(r["all"]["seconds"]),
        "speed-up": lambda r: spread(r["speedup"], "×"),
        "gather": lambda r: f"{r['shares']['gather']:.1%}",
        "scatter": lambda r: f"{r['shares']['scatter']:.1%}",
        "reduce": lambda r: f"{r['shares']['reduce']:.1%}",
        "imbalance": lambda r: f"{r['imbalance']:.1%}",
        "encoding slower by": lambda r: f"{r['encoding_slowdown'] - 1:.1%}",
    }
    publish("workers", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def measure(world: World, setting: Setting, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    alone = Ours(setting, mode=arguments.mode) if world.rank == 0 else None
    together = Ours(setting, world, mode=arguments.mode)
    results = []
    for rows in arguments.rows:
        phases: dict[str, list[dict[str, float]]] = {"one": [], "all": []}
        sides = {
            "one": partial(_recorded, alone.step, rows, phases["one"]) if alone else _wait,
            "all": partial(_recorded, together.step, rows, phases["all"]),
        }
        samples = interleave(sides, arguments.repeats, arguments.budget, world=world)
        results.append({"samples": samples, "phases": phases})
    return results


def _recorded(step: Callable[[int], Any], rows: int, into: list[dict[str, float]]) -> None:
    into.append(step(rows).seconds)


def _wait() -> None:
    """The barrier after every call does it."""


def joined(by_rank: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """What all ranks measured, as one result."""
    samples = by_rank[0]["samples"]
    rounds = range(1, len(by_rank[0]["phases"]["all"]))  # the first was for warming up
    steps = [[told["phases"]["all"][i] for told in by_rank] for i in rounds]
    encoding = [[sum(seconds[p] for p in ENCODING) for seconds in step] for step in steps]
    whole = sum(sum(seconds.values()) for step in steps for seconds in step)
    alone = [sum(seconds[p] for p in ENCODING) for seconds in by_rank[0]["phases"]["one"][1:]]
    return {
        "one": samples["one"].told(),
        "all": samples["all"].told(),
        "speedup": ratio(samples["one"], samples["all"]),
        "shares": {p: sum(seconds[p] for step in steps for seconds in step) / whole for p in COMMUNICATION},
        "imbalance": sum(max(e) - sum(e) / len(e) for e in encoding) / (whole / len(by_rank)),
        # Cores that share caches and memory are slower together than one alone; no scheduling gets that back.
        "encoding_slowdown": sum(map(sum, encoding)) / sum(alone),
    }


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    for (data, rows), told in _grouped(results).items():
        points = [(1, 1.0), *((r["workers"], r["speedup"]["median"]) for r in told)]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{data}, {rows:,} rows")
    most = max(r["workers"] for r in results)
    axes.plot([1, most], [1, most], color="gray", linewidth=1, linestyle=":", label="ideal")
    axes.set(xlabel="workers", ylabel="times faster than one", title="workers", xticks=range(1, most + 1))


def _grouped(results: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["data"], result["rows"]), []).append(result)
    return groups


if __name__ == "__main__":
    main()
