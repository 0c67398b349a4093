"""What runs in every Ray Train worker."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOG_NAME = "train.log"
FAILURE_NAME = "failure.json"


def train_worker(payload: dict[str, Any]) -> None:
    """Load what a worker hosts and train. A UserError ends the run on all ranks, without Ray's retries."""
    from gist_dist.collectives import World
    from gist_dist.config import parse_config
    from gist_dist.data.corpus import open_corpus
    from gist_dist.encoder import Guide, Student
    from gist_dist.errors import UserError
    from gist_dist.guide_cache import GuideCache
    from gist_dist.trainer import train

    config = parse_config(payload["recipe"])
    world = World.current()
    _log_to_file(config.run_dir, world.rank)
    device = _prepare_device(payload)
    try:
        student = Student(config.student, device)
        guide: Guide | GuideCache | None = None
        if payload["guide_cache"]:
            guide = GuideCache(config.guide_cache_dir, **payload["guide_cache"], local_copy=config.data.local_copy)
        elif config.has_guide_model:
            guide = Guide(config.guide_or_student, device)
        train(config, open_corpus(config, payload["corpus"]), student, guide, world)
    except UserError as error:
        if world.rank == 0:
            (config.run_dir / FAILURE_NAME).write_text(json.dumps({"error": str(error)}))


def _prepare_device(payload: dict[str, Any]) -> "torch.device":
    """This worker's GPU (all of a node's are visible to each of its workers), or the CPU with its share of threads."""
    import torch
    from ray.train.torch import get_device

    if not payload["use_gpu"]:
        torch.set_num_threads(payload["threads"])
        return torch.device("cpu")
    device = get_device()
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def _log_to_file(run_dir: Path, rank: int) -> None:
    """Rank 0 writes the log that the driver follows; the others one each."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / (LOG_NAME if rank == 0 else f"worker-{rank}.log"))
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else "%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gist_dist")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.debug("rank %d is process %d", rank, os.getpid())
