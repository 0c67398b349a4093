"""`gist-dist plan`: what a recipe would run, and what it would cost. Trains nothing."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gist_dist.common.text import plural
from gist_dist.config import RunConfig
from gist_dist.core.candidate_table import mean_guide_similarity
from gist_dist.core.gradcache import ActivationBudget
from gist_dist.core.plan import BatchPlan, Chunk, assign_chunks, plan_batch
from gist_dist.core.step import batch_index
from gist_dist.data.corpus import Corpus
from gist_dist.data.row_rules import known_positives_lines
from gist_dist.data.sampler import Epoch, Sampler
from gist_dist.data.sources import SourceReport
from gist_dist.data.statistics import source_accounts
from gist_dist.models.encoder import Encoder, Guide, Student
from gist_dist.models.guide_cache import open_guide_cache
from gist_dist.planning.cost_model import kept_share, worker_memory, workload
from gist_dist.planning.model_shape import ModelShape, model_shape
from gist_dist.planning.outline import long_text_line, prompt_lines, while_training

SAMPLED_BATCHES = 8
SHOWN_SOURCES, SHOWN_REASONS = 30, 10
"""Most lines of the table of sources, and most sources whose drops or repeats are explained."""
NAME_WIDTH, PAGE_WIDTH = 32, 140
CACHED_BYTES_PER_NUMBER = 2
TEXTS_CUT = ("num_student_cut", "num_guide_cut")
"""A source's counts of texts that are longer than the model's limit of tokens."""
NOT_SUMMED = ("batches", "distinct_texts")
"""Sources share them."""


@dataclass(frozen=True)
class GuideInputs:
    """What a guide cache holds: every distinct input of the corpus once."""

    number: int
    num_tokens: int
    num_missing: int
    """Not in the cache yet."""
    missing_tokens: int


@dataclass(frozen=True)
class Preview:
    config: RunConfig
    sources: list[dict[str, Any]]
    """What source_accounts tells."""
    reports: list[dict[str, Any]]
    """What became of the rows of each of data.sources, split or not."""
    num_rows: int
    num_texts: int
    rows_per_epoch: int
    steps_per_epoch: int
    num_steps: int
    epoch: Epoch
    """The first."""
    plans: list[BatchPlan]
    """Plans of batches spread over the first epoch, as if the guide were online."""
    student: ModelShape
    guide: ModelShape | None
    """None without a guide, and where the student is its own."""
    guide_inputs: GuideInputs | None
    activation_bytes_per_token: float
    """Measured on the longest text of the plans."""
    similarity: float | None
    """To the guide, of an anchor and another row's positive in the batches planned; None where the guide's embeddings
    are not there yet."""
    similarity_at_random: float | None
    """The same, were batches not clustered."""
    num_held_out: int = 0
    """Rows of data.hold_out."""
    known_positives: Sequence[str] = ()
    """What the data say to mean the same."""
    notes: Sequence[str] = ()
    """What to know of the models: their prompts, and texts that nothing cuts."""

    def lines(self) -> list[str]:
        sections = {
            "Models": self._models(),
            "Data": self._data(),
            "Steps": self._steps(),
            "Batches": self._batches(),
            "Memory of each worker (estimates)": self._memory(),
            "Cost": self._cost(),
            "Guide": self._guide(),
        }
        config = self.config
        title = f"{config.name}: {self.num_steps:,} steps of {config.batch.global_size:,} rows"
        workers = f"{plural(config.cluster.max_workers, 'worker')}, to {config.run_dir}"
        body = [line for heading, lines in sections.items() for line in ("", heading, *(f"  {line}" for line in lines))]
        return [f"{title} on {workers}", *body]

    @property
    def guide_flops(self) -> float:
        """What the online guide computes in a step."""
        if self.guide is None:
            return 0.0
        guide = self.guide
        return float(np.mean([_forward_flops(guide, plan.guide_chunks) for plan in self.plans]))

    @property
    def student_flops(self) -> float:
        """What a step computes: forward, forward again for chunks that were not kept, backward as two."""
        forward = float(np.mean([_forward_flops(self.student, plan.student_chunks) for plan in self.plans]))
        return (4 - self.kept_share) * forward

    @property
    def kept_share(self) -> float:
        """Share of the chunks whose activations fit the budget, so that they are encoded once."""
        return float(kept_share(workload(self), self.config.cluster.max_workers))

    @property
    def cache_flops(self) -> float:
        """What fills the guide cache for the whole run: what is missing, and after each refresh what is read until the
        next one."""
        inputs, refresh = self.guide_inputs, self.config.guide_refresh
        assert self.guide and inputs
        length = inputs.num_tokens / max(1, inputs.number)
        whole = self.guide.forward_flops(inputs.num_tokens, length)
        missing = self.guide.forward_flops(inputs.missing_tokens, length)
        renewals = (self.num_steps - 1) // refresh if refresh else 0
        if not refresh or not renewals:
            return missing
        last = self.num_steps - renewals * refresh
        renewed = (renewals - 1) * min(whole, refresh * self.guide_flops)
        return missing + renewed + min(whole, last * self.guide_flops)

    def _models(self) -> list[str]:
        table: list[Sequence[str]] = [("", "parameters", "in embeddings", "width", "tokens at most", "model")]
        table.append(("student", *_model_cells(self.student)))
        if self.guide is not None:
            table.append(("guide", *_model_cells(self.guide)))
        else:
            kind = "the student's own embeddings (mode self)" if self.config.guide else "none: plain InfoNCE"
            table.append(("guide", "", "", "", "", kind))
        return _aligned(table, left=(0, 5)) + [line for note in self.notes for line in _wrapped(note)]

    def _data(self) -> list[str]:
        lines = self._source_table()
        for source in self.config.data.sources:
            if bounds := source.filters.model_dump(exclude_none=True):
                told = ", ".join(f"{bound.replace('_', ' ')} {number:,}" for bound, number in bounds.items())
                lines += _wrapped(f"{source.label}: filtered by {told}")
        for report in self.reports:
            lines += [line for told in SourceReport(**report).told() for line in _wrapped(told)]
        dropped = [
            f"{read['name']}: dropped {sum(read['dropped'].values()):,} of "
            f"{read['rows_read'] + read.get('rows_added', 0):,} rows: "
            + ", ".join(f"{reason} ({number:,})" for reason, number in read["dropped"].items())
            + "".join(f"; the first (counting from 0): {where}" for where in read["first_dropped"][:1])
            for read in self.reports
            if read["dropped"]
        ]
        repeats = [
            f"{source['name']}: {plural(source['duplicates_admitted'], 'text')} an epoch must repeat within a batch: "
            + source["why_duplicates"]
            for source in sorted(self.sources, key=lambda source: -source["duplicates_admitted"])
            if source["duplicates_admitted"]
        ]
        lines += [*_first_of(dropped, "sources with dropped rows"), *_first_of(repeats, "sources with repeated texts")]
        return [*lines, f"{self.num_rows:,} rows with {self.num_texts:,} distinct texts, each encoded once a batch"]

    def _source_table(self) -> list[str]:
        """Every source, or the largest of many and the others as one line."""
        counts = {
            "rows read": "rows_read",
            "dropped": "rows_dropped",
            "used": "rows_used",
            "an epoch": "rows_per_epoch",
            "batches": "batches",
            "distinct texts": "distinct_texts",
            "cut": "num_student_cut",
            "cut for guide": "num_guide_cut",
            "moved": "rows_moved",
            "repeats": "duplicates_admitted",
        }
        for keys in (TEXTS_CUT, ("rows_dropped",)):
            if not any(source.get(key) for source in self.sources for key in keys):
                counts = {heading: key for heading, key in counts.items() if key not in keys}

        def cells(name: str, *sources: dict[str, Any]) -> tuple[str, ...]:
            several = len(sources) > 1
            sums = (
                "" if several and key in NOT_SUMMED else f"{sum(source.get(key) or 0 for source in sources):,}"
                for key in counts.values()
            )
            weight = "" if several else f"{sources[0]['weight']:g}"
            share = sum(source["share_of_epoch"] for source in sources)
            return (textwrap.shorten(name, NAME_WIDTH, placeholder="…"), *sums, weight, f"{share:.1%}")

        shown, rest = self.sources, []
        if len(self.sources) > SHOWN_SOURCES:
            largest = sorted(self.sources, key=lambda source: -source["rows_per_epoch"])
            shown, rest = largest[: SHOWN_SOURCES - 1], largest[SHOWN_SOURCES - 1 :]
        table = [("source", *counts, "weight", "share of epoch")]
        table += [cells(source["name"], source) for source in shown]
        if rest:
            table.append(cells(f"… and {len(rest):,} more", *rest))
        if len(self.sources) > 1:
            table.append(cells("in all", *self.sources))
        return _aligned(table)

    def _steps(self) -> list[str]:
        config, size = self.config, self.config.batch.global_size
        mixing = {
            "homogeneous": "a batch is of one source; what is left of each is mixed",
            "mixed": "a batch mixes rows of all sources",
            "clustered": f"{config.data.clustering.hardness:.0%} of a batch's rows are neighbours to the guide, of one "
            "source; what is left of each is mixed",
        }
        mined = list[tuple[str, str]]()
        if mine := config.data.mine:
            told = f"{plural(mine.negatives, 'hard negative')} more a row, by the guide before training"
            if mine.every_steps:
                times = (self.num_steps - 1) // mine.every_steps
                told += f" and by the student after every {mine.every_steps:,} steps ({plural(times, 'time')})"
            mined.append(("mining", f"{told}; not in the numbers below"))
        shares = "in proportion to rows × weight"
        if config.data.temperature > 1:
            shares = f"in proportion to (rows × weight)^(1/{config.data.temperature:g})"
        sizes = sorted({len(batch) for batch in self.epoch.batches} - {size})
        other = f", but one of {sizes[0]:,}" if sizes else ""
        epochs = self.num_steps / self.steps_per_epoch
        return _pairs(
            ("an epoch", f"{self.rows_per_epoch:,} rows = {self.steps_per_epoch:,} steps of {size:,} rows{other}"),
            ("the run", f"{self.num_steps:,} steps = {epochs:,.2f} epochs = {self.num_steps * size:,} pairs seen"),
            ("mixing", f"{config.data.mixing}: {mixing[config.data.mixing]}"),
            *mined,
            *self._watched(),
            *[("known", line) for line in self.known_positives],
            ("shares", f"{shares}; no row comes again before all of its source came"),
            (
                "same texts",
                f"{self.epoch.rows_moved:,} rows of the first epoch changed batches so that no text is twice in one, "
                f"{self.epoch.duplicates_admitted:,} texts had to repeat",
            ),
        )

    def _watched(self) -> list[tuple[str, str]]:
        """What is held out, and when the run is scored while it trains."""
        told = list[tuple[str, str]]()
        if self.num_held_out:
            told.append(("held out", f"{self.num_held_out:,} rows, which no batch has"))
        if self.config.watched:
            told.append(("scored", while_training(self.config)))
        return told

    def _batches(self) -> list[str]:
        workers, plans = self.config.cluster.max_workers, self.plans
        chunks = [len(plan.student_chunks) for plan in plans]
        loads = [_loads(plan.student_chunks, workers) for plan in plans]
        idle = [1 - np.mean(load) / max(load) for load in loads]
        padding = 1 - sum(p.num_tokens for p in plans) / sum(p.padded_tokens for p in plans)
        busiest = max(max(load) for load in loads)
        return [
            f"of {plural(len(plans), 'batch', 'batches')} spread over the first epoch:",
            *_pairs(
                ("texts", f"{_span(len(plan.texts) for plan in plans)} distinct a batch"),
                ("tokens", f"{_span(plan.num_tokens for plan in plans)} a batch, and {padding:.1%} padding"),
                (
                    "chunks",
                    f"{_span(chunks)} a batch, of at most {self.config.batch.tokens_at_once:,} padded tokens; "
                    f"{_span(n / workers for n in chunks)} a worker",
                ),
                (
                    "work",
                    f"{busiest:,} padded tokens at most a worker; {np.mean(idle):.1%} of the time waiting for others",
                ),
                *self._hardness(),
            ),
        ]

    def _hardness(self) -> list[tuple[str, str]]:
        if self.similarity is None:
            return []
        told = f"similarity of an anchor to other rows' positives {self.similarity:.3f}, to the guide"
        if self.similarity_at_random is not None:
            told += f"; {self.similarity_at_random:.3f} were batches not clustered"
        return [("hardness", told)]

    def _memory(self) -> list[str]:
        mode = self.config.guide_mode
        texts = max(len(plan.texts) for plan in self.plans)
        chunk = max(chunk.padded_tokens for plan in self.plans for chunk in plan.student_chunks)
        work = replace(workload(self), texts=texts, largest_chunk=chunk)
        kept_tokens = work.activation_budget / self.activation_bytes_per_token
        sizes = worker_memory(work, kept_tokens, self.config.cluster.max_workers, on_gpu=False)
        guides = {
            "online": "weights", "cache": "not loaded: its embeddings are read", "self": "the student is its own",
            None: "none",
        }  # fmt: skip
        what = {
            "student": "weights, gradients and Adam's means",
            "guide": guides[mode],
            "embeddings": f"of all {texts:,} texts of a batch, the student's and the guide's, fp32",
            "their gradients": "of all workers' texts, summed in fp64",
            "loss": "at most: batch.loss_gb",
            "activations": f"of one chunk, {chunk:,} padded tokens: batch.chunk_tokens",
            "kept chunks": "at most: batch.activation_gb",
            "context": "Python and its libraries",
        }
        rows = [(name, _size(num_bytes), what[name]) for name, num_bytes in sizes.items()]
        return _aligned([*rows, ("in all", _size(sum(sizes.values())), "")], left=(0, 2))

    def _cost(self) -> list[str]:
        workers, is_online = self.config.cluster.max_workers, self.config.guide_mode == "online"
        student, guide = self.student_flops, self.guide_flops if is_online else 0.0
        filling = self.cache_flops if self.guide and not is_online else 0.0
        share = f"{guide / (student + guide):.0%} of that is the guide" if is_online else "there is no guide in it"
        total = (student + guide) * self.num_steps + filling
        return _pairs(
            ("a step", f"about {_flops(student + guide)} in the encoders; {share}"),
            ("the run", f"about {_flops(total)}, {_flops(total / workers)} a worker"),
            ("kept", f"about {self.kept_share:.0%} of the chunks fit batch.activation_gb and are not encoded twice"),
        )

    def _guide(self) -> list[str]:
        """What the guide costs online and cached, and which is less."""
        inputs, step, steps = self.guide_inputs, self.guide_flops, self.num_steps
        if self.guide is None or inputs is None:
            return ["costs nothing: no second model, no second forward" if self.config.guide else "there is no guide"]
        share = step / (step + self.student_flops)
        once = self.guide.forward_flops(inputs.num_tokens, inputs.num_tokens / max(1, inputs.number))
        size = _size(inputs.number * self.guide.width * CACHED_BYTES_PER_NUMBER)
        lines = [
            ("online", f"{_flops(step)} a step, {share:.0%} of its encoder work; {_flops(step * steps)} the run"),
            ("cached", f"{inputs.number:,} distinct inputs, {_flops(once)} once, {size} on disk as fp16"),
        ]
        if there := inputs.number - inputs.num_missing:
            lines.append(("", f"{there:,} of them are there, {inputs.num_missing:,} are missing"))
        if self.config.guide_refresh:
            lines.append(("", f"with what is read after each refresh, {_flops(self.cache_flops)} the run"))
        pays = once / (step * self.steps_per_epoch)
        lines.append(("pays", f"after {pays:,.2f} epochs; the run has {steps / self.steps_per_epoch:,.2f}"))
        return _pairs(*lines, ("advice", self._advice(step * steps, self.cache_flops, share)))

    def _advice(self, online: float, cached: float, share: float) -> str:
        mode, saved = self.config.guide_mode, abs(online - cached) / (online + self.student_flops * self.num_steps)
        if cached < online:
            verb = "saves" if mode == "cache" else "would save"
            return f"guide.mode=cache {verb} about {share:.0%} of a step's encoder work, {saved:.0%} of the run's"
        if mode == "cache":
            return f"guide.mode=online would save {saved:.0%} of the run's encoder work: it encodes only what is read"
        return "guide.mode=online: the run reads too little twice for a cache to pay"


def preview(config: RunConfig, student: Student, guide: Guide | None, corpus: Corpus) -> Preview:
    """Plan some batches of a prepared corpus. UserError as in training."""
    sampler = Sampler(corpus, config)
    epoch = sampler.epoch(0)
    steps = np.unique(np.linspace(1, sampler.steps_per_epoch, SAMPLED_BATCHES).round().astype(int)).tolist()
    plans = _plans(config, corpus, epoch, steps, guide)
    at_random = None
    if guide and sampler.is_clustered:
        data = config.data.model_copy(update={"mixing": "homogeneous"})
        loose = Sampler(corpus, config.model_copy(update={"data": data}))
        at_random = _similarity(config, guide, corpus, _plans(config, corpus, loose.epoch(0), steps, guide))
    return Preview(
        config=config,
        sources=source_accounts(corpus, sampler),
        reports=corpus.manifest["reports"],
        num_rows=corpus.num_rows,
        num_texts=corpus.num_texts,
        rows_per_epoch=sampler.rows_per_epoch,
        steps_per_epoch=sampler.steps_per_epoch,
        num_steps=sampler.num_steps,
        epoch=epoch,
        plans=plans,
        student=_shape(student),
        guide=_shape(guide) if guide else None,
        guide_inputs=_guide_inputs(config, guide, corpus) if guide else None,
        activation_bytes_per_token=_activation_bytes(student, corpus, plans),
        similarity=_similarity(config, guide, corpus, plans) if guide else None,
        similarity_at_random=at_random,
        num_held_out=len(sampler.held_out),
        known_positives=known_positives_lines(corpus),
        notes=[
            *(f"prompts of the {line}" for line in prompt_lines(config, student, guide)),
            *filter(None, [long_text_line(student, corpus)]),
        ],
    )


def _plans(
    config: RunConfig, corpus: Corpus, epoch: Epoch, steps: Sequence[int], guide: Guide | None
) -> list[BatchPlan]:
    chunk_tokens = config.batch.tokens_at_once
    steps = [step for step in steps if step <= len(epoch.batches)]
    return [plan_batch(corpus, epoch.batches[step - 1], step, chunk_tokens, guide is not None) for step in steps]


def _similarity(config: RunConfig, guide: Guide, corpus: Corpus, plans: Sequence[BatchPlan]) -> float | None:
    cache, similarities = open_guide_cache(config, guide), list[float]()
    for plan in plans:
        positions = cache.find(corpus.guide_keys[plan.guide_inputs])
        if (positions < 0).any():
            return None
        index = batch_index(plan, torch.device("cpu"))
        embeddings = torch.from_numpy(cache.embeddings(positions)).float()
        similarities.append(mean_guide_similarity(index, embeddings[torch.from_numpy(plan.guide_input_of)]))
    return float(np.mean(similarities))


def _guide_inputs(config: RunConfig, guide: Guide, corpus: Corpus) -> GuideInputs:
    texts = corpus.texts_in_use
    texts = texts[np.unique(corpus.guide_keys[texts, 0], return_index=True)[1]]
    missing = texts
    if config.guide_mode == "cache":
        missing = texts[open_guide_cache(config, guide).find(corpus.guide_keys[texts]) < 0]
    lengths = corpus.guide_lengths.astype(np.int64)
    return GuideInputs(len(texts), int(lengths[texts].sum()), len(missing), int(lengths[missing].sum()))


def _shape(encoder: Encoder) -> ModelShape:
    """Layers from the model's files, all else as it is loaded."""
    tables = {id(m.weight): m.weight for m in encoder.model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in encoder.model.parameters())
    assert encoder.config.model is not None
    return replace(
        model_shape(encoder.config.model),
        width=encoder.width,
        max_tokens=encoder.max_tokens,
        num_parameters=total,
        num_encoding=total - sum(table.numel() for table in tables.values()),
    )


def _activation_bytes(student: Student, corpus: Corpus, plans: Sequence[BatchPlan]) -> float:
    """Per token, of what autograd keeps of the longest text."""
    texts = np.concatenate([plan.texts for plan in plans])
    longest = texts[[int(corpus.student_lengths[texts].argmax())]]
    budget = ActivationBudget(0.0, student.model)
    with budget.measured(int(corpus.student_lengths[longest[0]])):
        student.encode(corpus.student_tokens(longest), dropout_seed=(0, 0, 0))
    return budget.bytes_per_token


def _model_cells(size: ModelShape) -> tuple[str, ...]:
    embeddings = size.num_parameters - size.num_encoding
    counts = f"{size.num_parameters / 1e6:,.1f} M", f"{embeddings / 1e6:,.1f} M", f"{size.width:,}"
    return (*counts, str(size.max_tokens or "no limit"), size.model)


def _forward_flops(model: ModelShape, chunks: Sequence[Chunk]) -> float:
    """Attention goes by the length to which a chunk's texts are padded."""
    return float(sum(model.forward_flops(chunk.padded_tokens, chunk.longest) for chunk in chunks))


def _loads(chunks: Sequence[Chunk], num_workers: int) -> list[int]:
    return [sum(chunks[c].padded_tokens for c in own) for own in assign_chunks(chunks, num_workers)]


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns two spaces apart, flush right but for those in ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )
    return [line.rstrip() for line in lines]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, PAGE_WIDTH, subsequent_indent="    ")


def _first_of(texts: Sequence[str], what: str) -> list[str]:
    lines = [line for text in texts[:SHOWN_REASONS] for line in _wrapped(text)]
    more = len(texts) - SHOWN_REASONS
    return [*lines, f"… and {more:,} more {what}"] if more > 0 else lines


def _pairs(*pairs: tuple[str, str]) -> list[str]:
    return _aligned(pairs, left=(0, 1))


def _span(values: Iterable[float | int]) -> str:
    rounded = [round(value) for value in values]
    low, high = min(rounded), max(rounded)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _size(num_bytes: float | int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def _flops(flops: float | int) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP", "EFLOP"):
        flops /= 1e9 if unit == "GFLOP" else 1e3
        if flops < 1000:
            break
    return f"{flops:,.1f} {unit}"
