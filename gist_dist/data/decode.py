"""Rows as Python values, so few at once that their texts fit memory, whatever a file of a few kilobytes stands for."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

BATCH_ROWS = 1024
"""Rows held as Python objects at once."""
BATCH_BYTES = 256 * 2**20
"""Bytes of their texts, and of a row at most: one text of a dictionary may stand in a million rows."""


def slices(
    batches: Iterable[pa.RecordBatch], first: int, start: int, stop: int, wanted: list[str]
) -> Iterator[tuple[int, list[list[Any]]]]:
    """Rows start to stop, as Python values, of batches that begin with row ``first``."""
    for batch in batches:
        for at in range(max(start, first), min(stop, first + batch.num_rows), BATCH_ROWS):
            yield from _as_values(batch.slice(at - first, min(BATCH_ROWS, stop - at)), at, wanted)
        first += batch.num_rows
        if first >= stop:
            return


def _as_values(rows: pa.RecordBatch, first: int, wanted: list[str]) -> Iterator[tuple[int, list[list[Any]]]]:
    """All at once, or in halves of halves where they would take more than BATCH_BYTES. ValueError for a row of more."""
    if sum(text_bytes(rows.column(name)) for name in wanted) <= BATCH_BYTES:
        yield first, [rows.column(name).to_pylist() for name in wanted]
    elif rows.num_rows == 1:
        raise ValueError(f"row {first} has more than {BATCH_BYTES:,} bytes of text; remove it")
    else:
        half = rows.num_rows // 2
        yield from _as_values(rows.slice(0, half), first, wanted)
        yield from _as_values(rows.slice(half), first + half, wanted)


def text_bytes(cells: pa.Array) -> int:
    """Bytes of a column's texts once each cell has its own."""
    kind = cells.type
    if pa.types.is_dictionary(kind):
        if pa.types.is_nested(kind.value_type):
            return sum(text_bytes(cells.dictionary.slice(i, 1)) for i in cells.indices.drop_null().to_pylist())
        if not _is_text(kind.value_type):
            return int(cells.nbytes)
        return int(pc.sum(pc.binary_length(cells.dictionary).take(cells.indices)).as_py() or 0)
    if _is_list(kind):
        return text_bytes(cells.flatten())
    if pa.types.is_struct(kind):
        return sum(map(text_bytes, cells.flatten()))
    if (pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)) and len(cells):
        views = np.frombuffer(cells.buffers()[1], np.int32)  # of 16 bytes, the length first
        return int(views[4 * cells.offset :: 4][: len(cells)].sum(dtype=np.int64))
    return int(pc.sum(pc.binary_length(cells)).as_py() or 0) if _is_text(kind) else int(cells.nbytes)


def _is_text(kind: pa.DataType) -> bool:
    text_kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in text_kinds)


def _is_list(kind: pa.DataType) -> bool:
    list_kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(is_kind(kind) for is_kind in (*list_kinds, pa.types.is_large_list_view))


def batches_of(records: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """At most BATCH_ROWS of them, and about BATCH_BYTES."""
    batch, size = list[tuple[Any, ...]](), 0
    for record in records:
        batch.append(record)
        size += sum(map(_size, record))
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Characters of the texts in a value."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0


def rows_at_a_time(
    file: pa.parquet.ParquetFile,
    group: int,
    wanted: list[str],
    open_dictionary: Callable[[str], pa.parquet.ParquetFile],
) -> int:
    """How many rows of a Parquet row group take about BATCH_BYTES once their texts are written out.

    open_dictionary: the file again, with a column's dictionary left as it is.
    """
    described, of_row = file.metadata.row_group(group), 0.0
    for number in range(described.num_columns):
        chunk = described.column(number)
        path = chunk.path_in_schema
        is_wanted = any(path == name or path.startswith(f"{name}.") for name in wanted)
        if not is_wanted or chunk.physical_type != "BYTE_ARRAY":
            continue
        cells = chunk.num_values / max(1, described.num_rows)
        if BATCH_ROWS * max(1.0, cells) * chunk.total_uncompressed_size > BATCH_BYTES:
            stored = chunk.total_uncompressed_size / max(1, described.num_rows)
            of_row += max(stored, cells * _longest_entry(chunk, group, open_dictionary))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1.0, of_row))))


def _longest_entry(
    chunk: pa.parquet.ColumnChunkMetaData, group: int, open_dictionary: Callable[[str], pa.parquet.ParquetFile]
) -> int:
    """Bytes of the longest text that a few bytes of a column's chunk may stand for: that of its dictionary."""
    unknown = int(chunk.total_uncompressed_size)
    if "DELTA_BYTE_ARRAY" in chunk.encodings:  # a text continues the one before it
        return unknown
    if not chunk.has_dictionary_page:
        return 0
    path = chunk.path_in_schema
    try:
        for batch in open_dictionary(path).iter_batches(16, [group], columns=[path]):
            cells = batch.column(0)
            while _is_list(cells.type):
                cells = cells.flatten()
            if not pa.types.is_dictionary(cells.type):
                return unknown
            if len(cells.dictionary):
                return max(pc.max(pc.binary_length(cells.dictionary)).as_py() or 0, 1)
    except pa.ArrowNotImplementedError:  # lists that are only in part of the dictionary
        return unknown
    return 0
