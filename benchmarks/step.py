"""How long is one whole training step, against sentence-transformers' CachedGISTEmbedLoss?

Encode, loss, backward and optimizer of the same rows with the same models, token limits, precision and threads, in one
process and in two (one thread each; theirs with gather_across_devices=True under DDP). Ours also with the guide
cached, which theirs can't, and with every activation budget of --activation-gb: chunks whose graphs fit are encoded
once. Theirs runs with the best of --mini-batch-sizes, measured at the smallest batch. Rows have no text twice, which
is where the two losses would differ; that they agree is checked first, with dropout off.

    python benchmarks/step.py                                                          about 2 hours on 2 cores
    python benchmarks/step.py --data short --sizes 128 256 --processes 1 --repeats 3   about 3 minutes
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

from harness import (
    Claim,
    gigabytes,
    interleave,
    model_flags,
    number,
    parser,
    publish,
    ratio,
    run_group,
    say,
    seconds_of,
    spread,
    start,
)
from sides import DATA, Ours, Setting, Theirs, can_cache, setting_of

from gist_dist.core.candidates import PARTS
from gist_dist.core.collectives import World

GOALS = {"short": (4.5, 6.0), "mixed": (5.0, 7.0), "long": (2.0, 2.7)}
"""At 1,024 rows in one process: guide online, guide cached."""
OURS = ("ours", "cached")
"""How the names of our sides begin: guide online, guide cached; their activation budget follows."""


def main() -> None:
    arguments = parse()
    start(arguments)
    for data in arguments.data:
        step_on(data, arguments)


def step_on(data: str, arguments: argparse.Namespace) -> None:
    setting, origin = setting_of(arguments, data, max(arguments.sizes))
    check = losses_agree(setting, min(arguments.sizes))
    by_size = their_mini_batches(setting, min(arguments.sizes), arguments.mini_batch_sizes)
    notes = {"rows": origin, "agreement": check, "their_seconds_by_mini_batch_size": by_size}
    mine, others = (", ".join(map(number, check[side])) for side in ("ours", "theirs"))
    say(f"{origin}; loss and gradient norm of {check['rows']} rows: ours {mine}, theirs {others}")
    say(", ".join(f"theirs in mini-batches of {size}: {number(seconds)} s" for size, seconds in by_size.items()))
    best = min(by_size, key=by_size.get)
    results = []
    for processes in arguments.processes:
        threads = max(1, arguments.threads // processes)
        # A group even of one: the child has its threads from the start, and its memory to itself.
        told = run_group(measure, processes, threads, setting, data, best, arguments)[0]
        results += [result | {"data": data, "processes": processes, "threads": threads} for result in told]
    largest = {r["processes"]: r for r in results if r["ratio"]}
    claims = [claim for result in largest.values() for claim in claims_of(result)]
    document = {
        "question": "How long is one training step: encoders, loss, backward and optimizer?",
        "control": "sentence-transformers' CachedGISTEmbedLoss on the same token ids, clipping and optimizer included",
        "settings": {
            "student": arguments.student, "guide": arguments.guide, "max_tokens": arguments.max_tokens,
            "precision": "fp32", "activation_gb": arguments.activation_gb, "data": notes,
        },
        "results": results,
    }  # fmt: skip
    sides = [name for name in results[0] if name.startswith(OURS)]
    columns = {
        "processes": "processes",
        "rows": lambda r: f"{r['rows']:,}",
        **{f"{side}, s": partial(lambda side, r: spread(r[side]["seconds"]), side) for side in [*sides, "theirs"]},
        **{f"theirs ÷ {side}": partial(lambda side, r: spread(r["ratio"][side], "×"), side) for side in sides},
        "padding ours, theirs": lambda r: f"{r['padding']:.1%}, {r['their_padding']:.1%}",
        **{
            f"{side} adds GB": partial(lambda side, r: gigabytes(r[side]["added_bytes"]), side)
            for side in [*sides, "theirs"]
        },
    }
    publish(f"step_{data}", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    flags.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    flags.add_argument("--their-largest", type=int, default=1024, help="theirs is left out above")
    flags.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    budgets = "ours: gigabytes for graphs kept from the first pass; the last one is claimed"
    flags.add_argument("--activation-gb", type=float, nargs="+", default=[1.0, 8.0], help=budgets)
    flags.add_argument("--mini-batch-sizes", type=int, nargs="+", default=[32, 64, 128], help="theirs, the best of")
    flags.set_defaults(budget=300)
    return flags.parse_args()


def losses_agree(setting: Setting, n: int) -> dict[str, Any]:
    """Loss and gradient norm of the first step of either side, dropout off and a margin so that some are masked."""
    setting = replace(setting, dropout=0.0, margin=0.1)
    ours = Ours(setting)
    mine = ours.step(n)
    loss, grad_norm = Theirs(setting, ours).step(n)
    told = {"rows": n, "ours": [mine.loss, mine.grad_norm], "theirs": [loss, grad_norm]}
    told["masked"] = sum(mine.counts.get(f"masked_{part}", 0) for part in PARTS)
    assert abs(mine.loss - loss) < 1e-3 * loss and abs(mine.grad_norm - grad_norm) < 1e-2 * grad_norm, told
    assert told["masked"], "nothing was masked: a check of plain InfoNCE only"
    return told


def their_mini_batches(setting: Setting, n: int, sizes: list[int]) -> dict[int, float]:
    """Seconds of their step on n rows by mini_batch_size."""
    ours = Ours(setting)
    sides = {size: Theirs(setting, ours, mini_batch_size=size) for size in sizes}
    samples = interleave({str(size): partial(theirs.step, n) for size, theirs in sides.items()}, repeats=2)
    return {int(size): taken.median for size, taken in samples.items()}


def measure(
    world: World, setting: Setting, data: str, mini_batch_size: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All sizes, every side in turns."""
    ours = Ours(setting, world)
    modes = {"online": "ours", "cache": "cached"} if can_cache() else {"online": "ours"}
    steps = {
        f"{name} {budget:g} GB": Ours(setting, world, mode=mode, activation_gb=budget).step
        for mode, name in modes.items()
        for budget in arguments.activation_gb
    }
    theirs = Theirs(setting, ours, world, mini_batch_size)
    results = []
    for n in arguments.sizes:
        sides = steps | ({"theirs": theirs.step} if n <= arguments.their_largest else {})
        cold = list(sides) if n > min(arguments.sizes) else []  # the smallest batch has warmed all up
        calls = {name: partial(step, n) for name, step in sides.items()}
        samples = interleave(calls, arguments.repeats, arguments.budget, cold, world)
        plan = ours.plan(n)
        result = {"rows": n, **{name: taken.told() for name, taken in samples.items()}}
        result["padding"] = 1 - plan.num_tokens / plan.padded_tokens
        result["ratio"] = {}
        if "theirs" in samples:
            result["their_padding"] = 1 - theirs.num_tokens(n) / theirs.padded_tokens(n)
            result["ratio"] = {name: ratio(samples["theirs"], samples[name]) for name in steps}
        results.append(result)
        if world.rank == 0:
            say(f"{data}, {world.size} × {n:,} rows: {seconds_of(result)}")
    return results


def claims_of(result: dict[str, Any]) -> list[Claim]:
    """At the largest batch that both sides ran; the goals are for the largest activation budget."""
    found = []
    for side, taken in result["ratio"].items():
        name, budget = side.split(" ", 1)
        of_mode = [other for other in result["ratio"] if other.startswith(name)]
        goal = GOALS[result["data"]][name == "cached"] if side == of_mode[-1] else None
        has_goal = result["rows"] == 1024 and result["processes"] == 1
        processes = f"{result['processes']} process{'es' * (result['processes'] > 1)}"
        guide = "cached" if name == "cached" else "online"
        what = f"step, {result['data']}, {result['rows']:,} rows, {processes}, guide {guide}, graphs {budget}"
        found.append(Claim(f"{what}: theirs ÷ ours", taken["median"], goal if has_goal else None))
    return found


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    drawn = [r for r in results if r["processes"] == results[0]["processes"] and r["ratio"]]
    for side in drawn[0]["ratio"] if drawn else ():
        style = "--s" if side.startswith("cached") else "-o"
        axes.plot([r["rows"] for r in drawn], [r["ratio"][side]["median"] for r in drawn], style, label=side)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows of the batch", ylabel="times faster", title="whole step against CachedGISTEmbedLoss")


if __name__ == "__main__":
    main()
