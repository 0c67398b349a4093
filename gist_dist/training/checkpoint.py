"""Resumable state as safetensors and JSON, in a folder or in object storage: nothing is unpickled on load.

A checkpoint counts only with its COMMIT.json, which is written last and holds the size and hash of every file. One
process writes and reads: rank 0.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gist_dist.common.errors import Damaged, UserError
from gist_dist.common.events import CHECKPOINT_PROBLEM
from gist_dist.common.storage import SCRATCH_PREFIX, check_file, join, open_store, sha256
from gist_dist.common.text import one_line
from gist_dist.config import RunConfig

logger = logging.getLogger(__name__)

COMMIT, FACTS, TENSORS = "COMMIT.json", "state.json", ".safetensors"
FOLDER = re.compile(r"step-(\d{8})")
FILE_NAME = re.compile(r"[a-z]+\.(json|safetensors)")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0

T = TypeVar("T")
TensorFiles = dict[str, dict[str, Tensor]]
"""Tensors by name, by the name of their file without its suffix."""


@dataclass(frozen=True)
class Snapshot:
    """The state after a step."""

    step: int
    tensors: TensorFiles
    facts: dict[str, Any]
    """Plain values."""


class CheckpointStore:
    """The checkpoints of one run. OSError for what the storage refuses."""

    def __init__(self, config: RunConfig) -> None:
        """In the run's folder, or below checkpoint.dir. UserError for a URI of no known kind."""
        inside = str(config.run_dir / "checkpoints")
        self.place = join(config.checkpoint.dir, config.name) if config.checkpoint.dir else inside
        self.store = open_store(self.place)
        self.keep = config.checkpoint.keep
        self.damaged: set[int] = set()
        """Steps whose checkpoint was found damaged by this process."""

    def place_of(self, step: int) -> str:
        return join(self.place, _folder(step))

    def committed(self) -> list[int]:
        """Steps whose checkpoint was completed, ascending."""
        return sorted(step for step, is_whole in self._folders().items() if is_whole)

    def remove_unfinished(self) -> None:
        """What killed runs have left. No other process may be writing."""
        for name in self.store.folders():
            if name.startswith(SCRATCH_PREFIX):
                self.store.delete_folder(name)
        for step, is_whole in self._folders().items():
            if not is_whole:
                self._remove(step)

    def newest_intact(self) -> Snapshot | None:
        """The newest checkpoint whose files are what its commit says; damaged ones are named and passed over."""
        for step in reversed(self.committed()):
            try:
                return self._read(step)
            except Damaged as damage:
                logger.warning(
                    "checkpoint %s is damaged (%s); trying the one before",
                    self.place_of(step),
                    damage,
                    extra=CHECKPOINT_PROBLEM,
                )
                self.damaged.add(step)
        return None

    def write(self, snapshot: Snapshot, before_commit: Callable[[], None] = lambda: None) -> None:
        """Whole or not at all: what a failed write leaves is removed. before_commit: what has to come first."""
        folder, files = _folder(snapshot.step), dict[str, dict[str, Any]]()
        try:
            self._remove(snapshot.step)
            with self.store.scratch() as scratch:
                for name, tensors in snapshot.tensors.items():
                    self._add(scratch / f"{name}{TENSORS}", partial(save_file, tensors), folder, files)
                text = json.dumps({"step": snapshot.step, **snapshot.facts}, allow_nan=False)
                self._add(scratch / FACTS, lambda path: path.write_text(text), folder, files)
            before_commit()
            commit = json.dumps({"step": snapshot.step, "files": files}, indent=1)
            self.store.write_bytes(f"{folder}/{COMMIT}", commit.encode())
        except BaseException as error:
            with suppress(OSError):
                self._remove(snapshot.step)
            if isinstance(error, SafetensorError):
                raise OSError(str(error)) from error
            raise

    def collect(self, newest: int) -> None:
        """Drop all but the newest ones up to this step. What is newer was damaged: it would have been resumed from."""
        good = [step for step in self.committed() if step <= newest and step not in self.damaged]
        for step in set(self._folders()) - set(good[-self.keep :]):
            self._remove(step)

    def _add(self, path: Path, write: Callable[[Path], Any], folder: str, files: dict[str, dict[str, Any]]) -> None:
        write(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        self.store.upload(path, f"{folder}/{path.name}")
        path.unlink()

    def _folders(self) -> dict[int, bool]:
        """Step → whether it has a commit."""
        steps = [int(found[1]) for name in self.store.folders() if (found := FOLDER.fullmatch(name))]
        return {step: self.store.exists(f"{_folder(step)}/{COMMIT}") for step in steps}

    def _remove(self, step: int) -> None:
        self.store.delete(f"{_folder(step)}/{COMMIT}")  # first: half a folder must not pass for a damaged checkpoint
        self.store.delete_folder(_folder(step))

    def _read(self, step: int) -> Snapshot:
        tensors, facts = TensorFiles(), None
        try:
            files = json.loads(self.store.read_bytes(f"{_folder(step)}/{COMMIT}"))["files"]
            for name, expected in files.items():
                if not FILE_NAME.fullmatch(name):
                    raise Damaged(f"{name!r} is no name of a file")
                with self.store.on_disk(f"{_folder(step)}/{name}") as path:
                    check_file(path, expected["bytes"], expected["sha256"])
                    if name == FACTS:
                        facts = json.loads(path.read_bytes())
                    else:
                        tensors[name.removesuffix(TENSORS)] = load_file(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise Damaged(f"{error.filename or error} is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise Damaged(one_line(f"{type(error).__name__}: {error}", 200)) from error
        if not isinstance(facts, dict) or facts.get("step") != step:
            raise Damaged(f"{FACTS} doesn't tell of step {step}")
        return Snapshot(step, tensors, facts)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one after the other, and drops old ones.

    Storage that fails is tried again for checkpoint.retry_seconds; then the checkpoint is abandoned, one warning says
    so, and the next one tries again.
    """

    def __init__(
        self, checkpoints: CheckpointStore, retry_seconds: float, before_commit: Callable[[], None] = lambda: None
    ) -> None:
        """before_commit: called before a checkpoint counts, in the writing thread."""
        self.checkpoints, self.retry_seconds, self.before_commit = checkpoints, retry_seconds, before_commit
        self.problem: str | None = None
        """Why the newest checkpoint is missing, if it is."""
        self._copies = _Copies()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._no_more_tries = Event()

    def save(self, step: int, tensors: TensorFiles, facts: dict[str, Any]) -> None:
        """Copy the state and return; it is written meanwhile. Waits for get_ready() first."""
        self.get_ready()
        snapshot = Snapshot(step, self._copies.of(tensors), facts)
        self._writing = self._pool.submit(self._write, snapshot)

    def get_ready(self) -> None:
        """Wait for the write before; where that only waits for its storage to come back, it is abandoned."""
        self._no_more_tries.set()
        self.finish()
        self._no_more_tries.clear()

    def finish(self) -> str | None:
        """Wait until the newest checkpoint is written or abandoned; returns why."""
        if self._writing:
            self._writing.result()
        return self.problem

    def close(self) -> None:
        """Waits for a write that is going on, and tries no failed one again."""
        self._no_more_tries.set()
        self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        step, place = snapshot.step, self.checkpoints.place
        try:
            with_retries(
                lambda: self.checkpoints.write(snapshot, self.before_commit),
                f"checkpoint of step {step} can't be written to {place}",
                self.retry_seconds,
                self._no_more_tries,
            )
        except OSError as error:
            self.problem = (
                f"the checkpoint of step {step} can't be written to {place}: {one_line(error)}; free space, lower "
                "checkpoint.keep or set checkpoint.dir to another place"
            )
            logger.warning(
                "%s; training goes on, and the next checkpoint tries again", self.problem, extra=CHECKPOINT_PROBLEM
            )
            return
        self.problem = None
        try:
            self.checkpoints.collect(step)
        except OSError as error:
            logger.warning("old checkpoints in %s can't be removed: %s", place, one_line(error))


def read_newest(checkpoints: CheckpointStore, retry_seconds: float) -> Snapshot | None:
    """The newest intact checkpoint. UserError for storage that can't be read within the time."""

    def read() -> Snapshot | None:
        checkpoints.remove_unfinished()
        return checkpoints.newest_intact()

    try:
        return with_retries(read, f"checkpoints in {checkpoints.place} can't be read", retry_seconds, Event())
    except OSError as error:
        raise UserError(
            f"the checkpoints in {checkpoints.place} can't be read: {one_line(error)}; fix the storage, or remove "
            "the one that can't be read, and the same command goes on"
        ) from error


def with_retries(attempt: Callable[[], T], failure: str, retry_seconds: float, no_more_tries: Event) -> T:
    """Try until it works, with longer and longer pauses; OSError of the last try once the time is over."""
    deadline, pause = time.monotonic() + retry_seconds, FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except OSError as error:
            left = deadline - time.monotonic()
            if left <= 0 or isinstance(error, PermissionError) or no_more_tries.is_set():
                raise
            logger.info("%s yet (%s); trying again for %.0f s", failure, one_line(error), left)
            no_more_tries.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)


class _Copies:
    """A copy of the state in this machine's memory, overwritten by the next: fresh memory costs more than copying.

    Page-locked for a GPU's tensors, so that they are copied at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def of(self, files: TensorFiles) -> TensorFiles:
        copies = {
            file: {name: self._copy((file, name), t.detach()) for name, t in tensors.items()}
            for file, tensors in files.items()
        }
        for device in {t.device for tensors in files.values() for t in tensors.values() if t.is_cuda}:
            torch.cuda.synchronize(device)
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; tied weights once."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By "kind|parameter": exp_avg, exp_avg_sq and step of every parameter that had a gradient yet."""
    return {
        f"{kind}|{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def set_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of optimizer_tensors."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        kind, name = key.split("|", 1)
        optimizer.state[parameters[name]][kind] = tensor


def _folder(step: int) -> str:
    return f"step-{step:08d}"
