"""Training rows out of files and Hub datasets: columns mapped to roles, rows checked, the others counted.

source = open_sources(config.data)[0]
for part in source.parts():              # each may be read by another process
    for row in source.rows(part, report): ...
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat, starmap
from operator import eq
from typing import Any, NamedTuple

import pyarrow as pa

from gist_dist.common.errors import UserError
from gist_dist.common.redact import redact_address
from gist_dist.common.text import SHORT
from gist_dist.config import DataConfig, Filters, SourceConfig
from gist_dist.data.formats import HubRows, SourceFile, suffix
from gist_dist.data.judged import JudgedPairs, open_hub
from gist_dist.data.layouts import (
    NoText,
    Roles,
    find_roles,
    holds_text,
    is_list,
    may_hold_text,
    read_literal,
    text_of,
    texts_of,
)
from gist_dist.data.places import find_files

PART_ROWS = 2**17
"""Rows of a part, where they can be counted without reading them."""
SHOWN_DROPS, SHOWN_COLUMNS = 5, 20
LONGEST_VALUE = 200
"""Characters of a value of split_by, which names a source wherever it is shown."""


class Row(NamedTuple):
    """One training example: raw texts, without prompts."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    number: int
    """Its number within its part, from 0; unusable rows count. With several_positives: apart, rows share it."""
    group: str | None = None
    """Value of the split_by column."""
    label: str | None = None
    """Value of the columns.label column."""
    further: tuple[str, ...] = ()
    """Positives beside the first, none twice."""


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
    rows_added: int = 0
    """Positives beyond the first of their row that are each a row of their own (several_positives: apart)."""
    rows_of_several: int = 0
    further_positives: int = 0
    """Rows with several positives, and how many they have beyond the first."""
    rows_of_one_text: int = 0
    """Whose anchor and positive are the same text."""
    layout: str = ""
    """Which columns are read, unless they are called as their roles are."""

    def drop(self, where: str, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.first_dropped) < SHOWN_DROPS:
            self.first_dropped.append(f"{where}: {reason}")

    def use(self, anchors: list[str], positives: list[str], further: list[tuple[str, ...]]) -> None:
        """Count rows that can be used."""
        self.rows_used += len(anchors)
        self.rows_of_one_text += sum(map(eq, anchors, positives))
        self.rows_of_several += sum(map(bool, further))
        self.further_positives += sum(map(len, further))

    def add(self, other: "SourceReport") -> None:
        """The report of a later part of the same source."""
        self.rows_read += other.rows_read
        self.rows_used += other.rows_used
        self.rows_added += other.rows_added
        self.rows_of_several += other.rows_of_several
        self.further_positives += other.further_positives
        self.rows_of_one_text += other.rows_of_one_text
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.first_dropped = (self.first_dropped + other.first_dropped)[:SHOWN_DROPS]

    def complaint(self) -> str:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.items())
        total = f"{sum(self.dropped.values()):,} of {self.rows_read + self.rows_added:,} rows"
        return f"{total}: {reasons}; the first (counting from 0): {self.first_dropped[0]}"

    def told(self) -> list[str]:
        """What the plan and the log say of how the source was read."""
        told = [self.layout] if self.layout else []
        if self.rows_added:
            rows = f"{self.rows_read:,} rows are {self.rows_read + self.rows_added:,}"
            told.append(f"{rows}, one for each positive (several_positives: apart)")
        if self.rows_of_several:
            told.append(
                f"{self.rows_of_several:,} of {self.rows_used:,} rows have several positives, "
                f"{self.rows_of_several + self.further_positives:,} in all; loss.positives says how they count"
            )
        if self.rows_of_one_text:
            count = min(self.rows_of_one_text, self.rows_used)
            told.append(
                f"{count:,} of {self.rows_used:,} rows have the same text as anchor and positive, as in SimCSE: it is "
                "encoded twice, each time with its own dropout, and without dropout (student.dropout) such rows don't "
                "teach what belongs together; a guide drops none of their candidates"
            )
        return [f"{self.name}: {line}" for line in told]


class Source:
    """One of data.sources: its files, found and looked into once, and its rows. Pickles, to be read elsewhere.

    UserError for what can't be found, opened or read, and for columns that are missing or hold no text.
    """

    def __init__(self, config: SourceConfig, number: int, root: str | None) -> None:
        self.config = config
        self.where = f"data.sources[{number}]"
        found = find_files(config, self.where, root)
        self.files: Sequence[SourceFile | JudgedPairs | HubRows] = self._as_set(found) or [open_hub(config, self.where)]
        self.heads = self._of_files(lambda file: file.head())
        self.roles: Roles | None = None
        self.columns = self._map_columns()
        self.report = self.new_report()

    def new_report(self) -> SourceReport:
        layout = self.roles.told(self._known_columns() - {self.config.columns.label}) if self.roles else ""
        return SourceReport(self.config.label, redact_address(self.config.path), layout=layout)

    def _as_set(self, files: list[Any]) -> list[Any]:
        """The files, to be read as the recipe's format says. UserError where that is of no use."""
        options = self.config.format
        set_here = options.model_dump(exclude_defaults=True)
        is_csv = any(isinstance(file, SourceFile) and file.format == "csv" for file in files)
        is_text = is_csv or any(isinstance(file, SourceFile) and file.format == "jsonl" for file in files)
        if useless := [name for name in set_here if not (is_text if name == "encoding" else is_csv)]:
            kinds = "CSV, TSV or JSON" if useless[0] == "encoding" else "CSV or TSV"
            raise UserError(f"{self.where}.format.{useless[0]}: the source has no {kinds} file; remove it")
        return [replace(file, options=options) if isinstance(file, SourceFile) else file for file in files]

    @property
    def is_csv(self) -> bool:
        return any(isinstance(file, SourceFile) and file.format == "csv" for file in self.files)

    def _known_columns(self) -> set[str]:
        return {name for head in self.heads for name in head.columns}

    @property
    def has_labels(self) -> bool:
        """Whether rows say what they mean; see columns.label."""
        return self.config.columns.label is not None

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
            values = [_value(cell) for cell in columns.pop()] if has_groups else []
            labels = list(map(_label, columns.pop())) if self.config.columns.label is not None else [None] * count
            anchors, positives, further, negatives, places = self._roles(columns)
            groups = [values[place] for place in places] if has_groups else repeat(None, len(places))
            numbers, named = (number + place for place in places), (labels[place] for place in places)
            records = zip(anchors, positives, negatives, numbers, groups, named, further, strict=True)
            report.rows_read += count
            report.rows_added += len(places) - count
            # Told for a whole batch at once: nearly all batches are fine, and then no row is looked at alone.
            if self._all_texts(chain(anchors, positives, *further, *negatives)) and (
                not has_groups or all(map(_is_name, groups))
            ):
                report.use(anchors, positives, further)
                yield from starmap(Row, records)
            else:
                for place, record in zip(places, records, strict=True):
                    if reason := self._complaint(*record):
                        report.drop(f"{name} row {first + place}", reason)
                    else:
                        row = Row(*record)
                        report.use([row.anchor], [row.positive], [row.further])
                        yield row
            number += count

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

    def _roles(
        self, columns: list[list[Any]]
    ) -> tuple[list[Any], list[Any], list[tuple[Any, ...]], list[tuple[Any, ...]], Sequence[int]]:
        """Anchor, positive, further positives and negatives of each row, and which of the rows read it is made of; what
        is not text is still in there."""
        assert self.roles is not None
        anchors, *cells = columns
        if self.is_csv:
            cells = [list(map(read_literal, column)) for column in cells]
        positives, cells = cells[: len(self.roles.positives)], cells[len(self.roles.positives) :]
        if self.roles.prompt is not None:
            anchors = list(map(_after_prompt, self._texts(anchors), cells.pop()))
        else:
            anchors = self._texts(anchors)
        as_list = partial(texts_of, instructions=self.config.columns.instructions)
        negatives: list[tuple[Any, ...]] = [()] * len(anchors)
        if cells:
            rows = zip(*cells, strict=True)
            negatives = [tuple(filter(holds_text, chain.from_iterable(map(as_list, row)))) for row in rows]
        if len(positives) == 1 and not any(isinstance(cell, list) for cell in positives[0]):
            return anchors, self._texts(positives[0]), [()] * len(anchors), negatives, range(len(anchors))
        several = [
            _usable_positives([*chain.from_iterable(map(as_list, cells))])
            if isinstance(anchor, str)
            else [None]  # the anchor is complained of
            for anchor, *cells in zip(anchors, *positives, strict=True)
        ]
        if self.config.several_positives == "together":
            firsts, further = [texts[0] for texts in several], [tuple(texts[1:]) for texts in several]
            return anchors, firsts, further, negatives, range(len(anchors))
        places = [place for place, texts in enumerate(several) for _ in texts]
        one_each: list[tuple[Any, ...]] = [()] * len(places)
        own_anchors, own_negatives = [anchors[i] for i in places], [negatives[i] for i in places]
        return own_anchors, [*chain(*several)], one_each, own_negatives, places

    def _texts(self, cells: list[Any]) -> list[Any]:
        instructions = self.config.columns.instructions
        if instructions is None and set(map(type, cells)) <= {str}:
            return cells
        return [text_of(cell, instructions) for cell in cells]

    def _all_texts(self, texts: Iterable[Any]) -> bool:
        """Whether none of them would be complained of."""
        texts = list(texts)
        return (
            set(map(type, texts)) <= {str}
            and all(map(str.strip, texts))
            and (all(map(str.isascii, texts)) or all(map(_is_unicode, texts)))
            and not (self.config.filters != Filters() and any(map(self._out_of_bounds, texts)))
        )

    def _complaint(
        self,
        anchor: Any,
        positive: Any,
        negatives: tuple[Any, ...],
        number: int,
        group: Any,
        _: Any,
        further: tuple[Any, ...],
    ) -> str:
        """Why a row can't be used; empty if it can."""
        positives = zip(repeat("positive"), (positive, *further), strict=False)
        for role, text in (("anchor", anchor), *positives, *zip(repeat("negative"), negatives, strict=False)):
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
        if isinstance(text, NoText):
            return f"{role} {text.reason}"
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
            self.roles = roles = find_roles(columns, self._known_columns(), self.where)
            wanted = [("columns.anchor", roles.anchor), *(("columns.positive", name) for name in roles.positives)]
            wanted += [("columns.negatives", name) for name in roles.negatives]
            wanted += [("columns.prompt", roles.prompt)] if roles.prompt is not None else []
            wanted += [("columns.label", columns.label)] if columns.label is not None else []
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
            remedy = "fix that file or leave it out" if good else f"set {setting}"
            if column in has:
                problem = f"column '{column}' of {name} holds {has[column]}, not {self._need(setting)}"
                problem += f" as in {good[0]}" if good else ""
                may_be_pair = setting == "columns.anchor" and self.config.columns.instructions is None
                if not good and may_be_pair and may_hold_text(has[column], lists=1, objects=False):
                    remedy += ", or columns.instructions if its cells are [instruction, text] pairs"
            else:
                problem = f"column '{column}' of {good[0]} is" if good else f"column '{column}'"
                problem += f" not in {name} (has: {_listed(has)})"
                if not good and suffix(name) in (".csv", ".tsv"):
                    remedy += ", or format.delimiter" * (len(has) == 1) + ", or format.names if the file has no header"
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
        lists = (need != "text") + (setting in ("columns.positive", "columns.negatives"))
        return may_hold_text(kind, lists) and (need == "text" or is_list(kind) or pa.types.is_null(kind))


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


def _usable_positives(texts: list[Any]) -> list[Any]:
    """Each once; without null and blanks, but for one of them where there is nothing else."""
    return list(dict.fromkeys(filter(holds_text, texts))) or texts[:1] or [None]


def _after_prompt(anchor: Any, prompt: Any) -> Any:
    return anchor if not isinstance(anchor, str) or prompt is None else f"{prompt}{anchor}"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_VALUE and (value.isascii() or _is_unicode(value))


def _label(cell: Any) -> str | None:
    """As text; None where there is none."""
    value = _value(cell)
    return value.strip() or None if isinstance(value, str) else None


def _value(cell: Any) -> Any:
    """Numbers, dates and the like as text; null and what has parts as it is."""
    return cell if cell is None or isinstance(cell, str | list | dict | bytes) else str(cell)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
