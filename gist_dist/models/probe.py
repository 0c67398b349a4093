"""Measured at load: that an embedding depends on its text alone, and is the one that the stock model gives."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.models.compiled import not_compiled
from gist_dist.models.load import cause_of

if TYPE_CHECKING:
    from gist_dist.models.encoder import Encoder, Student

SHORT = "how to bake bread"
LONG = "mix flour, water, salt and yeast, knead it for 10 minutes, let it rise for an hour and bake it hot"
DIFFERENT, DIFFERENT_IN_BF16 = 0.01, 0.1
"""Length of the difference of two unit vectors, above which they are not the same up to rounding."""


class Measured(NamedTuple):
    width: int
    has_unit_embeddings: bool
    """Whether encode() gives vectors of length 1 by itself."""


def measure(encoder: "Encoder") -> Measured:
    with _exactly(encoder):
        stock = _stock(encoder.model, "encode", [SHORT, LONG])
    return Measured(stock.shape[-1], _are_units(stock))


def check_encoder(encoder: "Encoder") -> Measured:
    """UserError where what is trained could not be what is used."""
    name = f"{encoder.section}.model: '{encoder.config.model}'"
    hows = ("encode", "encode_query", "encode_document")
    with _exactly(encoder) as bound:
        try:
            alone = torch.cat([_embed(encoder, [text]) for text in (SHORT, LONG)])
            together = _embed(encoder, [SHORT, LONG])
            with encoder.autocast():
                stock = {how: _stock(encoder.model, how, [SHORT, LONG]) for how in hows}
        except Exception as error:
            needs = f"one of its modules asks for {error}, which texts don't have"
            cause = needs if isinstance(error, KeyError) else cause_of(error)
            raise UserError(f"{name} can't embed two texts: {cause}") from error
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
        if (difference := _distance(alone, _units(embeddings))) > bound:
            raise UserError(
                f"{name}: its {how}() embeds otherwise than its modules do with token ids alone (they differ by "
                f"{difference:.2g}), so what is trained would not be what is used: a Router, or code of its own, asks "
                "for more than texts; choose another model"
            )
    return Measured(alone.shape[-1], _are_units(stock["encode"]))


def check_saved(student: "Student", folder: Path, prompts: Mapping[str, str]) -> None:
    """UserError unless the model in this folder, loaded as anybody would, embeds as the student does."""
    from sentence_transformers import SentenceTransformer

    config = student.config
    kwargs = {"dtype": torch.float32} | ({"attn_implementation": "eager"} if config.attention == "eager" else {})
    try:
        saved = SentenceTransformer(
            str(folder), device="cpu", trust_remote_code=config.trust_remote_code, model_kwargs=kwargs
        )
        if student.max_tokens:  # the saved one has its own
            saved.max_seq_length = student.max_tokens
        texts = [SHORT, LONG]
        stock = {role: _stock(saved, f"encode_{role}", texts, prompt=None) for role in ("query", "document")}
    except Exception as error:
        raise UserError(f"the trained model was saved and can't be loaded again: {one_line(error)}") from error
    with _exactly(student) as bound:
        bound = bound if student.save_dtype == torch.float32 else DIFFERENT_IN_BF16
        for role, prompt in (("query", prompts["anchor"]), ("document", prompts["positive"])):
            trained = _embed(student, [prompt + text for text in texts])
            if (difference := _distance(trained, _units(stock[role]))) > bound:
                raise UserError(
                    f"the saved model's encode_{role}() embeds otherwise than the trained one (they differ by "
                    f"{difference:.2g}), so it was not kept; the checkpoints are. Please report the kind of student"
                )


@contextmanager
def _exactly(encoder: "Encoder") -> Iterator[float]:
    """In fp32, without dropout and not compiled; gives the bound of what counts as the same."""
    model: Any = encoder.model
    before = model.training, encoder.precision
    if encoder.config.attention != "flash_attention_2":  # which has no fp32
        encoder.precision = "fp32"
    model.eval()
    try:
        with torch.no_grad(), not_compiled(model):
            yield DIFFERENT_IN_BF16 if encoder.precision == "bf16" else DIFFERENT
    finally:
        was_training, encoder.precision = before
        model.train(was_training)


def _embed(encoder: "Encoder", texts: Sequence[str]) -> Tensor:
    ids, lengths = encoder.tokenizer.tokens_of(texts)
    return encoder.embed(np.split(ids, np.cumsum(lengths)[:-1])).float().cpu()


def _stock(model: Any, how: str, texts: Sequence[str], prompt: str | None = "") -> Tensor:
    """One text at a time; prompt None: the one that the method takes by itself."""
    options = {"prompt": prompt, "show_progress_bar": False, "convert_to_tensor": True}
    encode = getattr(model, how)
    return torch.cat([encode([text], **options).float().cpu() for text in texts])


def _units(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings, dim=-1)


def _are_units(embeddings: Tensor) -> bool:
    return bool(((embeddings.norm(dim=-1) - 1).abs() < 1e-2).all())


def _distance(one: Tensor, other: Tensor) -> float:
    """NaN counts as far."""
    if one.shape != other.shape:
        return float("inf")
    distance = (one - other).norm(dim=-1).max().item()
    return distance if distance == distance else float("inf")
