"""Tiny random models of the architectures that people bring, as SentenceTransformer folders, made offline."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tiny import WORDS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
POSITIONS = 64
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SIZES | {"max_position_embeddings": POSITIONS}),
    "roberta": ("RobertaConfig", SIZES | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaConfig", SIZES | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}),
    "mpnet": ("MPNetConfig", SIZES | {"max_position_embeddings": POSITIONS + 2}),
    "distilbert": (
        "DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "deberta": ("DebertaV2Config", SIZES | {"max_position_embeddings": POSITIONS, "relative_attention": True}),
    "modernbert": (
        "ModernBertConfig", SIZES | {"max_position_embeddings": 128, "local_attention": 8, "num_hidden_layers": 3},
    ),
    "t5": ("T5Config", {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}),
    "qwen3": ("Qwen3Config", DECODER),
    "llama": ("LlamaConfig", DECODER),
    "mistral": ("MistralConfig", DECODER | {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", DECODER | {"sliding_window": 16}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
}  # fmt: skip
DECODERS = ("qwen3", "llama", "mistral", "gemma3", "gpt2")
SIDES = ("right", "left")
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean", "max")
EXTRAS = ("none", "dense", "normalize", "truncate", "dot")
PROMPTS = ("none", "model", "recipe", "default", "source")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Kind:
    """One cell of the matrix."""

    architecture: str = "bert"
    side: str = "right"
    pooling: str = "mean"
    extra: str = "none"
    prompts: str = "none"
    dtype: str = "float32"
    with_prompt: bool = True
    """include_prompt of the pooling."""

    @property
    def is_refused(self) -> bool:
        """Its positions count the padding on the left."""
        return self.side == "left" and self.architecture in ("bert", "distilbert", "gpt2", "deberta")

    def __str__(self) -> str:
        without = "" if self.with_prompt else "-without-prompt"
        return "-".join((self.architecture, self.side, self.pooling, self.extra, self.prompts, self.dtype)) + without


def matrix() -> Iterator[Kind]:
    """All of it, with the types of checkpoint and include_prompt in turn: 3,250 cells."""
    cells = itertools.product(ARCHITECTURES, SIDES, POOLINGS, EXTRAS, PROMPTS)
    for number, cell in enumerate(cells):
        yield Kind(*cell, DTYPES[number % 3], number % 4 != 3)


def design(turn: int = 0) -> Iterator[Kind]:
    """Every architecture twice, with every value of the other axes in turn; another turn pairs them otherwise."""
    for number, architecture in enumerate(ARCHITECTURES):
        for half, side in enumerate(SIDES):
            k = number + half * len(ARCHITECTURES) + turn
            yield Kind(
                architecture, side, POOLINGS[k % 5], EXTRAS[(k + k // 5) % 5], PROMPTS[(2 * k + k // 5) % 5],
                DTYPES[k % 3], k % 4 != 3,
            )  # fmt: skip


def drawn(rng: random.Random) -> Kind:
    values = (ARCHITECTURES, SIDES, POOLINGS, EXTRAS, PROMPTS, DTYPES, (True, True, False))
    return Kind(*(rng.choice(list(axis)) for axis in values))


def save_tokenizer(folder: Path, side: str = "right", ends: bool = False, pad: bool = True, limit: int | None = None):
    """Words and letters; <s> text </s>, or text <eos> where a decoder's last token is pooled."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz:0123456789"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *WORDS, *letters]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    single = "$A </s>" if ends else "<s> $A </s>"
    marks = [(mark, vocabulary[mark]) for mark in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B </s>", special_tokens=marks
    )
    told = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    told |= {"pad_token": "<pad>"} if pad else {}
    told |= {"model_max_length": limit} if limit else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=side, **told)
    fast.save_pretrained(folder)
    return fast


def save_plain(folder: Path, kind: Kind = Kind(), **tokenizer_options: Any) -> Path:
    """A transformers folder without modules of sentence-transformers."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder, kind.side, ends=kind.architecture in DECODERS, **tokenizer_options)
    name, settings = ARCHITECTURES[kind.architecture]
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, name)(vocab_size=len(tokenizer), **settings, **ids)
    torch.manual_seed(0)
    model = (
        transformers.T5EncoderModel(config) if kind.architecture == "t5" else transformers.AutoModel.from_config(config)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that texts differ
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.to(getattr(torch, kind.dtype)).save_pretrained(folder)
    return folder


def save(folder: Path, kind: Kind) -> Path:
    """A SentenceTransformer folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    plain = save_plain(folder.with_name(f"{folder.name}-plain"), kind)
    pooling = Pooling(32, pooling_mode=kind.pooling, include_prompt=kind.with_prompt)
    modules = [Transformer(str(plain)), pooling]
    modules += [Dense(32, 16)] * (kind.extra == "dense") + [Normalize()] * (kind.extra == "normalize")
    options: dict[str, Any] = {"truncate_dim": 20} if kind.extra == "truncate" else {}
    options |= {"similarity_fn_name": "dot"} if kind.extra == "dot" else {}
    if kind.prompts in ("model", "source"):
        options["prompts"] = {"query": "old : ", "document": "new : ", "other": "red : "}
    elif kind.prompts in ("default", "recipe"):
        options |= {"prompts": {"task": "wide : ", "other": "red : "}, "default_prompt_name": "task"}
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return folder


def with_settings(folder: Path, file: str, **values: Any) -> None:
    """Values put over those of a JSON file of the folder."""
    path = folder / file
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | values))


__all__ = ["Kind", "design", "drawn", "matrix", "replace", "save", "save_plain", "with_settings"]
