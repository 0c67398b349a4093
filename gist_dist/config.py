"""The sections of a recipe, frozen pydantic models: every field with its unit and default. recipe.py reads them.

Importing this module costs neither torch nor ray, so that a mistyped key answers at once.
"""

import codecs
import os
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from gist_dist.common.redact import redact_address
from gist_dist.common.text import SHORT

ROLES = ("anchor", "positive", "negatives")

LARGEST = 10**12
"""Largest number in a recipe. What is larger is a slip, and would be counted up to."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that file systems take."""
LONGEST_SOURCE_NAME = 200


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _bounded(self) -> "Section":
        for name, value in self:
            if isinstance(value, int | float) and abs(value) > LARGEST:
                raise ValueError(f"{name} = {SHORT.repr(value)}: at most {LARGEST:.0e}")
        return self


SectionType = TypeVar("SectionType", bound=Section)


def _usable_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path has no NUL character")
    if "://" in path:
        return path
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"a path has at most {LONGEST_PATH} bytes, and {LONGEST_NAME} between two slashes")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user {path.split('/')[0]} with a home folder") from None
    return path


PathText = Annotated[str, AfterValidator(_usable_path)]
"""A path that can be asked for, or a URI."""


class Place(Enum):
    """What a path of the recipe names. Whoever treats paths by what they are finds them with paths_of()."""

    WRITTEN = "a folder or URI that all nodes write to"
    READ = "a folder that all nodes read"
    MODEL = "a Hub id, or a folder that all nodes read"
    DATA = "where rows are read from, before training"
    NODE = "a folder on each node's own disk"


WrittenPath = Annotated[PathText, Place.WRITTEN]
ReadPath = Annotated[PathText, Place.READ]
ModelPath = Annotated[PathText, Place.MODEL]
DataPath = Annotated[PathText, Place.DATA]
NodePath = Annotated[PathText, Place.NODE]


Precision = Literal["auto", "fp32", "bf16"]


class RolePrompts(Section):
    """Text put before every text of a role; part of what is encoded."""

    anchor: str | None = None
    """null: the model's own prompt of queries, or its default prompt; "" for none."""
    positive: str | None = None
    """null: the model's own prompt of documents, or its default prompt; "" for none."""
    negatives: str | None = None
    """null: that of the positives, which are documents as well."""


class StudentConfig(Section):
    """The model that is trained."""

    model: ModelPath = Field(min_length=1)
    """Hub id or folder of a SentenceTransformer (or of a plain transformers model: the mean of its tokens is taken, of
    a causal language model the last)."""
    revision: str | None = None
    """Hub revision."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Texts are cut to this many tokens, special ones included; null keeps the model's own limit."""
    prompts: RolePrompts = RolePrompts()
    """Prompt per role, in place of the model's own; a source can override it."""
    precision: Precision = "fp32"
    """Precision of the encoder's matrix products (autocast); weights, embeddings and the loss are fp32, whatever the
    checkpoint is stored in. auto: bf16 where the machine that starts the run has units for it, else fp32; a run that
    goes on keeps what it began with."""
    save_dtype: Literal["fp32", "checkpoint", "bf16", "fp16"] = "fp32"
    """Type of the saved weights. fp32 keeps what training did; checkpoint is what the student came in; the narrow ones
    halve the file and round: small steps may be rounded away."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """A number overrides every dropout of the model; null keeps the model's own."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention code of transformers; null: its choice. flash_attention_2 needs a GPU, its package and bf16."""
    compile: bool = False
    """torch.compile, once for all lengths: the first batches wait a minute or more. Needs a C++ compiler."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you say so."""

    @model_validator(mode="after")
    def _flash(self) -> "StudentConfig":
        if self.attention == "flash_attention_2" and self.precision != "bf16":
            raise ValueError("attention flash_attention_2 works in bf16 only; set precision to bf16")
        return self


class GuideConfig(Section):
    """The frozen model that identifies false negatives."""

    model: Annotated[ModelPath, Field(min_length=1)] | None = None
    """Hub id or folder of a SentenceTransformer. Left out in mode self; with refresh, null starts from the student."""
    revision: str | None = None
    """Hub revision."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Texts are cut to this many tokens of the guide's own tokenizer; null keeps the model's own limit."""
    prompts: RolePrompts = RolePrompts()
    """Prompt per role, in place of the model's own; a source can override it."""
    precision: Precision = "fp32"
    """Precision of the guide's weights and matrix products; its embeddings are fp32. auto: as student.precision."""
    mode: Literal["online", "cache", "self"] = "online"
    """online: the guide encodes every batch's texts within the step. cache: it encodes every text of the corpus once,
    before training, and steps read that. self: the student's own embeddings of the step serve as the guide's."""
    refresh: int | None = Field(default=None, ge=1)
    """Every N steps the guide becomes a frozen copy of the student; null: never."""
    cache_dir: WrittenPath | None = None
    """Where guide embeddings are kept, one folder for each guide; a path or URI that all nodes reach. By default
    output_dir/guide_cache."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """As student.attention."""
    compile: bool = False
    """As student.compile."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you say so."""

    @model_validator(mode="after")
    def _model_or_student(self) -> "GuideConfig":
        if self.attention == "flash_attention_2" and self.precision != "bf16":
            raise ValueError("attention flash_attention_2 works in bf16 only; set precision to bf16")
        if self.mode == "self" and (self.model or self.refresh):
            raise ValueError("mode self takes the step's own student embeddings; leave out model and refresh")
        if self.mode != "self" and self.model is None and self.refresh is None:
            raise ValueError("model is missing; name a guide, or set mode: self, or refresh to start from the student")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


class Columns(Section):
    """Which columns hold the roles, or the text and the label of a classification set."""

    anchor: str | None = None
    """Left out, 'anchor' is taken, or what the field's tools call it: query, question, sentence1, messages, …"""
    positive: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)] | None, BeforeValidator(_as_list, str | tuple[str, ...] | None)
    ] = None
    """One text column, one column of lists, or several columns: a row has all these positives (see several_positives).
    Null and blanks are none. Left out, 'positive' is taken, or pos, answer, response, positive_passages, sentence2, …,
    or 'positive_1', 'positive_2', …"""
    negatives: Annotated[tuple[str, ...] | None, BeforeValidator(_as_list, str | tuple[str, ...] | None)] = None
    """One list column, one text column, or several text columns; null and blanks mean no negative there. Left out,
    'negatives', 'negative', 'neg', 'negative_1', … are taken where the source has them; [] takes none."""
    prompt: str | None = None
    """A column whose text is put before the row's anchor, as FlagEmbedding's prompt; null: none."""
    text: str | None = None
    """The texts of a classification set. With label, in place of the roles: the source is made into triplets."""
    label: str | None = None
    """The class of each text of a classification set. In other sources, rows with an equal value mean the same, and
    are no negatives of each other (data.known_positives); null and blanks say nothing."""
    instructions: Literal["drop", "prepend"] | None = None
    """Cells are [instruction, text] pairs, as in MEDI, or conversations with a system message: drop takes the text
    alone, prepend both, joined."""

    @model_validator(mode="after")
    def _both(self) -> "Columns":
        if self.text is not None and self.label is None:
            raise ValueError("text is set and label is not: a classification set needs both")
        if self.text is not None and (self.anchor or self.positive or self.negatives):
            raise ValueError("text is for a classification set, which has no roles; leave it out, or the roles")
        for role, columns in (("positive", self.positive), ("negatives", self.negatives)):
            if columns and (twice := [name for name in columns if columns.count(name) > 1]):
                raise ValueError(f"{role} names the column {twice[0]!r} twice")
        return self

    @property
    def is_classification(self) -> bool:
        return self.text is not None


def _separator(value: Any) -> Any:
    return {"tab": "\t", "\\t": "\t"}.get(value, value) if isinstance(value, str) else value


def _text_encoding(name: str) -> str:
    try:
        is_text = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        raise ValueError(
            f"{SHORT.repr(name)} is no encoding that Python knows (known: utf-8, cp1252, latin-1, utf-16, …)"
        )
    return name


class TextFormat(Section):
    """How the text files of a source are to be read, where that isn't plain."""

    delimiter: Annotated[str | None, BeforeValidator(_separator)] = Field(default=None, min_length=1, max_length=1)
    """Between the cells of CSV and TSV: one character, or tab. null: the header tells (comma, tab, semicolon, |)."""
    quoting: Literal["minimal", "none"] = "minimal"
    """minimal: a cell may be within double quotes. none: a quote is part of the text, as in the TSV of MS MARCO."""
    encoding: Annotated[str, AfterValidator(_text_encoding)] | None = None
    """Encoding of CSV, TSV and JSON files, such as cp1252. null: UTF-8, or UTF-16 where a byte order mark says so."""
    names: tuple[str, ...] | None = None
    """Column names of CSV and TSV files without a header; null: the first line has them."""

    @model_validator(mode="after")
    def _separates(self) -> "TextFormat":
        if self.delimiter is not None and self.delimiter in '"\r\n\0':
            raise ValueError(f"delimiter = {self.delimiter!r}: a quote or the end of a line separates no cells")
        if self.names is not None and (not self.names or len(set(self.names)) < len(self.names)):
            raise ValueError("names: a name for every column, all different")
        return self


class SourcePrompts(Section):
    """Prompts of one source, in place of student.prompts and guide.prompts."""

    student: RolePrompts | None = None
    guide: RolePrompts | None = None


class Filters(Section):
    """Rows with a text outside these bounds are dropped and counted; null: no bound. Prompts don't count."""

    min_characters: int | None = Field(default=None, ge=1)
    max_characters: int | None = Field(default=None, ge=1)
    min_words: int | None = Field(default=None, ge=1)
    max_words: int | None = Field(default=None, ge=1)


class Triplets(Section):
    """How a classification set becomes triplets (GISTEmbed's MTEBcls): for every text, the positive is drawn from
    the texts of its label that the guide finds nearest, the negative from all texts of other labels."""

    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the softmax over the guide's similarities that the positive is drawn by."""
    neighbors: int = Field(default=100, ge=1)
    """How many nearest texts of the same label the positive is drawn from."""


class Promotion(Section):
    """Which false negatives become positives of the row, where loss.false_negatives is positive."""

    margin: float = 0.0
    """As loss.margin, for joining the positives; a negative one asks for candidates that are closer still."""
    most: int = Field(default=1, ge=1, le=32)
    """Candidates that join a row, the closest to the guide first; the others are dropped."""
    weight: Literal["equal", "guide"] = "equal"
    """equal: each counts as much as the row's own positive. guide: each by its guide score, the own positive too."""


class SourceLoss(Section):
    """The loss of one source's rows: every field that is null is as in the recipe's section loss."""

    temperature: float | None = Field(default=None, gt=0)
    margin: float | None = None
    margin_kind: Literal["absolute", "relative"] | None = None
    contrast_anchors: bool | None = None
    contrast_positives: bool | None = None
    in_batch: bool | None = None
    negatives: Literal["all", "own"] | None = None
    guard_negatives: bool | None = None
    positives: Literal["mean", "sum"] | None = None
    false_negatives: Literal["drop", "positive"] | None = None
    promotion: Promotion | None = None


class SourceConfig(Section):
    """One data set of training rows."""

    path: DataPath = Field(min_length=1)
    """A file or folder of parquet, jsonl, csv or arrow, a glob, a URI (s3://, gs://, hf://…), or a Hub dataset id."""
    name: str | None = Field(default=None, max_length=LONGEST_SOURCE_NAME)
    """Shown in the plan and the report; by default the last part of the path."""
    subset: str | None = None
    """Configuration of a Hub dataset."""
    split: str | None = None
    """Split of a Hub dataset, or of a folder whose files or subfolders are named after splits. null takes train where
    there are several splits, and else the whole folder."""
    revision: str | None = None
    """Revision of a Hub dataset."""
    columns: Columns = Columns()
    format: TextFormat = TextFormat()
    prompts: SourcePrompts = SourcePrompts()
    weight: float = Field(default=1.0, ge=1e-6, le=1e6)
    """How often an epoch takes each row: 2 takes all rows twice, 0.5 a fresh random half of them."""
    max_rows: int | None = Field(default=None, ge=1)
    """Only the first so many rows are read."""
    license: str | None = Field(default=None, max_length=100)
    """The data's licence for the model card, such as cc-by-4.0. null: a Hub dataset's own card is asked."""
    filters: Filters = Filters()
    split_by: str | None = None
    """A column whose every value makes a source of its own, as task_name in MEDI; each with this weight."""
    several_positives: Literal["together", "apart"] = "together"
    """Several positives of one anchor (a list, columns, judgements of a query). together: a row has them all; see
    loss.positives. apart: each makes a row of its own, for anchors that have dozens."""
    triplets: Triplets = Triplets()
    """For a classification set (columns.text and columns.label)."""
    loss: SourceLoss = SourceLoss()
    """Fields of the section loss that are others for its rows; in a mixed batch too."""

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        path = redact_address(self.path)
        path = path.split("?")[0] if "://" in path else path
        last = path.rstrip("/").rsplit("/", 1)[-1][:LONGEST_SOURCE_NAME]
        return last.split(".")[0] or last if not set("*?[") & set(last) else last


class Clustering(Section):
    """How batches of neighbours are made where data.mixing is clustered."""

    hardness: float = Field(default=1.0, ge=0, le=1)
    """Share of a batch's rows that are neighbours to the guide; the others come from the whole source. 0: as
    homogeneous."""
    rows_per_cluster: int | None = Field(default=None, ge=2)
    """About so many rows make a cluster; null: batch.global_size. Fewer make neighbourhoods finer."""


class Mine(Section):
    """Hard negatives added to every row while it trains; the options are those of `gist-dist mine`."""

    negatives: int = Field(default=4, ge=1, le=100)
    """Added to each row, where so many pass."""
    every_steps: int | None = Field(default=None, ge=1)
    """Every N steps they are searched anew with the current student; null: only before training, by the
    guide."""
    relative_margin: float | None = Field(default=0.05, ge=0, lt=1)
    """A negative scores at most the positive's score less this share of it; null: no bound."""
    min_rank: int = Field(default=0, ge=0)
    """So many of the nearest that pass are skipped."""
    sampling: Literal["top", "random"] = "top"
    """The nearest that pass, or a seeded draw from ten times as many."""


def _share(value: Any) -> Any:
    """1% as 0.01."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            pass
    return value


class DataConfig(Section):
    sources: tuple[SourceConfig, ...]
    root: DataPath | None = None
    """Folder that relative source paths start from; by default the current one. If it is set, no path is a Hub id."""
    mixing: Literal["homogeneous", "mixed", "clustered"] = "homogeneous"
    """homogeneous: a batch holds rows of one source; only what is left of each, less than a batch, is mixed.
    mixed: rows of all sources are shuffled together. clustered: as homogeneous, and a batch holds rows that are
    neighbours to the guide, which are harder negatives; every row still comes once an epoch. Needs guide.model."""
    clustering: Clustering = Clustering()
    known_positives: Literal["pairs", "clusters", "off"] = "pairs"
    """What the data say to mean the same is no negative. pairs: texts that are anchor and positive of some row, and
    texts of one columns.label. clusters: all texts that such pairs join, over any number of steps. off: neither."""
    mine: Mine | None = None
    """Hard negatives by the guide before training and, if asked, by the student as it goes; null: none. Needs
    guide.model."""
    hold_out: Annotated[float | None, BeforeValidator(_share, float | str | None)] = Field(default=None, gt=0, lt=0.5)
    """Share of the rows (0.01, or 1%) that are not trained on but scored, as a retrieval set and by their loss, while
    the run trains (evaluate.during). Rows that known positives join stay together. null: none."""
    temperature: float = Field(default=1.0, ge=1)
    """Sources share an epoch in proportion to (rows × weight)^(1/temperature). 1: in proportion, every row once. More
    raises the small sources; an epoch stays as long, and no row comes again before all of its source came."""
    unusable_rows: Literal["drop", "error"] = "drop"
    """Rows with an empty, missing or non-text anchor, positive or negative: drop counts and names them, error stops."""
    cache_dir: WrittenPath | None = None
    """Where prepared corpora are kept, one folder for each content; a path or URI (s3://, gs://, hdfs://) that all
    nodes reach. By default output_dir/corpora."""
    local_copy: NodePath | None = None
    """Folder on each node's own disk that workers copy the corpus and guide cache to before they read them. null: read
    in place, or a folder for temporary files where the place is a URI."""

    @model_validator(mode="after")
    def _something(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("sources is empty; name at least one data set")
        if self.mixing != "clustered" and self.clustering != Clustering():
            raise ValueError(f"clustering is set and mixing is {self.mixing}; set mixing: clustered")
        return self


CPU_CHUNK_TOKENS, CPU_ACTIVATION_GB = 4096, 1.0
"""Of a worker on a CPU, where the recipe leaves them open."""


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


class BatchConfig(Section):
    global_size: int = Field(default=256, ge=2)
    """Rows of the global batch, over all workers; never per device."""
    chunk_tokens: Annotated[int | None, BeforeValidator(_auto, int | str | None)] = Field(default=None, ge=1)
    """Padded tokens encoded at once: lower it if a worker runs out of memory. auto, or null: 4,096 on a CPU; on a GPU
    more, by its memory and the student's size."""
    chunk_start_tokens: int | None = Field(default=None, ge=0)
    """What starting one more chunk costs, in tokens' worth of encoding: more makes fewer chunks with more padding.
    null: 32 on a CPU, 4,096 on a GPU."""
    packing: bool | None = None
    """Join a chunk's texts without padding, where the model is BERT-like (in bf16, on a GPU); other models are padded
    all the same. null: on a GPU."""
    activation_gb: Annotated[float | None, BeforeValidator(_auto, float | str | None)] = Field(default=None, ge=0)
    """Gigabytes a worker may fill with the graphs of chunks that it then need not encode twice. auto, or null: 1 on a
    CPU; on a GPU three tenths of what the weights leave of its memory."""
    loss_gb: float = Field(default=0.25, gt=0)
    """Gigabytes for one block of similarity scores (scored rows × candidates)."""
    gather_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of student embeddings sent between workers; the loss sees them rounded, with one worker too."""

    @property
    def tokens_at_once(self) -> int:
        """Of a chunk, at most; where the recipe leaves it open, as on a CPU (core/budgets.py knows of GPUs)."""
        return CPU_CHUNK_TOKENS if self.chunk_tokens is None else self.chunk_tokens

    @property
    def kept_bytes(self) -> float:
        """Of graphs, likewise."""
        return 1e9 * (CPU_ACTIVATION_GB if self.activation_gb is None else self.activation_gb)


class LossConfig(Section):
    temperature: float = Field(default=0.05, gt=0)
    """Divides every similarity; 0.01 in the paper."""
    margin: float = 0.0
    """Lowers the guide's threshold, so that more candidates are dropped; see margin_kind."""
    margin_kind: Literal["absolute", "relative"] = "absolute"
    """absolute: threshold = σ(a, p) − margin. relative: threshold = σ(a, p) − |σ(a, p)|·margin."""
    contrast_anchors: bool = True
    """Other anchors are candidates of an anchor."""
    contrast_positives: bool = True
    """Other positives are candidates of a positive."""
    in_batch: bool = True
    """Texts of other rows are candidates. false: only hard negatives are."""
    negatives: Literal["all", "own"] = "all"
    """Hard negatives of all rows are candidates of every row, or only its own."""
    guard_negatives: bool = False
    """A row's own hard negatives stay, whatever the guide says: for negatives that people have checked."""
    positives: Literal["mean", "sum"] = "mean"
    """Of a row with several positives, by the data or by promotion. mean: the mean of each one's loss against the
    negatives. sum: the negative log of their joint share of the softmax, which one near positive can satisfy."""
    false_negatives: Literal["drop", "positive"] = "drop"
    """What becomes of a candidate above the guide's threshold: it leaves the softmax, or joins the row's positives."""
    promotion: Promotion = Promotion()

    @model_validator(mode="after")
    def _in_use(self) -> "LossConfig":
        if self.promotion != Promotion() and self.false_negatives != "positive":
            raise ValueError("promotion is set and false_negatives is drop; set false_negatives: positive")
        return self


class OptimConfig(Section):
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak rate of AdamW."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which the rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the rate does after warm-up; linear and cosine end at 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled; not applied to biases and normalisation weights."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's two running means."""
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """The gradient of the global batch is scaled down to this norm; null never clips."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; null: epochs count."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; 1 if steps is null too."""
    non_finite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite. stop: the run ends, names the step and its rows and keeps the state
    before it. skip: the step leaves the weights as they are, its rows are named, and training goes on."""
    max_skipped: int = Field(default=10, ge=1)
    """With skip: how many steps of a run may be skipped; one more stops it."""

    @model_validator(mode="after")
    def _one_length(self) -> "OptimConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} are both set; keep one")
        return self


class CheckpointConfig(Section):
    every_steps: int | None = Field(default=100, ge=1)
    """A resumable checkpoint every N steps, and always after the last; null: only after the last."""
    keep: int = Field(default=2, ge=1)
    """How many checkpoints stay; older ones are removed once a new one is complete."""
    dir: Annotated[WrittenPath, Field(min_length=1)] | None = None
    """Folder or URI (s3://, gs://, …) below which checkpoints are kept, in a folder of the run's name. null:
    checkpoints in the run's own folder."""
    retry_seconds: float = Field(default=300.0, ge=0)
    """How long storage that fails is tried again before training goes on without that checkpoint."""


HELD_OUT = "held_out"
"""The evaluation set of the rows of data.hold_out, among the names of tasks."""


def _steps_of_evaluation(value: Any) -> Any:
    value = _share(value)
    steps = value if isinstance(value, list | tuple) else [value]
    is_share = isinstance(value, float) and 0 < value < 1
    if value is None or is_share or (steps and all(type(step) is int and step >= 1 for step in steps)):
        return value
    raise ValueError(f"{SHORT.repr(value)} is no number of steps, no share of an epoch (0.5, 50%) and no list of steps")


Every = Annotated[
    int | float | tuple[int, ...] | None,
    BeforeValidator(_steps_of_evaluation, int | float | str | tuple[int, ...] | None),
]


class EvaluateConfig(Section):
    tasks: tuple[str, ...] = ()
    """MTEB tasks (or names of folders in local_tasks) run after training; [] trains only. A part of one is
    Tatoeba[deu-eng, fra-eng], a split MSMARCO@dev."""
    benchmark: Annotated[tuple[str, ...], BeforeValidator(_as_list, str | tuple[str, ...])] = ()
    """Benchmarks of MTEB's, such as MTEB(eng, v2), NanoBEIR or RTEB(beta), one or a list; or of your own: NAME for
    local_tasks/NAME.yaml with `tasks: [...]`. Their tasks are run after training as well."""
    languages: tuple[str, ...] = ()
    """Languages (ISO 639-3, as deu): of tasks in several, only the parts in these are scored. []: all."""
    baseline: bool = True
    """Also run them on the untrained student."""
    guide: bool = False
    """Also run them on the guide."""
    local_tasks: ReadPath | None = None
    """Folder of task folders read instead of the Hub: MTEB tasks under their names, and your own sets."""
    during: tuple[str, ...] = ()
    """What is scored while the run trains: MTEB tasks, your own sets, and held_out, the rows of data.hold_out. []: the
    held-out rows where there are any, and else tasks."""
    every_steps: Every = None
    """Steps between two evaluations of what `during` names; below 1, a share of an epoch; a list, these steps. The
    untrained student and the last step are always scored. null: they alone, and none without `during` or
    data.hold_out."""
    keep_best: str | None = None
    """A task of `during`, mean (of all of them) or loss (of the held-out rows): the run's model is the one of the step
    where that is best, and the last one stays beside it as model-last. null: the last step's."""
    stop_after: int | None = Field(default=None, ge=1)
    """Training ends after so many evaluations in a row without a gain in keep_best (early stopping)."""
    least_gain: float = Field(default=0.0, ge=0)
    """What counts as a gain: more than this, in points of 100 (of a loss: as it is)."""
    batch_size: int = Field(default=64, ge=1)
    """Texts encoded at once."""
    precision: Precision = "fp32"
    """Of the matrix products of all models that are scored, the untrained student among them. auto: as
    student.precision."""
    task_timeout_minutes: float | None = Field(default=1440, gt=0)
    """A task that takes longer is ended and reported as failed, the others go on; null: no limit."""

    @property
    def is_wanted(self) -> bool:
        """Whether anything is scored after training."""
        return bool(self.tasks or self.benchmark)


def _check_num_workers(value: Any) -> Any:
    bounds = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(type(bound) is int and bound >= 1 for bound in bounds) or list(bounds) != sorted(bounds):
        raise ValueError(f"{SHORT.repr(value)} is neither a number of workers, at least 1, nor [fewest, most]")
    return value


def _with_plain_variables(runtime_env: dict[str, Any]) -> dict[str, Any]:
    variables = runtime_env.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ValueError("env_vars are names with texts; put numbers in quotes")
    return runtime_env


class ClusterConfig(Section):
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_check_num_workers)] = 1
    """Training processes; or [fewest, most], and the run shrinks when a node goes and grows when one comes. The global
    batch, and so the curve, stays the same."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """null: one where the cluster has GPUs, none elsewhere."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """Cores reserved for a worker, and its compute threads on CPU. null: one, or a half where cores are too few."""
    address: str | None = None
    """Address of a running Ray cluster; null takes $RAY_ADDRESS, or else starts a local Ray and stops it at the end."""
    runtime_env: Annotated[dict[str, Any], AfterValidator(_with_plain_variables)] = {}
    """Ray runtime environment of the workers."""
    deal_by_speed: bool = False
    """Give each worker work in proportion to its measured speed, where nodes differ. It changes how long a
    step takes, not what it computes."""
    deterministic: bool = True
    """On a GPU, only operations that give the same bits every time; one that can't ends the run with its name."""
    max_failures: int = Field(default=3, ge=0)
    """How often in a row the workers are started again without getting further than before."""
    hang_timeout_s: float = Field(default=300.0, ge=5)
    """Seconds after which a step that makes no progress counts as hung and its workers are started again; at least
    five times the longest step so far."""
    wait_minutes: float = Field(default=30.0, ge=0)
    """How long a run waits for nodes when too few are left; then it ends, and the same command resumes it."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> "ClusterConfig":
        if self.gpus_per_worker and self.gpus_per_worker < 1 < self.max_workers:
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g}: NCCL takes one worker a GPU; set it to 1, or "
                "num_workers to 1"
            )
        return self

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class HubConfig(Section):
    """The model on the Hugging Face Hub, and what its card says beyond what the run knows. The token is HF_TOKEN, or
    that of `hf auth login`; a recipe holds none."""

    repo_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")
    """OWNER/NAME that the finished model and its card are pushed to; null: nowhere."""
    private: bool = True
    """The repository is created private, and one that is public is refused; false: public."""
    license: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=50)
    """The model's licence as the Hub writes it: apache-2.0, cc-by-nc-4.0, ...; null: the card calls it not stated."""
    language: Annotated[
        tuple[Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")], ...],
        BeforeValidator(_as_list, str | tuple[str, ...]),
    ] = ()
    """ISO 639 codes: en, or [en, de]."""


class WandbConfig(Section):
    """Weights & Biases (needs gist-dist[wandb]). The key is WANDB_API_KEY, or that of `wandb login`."""

    project: str = Field(default="gist_dist", min_length=1, max_length=128)
    entity: str | None = None
    """The user or team; null: the key's default."""
    mode: Literal["online", "offline"] = "online"
    """offline: kept in the run folder, for `wandb sync`."""


class MlflowConfig(Section):
    """MLflow (needs gist-dist[mlflow])."""

    experiment: str = Field(default="gist_dist", min_length=1)
    uri: str | None = None
    """The tracking server or store; null: MLFLOW_TRACKING_URI. Rank 0's worker writes there."""


class TrackingConfig(Section):
    """Where else the metrics are written, besides metrics.jsonl."""

    tensorboard: bool = True
    """TensorBoard's events, in the run folder's tensorboard/."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    report_texts: bool = True
    """false: the report shows no texts of the data; candidates that the guide took out are then only counted."""
    profile_steps: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_list, int | tuple[int, ...]), Field(max_length=100)
    ] = ()
    """Steps whose operations torch.profiler records: profile/step-00000010-rank-0.json.gz in the run folder. They take
    longer than others, and their traces megabytes; the first steps are no measure of the rest."""
    profile_ranks: Literal["first", "all"] = "first"
    """Whose steps are recorded: rank 0's, or every worker's."""
    hub: HubConfig = HubConfig()


class RunConfig(Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """The run is kept under output_dir/name; letters, digits, '.', '_' and '-'."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    output_dir: WrittenPath = "runs"
    student: StudentConfig
    guide: GuideConfig | None = None
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _losses(self) -> "RunConfig":
        for number, source in enumerate(self.data.sources):
            try:
                self.loss_of(source)
            except ValidationError as error:
                raise ValueError(
                    f"data.sources[{number}].loss: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
                ) from None
        return self

    def loss_of(self, source: SourceConfig) -> LossConfig:
        """The loss of a source's rows."""
        own = source.loss.model_dump(exclude_none=True)
        return LossConfig(**self.loss.model_dump() | own) if own else self.loss

    @model_validator(mode="after")
    def _guided_data(self) -> "RunConfig":
        if self.data.mixing == "clustered" and not self.has_guide_model:
            found = "the student is its own" if self.guide else "there is none"
            raise ValueError(f"data.mixing clustered asks a guide which rows are alike, and {found}; set guide.model")
        if self.data.mine and not self.has_guide_model:
            found = "the student is its own" if self.guide else "there is none"
            raise ValueError(f"data.mine asks a guide for negatives, and {found}; set guide.model")
        if self.data.mine and all(source.columns.is_classification for source in self.data.sources):
            raise ValueError("data.mine: all sources are classification sets, whose triplets have negatives already")
        return self

    @model_validator(mode="after")
    def _scored_while_it_trains(self) -> "RunConfig":
        evaluate, watched = self.evaluate, self.watched
        if HELD_OUT in evaluate.tasks:
            raise ValueError(f"evaluate.tasks: {HELD_OUT} is scored while the run trains; name it in evaluate.during")
        if HELD_OUT in watched and self.data.hold_out is None:
            raise ValueError(
                f"evaluate.during: {HELD_OUT} are the rows of data.hold_out, which is not set; set it to 1%"
            )
        if evaluate.every_steps is not None and not watched:
            raise ValueError("evaluate.every_steps: there is nothing to score; set evaluate.during or data.hold_out")
        if evaluate.stop_after is not None and evaluate.keep_best is None:
            raise ValueError("evaluate.stop_after: what has to gain is not said; set evaluate.keep_best, to mean")
        if evaluate.keep_best is None:
            return self
        if evaluate.every_steps is None:
            raise ValueError("evaluate.keep_best: only the last step is scored, and so the best; set every_steps")
        names = [*watched, "mean", *["loss"] * (HELD_OUT in watched)]
        if evaluate.keep_best not in names:
            told = f"evaluate.keep_best = {SHORT.repr(evaluate.keep_best)}: it is not scored while the run trains"
            raise ValueError(f"{told} ({', '.join(names)} are); add it to evaluate.during")
        return self

    @property
    def watched(self) -> tuple[str, ...]:
        """Tasks that are scored while the run trains."""
        evaluate = self.evaluate
        held_out = (HELD_OUT,) if self.data.hold_out is not None else ()
        return tuple(dict.fromkeys(evaluate.during or held_out or (evaluate.tasks if evaluate.every_steps else ())))

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name

    @property
    def corpora_dir(self) -> str:
        """A path or URI."""
        return self._cache_dir(self.data.cache_dir, "corpora")

    @property
    def guide_cache_dir(self) -> str:
        """A path or URI."""
        return self._cache_dir(self.guide.cache_dir if self.guide else None, "guide_cache")

    @property
    def guide_mode(self) -> Literal["online", "cache", "self"] | None:
        """None without a guide."""
        return self.guide.mode if self.guide else None

    @property
    def guide_refresh(self) -> int | None:
        """Steps between renewals of the guide; None where it stays, or there is none."""
        return self.guide.refresh if self.guide else None

    @property
    def has_guide_model(self) -> bool:
        """Whether a model besides the student identifies false negatives: not without a guide, nor in mode self."""
        return self.guide_mode not in (None, "self")

    @property
    def guide_or_student(self) -> GuideConfig:
        """The guide model that training starts with, where there is one: with refresh and no model, the untrained
        student."""
        assert self.guide is not None and self.has_guide_model
        if self.guide.model:
            return self.guide
        student = self.student
        same = ("model", "revision", "max_tokens", "prompts", "precision", "trust_remote_code")
        return self.guide.model_copy(update={key: getattr(student, key) for key in same})

    @property
    def prompts_to_keep(self) -> RolePrompts:
        """The saved model's prompts of queries and documents: what all sources set alike, else the student's own."""
        of_sources = {source.prompts.student or self.student.prompts for source in self.data.sources}
        return of_sources.pop() if len(of_sources) == 1 else self.student.prompts

    def _cache_dir(self, folder: str | None, default: str) -> str:
        if folder and "://" in folder:
            return folder.rstrip("/")
        return str(Path(folder or Path(self.output_dir) / default).expanduser().absolute())

    def absolute_paths(self) -> "RunConfig":
        """The same recipe for a process with another working directory (a Ray worker)."""
        return with_paths(self, _absolute)


def _absolute(place: Place, path: str) -> str:
    if "://" in path or place in (Place.DATA, Place.NODE):
        return path
    found = Path(path).expanduser()
    return path if place is Place.MODEL and not found.exists() else str(found.absolute())


def paths_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Place, str]]:
    """Key, kind and value of every path that is set: ("guide.cache_dir", Place.WRITTEN, "/shared")."""
    for name, value in section:
        place = _place_of(type(section).model_fields[name])
        if place and value:
            yield f"{prefix}{name}", place, value
        elif isinstance(value, Section):
            yield from paths_of(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if isinstance(item, Section):
                    yield from paths_of(item, f"{prefix}{name}[{number}].")


def with_paths(section: SectionType, change: Callable[[Place, str], str]) -> SectionType:
    """A copy in which every path that is set is what change() makes of it."""

    def changed(value: Any, place: Place | None) -> Any:
        if place and value:
            return change(place, value)
        if isinstance(value, Section):
            return with_paths(value, change)
        return tuple(changed(item, None) for item in value) if isinstance(value, tuple) else value

    fields = type(section).model_fields
    copied = {name: changed(value, _place_of(fields[name])) for name, value in section}
    return section.model_copy(update={name: copied[name] for name, value in section if copied[name] != value})


def _place_of(field: FieldInfo) -> Place | None:
    """The Place that marks the field's type, or one part of it."""

    def marks(annotation: Any) -> Iterator[Any]:
        yield from getattr(annotation, "__metadata__", ())
        for part in get_args(annotation):
            yield from marks(part)

    return next((mark for mark in (*field.metadata, *marks(field.annotation)) if isinstance(mark, Place)), None)


# May differ when a run goes on: where and how it runs, not what it computes. The batch keys are budgets of memory.
CHANGEABLE: dict[str, Any] = {
    "output_dir": True,
    "cluster": True,
    "evaluate": True,
    "checkpoint": True,
    "tracking": True,
    "guide": {"cache_dir"},
    "data": {"cache_dir": True, "root": True, "local_copy": True, "sources": {"__all__": {"license"}}},
    "batch": {"chunk_tokens", "chunk_start_tokens", "packing", "activation_gb", "loss_gb"},
    "optim": {"non_finite", "max_skipped"},
}


def computed_values(config: RunConfig) -> dict[str, Any]:
    """The values that decide what a run computes, as dotted keys."""
    return dict(flat(config.model_dump(mode="json", exclude=CHANGEABLE)))


def flat(tree: Any, separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, an empty dict being one, with their path as the name."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, separator, f"{prefix}{separator}{key}" if prefix else key)
    else:
        yield prefix, tree


READERS = ("load_recipe", "parse_config", "parse_section", "packaged_recipes")
"""Were here up to 0.1 and are recipe.py's, which needs this module first."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in READERS:
            return getattr(import_module("gist_dist.recipe"), name)
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
