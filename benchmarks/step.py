"""How long is one whole training step, against sentence-transformers' CachedGISTEmbedLoss?

Encode, loss, backward and optimizer of the same rows with the same models, token limits, precision and threads, in one
process and in two (one thread each; theirs with gather_across_devices=True under DDP). Ours also with the guide
cached, which theirs can't. Theirs runs with the best of --mini-batch-sizes, measured at the smallest batch. Rows have
no text twice, which is where the two losses would differ; that they agree is checked first, with dropout off.

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

from gist_dist.collectives import World

GOALS = {"short": (4.5, 6.0), "mixed": (5.0, 7.0), "long": (2.0, 2.7)}
"""At 1,024 rows in one process: guide online, guide cached."""


def main() -> None:
    arguments = parse()
    start(arguments)
    results, notes = [], {}
    for data in arguments.data:
        setting, origin = setting_of(arguments, data, max(arguments.sizes))
        check = losses_agree(setting, min(arguments.sizes))
        by_size = their_mini_batches(setting, min(arguments.sizes), arguments.mini_batch_sizes)
        notes[data] = {"rows": origin, "agreement": check, "their_seconds_by_mini_batch_size": by_size}
        say(f"{data}: {notes[data]}")
        best = min(by_size, key=by_size.get)
        for processes in arguments.processes:
            threads = max(1, arguments.threads // processes)
            # A group even of one: the child has its threads from the start, and its memory to itself.
            told = run_group(measure, processes, threads, setting, data, best, arguments)[0]
            results += [result | {"data": data, "processes": processes, "threads": threads} for result in told]
    largest = {(r["data"], r["processes"]): r for r in results if "ratio" in r}
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
    columns = {
        "data": "data",
        "processes": "processes",
        "rows": lambda r: f"{r['rows']:,}",
        "ours s": lambda r: spread(r["ours"]["seconds"]),
        "guide cached s": lambda r: spread(r["cached"]["seconds"]),
        "theirs s": lambda r: spread(r["theirs"]["seconds"]),
        "theirs ÷ ours": lambda r: spread(r["ratio"], "×"),
        "theirs ÷ cached": lambda r: spread(r["ratio_cached"], "×"),
        "padding ours, theirs": lambda r: f"{r['padding']:.1%}, {r['their_padding']:.1%}",
        "adds GB ours, theirs": lambda r: (
            f"{gigabytes(r['ours']['added_bytes'])}, {gigabytes(r['theirs']['added_bytes'])}"
        ),
    }
    publish("step", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    flags.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    flags.add_argument("--their-largest", type=int, default=1024, help="theirs is left out above")
    flags.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    flags.add_argument("--activation-gb", type=float, default=1.0, help="ours: graphs kept from the first pass")
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
    told["masked"] = sum(count for name, count in mine.counts.items() if name.startswith("masked_"))
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
    ours = Ours(setting, world, activation_gb=arguments.activation_gb)
    steps = {"ours": ours.step}
    if can_cache():
        steps["cached"] = Ours(setting, world, mode="cache", activation_gb=arguments.activation_gb).step
    theirs = Theirs(setting, ours, world, mini_batch_size)
    results = []
    for n in arguments.sizes:
        sides = steps | ({"theirs": theirs.step} if n <= arguments.their_largest else {})
        cold = ["theirs"] if n > min(arguments.sizes) else []
        calls = {name: partial(step, n) for name, step in sides.items()}
        samples = interleave(calls, arguments.repeats, arguments.budget, cold, world)
        plan = ours.plan(n)
        result = {"rows": n, **{name: taken.told() for name, taken in samples.items()}}
        result["padding"] = 1 - plan.num_tokens / plan.padded_tokens
        if "theirs" in samples:
            result["their_padding"] = 1 - theirs.num_tokens(n) / theirs.padded_tokens(n)
            result["ratio"] = ratio(samples["theirs"], samples["ours"])
            if "cached" in samples:
                result["ratio_cached"] = ratio(samples["theirs"], samples["cached"])
        results.append(result)
        if world.rank == 0:
            say(f"{data}, {world.size} × {n:,} rows: {seconds_of(result)}")
    return results


def claims_of(result: dict[str, Any]) -> list[Claim]:
    """At the largest batch that both sides ran."""
    found = []
    for key, goal, guide in (("ratio", 0, "online"), ("ratio_cached", 1, "cached")):
        if key in result:
            has_goal = result["rows"] == 1024 and result["processes"] == 1
            processes = f"{result['processes']} process{'es' * (result['processes'] > 1)}"
            what = f"step, {result['data']}, {result['rows']:,} rows, {processes}, guide {guide}: theirs ÷ ours"
            found.append(Claim(what, result[key]["median"], GOALS[result["data"]][goal] if has_goal else None))
    return found


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    for data in dict.fromkeys(r["data"] for r in results):
        for key, style in (("ratio", "-o"), ("ratio_cached", "--s")):
            drawn = [r for r in results if r["data"] == data and r["processes"] == 1 and key in r]
            label = f"{data}{', guide cached' if key == 'ratio_cached' else ''}"
            if drawn:
                axes.plot([r["rows"] for r in drawn], [r[key]["median"] for r in drawn], style, label=label)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows of the batch", ylabel="times faster", title="whole step against CachedGISTEmbedLoss")


if __name__ == "__main__":
    main()
