"""Dropout on a CPU, several times faster than torch's, which draws one number after the other.

torch also leaves its fused attention for one of separate steps over the whole chunk where attention has dropout. Here
random bits come 64 at a time from torch's generator, and attention is worked off in pieces that stay in the cache.
Both take bf16 as well: products, weights and what is kept for the backward pass are then bf16, sums fp32.
"""

# Axes:  t texts of one chunk   h heads   l tokens of its longest text   d width of a head

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SCORES_AT_ONCE = 2**18
"""Attention scores of one piece: 1 MB in fp32."""


class FastDropout(TorchFunctionMode):
    """Within it, models drop out fast. What is not on a CPU, or of another kind, goes to torch as ever.

    A backward pass may come after it, but not one that runs layers again (gradient checkpointing).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fast: dict[Any, Callable[..., Any]] = {F.dropout: dropout, F.scaled_dot_product_attention: attention}
        return fast.get(func, func)(*args, **(kwargs or {}))


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout."""
    if not training or not 0 < p < 1 or not _is_plain(input):
        return F.dropout(input, p, training, inplace)
    with _without_autocast():
        return _Dropout.apply(input, p)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    is_usual = (
        all(map(_is_plain, (query, key, value)))
        and query.ndim == 4
        and query.shape == key.shape == value.shape
        and (attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.ndim == 4))
    )
    if not 0 < dropout_p < 1 or is_causal or enable_gqa or not is_usual:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(len(query), -1, -1, -1)
    with _without_autocast():
        return _Attention.apply(query, key, value, attn_mask, dropout_p, scale or 1 / math.sqrt(query.shape[-1]))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64, torch.bfloat16)


def _without_autocast() -> torch.autocast:
    """What is computed below has its dtype already."""
    return torch.autocast("cpu", enabled=False)


def _kept(shape: torch.Size, p: float) -> Bool[Tensor, "..."]:
    """False with probability p, to within 1/65536."""
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return (draws.view(torch.int16)[: shape.numel()] >= round(p * 2**16) - 2**15).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        kept = _kept(input.shape, p)
        ctx.save_for_backward(kept)
        ctx.p = p
        return (input * kept).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(1 / (1 - ctx.p)), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "t h l d"],
        key: Float[Tensor, "t h l d"],
        value: Float[Tensor, "t h l d"],
        mask: Bool[Tensor, "t _ l l"] | None,
        p: float,
        scale: float,
    ) -> Float[Tensor, "t h l d"]:
        t, h, length, _ = query.shape
        output = torch.empty_like(query)
        weights, kept = [], []
        # As torch has it, a token that may see none gets zeros: padding on the left of a decoder, or beyond a window.
        is_blind = None if mask is None else ~mask.any(dim=-1, keepdim=True)
        is_blind = is_blind if is_blind is not None and bool(is_blind.any()) else None
        pieces = range(0, t, max(1, SCORES_AT_ONCE // (h * length * length)))
        for start in pieces:
            texts = slice(start, start + pieces.step)
            scores = (query[texts] * scale) @ key[texts].transpose(-1, -2)
            if mask is not None:
                scores.masked_fill_(~mask[texts], -torch.inf)
            torch.softmax(scores, dim=-1, out=scores)
            if is_blind is not None:
                scores.masked_fill_(is_blind[texts], 0.0)
            is_kept = _kept(scores.shape, p)
            output[texts] = (scores * is_kept) @ value[texts]
            if any(ctx.needs_input_grad):
                weights.append(scores)
                kept.append(is_kept)
        output *= 1 / (1 - p)
        ctx.save_for_backward(query, key, value, output, *weights, *kept)
        ctx.p, ctx.scale, ctx.pieces = p, scale, pieces
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *saved = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for number, start in enumerate(ctx.pieces):
            texts = slice(start, start + ctx.pieces.step)
            weights, kept = saved[number], saved[len(ctx.pieces) + number]
            dropped = (weights * kept).mul_(1 / (1 - ctx.p))
            d_value[texts] = dropped.transpose(-1, -2) @ gradient[texts]
            d_dropped = gradient[texts] @ value[texts].transpose(-1, -2)
            if weights.dtype == torch.bfloat16:  # torch's own keeps its sums in fp32
                d_weights = d_dropped.mul_(kept).mul_(1 / (1 - ctx.p))
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            else:
                # weights · (d_weights − their mean under the weights), which is that of gradient · output.
                mean = (gradient[texts] * output[texts]).sum(dim=-1, keepdim=True)
                d_scores = dropped.mul_(d_dropped).addcmul_(weights, mean, value=-1).mul_(ctx.scale)
            d_query[texts] = d_scores @ key[texts]
            d_key[texts] = d_scores.transpose(-1, -2) @ query[texts]
        return d_query, d_key, d_value, None, None, None
