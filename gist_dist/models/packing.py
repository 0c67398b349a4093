"""Packed chunks: texts joined without padding, each attending to itself only.

No mask, no padding and one shape however long the texts are. Attention is called through transformers' own interface:
FlashAttention by document on a GPU, text by text elsewhere. BERT's family, with mean or first-token pooling; other
models are padded.
"""

# Axes:  t texts of one chunk   e = t + 1   n tokens of all of them   h heads   k width of a head   d width
#        b 1, or the texts of a padded chunk

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "gist_packed"
"""What transformers calls this attention."""

FAMILIES = {"bert"}
"""Whose positions begin at 0 and are given by position_ids."""


@dataclass(frozen=True)
class Packed:
    """The texts of one chunk, one after the other."""

    ids: Int[Tensor, "1 n"]
    positions: Int[Tensor, "1 n"]
    """Position of every token in its text."""
    ends: Int[Tensor, "e"]
    """Where texts begin and the last one ends; int32."""
    longest: int

    def to(self, device: torch.device) -> "Packed":
        ids, positions, ends = (t.to(device, non_blocking=True) for t in (self.ids, self.positions, self.ends))
        return Packed(ids, positions, ends, self.longest)

    def pinned(self) -> "Packed":
        return Packed(self.ids.pin_memory(), self.positions.pin_memory(), self.ends.pin_memory(), self.longest)


def pack(tokens: Sequence[np.ndarray]) -> Packed:
    lengths = np.array([len(ids) for ids in tokens])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate(tokens).astype(np.int64)
    positions = np.arange(len(ids)) - np.repeat(ends[:-1], lengths)
    ends = ends.astype(np.int32)
    return Packed(
        torch.from_numpy(ids[None]), torch.from_numpy(positions[None]), torch.from_numpy(ends), int(lengths.max())
    )


def can_pack(model: nn.Sequential, is_bf16: bool, device: torch.device) -> bool:
    """Whether this SentenceTransformer computes the same packed. On a GPU FlashAttention needs bf16."""
    _, pooling, *others = model
    return (
        is_bert(model)
        and type(pooling).__name__ == "Pooling"
        and pooling.pooling_mode in ("mean", "cls")
        and bool(pooling.include_prompt)
        and all(type(module).__name__ in ("Normalize", "Dense") for module in others)
        and (is_bf16 or device.type != "cuda")
    )


def is_bert(model: nn.Sequential) -> bool:
    """Whether its transformer is one of FAMILIES, whose attention is known."""
    config = getattr(getattr(model[0], "model", None), "config", None)
    is_absolute = getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
    return getattr(config, "model_type", None) in FAMILIES and is_absolute


def prepare_model(model: nn.Sequential) -> None:
    """Its attention takes packed and padded inputs from now on."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*given: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
        """None for packed texts, where a mask would have n² entries, and where nothing is padded. A GPU isn't asked
        whether all of a mask is true: the host would have to wait for the answer."""
        if attention_mask is None:
            return None
        options["attention_mask"] = attention_mask
        if attention_mask.is_cuda:
            options["allow_is_bidirectional_skip"] = False
        return sdpa_mask(*given, **options)

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, mask)
    transformer: Any = model[0]
    transformer.model.set_attn_implementation(NAME)


def embed_packed(model: nn.Sequential, packed: Packed) -> Float[Tensor, "t d"]:
    """What the SentenceTransformer's modules make of the texts."""
    transformer: Any
    pooling: Any
    transformer, pooling, *others = model
    output = transformer.model(
        input_ids=packed.ids,
        position_ids=packed.positions,
        token_type_ids=torch.zeros_like(packed.ids),
        ends=packed.ends,
        longest=packed.longest,
    )
    states = output.last_hidden_state[0]
    if pooling.pooling_mode == "cls":
        embedding = states[packed.ends[:-1].long()]
    else:
        wide = states if states.dtype == torch.float64 else states.float()
        # unsafe: no check that would wait for the device
        embedding = torch.segment_reduce(wide, "mean", offsets=packed.ends.long(), axis=0, unsafe=True)
    features = {"sentence_embedding": embedding}
    for module in others:
        features = module(features)
    return features["sentence_embedding"]


def _attention(
    module: nn.Module,
    query: Float[Tensor, "b h n k"],
    key: Float[Tensor, "b h n k"],
    value: Float[Tensor, "b h n k"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ends: Tensor | None = None,
    longest: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    if ends is None:  # padded
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if query.is_cuda:
        states = (t[0].transpose(0, 1) for t in (query, key, value))
        # What torch.nn.attention.varlen calls as well, which offers no dropout.
        output = torch.ops.aten._flash_attention_forward(
            *states, ends, ends, longest, longest, dropout, False, False, scale=scaling
        )[0]
        return output.unsqueeze(0), None
    sizes = ends.diff().tolist()
    texts = zip(*(t.split(sizes, dim=2) for t in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling) for q, k, v in texts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None
