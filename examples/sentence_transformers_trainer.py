"""gist_dist's loss in sentence-transformers' own trainer: the quick start's data, a batch of 256, twenty steps.

    python examples/quickstart.py && python examples/sentence_transformers_trainer.py

Two processes on one machine, one batch of 512: torchrun --nproc-per-node 2 examples/sentence_transformers_trainer.py
"""

import argparse
import sys
from pathlib import Path

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from gist_dist import CachedGISTEmbedLoss


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quickstart", type=Path, default=Path("quickstart"), help="what examples/quickstart.py made")
    flags.add_argument("--output", type=Path, default=Path("runs/sentence-transformers-trainer"))
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--batch", type=int, default=256, help="rows of a process")
    arguments = flags.parse_args()
    if not arguments.quickstart.is_dir():
        sys.exit(f"{arguments.quickstart} is not there: run python examples/quickstart.py first")

    models = arguments.quickstart / "models"
    student = SentenceTransformer(str(models / "minilm-2-layers"))
    student.max_seq_length = 64
    guide = SentenceTransformer(str(models / "all-MiniLM-L6-v2"))
    files = [str(file) for file in sorted((arguments.quickstart / "data").glob("*.parquet"))]
    rows = load_dataset("parquet", data_files=files, split="train")
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(arguments.output),
            per_device_train_batch_size=arguments.batch,
            max_steps=arguments.steps,
            learning_rate=2e-4,
            warmup_steps=2,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows.select_columns(["anchor", "positive"]),
        loss=CachedGISTEmbedLoss(student, guide, temperature=0.05, activation_gb=1.0, gather_across_devices=True),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        student.save(str(arguments.output / "model"))
        print(f"the model is in {arguments.output / 'model'}")


if __name__ == "__main__":
    main()
