"""Training rows out of parquet, jsonl, csv, arrow and Hub datasets: files found, columns mapped, rows checked."""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from gist_dist.config import DataConfig, SourceConfig
from gist_dist.errors import UserError
from gist_dist.hub import go_offline_if_unreachable

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
}
LIST_KINDS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
TEXT_KINDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev", "eval"}
COMPRESSED = (".gz", ".bz2", ".zst")
BATCH_ROWS = 8192
SHOWN_DROPS = 5


@dataclass(frozen=True)
class Row:
    """One training example: raw texts, without prompts."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    number: int
    """Of the row within its source, from 0."""


@dataclass
class SourceReport:
    """What became of a source's rows."""

    name: str
    path: str
    rows_read: int = 0
    rows_used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason → number of rows."""
    first_dropped: list[str] = field(default_factory=list)
    """Where the first of them are: file, row within the file (from 0) and reason."""

    def drop(self, where: str, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.first_dropped) < SHOWN_DROPS:
            self.first_dropped.append(f"{where}: {reason}")

    def complaint(self) -> str:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.items())
        total = f"{sum(self.dropped.values()):,} of {self.rows_read:,} rows"
        return f"{total}: {reasons}; the first (counting from 0): {self.first_dropped[0]}"


class Source:
    """One of data.sources: its files, found and opened once, and its rows."""

    def __init__(self, config: SourceConfig, number: int, root: str | None) -> None:
        self.config = config
        self.where = f"data.sources[{number}]"
        self.report = SourceReport(config.label, config.path)
        self.hub = None
        self.files = _find_files(config, self.where, root)
        if not self.files:
            self.hub = _load_hub(config, self.where)
        self.columns = self._map_columns()

    def fingerprint(self) -> list[list[Any]]:
        """Changes whenever what would be read may have changed."""
        if self.hub is not None:
            return [[self.config.path, self.hub._fingerprint]]
        infos = (file.filesystem.get_file_info(file.path) for file in self.files)
        return [[file.path, info.size, info.mtime_ns] for file, info in zip(self.files, infos, strict=True)]

    def rows(self) -> Iterator[Row]:
        """Every usable row, in order; the others are counted in ``report`` with their reasons."""
        self.report = SourceReport(self.config.label, self.config.path)
        number = 0
        for name, first, records in self._batches():
            for in_file, (anchor, positive, negatives) in enumerate(records, start=first):
                if number == self.config.max_rows:
                    return
                self.report.rows_read += 1
                if reason := _complaint(anchor, positive, negatives):
                    self.report.drop(f"{name} row {in_file}", reason)
                else:
                    self.report.rows_used += 1
                    yield Row(anchor, positive, negatives, number)
                number += 1

    def _batches(self) -> Iterator[tuple[str, int, Iterable[tuple[Any, Any, tuple[Any, ...]]]]]:
        """(file name, number of its first row, (anchor, positive, negatives) of each row)."""
        wanted = [self.columns["anchor"], self.columns["positive"], *self.columns["negatives"]]
        if self.hub is not None:
            with _reading(f"{self.where}: {self.config.path}"):
                rows = self.hub.select_columns(list(dict.fromkeys(wanted)))
                for start in range(0, len(rows), BATCH_ROWS):
                    batch = rows[start : start + BATCH_ROWS]
                    yield self.config.path, start, _records([batch[name] for name in wanted])
        for file in self.files:
            first = 0
            for columns in file.read(wanted, self.where):
                yield file.name, first, _records(columns)
                first += len(columns[0])

    def _map_columns(self) -> dict[str, Any]:
        """Role → column, checked against what the source has."""
        columns = self.config.columns
        negatives = columns.negatives
        for name, has in self._schemas():
            if negatives is None:
                negatives = next(((n,) for n in ("negatives", "negative") if n in has), ())
            roles = [("anchor", columns.anchor), ("positive", columns.positive), *(("negatives", n) for n in negatives)]
            for role, column in roles:
                if column not in has:
                    listed = ", ".join(f"'{n}'" for n in has) or "none"
                    raise UserError(
                        f"{self.where}: column '{column}' not in {name} (has: {listed}); set columns.{role}"
                    )
                kind = has[column]
                if kind is not None and not _may_hold_text(kind, or_lists=role == "negatives"):
                    raise UserError(
                        f"{self.where}: column '{column}' of {name} holds {kind}, not text; set columns.{role}"
                    )
        return {"anchor": columns.anchor, "positive": columns.positive, "negatives": negatives or ()}

    def _schemas(self) -> Iterator[tuple[str, dict[str, pa.DataType | None]]]:
        if self.hub is not None:
            schema = self.hub.features.arrow_schema
            yield self.config.path, {f.name: f.type for f in schema}
        for file in self.files:
            yield file.name, file.schema(self.where)


def open_sources(config: DataConfig) -> list[Source]:
    """UserError for the first source that is missing, of no known format, or without its columns."""
    return [Source(source, number, config.root) for number, source in enumerate(config.sources)]


@dataclass(frozen=True)
class SourceFile:
    filesystem: pa.fs.FileSystem
    path: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def format(self) -> str | None:
        return FORMATS.get(_suffix(self.name))

    def schema(self, where: str) -> dict[str, pa.DataType | None]:
        """Column → type; None where the format has no types."""
        with _reading(f"{where}: {self.path}"):
            if self.format == "jsonl":
                first_records = islice(self._json_records(where), 1000)
                return dict.fromkeys(name for record in first_records for name in record)
            if self.format == "csv":
                return dict.fromkeys(self._open_csv([]).schema.names)
            if self.format == "parquet":
                schema = pa.parquet.read_schema(self.filesystem.open_input_file(self.path))
            else:
                schema = self._open_arrow().schema
            return {field.name: field.type for field in schema}

    def read(self, wanted: list[str], where: str) -> Iterator[list[list[Any]]]:
        """Batches of the wanted columns, as Python values."""
        with _reading(f"{where}: {self.path}"):
            if self.format == "jsonl":
                records = self._json_records(where)
                while batch := list(islice(records, BATCH_ROWS)):
                    yield [[record.get(name) for record in batch] for name in wanted]
                return
            if self.format == "parquet":
                file = pa.parquet.ParquetFile(self.filesystem.open_input_file(self.path))
                batches = file.iter_batches(batch_size=BATCH_ROWS, columns=list(dict.fromkeys(wanted)))
            elif self.format == "csv":
                batches = self._open_csv(wanted)
            else:
                batches = self._open_arrow()
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    yield [part.column(name).to_pylist() for name in wanted]

    def _json_records(self, where: str) -> Iterator[dict[str, Any]]:
        """Of one object a line, or of a .json file that holds a list of objects."""
        with self.filesystem.open_input_stream(self.path, compression="detect") as stream:
            lines, is_list = _lines(stream), False
            if _suffix(self.name) == ".json":
                content = stream.read()
                is_list = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
                lines = [content] if is_list else content.split(b"\n")
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                value = self._json_value(line, number, where)
                for record in value if is_list else [value]:
                    if not isinstance(record, dict):
                        kind = type(record).__name__
                        raise UserError(f"{where}: {self.name} line {number} holds a JSON {kind}, not an object")
                    yield record

    def _json_value(self, line: bytes, number: int, where: str) -> Any:
        try:
            return json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{where}: {self.name} line {number} is not UTF-8 text; convert the file") from None
        except json.JSONDecodeError as error:
            number += error.lineno - 1
            raise UserError(
                f"{where}: {self.name} line {number} is not JSON ({error.msg}); mend or remove it"
            ) from None
        except (ValueError, RecursionError) as error:  # digits without end, brackets without end
            reason = str(error).split(";")[0]
            raise UserError(f"{where}: {self.name} line {number} can't be read ({reason}); remove it") from None

    def _open_csv(self, wanted: list[str]) -> pa.csv.CSVStreamingReader:
        """With the wanted columns, or all if none are."""
        stream = self.filesystem.open_input_stream(self.path, compression="detect")
        return pa.csv.open_csv(
            stream,
            # Without threads, errors name the row.
            read_options=pa.csv.ReadOptions(block_size=16 * 2**20, use_threads=False),
            parse_options=pa.csv.ParseOptions(
                newlines_in_values=True, delimiter="\t" if _suffix(self.name) == ".tsv" else ","
            ),
            convert_options=pa.csv.ConvertOptions(
                # Text stays text: "1984" is a title, "NA" a word. An empty cell is no negative.
                column_types=dict.fromkeys(wanted, pa.string()),
                include_columns=list(dict.fromkeys(wanted)),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )

    def _open_arrow(self) -> Any:
        """A file as pyarrow writes it, or a stream as datasets keeps it."""
        try:
            return _IpcBatches(pa.ipc.open_file(self.filesystem.open_input_file(self.path)))
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(self.filesystem.open_input_stream(self.path))


class _IpcBatches:
    """The batches of an Arrow file, one at a time, as a stream reader gives them."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader) -> None:
        self.reader, self.schema = reader, reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self.reader.get_batch(i) for i in range(self.reader.num_record_batches))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns what Arrow says of a damaged file into a sentence that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text; convert it") from error
    except (pa.ArrowException, OSError, KeyError) as error:
        if "invalid utf8" in str(error).lower():
            raise UserError(f"{what} is not UTF-8 text; convert it") from error
        raise UserError(f"{what} can't be read: {_reason(error)}") from error


def _find_files(config: SourceConfig, where: str, root: str | None) -> list[SourceFile]:
    """The files of a source, sorted; none if it is a Hub dataset."""
    if "://" in config.path:
        try:
            filesystem, path = pa.fs.FileSystem.from_uri(config.path)
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise UserError(f"{where}: {config.path} can't be opened: {_reason(error)}") from None
        return _list_files(filesystem, path, config, where)
    path = Path(root or ".").expanduser() / Path(config.path).expanduser()
    local = pa.fs.LocalFileSystem()
    if path.exists():
        return _list_files(local, str(path.absolute()), config, where)
    if glob.has_magic(config.path):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"{where}: no file matches {path}")
        return [_one_file(local, str(Path(p).absolute()), config, where) for p in found]
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", config.path) and _suffix(config.path) not in FORMATS
    if root is None and is_hub_id:
        return []
    raise UserError(f"{where}: no file or folder {path}; correct path, or data.root if it is elsewhere")


def _list_files(filesystem: pa.fs.FileSystem, path: str, config: SourceConfig, where: str) -> list[SourceFile]:
    try:
        info = filesystem.get_file_info(path)
        if info.type == pa.fs.FileType.NotFound:
            raise UserError(f"{where}: no file or folder {config.path}")
        if info.type == pa.fs.FileType.File:
            return [_one_file(filesystem, path, config, where)]
        listed = filesystem.get_file_info(pa.fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise UserError(f"{where}: {config.path} can't be listed: {_reason(error)}") from None
    files = [SourceFile(filesystem, i.path) for i in listed if i.type == pa.fs.FileType.File]
    files = sorted((f for f in files if f.format and _is_data(_within(f, path))), key=lambda f: f.path)
    if not files:
        raise UserError(f"{where}: no {', '.join(sorted(set(FORMATS.values())))} file in folder {config.path}")
    splits = sorted({_split_of(f, path) for f in files})
    split = config.split or ("train" if {"train"} < set(splits) <= SPLIT_NAMES else None)
    if split and split not in splits:
        raise UserError(f"{where}: no split '{split}' in {config.path} (has: {', '.join(splits)})")
    return [f for f in files if split is None or _split_of(f, path) == split]


def _within(file: "SourceFile", folder: str) -> list[str]:
    return file.path[len(folder) :].lstrip("/").split("/")


def _is_data(parts: list[str]) -> bool:
    """Not hidden, and not one of the descriptions that datasets.save_to_disk puts beside the data."""
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and parts[-1] not in ("dataset_info.json", "state.json", "dataset_dict.json")


def _split_of(file: SourceFile, folder: str) -> str:
    """data/train-00000.parquet, train/part-0.parquet and train.jsonl are all of split train."""
    first, *rest = _within(file, folder)
    name = first if rest and first != "data" else file.name
    return re.split(r"[-.]|_\d", name)[0]


def _one_file(filesystem: pa.fs.FileSystem, path: str, config: SourceConfig, where: str) -> SourceFile:
    file = SourceFile(filesystem, path)
    if file.format is None:
        raise UserError(f"{where}: {file.name} is of no known format (known: {', '.join(FORMATS)})")
    if config.split is not None:
        raise UserError(f"{where}: split = {config.split}: {file.name} is one file and has no splits; remove split")
    return file


def _load_hub(config: SourceConfig, where: str) -> Any:
    offline = go_offline_if_unreachable()
    import datasets

    try:
        split = config.split or "train"
        if not offline:  # before everything is downloaded
            splits = datasets.get_dataset_split_names(config.path, config.subset, revision=config.revision)
            if split not in splits:
                raise UserError(f"{where}: no split '{split}' in {config.path} (has: {', '.join(splits)})")
        return datasets.load_dataset(config.path, config.subset, split=split, revision=config.revision)
    except UserError:
        raise
    except Exception as error:
        is_away = offline and not isinstance(error, ValueError)  # those speak of the cached copy
        reason = "the Hub is out of reach and its cache hasn't it" if is_away else _reason(error)
        raise UserError(
            f"{where}: '{config.path}' is no file here, and can't be had as a Hub dataset: {reason}"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _may_hold_text(kind: pa.DataType, or_lists: bool = False) -> bool:
    is_list = or_lists and any(is_kind(kind) for is_kind in LIST_KINDS)
    if is_list or pa.types.is_dictionary(kind):
        return _may_hold_text(kind.value_type)
    return any(is_kind(kind) for is_kind in TEXT_KINDS)


def _records(columns: list[list[Any]]) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Rows out of columns; the cells of negatives are texts, lists of texts or null."""
    for anchor, positive, *cells in zip(*columns, strict=True):
        negatives = chain.from_iterable(cell if isinstance(cell, list) else (cell,) for cell in cells)
        yield anchor, positive, tuple(text for text in negatives if text is not None)


def _complaint(anchor: Any, positive: Any, negatives: tuple[Any, ...]) -> str:
    """Why a row can't be used; empty if it can."""
    for role, text in (("anchor", anchor), ("positive", positive), *(("negative", text) for text in negatives)):
        if text is None:
            return f"{role} is missing"
        if not isinstance(text, str):
            return f"{role} is {type(text).__name__}, not text"
        if not text or text.isspace():
            return f"{role} is empty"
        if not text.isascii() and not _is_unicode(text):
            return f"{role} has a lone surrogate, which is no character"
    return ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(stream: pa.NativeFile) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(4 * 2**20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest
