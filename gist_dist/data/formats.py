"""Reading one file, or one Hub dataset: its columns, and any run of its rows, as Python values."""

import codecs
import csv
import io
import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from gist_dist.common.errors import UserError
from gist_dist.common.files import is_lfs_pointer
from gist_dist.common.hub import go_offline_if_unreachable
from gist_dist.common.text import one_line
from gist_dist.config import SourceConfig, TextFormat
from gist_dist.data.decode import BATCH_ROWS, batches_of, rows_at_a_time, slices

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
SCHEMA_RECORDS = 1000
"""JSON records looked at to learn a file's columns."""
READ_BYTES = 4 * 2**20
SHOWN_START = 2**16
"""Bytes in which a JSON file says what it is."""
OTHER_ENCODING = "convert it, or set format.encoding (cp1252 where Excel wrote it in Western Europe)"
CELL_BYTES = 64 * 2**20
"""Most bytes of a CSV cell, a line of JSON or an object of a JSON list: a few kilobytes of gzip can hold more than any
memory."""
JSON_SPACE = re.compile(r"[ \t\r\n]*")
WRAPPED = re.compile(
    r'\s*\{\s*(?:"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[-+.\deE]+|true|false|null)\s*,\s*)*'
    r'"(?:data|rows|train|examples|items|records|instances|samples)"\s*:\s*(?=\[\s*[{\]])'
)
"""The start of an object that holds the rows: {"version": 1, "data": [{…"""
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "|"}
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


PLAIN = TextFormat()


class Head(NamedTuple):
    """What a file tells without its rows being read."""

    columns: dict[str, pa.DataType | None]
    """Column → type; None where the format has no types."""
    blocks: tuple[int, ...] | None
    """Rows of each row group or record batch; None where only reading counts them."""
    is_open: bool = False
    """Whether its rows may have columns beyond these."""


class HubRows:
    """A Hub dataset, read like a file; loaded again where it is unpickled."""

    def __init__(self, config: SourceConfig, where: str) -> None:
        self.config, self.where, self.name = config, where, config.path
        self.dataset = _load_hub(config, where)

    def __reduce__(self) -> tuple[Any, ...]:
        return HubRows, (self.config, self.where)

    @property
    def paths(self) -> list[str]:
        """On this machine, for a job to take along: none."""
        return []

    @property
    def num_bytes(self) -> int:
        return self.dataset.data.nbytes

    def fingerprint(self) -> list[Any]:
        return [self.name, self.dataset._fingerprint]

    def head(self) -> Head:
        schema = self.dataset.features.arrow_schema
        return Head(dict(fields(schema)), (len(self.dataset),))

    def read(self, wanted: list[str], start: int, num_rows: int | None) -> Iterator[tuple[int, list[list[Any]]]]:
        """As SourceFile.read."""
        rows = self.dataset.select_columns(list(dict.fromkeys(wanted))).with_format("arrow")
        stop = len(rows) if num_rows is None else min(start + num_rows, len(rows))
        with reading(f"{self.where}: {self.name}"):
            tables = (rows[at : min(at + BATCH_ROWS, stop)] for at in range(start, stop, BATCH_ROWS))
            batches = chain.from_iterable(table.to_batches() for table in tables)
            yield from slices(batches, start, start, stop, wanted)


@dataclass(frozen=True)
class SourceFile:
    filesystem: pa.fs.FileSystem
    path: str
    where: str
    """The source's name in error messages."""
    options: TextFormat = PLAIN

    @property
    def name(self) -> str:
        path = self.path.split("?")[0] if "://" in self.path else self.path
        return path.rsplit("/", 1)[-1]

    @property
    def paths(self) -> list[str]:
        return [self.path]

    @property
    def num_bytes(self) -> int:
        return max(0, self.filesystem.get_file_info(self.path).size or 0)

    @property
    def format(self) -> str | None:
        return FORMATS.get(suffix(self.name))

    def fingerprint(self) -> list[Any]:
        """Path, size and time of change; for a place without such times, what else it tells of the file."""
        info = self.filesystem.get_file_info(self.path)
        if info.mtime_ns is None and isinstance(self.filesystem, pa.fs.PyFileSystem):
            return [self.path, info.size, self.filesystem.handler.fs.ukey(self.path)]
        return [self.path, info.size, info.mtime_ns]

    def head(self) -> Head:
        if isinstance(self.filesystem, pa.fs.LocalFileSystem) and is_lfs_pointer(Path(self.path)):
            raise UserError(
                f"{self.where}: {self.path} is a Git LFS pointer, not the file itself; run 'git lfs pull' there, or "
                "download it again"
            )
        with self._reading():
            if self.format == "parquet":
                file = pa.parquet.ParquetFile(self.filesystem.open_input_file(self.path))
                return Head(self._types(fields(file.schema_arrow)), _row_groups(file.metadata))
            if self.format == "arrow":
                columns = self._types(fields(self._open_arrow().schema))
                is_local = isinstance(self.filesystem, pa.fs.LocalFileSystem)
                counted = self._open_arrow([*columns][:1]) if is_local else None
                return Head(columns, None if counted is None else tuple(batch.num_rows for batch in counted))
            if self.format == "csv":
                names = self.options.names or self.first_cells()
                return Head(self._types((name, None) for name in names), None)
            with self._open_text() as stream:
                records = islice(self._json_records(stream), SCHEMA_RECORDS)
                return Head(dict.fromkeys(name for record in records for name in record), None, is_open=True)

    def first_cells(self) -> list[str]:
        """The first line of a CSV or TSV file: its header, if it has one."""
        with self._reading(), self._open_text() as stream:
            return next(self._csv_rows(stream), (1, list[str]()))[1]

    def read(self, wanted: list[str], start: int, num_rows: int | None) -> Iterator[tuple[int, list[list[Any]]]]:
        """(number of the first row, cells of each wanted column) of batches of at most BATCH_ROWS rows."""
        stop = sys.maxsize if num_rows is None else start + num_rows
        with self._reading():
            if self.format == "parquet":
                yield from self._read_parquet(wanted, start, stop)
            elif self.format == "arrow":
                yield from slices(map(_valid, self._open_arrow(wanted)), 0, start, stop, wanted)
            else:
                with self._open_text() as stream:
                    cells = self._csv_cells if self.format == "csv" else self._json_cells
                    for batch in batches_of(islice(cells(stream, wanted), start, stop)):
                        yield start, [list(cells) for cells in zip(*batch, strict=True)]
                        start += len(batch)

    def _read_parquet(self, wanted: list[str], start: int, stop: int) -> Iterator[tuple[int, list[list[Any]]]]:
        file = pa.parquet.ParquetFile(
            self.filesystem.open_input_file(self.path),
            buffer_size=READ_BYTES,
            pre_buffer=False,  # a row group may be large: its columns are read as they are used
            page_checksum_verification=True,
        )
        ends = list(accumulate(_row_groups(file.metadata)))
        groups = range(bisect_right(ends, start), min(bisect_left(ends, stop) + 1, len(ends)))
        if groups:
            at_a_time = min(rows_at_a_time(file, group, wanted, self._open_dictionary) for group in groups)
            batches = file.iter_batches(at_a_time, groups, columns=list(dict.fromkeys(wanted)))
            yield from slices(batches, ends[groups[0] - 1] if groups[0] else 0, start, stop, wanted)

    def _open_dictionary(self, column: str) -> pa.parquet.ParquetFile:
        return pa.parquet.ParquetFile(self.filesystem.open_input_file(self.path), read_dictionary=[column])

    def _open_arrow(self, wanted: list[str] | None = None) -> Any:
        """The batches, with all columns or the wanted ones, of a file as pyarrow writes it, or a stream as datasets
        keeps it; it has a schema."""
        options = pa.ipc.IpcReadOptions()
        if wanted is not None:
            names = self._open_arrow().schema.names
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in dict.fromkeys(wanted)])
        if isinstance(self.filesystem, pa.fs.LocalFileSystem):
            file = pa.memory_map(self.path)
        else:
            file = self.filesystem.open_input_file(self.path)
        try:
            return _IpcBatches(pa.ipc.open_file(file, options=options))
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file, options=options)

    @contextmanager
    def _open_text(self) -> Iterator[io.BufferedReader]:
        """The text as UTF-8 bytes, after a byte order mark; UserError where they are not for certain."""
        with self.filesystem.open_input_stream(self.path, compression="detect") as raw:
            stream = io.BufferedReader(raw, READ_BYTES)
            first, encoding = stream.peek(4)[:4], self.options.encoding
            if encoding is None:
                encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if first.startswith(mark)), "utf-8")
                if encoding == "utf-8" and b"\0" in first:
                    raise UserError(
                        f"{self.where}: {self.path} is UTF-16 or UTF-32 text, not UTF-8; set format.encoding "
                        "(utf-16-le, …) or convert it"
                    )
            if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig", "ascii"):
                stream = io.BufferedReader(_AsUtf8(stream, encoding), READ_BYTES)
            if stream.peek(3).startswith(b"\xef\xbb\xbf"):
                stream.read(3)
            yield stream

    def _csv_cells(self, stream: io.BufferedReader, wanted: list[str]) -> Iterator[tuple[str | None, ...]]:
        """The wanted cells of each row. Text stays text ("1984" is a title, "NA" a word); an empty cell is null."""
        rows = self._csv_rows(stream)
        header = [*(self.options.names or next(rows, (0, wanted))[1])]  # an empty file has no row either
        places = [header.index(name) for name in wanted]
        for line, cells in rows:
            if len(cells) != len(header):
                raise UserError(
                    f"{self.where}: {self.name} line {line} has {len(cells)} cells where the header has {len(header)}; "
                    f"fix or remove it{', or set format.names' if self.options.names else ''}"
                )
            yield tuple([cells[place] or None for place in places])

    def _csv_rows(self, stream: io.BufferedReader) -> Iterator[tuple[int, list[str]]]:
        """(line it starts in, cells) of each row, the header's first."""
        csv.field_size_limit(CELL_BYTES)
        delimiter = self.options.delimiter or self._delimiter(stream.peek()[:SHOWN_START])
        lines = self._lines(io.TextIOWrapper(stream, "utf-8", newline=""))
        is_quoted = self.options.quoting == "minimal"
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{self.where}: {self.name} line {line} is no CSV ({error}); fix it: a quote within a quoted cell "
                    "is written twice, and one that opens a cell closes it; or set format.quoting=none if quotes "
                    "are part of the texts"
                ) from None
            if cells is None:
                return
            if cells:
                yield line, cells

    def _delimiter(self, start: bytes) -> str:
        """Comma or tab as the file's name says, or what else the first line is separated by."""
        usual = "\t" if suffix(self.name) == ".tsv" else ","
        line = start.splitlines()[:1]
        text = line[0].decode(errors="replace") if line else ""
        if usual in text:
            return usual
        return max((usual, *DELIMITERS), key=text.count)

    def _json_cells(self, stream: io.BufferedReader, wanted: list[str]) -> Iterator[tuple[Any, ...]]:
        return (tuple(map(record.get, wanted)) for record in self._json_records(stream))

    def _json_records(self, stream: io.BufferedReader) -> Iterator[dict[str, Any]]:
        """The objects of a file that has one a line, or is one list of objects, or an object that holds such a list."""
        start = stream.peek(1)[:SHOWN_START].lstrip()
        is_list = start[:1] == b"[" or WRAPPED.match(start.decode(errors="replace"))
        for line, value in self._json_list(stream) if is_list else self._json_lines(stream):
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise UserError(f"{self.where}: {self.name} line {line} holds a JSON {kind}, not an object")
            yield value

    def _json_lines(self, stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(self._lines(stream), start=1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._no_json(error, number) from None
            yield number, value

    def _lines(self, stream: Any) -> Iterator[Any]:
        """Lines of bytes or text; UserError for one that does not end."""
        for number in count(1):
            line = stream.readline(CELL_BYTES)
            if len(line) == CELL_BYTES:
                raise UserError(
                    f"{self.where}: {self.name} line {number} has more than {CELL_BYTES:,} bytes; remove it"
                )
            if not line:
                return
            yield line

    def _json_list(self, stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        """(line, value) of the list's values, without the whole file in memory: MEDI's is one list of 1.4 million."""
        file, decode = io.TextIOWrapper(stream, "utf-8"), json.JSONDecoder().raw_decode
        text = file.read(READ_BYTES)
        wrapped = WRAPPED.match(text)
        opens = wrapped.end() if wrapped else text.index("[")
        at, line, comma_first = opens + 1, 1 + text[:opens].count("\n"), False
        while True:
            space = JSON_SPACE.match(text, at)
            assert space, "it may be empty, and is always there"
            start, at = at, space.end()
            line += text.count("\n", start, at)
            error = None
            if at < len(text) and text[at] == "]":
                if not wrapped and (text[at + 1 :] + file.read(READ_BYTES)).strip():
                    raise UserError(
                        f"{self.where}: {self.name} line {line} goes on after its list; remove what follows"
                    )
                return
            if at < len(text) and comma_first:
                if text[at] != ",":
                    raise self._no_json(json.JSONDecodeError("Expecting ',' delimiter", text, at), line)
                at, comma_first = at + 1, False
                continue
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as failure:
                error = failure
            if error is None:
                yield line, value
                line += text.count("\n", at, end)
                at, comma_first = end, True
            elif _may_be_cut(error, text) and (more := file.read(max(READ_BYTES, len(text) - at))):
                text, at = text[at:] + more, 0
                if len(text) > 2 * CELL_BYTES:
                    raise self._too_long(line)
            else:
                within = text.count("\n", at, error.pos) if isinstance(error, json.JSONDecodeError) else 0
                raise self._no_json(error, line + within)

    def _too_long(self, line: int) -> UserError:
        return UserError(f"{self.where}: {self.name} line {line} has more than {CELL_BYTES:,} bytes; remove it")

    def _no_json(self, error: Exception, line: int) -> UserError:
        where = f"{self.where}: {self.name} line {line}"
        if isinstance(error, UnicodeDecodeError):
            return UserError(f"{where} is not UTF-8 text; {OTHER_ENCODING}")
        if isinstance(error, json.JSONDecodeError):
            forms = "" if line > 1 else " (an object a line, or a list of objects, is read)"
            return UserError(f"{where} is not JSON ({error.msg}); fix or remove it{forms}")
        # Digits without end, brackets without end.
        return UserError(f"{where} can't be read ({str(error).split(';')[0]}); remove it")

    def _types(self, fields: Iterable[tuple[str, pa.DataType | None]]) -> dict[str, pa.DataType | None]:
        """By column; UserError if two have one name."""
        types: dict[str, pa.DataType | None] = {}
        for name, kind in fields:
            if name in types and name:
                raise UserError(f"{self.where}: {self.name} has two columns '{name}'; rename one")
            types[name] = kind
        return types

    def _reading(self) -> Any:
        return reading(f"{self.where}: {self.path}", self.filesystem)


class _AsUtf8(io.RawIOBase):
    """The UTF-8 bytes of text of another encoding."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self.text, self.left = io.TextIOWrapper(stream, encoding, newline=""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.left:
            self.left = self.text.read(len(buffer)).encode()
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


class _IpcBatches:
    """The batches of an Arrow file, one at a time, as a stream reader gives them."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader) -> None:
        self.reader, self.schema = reader, reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self.reader.get_batch(i) for i in range(self.reader.num_record_batches))


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Arrow's reader trusts offsets, and would read whatever memory they point to."""
    batch.validate(full=True)
    return batch


def fields(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in schema]


def _row_groups(metadata: pa.parquet.FileMetaData) -> tuple[int, ...]:
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether the parser may have failed for want of text: within a string, or at the very end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - len("\\uFFFF\\uFFFF")


@contextmanager
def reading(what: str, filesystem: pa.fs.FileSystem | None = None) -> Iterator[None]:
    """Turns what Arrow says of a damaged file into a sentence that names the file."""
    # File systems of fsspec raise whatever the libraries below them do. Values and overflows are of dates that Python
    # does not have, and the end is that of a compressed file.
    known = (pa.ArrowException, OSError, KeyError, ValueError, OverflowError, EOFError)
    errors = Exception if isinstance(filesystem, pa.fs.PyFileSystem) else known
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        if error.encoding not in ("utf-8", "ascii"):
            raise UserError(f"{what} is not {error.encoding} text; set another format.encoding") from error
        raise UserError(f"{what} is not UTF-8 text; {OTHER_ENCODING}") from error
    except errors as error:
        if "invalid utf8" in str(error).lower():
            raise UserError(f"{what} is not UTF-8 text; convert it") from error
        raise UserError(f"{what} can't be read: {one_line(error)}") from error


def hub_subsets(config: SourceConfig) -> list[str]:
    """Names of a Hub dataset's subsets; none where they are unknown, which loading the dataset then explains."""
    go_offline_if_unreachable()
    import datasets

    try:
        return [*datasets.get_dataset_config_names(config.path, revision=config.revision)]
    except Exception:
        return []


def hub_splits(config: SourceConfig) -> list[str]:
    """Names of the subset's splits."""
    import datasets

    try:
        return [*datasets.get_dataset_split_names(config.path, config.subset, revision=config.revision)]
    except Exception as error:
        subset = f" (subset {config.subset})" if config.subset else ""
        raise UserError(f"'{config.path}'{subset} can't be loaded as a Hub dataset: {one_line(error)}") from error


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
        why = "the Hub is out of reach and its cache hasn't it" if is_away else one_line(error)
        raise UserError(
            f"{where}: '{config.path}' is no file here, and can't be loaded as a Hub dataset: {why}"
        ) from error


def suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
