"""Models of a few thousand weights, corpora of a few dozen rows, and real process groups to run them in."""

import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gist_dist.config import GuideConfig, RunConfig, StudentConfig
from gist_dist.core.collectives import World
from gist_dist.core.plan import assign_chunks, plan_batch
from gist_dist.core.step import TrainState, train_step
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config

WORDS = (
    "amber basin cedar delta ember fjord grove harbor island jungle kelp lagoon meadow nectar orchid pebble "
    "quartz river summit tundra umbra valley willow xenon yonder zephyr old new red wide cold loud"
).split()


def save_tiny_model(folder: Path, width: int = 32, layers: int = 2, seed: int = 0, positions: int = 64) -> Path:
    """A BERT with mean pooling, random weights and a small vocabulary, as a SentenceTransformer folder."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{x}" for x in letters),
    ]
    base = folder.with_name(f"{folder.name}-base")
    base.mkdir(parents=True)
    (base / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(base / "vocab.txt"), model_max_length=positions).save_pretrained(base)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=positions, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(base)
    SentenceTransformer(str(base), device="cpu").save(str(folder), create_model_card=False)
    return folder


def words(random: Any, low: int, high: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(low, high)))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(folder: Path, student: Path, guide: Path | None, /, *sources: Path, **sections: Any) -> dict[str, Any]:
    """A recipe as plain values; sections are added to, not replaced."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder),
        "student": {"model": str(student), "dropout": 0.0},
        "guide": {"model": str(guide)} if guide else None,
        "data": {"sources": [{"path": str(path)} for path in sources]},
        "optim": {"max_grad_norm": None},
        "tracking": {"tensorboard": False},  # its import takes as long as a whole tiny run
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return tree


def double(config: StudentConfig | GuideConfig) -> Student | Guide:
    """The student or guide of a recipe, in fp64."""
    encoder = Student(config) if isinstance(config, StudentConfig) else Guide(config)
    encoder.model.double()
    return encoder


def prepared(tree: dict[str, Any]) -> tuple[RunConfig, Corpus]:
    config = parse_config(tree)
    guide = Guide(config.guide) if config.guide else None
    return config, prepare(config, Student(config.student), guide, progress=lambda message: None)


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients that it is given, and moves nothing."""

    def __init__(self, student: Student) -> None:
        super().__init__(student.parameters(), lr=0.0)
        self.student = student

    def step(self) -> None:
        named = self.student.model.named_parameters()
        self.gradients = {name: p.grad.numpy().copy() for name, p in named if p.grad is not None}


def one_step(
    world: World,
    config: RunConfig,
    corpus: Corpus,
    student: Student,
    guide: Guide | None,
    step: int = 1,
    rows: np.ndarray | None = None,
) -> dict[str, Any]:
    """A real train_step on all rows of the corpus, or these, as one global batch: what came out, and how it was
    done."""
    optimizer = Recorder(student)
    train_state = TrainState(config, corpus, student, guide, optimizer, world)
    rows = np.arange(corpus.num_rows) if rows is None else rows
    plan = plan_batch(corpus, rows, step, train_state.chunk_rule, guide is not None)
    result = train_step(train_state, plan)
    return {
        "loss": result.loss,
        "gradients": optimizer.gradients,
        "grad_norm": result.grad_norm,
        "counts": result.counts,
        "num_chunks": len(plan.student_chunks),
        "own_chunks": len(assign_chunks(plan.student_chunks, world.size)[world.rank]),
        "kept_bytes": train_state.activations.used_bytes,
    }


def run_group(
    function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any, exit_code: int = 0
) -> list[Any]:
    """function(world, *arguments) on every rank of a real gloo group; what they return, by rank.

    They are forked from a server that has imported torch and transformers once: 0.2 s each instead of 15.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "sentence_transformers", "gist_dist.training.trainer"])
    results = [folder / f"result-{rank}.pickle" for rank in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, folder, results[rank], arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    _join(processes, time.monotonic() + 180)
    outcomes = [pickle.loads(path.read_bytes()) if path.exists() else {} for path in results]
    failures = [outcome["error"] for outcome in outcomes if "error" in outcome]
    codes = [process.exitcode for process in processes]
    if exit_code:
        assert exit_code in codes, codes
        return []
    assert not failures and set(codes) == {0}, f"exit codes {codes}\n" + "\n".join(failures)
    return [outcome["value"] for outcome in outcomes]


def wait_for(file: Path) -> None:
    """A checkpoint is written while training goes on."""
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


def _join(processes: Sequence[Any], deadline: float) -> None:
    """Wait for all. When one fails or time is up, end the others, which may wait for it in a collective."""
    running = {process.sentinel: process for process in processes}
    while running and time.monotonic() < deadline and not any(process.exitcode for process in processes):
        for sentinel in multiprocessing.connection.wait(list(running), timeout=1):
            running.pop(sentinel).join()
    for process in running.values():
        process.join(timeout=5)
        process.kill()
        process.join()


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    result: Path,
    arguments: Sequence[Any],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size)
    try:
        outcome = {"value": function(World.current(), *arguments)}
    except BaseException:
        outcome = {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    result.write_bytes(pickle.dumps(outcome))
    if "error" in outcome:
        os._exit(1)
    dist.destroy_process_group()
