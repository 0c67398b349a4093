"""Resumable state as safetensors and JSON: nothing is unpickled on load.

A checkpoint counts only with its COMMIT.json, which is written last and holds the size and hash of every file.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gist_dist.errors import UserError
from gist_dist.files import write_atomically

logger = logging.getLogger(__name__)

COMMIT = "COMMIT.json"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int


def save_checkpoint(
    checkpoints: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Checkpoint:
    """Write the state after ``step`` (one process only), then drop all but the newest ``keep``."""
    folder = checkpoints / f"step-{step:08d}"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run may have left without a commit
    folder.mkdir(parents=True)
    save_file(_model_tensors(model), folder / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, **state}))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in folder.iterdir()}
    commit = json.dumps({"step": step, "files": files}, indent=1)
    write_atomically(folder / COMMIT, lambda file: file.write_text(commit, encoding="utf-8"))
    for old in committed(checkpoints)[:-keep]:
        shutil.rmtree(old.folder, ignore_errors=True)
    return Checkpoint(folder, step)


def committed(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints that were completed, oldest first."""
    folders = sorted(checkpoints.glob("step-*")) if checkpoints.is_dir() else []
    return [Checkpoint(f, int(f.name.removeprefix("step-"))) for f in folders if (f / COMMIT).is_file()]


def latest_intact(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its commit says; damaged ones are named and passed over."""
    for checkpoint in reversed(committed(checkpoints)):
        if damage := _damage(checkpoint.folder):
            logger.warning("checkpoint %s is damaged (%s); trying the one before", checkpoint.folder, damage)
        else:
            return checkpoint
    return None


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Put the saved tensors back; returns the saved state. UserError if it belongs to another model."""
    saved = load_file(checkpoint.folder / "model.safetensors", device=str(device))
    tensors = _model_tensors(model)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in tensors.items()}:
        raise UserError(
            f"{checkpoint.folder}: was saved by another student model; give the run another name or remove the folder"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    moments = load_file(checkpoint.folder / "optimizer.safetensors", device=str(device))
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        state = {
            kind: moments[f"{kind}|{name}"] for kind in ("exp_avg", "exp_avg_sq", "step") if f"{kind}|{name}" in moments
        }
        if state:
            optimizer.state[parameter] = state
    return json.loads((checkpoint.folder / "state.json").read_text())


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; tied weights once."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}|{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _damage(folder: Path) -> str:
    try:
        files = json.loads((folder / COMMIT).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
