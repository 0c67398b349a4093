"""The other half of preparing: the shards of all parts become one corpus, in numpy, without a look at any text.

A text has one number, by the order of first use over the whole corpus, wherever shards begin and end; so the merged
arrays, and what is hashed of them, don't depend on how the work was divided. In memory are 8 bytes for each text of
each shard, and about 50 for the texts of one bucket of keys; everything else is streamed from file to file.
"""

# Axes:  n texts of all shards, those that several shards have counted as often

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt64

from gist_dist.common.errors import Damaged, UserError
from gist_dist.common.storage import TRANSFERS, Store, check_file
from gist_dist.data.shards import Commit, Job, name_by_content
from gist_dist.data.sources import SourceReport
from gist_dist.models.tokenizer import TextTokenizer

BUCKET_TEXTS = 2**22
"""Texts whose keys are compared at once."""
MAX_SOURCES = 10_000
"""That split_by makes of one source."""


class ArrayFile:
    """A .npy file that grows at its end."""

    def __init__(self, path: Path, dtype: type, columns: int | None = None) -> None:
        self.path, self.dtype, self.columns = path, np.dtype(dtype), columns
        self.stream = path.open("wb")
        self.length = 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self.stream.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.length += len(values)

    def close(self) -> Path:
        """numpy leaves room in the header, so that the true length fits in afterwards."""
        self.stream.seek(0)
        self._write_header()
        self.stream.close()
        return self.path

    def _write_header(self) -> None:
        shape = (self.length, self.columns) if self.columns else (self.length,)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.stream, header)


def merge(job: Job, store: Store, commits: Sequence[Commit], folder: Path) -> dict[str, Any]:
    """Write the corpus' arrays to the store; what the manifest says of them.

    commits: of every part, in the order of the corpus; folder: for temporary files. Damaged if a file of the commits
    is not there or not what was written.
    """
    files = {name: told for commit in commits for name, told in commit.files.items()}
    shards = [shard for commit in commits for shard in commit.shards]
    paths = _fetch(store, {name: files[name] for shard in shards for name in (shard.index, shard.rows)}, folder)
    starts = np.cumsum([0, *(_read(paths[shard.index]).num_rows for shard in shards)])
    text_starts = [0, *accumulate(sum(shard.batches) for shard in shards)]
    numbers = first_with_equal_key([paths[shard.index] for shard in shards], starts)
    sources = _Sources(job, commits)
    arrays = _open_arrays(folder, job.guide is not None, any(source.has_labels for source in job.sources))
    num_texts, which = 0, 0
    for part, commit in enumerate(commits):
        groups = sources.numbers_of_groups(part)
        for shard in commit.shards:
            own = slice(starts[which], starts[which + 1])
            index, rows = _read(paths[shard.index]), _read(paths[shard.rows])
            is_new = numbers[own] == np.arange(own.start, own.stop)
            # An earlier shard's text has its final number already, since that shard went before.
            numbers[own] = np.where(is_new, num_texts + np.cumsum(is_new) - 1, numbers[numbers[own]])
            num_texts += int(is_new.sum())
            _append_texts(arrays, index, is_new, text_starts[which])
            _append_rows(arrays, rows, numbers[own], groups, sources.row_offsets[part])
            sources.count(index, rows, is_new, groups)
            which += 1
    if not arrays["further"].length:  # as before rows could have several
        for name in ("further", "further_offsets"):
            arrays.pop(name).close()
    merged = {}
    for name, array in arrays.items():
        path, digest = name_by_content(array.close())
        store.upload(path, path.name)
        merged[name], files[path.name] = path.name, [digest, path.stat().st_size]
    return {
        "num_rows": arrays["anchors"].length,
        "num_texts": num_texts,
        "sources": sources.described(),
        "reports": [asdict(report) for report in sources.reports],
        "arrays": merged,
        "shards": [{"texts": shard.texts, "batches": shard.batches} for shard in shards],
        "files": {name: files[name] for name in (*merged.values(), *(shard.texts for shard in shards))},
    }


def first_with_equal_key(indexes: Sequence[Path], starts: np.ndarray) -> Int64[np.ndarray, " n"]:
    """For every text the position of the first text with the same key, which may be its own.

    starts: position of the first text of every index file, and the number of all texts.
    """
    first = np.arange(starts[-1])
    bits = max(0, int(starts[-1]) // BUCKET_TEXTS).bit_length()
    for bucket in range(2**bits):
        keys_of, positions_of = list[np.ndarray](), list[np.ndarray]()
        for path, start in zip(indexes, starts, strict=False):
            all_keys = _pairs(_read(path), "key")
            chosen = np.flatnonzero(all_keys[:, 0] >> np.uint64(64 - bits) == bucket) if bits else slice(None)
            keys_of.append(all_keys[chosen])
            positions_of.append(np.arange(start, start + len(all_keys))[chosen])
        keys, positions = np.concatenate(keys_of), np.concatenate(positions_of)
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of the corpus
        is_head = np.ones(len(order), dtype=bool)
        is_head[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
        heads = np.maximum.accumulate(np.where(is_head, np.arange(len(order)), 0))
        first[positions[order]] = positions[order[heads]]
    return first


class _Sources:
    """The sources of the corpus: one for each of the recipe, or with split_by one for each value of its column."""

    def __init__(self, job: Job, commits: Sequence[Commit]) -> None:
        self.job, self.commits = job, commits
        self.reports = [source.new_report() for source in job.sources]
        self.row_offsets = []
        """Rows of the same source in the parts before, for every part."""
        for (source, _), commit in zip(job.parts, commits, strict=True):
            self.row_offsets.append(self.reports[source].rows_read)
            self.reports[source].add(SourceReport(**commit.report))
        found = {(of, group) for (of, _), commit in zip(job.parts, commits, strict=True) for group in commit.groups}
        self.keys = sorted(found)
        """Index in data.sources and value of split_by, empty where the source has none."""
        self._refuse_too_many()
        self.numbers = {key: number for number, key in enumerate(self.keys)}
        names = ("rows", "texts", "student_cut", "guide_cut")
        self.counts = {name: np.zeros(len(self.keys), np.int64) for name in names}

    def numbers_of_groups(self, part: int) -> np.ndarray:
        """Source numbers of the groups of a part's commit."""
        of = self.job.parts[part][0]
        return np.array([self.numbers[of, group] for group in self.commits[part].groups], np.int32)

    def _refuse_too_many(self) -> None:
        """UserError where split_by names a column that tells rows apart, not tasks."""
        counts = Counter(of for of, _ in self.keys)
        for of, count in counts.items():
            if count > MAX_SOURCES:
                source = self.job.sources[of]
                raise UserError(
                    f"{source.where}.split_by = {source.config.split_by}: the column has {count:,} values, and at most "
                    f"{MAX_SOURCES:,} can be sources of their own; name another or remove split_by"
                )

    def count(self, index: pa.RecordBatch, rows: pa.RecordBatch, is_new: np.ndarray, groups: np.ndarray) -> None:
        """Texts count for the source of the first row that uses them."""
        source_of_row = groups[_values(rows, "group")]
        last = np.arange(rows.num_rows)[::-1]
        first_row = np.full(index.num_rows, rows.num_rows)
        for texts, row in (
            (_values(rows, "anchor"), last),
            (_values(rows, "positive"), last),
            *(_with_rows(rows.column(name)) for name in ("further", "negatives")),
        ):
            first_here = np.full(index.num_rows, rows.num_rows)
            first_here[texts[::-1]] = row  # of equal places the last assignment, which is the first row, stays
            first_row = np.minimum(first_row, first_here)
        source_of_text = source_of_row[first_row]
        for name, sources in (
            ("rows", source_of_row),
            ("texts", source_of_text[is_new]),
            ("student_cut", source_of_text[is_new & _is_cut(index, "student_length", self.job.student)]),
            ("guide_cut", source_of_text[is_new & _is_cut(index, "guide_length", self.job.guide)]),
        ):
            self.counts[name] += np.bincount(sources, minlength=len(self.keys))

    def described(self) -> list[dict[str, Any]]:
        """A split source counts its used rows only: no value of its column is known for the others."""
        described = []
        for number, (of, group) in enumerate(self.keys):
            report, rows = self.reports[of], int(self.counts["rows"][number])
            if group:
                report = SourceReport(f"{report.name}/{group}", report.path, rows, rows)
            counts = {f"num_{name}": int(count[number]) for name, count in self.counts.items() if name != "rows"}
            described.append({**asdict(report), "recipe_source": of, **counts})
        return described


def _with_rows(lists: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    """All values, and the row of each, the last row first."""
    counts = np.diff(lists.offsets.to_numpy())
    return lists.values.to_numpy(), np.repeat(np.arange(len(counts)), counts)[::-1]


def _is_cut(index: pa.RecordBatch, lengths: str, tokenizer: TextTokenizer | None) -> np.ndarray:
    """Whether a text is as long as the limit; one that just fits counts too."""
    if tokenizer is None or tokenizer.max_tokens is None:
        return np.zeros(index.num_rows, dtype=bool)
    return _values(index, lengths) >= tokenizer.max_tokens


def _open_arrays(folder: Path, with_guide: bool, with_labels: bool) -> dict[str, ArrayFile]:
    def array(name: str, dtype: type, columns: int | None = None) -> ArrayFile:
        return ArrayFile(folder / f"{name}.npy", dtype, columns)

    names = ("anchors", "positives", "negatives", "negative_offsets", "further", "further_offsets")
    arrays = {name: array(name, np.int64) for name in names}
    arrays |= {"source": array("source", np.int32), "number": array("number", np.int64)}
    arrays |= {"identity": array("identity", np.int64), "at": array("at", np.int64)}
    arrays["student_lengths"] = array("student_lengths", np.int32)
    if with_labels:
        arrays["label"] = array("label", np.int64)
    if with_guide:
        arrays["guide_lengths"] = array("guide_lengths", np.int32)
        arrays["guide_keys"] = array("guide_keys", np.uint64, columns=2)
    for offsets in ("negative_offsets", "further_offsets"):
        arrays[offsets].append(np.zeros(1))
    return arrays


def _append_texts(arrays: dict[str, ArrayFile], index: pa.RecordBatch, is_new: np.ndarray, start: int) -> None:
    arrays["at"].append(start + _values(index, "at")[is_new].astype(np.int64))
    arrays["identity"].append(_values(index, "identity")[is_new])
    arrays["student_lengths"].append(_values(index, "student_length")[is_new])
    if "guide_keys" in arrays:
        arrays["guide_lengths"].append(_values(index, "guide_length")[is_new])
        arrays["guide_keys"].append(_pairs(index, "guide_key")[is_new])


def _append_rows(
    arrays: dict[str, ArrayFile], rows: pa.RecordBatch, numbers: np.ndarray, groups: np.ndarray, row_offset: int
) -> None:
    for name, offsets in (("negatives", "negative_offsets"), ("further", "further_offsets")):
        lists = rows.column(name)
        arrays[offsets].append(arrays[name].length + lists.offsets.to_numpy()[1:])
        arrays[name].append(numbers[lists.values.to_numpy()])
    arrays["anchors"].append(numbers[_values(rows, "anchor")])
    arrays["positives"].append(numbers[_values(rows, "positive")])
    arrays["source"].append(groups[_values(rows, "group")])
    arrays["number"].append(row_offset + _values(rows, "number"))
    if "label" in arrays:
        has_label = "label" in rows.schema.names
        arrays["label"].append(_values(rows, "label") if has_label else np.zeros(rows.num_rows, np.int64))


def _fetch(store: Store, files: dict[str, list[Any]], folder: Path) -> dict[str, Path]:
    """Name → path on this machine."""

    def fetch(name: str) -> Path:
        digest, size = files[name]
        path = (store.local or folder) / name
        try:
            if store.local is None:
                store.download(name, path)
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        check_file(path, size, None if store.local else digest)
        return path

    with ThreadPoolExecutor(TRANSFERS) as pool:
        return dict(zip(files, pool.map(fetch, files), strict=True))


def _read(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return batch.column(name).to_numpy()


def _pairs(batch: pa.RecordBatch, name: str) -> UInt64[np.ndarray, "n 2"]:
    return batch.column(name).values.to_numpy().reshape(-1, 2)
