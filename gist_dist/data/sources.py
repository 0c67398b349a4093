"""Training rows out of parquet, jsonl, csv, arrow and Hub datasets: files found, columns mapped, rows checked."""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from gist_dist.config import DataConfig, SourceConfig
from gist_dist.errors import UserError

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
    """Where the first of them are: file, row and reason."""

    def drop(self, where: str, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.first_dropped) < SHOWN_DROPS:
            self.first_dropped.append(f"{where}: {reason}")

    def complaint(self) -> str:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.items())
        return f"{sum(self.dropped.values())} of {self.rows_read} rows: {reasons}; first: {self.first_dropped[0]}"


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
            for offset, values in enumerate(records):
                if number == self.config.max_rows:
                    return
                row, reason = self._check(values, number)
                self.report.rows_read += 1
                if row is None:
                    self.report.drop(f"{name} row {first + offset}", reason)
                else:
                    self.report.rows_used += 1
                    yield row
                number += 1

    def _check(self, values: tuple[Any, Any, list[Any]], number: int) -> tuple[Row | None, str]:
        anchor, positive, negatives = values
        for role, text in (("anchor", anchor), ("positive", positive), *(("negative", n) for n in negatives)):
            if text is None:
                return None, f"{role} is missing"
            if not isinstance(text, str):
                return None, f"{role} is {type(text).__name__}, not text"
            if not text.strip():
                return None, f"{role} is empty"
            if not _is_unicode(text):
                return None, f"{role} has a lone surrogate, which is no character"
        return Row(anchor, positive, tuple(negatives), number), ""

    def _batches(self) -> Iterator[tuple[str, int, Iterable[tuple[Any, Any, list[Any]]]]]:
        """(file name, number of its first row, (anchor, positive, negatives) of each row)."""
        wanted = [self.columns["anchor"], self.columns["positive"], *self.columns["negatives"]]
        if self.hub is not None:
            for start in range(0, len(self.hub), BATCH_ROWS):
                batch = self.hub[start : start + BATCH_ROWS]
                yield self.config.path, start, self._records([batch[name] for name in wanted])
            return
        for file in self.files:
            first = 0
            for columns in file.read(wanted, self.where):
                yield file.name, first, self._records(columns)
                first += len(columns[0])

    def _records(self, columns: list[list[Any]]) -> Iterator[tuple[Any, Any, list[Any]]]:
        for anchor, positive, *cells in zip(*columns, strict=True):
            negatives = []
            for cell in cells:
                if isinstance(cell, list | tuple):
                    negatives += cell
                elif cell is not None:
                    negatives.append(cell)
            yield anchor, positive, negatives

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
                if kind is not None and not _may_hold_text(kind, lists=role == "negatives"):
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
        with self._errors(where):
            if self.format == "parquet":
                schema = pa.parquet.read_schema(self.filesystem.open_input_file(self.path))
                return {f.name: f.type for f in schema}
            if self.format == "arrow":
                return {f.name: f.type for f in self._open_arrow().schema}
            if self.format == "csv":
                return dict.fromkeys(self._open_csv([]).schema.names)
            columns: dict[str, None] = {}
            for record in islice(self._json_records(where), 1000):
                columns |= dict.fromkeys(record)
            return columns

    def read(self, wanted: list[str], where: str) -> Iterator[list[list[Any]]]:
        """Batches of the wanted columns, as Python values."""
        with self._errors(where):
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
                    yield [_python_values(part.column(name)) for name in wanted]

    def _json_records(self, where: str) -> Iterator[dict[str, Any]]:
        with self.filesystem.open_input_stream(self.path, compression="detect") as stream:
            if self.name.split(".")[1:2] == ["json"]:
                yield from self._json_array(stream.read(), where)
                return
            for number, line in enumerate(_lines(stream), start=1):
                if line.strip():
                    yield self._json_object(line, f"line {number}", where)

    def _json_array(self, content: bytes, where: str) -> Iterator[dict[str, Any]]:
        try:
            values = json.loads(content)
        except json.JSONDecodeError:  # .json is also used for one object a line
            values = None
        except UnicodeDecodeError:
            raise UserError(f"{where}: {self.name} is not UTF-8 text; convert it") from None
        if values is None:
            for number, line in enumerate(content.splitlines(), start=1):
                if line.strip():
                    yield self._json_object(line, f"line {number}", where)
            return
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise UserError(f"{where}: {self.name} is neither a list of JSON objects nor one object a line")
        yield from values

    def _json_object(self, line: bytes, position: str, where: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{where}: {self.name} {position} is not UTF-8 text; convert the file") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {self.name} {position} is not JSON ({error.msg}); mend or remove it") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: {self.name} {position} is a JSON {type(value).__name__}, not an object")
        return value

    def _open_csv(self, wanted: list[str]) -> pa.csv.CSVStreamingReader:
        stream = self.filesystem.open_input_stream(self.path, compression="detect")
        return pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=16 * 2**20),
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
        try:
            reader = pa.ipc.open_file(self.filesystem.open_input_file(self.path))
            return _IpcBatches(reader)
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(self.filesystem.open_input_stream(self.path))

    def _errors(self, where: str) -> "_ReadErrors":
        return _ReadErrors(f"{where}: {self.path}")


class _IpcBatches:
    """The batches of an Arrow file, one at a time, as a stream reader gives them."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader) -> None:
        self.reader, self.schema = reader, reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self.reader.get_batch(i) for i in range(self.reader.num_record_batches))


class _ReadErrors:
    """Turns what Arrow says of a damaged file into a sentence that names the file."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pa.ArrowException | OSError) and not isinstance(error, UserError):
            reason = " ".join(str(error).split())[:300]
            if "invalid UTF8" in reason or "Invalid UTF8" in reason:
                reason = "it is not UTF-8 text; convert it"
            raise UserError(f"{self.what} can't be read: {reason}") from error


def _find_files(config: SourceConfig, where: str, root: str | None) -> list[SourceFile]:
    """The files of a source, sorted; none if it is a Hub dataset."""
    if "://" in config.path:
        try:
            filesystem, path = pa.fs.FileSystem.from_uri(config.path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{where}: {config.path} can't be opened: {' '.join(str(error).split())[:200]}") from None
        return _list_files(filesystem, path, config, where)
    path = Path(root or ".").expanduser() / Path(config.path).expanduser()
    local = pa.fs.LocalFileSystem()
    if glob.has_magic(config.path):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"{where}: no file matches {path}")
        return [_known(SourceFile(local, str(Path(p).absolute())), where) for p in found]
    if path.exists():
        return _list_files(local, str(path.absolute()), config, where)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path) and not _suffix(config.path) in FORMATS
    if root is None and is_hub_id and not config.path.startswith("."):
        return []
    raise UserError(f"{where}: no file or folder {path}; correct path, or data.root if it is elsewhere")


def _list_files(filesystem: pa.fs.FileSystem, path: str, config: SourceConfig, where: str) -> list[SourceFile]:
    try:
        info = filesystem.get_file_info(path)
        if info.type == pa.fs.FileType.NotFound:
            raise UserError(f"{where}: no file or folder {config.path}")
        if info.type == pa.fs.FileType.File:
            return [_known(SourceFile(filesystem, path), where)]
        listed = filesystem.get_file_info(pa.fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise UserError(f"{where}: {config.path} can't be listed: {' '.join(str(error).split())[:200]}") from None
    files = [SourceFile(filesystem, i.path) for i in listed if i.type == pa.fs.FileType.File]
    files = sorted((f for f in files if f.format and not f.name.startswith((".", "_"))), key=lambda f: f.path)
    files = [f for f in files if f.name not in ("dataset_info.json", "state.json", "dataset_dict.json")]
    if config.split is not None:
        splits = sorted({_split_of(f, path) for f in files})
        files = [f for f in files if _split_of(f, path) == config.split]
        if not files:
            raise UserError(f"{where}: no split '{config.split}' in {config.path} (has: {', '.join(splits) or 'none'})")
    if not files:
        raise UserError(f"{where}: no {', '.join(sorted(set(FORMATS.values())))} file in folder {config.path}")
    return files


def _split_of(file: SourceFile, folder: str) -> str:
    """data/train-00000.parquet, train/part-0.parquet and train.jsonl are all of split train."""
    first, *rest = file.path[len(folder) :].lstrip("/").split("/")
    name = first if rest and first != "data" else file.name
    return re.split(r"[-.]", name)[0]


def _known(file: SourceFile, where: str) -> SourceFile:
    if file.format is None:
        raise UserError(f"{where}: {file.name} is of no known format (known: {', '.join(FORMATS)})")
    return file


def _load_hub(config: SourceConfig, where: str) -> Any:
    import datasets

    try:
        splits = datasets.get_dataset_split_names(config.path, config.subset, revision=config.revision)
        split = config.split or "train"
        if split not in splits:
            raise UserError(f"{where}: no split '{split}' in {config.path} (has: {', '.join(splits)})")
        return datasets.load_dataset(config.path, config.subset, split=split, revision=config.revision)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub client has dozens of kinds; name and reason are what helps
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: '{config.path}' is no file here, and as a Hub dataset: {reason}") from error


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _may_hold_text(kind: pa.DataType, lists: bool) -> bool:
    if pa.types.is_null(kind):
        return True
    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return _may_hold_text(kind.value_type, lists=False)
    if pa.types.is_dictionary(kind):
        return _may_hold_text(kind.value_type, lists=False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _python_values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    return column.to_pylist()


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
