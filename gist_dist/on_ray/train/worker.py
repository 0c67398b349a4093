"""What runs in every Ray Train worker."""

import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_dist.common.errors import phase_of
from gist_dist.common.events import EVENTS, EventFormatter
from gist_dist.common.redact import Redacting
from gist_dist.common.text import plural
from gist_dist.config import RunConfig
from gist_dist.models.cpu_memory import keep_freed_memory
from gist_dist.on_ray.train.failures import OutOfMemory, memory_sentence, out_of_memory
from gist_dist.on_ray.train.messages import READY, RESIZE, STOP, post, posted
from gist_dist.on_ray.train.prometheus import OperatorMetrics
from gist_dist.runs.evaluations import is_done
from gist_dist.runs.lock import other_holder

if TYPE_CHECKING:
    import torch

    from gist_dist.models.encoder import Guide
    from gist_dist.models.guide_cache import GuideCache

logger = logging.getLogger(__name__)

LOG_NAME = "train.log"
LOOK_SECONDS = 1.0
LAST_CALL_SECONDS = 15.0
"""So long before an announced end a second checkpoint is written, if the first came at least as long before that."""


@dataclass(frozen=True)
class RunInputs:
    """What the driver has prepared for a run, and its workers open."""

    corpus: str
    """Its place, a path or URI."""
    lock: str | None = None
    """Token of the command that holds the run's folder."""
    clusters: str | None = None
    """Name of the kept array that batches of neighbours are made by."""
    mined: str | None = None
    """Name of the kept array of mined negatives."""
    guide_fingerprint: str | None = None
    guide_width: int = 0
    """The guide whose cached embeddings replace the model; no fingerprint: no cache."""


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker is told."""

    recipe: dict[str, Any]
    inputs: RunInputs
    use_gpu: bool
    threads: int
    """Threads of its computation on a CPU."""
    waits_for_scores: bool = False
    """Whether evaluation while it trains has the resources of the workers, which wait for it."""
    resize_patience_s: float = 600.0


def train_worker(payload: dict[str, WorkerTask]) -> str:
    """Load what a worker hosts and train: "finished", or "stopped" with a checkpoint.

    What a rank raises ends all ranks as soon as Ray's controller looks; its RetryPolicy decides what then.
    """
    from gist_dist.core.collectives import World, broadcast_object
    from gist_dist.data.clusters import read_clusters
    from gist_dist.data.corpus import open_corpus
    from gist_dist.data.kept_arrays import digest_of, read_array
    from gist_dist.data.mining import MINED
    from gist_dist.models.encoder import Guide, Student
    from gist_dist.recipe import parse_config
    from gist_dist.training.budgets import with_budgets
    from gist_dist.training.trainer import train

    task = payload["task"]  # Ray hands over a dict
    config, inputs = parse_config(task.recipe), task.inputs
    world = World.current()
    _log_to_file(config.run_dir, world.rank)
    device = _prepare_device(task, config.cluster.deterministic)
    requests = Requests(config.run_dir, world.rank, inputs.lock)
    observe = OperatorMetrics(config.name) if world.rank == 0 else None
    try:
        student = Student(config.student, device)
        guide = open_guide(config, inputs, device)
        corpus = open_corpus(config, inputs.corpus)
        if inputs.clusters:
            corpus.clusters = read_clusters(config, inputs.clusters)
        if inputs.mined:
            corpus.adopt(read_array(config, MINED, inputs.mined))
            corpus.mined_digest = digest_of(inputs.mined)
        config = with_budgets(config, student, guide if isinstance(guide, Guide) else None, corpus, world)
        is_scored = requests.is_scored if task.waits_for_scores else None
        outcome = train(config, corpus, student, guide, world, requests, observe, is_scored)
    except Exception as error:
        if not out_of_memory(error):
            raise
        where = "a worker's GPU ran out of memory" if task.use_gpu else "a worker ran out of memory"
        raise OutOfMemory(memory_sentence(config.batch, phase_of(error), where)) from error
    if outcome == "stopped" and broadcast_object(requests.is_resized, world):
        if world.rank == 0:
            post(config.run_dir, READY)
        time.sleep(task.resize_patience_s)
        raise RuntimeError("the workers were to be resized and were not")
    return outcome


def open_guide(config: RunConfig, inputs: RunInputs, device: "torch.device | str") -> "Guide | GuideCache | None":
    """What identifies false negatives in training: the model, or its cached embeddings."""
    from gist_dist.models.encoder import Guide
    from gist_dist.models.guide_cache import GuideCache

    if inputs.guide_fingerprint:
        place, copy = config.guide_cache_dir, config.data.local_copy
        return GuideCache(place, inputs.guide_fingerprint, inputs.guide_width, copy)
    return Guide.of_run(config, device) if config.has_guide_model else None


class Requests:
    """What the trainer asks for at every step: None, "checkpoint" (write one now and go on) or "stop".

    Rank 0 looks for messages in the run folder, at most once a second. A notice that a node is to be taken away
    reaches every rank from Ray; they need not see it at the same step. A worker that outlived its driver ends itself
    when the run's lock names another command, which goes on from the last checkpoint.
    """

    def __init__(self, run_dir: Path, rank: int, lock: str | None = None) -> None:
        """lock: the token of the command that started this worker."""
        self.run_dir, self.rank, self.lock = run_dir, rank, lock
        self.is_resized = False
        self.looked = 0.0
        self.notice: Any = None
        self.may_call_again = False

    def __call__(self) -> str | None:
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return None
        self.looked = now
        self._end_if_taken_over()
        messages = posted(self.run_dir) if self.rank == 0 else set()
        if messages & {STOP, RESIZE}:
            self.is_resized = STOP not in messages
            return "stop"
        return "checkpoint" if self._is_announced() else None

    def is_scored(self, step: int) -> bool:
        """Whether training may go on after a step that is to be scored: it is, or something else is asked for."""
        self._end_if_taken_over()
        return is_done(self.run_dir, step) or bool(posted(self.run_dir) & {STOP, RESIZE})

    def _end_if_taken_over(self) -> None:
        if self.rank == 0 and self.lock and (other := other_holder(self.run_dir, self.lock)):
            logger.error("the run was taken over by %s: this worker ends", other)
            os._exit(1)  # nothing more is written, and the other ranks end with it

    def _is_announced(self) -> bool:
        """Once when a node's end is announced, and once more shortly before it."""
        notice = preemption_notice()
        if notice is None:
            return False
        left = math.inf if notice.deadline_ms is None else notice.deadline_ms / 1000 - time.time()
        if notice != self.notice:
            self.notice, self.may_call_again = notice, left > 2 * LAST_CALL_SECONDS
        elif self.may_call_again and left < LAST_CALL_SECONDS:
            self.may_call_again = False
        else:
            return False
        seconds = f"in {left:.0f} s" if math.isfinite(left) else "soon"
        nodes = len(notice.preempted_node_ids)
        logger.info("%s will be taken away %s: writing a checkpoint", plural(nodes, "node"), seconds)
        return True


def preemption_notice() -> Any:
    """What Ray has told this worker, without ray.train.get_preemption_info()'s broadcast at every step."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context
    except ImportError:  # not this version's place for it
        return None
    return get_train_context().preemption_context.preemption_info


def _prepare_device(task: WorkerTask, deterministic: bool) -> "torch.device":
    """This worker's GPU (all of a node's are visible to each of its workers), or the CPU with its share of threads."""
    import torch
    from ray.train.torch import get_device

    from gist_dist.core.device import prepare_cuda

    if not task.use_gpu:
        torch.set_num_threads(task.threads)
        keep_freed_memory()
        return torch.device("cpu")
    device = get_device()
    torch.cuda.set_device(device)
    prepare_cuda(deterministic)
    return device


def _log_to_file(run_dir: Path, rank: int) -> None:
    """Every rank has a log for people; rank 0 also writes the events that the driver follows and the report reads."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    plain = Redacting("%(message)s" if rank == 0 else "%(asctime)s %(levelname)s %(message)s")
    formatters = {LOG_NAME if rank == 0 else f"worker-{rank}.log": plain} | ({} if rank else {EVENTS: EventFormatter()})
    logger = logging.getLogger("gist_dist")
    logger.handlers = []
    for name, formatter in formatters.items():
        handler = logging.FileHandler(folder / name)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.debug("rank %d is process %d", rank, os.getpid())
