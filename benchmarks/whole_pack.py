"""Does a real collection of sources go through, and what does the guide cache save?

    python benchmarks/whole_pack.py PACK [--first-steps 60]

Prepares, plans, caches and trains benchmarks/whole_pack.yaml (21 sources, 331,478 rows; PACK holds train/) for two
epochs, then takes the first steps again, once with the cache and once with the guide online: the same batches. Writes
benchmarks/results/whole_pack.json: the plan's text, seconds of the cache, of every epoch and of the first steps in both
modes. About 40 minutes on 2 cores; started again, it goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
RECIPE = HERE / "whole_pack.yaml"
RUNS = Path("runs/whole-pack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--first-steps", type=int, default=60)
    arguments = parser.parse_args()
    make_models(RUNS / "models")
    root = f"data.root={arguments.pack / 'train'}"
    plan, cache = gist_dist("plan", root), gist_dist("precompute", root)
    gist_dist("train", root)
    modes = {mode: f"first-{mode}" for mode in ("cache", "online")}
    for mode, name in modes.items():
        steps = f"optim.steps={arguments.first_steps}"
        gist_dist("train", root, f"name={name}", f"guide.mode={mode}", steps, "optim.epochs=null")
    from gist_dist.runs.folder import describe_environment

    result = {
        "plan": plan,
        "precompute": cache,
        "epochs": epochs(RUNS / "whole-pack"),
        "first_steps": {mode: summary(metrics(RUNS / name)) for mode, name in modes.items()},
        "environment": describe_environment(),
    }
    (HERE / "results" / "whole_pack.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("precompute", "epochs", "first_steps")}, indent=1))


def gist_dist(command: str, *overrides: str) -> str:
    arguments = [sys.executable, "-m", "gist_dist.cli", command, str(RECIPE), *overrides]
    said = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout
    return said.replace(f"{Path.cwd()}/", "")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def epochs(run_dir: Path) -> list[dict]:
    by_epoch: dict[int, list[dict]] = {}
    for line in metrics(run_dir):
        by_epoch.setdefault(int(line["epoch"] - 1e-9), []).append(line)
    return [summary(lines) for lines in by_epoch.values()]


def summary(lines: list[dict]) -> dict:
    """Seconds of these steps, and what part the guide took."""
    return {
        "steps": len(lines),
        "rows": sum(line["rows"] for line in lines),
        "seconds": round(sum(line["seconds"]["step"] for line in lines), 1),
        "guide_seconds": round(sum(line["seconds"]["guide"] for line in lines), 1),
        "median_step": round(sorted(line["seconds"]["step"] for line in lines)[len(lines) // 2], 3),
        "repeated_texts": sum(line["repeated_texts"] for line in lines),
        "masked_fraction": sum(line["masked_fraction"] for line in lines) / len(lines),
        "last_loss": lines[-1]["loss"],
    }


def make_models(folder: Path) -> None:
    """The first two layers of MiniLM as guide; one random layer of width 128, with its tokenizer, as student."""
    import offline_models
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer, BertConfig, BertModel, set_seed

    if (folder / "student").is_dir():
        return
    minilm = offline_models.minilm(folder / "all-MiniLM-L6-v2")
    guide = offline_models.truncated(minilm, 2, folder / "guide")
    set_seed(0)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512, vocab_size=30522
    )
    BertModel(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(guide).save_pretrained(folder / "base")
    SentenceTransformer(str(folder / "base"), device="cpu").save(str(folder / "student"), create_model_card=False)


if __name__ == "__main__":
    main()
