"""Does a step's time grow as gist_dist/planning/cost_model.py says?

    python benchmarks/scaling_shape.py            about 4 minutes on one core

Full training steps on one worker with one thread, two-layer encoders with random weights, no kept graphs: over batch
sizes at one width, and over widths at one size. The model says that encoding is proportional to padded tokens × the
encoder's weights, and the loss to rows × candidates × (6d + 2e): so the rate, FLOP/s, should be the same everywhere.
Then planning, up to a million rows, and reading cached guide embeddings, which every worker does for the whole batch on
one core: CPU seconds. The best of the repeats counts: what else the machine does only adds. Writes
benchmarks/results/scaling_shape.json and prints Markdown tables.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from batch_memory import TOKENIZER, random_encoder, write_rows

HERE = Path(__file__).parent
STEPS = [(512, 128), (1024, 128), (2048, 128), (4096, 128), (8192, 128), (2048, 64), (2048, 256), (2048, 512)]
"""Rows and width."""
PLANS = [4096, 16384, 65536, 262144, 1048576]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--repeats", type=int, default=2)
    repeats = flags.parse_args().repeats
    if not TOKENIZER.is_dir():
        raise SystemExit("needs the quick start's tokenizer: run `python examples/quickstart.py` first")
    import torch

    torch.set_num_threads(1)
    steps = []
    print("| rows | width | tokens | encode GFLOP/s | backward GFLOP/s | loss GFLOP/s | loss s |\n" + "|---" * 7 + "|")
    for rows, width in STEPS:
        step = measure(rows, width, repeats)
        steps.append(step)
        speeds = [f"{step['gflops'][phase]:.1f}" for phase in ("encode", "backward", "loss")]
        print(
            f"| {rows:,} | {width} | {step['tokens']:,} | {' | '.join(speeds)} | {step['seconds']['loss']:.3f} |",
            flush=True,
        )
    plans = []
    print("\n| rows | texts | chunks | plan s | µs a text |\n" + "|---" * 5 + "|")
    for plan in planning(repeats):
        plans.append(plan)
        each = 1e6 * plan["seconds"] / plan["texts"]
        print(
            f"| {plan['rows']:,} | {plan['texts']:,} | {plan['chunks']:,} | {plan['seconds']:.2f} | {each:.2f} |",
            flush=True,
        )
    cached = cached_bytes_per_second(repeats)
    print(f"\nguide embeddings from the cache: {cached / 1e9:.2f} GB/s")
    from gist_dist.runs.folder import describe_environment

    document = {
        "steps": steps,
        "plans": plans,
        "cached_bytes_per_second": cached,
        "environment": describe_environment(),
    }
    (HERE / "results" / "scaling_shape.json").write_text(json.dumps(document, indent=1) + "\n")


def measure(rows: int, width: int, repeats: int) -> dict:
    """Seconds by phase, and the rate at which each does what scaling.py counts."""
    from gist_dist.core.collectives import World
    from gist_dist.core.optim import build_optimizer
    from gist_dist.core.plan import plan_batch
    from gist_dist.core.step import TrainState, train_step
    from gist_dist.data.corpus import prepare
    from gist_dist.data.sampler import Sampler
    from gist_dist.models.encoder import Guide, Student
    from gist_dist.planning.model_shape import model_shape
    from gist_dist.recipe import parse_config

    with tempfile.TemporaryDirectory() as folder:
        models = [str(random_encoder(Path(folder) / name, width)) for name in ("student", "guide")]
        data = write_rows(Path(folder) / "rows.jsonl", rows)
        config = parse_config(
            {
                "name": "shape",
                "output_dir": folder,
                "student": {"model": models[0]},
                "guide": {"model": models[1]},
                "data": {"sources": [{"path": str(data)}]},
                "batch": {"global_size": rows, "activation_gb": 0},
            }
        )
        student, guide = Student(config.student), Guide(config.guide)
        corpus = prepare(config, student, guide, progress=lambda line: None)
        train_state = TrainState(config, corpus, student, guide, build_optimizer(student.model, config.optim), World())
        plan = plan_batch(corpus, Sampler(corpus, config).rows(1), 1, config.batch.tokens_at_once, True)
        timed = [train_step(train_state, plan).seconds for _ in range(repeats + 1)][1:]
        seconds = {phase: min(step[phase] for step in timed) for phase in timed[0]}
        forward = model_shape(models[0]).forward_flops(plan.padded_tokens, plan.padded_tokens / len(plan.texts))
        flops = {"encode": forward, "backward": 3 * forward, "loss": rows * 3 * rows * (6 + 2) * width}
        return {
            "rows": rows,
            "width": width,
            "tokens": plan.padded_tokens,
            "seconds": seconds,
            "gflops": {phase: work / seconds[phase] / 1e9 for phase, work in flops.items()},
        }


def planning(repeats: int):
    """plan_batch for a corpus of 1.2 M triplets that exists as index arrays only."""
    from gist_dist.core.plan import plan_batch

    draw, rows = np.random.default_rng(0), 1_200_000
    texts = 3 * rows
    lengths = np.clip(draw.lognormal(3.9, 0.7, texts), 4, 512).astype(np.int32)
    corpus = SimpleNamespace(
        anchors=np.arange(rows),
        positives=rows + np.arange(rows),
        negatives_of=lambda taken: 2 * rows + taken,
        guide_keys=np.stack([draw.permutation(texts).astype(np.uint64)] * 2, axis=1),
        identity=draw.permutation(texts),
        student_lengths=lengths,
        guide_lengths=lengths,
    )
    for size in PLANS:
        taken, seconds = draw.permutation(rows)[:size], []
        for _ in range(repeats):
            started = time.process_time()
            plan = plan_batch(corpus, taken, 1, 65536, with_guide=False)
            seconds.append(time.process_time() - started)
        yield {"rows": size, "texts": len(plan.texts), "chunks": len(plan.student_chunks), "seconds": min(seconds)}


def cached_bytes_per_second(repeats: int, texts: int = 300_000, width: int = 768) -> float:
    """Rows in any order of a guide cache that lies in the page cache."""
    from gist_dist.models.guide_cache import GuideCache

    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2**63, (texts, 2), dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        GuideCache(folder, "f" * 16, width).write(keys, np.ones((texts, width), np.float16))
        cache, seconds = GuideCache(folder, "f" * 16, width), []
        for _ in range(repeats + 1):
            wanted = keys[draw.permutation(texts)[: texts // 2]]
            started = time.process_time()
            read = cache.embeddings(cache.find(wanted))
            seconds.append(time.process_time() - started)
        return read.nbytes / min(seconds[1:])


if __name__ == "__main__":
    main()
