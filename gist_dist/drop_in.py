"""The loss and its gradient caching inside sentence-transformers' own trainer, in place of its CachedGISTEmbedLoss.

    from gist_dist.drop_in import CachedGISTEmbedLoss

    loss = CachedGISTEmbedLoss(model, guide, temperature=0.05, gather_across_devices=True)
    SentenceTransformerTrainer(model=model, loss=loss, ...).train()

Arguments that both have mean the same. Ours encodes every distinct text once in chunks of similar length (chunk_tokens
in place of mini_batch_size), drops identical texts from the candidates, and with gather_across_devices the gradient is
that of one big batch, whatever the number of devices: anchors are gathered too.
"""

# Axes:  b rows of this device   g rows of all   t texts of one chunk   u unique texts here   U of all devices
#        d student width   e guide width

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gist_dist.config import LossConfig
from gist_dist.core.candidates import BatchIndex, row_blocks
from gist_dist.core.collectives import World, all_gather_rows, reduce_scatter_rows
from gist_dist.core.gradcache import ActivationBudget, first_pass, second_pass
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import Chunk, cut_chunks
from gist_dist.models.cpu_dropout import FastDropout
from gist_dist.models.encoder import pad

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Features = Mapping[str, Any]
"""What a tokenizer makes of one column: input_ids and attention_mask, and for some models token_type_ids."""


class CachedGISTEmbedLoss(nn.Module):
    """(anchor, positive) pairs or (anchor, positive, negative_1, …, negative_n) in, the mean loss of the batch out.

    It may be within MatryoshkaLoss. ValueError for a model that isn't fed token ids, and within AdaptiveLayerLoss.
    """

    uses_gradient_cache = True  # asked by sentence-transformers' trainer

    def __init__(
        self,
        model: "SentenceTransformer",
        guide: "SentenceTransformer",
        temperature: float = 0.01,
        chunk_tokens: int = 4096,
        activation_gb: float = 0.0,
        loss_gb: float = 0.25,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        """chunk_tokens: padded tokens encoded at once. activation_gb: gigabytes for graphs of chunks that then need no
        second encode. loss_gb: gigabytes for one block of similarity scores. The others are sentence-transformers':
        mini_batch_size, where it is set, bounds the texts encoded at once too, mini_batch_num_tokens takes the place of
        chunk_tokens, and no progress bar is shown."""
        super().__init__()
        for name, encoder in (("model", model), ("guide", guide)):
            if not hasattr(getattr(encoder, "tokenizer", None), "get_vocab"):
                raise ValueError(f"{name} has no transformers tokenizer; only transformer encoders are supported")
        own = set(map(id, model.parameters()))
        is_model = any(id(parameter) in own for parameter in guide.parameters())  # it guides itself, and is trained
        self.model, self.guide = model, guide if is_model else guide.eval().requires_grad_(False)
        for name, limit in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} = {limit}: at least 1")
        self.chunk_tokens, self.mini_batch_size = mini_batch_num_tokens or chunk_tokens, mini_batch_size
        self.loss_bytes = loss_gb * 1e9
        self.config = LossConfig(
            temperature=temperature, margin=margin, margin_kind=margin_strategy,
            contrast_anchors=contrast_anchors, contrast_positives=contrast_positives,
        )  # fmt: skip
        self.gather_across_devices = gather_across_devices
        self.tokenizer = model.tokenizer
        same_vocabulary = model.tokenizer.get_vocab() == guide.tokenizer.get_vocab()
        self.guide_reads_ids = same_vocabulary and _limit(guide) >= _limit(model)
        """Whether the guide takes the student's token ids; otherwise they are decoded and tokenized again."""
        self.activations = ActivationBudget(activation_gb * 1e9, model)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """labels are not used. Under DDP the mean of the devices' values is the loss of the global batch."""
        columns = [_check(dict(features)) for features in sentence_features]
        self._refuse_layers()
        batch = self._distinct_texts(columns)
        world = World.current() if self.gather_across_devices else World()
        encode = self._encoder(batch)

        numbers = list(range(len(batch.chunks)))
        with torch.random.fork_rng(_cuda(batch.device)):
            embeddings = first_pass(encode, numbers, [chunk.padded_tokens for chunk in batch.chunks], self.activations)
        student = torch.cat([e.detach() for e in embeddings.values()])
        guide = self._guide_rows(batch)
        index, counts = _global_batch(batch, world)
        shared = _Shared(index, counts, world, all_gather_rows(guide, counts, world))
        if not torch.is_grad_enabled():
            return self.calculate_loss([[student]], [[guide]], shared)
        student.requires_grad_()
        loss = self.calculate_loss([[student]], [[guide]], shared, with_backward=True).detach()
        assert student.grad is not None
        sizes = [len(chunk.texts) for chunk in batch.chunks]
        by_chunk = dict(zip(numbers, student.grad.split(sizes), strict=True))
        loss.requires_grad_()
        loss.register_hook(partial(self._backward, encode, embeddings, by_chunk, _Autocast(batch.device)))
        return loss

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        shared: "_Shared",
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings, of the model's whole width or of fewer dimensions: MatryoshkaLoss calls it for each
        of its own. with_backward: their .grad is set."""
        (student,) = reps[0]
        counts, world = shared.counts, shared.world
        blocks = row_blocks(shared.batch, self.config, self.loss_bytes)[world.rank :: world.size]
        gathered = all_gather_rows(student.detach(), counts, world)
        with torch.autocast(student.device.type, enabled=False):  # similarities in bf16 would tell nothing apart
            share = gist_loss(gathered, shared.guide, shared.batch, blocks, self.config)
        if with_backward:
            # Shares sum to the gradient of the global batch, and DDP takes the mean of the devices'.
            student.grad = reduce_scatter_rows(share.gradient, counts, world).to(student.dtype) * world.size
        return (share.loss * world.size).to(student.dtype)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        config = self.config.model_dump()
        config["margin_strategy"] = config.pop("margin_kind")
        return {
            "guide": self.guide,
            **config,
            "chunk_tokens": self.chunk_tokens,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """For the model card."""
        return (
            "@misc{solatorio2024gistembed,\n"
            "    title={GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},\n"
            "    author={Aivin V. Solatorio},\n    year={2024},\n    eprint={2402.16829},\n"
            "    archivePrefix={arXiv},\n    primaryClass={cs.LG}\n}"
        )

    def _distinct_texts(self, columns: Sequence[Features]) -> "_Texts":
        """Every text once, and chunks of those that the models are to encode in the same way."""
        excludes = any(_pools_without_prompt(model) for model in (self.model, self.guide))
        tokens = [ids for features in columns for ids in _token_ids(features)]
        hows = [how for features in columns for how in [_how(features, excludes)] * len(features["input_ids"])]
        first, positions = _distinct(tokens, hows)
        tokens, hows = [tokens[i] for i in first], [hows[i] for i in first]
        with_types, device = "token_type_ids" in columns[0], columns[0]["input_ids"].device
        return _Texts(tokens, positions.reshape(len(columns), -1), self._cut(tokens, hows), hows, with_types, device)

    def _cut(self, tokens: Sequence[np.ndarray], hows: Sequence[dict[str, Any]]) -> list[Chunk]:
        lengths, kinds = np.array([len(ids) for ids in tokens]), np.array(list(map(repr, hows)))
        chunks = list[Chunk]()
        for kind in dict.fromkeys(kinds.tolist()):
            (own,) = np.nonzero(kinds == kind)
            for chunk in cut_chunks(lengths[own], self.chunk_tokens):
                chunks += _at_most(own[chunk.texts], lengths, self.mini_batch_size)
        return chunks

    def _encoder(self, batch: "_Texts") -> Callable[..., Tensor]:
        """Encodes a chunk; the same dropout however often it is called within this step."""
        seed = int(torch.randint(2**62, ()))
        module = _unwrapped(self.model)
        dropout = FastDropout() if batch.device.type == "cpu" and not _is_checkpointed(module) else nullcontext()

        def encode(chunk: int, model: nn.Module = module) -> Tensor:
            torch.manual_seed((seed + chunk) % 2**62)
            texts = batch.chunks[chunk].texts
            features = _features([batch.tokens[text] for text in texts], self.tokenizer, batch.with_types, batch.device)
            with dropout:
                return _unit(model(features | batch.hows[texts[0]])["sentence_embedding"])

        return encode

    def _backward(
        self,
        encode: Callable[..., Tensor],
        embeddings: dict[int, Tensor],
        gradients: dict[int, Tensor],
        autocast: "_Autocast",
        grad_output: Tensor,
    ) -> None:
        """When the loss is sent backward: the embeddings' gradients, times what the trainer scales the loss by.

        DDP sees the last chunk only: it then sends all gradients, of this and of the chunks before, once. Devices need
        not have equally many chunks.
        """
        scaled = {chunk: gradient * grad_output for chunk, gradient in gradients.items()}
        last = {}
        if isinstance(self.model, DistributedDataParallel):
            number = max(embeddings)
            last = {number: embeddings.pop(number).detach()}
        with torch.enable_grad(), torch.random.fork_rng(_cuda(autocast.device)), autocast.again():
            second_pass(encode, embeddings, scaled)
            second_pass(partial(encode, model=self.model), last, scaled)

    @torch.no_grad()
    def _guide_rows(self, batch: "_Texts") -> Tensor:
        """Unit vectors in the order of the chunks' texts [u e]; texts that the guide can't tell apart share one."""
        tokens, hows = batch.tokens, batch.hows
        if not self.guide_reads_ids:
            tokens, hows = self._tokens_for_guide(tokens), [{}] * len(tokens)
        first, input_of = _distinct(tokens, hows)
        tokens, hows = [tokens[i] for i in first], [hows[i] for i in first]
        chunks, tokenizer = self._cut(tokens, hows), self.guide.tokenizer
        with_types = "token_type_ids" in tokenizer.model_input_names
        encoded, was_training = list[Tensor](), self.guide.training
        self.guide.eval()  # where it is the model, it is being trained
        for chunk in chunks:
            features = _features([tokens[i] for i in chunk.texts], tokenizer, with_types, batch.device)
            encoded.append(self.guide(features | hows[chunk.texts[0]])["sentence_embedding"])
        self.guide.train(was_training)
        place = np.argsort(np.concatenate([chunk.texts for chunk in chunks]))
        order = np.concatenate([chunk.texts for chunk in batch.chunks])
        return _unit(torch.cat(encoded))[torch.from_numpy(place[input_of[order]]).to(batch.device)]

    def _tokens_for_guide(self, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        texts = self.tokenizer.batch_decode([ids.tolist() for ids in tokens], skip_special_tokens=True)
        return _token_ids(self.guide.preprocess(texts))

    def _refuse_layers(self) -> None:
        """Its wrapper takes the model's layers apart within forward, and ours encodes again after that."""
        transformer = next(iter(_unwrapped(self.model).children()), None)
        if type(getattr(transformer, "forward", None)).__name__ == "TransformerDecorator":
            raise ValueError(
                "CachedGISTEmbedLoss can't be within AdaptiveLayerLoss or Matryoshka2dLoss, as no cached loss can; "
                "take MatryoshkaLoss, or sentence-transformers' GISTEmbedLoss there"
            )


@dataclass(frozen=True)
class _Texts:
    """The distinct texts of this device's columns."""

    tokens: list[np.ndarray]
    """Token ids of every text, without padding."""
    rows: np.ndarray
    """The texts of the columns [columns b]; every device has the same number of columns."""
    chunks: list[Chunk]
    hows: list[dict[str, Any]]
    """What else the models are given for every text, equal within a chunk."""
    with_types: bool
    device: torch.device


@dataclass(frozen=True)
class _Shared:
    """What the loss is of, beside the student's embeddings."""

    batch: BatchIndex
    counts: list[int]
    """Texts of every device."""
    world: World
    guide: Tensor
    """The guide's embeddings on all devices [U e]."""


class _Autocast:
    """Autocast as it is now, for later."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enabled, self.dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def again(self) -> Any:
        return torch.autocast(self.device.type, self.dtype, enabled=self.enabled)


def _global_batch(batch: _Texts, world: World) -> tuple[BatchIndex, list[int]]:
    """The rows of all devices as positions in the gathered texts, and how many texts each device has."""
    tokens, device = batch.tokens, batch.device
    order = np.concatenate([chunk.texts for chunk in batch.chunks])
    rows = np.argsort(order)[batch.rows]  # a device's texts are gathered in the order of its chunks
    own_sizes = torch.tensor([[len(tokens), rows.shape[1]]], device=device)
    sizes = all_gather_rows(own_sizes, [1] * world.size, world).tolist()
    counts, num_rows = [u for u, _ in sizes], [b for _, b in sizes]
    offset = sum(counts[: world.rank])
    gathered = all_gather_rows(torch.from_numpy(rows.T + offset).to(device), num_rows, world)
    digests = [hashlib.blake2b(tokens[text].tobytes(), digest_size=8).digest() for text in order]
    digest = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy()).to(device)
    identity = all_gather_rows(digest.unsqueeze(1), counts, world).unique(return_inverse=True)[1].flatten()
    anchors, positives, *negatives = (column.contiguous() for column in gathered.T)
    none = torch.empty(0, dtype=torch.int64, device=device)
    return BatchIndex(anchors, positives, torch.cat(negatives) if negatives else none, identity), counts


def _limit(model: "SentenceTransformer") -> int | float:
    return model.max_seq_length or math.inf


def _check(features: Features) -> Features:
    if "input_ids" not in features or "attention_mask" not in features:
        raise ValueError(f"CachedGISTEmbedLoss needs input_ids and attention_mask, and got {', '.join(features)}")
    return features


def _how(features: Features, excludes_prompts: bool) -> dict[str, Any]:
    """What a model is to know of a column beside its tokens: where its prompt ends, if it pools without, and the task
    of a Router."""
    how = {name: value for name, value in features.items() if name == "task"}
    if excludes_prompts and features.get("prompt_length") is not None:
        length = features["prompt_length"]
        how["prompt_length"] = int(length[0]) if isinstance(length, Tensor) else int(length)
    return how


def _pools_without_prompt(model: nn.Module) -> bool:
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())


def _at_most(texts: np.ndarray, lengths: np.ndarray, limit: int | None) -> list[Chunk]:
    """Chunks of these texts, longest first, of at most so many."""
    limit = limit or len(texts)
    parts = (texts[start : start + limit] for start in range(0, len(texts), limit))
    return [Chunk(part, int(lengths[part].max()), int(lengths[part].sum())) for part in parts]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _token_ids(features: Features) -> list[np.ndarray]:
    """Token ids of every text, without padding."""
    ids, real = features["input_ids"].cpu().numpy().astype(np.int32), features["attention_mask"].cpu().numpy() > 0
    return [text[kept] for text, kept in zip(ids, real, strict=True)]


def _distinct(tokens: Sequence[np.ndarray], hows: Sequence[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Where each is for the first time, in order of appearance, and where every one is among those."""
    numbers: dict[tuple[bytes, str], int] = {}
    keys = [(ids.tobytes(), repr(how)) for ids, how in zip(tokens, hows, strict=True)]
    positions = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    return np.unique(positions, return_index=True)[1].tolist(), positions


def _features(tokens: Sequence[np.ndarray], tokenizer: Any, with_types: bool, device: torch.device) -> Features:
    padded = pad(tokens, tokenizer.pad_token_id or 0, tokenizer.padding_side)
    ids = padded.ids.to(device)
    features = {"input_ids": ids, "attention_mask": padded.mask.to(device)}
    return features | ({"token_type_ids": torch.zeros_like(ids)} if with_types else {})


def _unit(embeddings: Tensor) -> Tensor:
    """The embeddings scaled to length 1, in fp32 at least."""
    return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _cuda(device: torch.device) -> list[torch.device]:
    """Devices whose generators are put back, beside the CPU's."""
    return [device] if device.type == "cuda" else []
