"""The two sides of every comparison, and the models and rows that both get.

Ours is gist_dist's own step on a prepared corpus; what the benchmarks know of its functions is here. Theirs is
sentence-transformers' CachedGISTEmbedLoss, called with the token ids that ours was given, followed by the same
clipping and optimizer: neither side's time has tokenization in it.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT
from torch import Tensor, nn

from gist_dist.core.candidates import BatchIndex
from gist_dist.core.collectives import World, barrier
from gist_dist.core.optim import build_optimizer, clip_gradients
from gist_dist.core.plan import BatchPlan, plan_batch
from gist_dist.core.step import StepResult, TrainState, train_step
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.models.encoder import Guide, Padded, Student, override_dropout, pad
from gist_dist.models.packing import Packed
from gist_dist.recipe import parse_config

# ---- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a BERT encoder."""

    width: int
    layers: int
    heads: int
    inner: int

    @property
    def flops_per_token(self) -> int:
        """Of a forward pass, attention scores apart: two for each weight of a layer's matrices."""
        return 2 * self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    def flops(self, lengths: np.ndarray) -> float:
        """Of a forward pass over texts of so many tokens, without padding."""
        lengths = lengths.astype(np.float64)
        return float(self.flops_per_token * lengths.sum() + 4 * self.layers * self.width * (lengths**2).sum())


SHAPES = {
    "tiny": Shape(32, 1, 2, 64),
    "minilm-l2": Shape(384, 2, 12, 1536),
    "minilm": Shape(384, 6, 12, 1536),
    "minilm-l12": Shape(384, 12, 12, 1536),
    "bge-base": Shape(768, 12, 12, 3072),
    "uae-large": Shape(1024, 24, 16, 4096),
}


def find_model(name: str, work: Path) -> Path:
    """A SentenceTransformer folder. name: a folder; 'minilm' or 'minilm-l2' for the real all-MiniLM-L6-v2 or its first
    two layers; 'random:SHAPE' for random weights of one of SHAPES with MiniLM's tokenizer."""
    if Path(name).is_dir():
        return Path(name).absolute()
    sys.path.append(str(ROOT / "examples"))
    import offline_models

    real = offline_models.minilm(work / "models" / "all-MiniLM-L6-v2")
    if name == "minilm":
        return real
    if name == "minilm-l2":
        return offline_models.truncated(real, 2, work / "models" / "minilm-2-layers")
    kind, _, shape = name.partition(":")
    if kind != "random" or shape not in SHAPES:
        sys.exit(f"no model '{name}': give a folder, minilm, minilm-l2 or random:SHAPE with one of {', '.join(SHAPES)}")
    return random_encoder(work / "models" / f"random-{shape}", SHAPES[shape], tokenizer=real)


def random_encoder(folder: Path, shape: Shape, tokenizer: Path | None = None, positions: int = 512) -> Path:
    """A BERT with random weights and mean pooling. Without a tokenizer it has one of 30,000 made-up words."""
    if folder.is_dir():
        return folder
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    plain = folder.with_name(f".{folder.name}-plain")
    plain.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        words = AutoTokenizer.from_pretrained(tokenizer)
    else:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *MADE_UP_WORDS]
        (plain / "vocab.txt").write_text("\n".join(vocabulary))
        words = BertTokenizerFast(str(plain / "vocab.txt"), model_max_length=positions)
    words.save_pretrained(plain)
    torch.manual_seed(int(hashlib.sha256(folder.name.encode()).hexdigest()[:8], 16))
    config = BertConfig(
        vocab_size=len(words), hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.inner, max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config).save_pretrained(plain)
    aside = folder.with_name(f".{folder.name}-aside")
    SentenceTransformer(str(plain), device="cpu").save(str(aside), create_model_card=False)
    aside.rename(folder)
    return folder


MADE_UP_WORDS = [f"w{number}" for number in range(30_000)]


# ---- rows ----------------------------------------------------------------------------------------

DATA = {
    "short": ("qqp_duplicates",),
    "mixed": ("*",),
    "long": ("paper_title_abstract",),
}
"""Files of the developers' data pack: duplicate questions; all of its 21 sources; titles and abstracts."""

LENGTHS = {
    "short": ((5, 8, 10, 12, 16, 24, 51), (5, 8, 10, 12, 16, 24, 64)),
    "mixed": ((4, 8, 11, 14, 19, 37, 114), (3, 8, 12, 18, 47, 249, 256)),
    "long": ((5, 8, 12, 15, 18, 24, 39), (72, 120, 168, 206, 248, 256, 256)),
}
"""Tokens of anchors and of positives at QUANTILES, cut at 256: all-MiniLM-L6-v2's tokenizer on 5,000 rows of each."""

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)

Row = dict[str, str]


def load_rows(
    data: str, count: int, folder: Path | None = None, words: Sequence[str] = (), seed: int = 0
) -> tuple[list[Row], str]:
    """So many random rows with no text twice, and where they came from: the data pack, or made up where it is absent or
    too small. words: to make them up of, each one token."""
    if folder is not None and folder.is_dir():
        rows = _distinct(_pack_rows(data, folder, np.random.default_rng(seed)), count)
        if len(rows) == count:
            return rows, f"{data}: {', '.join(DATA[data])} of the data pack"
    return _made_up_rows(data, count, words or MADE_UP_WORDS, np.random.default_rng(seed)), f"{data}: made-up words"


def _pack_rows(data: str, folder: Path, rng: np.random.Generator):
    import pyarrow.parquet

    files = sorted(path for name in DATA[data] for path in folder.glob(f"{name}.parquet"))
    tables = [pyarrow.parquet.read_table(path, columns=["anchor", "positive"]) for path in files]
    joined = pyarrow.concat_tables(tables)
    for start in range(0, len(joined), 4096):
        if start == 0:
            order = rng.permutation(len(joined))
        yield from joined.take(order[start : start + 4096]).to_pylist()


def _distinct(rows, count: int) -> list[Row]:
    """Equal texts are where the two losses differ on purpose, and ours would encode them once."""
    kept, seen = [], set()
    for row in rows:
        keys = {"".join(filter(str.isalnum, text.lower()))[:2000] for text in row.values()}
        if len(keys) == 2 and "" not in keys and seen.isdisjoint(keys):
            seen |= keys
            kept.append(row)
            if len(kept) == count:
                break
    return kept


def _made_up_rows(data: str, count: int, words: Sequence[str], rng: np.random.Generator) -> list[Row]:
    columns = []
    for quantiles in LENGTHS[data]:
        # Two of a text's tokens are special ones; three words make it next to certain that no text comes twice.
        num_words = np.maximum(3, np.interp(rng.random(count), QUANTILES, quantiles).round().astype(int) - 2)
        drawn = rng.integers(len(words), size=num_words.sum())
        columns.append([" ".join(words[i] for i in part) for part in np.split(drawn, np.cumsum(num_words)[:-1])])
    return [{"anchor": anchor, "positive": positive} for anchor, positive in zip(*columns, strict=True)]


def whole_words(model: Path) -> list[str]:
    """Words that are one token each to this model."""
    from transformers import AutoTokenizer

    return sorted(word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalpha() and len(word) > 2)


# ---- ours ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What both sides are given."""

    student: Path
    guide: Path | None
    rows: tuple[Row, ...]
    """Batches are their first so many."""
    work: Path
    max_tokens: int = 256
    precision: str = "fp32"
    temperature: float = 0.05
    margin: float = 0.0
    dropout: float | None = None
    """null keeps the model's own."""
    device: str = "cpu"
    compile: bool = False
    """Ours alone."""

    def recipe(self, **sections: Any) -> dict[str, Any]:
        """For gist_dist; sections are added to."""
        encoder = {"max_tokens": self.max_tokens, "precision": self.precision, "compile": self.compile}
        tree: dict[str, Any] = {
            "name": "bench",
            "output_dir": str(self.work),
            "student": {"model": str(self.student), "dropout": self.dropout, **encoder},
            "guide": {"model": str(self.guide), **encoder} if self.guide else None,
            "data": {"sources": [{"path": str(self._rows_file())}]},
            "batch": {"global_size": len(self.rows)},
            "loss": {"temperature": self.temperature, "margin": self.margin},
        }
        for name, values in sections.items():
            tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
        return tree

    def _rows_file(self) -> Path:
        """Named by content, so that a corpus is prepared once."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        path = self.work / "rows" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path


def setting_of(arguments: argparse.Namespace, data: str, count: int, **fields: Any) -> tuple[Setting, str]:
    """For scripts with harness.model_flags; also says where the rows came from."""
    student, guide = (find_model(name, arguments.work) for name in (arguments.student, arguments.guide))
    rows, origin = load_rows(data, count, arguments.data_folder, whole_words(student))
    return Setting(student, guide, tuple(rows), arguments.work, arguments.max_tokens, **fields), origin


def can_cache() -> bool:
    """Whether this gist_dist has a guide cache."""
    return find_spec("gist_dist.models.guide_cache") is not None


class Ours:
    """gist_dist's training step on the first n rows."""

    def __init__(self, setting: Setting, world: World | None = None, mode: str = "online", **batch: Any) -> None:
        """mode: online, cache, or none for no guide. batch: fields of the recipe's section batch."""
        world = world or World()
        if mode == "none":
            setting = replace(setting, guide=None)
        recipe = setting.recipe(batch={"global_size": len(setting.rows), **batch})
        if mode == "cache":
            recipe["guide"]["mode"] = "cache"
        self.config = parse_config(recipe)
        self.student = Student(self.config.student, setting.device)
        guide = Guide(self.config.guide, setting.device) if self.config.guide else None
        self.corpus = _rank_0_first(lambda: prepare(self.config, self.student, guide, progress=_silent), world)
        self.cache = None
        if mode == "cache":
            self.cache = _rank_0_first(lambda: _filled_cache(self.config, self.corpus, guide), world)
        self.guide = None if self.cache else guide
        optimizer = build_optimizer(self.student.model, self.config.optim)
        self.train_state = TrainState(self.config, self.corpus, self.student, self.guide, optimizer, world)
        self.num_steps = 0

    def plan(self, n: int) -> BatchPlan:
        self.num_steps += 1  # new dropout for every step, as in training
        rows = np.arange(n)
        plan = plan_batch(self.corpus, rows, self.num_steps, self.train_state.chunk_rule, self.guide is not None)
        if self.cache is None:
            return plan
        cache, positions = self.cache
        return replace(plan, guide_embeddings=cache.embeddings(positions[plan.guide_inputs]))

    def step(self, n: int) -> StepResult:
        """One whole step, planning included (in training another thread plans meanwhile)."""
        return train_step(self.train_state, self.plan(n))

    def tokens(self, n: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of anchors and of positives, as a model is given them."""
        anchors, positives = self.corpus.anchors[:n], self.corpus.positives[:n]
        return self.corpus.student_tokens(anchors), self.corpus.student_tokens(positives)

    def lengths(self, n: int) -> np.ndarray:
        """Tokens of every text that a step encodes."""
        return self.corpus.student_lengths[self.plan(n).texts]

    def guide_inputs(self, plan: BatchPlan) -> tuple[list[np.ndarray], np.ndarray]:
        """Text numbers of the guide's chunks, and where among them all each of the plan's texts is."""
        order = np.argsort(np.concatenate([chunk.texts for chunk in plan.guide_chunks]))
        return [plan.guide_inputs[chunk.texts] for chunk in plan.guide_chunks], order[plan.guide_input_of]

    def recorded(self, n: int) -> tuple[StepResult, list["Encoded"]]:
        """A step, and what its encoders were asked for."""
        calls: list[Encoded] = []
        encoders = [("student", self.student)] + [("guide", self.guide)] * (self.guide is not None)
        for name, encoder in encoders:
            encoder.encode = _recording(encoder.encode, name, calls)  # type: ignore[method-assign]
        try:
            return self.step(n), calls
        finally:
            for _, encoder in encoders:
                del encoder.encode


@dataclass(frozen=True)
class Encoded:
    """One call of an encoder."""

    encoder: str
    with_graph: bool
    num_texts: int
    num_tokens: int
    """Without padding."""
    padded_tokens: int


def _recording(encode: Callable[..., Tensor], name: str, calls: list[Encoded]) -> Callable[..., Tensor]:
    def recording(padded: Padded | Packed, *arguments: Any, **options: Any) -> Tensor:
        lengths = padded.ends.diff().tolist() if isinstance(padded, Packed) else padded.mask.sum(dim=1).tolist()
        with_graph = name == "student" and torch.is_grad_enabled()
        padded_tokens = sum(lengths) if isinstance(padded, Packed) else len(lengths) * max(lengths)
        calls.append(Encoded(name, with_graph, len(lengths), sum(lengths), padded_tokens))
        return encode(padded, *arguments, **options)

    return recording


def _rank_0_first(make: Callable[[], Any], world: World) -> Any:
    """The others find on disk what it has made."""
    made = make() if world.rank == 0 else None
    barrier(world)
    return made if world.rank == 0 else make()


def _filled_cache(config: Any, corpus: Corpus, guide: Guide) -> tuple[Any, np.ndarray]:
    """The guide's cache with all texts of the corpus, and where each text is in it."""
    from gist_dist.models.guide_cache import fill, open_guide_cache

    cache = open_guide_cache(config, guide)
    texts = np.arange(len(corpus.identity))
    fill(cache, corpus.guide_keys, corpus.guide_tokens, corpus.guide_lengths, guide, config.batch.tokens_at_once)
    return cache, cache.find(corpus.guide_keys[texts])


def _silent(line: str) -> None:
    pass


def pair_batch(n: int) -> BatchIndex:
    """n rows without hard negatives whose 2n texts are all different: anchors first, then positives."""
    numbers = torch.arange(2 * n)
    return BatchIndex(numbers[:n], numbers[n:], torch.empty(0, dtype=torch.int64), numbers)


# ---- theirs --------------------------------------------------------------------------------------


class Theirs:
    """sentence-transformers' CachedGISTEmbedLoss on the same token ids, as its trainer calls it.

    In a process group it gathers across devices, the model is wrapped as transformers' Trainer wraps it (DDP that looks
    for unused parameters), and every process has its share of the rows.
    """

    def __init__(self, setting: Setting, ours: Ours, world: World | None = None, mini_batch_size: int = 32) -> None:
        from sentence_transformers import SentenceTransformer

        self.world, self.tokens, self.device = world or World(), ours.tokens, torch.device(setting.device)
        self.model = SentenceTransformer(str(setting.student), device=setting.device).train()
        guide = SentenceTransformer(str(setting.guide), device=setting.device).eval().requires_grad_(False)
        self.model.max_seq_length = guide.max_seq_length = setting.max_tokens
        if setting.dropout is not None:
            override_dropout(self.model, setting.dropout)
        self.optimizer = build_optimizer(self.model, ours.config.optim)
        self.max_grad_norm = ours.config.optim.max_grad_norm
        if setting.precision == "bf16":
            self.model.forward = _autocast(self.model.forward, self.device)  # as accelerate does it
            guide.forward = _autocast(guide.to(torch.bfloat16).forward, self.device)
        model: nn.Module = self.model
        if self.world.size > 1:
            model = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
            model.preprocess = self.model.preprocess
        gather = self.world.size > 1
        self.loss = their_loss(self.model, guide, setting.temperature, setting.margin, mini_batch_size, gather)
        self.loss.model = model
        assert not self.loss.must_retokenize, "guide and student have different tokenizers"
        self._features: dict[int, list[dict[str, Tensor]]] = {}

    def step(self, n: int) -> tuple[float, float]:
        """One whole step on this process's share of the first n rows: the share's loss, the gradient's norm."""
        features = [{name: t.to(self.device) for name, t in column.items()} for column in self.features(n)]
        loss = self.loss(features, torch.empty(0))
        loss.backward()
        grad_norm = clip_gradients([p for p in self.model.parameters() if p.requires_grad], self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), float(grad_norm)

    def num_tokens(self, n: int) -> int:
        """Of this process's share, without padding."""
        return sum(int(column["attention_mask"].sum()) for column in self.features(n))

    def padded_tokens(self, n: int) -> int:
        """What one pass over this process's share encodes, each mini-batch as long as its longest text."""
        lengths = [column["attention_mask"].sum(dim=1) for column in self.features(n)]
        parts = [part for column in lengths for part in column.split(self.loss.mini_batch_size)]
        return sum(len(part) * int(part.max()) for part in parts)

    def features(self, n: int) -> list[dict[str, Tensor]]:
        """What their collator makes of the two columns: padded to the longest text."""
        if n not in self._features:
            share = slice(self.world.rank * n // self.world.size, (self.world.rank + 1) * n // self.world.size)
            tokenizer = self.model.tokenizer
            self._features[n] = []
            for column in self.tokens(n):
                padded = pad(column[share], tokenizer.pad_token_id, tokenizer.padding_side)
                features = {"input_ids": padded.ids, "attention_mask": padded.mask}
                if "token_type_ids" in tokenizer.model_input_names:
                    features["token_type_ids"] = torch.zeros_like(padded.ids)
                self._features[n].append(features)
        return self._features[n]


def _autocast(forward: Callable[..., dict[str, Tensor]], device: torch.device) -> Callable[..., dict[str, Tensor]]:
    def autocast(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            output = forward(*arguments, **options)
        return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in output.items()}

    return autocast


def their_loss(
    model: Any, guide: Any, temperature: float, margin: float, mini_batch_size: int, gather: bool = False
) -> nn.Module:
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

    return CachedGISTEmbedLoss(
        model, guide, temperature, mini_batch_size, margin=margin, gather_across_devices=gather
    )  # fmt: skip
