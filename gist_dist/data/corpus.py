"""Prepared rows on disk: every distinct text once, with the token ids of both models, memory-mapped.

<corpora>/<key>/texts.arrow    text, identity, student_ids, guide_ids
                rows.arrow     anchor, positive, negatives (text numbers), source, number
                manifest.json  what it was made from and what became of every row
"""

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gist_dist.config import ROLES, RolePrompts, RunConfig
from gist_dist.data.sources import Source, SourceReport, open_sources
from gist_dist.errors import UserError

if TYPE_CHECKING:
    from gist_dist.encoder import Encoder

logger = logging.getLogger(__name__)

FORMAT = 1
TEXTS_PER_BATCH = 2**14
PROGRESS_SECONDS = 5
Tokens = tuple[np.ndarray, np.ndarray]
"""Token ids of all texts, joined, and the number of tokens of each."""

TEXT_SCHEMA = pa.schema(
    {
        "text": pa.large_string(),
        "identity": pa.int64(),
        "student_ids": pa.large_list(pa.int32()),
        "guide_ids": pa.large_list(pa.int32()),
    }
)
ROW_SCHEMA = pa.schema(
    {
        "anchor": pa.int64(),
        "positive": pa.int64(),
        "negatives": pa.large_list(pa.int64()),
        "source": pa.int32(),
        "number": pa.int64(),
    }
)


class Corpus:
    """A prepared folder, opened. Row and text numbers index everything here; token ids stay on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            texts, rows = _map_batches(folder / "texts.arrow"), _map_batches(folder / "rows.arrow")
        except (OSError, ValueError) as error:  # Arrow's and JSON's are ValueErrors
            raise UserError(f"{folder} is damaged ({error}); remove it, and it is prepared again") from error
        self._texts, self._texts_per_batch = texts, texts[0].num_rows
        self.identity = _column(texts, "identity")
        self.student_lengths = _lengths(texts, "student_ids")
        self.guide_lengths = _lengths(texts, "guide_ids")
        self.anchors, self.positives = _column(rows, "anchor"), _column(rows, "positive")
        self.source, self.number = _column(rows, "source"), _column(rows, "number")
        self._negatives = _column(rows, "negatives", flat=True)
        self._negative_ends = np.cumsum(_lengths(rows, "negatives"), dtype=np.int64)

    @property
    def num_rows(self) -> int:
        return len(self.anchors)

    @property
    def num_texts(self) -> int:
        return len(self.identity)

    @property
    def source_names(self) -> list[str]:
        return [source["name"] for source in self.manifest["sources"]]

    @cached_property
    def num_negatives(self) -> np.ndarray:
        return np.diff(self._negative_ends, prepend=0)

    def negatives_of(self, rows: np.ndarray) -> np.ndarray:
        """Text numbers of the hard negatives of all these rows, joined."""
        counts = self.num_negatives[rows]
        starts = self._negative_ends[rows] - counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._negatives[np.repeat(starts, counts) + within]

    def text(self, text: int) -> str:
        batch, row = divmod(text, self._texts_per_batch)
        return self._texts[batch].column("text")[row].as_py()

    def student_tokens(self, texts: np.ndarray) -> list[np.ndarray]:
        return [self._tokens("student_ids", text) for text in texts.tolist()]

    def guide_tokens(self, texts: np.ndarray) -> list[np.ndarray]:
        return [self._tokens("guide_ids", text) for text in texts.tolist()]

    def _tokens(self, column: str, text: int) -> np.ndarray:
        batch, row = divmod(text, self._texts_per_batch)
        offsets, values = self._ragged[column][batch]
        return values[offsets[row] : offsets[row + 1]]

    @cached_property
    def _ragged(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        views = {}
        for name in ("student_ids", "guide_ids"):
            columns = [batch.column(name) for batch in self._texts]
            views[name] = [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]
        return views


@dataclass
class _Interner:
    """Text numbers by content: equal text under equal prompts is one text."""

    numbers: dict[bytes, int] = field(default_factory=dict)
    pending: list[tuple[str, str, str]] = field(default_factory=list)
    """New since the last batch was written: student prompt, guide prompt, text."""

    def number(self, student_prompt: str, guide_prompt: str, text: str) -> int:
        content = "\x00".join((student_prompt, guide_prompt, text)).encode()
        key = hashlib.blake2b(content, digest_size=16).digest()
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.numbers)
            self.pending.append((student_prompt, guide_prompt, text))
        return number


def prepare(
    config: RunConfig,
    student: "Encoder",
    guide: "Encoder | None",
    progress: Callable[[str], None] = logger.info,
) -> Corpus:
    """Read, check and tokenize all sources, or open what an equal recipe has prepared before.

    UserError for sources that can't be read and for a global batch larger than the usable rows.
    """
    sources = open_sources(config.data)
    inputs = _inputs(config, sources, student, guide)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]
    folder = config.corpora_dir / key
    if not (folder / "manifest.json").exists():
        _build(folder, config, sources, student, guide, inputs, progress)
    corpus = Corpus(folder)
    for source in corpus.manifest["sources"]:
        if source["dropped"]:
            progress(f"{source['name']}: dropped {_report(source).complaint()}")
    if config.batch.global_size > corpus.num_rows:
        raise UserError(
            f"batch.global_size = {config.batch.global_size}: the data has only {corpus.num_rows} usable rows; "
            "lower it or add data"
        )
    return corpus


def _report(source: dict[str, Any]) -> SourceReport:
    return SourceReport(**{name: source[name] for name in SourceReport.__dataclass_fields__})


def _inputs(config: RunConfig, sources: list[Source], student: "Encoder", guide: "Encoder | None") -> dict[str, Any]:
    """All that the prepared corpus depends on; its hash names the folder."""
    return {
        "format": FORMAT,
        "sources": [
            {"files": source.fingerprint(), "recipe": source.config.model_dump(mode="json", exclude={"weight"})}
            for source in sources
        ],
        "student": {"tokens": student.fingerprint(), "prompts": config.student.prompts.model_dump()},
        "guide": {"tokens": guide.fingerprint(), "prompts": config.guide.prompts.model_dump()} if guide else None,
        "unusable_rows": config.data.unusable_rows,
    }


def _build(
    folder: Path,
    config: RunConfig,
    sources: list[Source],
    student: "Encoder",
    guide: "Encoder | None",
    inputs: dict[str, Any],
    progress: Callable[[str], None],
) -> None:
    """Written aside and renamed when complete: a killed run leaves nothing that looks prepared."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        try:
            aside.mkdir(parents=True)
            manifest = _write(aside, config, sources, student, guide, progress)
            manifest["inputs"] = inputs
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: the prepared corpus can't be written there: {error}") from error


def _rename(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / "manifest.json").exists():  # else another run was first, with the same content
            raise


def _write(
    folder: Path,
    config: RunConfig,
    sources: list[Source],
    student: "Encoder",
    guide: "Encoder | None",
    progress: Callable[[str], None],
) -> dict[str, Any]:
    interner, num_rows = _Interner(), 0
    tokenizers = [encoder.fingerprint() for encoder in (student, guide) if encoder]
    same_tokenizer = tokenizers.count(tokenizers[0]) == 2
    content = hashlib.sha256(" ".join(tokenizers).encode())
    with (
        pa.OSFile(str(folder / "texts.arrow"), "wb") as text_sink,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as row_sink,
        pa.ipc.new_file(text_sink, TEXT_SCHEMA) as text_file,
        pa.ipc.new_file(row_sink, ROW_SCHEMA) as row_file,
    ):
        for number, source in enumerate(sources):
            started = shown = time.monotonic()
            prompts = _prompts(config, source)
            for rows in _numbered(source, prompts, interner):
                rows["source"] = np.full(len(rows["anchor"]), number, dtype=np.int32)
                batch = pa.record_batch(rows, schema=ROW_SCHEMA)
                row_file.write_batch(batch)
                num_rows += batch.num_rows
                _update(content, batch)
                while len(interner.pending) >= TEXTS_PER_BATCH:
                    text_file.write_batch(_tokenized(interner, student, guide, same_tokenizer))
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    progress(f"{source.report.name}: {source.report.rows_read:,} rows read")
            _refuse_unusable(source, config)
            seconds = time.monotonic() - started
            progress(f"{source.report.name}: {source.report.rows_used:,} rows in {seconds:.1f} s")
        while interner.pending:
            text_file.write_batch(_tokenized(interner, student, guide, same_tokenizer))
    for key in interner.numbers:
        content.update(key)
    return {
        "content": content.hexdigest(),  # what batches are a function of: not where the files lie
        "num_rows": num_rows,
        "num_texts": len(interner.numbers),
        "sources": [asdict(source.report) for source in sources],
    }


def _update(content: Any, rows: pa.RecordBatch) -> None:
    negatives = rows.column("negatives")
    for numbers in (*rows.columns[:2], negatives.offsets, negatives.values, rows.column("source")):
        content.update(numbers.to_numpy())


def _refuse_unusable(source: Source, config: RunConfig) -> None:
    report = source.report
    if not report.rows_read:
        raise UserError(f"{source.where}: {report.path} has no rows")
    if not report.rows_used:
        raise UserError(f"{source.where}: {report.path} has no usable row; {report.complaint()}")
    if report.dropped and config.data.unusable_rows == "error":
        raise UserError(f"{source.where}: unusable {report.complaint()}; mend them or set data.unusable_rows=drop")


def _prompts(config: RunConfig, source: Source) -> dict[str, tuple[str, str]]:
    """Role → prompt of the student, prompt of the guide."""
    student = source.config.prompts.student or config.student.prompts
    guide = source.config.prompts.guide or (config.guide.prompts if config.guide else RolePrompts())
    return {role: (getattr(student, role), getattr(guide, role)) for role in ROLES}


def _numbered(source: Source, prompts: dict[str, tuple[str, str]], interner: _Interner) -> Iterator[dict[str, Any]]:
    """The source's rows in batches, texts replaced by their numbers."""
    rows = source.rows()
    while True:
        anchors, positives, negatives, numbers = [], [], [], []
        for row in rows:
            anchors.append(interner.number(*prompts["anchor"], row.anchor))
            positives.append(interner.number(*prompts["positive"], row.positive))
            negatives.append([interner.number(*prompts["negatives"], text) for text in row.negatives])
            numbers.append(row.number)
            if len(anchors) == TEXTS_PER_BATCH:
                break
        if not anchors:
            return
        yield {
            "anchor": np.array(anchors, dtype=np.int64),
            "positive": np.array(positives, dtype=np.int64),
            "negatives": pa.array(negatives, ROW_SCHEMA.field("negatives").type),
            "number": np.array(numbers, dtype=np.int64),
        }


def _tokenized(
    interner: _Interner, student: "Encoder", guide: "Encoder | None", same_tokenizer: bool
) -> pa.RecordBatch:
    """The next TEXTS_PER_BATCH new texts (fewer at the very end), with their token ids."""
    texts, interner.pending = interner.pending[:TEXTS_PER_BATCH], interner.pending[TEXTS_PER_BATCH:]
    for_student = [prompt + text for prompt, _, text in texts]
    for_guide = [prompt + text for _, prompt, text in texts]
    student_ids = _tokens(student, for_student, "student")
    if guide is None:
        guide_ids = np.empty(0, np.int32), np.zeros(len(texts), np.int32)
    elif same_tokenizer and for_guide == for_student:
        guide_ids = student_ids
    else:
        guide_ids = _tokens(guide, for_guide, "guide")
    columns = {
        "text": pa.array([text for _, _, text in texts], pa.large_string()),
        "identity": _identities(student_ids),
        "student_ids": _large_list(student_ids),
        "guide_ids": _large_list(guide_ids),
    }
    return pa.record_batch(columns, schema=TEXT_SCHEMA)


def _tokens(encoder: "Encoder", texts: list[str], section: str) -> Tokens:
    ids, lengths = encoder.tokenize(texts)
    if not lengths.all():
        text = texts[int(np.argmin(lengths))]
        raise UserError(
            f"{section}.model: its tokenizer makes no token of {text[:100]!r}; remove the rows with that text"
        )
    return ids, lengths


def _identities(tokens: Tokens) -> pa.Array:
    """Equal for equal token ids."""
    ids, lengths = tokens
    data, ends = ids.tobytes(), (np.cumsum(lengths, dtype=np.int64) * ids.itemsize).tolist()
    digests = (hashlib.blake2b(data[i:j], digest_size=8).digest() for i, j in zip([0, *ends], ends, strict=False))
    return pa.array(np.frombuffer(b"".join(digests), dtype="<i8"))


def _large_list(tokens: Tokens) -> pa.LargeListArray:
    ids, lengths = tokens
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(ids))


def _map_batches(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _column(batches: list[pa.RecordBatch], name: str, flat: bool = False) -> np.ndarray:
    columns = [batch.column(name) for batch in batches]
    return np.concatenate([(column.flatten() if flat else column).to_numpy() for column in columns])


def _lengths(batches: list[pa.RecordBatch], name: str) -> np.ndarray:
    return np.concatenate([np.diff(batch.column(name).offsets.to_numpy()) for batch in batches]).astype(np.int32)
