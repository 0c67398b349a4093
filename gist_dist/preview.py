"""`gist-dist plan`: what a recipe would run, and what it would cost. Trains nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.data.plan import BatchPlan, Chunk, deal, plan_batch
from gist_dist.data.sampler import Epoch, Sampler
from gist_dist.encoder import Encoder, Guide, Student
from gist_dist.gradcache import ActivationBudget

SAMPLED_BATCHES = 8
TRAINING_BYTES_PER_PARAMETER = 24
"""Weights 4, gradients 4, their fp64 sums 8, Adam's two means 8."""


@dataclass(frozen=True)
class ModelSize:
    model: str
    width: int
    max_tokens: int | None
    num_parameters: int
    num_encoding: int
    """Parameters without embedding tables: what a token is multiplied with."""
    num_bytes: int

    def forward_flops(self, num_tokens: float) -> float:
        return 2 * self.num_encoding * num_tokens


@dataclass(frozen=True)
class Preview:
    config: RunConfig
    sources: list[dict[str, Any]]
    """Of the corpus manifest, with the rows that an epoch takes as `rows_per_epoch`."""
    num_rows: int
    num_texts: int
    rows_per_epoch: int
    steps_per_epoch: int
    num_steps: int
    epoch: Epoch
    """The first."""
    plans: list[BatchPlan]
    """Of batches spread over the first epoch."""
    student: ModelSize
    guide: ModelSize | None
    activation_bytes_per_token: float
    """Measured on the longest text of the plans."""

    def lines(self) -> list[str]:
        sections = {
            "Models": self._models(),
            "Data": self._data(),
            "Steps": self._steps(),
            "Batches": self._batches(),
            "Memory of each worker (estimates)": self._memory(),
            "Cost": self._cost(),
        }
        config = self.config
        title = f"{config.name}: {self.num_steps:,} steps of {config.batch.global_size:,} rows"
        workers = f"{_number(config.cluster.num_workers, 'worker')}, to {config.run_dir}"
        body = [line for heading, lines in sections.items() for line in ("", heading, *(f"  {line}" for line in lines))]
        return [f"{title} on {workers}", *body]

    def _models(self) -> list[str]:
        table = [("", "parameters", "in embeddings", "width", "tokens at most", "model")]
        for role, size in (("student", self.student), ("guide", self.guide)):
            if size is None:
                table.append((role, "none: plain InfoNCE", "", "", "", ""))
                continue
            embeddings = size.num_parameters - size.num_encoding
            counts = f"{size.num_parameters / 1e6:,.1f} M", f"{embeddings / 1e6:,.1f} M", f"{size.width:,}"
            table.append((role, *counts, str(size.max_tokens or "no limit"), size.model))
        return _aligned(table, left=(0, 5))

    def _data(self) -> list[str]:
        table = [("source", "rows read", "dropped", "used", "weight", "share of epoch")]
        for source, recipe in zip(self.sources, self.config.data.sources, strict=True):
            counts = (source["rows_read"], sum(source["dropped"].values()), source["rows_used"])
            share = source["rows_per_epoch"] / self.rows_per_epoch
            table.append((source["name"], *(f"{n:,}" for n in counts), f"{recipe.weight:g}", f"{share:.1%}"))
        dropped = [f"{s['name']}: dropped {r}: {n:,} rows" for s in self.sources for r, n in s["dropped"].items()]
        texts = f"{self.num_rows:,} rows with {self.num_texts:,} distinct texts, each encoded once a batch"
        return [*_aligned(table), *dropped, texts]

    def _steps(self) -> list[str]:
        size = self.config.batch.global_size
        mixing = {
            "homogeneous": "a batch is of one source; what is left of each is mixed",
            "mixed": "a batch mixes rows of all sources",
        }
        sizes = sorted({len(batch) for batch in self.epoch.batches} - {size})
        other = f", but one of {sizes[0]:,}" if sizes else ""
        epochs = self.num_steps / self.steps_per_epoch
        return _pairs(
            ("an epoch", f"{self.rows_per_epoch:,} rows = {self.steps_per_epoch:,} steps of {size:,} rows{other}"),
            ("the run", f"{self.num_steps:,} steps = {epochs:,.2f} epochs = {self.num_steps * size:,} pairs seen"),
            ("mixing", f"{self.config.data.mixing}: {mixing[self.config.data.mixing]}"),
            (
                "same texts",
                f"{self.epoch.rows_moved:,} rows of the first epoch changed batches so that no text is twice in one, "
                f"{self.epoch.duplicates_admitted:,} texts had to repeat",
            ),
        )

    def _batches(self) -> list[str]:
        workers, plans = self.config.cluster.num_workers, self.plans
        chunks = [len(plan.student_chunks) for plan in plans]
        loads = [_loads(plan.student_chunks, workers) for plan in plans]
        idle = [1 - np.mean(load) / max(load) for load in loads]
        padding = 1 - sum(p.num_tokens for p in plans) / sum(p.padded_tokens for p in plans)
        busiest = max(max(load) for load in loads)
        return [
            f"of {_number(len(plans), 'batch', 'batches')} spread over the first epoch:",
            *_pairs(
                ("texts", f"{_span(len(plan.texts) for plan in plans)} distinct a batch"),
                ("tokens", f"{_span(plan.num_tokens for plan in plans)} a batch, and {padding:.1%} padding"),
                (
                    "chunks",
                    f"{_span(chunks)} a batch, of at most {self.config.batch.chunk_tokens:,} padded tokens; "
                    f"{_span(n / workers for n in chunks)} a worker",
                ),
                (
                    "work",
                    f"{busiest:,} padded tokens at most a worker; {np.mean(idle):.1%} of the time waiting for others",
                ),
            ),
        ]

    def _memory(self) -> list[str]:
        batch = self.config.batch
        texts = max(len(plan.texts) for plan in self.plans)
        widths = self.student.width + (self.guide.width if self.guide else 0)
        chunk = max(chunk.padded_tokens for plan in self.plans for chunk in plan.student_chunks)
        table = [
            (
                "student",
                self.student.num_parameters * TRAINING_BYTES_PER_PARAMETER,
                "weights, gradients and Adam's means",
            ),
            ("guide", self.guide.num_bytes if self.guide else 0, "weights"),
            ("embeddings", texts * widths * 4, f"of all {texts:,} texts of a batch, fp32"),
            ("loss", batch.loss_gb * 1e9, "at most: batch.loss_gb"),
            (
                "one chunk",
                chunk * self.activation_bytes_per_token,
                f"activations of {chunk:,} padded tokens: batch.chunk_tokens",
            ),
            ("kept chunks", batch.activation_gb * 1e9, "at most: batch.activation_gb"),
        ]
        total = sum(num_bytes for _, num_bytes, _ in table)
        rows = [(name, _size(num_bytes), what) for name, num_bytes, what in table]
        return _aligned(
            [*rows, ("in all", _size(total), "and what Python and libraries take, about 1 GB")], left=(0, 2)
        )

    def _cost(self) -> list[str]:
        workers, plans = self.config.cluster.num_workers, self.plans
        tokens = np.mean([plan.padded_tokens for plan in plans])
        student = 4 * self.student.forward_flops(tokens)  # forward, forward again, backward as two
        bytes_a_worker = tokens / workers * self.activation_bytes_per_token
        kept = min(1.0, self.config.batch.activation_gb * 1e9 / bytes_a_worker)
        student -= kept * self.student.forward_flops(tokens)
        guide = 0.0
        if self.guide:
            guide = self.guide.forward_flops(np.mean([sum(c.padded_tokens for c in p.guide_chunks) for p in plans]))
        share = f"{guide / (student + guide):.0%} of that is the guide" if self.guide else "there is no guide"
        total = (student + guide) * self.num_steps
        return _pairs(
            ("a step", f"about {_flops(student + guide)} in the encoders; {share}"),
            ("the run", f"about {_flops(total)}, {_flops(total / workers)} a worker"),
            ("caching", f"about {kept:.0%} of the chunks fit batch.activation_gb and are not encoded twice"),
        )


def preview(config: RunConfig) -> Preview:
    """Load both models on the CPU, prepare the corpus and plan some batches. UserError as in training."""
    student = Student(config.student)
    guide = Guide(config.guide) if config.guide else None
    corpus = prepare(config, student, guide)
    sampler = Sampler(corpus, config)
    epoch = sampler.epoch(0)
    steps = np.unique(np.linspace(1, sampler.steps_per_epoch, SAMPLED_BATCHES).round().astype(int)).tolist()
    chunk_tokens = config.batch.chunk_tokens
    plans = [plan_batch(corpus, sampler.rows(step), step, chunk_tokens, guide is not None) for step in steps]
    rows = zip(corpus.manifest["sources"], sampler.rows_per_source, strict=True)
    return Preview(
        config=config,
        sources=[source | {"rows_per_epoch": per_epoch} for source, per_epoch in rows],
        num_rows=corpus.num_rows,
        num_texts=corpus.num_texts,
        rows_per_epoch=sampler.rows_per_epoch,
        steps_per_epoch=sampler.steps_per_epoch,
        num_steps=sampler.num_steps,
        epoch=epoch,
        plans=plans,
        student=_model_size(student),
        guide=_model_size(guide) if guide else None,
        activation_bytes_per_token=_activation_bytes(student, corpus, plans),
    )


def _model_size(encoder: Encoder) -> ModelSize:
    parameters = list(encoder.model.parameters())
    tables = {id(m.weight): m.weight for m in encoder.model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in parameters)
    return ModelSize(
        model=encoder.config.model,
        width=encoder.width,
        max_tokens=encoder.model.max_seq_length,
        num_parameters=total,
        num_encoding=total - sum(table.numel() for table in tables.values()),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _activation_bytes(student: Student, corpus: Corpus, plans: Sequence[BatchPlan]) -> float:
    """Per token, of what autograd keeps of the longest text."""
    texts = np.concatenate([plan.texts for plan in plans])
    longest = texts[[int(corpus.student_lengths[texts].argmax())]]
    budget = ActivationBudget(0.0, student.model)
    with budget.measured(int(corpus.student_lengths[longest[0]])):
        student.encode(corpus.student_tokens(longest), dropout_seed=(0, 0, 0))
    return budget.bytes_per_token


def _loads(chunks: Sequence[Chunk], num_workers: int) -> list[int]:
    return [sum(chunks[c].padded_tokens for c in hand) for hand in deal(chunks, num_workers)]


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns two spaces apart, flush right but for those in ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )
    return [line.rstrip() for line in lines]


def _pairs(*pairs: tuple[str, str]) -> list[str]:
    return _aligned(pairs, left=(0, 1))


def _span(values: Iterable[float | int]) -> str:
    rounded = [round(value) for value in values]
    low, high = min(rounded), max(rounded)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _number(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _size(num_bytes: float | int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def _flops(flops: float | int) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP", "EFLOP"):
        flops /= 1e9 if unit == "GFLOP" else 1e3
        if flops < 1000:
            break
    return f"{flops:,.1f} {unit}"
