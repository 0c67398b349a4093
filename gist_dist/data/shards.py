"""The parallel half of preparing: one part of a source is read, tokenized and written as shards of texts and rows.

part-00007.json                 the commit of part 7: its shards with the SHA-256 of every file, and its report
texts-<sha256>.arrow            text, token ids of both models: each text once in the shard; stays as it is
index-<sha256>.arrow            what merging needs of the texts that some row uses, in the order of their first use
rows-<sha256>.arrow             the rows, their texts numbered as in the index

Names tell contents, so that two runs that prepare the same part write the same files, in any order.
"""

import hashlib
import time
from array import array
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gist_dist.common.files import sealed, unsealed
from gist_dist.common.storage import Store, open_store, sha256
from gist_dist.data.sources import Part, Row, Source, SourceReport
from gist_dist.models.tokenizer import TextTokenizer, as_lists, token_keys

MANIFEST = "manifest.json"
"""The finished corpus's list of its files."""
SHARD_TEXTS = 2**17
"""A shard is closed with so many distinct texts: what a part keeps in memory is about 150 bytes for each of them,"""
SHARD_REFERENCES = 2**20
"""or with so many anchors, positives and negatives, at 4 bytes each."""
BATCH_TEXTS, BATCH_CHARACTERS = 2**13, 2**23
"""Tokenized and written together, whichever is reached first."""
TICK_SECONDS = 1.0

TEXT_SCHEMA = pa.schema(
    {"text": pa.large_string(), "student_ids": pa.large_list(pa.int32()), "guide_ids": pa.large_list(pa.int32())}
)
INDEX_SCHEMA = pa.schema(
    {
        "key": pa.list_(pa.uint64(), 2),  # of prompts and text
        "at": pa.int32(),  # position in the texts file
        "identity": pa.int64(),
        "guide_key": pa.list_(pa.uint64(), 2),
        "student_length": pa.int32(),
        "guide_length": pa.int32(),
    }
)
ROW_SCHEMA = pa.schema(
    {
        "anchor": pa.int32(),
        "positive": pa.int32(),
        "further": pa.large_list(pa.int32()),  # positives beside the first
        "negatives": pa.large_list(pa.int32()),
        "number": pa.int64(),  # within the part
        "group": pa.int32(),  # of the commit's groups
    }
)
ANCHOR, POSITIVE, FURTHER, NEGATIVE = range(4)
"""What a text is in a row."""
ROLE_NAMES = ("anchor", "positive", "positive", "negative")
USABLE, UNKNOWN, EMPTY = range(3)
REASONS = {UNKNOWN: "has no token that the student knows", EMPTY: "has no token of the guide"}


@dataclass(frozen=True)
class Shard:
    """Files of one shard, by what they hold."""

    texts: str
    index: str
    rows: str
    batches: list[int]
    """Texts of every record batch of the texts file."""


@dataclass
class Commit:
    """What became of one part; it is written when all its files are."""

    part: list[Any]
    """One of the job's parts: source number and what it reads. Another version may cut sources into other parts."""
    report: dict[str, Any] = field(default_factory=dict)
    """A SourceReport."""
    groups: dict[str, int] = field(default_factory=dict)
    """Values of split_by (empty where the source has none) → their numbers in the rows of this part."""
    shards: list[Shard] = field(default_factory=list)
    files: dict[str, list[Any]] = field(default_factory=dict)
    """Name → SHA-256 and bytes."""

    @classmethod
    def parse(cls, content: bytes) -> "Commit":
        """ValueError for anything else, TypeError or KeyError for one of another version."""
        tree = unsealed(content)
        return cls(**{**tree, "shards": [Shard(**shard) for shard in tree["shards"]]})


@dataclass(frozen=True)
class Prompts:
    """One source's prompts: role → prompt of the student, prompt of the guide."""

    anchor: tuple[str, str]
    positive: tuple[str, str]
    negatives: tuple[str, str]


@dataclass(frozen=True)
class Job:
    """All that preparing any part needs; it pickles."""

    place: str
    """Where the corpus is made: a path or URI."""
    sources: list[Source]
    prompts: list[Prompts]
    """The prompts of every source."""
    parts: list[tuple[int, Part]]
    """Source number and part, in the order of the corpus."""
    student: TextTokenizer
    guide: TextTokenizer | None

    def run(self, number: int) -> Iterator[int | Commit | None]:
        """Prepare one part: yields how many of its rows are read, about every second, and its commit at last.

        A part that was committed before is checked and given back as it is. None in place of a commit: another run has
        finished the whole corpus. UserError for a source that can't be read, OSError where nothing can be written.
        """
        store = open_store(self.place)
        if store.exists(MANIFEST):
            yield None
            return
        if (commit := self._committed(number, store)) is None:
            with store.scratch() as folder:
                commit = yield from self._write(number, store, folder)
            store.write_bytes(commit_name(number), sealed(asdict(commit)))
        yield commit

    def _part(self, number: int) -> list[Any]:
        source, part = self.parts[number]
        return [source, [list(part.files), part.start, part.num_rows]]

    def _committed(self, number: int, store: Store) -> Commit | None:
        """The commit of a part whose files are all there and intact."""
        try:
            commit = Commit.parse(store.read_bytes(commit_name(number)))
            intact = all(store.sha256(file) == digest for file, (digest, _) in commit.files.items())
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return commit if intact and commit.part == self._part(number) else None

    def _write(self, number: int, store: Store, folder: Path) -> Generator[int, None, Commit]:
        of, part = self.parts[number]
        source = self.sources[of]
        report = source.new_report()
        commit = Commit(self._part(number))
        ticked, shard = time.monotonic(), None
        for row in source.rows(part, report):
            shard = shard or _OpenShard(self, number, folder, commit, report)
            shard.add(row)
            if shard.is_full:
                shard.close(store)
                shard = None
            if time.monotonic() - ticked > TICK_SECONDS:
                ticked = time.monotonic()
                yield report.rows_read
        if shard:
            shard.close(store)
        commit.report = asdict(report)
        return commit


def commit_name(number: int) -> str:
    return f"part-{number:05d}.json"


class _OpenShard:
    """A shard that is being written. It keeps the texts' keys and the rows in memory, and the texts of one batch."""

    def __init__(self, job: Job, part: int, folder: Path, commit: Commit, report: SourceReport) -> None:
        self.job, self.folder, self.commit, self.report = job, folder, commit, report
        self.number = part
        self.source, self.part = job.sources[job.parts[part][0]], job.parts[part][1]
        self.prompts = job.prompts[job.parts[part][0]]
        self.numbers: dict[bytes, int] = {}
        self.pending: list[tuple[str, str, str]] = []
        """Texts of the next batch: student prompt, guide prompt, text."""
        self.pending_characters = 0
        self.references, self.counts = array("i"), array("i")
        """Texts of all rows, joined (anchor, positive, further positives, negatives), and how many each row has."""
        self.further_counts = array("i")
        """Further positives among them."""
        self.row_numbers, self.groups = array("q"), list[str]()
        self.labels = array("q")
        """A number for every row, equal for those of one label of the source, 0 for none."""
        self.batches: list[int] = []
        self.columns: list[dict[str, np.ndarray]] = []
        """For every batch, what becomes the index, and what is wrong with the texts."""
        self.path = folder / "texts.arrow"
        self.writer = pa.ipc.new_file(str(self.path), TEXT_SCHEMA)

    @property
    def is_full(self) -> bool:
        return len(self.numbers) >= SHARD_TEXTS or len(self.references) >= SHARD_REFERENCES

    def add(self, row: Row) -> None:
        self.references.append(self._number(self.prompts.anchor, row.anchor))
        self.references.append(self._number(self.prompts.positive, row.positive))
        self.references.extend([self._number(self.prompts.positive, text) for text in row.further])
        self.references.extend([self._number(self.prompts.negatives, text) for text in row.negatives])
        self.counts.append(2 + len(row.further) + len(row.negatives))
        self.further_counts.append(len(row.further))
        self.row_numbers.append(row.number)
        self.groups.append(row.group or "")
        self.labels.append(_label_key(self.job.parts[self.number][0], row.label))
        if len(self.pending) >= BATCH_TEXTS or self.pending_characters >= BATCH_CHARACTERS:
            self._write_batch()

    def close(self, store: Store) -> None:
        """Write index and rows, and enter the shard's files in the commit; nothing is left of a shard without rows."""
        if self.pending:
            self._write_batch()
        self.writer.close()
        index, rows = self._index_and_rows()
        if not rows.num_rows:
            return
        written = [_write_arrow(self.folder / name, batch) for name, batch in (("index", index), ("rows", rows))]
        files = [name_by_content(self.path), *written]
        texts_name, index_name, rows_name = (path.name for path, _ in files)
        for path, digest in files:
            store.upload(path, path.name)
            self.commit.files[path.name] = [digest, path.stat().st_size]
            path.unlink()
        self.commit.shards.append(Shard(texts_name, index_name, rows_name, self.batches))

    def _number(self, prompts: tuple[str, str], text: str) -> int:
        content = "\x00".join((*prompts, text)).encode()
        key = hashlib.blake2b(content, digest_size=16).digest()
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.numbers)
            self.pending.append((*prompts, text))
            self.pending_characters += len(text)
        return number

    def _write_batch(self) -> None:
        student_prompts, guide_prompts, texts = zip(*self.pending, strict=True)
        self.pending, self.pending_characters = [], 0
        student, guide = self.job.student, self.job.guide
        student_inputs = _joined(student_prompts, texts)
        student_tokens = student(student_inputs)
        keys = guide_keys = token_keys(student_tokens)
        if guide is None:
            guide_tokens = np.empty(0, np.int32), np.zeros(len(texts), np.int32)
            guide_keys = np.zeros_like(keys)
        elif guide.fingerprint == student.fingerprint and guide_prompts == student_prompts:
            guide_tokens = student_tokens
        else:
            guide_tokens = guide(_joined(guide_prompts, texts))
            guide_keys = token_keys(guide_tokens)
        state = np.where(student.knows(student_prompts, texts, student_tokens), USABLE, UNKNOWN)
        if guide:
            state[guide_tokens[1] == 0] = EMPTY
        columns = [pa.array(texts, pa.large_string()), as_lists(student_tokens), as_lists(guide_tokens)]
        self.writer.write_batch(pa.record_batch(columns, schema=TEXT_SCHEMA))
        self.batches.append(len(texts))
        self.columns.append(
            {
                "identity": keys[:, 0].view(np.int64),
                "guide_key": guide_keys,
                "student_length": student_tokens[1],
                "guide_length": guide_tokens[1],
                "state": state,
            }
        )

    def _index_and_rows(self) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Without the rows that can't be used, which are reported, and without the texts that only those have."""
        columns = {name: np.concatenate([batch[name] for batch in self.columns]) for name in self.columns[0]}
        references, counts = np.frombuffer(self.references, np.int32), np.frombuffer(self.counts, np.int32)
        row_of = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(references)) - np.repeat(np.cumsum(counts) - counts, counts)
        further_end = 2 + np.frombuffer(self.further_counts, np.int32)[row_of]
        role = np.where(place < 2, place, np.where(place < further_end, FURTHER, NEGATIVE))
        kept = self._report_unusable(columns.pop("state")[references], row_of, role)
        stays = kept[row_of] & ~_repeats(columns["identity"][references], row_of, role)
        references, role, row_of = references[stays], role[stays], row_of[stays]
        used, first, numbers = np.unique(references, return_index=True, return_inverse=True)
        order = np.argsort(first)
        numbers = np.argsort(order)[numbers].astype(np.int32)
        at = used[order]
        keys = np.frombuffer(b"".join(self.numbers), dtype="<u8").reshape(-1, 2)
        values = {"key": keys[at], "at": at, **{name: column[at] for name, column in columns.items()}}
        further, negatives = (
            _as_large_lists(numbers[role == some], row_of[role == some], kept) for some in (FURTHER, NEGATIVE)
        )
        known = self.commit.groups
        groups = [known.setdefault(self.groups[row], len(known)) for row in np.flatnonzero(kept).tolist()]
        row_numbers = np.frombuffer(self.row_numbers, np.int64)[kept]
        ends = [numbers[role == some] for some in (ANCHOR, POSITIVE)]
        rows = [*ends, further, negatives, row_numbers, np.array(groups, np.int32)]
        index = [_as_column(values[name]) for name in INDEX_SCHEMA.names]
        schema = ROW_SCHEMA
        if self.source.has_labels:
            rows.append(np.frombuffer(self.labels, np.int64)[kept])
            schema = schema.append(pa.field("label", pa.int64()))
        return pa.record_batch(index, INDEX_SCHEMA), pa.record_batch(list(map(pa.array, rows)), schema)

    def _report_unusable(self, state: np.ndarray, row_of: np.ndarray, role: np.ndarray) -> np.ndarray:
        """Which rows stay. state: what is wrong with the text of every reference."""
        kept = np.ones(len(self.counts), dtype=bool)
        for reference in np.flatnonzero(state).tolist():
            row = int(row_of[reference])
            if kept[row]:
                kept[row] = False
                reason = f"{ROLE_NAMES[role[reference]]} {REASONS[state[reference]]}"
                self.report.rows_used -= 1
                self.report.drop(self._where(self.row_numbers[row]), reason)
        return kept

    def _where(self, row: int) -> str:
        files = self.part.files
        if len(files) == 1:
            return f"{self.source.files[files[0]].name} row {self.part.start + row}"
        return f"{self.report.name} row {row}"


def _repeats(identity: np.ndarray, row_of: np.ndarray, role: np.ndarray) -> np.ndarray:
    """Further positives that the student can't tell from the row's anchor or from a positive before them."""
    has_several = np.zeros(int(row_of.max(initial=-1)) + 1, dtype=bool)
    has_several[row_of[role == FURTHER]] = True
    (chosen,) = np.nonzero((role < NEGATIVE) & has_several[row_of])
    first = np.zeros(len(role), dtype=bool)
    pairs = np.stack([row_of[chosen], identity[chosen]], axis=1)
    first[chosen[np.unique(pairs, axis=0, return_index=True)[1]]] = True
    return (role == FURTHER) & ~first


def _as_large_lists(values: np.ndarray, row_of: np.ndarray, kept: np.ndarray) -> pa.LargeListArray:
    """One list for each kept row."""
    ends = np.cumsum(np.bincount(row_of, minlength=len(kept))[kept], dtype=np.int64)
    return pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), pa.array(values))


def _label_key(source: int, label: str | None) -> int:
    if label is None:
        return 0
    digest = hashlib.blake2b(f"{source}\x00{label}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _joined(prompts: tuple[str, ...], texts: tuple[str, ...]) -> list[str]:
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def _as_column(values: np.ndarray) -> pa.Array:
    """A column of numbers, or of pairs of them."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write_arrow(path: Path, batch: pa.RecordBatch) -> tuple[Path, str]:
    path = path.with_suffix(".arrow")
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)
    return name_by_content(path)


def name_by_content(path: Path) -> tuple[Path, str]:
    """Renamed after its content: the path and the SHA-256."""
    digest = sha256(path)
    return path.rename(path.with_name(f"{path.stem}-{digest[:24]}{path.suffix}")), digest
