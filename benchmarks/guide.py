"""What does the guide cost a step: not at all, encoding within it, or read from the cache?

The same step on the same rows without a guide, with the guide's embeddings cached, and with the guide online, for
guides of several sizes (random weights will do: only time is measured). Filling the cache is timed apart; it happens
once for a corpus.

    python benchmarks/guide.py                                          about 15 minutes on 2 cores
    python benchmarks/guide.py --guides minilm --rows 256 --repeats 3   about 2 minutes
"""

import argparse
import time
from functools import partial
from typing import Any

from harness import Claim, interleave, model_flags, number, parser, publish, ratio, say, seconds_of, spread, start
from sides import DATA, Ours, can_cache, setting_of


def main() -> None:
    flags = parser(__doc__)
    model_flags(flags)
    flags.add_argument("--guides", nargs="+", default=["minilm", "random:minilm-l12", "random:bge-base"])
    flags.add_argument("--data", nargs="+", choices=list(DATA), default=["short", "mixed"])
    flags.add_argument("--rows", type=int, default=512)
    arguments = flags.parse_args()
    start(arguments)
    results = [measure(data, guide, arguments) for data in arguments.data for guide in arguments.guides]
    claims = []
    for result in results:
        for mode, most in (("cached", 1.05), ("online", None)):
            if mode in result:
                what = f"step with {result['guide']} {mode}, {result['data']}, {result['rows']:,} rows, ÷ no guide"
                claims.append(Claim(what, result[f"{mode}_ratio"]["median"], at_most=most))
    document = {
        "question": "What does the guide add to a step?",
        "control": "the same step without a guide, in turns with the others",
        "settings": {"student": arguments.student, "max_tokens": arguments.max_tokens, "precision": "fp32"},
        "results": results,
    }
    columns = {
        "data": "data",
        "guide": "guide",
        "rows": "rows",
        "no guide s": lambda r: spread(r["none"]["seconds"]),
        "cached s": lambda r: spread(r["cached"]["seconds"]),
        "online s": lambda r: spread(r["online"]["seconds"]),
        "cached ÷ none": lambda r: spread(r["cached_ratio"], "×"),
        "online ÷ none": lambda r: spread(r["online_ratio"], "×"),
        "filling the cache s": lambda r: number(r["fill_seconds"]),
    }
    publish("guide", document, columns, claims, lambda axes: draw(axes, results), arguments.results)


def measure(data: str, guide: str, arguments: argparse.Namespace) -> dict[str, Any]:
    arguments.guide = guide
    setting, _ = setting_of(arguments, data, arguments.rows)
    result: dict[str, Any] = {"data": data, "guide": guide, "rows": arguments.rows}
    sides = {"none": Ours(setting, mode="none"), "online": Ours(setting)}
    if can_cache():
        started = time.perf_counter()
        sides["cached"] = Ours(setting, mode="cache")
        result["fill_seconds"] = time.perf_counter() - started  # loading the models again included
    calls = {name: partial(side.step, arguments.rows) for name, side in sides.items()}
    samples = interleave(calls, arguments.repeats, arguments.budget)
    result |= {name: taken.told() for name, taken in samples.items()}
    for name in samples.keys() - {"none"}:
        result[f"{name}_ratio"] = ratio(samples[name], samples["none"])
    say(f"{data}, {guide}: {seconds_of(result)}")
    return result


def draw(axes: Any, results: list[dict[str, Any]]) -> None:
    names = [f"{r['data']}\n{r['guide']}" for r in results]
    for place, mode in enumerate(("none", "cached", "online")):
        heights = [r[mode]["seconds"]["median"] if mode in r else 0 for r in results]
        axes.bar([x + 0.27 * (place - 1) for x in range(len(results))], heights, 0.25, label=mode)
    axes.set_xticks(range(len(results)), names, fontsize="x-small")
    axes.set(ylabel="seconds a step", title="the guide's share of a step")


if __name__ == "__main__":
    main()
