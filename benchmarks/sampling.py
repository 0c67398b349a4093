"""How long does it take to plan an epoch's batches?

    python benchmarks/sampling.py [--rows 1000000 5000000]

Random rows of one source, one thread: texts that nobody shares, a tenth of copies, and the worst cases, in which nearly
every row has a text that its batch has already. Seconds are of processor time; `start` is paid once a run, `epoch` for
every epoch, in a thread of its own while the epoch before it is trained. Writes benchmarks/results/sampling.json and
prints a Markdown table.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from gist_dist.data.sampler import Sampler
from gist_dist.recipe import parse_config
from gist_dist.runs.folder import describe_environment

HERE = Path(__file__).parent
CASES = {
    "all texts distinct": ("own", "own", 4096),
    "a tenth of the positives are copies": ("own", "copies", 4096),
    "one positive for all": ("own", 1, 4096),
    "two positives": ("own", 2, 4096),
    "40 positives": ("own", 40, 256),
    "300 positives, 256 fill a batch": ("own", 300, 256),
    "4,200 positives, 4,096 fill a batch": ("own", 4200, 4096),
    "every anchor 50 times": (50, "own", 4096),
    "every anchor and every positive 50 times": (50, -50, 4096),
}
"""Anchors, positives (a number: so many distinct ones, or so many copies of each anchor), rows of a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    arguments = parser.parse_args()
    results = []
    print("| rows | texts | start s | epoch s | rows moved | texts repeated |\n|---|---|---|---|---|---|")
    for num_rows in arguments.rows:
        for name, (anchors, positives, size) in CASES.items():
            result = {"rows": num_rows, "texts": name, "batch": size} | measure(num_rows, anchors, positives, size)
            results.append(result)
            print(
                f"| {num_rows:,} | {name} (batches of {size:,}) | {result['start_s']:.1f} | {result['epoch_s']:.1f} | "
                f"{result['rows_moved']:,} | {result['duplicates_admitted']:,} |",
                flush=True,
            )
    document = {"results": results, "environment": describe_environment(), "machine": platform.machine()}
    (HERE / "results" / "sampling.json").write_text(json.dumps(document, indent=1) + "\n")


def measure(num_rows: int, anchors: str | int, positives: str | int, size: int) -> dict:
    rng = np.random.default_rng(0)
    own = np.arange(num_rows)
    drawn = {"own": own, "copies": np.where(rng.random(num_rows) < 0.1, rng.integers(0, num_rows, num_rows), own)}
    corpus = SimpleNamespace(
        anchors=own if anchors == "own" else rng.permutation(num_rows) // anchors,
        positives=num_rows + texts(positives, drawn, num_rows, rng),
        identity=np.arange(2 * num_rows),
        num_rows=num_rows,
        num_own_negatives=np.zeros(num_rows, np.int64),
        own_negatives_of=lambda rows: np.empty(0, np.int64),
        source=np.zeros(num_rows, np.int32),
        manifest={"sources": [{"name": "random"}]},
        recipe_sources=[0],
    )
    source = {"path": "random"}
    recipe = {"name": "sampling", "student": {"model": "none"}, "data": {"sources": [source]}}
    config = parse_config(recipe | {"batch": {"global_size": size}})
    started = time.process_time()
    sampler = Sampler(corpus, config)
    sampler.shared_texts  # noqa: B018
    ready = time.process_time()
    epoch = sampler.epoch(0)
    return {
        "start_s": ready - started,
        "epoch_s": time.process_time() - ready,
        "rows_moved": epoch.rows_moved,
        "duplicates_admitted": epoch.duplicates_admitted,
    }


def texts(kind: str | int, drawn: dict[str, np.ndarray], num_rows: int, rng: np.random.Generator) -> np.ndarray:
    if kind in drawn:
        return drawn[kind]
    return rng.integers(0, kind, num_rows) if kind > 0 else rng.permutation(num_rows) // -kind


if __name__ == "__main__":
    main()
