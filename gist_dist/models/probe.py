"""Measured at load: that an embedding depends on its text alone, and is the one that the stock model gives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line

if TYPE_CHECKING:
    from gist_dist.models.encoder import Encoder

SHORT, LONG = (
    "how to bake bread",
    "mix flour, water, salt and yeast, knead it for 10 minutes, let it rise and bake it hot",
)
DIFFERENT = 0.01
"""Length of the difference of two unit vectors, above which they are not the same up to rounding."""


def width_of(encoder: "Encoder") -> int:
    with torch.no_grad():
        return _embed(encoder, [SHORT]).shape[-1]


def check_encoder(encoder: "Encoder", section: str) -> int:
    """The width of its embeddings; UserError where what is trained could not be what is used."""
    name = f"{section}.model: '{encoder.config.model}'"
    was_training, precision = encoder.model.training, encoder.precision
    if encoder.config.attention != "flash_attention_2":  # which has no fp32
        encoder.precision = "fp32"
    bound = DIFFERENT_IN_BF16 if encoder.precision == "bf16" else DIFFERENT
    encoder.model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([_embed(encoder, [text]) for text in (SHORT, LONG)])
            together = _embed(encoder, [SHORT, LONG])
            stock = {how: _stock(encoder, how) for how in ("encode", "encode_query", "encode_document")}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} can't embed two texts: {one_line(error)}") from error
    finally:
        encoder.model.train(was_training)
        encoder.precision = precision
    if not bool(torch.isfinite(together).all()):
        raise UserError(f"{name} gives embeddings that are not finite; its weights are damaged, or its attention is")
    if (difference := _distance(alone, together)) > bound:
        side = encoder.model.tokenizer.padding_side
        raise UserError(
            f"{name}: an embedding depends on which texts are padded with it (a text alone and beside a longer one "
            f"differ by {difference:.2g}): positions count the padding on the {side}; set padding_side: "
            f"{'right' if side == 'left' else 'left'} in its tokenizer_config.json, or choose another model"
        )
    for how, embeddings in stock.items():
        if (difference := _distance(alone, embeddings)) > bound:
            raise UserError(
                f"{name}: its {how}() embeds otherwise than its modules do with token ids alone (they differ by "
                f"{difference:.2g}), so what is trained would not be what is used: a Router, or code of its own, asks "
                "for more than texts; choose another model"
            )
    return alone.shape[-1]


def _embed(encoder: "Encoder", texts: Sequence[str]) -> Tensor:
    ids, lengths = encoder.tokenizer.tokens_of(texts)
    return encoder.embed(np.split(ids, np.cumsum(lengths)[:-1])).float().cpu()


def _stock(encoder: "Encoder", how: str) -> Tensor:
    """One text at a time, without prompts."""
    encode = getattr(encoder.model, how)
    options = {"prompt": "", "normalize_embeddings": True, "show_progress_bar": False, "convert_to_tensor": True}
    with encoder.autocast():
        return torch.cat([encode([text], **options).float().cpu() for text in (SHORT, LONG)])


def _distance(one: Tensor, other: Tensor) -> float:
    """NaN counts as far."""
    if one.shape != other.shape:
        return float("inf")
    distance = (one - other).norm(dim=-1).max().item()
    return distance if distance == distance else float("inf")
