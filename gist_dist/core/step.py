"""One training step: the flow of a global batch over all workers."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from gist_dist.common.errors import in_phase
from gist_dist.config import RunConfig
from gist_dist.core.candidate_table import mean_guide_similarity
from gist_dist.core.candidates import BatchIndex, further_places, row_blocks
from gist_dist.core.collectives import World, all_gather_rows, all_reduce_sum, all_reduce_values, reduce_scatter_rows
from gist_dist.core.device import sent
from gist_dist.core.gradcache import ActivationBudget, GradientSums, first_pass, second_pass
from gist_dist.core.loss import gist_loss
from gist_dist.core.optim import clip_gradients
from gist_dist.core.plan import CHUNK_START_TOKENS, BatchPlan, Chunk, ChunkRule, PreparedRows, assign_chunks

GATHERED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""batch.gather_precision, where embeddings are rounded for it; on one worker too, so that it makes no difference."""

PHASES = ("encode", "guide", "gather", "loss", "scatter", "backward", "reduce", "optimizer")

NonFinite = Literal["loss", "gradient"] | None


@runtime_checkable
class TextEncoder(Protocol):
    """A model that makes unit vectors of token ids; models/encoder.py has those around a SentenceTransformer."""

    packs: bool
    """Whether a chunk's texts are joined without padding."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def width(self) -> int:
        """Numbers in an embedding."""

    @property
    def device(self) -> torch.device: ...

    def get_ready(self, packing: bool | None = ...) -> None:
        """To encode in earnest; see batch.packing."""

    def inputs(self, tokens: Sequence[np.ndarray]) -> Any:
        """What encode() is given for the texts of one chunk; may run ahead, in another thread."""


@runtime_checkable
class TrainedEncoder(TextEncoder, Protocol):
    def parameters(self) -> list[nn.Parameter]: ...

    def encode(self, texts: Any, dropout_seed: Sequence[int]) -> Tensor:
        """[t d]. Equal arguments give equal embeddings, dropout included."""


@runtime_checkable
class FrozenEncoder(TextEncoder, Protocol):
    def encode(self, texts: Any) -> Tensor:
        """[t e]."""


class Scored(NamedTuple):
    """What the loss of a global batch was computed from, equal on every worker."""

    batch: BatchIndex
    student: Tensor
    guide: Tensor | None
    """Embeddings of all unique texts [u d], [u e]."""


@dataclass
class StepResult:
    """The result for the whole global batch, equal on every worker."""

    loss: float
    grad_norm: float
    """Before clipping."""
    counts: dict[str, float]
    """LossShare.counts, summed over workers."""
    is_guided: bool
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, on this worker."""
    scored: Scored | None = None
    """Only where it was asked for, or something is not finite: it is as large as the embeddings of the batch."""
    non_finite: NonFinite = None
    """What is not finite; the optimizer has then not stepped."""
    guide_candidate_similarity: float | None = None
    """Mean similarity of an anchor and another row's positive to the guide: how hard the batch is."""


class TrainState:
    """What a step works on and changes."""

    def __init__(
        self,
        config: RunConfig,
        corpus: PreparedRows,
        student: TrainedEncoder,
        guide: FrozenEncoder | None,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self.config, self.corpus, self.world = config, corpus, world
        self.student, self.optimizer = student, optimizer
        self.guide = guide
        """The model, where it encodes within the step."""
        for encoder in (student, guide):
            if encoder:
                encoder.get_ready(packing=config.batch.packing)
        self.gradients = GradientSums(student.model)
        self.activations = ActivationBudget(config.batch.kept_bytes, student.model)

    @property
    def chunk_rule(self) -> ChunkRule:
        """How every batch is cut; by kind of device, so that all workers cut alike."""
        batch, start_tokens = self.config.batch, self.config.batch.chunk_start_tokens
        if start_tokens is None:
            start_tokens = CHUNK_START_TOKENS.get(self.student.device.type, CHUNK_START_TOKENS["cpu"])
        return ChunkRule(
            batch.tokens_at_once, start_tokens, self.student.packs, self.guide is not None and self.guide.packs
        )


@dataclass(frozen=True)
class StepInputs:
    """How the chunks of a step are assigned, and what this worker encodes of them, by number of the chunk."""

    chunks_by_rank: list[list[int]]
    guide_chunks_by_rank: list[list[int]]
    student: dict[int, Any]
    """What TextEncoder.inputs() made of it."""
    guide: dict[int, Any]


def prepare_inputs(train_state: TrainState, plan: BatchPlan, speeds: Sequence[float] | None = None) -> StepInputs:
    """May run ahead, in another thread. speeds: of every worker, the same on all of them; see assign_chunks()."""
    corpus, guide, world = train_state.corpus, train_state.guide, train_state.world
    chunks_by_rank, guide_chunks_by_rank = (
        assign_chunks(chunks, world.size, speeds) for chunks in (plan.student_chunks, plan.guide_chunks)
    )
    students = {c: plan.texts[plan.student_chunks[c].texts] for c in chunks_by_rank[world.rank]}
    guides = {c: plan.guide_inputs[plan.guide_chunks[c].texts] for c in guide_chunks_by_rank[world.rank]}
    return StepInputs(
        chunks_by_rank,
        guide_chunks_by_rank,
        {c: train_state.student.inputs(corpus.student_tokens(t)) for c, t in students.items()},
        {c: guide.inputs(corpus.guide_tokens(t)) for c, t in guides.items()} if guide else {},
    )


def train_step(
    train_state: TrainState, plan: BatchPlan, inputs: StepInputs | None = None, keep_scored: bool = False
) -> StepResult:
    """Encode, gather, score, scatter, encode again with graphs, sum, and let the optimizer step.

    Every worker calls it with the same plan. inputs: of this plan, where they were prepared ahead. A loss or gradient
    that is not finite changes nothing, on any worker.
    """
    inputs = inputs or prepare_inputs(train_state, plan)
    config, world, clock = train_state.config, train_state.world, Clock(train_state.student.device)
    chunks = plan.student_chunks
    chunks_by_rank = inputs.chunks_by_rank
    own = chunks_by_rank[world.rank]

    def encode(chunk: int) -> Tensor:
        return train_state.student.encode(inputs.student[chunk], dropout_seed=(config.seed, plan.step, chunk))

    with clock("encode"):
        embeddings = first_pass(encode, own, [chunks[c].padded_tokens for c in own], train_state.activations)
    with clock("gather"):
        local = _stack([e.detach() for e in embeddings.values()], train_state.student)
        rounded = local.to(GATHERED.get(config.batch.gather_precision, local.dtype))
        student_rows = _gather_texts(rounded, chunks, chunks_by_rank, world).to(local.dtype)
    with clock("guide"):
        guide_rows = _guide_rows(train_state, plan, inputs, student_rows)
    with clock("loss"):
        batch = batch_index(plan, student_rows.device)
        blocks = row_blocks(batch, config.loss, config.batch.loss_gb * 1e9)
        share = gist_loss(student_rows, guide_rows, batch, blocks[world.rank :: world.size], config.loss)
    with clock("scatter"):
        gradients = _scatter_gradients(share.gradient, chunks, chunks_by_rank, world)
    with clock("backward"):
        second_pass(encode, embeddings, gradients, train_state.gradients)
    with clock("reduce"):
        totals = all_reduce_values({"loss": share.loss, **share.counts}, world)  # the host waits for the device here
        if world.size > 1:  # shares already carry 1/g, so workers sum
            train_state.gradients.reduce(all_reduce_sum)
        train_state.gradients.write_to_grad()
    with clock("optimizer"):
        loss = totals.pop("loss")
        norm = clip_gradients(train_state.student.parameters(), config.optim.max_grad_norm).item()
        non_finite: NonFinite = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(norm) else None
        if not non_finite:
            train_state.optimizer.step()
        train_state.optimizer.zero_grad(set_to_none=True)
    similarity = None if guide_rows is None else mean_guide_similarity(batch, guide_rows)
    scored = Scored(batch, student_rows, guide_rows) if keep_scored or non_finite else None
    return StepResult(loss, norm, totals, guide_rows is not None, clock.seconds(), scored, non_finite, similarity)


def _guide_rows(train_state: TrainState, plan: BatchPlan, inputs: StepInputs, student_rows: Tensor) -> Tensor | None:
    """The guide's embeddings of all unique texts: encoded now, read from the cache, or the student's own."""
    if train_state.config.guide is None:
        return None
    if train_state.config.guide_mode == "self":
        return student_rows
    if plan.guide_embeddings is not None:
        distinct = sent(torch.from_numpy(plan.guide_embeddings), student_rows.device)
    else:
        distinct = _encode_guide(train_state, plan, inputs)
    # Rounding to fp16 has left them not quite of length 1.
    distinct = F.normalize(distinct.to(student_rows.dtype), dim=-1)
    return distinct[sent(torch.from_numpy(plan.guide_input_of), distinct.device)]


def _encode_guide(train_state: TrainState, plan: BatchPlan, inputs: StepInputs) -> Tensor:
    """The guide's embeddings of its distinct inputs; this worker encodes those of its chunks."""
    assert train_state.guide is not None
    local = _stack([train_state.guide.encode(padded) for padded in inputs.guide.values()], train_state.guide)
    rounded = local.half()  # exact: they are rounded to fp16
    return _gather_texts(rounded, plan.guide_chunks, inputs.guide_chunks_by_rank, train_state.world)


def _stack(embeddings: list[Tensor], encoder: TextEncoder) -> Tensor:
    """One row a text; no rows for a worker that was assigned no chunk."""
    if embeddings:
        return torch.cat(embeddings)
    parameter = next(encoder.model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(0, encoder.width, device=encoder.device, dtype=dtype)


def _gather_texts(local: Tensor, chunks: tuple[Chunk, ...], chunks_by_rank: list[list[int]], world: World) -> Tensor:
    """Embeddings of all unique texts, in their order."""
    order, counts = _order_by_rank(chunks, chunks_by_rank)
    gathered = all_gather_rows(local, counts, world)
    embeddings = torch.empty_like(gathered)
    embeddings[sent(torch.from_numpy(order), gathered.device)] = gathered
    return embeddings


def _scatter_gradients(
    gradient: Tensor, chunks: tuple[Chunk, ...], chunks_by_rank: list[list[int]], world: World
) -> dict[int, Tensor]:
    """Sum over workers of d(loss)/d(embeddings), for the chunks that this worker encoded."""
    order, counts = _order_by_rank(chunks, chunks_by_rank)
    mine = reduce_scatter_rows(gradient[sent(torch.from_numpy(order), gradient.device)], counts, world)
    own = chunks_by_rank[world.rank]
    return dict(zip(own, torch.split(mine, [len(chunks[c].texts) for c in own]), strict=True)) if own else {}


def _order_by_rank(chunks: tuple[Chunk, ...], chunks_by_rank: list[list[int]]) -> tuple[np.ndarray, list[int]]:
    """Texts in the order in which the workers hold them, and how many each worker holds."""
    counts = [sum(len(chunks[c].texts) for c in own) for own in chunks_by_rank]
    return np.concatenate([chunks[c].texts for own in chunks_by_rank for c in own]), counts


def batch_index(plan: BatchPlan, device: torch.device) -> BatchIndex:
    """What the loss has to know of a plan."""
    known_rows, known_places = (None, None) if plan.known is None else map(torch.from_numpy, plan.known)
    has_several = len(plan.more_positives) > 0
    return BatchIndex(
        anchors=torch.from_numpy(plan.anchors),
        positives=torch.from_numpy(plan.positives),
        negatives=torch.from_numpy(plan.negatives),
        identity=torch.from_numpy(plan.identity),
        negative_rows=torch.from_numpy(plan.negative_rows),
        more_positives=torch.from_numpy(plan.more_positives) if has_several else None,
        further_positives=further_places(torch.from_numpy(plan.more_positive_rows), len(plan.rows))
        if has_several
        else None,
        known_rows=known_rows,
        known_places=known_places,
        groups=None if plan.groups is None else torch.from_numpy(plan.groups),
        sections=plan.sections,
    ).to(device)


class Clock:
    """Seconds by phase. A GPU's are read off its own marks once the step is done: no phase waits for the last one.

    An exception keeps the phase that it was raised in; see phase_of().
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []
        """Phase, its beginning and its end."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self._mark()
        with in_phase(phase), record_function(phase):  # a name in traces of tracking.profile_steps
            yield
        self.spans.append((phase, started, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def seconds(self) -> dict[str, float]:
        """Waits for the device."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for phase, started, ended in self.spans:
            seconds[phase] += started.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - started
        return seconds
