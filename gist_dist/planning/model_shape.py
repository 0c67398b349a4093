"""How large a model is, from its files alone: no torch, no download."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gist_dist.common.files import json_object

HIDDEN = ("hidden_size", "d_model", "dim", "n_embd")
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
TABLES = ("vocab_size", "max_position_embeddings", "type_vocab_size")
"""Names that config.json gives them, by kind of model."""


@dataclass(frozen=True)
class ModelShape:
    model: str
    num_parameters: int
    num_encoding: int
    """Parameters without embedding tables: what a token is multiplied with."""
    width: int
    """Numbers in an embedding."""
    hidden: int
    num_layers: int
    is_assumed: bool = False
    """Nothing of it was found on this machine."""
    max_tokens: int | None = None
    """Where a text is cut; None: without a limit, or not known."""

    def forward_flops(self, num_tokens: float | int, length: float | int = 0.0) -> float | int:
        """Matrix products with the weights, and of attention within texts of so many tokens."""
        return num_tokens * (2.0 * self.num_encoding + 4.0 * self.num_layers * self.hidden * length)


ASSUMED = ModelShape("", 335_000_000, 303_000_000, 1024, 1024, 24, is_assumed=True)
"""BERT-large: the size of a common guide."""


def model_shape(model: str) -> ModelShape:
    """From the files of a folder or of the Hub's cache; BERT-large where there are none."""
    folder = _folder_of(model)
    settings = json_object(folder / "config.json") if folder else {}
    hidden, layers = _first(settings, *HIDDEN), _first(settings, *LAYERS)
    if not folder or not hidden or not layers:
        return replace(ASSUMED, model=model)
    weights = folder / "model.safetensors"
    if weights.is_file():
        sizes = _tensor_sizes(weights)
        tables = sum(size for name, size in sizes.items() if name.endswith("embeddings.weight"))
        encoding = sum(sizes.values()) - tables
    else:
        inner = _first(settings, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
        tables = hidden * sum(_first(settings, table) or 0 for table in TABLES)
        encoding = layers * (4 * hidden**2 + 2 * hidden * inner)
    return ModelShape(model, tables + encoding, encoding, hidden, hidden, layers)


def _folder_of(model: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        inner = folder / "0_Transformer"
        return inner if inner.is_dir() else folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a path that is not here
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _first(settings: dict[str, Any], *names: str) -> int | None:
    return next((settings[name] for name in names if isinstance(settings.get(name), int)), None)


def _tensor_sizes(weights: Path) -> dict[str, int]:
    """Numbers in each weight of a safetensors file, from its header; position ids and the like are none."""
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    return {name: math.prod(t["shape"]) for name, t in tensors.items() if t["dtype"].startswith(("F", "BF"))}
