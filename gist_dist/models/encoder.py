"""Student and Guide: a SentenceTransformer that is fed token ids and gives unit vectors."""

# Axes:  t texts of one chunk   l tokens of its longest text   d width

import copy
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_folder
from gist_dist.common.stock_model import NO_LIMIT, Adopted, Prompts, adopted, prompts_of
from gist_dist.config import GuideConfig, RolePrompts, RunConfig, StudentConfig
from gist_dist.core.gradcache import make_sparse
from gist_dist.models.compiled import compile_layers
from gist_dist.models.cpu_dropout import FastDropout
from gist_dist.models.folder import licence_files
from gist_dist.models.load import Loaded, load, transformer_of
from gist_dist.models.packing import Packed, can_pack, embed_packed, is_bert, pack, prepare_model
from gist_dist.models.precision import suited
from gist_dist.models.probe import check_encoder, check_saved, measure
from gist_dist.models.tokenizer import TextTokenizer, Tokens, backend_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

TOKENIZER_PROBES = (
    "a",
    "",
    " Two  Words\n",
    "word " * 3000,
    "https://example.org/a.png",
    "naïve Ünï 東京 😀",
    "[MASK] </s>",
)

WORD_MARKS = ("▁", "Ġ")
"""How vocabularies spell the bare beginning of a word."""


@dataclass(frozen=True)
class Padded:
    """The texts of one chunk, padded to the longest."""

    ids: Int[Tensor, "t l"]
    mask: Int[Tensor, "t l"]
    """The attention mask."""
    prompt_lengths: tuple[int, ...] | None = None
    """Tokens that are not pooled, of every text."""
    is_full: bool = False
    """All texts are as long as the longest."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Inputs = Sequence[np.ndarray] | Padded | Packed
"""What an encoder is fed: token ids, or what Encoder.inputs() has made of them."""


class Encoder:
    """What student and guide have in common: a model, its tokenizer and its limit of tokens."""

    def __init__(
        self,
        config: StudentConfig | GuideConfig,
        section: str,
        device: torch.device | str = "cpu",
        loaded: Loaded | None = None,
    ) -> None:
        """loaded: a model that is there already, in place of the recipe's."""
        config = config.model_copy(update={"precision": suited(config.precision, torch.device(device))})
        self.config, self.precision = config, config.precision
        self.loaded = loaded or load(config, section, device)
        self.model = self.loaded.model
        self.section, self.skipped = section, list[np.ndarray]()
        self.width, self.has_unit_embeddings = measure(self) if loaded else check_encoder(self)
        self.prompts = self.prompts_with(None)

    @property
    def max_tokens(self) -> int | None:
        """Texts are cut to this many; None: they are never cut."""
        limit = self.model.max_seq_length
        return limit if limit and limit < NO_LIMIT else None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prompts_with(self, of_source: RolePrompts | None) -> dict[str, str]:
        """By role: the source's, else the recipe's, and where neither says anything the model's own. UserError for one
        that leaves no room for a text."""
        given = of_source or self.config.prompts
        query, document = prompts_of(self.model, {"query": given.anchor, "document": given.positive})
        prompts = {"anchor": query, "positive": document}
        prompts["negatives"] = document if given.negatives is None else given.negatives
        for prompt in filter(None, prompts.values()):
            self._take(prompt)
        return prompts

    def learn_prompts(self, of_sources: Iterable[RolePrompts | None]) -> None:
        """A model that pools without its prompt has to know those of all sources before it encodes."""
        for of_source in of_sources:
            self.prompts_with(of_source)

    def _take(self, prompt: str) -> None:
        """A prompt that texts will have."""
        ids, _ = self.tokenizer.tokens_of([prompt])
        shown = repr(prompt if len(prompt) < 60 else f"{prompt[:60]}…")
        if self.max_tokens and len(ids) >= self.max_tokens:
            raise UserError(
                f"{self.section}.prompts: {shown} alone fills the {self.max_tokens} tokens that texts are cut to; "
                f"shorten it, or raise {self.section}.max_tokens"
            )
        if not self.pools_without_prompt:
            return
        # As sentence-transformers counts: without a special token at its end.
        ends = bool(len(ids)) and int(ids[-1]) in self.model.tokenizer.all_special_ids
        ids = ids[: len(ids) - ends]
        if not any(np.array_equal(ids, known) for known in self.skipped):
            self.skipped = sorted([*self.skipped, ids], key=len, reverse=True)

    @property
    def pools_without_prompt(self) -> bool:
        return any(getattr(module, "include_prompt", True) is False for module in self.model)

    def _prompt_length(self, ids: np.ndarray) -> int:
        """Tokens of the longest known prompt that a text begins with; the prompt's last one may have joined the text's
        first."""
        for prompt in self.skipped:
            told = prompt if len(prompt) < 3 else prompt[:-1]
            if len(ids) > len(told) and np.array_equal(ids[: len(told)], told):
                return len(prompt)
        return 0

    packs = False
    """Whether inputs() joins texts without padding."""
    takes_no_mask = False
    """Whether the model may go without a mask where nothing is padded; else transformers looks at it."""

    def get_ready(self, packing: bool | None = False) -> None:
        """To encode in earnest, not only to tokenize. UserError if this machine can't do it as the recipe says.

        packing: join texts without padding where the model can; None: on a GPU.
        """
        packing = self.device.type == "cuda" if packing is None else packing
        section = "student" if isinstance(self.config, StudentConfig) else "guide"
        if self.config.attention == "flash_attention_2" and self.device.type != "cuda":
            raise UserError(f"{section}.attention: flash_attention_2 needs a GPU and there is none; leave it out")
        if self.config.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise UserError(f"{section}.compile needs a C++ compiler and there is none; install g++ or leave it out")
        if self.config.compile:
            compile_layers(self.model)
        self.packs = (
            packing and not self.config.attention and can_pack(self.model, self.config.precision == "bf16", self.device)
        )
        needs_no_look = self.device.type == "cuda" and not self.config.attention and is_bert(self.model)
        self.takes_no_mask = self.packs or needs_no_look
        if self.takes_no_mask:
            prepare_model(self.model)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of all texts, joined, and the number of tokens of each; exactly what model.encode would see."""
        return self.tokenizer(texts)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """What turns texts into token ids, apart from the weights."""
        own = self.model.tokenizer
        silent = {own.unk_token_id, own.cls_token_id, own.sep_token_id, own.bos_token_id, own.eos_token_id}
        silent |= {own.pad_token_id, *map(own.convert_tokens_to_ids, WORD_MARKS)}
        return TextTokenizer(
            fingerprint=self.tokenizer_fingerprint(),
            max_tokens=self.max_tokens,
            meaningless=np.array(sorted(silent - {None}), dtype=np.int32),
            tokens_of=partial(backend_tokens, own.backend_tokenizer)
            if self._backend_suffices
            else Preprocess(self.model, self.config),
        )

    @cached_property
    def _backend_suffices(self) -> bool:
        """Whether the bare tokenizer gives what the model's preprocessing gives, which pads and takes twice as long."""
        backend = getattr(self.model.tokenizer, "backend_tokenizer", None)
        expected = Preprocess(self.model, self.config)(TOKENIZER_PROBES)  # also sets the backend's truncation
        return backend is not None and all(map(np.array_equal, backend_tokens(backend, TOKENIZER_PROBES), expected))

    def tokenizer_fingerprint(self) -> str:
        """Hash of everything that turns a text into token ids."""
        tokenizer = self.model.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            parts = json.loads(backend.to_str())
            parts.pop("padding", None)  # of the last call
            vocabulary = json.dumps(parts)
        else:
            vocabulary = repr(sorted(tokenizer.get_vocab().items()))
        transformer = self.model[0]
        lower = getattr(transformer, "do_lower_case", False)
        described = f"{vocabulary}|{type(tokenizer).__name__}|{self.model.max_seq_length}|{lower}"
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def padded(self, tokens: Sequence[np.ndarray]) -> Padded:
        """Ready to be embedded; in pinned memory for a model on a GPU, so that nothing waits for the copy."""
        tokenizer = self.model.tokenizer
        padded = pad(tokens, tokenizer.pad_token_id or 0, tokenizer.padding_side)
        if self.skipped:
            padded = replace(padded, prompt_lengths=tuple(map(self._prompt_length, tokens)))
        if self.device.type != "cuda":
            return padded
        with torch.cuda.device(self.device):  # another thread would take the node's first GPU
            return replace(padded, ids=padded.ids.pin_memory(), mask=padded.mask.pin_memory())

    def inputs(self, tokens: Sequence[np.ndarray]) -> Padded | Packed:
        """Ready to be embedded: packed where this model is, else padded."""
        if not self.packs:
            return self.padded(tokens)
        packed = pack(tokens)
        if self.device.type != "cuda":
            return packed
        with torch.cuda.device(self.device):
            return packed.pinned()

    def embed(self, texts: Inputs) -> Float[Tensor, "t d"]:
        """Unit vectors, fp32 (fp64 for an fp64 model), of texts given as token ids."""
        if isinstance(texts, Packed):
            with self.autocast():
                return self._unit(embed_packed(self.model, texts.to(self.device)))
        padded = texts if isinstance(texts, Padded) else self.padded(texts)
        features = {
            "input_ids": padded.ids.to(self.device, non_blocking=True),
            "attention_mask": padded.mask.to(self.device, non_blocking=True),
        }
        if "token_type_ids" in self.model.tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        with self.autocast():
            if padded.prompt_lengths is not None and any(padded.prompt_lengths):
                embedding = _pooled_by_prompt(self.model, features, padded.prompt_lengths)
            else:
                if self.takes_no_mask and padded.is_full:
                    del features["attention_mask"]
                embedding = self.model(features)["sentence_embedding"]
        return self._unit(embedding)

    def _unit(self, embedding: Tensor) -> Tensor:
        """Cut to truncate_dim, where the model brings one, and of length 1."""
        wide = embedding.double() if embedding.dtype == torch.float64 else embedding.float()
        return F.normalize(wide[:, : self.model.truncate_dim], dim=-1)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _pooled_by_prompt(model: nn.Module, features: dict[str, Tensor], lengths: Sequence[int]) -> Tensor:
    """The texts whose prompts are of one length together, which is how Pooling leaves prompts out."""
    transformer, *others = model.children()
    features = transformer(features)
    parts, order = [], []
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        at = torch.tensor(rows, device=features["attention_mask"].device)
        part: dict[str, Any] = {
            name: value[at]
            for name, value in features.items()
            if isinstance(value, Tensor) and len(value) == len(lengths)
        }
        part |= {"prompt_length": length} if length else {}
        for module in others:
            part = module(part)
        parts.append(part["sentence_embedding"])
        order += rows
    return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]


class Preprocess:
    """Texts to token ids by the model's own preprocessing; unpickled, it loads the model again."""

    def __init__(self, model: "SentenceTransformer", config: StudentConfig | GuideConfig) -> None:
        self.model, self.config = model, config

    def __call__(self, texts: Sequence[str]) -> Tokens:
        features = self.model.preprocess(list(texts))
        real = features["attention_mask"].bool()
        if features.get("token_type_ids") is not None:
            assert not features["token_type_ids"][real].any(), "single texts are expected to be of type 0"
        ids = features["input_ids"][real].numpy().astype(np.int32)
        return ids, real.sum(dim=1).numpy().astype(np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_preprocess, (self.config,)


def _load_preprocess(config: StudentConfig | GuideConfig) -> Preprocess:
    section = "student" if isinstance(config, StudentConfig) else "guide"
    return Preprocess(Encoder(config, section).model, config)


class Student(Encoder):
    """The model that is trained."""

    def __init__(self, config: StudentConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, "student", device)
        transformer = transformer_of(self.model)
        _refuse_adapters(self.model, config)
        if self.is_compared_otherwise:
            logger.warning(
                "student.model: '%s' is compared by %s, and its embeddings are not of length 1; training takes "
                "cosines, and the saved model says cosine",
                config.model,
                self.model.similarity_fn_name,
            )
        self.model.train()
        if config.dropout is not None:
            override_dropout(self.model, config.dropout)
        if config.gradient_checkpointing:
            if not transformer.supports_gradient_checkpointing:
                raise UserError(f"student.gradient_checkpointing: {config.model} does not offer it; leave it out")
            newer_name = getattr(transformer, "activation_checkpointing_enable", None)
            (newer_name or transformer.gradient_checkpointing_enable)({"use_reentrant": False})
        is_traced = config.compile or config.gradient_checkpointing
        self.dropout = nullcontext() if is_traced or self.device.type != "cpu" else FastDropout()
        for module in transformer.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == transformer.config.vocab_size:
                make_sparse(module)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def encode(self, texts: Inputs, dropout_seed: Sequence[int]) -> Float[Tensor, "t d"]:
        """Equal arguments draw equal dropout, so that a second encode repeats the first."""
        torch.manual_seed(int(np.random.SeedSequence(dropout_seed).generate_state(1, np.uint64)[0]))
        with self.dropout:
            return self.embed(texts)

    def save(self, folder: Path, config: RunConfig | None = None) -> None:
        """A stock SentenceTransformer directory, in student.save_dtype: all that the model brought, with its own limit
        of tokens, the prompts that it was trained with, and cosine similarity where its embeddings have other lengths.

        config: of the run, whose sources may have prompts of their own.
        """
        model, was_training = self.model, self.model.training
        before = model.max_seq_length, model.prompts, model.default_prompt_name, model.similarity_fn_name
        kept = kept_prompts(self, config)
        model.max_seq_length = self.loaded.limit_to_save
        model.prompts, model.default_prompt_name = {**kept.prompts}, kept.default_prompt_name
        model.similarity_fn_name = "cosine" if self.is_compared_otherwise else model.similarity_fn_name
        model.eval()
        try:
            with _stored_as(model, self.save_dtype):
                model.save(str(folder), create_model_card=False)
            for file in licence_files(self.loaded.folder):
                shutil.copy(file, folder / file.name)
        finally:
            model.train(was_training)
            model.max_seq_length, model.prompts, model.default_prompt_name, model.similarity_fn_name = before

    @property
    def is_compared_otherwise(self) -> bool:
        """Whether its similarity, of embeddings that are not of length 1, is another than training's cosine."""
        return self.model.similarity_fn_name not in (None, "cosine") and not self.has_unit_embeddings

    @property
    def save_dtype(self) -> torch.dtype:
        assert isinstance(self.config, StudentConfig)
        if self.config.save_dtype == "checkpoint":
            return getattr(torch, self.loaded.stored_dtype or "float32")
        return DTYPES[self.config.save_dtype]


@contextmanager
def _stored_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it the fp32 weights are of this dtype; then they are what they were."""
    kept = {p: p.data for p in model.parameters() if p.dtype == torch.float32 and dtype != torch.float32}
    try:
        for parameter in kept:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def _refuse_adapters(model: nn.Module, config: StudentConfig) -> None:
    named = list(model.named_parameters())
    if any("lora_" in name for name, _ in named):
        raise UserError(
            f"student.model: '{config.model}' is loaded with a PEFT adapter, which is not trained here; merge it "
            "(merge_and_unload()) and name the merged folder"
        )
    if not any(parameter.requires_grad for _, parameter in named):
        raise UserError(f"student.model: '{config.model}' has no trainable weights: none of them takes a gradient")


def kept_prompts(student: Student, config: RunConfig | None) -> Adopted:
    """What the saved model has: those of training as query and document, and those of sources that differ from them by
    the source's name."""
    of_queries = student.prompts_with(config.prompts_to_keep if config else None)
    kept = adopted(student.model, Prompts(of_queries["anchor"], of_queries["positive"]))
    for source in config.data.sources if config else ():
        own = student.prompts_with(source.prompts.student)
        if own["anchor"] != of_queries["anchor"] or own["positive"] != of_queries["positive"]:
            kept.prompts[f"{source.label}-query"] = own["anchor"]
            kept.prompts[f"{source.label}-document"] = own["positive"]
    return kept


def save_model(student: Student, folder: Path, config: RunConfig | None = None) -> None:
    """Written aside, loaded again and compared, and renamed, so that a model folder is always whole and embeds as it
    was trained. UserError where it doesn't."""

    def write(aside: Path) -> None:
        student.save(aside, config)
        check_saved(student, aside, student.prompts_with(config.prompts_to_keep if config else None))

    write_folder(folder, write)


class Guide(Encoder):
    """The frozen model that identifies false negatives."""

    def __init__(self, config: GuideConfig, device: torch.device | str = "cpu", loaded: Loaded | None = None) -> None:
        super().__init__(config, "guide", device, loaded)
        self.model.eval().requires_grad_(False)
        if config.precision == "bf16":
            for parameter in self.model.parameters():  # tables of rotary positions stay fp32
                parameter.data = parameter.data.bfloat16()

    @classmethod
    def of_run(cls, config: RunConfig, device: torch.device | str = "cpu") -> "Guide":
        """The recipe's, which knows the prompts of all sources."""
        guide = cls(config.guide_or_student, device)
        guide.learn_prompts(source.prompts.guide for source in config.data.sources)
        return guide

    def encode(self, texts: Inputs) -> Float[Tensor, "t e"]:
        """Rounded to fp16, which the guide cache keeps, so that cached and online runs score the same numbers."""
        with torch.inference_mode():
            embeddings = self.embed(texts)
            return embeddings.half().to(embeddings.dtype)

    @classmethod
    def copy_of(cls, student: Student, config: GuideConfig) -> "Guide":
        """The student as it now is, frozen."""
        guide = cls(config, student.device, replace(student.loaded, model=copy.deepcopy(student.model)))
        guide.skipped = student.skipped
        return guide


def override_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout: the modules, and the plain numbers that attention code hands to its kernels."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(module, name, probability)


def pad(tokens: Sequence[np.ndarray], pad_id: int, side: str = "right") -> Padded:
    lengths = np.array([len(ids) for ids in tokens])
    columns = np.arange(lengths.max())
    if side == "left":
        columns = columns[::-1]
    mask = columns < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate(tokens)
    return Padded(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), is_full=bool(mask.all()))
