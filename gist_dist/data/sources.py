"""Training rows out of files and Hub datasets: columns mapped to roles, rows checked, the others counted.

source = open_sources(config.data)[0]
for part in source.parts():              # each may be read by another process
    for row in source.rows(part, report): ...
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, repeat, starmap
from typing import Any, NamedTuple

import pyarrow as pa

from gist_dist.common.errors import UserError
from gist_dist.common.redact import redact_address
from gist_dist.common.text import SHORT
from gist_dist.config import DataConfig, Filters, SourceConfig
from gist_dist.data.formats import HubRows, SourceFile
from gist_dist.data.places import find_files

LIST_KINDS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
TEXT_KINDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
PART_ROWS = 2**17
"""Rows of a part, where they can be counted without reading them."""
SHOWN_DROPS, SHOWN_COLUMNS = 5, 20
LONGEST_VALUE = 200
"""Characters of a value of split_by, which names a source wherever it is shown."""
NOT_A_PAIR = object()
"""Stands for a cell that should be [instruction, text] and is not."""


class Row(NamedTuple):
    """One training example: raw texts, without prompts."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    number: int
    """Of the row within its part, from 0; unusable rows count."""
    group: str | None = None
    """Value of the split_by column."""


@dataclass(frozen=True)
class Part:
    """One unit of parallel reading: some rows of a source's files, joined."""

    files: tuple[int, ...]
    """Indices of the source's files."""
    start: int = 0
    """First row, counted from the start of the first file."""
    num_rows: int | None = None
    """At most so many; None reads to the end."""


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

    def add(self, other: "SourceReport") -> None:
        """The report of a later part of the same source."""
        self.rows_read += other.rows_read
        self.rows_used += other.rows_used
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.first_dropped = (self.first_dropped + other.first_dropped)[:SHOWN_DROPS]

    def complaint(self) -> str:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.items())
        total = f"{sum(self.dropped.values()):,} of {self.rows_read:,} rows"
        return f"{total}: {reasons}; the first (counting from 0): {self.first_dropped[0]}"


class Source:
    """One of data.sources: its files, found and looked into once, and its rows. Pickles, to be read elsewhere.

    UserError for what can't be found, opened or read, and for columns that are missing or hold no text.
    """

    def __init__(self, config: SourceConfig, number: int, root: str | None) -> None:
        self.config = config
        self.where = f"data.sources[{number}]"
        self.report = self.new_report()
        found = find_files(config, self.where, root)
        self.files: Sequence[SourceFile | HubRows] = found or [HubRows(config, self.where)]
        self.heads = self._of_files(lambda file: file.head())
        self.columns = self._map_columns()

    def new_report(self) -> SourceReport:
        return SourceReport(self.config.label, redact_address(self.config.path))

    def fingerprint(self) -> list[list[Any]]:
        """Changes whenever what would be read may have changed."""
        return self._of_files(lambda file: file.fingerprint())

    def _of_files(self, ask: Callable[[Any], Any]) -> list[Any]:
        """Asked at once: a remote place takes its time to answer each."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, self.files))

    def parts(self) -> list[Part]:
        """The source in order, cut at row groups and record batches where those are not larger than a part.

        Text files are not cut; under max_rows they are one part together, as only reading counts their rows.
        """
        left = self.config.max_rows
        if left is not None and any(head.blocks is None for head in self.heads):
            return [Part(tuple(range(len(self.files))), 0, left)]
        parts = []
        for number, head in enumerate(self.heads):
            if head.blocks is None:
                parts.append(Part((number,)))
                continue
            for start, stop in _cuts(head.blocks):
                num_rows = stop - start if left is None else min(stop - start, left)
                if num_rows:
                    parts.append(Part((number,), start, num_rows))
                left = None if left is None else left - num_rows
        return parts

    def rows(self, part: Part, report: SourceReport) -> Iterator[Row]:
        """The usable rows of a part, in order; the others are counted in ``report`` with their reasons."""
        assert not self.config.columns.is_classification, "a classification set has no rows until it is triplets"
        number, has_groups = 0, self.config.split_by is not None
        for name, first, columns in self._read(part):
            count = len(columns[0])
            groups = [_value(cell) for cell in columns.pop()] if has_groups else repeat(None, count)
            anchors, positives, negatives = self._roles(columns)
            records = zip(anchors, positives, negatives, range(number, number + count), groups, strict=True)
            number += count
            report.rows_read += count
            # Told for a whole batch at once: nearly all batches are fine, and then no row is looked at alone.
            if self._all_texts(chain(anchors, positives, *negatives)) and (
                not has_groups or all(map(_is_name, groups))
            ):
                report.rows_used += count
                yield from starmap(Row, records)
                continue
            for in_file, record in enumerate(records, start=first):
                if reason := self._complaint(*record):
                    report.drop(f"{name} row {in_file}", reason)
                else:
                    report.rows_used += 1
                    yield Row(*record)

    def read(self) -> Iterator[Row]:
        """The usable rows of the whole source, numbered within it; ``self.report`` tells of the others."""
        self.report, first = self.new_report(), 0
        for part in self.parts():
            for row in self.rows(part, self.report):
                yield row._replace(number=first + row.number)
            first = self.report.rows_read

    def labelled(self) -> Iterator[tuple[str, str]]:
        """(text, label) of every usable row of a classification set; ``self.report`` tells of the others."""
        assert self.config.columns.is_classification
        self.report = self.new_report()
        for part in self.parts():
            for name, first, (texts, labels) in self._read(part):
                self.report.rows_read += len(texts)
                pairs = zip(self._texts(texts), map(_value, labels), strict=True)
                for in_file, (text, label) in enumerate(pairs, start=first):
                    if reason := self._text_complaint("text", text) or self._value_complaint("columns.label", label):
                        self.report.drop(f"{name} row {in_file}", reason)
                    else:
                        self.report.rows_used += 1
                        yield text, label

    def _read(self, part: Part) -> Iterator[tuple[str, int, list[list[Any]]]]:
        """(file name, number of the first row within it, cells of each wanted column) of batches of rows."""
        left = part.num_rows
        for file in (self.files[number] for number in part.files):
            for first, columns in file.read(self.columns, part.start, left):
                yield file.name, first, columns
                left = None if left is None else left - len(columns[0])
            if left == 0:
                return

    def _roles(self, columns: list[list[Any]]) -> tuple[list[Any], list[Any], list[tuple[Any, ...]]]:
        """Anchor, positive and negatives of each row; what is not text is still in there."""
        anchors, positives, *cells = columns
        if not cells:
            return self._texts(anchors), self._texts(positives), [()] * len(anchors)
        as_list = self._as_pairs if self.config.columns.instructions else _as_list
        negatives = [
            tuple(text for text in chain.from_iterable(map(as_list, row)) if text is not None)
            for row in zip(*cells, strict=True)
        ]
        return self._texts(anchors), self._texts(positives), negatives

    def _texts(self, cells: list[Any]) -> list[Any]:
        return [self._paired(cell) for cell in cells] if self.config.columns.instructions else cells

    def _as_pairs(self, cell: Any) -> list[Any]:
        """The texts of a cell that is a pair, or a list of pairs."""
        return [self._paired(cell)] if _is_pair(cell) else [self._paired(pair) for pair in _as_list(cell)]

    def _paired(self, cell: Any) -> Any:
        if cell is None:
            return None
        if not _is_pair(cell):
            return NOT_A_PAIR
        instruction, text = cell
        both = self.config.columns.instructions == "prepend" and instruction.strip() and text.strip()
        return f"{instruction} {text}" if both else text

    def _all_texts(self, texts: Iterable[Any]) -> bool:
        """Whether none of them would be complained of."""
        texts = list(texts)
        return (
            set(map(type, texts)) <= {str}
            and all(map(str.strip, texts))
            and (all(map(str.isascii, texts)) or all(map(_is_unicode, texts)))
            and not (self.config.filters != Filters() and any(map(self._out_of_bounds, texts)))
        )

    def _complaint(self, anchor: Any, positive: Any, negatives: tuple[Any, ...], number: int, group: Any) -> str:
        """Why a row can't be used; empty if it can."""
        for role, text in (("anchor", anchor), ("positive", positive), *(("negative", text) for text in negatives)):
            if reason := self._text_complaint(role, text):
                return reason
        return self._value_complaint("split_by", group) if self.config.split_by is not None else ""

    def _value_complaint(self, setting: str, value: Any) -> str:
        if isinstance(value, str) and value:
            return self._name_complaint(value) if setting == "split_by" else ""
        column = self.config.split_by if setting == "split_by" else self.config.columns.label
        kind = "missing" if value is None else "empty" if value == "" else f"{type(value).__name__}, not a single value"
        return f"'{column}' ({setting}) is {kind}"

    def _name_complaint(self, value: str) -> str:
        if len(value) > LONGEST_VALUE:
            return f"'{self.config.split_by}' (split_by) has more than {LONGEST_VALUE} characters, too long for a name"
        return "" if _is_unicode(value) else f"'{self.config.split_by}' (split_by) has a lone surrogate"

    def _text_complaint(self, role: str, text: Any) -> str:
        if text is None:
            return f"{role} is missing"
        if text is NOT_A_PAIR:
            return f"{role} is no [instruction, text] pair (columns.instructions)"
        if _is_pair(text):
            return f"{role} is a pair, not text (set columns.instructions if it is [instruction, text])"
        if not isinstance(text, str):
            return f"{role} is {type(text).__name__}, not text"
        if not text or text.isspace():
            return f"{role} is empty"
        if not text.isascii() and not _is_unicode(text):
            return f"{role} has a lone surrogate, which is no character"
        bound = self._out_of_bounds(text)
        return bound and f"{role} {bound}"

    def _out_of_bounds(self, text: str) -> str:
        """Which of the filters a text fails; empty if none."""
        filters = self.config.filters
        if filters.min_characters and len(text) < filters.min_characters:
            return f"has fewer than {filters.min_characters} characters (filters.min_characters)"
        if filters.max_characters and len(text) > filters.max_characters:
            return f"has more than {filters.max_characters} characters (filters.max_characters)"
        if filters.min_words or filters.max_words:
            num_words = len(text.split())
            if filters.min_words and num_words < filters.min_words:
                return f"has fewer than {filters.min_words} words (filters.min_words)"
            if filters.max_words and num_words > filters.max_words:
                return f"has more than {filters.max_words} words (filters.max_words)"
        return ""

    def _map_columns(self) -> list[str]:
        """The columns to read, in the order that ``rows`` or ``labelled`` take them; all files must have them."""
        columns, split_by = self.config.columns, self.config.split_by
        if not any(head.columns for head in self.heads):
            raise UserError(f"{self.where}: {self.config.path} is empty")
        if columns.is_classification and split_by is not None:
            raise UserError(f"{self.where}: split_by = {split_by}: a classification set is one source; remove split_by")
        if columns.text is not None and columns.label is not None:
            wanted = [("columns.text", columns.text), ("columns.label", columns.label)]
        else:
            usual = [n for n in ("negatives", "negative") if any(n in head.columns for head in self.heads)][:1]
            negatives = usual if columns.negatives is None else columns.negatives
            wanted = [("columns.anchor", columns.anchor), ("columns.positive", columns.positive)]
            wanted += [("columns.negatives", name) for name in negatives]
            wanted += [("split_by", split_by)] if split_by is not None else []
        for setting, column in wanted:
            self._check_column(setting, column)
        return [column for _, column in wanted]

    def _check_column(self, setting: str, column: str) -> None:
        """UserError unless every file has the column, with a type that may hold what the setting says."""
        heads = [(file.name, head) for file, head in zip(self.files, self.heads, strict=True) if head.columns]
        good = [name for name, (has, *_) in heads if column in has and self._fits(setting, has[column])]
        for name, (has, _, is_open) in heads:
            if column in has and self._fits(setting, has[column]):
                continue
            if good and setting == "columns.negatives" and is_open:
                continue
            remedy = "mend that file or leave it out" if good else f"set {setting}"
            if column in has:
                problem = f"column '{column}' of {name} holds {has[column]}, not {self._need(setting)}"
                problem += f" as in {good[0]}" if good else ""
                if not good and self.config.columns.instructions is None and _may_hold_text(has[column], lists=2):
                    remedy += ", or columns.instructions if its cells are [instruction, text] pairs"
            else:
                problem = f"column '{column}' of {good[0]} is" if good else f"column '{column}'"
                problem += f" not in {name} (has: {_listed(has)})"
            raise UserError(f"{self.where}: {problem}; {remedy}")

    def _need(self, setting: str) -> str:
        if setting in ("split_by", "columns.label"):
            return "single values"
        return "[instruction, text] pairs" if self.config.columns.instructions else "text"

    def _fits(self, setting: str, kind: pa.DataType | None) -> bool:
        """Whether a column of this type may hold what the setting names. None: its cells tell, one by one."""
        need = self._need(setting)
        if kind is None:
            return True
        if need == "single values":
            return not pa.types.is_nested(kind)
        lists = (need != "text") + (setting == "columns.negatives")
        return _may_hold_text(kind, lists) and (need == "text" or _is_list(kind) or pa.types.is_null(kind))


def open_sources(config: DataConfig) -> list[Source]:
    """UserError for the first source that is missing, of no known format, or without its columns."""
    return [Source(source, number, config.root) for number, source in enumerate(config.sources)]


def _cuts(blocks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of parts of at most PART_ROWS rows, between blocks where that is possible."""
    start = stop = 0
    for num_rows in blocks:
        if stop > start and stop + num_rows - start > PART_ROWS:
            yield start, stop
            start = stop
        stop += num_rows
        while stop - start > PART_ROWS:
            yield start, start + PART_ROWS
            start += PART_ROWS
    if stop > start:
        yield start, stop


def _listed(columns: Iterable[str]) -> str:
    """The first of them, shortened: a file may have a million, of a kilobyte each."""
    columns = list(columns)
    shown = ", ".join(SHORT.repr(name) for name in columns[:SHOWN_COLUMNS])
    return f"{shown} and {len(columns) - SHOWN_COLUMNS:,} more" if len(columns) > SHOWN_COLUMNS else shown


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in LIST_KINDS)


def _may_hold_text(kind: pa.DataType, lists: int = 0) -> bool:
    """Text, or up to so many levels of lists of it."""
    if pa.types.is_dictionary(kind):
        return _may_hold_text(kind.value_type, lists)
    if lists and _is_list(kind):
        return _may_hold_text(kind.value_type, lists - 1)
    return any(is_kind(kind) for is_kind in TEXT_KINDS)


def _as_list(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _is_pair(cell: Any) -> bool:
    return isinstance(cell, list) and len(cell) == 2 and isinstance(cell[0], str) and isinstance(cell[1], str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_VALUE and (value.isascii() or _is_unicode(value))


def _value(cell: Any) -> Any:
    """Numbers, dates and the like as text; null and what has parts as it is."""
    return cell if cell is None or isinstance(cell, str | list | dict | bytes) else str(cell)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
