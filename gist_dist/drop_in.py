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
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    ValueError for a model that isn't fed token ids, or that pools without its prompt.
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
    ) -> None:
        """chunk_tokens: padded tokens encoded at once. activation_gb: gigabytes for graphs of chunks that then need no
        second encode. loss_gb: gigabytes for one block of similarity scores. The others are sentence-transformers'."""
        super().__init__()
        for name, encoder in (("model", model), ("guide", guide)):
            if not hasattr(getattr(encoder, "tokenizer", None), "get_vocab"):
                raise ValueError(f"{name} has no transformers tokenizer; only transformer encoders are supported")
        self.model, self.guide = model, guide.eval().requires_grad_(False)
        self.chunk_tokens, self.loss_bytes = chunk_tokens, loss_gb * 1e9
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
        tokens, positions = _distinct([ids for features in columns for ids in _token_ids(features)])
        rows = positions.reshape(len(columns), -1)
        world = World.current() if self.gather_across_devices else World()
        device = columns[0]["input_ids"].device
        chunks = cut_chunks(np.array([len(ids) for ids in tokens]), self.chunk_tokens)
        encode = self._encoder(tokens, chunks, "token_type_ids" in columns[0], device)

        numbers = list(range(len(chunks)))
        with torch.random.fork_rng(_cuda(device)):
            embeddings = first_pass(encode, numbers, [chunk.padded_tokens for chunk in chunks], self.activations)
        student = torch.cat([e.detach() for e in embeddings.values()])
        guide = self._guide_rows(tokens, chunks, device)
        batch, counts = _global_batch(rows, tokens, chunks, world, device)
        blocks = row_blocks(batch, self.config, self.loss_bytes)[world.rank :: world.size]
        share = gist_loss(
            all_gather_rows(student, counts, world), all_gather_rows(guide, counts, world), batch, blocks, self.config
        )
        # Shares sum to the gradient of the global batch, and DDP takes the mean of the devices'.
        gradient = reduce_scatter_rows(share.gradient, counts, world) * world.size
        loss = (share.loss * world.size).to(student.dtype)
        if not torch.is_grad_enabled():
            return loss
        by_chunk = dict(zip(numbers, gradient.split([len(chunk.texts) for chunk in chunks]), strict=True))
        loss.requires_grad_()
        loss.register_hook(partial(_backward, encode, embeddings, by_chunk, device))
        return loss

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

    def _encoder(
        self, tokens: Sequence[np.ndarray], chunks: Sequence[Chunk], with_types: bool, device: torch.device
    ) -> Callable[[int], Tensor]:
        """Encodes a chunk; the same dropout however often it is called within this step."""
        seed = int(torch.randint(2**62, ()))
        dropout = FastDropout() if device.type == "cpu" and not _is_checkpointed(self.model) else nullcontext()

        def encode(chunk: int) -> Tensor:
            torch.manual_seed((seed + chunk) % 2**62)
            features = _features([tokens[text] for text in chunks[chunk].texts], self.tokenizer, with_types, device)
            with dropout:
                return _unit(self.model(features)["sentence_embedding"])

        return encode

    @torch.no_grad()
    def _guide_rows(self, tokens: Sequence[np.ndarray], chunks: Sequence[Chunk], device: torch.device) -> Tensor:
        """Unit vectors in the order of the chunks' texts [u e]; texts that the guide can't tell apart share one."""
        order = np.concatenate([chunk.texts for chunk in chunks])
        inputs, input_of = _distinct(tokens if self.guide_reads_ids else self._tokens_for_guide(tokens))
        guide_chunks = cut_chunks(np.array([len(ids) for ids in inputs]), self.chunk_tokens)
        tokenizer = self.guide.tokenizer
        with_types = "token_type_ids" in tokenizer.model_input_names
        encoded = [
            self.guide(_features([inputs[i] for i in chunk.texts], tokenizer, with_types, device))["sentence_embedding"]
            for chunk in guide_chunks
        ]
        place = np.argsort(np.concatenate([chunk.texts for chunk in guide_chunks]))
        rows = torch.from_numpy(place[input_of[order]]).to(device)
        return _unit(torch.cat(encoded))[rows]

    def _tokens_for_guide(self, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        texts = self.tokenizer.batch_decode([ids.tolist() for ids in tokens], skip_special_tokens=True)
        return _token_ids(self.guide.preprocess(texts))


def _backward(
    encode: Callable[[int], Tensor],
    embeddings: dict[int, Tensor],
    gradients: dict[int, Tensor],
    device: torch.device,
    grad_output: Tensor,
) -> None:
    """When the loss is sent backward: the embeddings' gradients, times what the trainer scales the loss by."""
    scaled = {chunk: gradient * grad_output for chunk, gradient in gradients.items()}
    with torch.enable_grad(), torch.random.fork_rng(_cuda(device)):
        second_pass(encode, embeddings, scaled)


def _global_batch(
    rows: np.ndarray, tokens: Sequence[np.ndarray], chunks: Sequence[Chunk], world: World, device: torch.device
) -> tuple[BatchIndex, list[int]]:
    """The rows of all devices as positions in the gathered texts, and how many texts each device has.

    rows: the texts of this device's columns, [columns b]; every device has the same number of columns.
    """
    order = np.concatenate([chunk.texts for chunk in chunks])
    rows = np.argsort(order)[rows]  # a device's texts are gathered in the order of its chunks
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
    if "prompt_length" in features:
        raise ValueError("the model pools without its prompt (include_prompt: false), which is not supported")
    return features


def _token_ids(features: Features) -> list[np.ndarray]:
    """Of every text, without padding."""
    ids, real = features["input_ids"].cpu().numpy().astype(np.int32), features["attention_mask"].cpu().numpy() > 0
    return [text[kept] for text, kept in zip(ids, real, strict=True)]


def _distinct(tokens: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each once, in order of appearance, and where every one of ``tokens`` is among them."""
    numbers: dict[bytes, int] = {}
    positions = [numbers.setdefault(ids.tobytes(), len(numbers)) for ids in tokens]
    return [np.frombuffer(ids, dtype=np.int32) for ids in numbers], np.array(positions)


def _features(tokens: Sequence[np.ndarray], tokenizer: Any, with_types: bool, device: torch.device) -> Features:
    padded = pad(tokens, tokenizer.pad_token_id or 0, tokenizer.padding_side)
    ids = padded.ids.to(device)
    features = {"input_ids": ids, "attention_mask": padded.mask.to(device)}
    return features | ({"token_type_ids": torch.zeros_like(ids)} if with_types else {})


def _unit(embeddings: Tensor) -> Tensor:
    """Of length 1, in fp32 at least."""
    return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _cuda(device: torch.device) -> list[torch.device]:
    """Devices whose generators are put back, beside the CPU's."""
    return [device] if device.type == "cuda" else []
