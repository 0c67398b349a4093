"""How does peak memory grow with the global batch?

    python benchmarks/batch_memory.py [--sizes 1024 4096 16384 65536] [--width 128] [--no-guide]

One full training step for each size, each in a process of its own: a two-layer encoder with random weights as student
and another as guide, texts of 3 to 22 random words (the quantiles of duplicate questions), one worker. Peak memory is
the process's resident set, what was there before the step (imports, models, corpus) beside it. Writes
benchmarks/results/batch_memory.json and prints a Markdown table.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "quickstart/models/minilm-2-layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--no-guide", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.width, not arguments.no_guide)))
        return
    if not TOKENIZER.is_dir():
        sys.exit("needs the quick start's tokenizer: run `python examples/quickstart.py` first")
    results = []
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--width", str(arguments.width)]
        command += ["--no-guide"] * arguments.no_guide
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(row(results[-1]) if len(results) > 1 else header() + row(results[-1]), flush=True)
    from gist_dist.runs.folder import describe_environment

    document = {"results": results, "environment": describe_environment(), "machine": platform.machine()}
    (HERE / "results" / "batch_memory.json").write_text(json.dumps(document, indent=1) + "\n")


def header() -> str:
    names = ("rows", "texts", "peak GB", "before the step GB", "step s", "encoders s", "loss s")
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n"


def row(result: dict) -> str:
    seconds = result["seconds"]
    encoders = seconds["encode"] + seconds["guide"] + seconds["backward"]
    return (
        f"| {result['rows']:,} | {result['texts']:,} | {result['peak_bytes'] / 1e9:.2f} | "
        f"{result['before_bytes'] / 1e9:.2f} | {sum(seconds.values()):.1f} | {encoders:.1f} | {seconds['loss']:.1f} |"
    )


def measure(size: int, width: int, with_guide: bool) -> dict:
    import torch

    from gist_dist.core.collectives import World
    from gist_dist.core.optim import build_optimizer
    from gist_dist.core.plan import plan_batch
    from gist_dist.core.step import TrainState, train_step
    from gist_dist.data.corpus import prepare
    from gist_dist.data.sampler import Sampler
    from gist_dist.models.encoder import Guide, Student
    from gist_dist.recipe import parse_config
    from gist_dist.training.metrics import peak_memory_bytes

    with tempfile.TemporaryDirectory() as folder:
        student, guide = (str(random_encoder(Path(folder) / name, width)) for name in ("student", "guide"))
        rows = write_rows(Path(folder) / "rows.jsonl", size)
        config = parse_config(
            {
                "name": "memory",
                "output_dir": folder,
                "student": {"model": student},
                "guide": {"model": guide} if with_guide else None,
                "data": {"sources": [{"path": str(rows)}]},
                "batch": {"global_size": size, "activation_gb": 0},
            }
        )
        trained, frozen = Student(config.student), Guide(config.guide) if with_guide else None
        corpus = prepare(config, trained, frozen, progress=lambda line: None)
        train_state = TrainState(config, corpus, trained, frozen, build_optimizer(trained.model, config.optim), World())
        plan = plan_batch(corpus, Sampler(corpus, config).rows(1), 1, config.batch.tokens_at_once, with_guide)
        cpu = torch.device("cpu")
        before = peak_memory_bytes(cpu)
        result = train_step(train_state, plan)
        assert np.isfinite(result.loss) and result.grad_norm > 0
        return {
            "rows": size,
            "texts": len(plan.texts),
            "width": width,
            "guide": with_guide,
            "peak_bytes": peak_memory_bytes(cpu),
            "before_bytes": before,
            "loss": result.loss,
            "seconds": result.seconds,
        }


def random_encoder(folder: Path, width: int) -> Path:
    """A two-layer BERT with random weights, mean pooling and the quick start's tokenizer."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(len(folder.name))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * width}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    SentenceTransformer(str(folder / "plain"), device="cpu").save(str(folder), create_model_card=False)
    return folder


def write_rows(path: Path, size: int) -> Path:
    rng = np.random.default_rng(0)
    words = np.array([w for w in (TOKENIZER / "vocab.txt").read_text().split() if w.isalpha() and len(w) > 2])
    with open(path, "w") as file:
        for _ in range(size):
            anchor, positive = (" ".join(rng.choice(words, n)) for n in rng.integers(3, 23, size=2))
            file.write(json.dumps({"anchor": anchor, "positive": positive}) + "\n")
    return path


if __name__ == "__main__":
    main()
