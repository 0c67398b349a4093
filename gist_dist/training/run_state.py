"""The state of a run: how all workers take it up again, and how rank 0 keeps it.

What decides the batches and the loss must be what it was. What only draws other dropout or rounds otherwise may change,
and is told.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from gist_dist.common.errors import UserError
from gist_dist.config import ROLES, computed_values
from gist_dist.core.collectives import broadcast, broadcast_object, on_rank_0
from gist_dist.models.guide_cache import embedding_fingerprint
from gist_dist.training.checkpoint import (
    CheckpointStore,
    CheckpointWriter,
    Snapshot,
    model_tensors,
    optimizer_tensors,
    read_newest,
    set_optimizer_tensors,
)
from gist_dist.training.guide_schedule import Guidance
from gist_dist.training.mining_schedule import MiningSchedule
from gist_dist.training.train_state import RunTrainState

logger = logging.getLogger(__name__)

PLACES = {"name", "data.sources", "student.model", "student.revision", "guide.model", "guide.revision"} | {
    f"{model}.prompts.{role}" for model in ("student", "guide") for role in ROLES
}
"""Keys that say where things lie, or what is part of them. Fingerprints of the models and of all token ids tell whether
those are the same."""


class RunState:
    """What a run has done, and its checkpoints. Every worker has one; rank 0 alone reads and writes."""

    def __init__(self, train_state: RunTrainState, guidance: Guidance, mining: MiningSchedule) -> None:
        """UserError, on every worker, for a checkpoint.dir that can't be opened."""
        self.train_state, self.guidance, self.mining, self.world = train_state, guidance, mining, train_state.world
        self.kept = 0
        """The step whose state was taken up, or handed to be written, last."""
        self.skipped: list[int] = []
        """Steps that changed nothing, because their loss or gradient was not finite."""
        self._request: str | None = None
        self.writer: CheckpointWriter | None = None
        on_rank_0(self._open, self.world)

    def _open(self) -> None:
        self.identity = _identity(self.train_state, self.guidance)  # of the models as they were loaded
        self.store = CheckpointStore(self.train_state.config)
        self.writer = CheckpointWriter(self.store, self.train_state.config.checkpoint.retry_seconds)

    def resume(self) -> int:
        """Take up the newest intact checkpoint, if there is one; gives the number of steps done. UserError, on every
        worker, if that can't be."""
        snapshot = on_rank_0(self._find, self.world)
        layout = broadcast_object(snapshot and _layout(snapshot), self.world)
        if layout is None:
            return 0
        self.kept, self.skipped, forms = layout
        student, optimizer, device = (
            self.train_state.student,
            self.train_state.optimizer,
            self.train_state.student.device,
        )

        def received(file: str) -> dict[str, Tensor]:
            own = snapshot.tensors.get(file, {}) if snapshot else {}
            of_file = forms.get(file, {}).items()
            return {name: self._received(own.get(name), shape, dtype, device) for name, (shape, dtype) in of_file}

        weights = received("model")
        for name, tensor in model_tensors(student.model).items():
            tensor.copy_(weights[name])
        set_optimizer_tensors(student.model, optimizer, received("optimizer"))
        self.mining.resume(self.kept, received("mined"))
        self.guidance.resume(self.kept, received("guide"))
        return self.kept

    def save_if_due(self, step: int, request: str | None) -> None:
        """After the last step, every checkpoint.every_steps, and when it is asked for: at "stop", and at "checkpoint"
        once as long as that is asked for."""
        every, is_new = self.train_state.config.checkpoint.every_steps, request != self._request
        self._request = request
        is_due = step == self.mining.num_steps or (every and step % every == 0)
        if is_due or request == "stop" or (request == "checkpoint" and is_new):
            self.save(step)

    def save(self, step: int) -> None:
        """Keep the state after a step; it is written while training goes on. All wait for a write that still lasts."""
        on_rank_0(lambda: self._writer().get_ready(), self.world)
        self._save(step)

    def keep(self, step: int) -> str:
        """On rank 0: have the state after a step written, if it is not, and wait for it. Tells where it is."""
        if step == 0:
            return "the state before it is the untrained student"
        if step != self.kept:
            self._save(step)
        return self._writer().finish() or f"the state before it is kept in {self.store.place_of(step)}"

    def finish(self) -> str | None:
        """Wait, on every worker, for the newest checkpoint; tells why it is missing, if it is."""
        on_rank_0(lambda: self._writer().finish(), self.world)
        return broadcast_object(self.writer and self.writer.problem, self.world)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def _writer(self) -> CheckpointWriter:
        """On rank 0, which alone has one."""
        assert self.writer is not None
        return self.writer

    def _save(self, step: int) -> None:
        self.kept = step
        if self.writer:
            model, optimizer = self.train_state.student.model, self.train_state.optimizer
            tensors = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
            if guide := self.guidance.tensors():
                tensors["guide"] = guide
            if mined := self.mining.tensors():
                tensors["mined"] = mined
            told = _told(self.train_state)
            self.writer.save(step, tensors, {"skipped": [*self.skipped], "identity": self.identity, "told": told})

    def _find(self) -> Snapshot | None:
        snapshot = read_newest(self.store, self.train_state.config.checkpoint.retry_seconds)
        if snapshot:
            self._check(snapshot, self.store.place_of(snapshot.step))
        return snapshot

    def _check(self, snapshot: Snapshot, place: str) -> None:
        """UserError for a checkpoint of another run."""
        facts, tensors, student = snapshot.facts, snapshot.tensors, self.train_state.student.model
        before, told = _mapping(facts.get("identity")), _mapping(facts.get("told"))
        for key in ("data", *self.identity):
            if key in before | {"data": None} and before.get(key) != self.identity[key]:
                raise UserError(
                    f"{place}: {key} was {before.get(key)!r} and is now {self.identity[key]!r}; a run continues only "
                    "with what its batches and its loss depend on unchanged: give it another name, or remove the "
                    "folder to start over"
                )
        shapes = {name: parameter.shape for name, parameter in student.named_parameters()}
        fits = _forms(tensors.get("model", {})) == _forms(model_tensors(student)) and "optimizer" in tensors
        for key, tensor in tensors.get("optimizer", {}).items():
            kind, _, name = key.partition("|")
            fits &= name in shapes and tensor.shape == (torch.Size() if kind == "step" else shapes[name])
        if self.guidance.is_renewed_by(snapshot.step):
            copy, own = tensors.get("guide", {}), model_tensors(student)
            fits &= {n: t.shape for n, t in copy.items()} == {n: t.shape for n, t in own.items()}
        if self.mining.is_renewed_by(snapshot.step):
            found = tensors.get("mined", {}).get("negatives")
            fits &= found is not None and len(found) == self.train_state.corpus.num_rows
        if not fits or not isinstance(facts.get("skipped"), list):
            raise UserError(
                f"{place}: its tensors are not those of this student, optimizer and guide; give the run another name, "
                "or remove the folder to start over"
            )
        logger.info("resuming after step %d from %s", snapshot.step, place, extra={"resumed": snapshot.step})
        for key, value in _told(self.train_state).items():
            if told.get(key) != value:
                logger.info("%s was %s and is now %s: dropout or rounding may differ", key, told.get(key), value)

    def _received(self, own: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Rank 0's tensor, on this worker's device."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if own is not None:
            tensor.copy_(own)
        broadcast(tensor, self.world)
        return tensor


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _identity(train_state: RunTrainState, guidance: Guidance) -> dict[str, Any]:
    """What the global batches and the loss are a function of."""
    config, cache = train_state.config, guidance.cache
    guide = cache.fingerprint if cache else embedding_fingerprint(train_state.guide) if train_state.guide else None
    return {key: value for key, value in computed_values(config).items() if key not in PLACES} | {
        "data": train_state.corpus.manifest["content"],
        "weights": [source.weight for source in config.data.sources],
        "student": embedding_fingerprint(train_state.student),
        "guide": guide,
        **train_state.corpus.made_for_it,
    }


def _told(train_state: RunTrainState) -> dict[str, Any]:
    """What may change, though not bit for bit the same numbers come out."""
    batch = train_state.config.batch
    return {
        "torch": torch.__version__,
        "device": train_state.student.device.type,
        "batch.chunk_tokens": batch.tokens_at_once,
        **({"batch.packing": True} if train_state.student.packs else {}),
        "batch.loss_gb": batch.loss_gb,
    }


def _layout(snapshot: Snapshot) -> tuple[int, list[int], dict[str, dict[str, tuple[torch.Size, torch.dtype]]]]:
    """What the other workers have to know before they receive its tensors."""
    return snapshot.step, snapshot.facts["skipped"], {file: _forms(t) for file, t in snapshot.tensors.items()}


def _forms(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
