"""How long do hard negatives take, and how much memory, beside sentence-transformers' mine_hard_negatives?

    python benchmarks/mining.py --model FOLDER [--data FILE.parquet] [--rows 20000] [--negatives 3] [--margin 0.05]

The same pairs, model and options (a relative margin), one thread each, every stage in a process of its own: embedding,
the result of which is kept on disk (the guide cache; cache_folder), and then the search that reads it. Peak memory is
the process's resident set, in brackets what was there before the stage (imports, data). CPU seconds are the process's
own, which other work on the machine hardly changes. Writes benchmarks/results/mining.json and prints a Markdown table.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

HERE = Path(__file__).parent
STAGES = ("gist_dist embed", "sentence-transformers embed", "gist_dist search", "sentence-transformers search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a SentenceTransformer without prompts")
    parser.add_argument("--data", default=str(HERE.parent.parent / "shared/data/train/squad_question_sentence.parquet"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--negatives", type=int, default=3)
    parser.add_argument("--margin", type=float, default=0.05)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        measure = ours if arguments.stage.startswith("gist_dist") else theirs
        print(json.dumps(measure(arguments)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--folder", folder]
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results[stage] = json.loads(done.stdout.splitlines()[-1])
        agreement = compare(Path(folder))
    print("| stage | seconds | CPU seconds | peak GB (before) |\n|---|---|---|---|")
    for stage, result in results.items():
        gigabytes = f"{result['peak_bytes'] / 1e9:.2f} ({result['before_bytes'] / 1e9:.2f})"
        print(f"| {stage} | {result['seconds']:.1f} | {result['cpu_seconds']:.1f} | {gigabytes} |")
    print(agreement)
    from gist_dist.runs.folder import describe_environment

    asked = {name: getattr(arguments, name) for name in ("rows", "negatives", "margin")}
    asked |= {"model": Path(arguments.model).name, "data": Path(arguments.data).name}
    document = {"asked": asked, "results": results, "agreement": agreement}
    document |= {"environment": describe_environment(), "machine": platform.machine()}
    (HERE / "results" / "mining.json").write_text(json.dumps(document, indent=1) + "\n")


def pairs(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    table = pq.read_table(arguments.data).slice(0, arguments.rows)
    return table["anchor"].to_pylist(), table["positive"].to_pylist()


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """In one process and without Ray: what a Ray task does, block after block."""
    import torch

    from gist_dist.data.corpus import prepare
    from gist_dist.data.mining import MineOptions, mine_block, plan_corpus_search
    from gist_dist.models.encoder import Guide, Student
    from gist_dist.models.guide_cache import fill, open_guide_cache
    from gist_dist.recipe import parse_config
    from gist_dist.training.metrics import peak_memory_bytes

    cpu = torch.device("cpu")
    anchors, positives = pairs(arguments)
    rows = Path(arguments.folder) / "rows.parquet"
    if not rows.exists():
        import pyarrow as pa

        pq.write_table(pa.table({"anchor": anchors, "positive": positives}), rows)
    config = parse_config(
        {
            "name": "mining",
            "output_dir": arguments.folder,
            "student": {"model": arguments.model},
            "guide": {"model": arguments.model},
            "data": {"sources": [{"path": str(rows)}]},
        }
    )
    student, guide = Student(config.student), Guide(config.guide)
    before, started = peak_memory_bytes(cpu), clocks()
    corpus = prepare(config, student, guide, progress=lambda line: None)
    cache = open_guide_cache(config, guide)
    if "embed" in arguments.stage:
        texts = corpus.texts_in_use
        inputs = (lambda chosen: corpus.guide_tokens(texts[chosen]), corpus.guide_lengths[texts])
        fill(cache, corpus.guide_keys[texts], *inputs, guide, config.batch.tokens_at_once, progress=lambda line: None)
    else:
        options = MineOptions(negatives=arguments.negatives, relative_margin=arguments.margin)
        search = plan_corpus_search(corpus, options)
        mined = {}
        for block in search.blocks():
            found = mine_block(search, block, lambda t: cache.embeddings(cache.find(corpus.guide_keys[t])), options, 0)
            for anchor, texts in zip(search.anchors[block].tolist(), found.texts, strict=True):
                mined[corpus.text(anchor)] = [corpus.text(text) for text in texts.tolist() if text >= 0]
        write(arguments, "ours", mined)
    return {**clocks(started), "peak_bytes": peak_memory_bytes(cpu), "before_bytes": before}


def theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    from gist_dist.training.metrics import peak_memory_bytes

    cpu = torch.device("cpu")
    anchors, positives = pairs(arguments)
    dataset = Dataset.from_dict({"anchor": anchors, "positive": positives})
    model = SentenceTransformer(arguments.model, device="cpu")
    calls: list[dict[str, Any]] = []
    before, started = peak_memory_bytes(cpu), clocks()
    if "embed" in arguments.stage:  # timed alone; the search stage finds what mine_hard_negatives keeps
        for name in ("encode_query", "encode_document"):
            setattr(model, name, watched(getattr(model, name), calls))
    mined = mine_hard_negatives(
        dataset, model, num_negatives=arguments.negatives, relative_margin=arguments.margin, batch_size=64,
        cache_folder=arguments.folder, output_format="labeled-list", verbose=False,
    )  # fmt: skip
    if "embed" in arguments.stage:
        spent = {name: sum(call[name] for call in calls) for name in ("seconds", "cpu_seconds")}
        return {**spent, "peak_bytes": calls[-1]["peak_bytes"], "before_bytes": before}
    write(arguments, "theirs", {row["anchor"]: row["positive"][1:] for row in mined})
    return {**clocks(started), "peak_bytes": peak_memory_bytes(cpu), "before_bytes": before}


def watched(function: Any, calls: list[dict[str, Any]]) -> Any:
    """The same function, its time and the memory peak after it noted in `calls`."""
    import torch

    from gist_dist.training.metrics import peak_memory_bytes

    def run(*inputs: Any, **options: Any) -> Any:
        started = clocks()
        result = function(*inputs, **options | {"show_progress_bar": False})
        calls.append({**clocks(started), "peak_bytes": peak_memory_bytes(torch.device("cpu"))})
        return result

    return run


def clocks(since: dict[str, float] | None = None) -> dict[str, float]:
    now = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
    return {name: value - since[name] for name, value in now.items()} if since else now


def write(arguments: argparse.Namespace, name: str, mined: dict[str, list[str]]) -> None:
    (Path(arguments.folder) / f"{name}.json").write_text(json.dumps(mined))


def compare(folder: Path) -> dict[str, float]:
    """Shares of anchors with the same negatives and of common negatives; theirs are scored in fp32, ours in fp16."""
    found, expected = (json.loads((folder / f"{name}.json").read_text()) for name in ("ours", "theirs"))
    equal = np.mean([negatives == expected.get(anchor, []) for anchor, negatives in found.items()])
    common = sum(len(set(negatives) & set(expected.get(anchor, []))) for anchor, negatives in found.items())
    num_theirs = sum(map(len, expected.values()))
    return {"equal_anchors": float(equal), "common_negatives": common / num_theirs, "negatives": num_theirs}


if __name__ == "__main__":
    main()
