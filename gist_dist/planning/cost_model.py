"""What a step would cost on any number of GPUs: seconds by phase, network and memory. A model, not a measurement.

docs/scaling.md has the assumptions and what was checked. The volumes are those of step.py, gradcache.py, loss.py
and collectives.py. Costs neither torch nor ray.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.config import BatchConfig, RunConfig
from gist_dist.core.budgets import TRAINING_BYTES, fitted
from gist_dist.planning.model_shape import ModelShape

# Axes:  g rows   u unique texts   d student width   e guide width   P parameters   W workers, one GPU each

MAX_GPUS = 1024
SUM_BYTES = 8
"""Gradients are summed over workers in fp64, of embeddings and of parameters."""
ADDING_BYTES_PER_PARAMETER = 20
"""Memory traffic of adding one chunk's gradients to the sums: read 4 and 8, write 8."""
OPTIMIZER_BYTES_PER_PARAMETER = 60
"""Memory traffic of rounding the sums, clipping and AdamW: read and write."""
SCATTER_COPIES = 3
"""fp64 gradients of all texts when they are sent: as computed, in the workers' order, padded to equal shares."""
NCCL_EFFICIENCY, HOP_SECONDS = 0.8, 5e-6
"""Share of a link's bytes/s that NCCL reaches; latency of each hop around a ring of W."""
KERNEL_SECONDS = 40e-6
"""The host needs as long for a kernel, autograd and Python included: 10,620 kernels in 0.43 s on an H200's machine."""
LOSS_KERNELS, LOSS_BYTES_PER_SCORE = 200, 80
"""Of a block of rows; memory traffic of what is done to a score beside the matrix products."""
BANDWIDTH_REACHED = 0.8
"""Share of the memory's peak that elementwise kernels reach."""


@dataclass(frozen=True)
class _Pass:
    """What a chunk costs a GPU beside its matrix products: counted on BERT, the bytes fitted to an H200's profile."""

    forwards: int
    """Matrix products, in forward passes."""
    layer_bytes: int
    """Memory traffic of a token in bf16, for each layer and unit of width."""
    kernels: int
    layer_kernels: int


FORWARD, BACKWARD = _Pass(1, 190, 35, 31), _Pass(2, 390, 34, 98)
GUIDE_FORWARD = _Pass(1, 190, 41, 21)
"""Of a guide whose weights are bf16: nothing is cast."""
PLAN_SECONDS_PER_TEXT, CACHE_BYTES_PER_SECOND = 0.5e-6, 1.0e9
"""One core of every worker cuts and assigns the whole batch, and reads the cached guide embeddings of all of it, while
the GPU works on the batch before."""
HOST_COPY_BYTES_PER_SECOND = 20e9
"""Cached guide embeddings, from pinned memory to the GPU."""
CONTEXT_BYTES = 1.0e9
"""CUDA's own, NCCL's buffers and what the allocator keeps; on a CPU, Python and its libraries."""
SLICE, LEAST_ROWS = {False: 1024, True: 1 << 20}, {False: 64, True: 1024}
"""The sizes of candidates.py, by whether it is a GPU."""
ASSUMED_TEXT_TOKENS, ASSUMED_ACTIVATIONS = 64, 20
"""Without a plan: tokens of a text, and how many vectors of the hidden size autograd keeps of a token in a layer."""


Number = float | int


@dataclass(frozen=True)
class Gpu:
    """The numbers of one GPU, from its data sheet, and of the usual node around it."""

    bf16_flops: Number
    """Peak per second of dense bf16 matrix products."""
    fp32_flops: Number
    memory_bytes: Number
    memory_bandwidth: Number
    """Bytes per second; as all bandwidths here."""
    per_node: int
    link: Number
    """From GPU to GPU within a node, one way."""
    network: Number
    """Through all network cards of a node, one way."""
    bf16_mfu: Number = 0.49
    """Share of the peak that matrix products reach: so measured on an H200. What else encoders do comes on top."""
    fp32_mfu: Number = 0.7


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.0e12, 8, 300e9, 50e9),
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12, 8, 450e9, 400e9),
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12, 8, 450e9, 400e9),
    "l4": Gpu(121e12, 30.3e12, 24e9, 0.30e12, 8, 12e9, 12.5e9),
    "a10g": Gpu(70e12, 31.5e12, 24e9, 0.60e12, 8, 12e9, 12.5e9),
    "t4": Gpu(8.1e12, 8.1e12, 16e9, 0.32e12, 8, 10e9, 12.5e9, bf16_mfu=0.55),  # no bf16 units: as fp32
    "cpu": Gpu(80e9, 80e9, 16e9, 10e9, 16, 5e9, 1.25e9, bf16_mfu=0.6, fp32_mfu=0.6),  # one core
}


@dataclass(frozen=True)
class Workload:
    """A recipe's global batch, in numbers."""

    rows: Number
    texts: Number
    """Distinct ones."""
    negatives: Number
    """Hard negatives of all rows."""
    student_tokens: Number
    """Padded, of all texts."""
    guide_tokens: Number
    """0 unless the guide is online."""
    chunk_tokens: Number
    """Padded tokens of a chunk, on average."""
    largest_chunk: Number
    """Padded tokens of the largest: what the busiest worker encodes at least."""
    student: ModelShape
    guide: ModelShape | None
    """None without a guide, and where the student is its own."""
    student_bf16: bool
    guide_bf16: bool
    contrast_anchors: bool
    contrast_positives: bool
    gather_bytes: int
    """Bytes that a number of the student's embeddings takes on the wire."""
    activation_bytes_per_token: Number
    activation_budget: Number
    loss_budget: Number

    @property
    def candidates(self) -> Number:
        """How many each row has, over all parts."""
        return self.rows * (1 + self.contrast_anchors + self.contrast_positives) + self.negatives

    @property
    def guide_width(self) -> int:
        return self.guide.width if self.guide else 0


@dataclass(frozen=True)
class Estimate:
    seconds: dict[str, Number]
    """By phase, of the worker that is last."""
    network: dict[str, Number]
    """Bytes that each worker receives in a step, by phase."""
    memory: dict[str, Number]
    """Bytes on each GPU."""
    busy: dict[str, Number]
    """Mean share of the workers that have something to encode, and to score, while the busiest does."""
    kept_share: Number
    """Share of the chunks that are encoded once only."""

    @property
    def step_seconds(self) -> Number:
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def estimate(work: Workload, num_gpus: int, gpu: Gpu) -> Estimate:
    """A step of ``work`` on so many GPUs of a kind, phase after phase: none overlaps another but the plan."""
    student, on_gpu = work.student, gpu is not GPUS["cpu"]
    d, e, u = student.width, work.guide_width, work.texts

    own_chunks, own_tokens = busiest_encoding(work, num_gpus)
    length = work.student_tokens / u
    forward, backward = (
        _encode_seconds(student, own_tokens, own_chunks, length, work.student_bf16, gpu, one)
        for one in (FORWARD, BACKWARD)
    )
    kept = kept_share(work, num_gpus)
    own_rows = busiest_rows(work, num_gpus, on_gpu)

    others = (num_gpus - 1) / num_gpus
    network = {
        "gather": others * u * d * work.gather_bytes,
        "guide": others * u * e * 2 if work.guide_tokens else 0.0,
        "scatter": others * u * d * SUM_BYTES,
        "reduce": 2 * others * student.num_parameters * SUM_BYTES,
    }
    sending = {phase: _send_seconds(volume, num_gpus, gpu) for phase, volume in network.items()}
    adding = own_chunks * student.num_parameters * ADDING_BYTES_PER_PARAMETER / gpu.memory_bandwidth
    seconds = {
        "encode": forward,
        "guide": _guide_seconds(work, num_gpus, gpu) + sending["guide"],
        "gather": sending["gather"],
        "loss": _loss_seconds(work, own_rows, gpu),
        "scatter": sending["scatter"],
        "backward": (1 - kept) * forward + backward + adding,
        "reduce": sending["reduce"],
        "optimizer": student.num_parameters * OPTIMIZER_BYTES_PER_PARAMETER / gpu.memory_bandwidth,
    }
    cached = u * e * 2 if work.guide and not work.guide_tokens else 0.0
    planning = PLAN_SECONDS_PER_TEXT * u + cached / CACHE_BYTES_PER_SECOND
    seconds["plan"] = max(0.0, planning - sum(seconds.values()))
    return Estimate(
        seconds=seconds,
        network=network,
        memory=worker_memory(work, kept * own_tokens, num_gpus, on_gpu),
        busy={"encode": work.student_tokens / (own_tokens * num_gpus), "loss": work.rows / (own_rows * num_gpus)},
        kept_share=kept,
    )


def busiest_encoding(work: Workload, num_workers: int) -> tuple[int, Number]:
    """Chunks and padded tokens of the worker that encodes most."""
    num_chunks = max(1, math.ceil(work.student_tokens / work.chunk_tokens))
    own_chunks = math.ceil(num_chunks / num_workers)
    return own_chunks, max(work.largest_chunk, own_chunks * work.student_tokens / num_chunks)


def kept_share(work: Workload, num_workers: int) -> Number:
    """Share of the busiest worker's chunks whose activations fit the budget, so that they are encoded once only."""
    _, tokens = busiest_encoding(work, num_workers)
    return min(1.0, work.activation_budget / max(1.0, tokens * work.activation_bytes_per_token))


def _encode_seconds(
    model: ModelShape, tokens: Number, chunks: int, length: Number, bf16: bool, gpu: Gpu, one: _Pass
) -> Number:
    """A GPU computes while its host starts kernels: the slower of the two sets the pace."""
    speed = gpu.bf16_flops * gpu.bf16_mfu if bf16 else gpu.fp32_flops * gpu.fp32_mfu
    products = one.forwards * model.forward_flops(tokens, length) / speed
    if gpu is GPUS["cpu"]:
        return products
    num_bytes = tokens * model.hidden * model.num_layers * one.layer_bytes * (1 if bf16 else 2)
    starting = chunks * (one.kernels + one.layer_kernels * model.num_layers) * KERNEL_SECONDS
    return max(products + num_bytes / (BANDWIDTH_REACHED * gpu.memory_bandwidth), starting)


def _loss_seconds(work: Workload, own_rows: Number, gpu: Gpu) -> Number:
    scores = own_rows * work.candidates
    products = scores * (6 * work.student.width + 2 * work.guide_width) / (gpu.fp32_flops * gpu.fp32_mfu)
    if gpu is GPUS["cpu"]:
        return products
    starting = own_rows / block_rows(work, on_gpu=True) * LOSS_KERNELS * KERNEL_SECONDS
    return max(products + scores * LOSS_BYTES_PER_SCORE / (BANDWIDTH_REACHED * gpu.memory_bandwidth), starting)


def _guide_seconds(work: Workload, num_gpus: int, gpu: Gpu) -> Number:
    """Encoded online, or copied from the cache: all of it to every worker."""
    if work.guide is None:
        return 0.0
    if not work.guide_tokens:
        return 0.0 if gpu is GPUS["cpu"] else work.texts * work.guide_width * 2 / HOST_COPY_BYTES_PER_SECOND
    chunks = math.ceil(max(1, math.ceil(work.guide_tokens / work.chunk_tokens)) / num_gpus)
    tokens = min(work.guide_tokens, chunks * work.chunk_tokens)
    return _encode_seconds(
        work.guide, tokens, chunks, work.guide_tokens / work.texts, work.guide_bf16, gpu, GUIDE_FORWARD
    )


def _send_seconds(volume: Number, num_gpus: int, gpu: Gpu) -> Number:
    """Time of a ring over all GPUs; between nodes it goes through all network cards of a node at once."""
    if num_gpus == 1 or not volume:
        return 0.0
    bandwidth = gpu.link if num_gpus <= gpu.per_node else min(gpu.link, gpu.network)
    return volume / (NCCL_EFFICIENCY * bandwidth) + (num_gpus - 1) * HOP_SECONDS


def busiest_rows(work: Workload, num_gpus: int, on_gpu: bool = False) -> Number:
    """Rows that the worker with most blocks scores; candidates.row_blocks cuts whole blocks whatever the workers."""
    size = block_rows(work, on_gpu)
    blocks = math.ceil(work.rows / size)
    each, over = divmod(blocks, num_gpus)
    last = work.rows - (blocks - 1) * size  # which may be smaller, and where one block is over, it is that
    return min(work.rows, each * size + (last if over == 1 else size * (over > 1)))


def block_rows(work: Workload, on_gpu: bool) -> Number:
    most_candidates = max(work.rows, work.negatives)
    bytes_per_row = 4 * work.candidates + 14 * min(most_candidates, SLICE[on_gpu])
    return min(max(1, work.loss_budget // bytes_per_row), max(LEAST_ROWS[on_gpu], math.ceil(work.rows / 128)))


def worker_memory(work: Workload, kept_tokens: Number, num_workers: int, on_gpu: bool) -> dict[str, Number]:
    """Bytes of the GPU of each worker, or of its process on a CPU, by what they hold."""
    d, e = work.student.width, work.guide_width
    scattering = d * SUM_BYTES * (SCATTER_COPIES if num_workers > 1 else 2)
    scoring = d * SUM_BYTES * 2 + 4 * (d + e)  # embeddings once more, in the order of the table
    guide_bytes = (2 if work.guide_bf16 else 4) * work.guide.num_parameters if work.guide and work.guide_tokens else 0.0
    return {
        "student": work.student.num_parameters * TRAINING_BYTES,
        "guide": guide_bytes,
        "embeddings": work.texts * 4 * (d + e) + work.texts / num_workers * 4 * 2 * d,
        "their gradients": work.texts * max(scattering, scoring),
        "loss": work.loss_budget,
        "activations": work.largest_chunk * work.activation_bytes_per_token,
        "kept chunks": kept_tokens * work.activation_bytes_per_token,
        "context": CONTEXT_BYTES,
    }


def check_gpus(num_gpus: int, kind: str) -> None:
    if kind not in GPUS:
        raise UserError(f"--gpu-kind {kind}: not known here; there are {', '.join(GPUS)}")
    if not 1 <= num_gpus <= MAX_GPUS:
        raise UserError(f"--gpus {num_gpus}: from 1 to {MAX_GPUS:,}")


def plan_lines(plan: Any, num_gpus: int, kind: str) -> list[str]:
    """What `gist-dist plan --gpus` prints of a preview.Preview."""
    cached = plan.config.guide_mode == "cache"
    work = on_gpus(workload(plan), plan.config.batch, num_gpus, GPUS[kind])
    return estimate_lines(work, plan.num_steps, plan.guide_inputs.missing_tokens if cached else 0, num_gpus, kind)


def estimate_lines(work: Workload, num_steps: int, cached_tokens: Number, num_gpus: int, kind: str) -> list[str]:
    """cached_tokens: that the guide has to encode before training."""
    check_gpus(num_gpus, kind)
    gpu = GPUS[kind]
    told = estimate(work, num_gpus, gpu)
    total = told.step_seconds
    lines = ["", f"Estimate for {num_gpus:,} × {kind} (a model, not a measurement: docs/scaling.md)"]
    lines += [f"  {line}" for line in _phase_lines(told)]
    memory = sum(told.memory.values())
    fits = "" if memory <= gpu.memory_bytes else f": MORE THAN THE {gpu.memory_bytes / 1e9:.0f} GB IT HAS"
    hours = num_steps * total / 3600
    filling = 0.0
    if work.guide and cached_tokens:
        chunks = math.ceil(cached_tokens / work.chunk_tokens / num_gpus)
        filling = _encode_seconds(
            work.guide, cached_tokens / num_gpus, chunks, 0.0, work.guide_bf16, gpu, GUIDE_FORWARD
        )
        filling /= 3600
    lines += [
        f"  step        {total:,.3f} s, {work.rows / total:,.0f} rows/s; the bottleneck is {told.bottleneck}",
        f"  the run     {num_steps:,} steps, {hours:,.2f} h"
        + (f", after {filling:,.2f} h of filling the guide cache" if filling else ""),
        f"  network     {sum(told.network.values()) / 1e9:,.2f} GB a step to each GPU: "
        + ", ".join(f"{phase} {volume / 1e9:,.2f}" for phase, volume in told.network.items() if volume),
        f"  memory      {memory / 1e9:,.1f} GB a GPU{fits}: "
        + ", ".join(f"{what} {size / 1e9:,.1f}" for what, size in told.memory.items() if size >= 5e7),
    ]
    return lines + [f"  note        {note}" for note in _notes(work, told, num_gpus)]


def _phase_lines(told: Estimate) -> Iterator[str]:
    for phase, seconds in told.seconds.items():
        if seconds >= 5e-5:
            share = seconds / told.step_seconds
            yield f"{phase:<10}  {seconds:>9,.4f} s  {share:>6.1%}  {'#' * round(40 * share)}".rstrip()


def _notes(work: Workload, told: Estimate, num_gpus: int) -> Iterator[str]:
    for phase, remedy in (
        ("encode", "there are too few chunks to go round: lower batch.chunk_tokens, or raise batch.global_size"),
        ("loss", "there are too few row blocks to go round: raise batch.global_size, or lower batch.loss_gb"),
    ):
        if told.busy[phase] < 0.8:
            yield f"in {phase} the GPUs are busy for {told.busy[phase]:.0%} of the time of the busiest; {remedy}"


def on_gpus(work: Workload, batch: BatchConfig, num_gpus: int, gpu: Gpu) -> Workload:
    """With the budgets of so many of these GPUs, where the recipe leaves them open."""
    if gpu is GPUS["cpu"]:
        return work
    student, guide_bytes = work.student, 4.0 * work.guide.num_parameters if work.guide and work.guide_tokens else 0.0
    batch = fitted(
        batch, float(gpu.memory_bytes), student.num_parameters, guide_bytes, student.hidden, student.num_layers,
        work.student_bf16, work.student_tokens / num_gpus,
    )  # fmt: skip
    most = float(batch.tokens_at_once)
    # Chunks of the plan are not full; those of a larger budget are taken to be.
    chunk = work.chunk_tokens if most <= work.largest_chunk else min(most, work.student_tokens)
    largest = max(chunk, work.largest_chunk)
    return replace(work, chunk_tokens=chunk, largest_chunk=largest, activation_budget=batch.kept_bytes)


def workload(plan: Any) -> Workload:
    """The work that a preview.Preview found: means over the batches that it planned."""
    config, plans = plan.config, plan.plans

    def mean(values: Iterator[Number]) -> Number:
        return sum(values) / len(plans)

    guide_online = config.guide_mode == "online"
    chunks = mean(len(batch.student_chunks) for batch in plans)
    tokens = mean(batch.padded_tokens for batch in plans)
    return Workload(
        rows=mean(len(batch.rows) for batch in plans),
        texts=mean(len(batch.texts) for batch in plans),
        negatives=mean(len(batch.negatives) for batch in plans),
        student_tokens=tokens,
        guide_tokens=mean(sum(c.padded_tokens for c in b.guide_chunks) for b in plans) if guide_online else 0.0,
        chunk_tokens=tokens / chunks,
        largest_chunk=mean(max(chunk.padded_tokens for chunk in batch.student_chunks) for batch in plans),
        student=plan.student,
        guide=plan.guide,
        student_bf16=config.student.precision == "bf16",
        guide_bf16=config.guide is not None and config.guide.precision == "bf16",
        contrast_anchors=config.loss.contrast_anchors,
        contrast_positives=config.loss.contrast_positives,
        gather_bytes=4 if config.batch.gather_precision == "fp32" else 2,
        activation_bytes_per_token=plan.activation_bytes_per_token,
        activation_budget=config.batch.kept_bytes,
        loss_budget=config.batch.loss_gb * 1e9,
    )


def assumed_workload(config: RunConfig, student: ModelShape, guide: ModelShape | None) -> Workload:
    """The work of a recipe whose data nobody has looked at: three texts a row, in full chunks."""
    batch, loss = config.batch, config.loss
    tokens = float(3 * batch.global_size * ASSUMED_TEXT_TOKENS)
    return Workload(
        rows=batch.global_size,
        texts=3 * batch.global_size,
        negatives=batch.global_size,
        student_tokens=tokens,
        guide_tokens=tokens if guide else 0.0,
        chunk_tokens=batch.tokens_at_once,
        largest_chunk=batch.tokens_at_once,
        student=student,
        guide=guide,
        student_bf16=config.student.precision == "bf16",
        guide_bf16=False,
        contrast_anchors=loss.contrast_anchors,
        contrast_positives=loss.contrast_positives,
        gather_bytes=4,
        activation_bytes_per_token=ASSUMED_ACTIVATIONS * 4 * student.num_layers * student.hidden,
        activation_budget=batch.kept_bytes,
        loss_budget=batch.loss_gb * 1e9,
    )


def host_memory(config: RunConfig, student: ModelShape, guide: ModelShape | None, on_gpu: bool) -> Number:
    """Bytes of a worker's process, roughly and from above: for a pod's request, not for science.

    On a GPU: libraries, both models as they are loaded, a checkpoint's snapshot (weights and Adam's means) and the
    plans of two batches. On a CPU: what the step itself needs besides.
    """
    texts = 3 * config.batch.global_size
    guide_bytes = 4 * guide.num_parameters if guide else 0
    if on_gpu:
        return 6e9 + 16 * student.num_parameters + guide_bytes + texts * 4e3
    work = assumed_workload(config, student, guide)
    kept_tokens = work.activation_budget / work.activation_bytes_per_token
    memory = worker_memory(work, kept_tokens, config.cluster.max_workers, on_gpu=False)
    return 0.5e9 + 12 * student.num_parameters + sum(memory.values())
