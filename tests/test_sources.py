"""Rows out of files of every format: right values, right order, right numbers, nothing lost silently."""

import bz2
import csv
import gzip
import json
import os
import pickle
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from facts import assert_tells

from gist_dist.common.errors import UserError
from gist_dist.config import DataConfig, SourceConfig
from gist_dist.data import formats, sources
from gist_dist.data.sources import Source, open_sources

ROWS = [
    {"anchor": f"question {i}", "positive": f'answer "{i}",\nsecond line é 東京', "negative": f"no {i}"}
    for i in range(50)
]


def source(path, root=None, **config) -> Source:
    return open_sources(DataConfig(sources=(SourceConfig(path=str(path), **config),), root=root))[0]


def refused(path, **config) -> str:
    with pytest.raises(UserError) as caught:
        list(source(path, **config).read())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(rows=None) -> pa.Table:
    return pa.Table.from_pylist(ROWS if rows is None else rows)


def write_jsonl(path: Path, rows=None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return path


def write_csv(path: Path, delimiter=",", rows=None) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["anchor", "positive", "negative"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS if rows is None else rows)
    return path


def write_stream(path: Path) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as stream:
        stream.write_table(table(), max_chunksize=7)
    return path


def write_file(path: Path) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table().schema) as file:
        file.write_table(table(), max_chunksize=7)
    return path


def write_compressed(path: Path, inner: Path) -> Path:
    content = inner.read_bytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".bz2":
        path.write_bytes(bz2.compress(content))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    return path


FORMATS = {
    "parquet": lambda d: (pq.write_table(table(), d / "x.parquet", row_group_size=13), d / "x.parquet")[1],
    "jsonl": lambda d: write_jsonl(d / "x.jsonl"),
    "jsonl of a dotted name": lambda d: write_jsonl(d / "x.json.v2.jsonl"),
    "jsonl.gz": lambda d: write_compressed(d / "x.jsonl.gz", write_jsonl(d / "plain")),
    "jsonl.bz2": lambda d: write_compressed(d / "x.jsonl.bz2", write_jsonl(d / "plain")),
    "jsonl.zst": lambda d: write_compressed(d / "x.jsonl.zst", write_jsonl(d / "plain")),
    "json array": lambda d: ((d / "my.data.json").write_text(json.dumps(ROWS, indent=1)), d / "my.data.json")[1],
    "json lines in .json": lambda d: write_jsonl(d / "x.json"),
    "csv": lambda d: write_csv(d / "x.csv"),
    "csv.gz": lambda d: write_compressed(d / "x.csv.gz", write_csv(d / "plain")),
    "tsv": lambda d: write_csv(d / "x.tsv", "\t"),
    "csv with a byte order mark": lambda d: (
        (d / "x.csv").write_bytes(b"\xef\xbb\xbf" + write_csv(d / "plain").read_bytes()), d / "x.csv")[1],
    "jsonl with a byte order mark": lambda d: (
        (d / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + write_jsonl(d / "plain").read_bytes()), d / "x.jsonl")[1],
    "arrow file": lambda d: write_file(d / "x.arrow"),
    "arrow stream": lambda d: write_stream(d / "x.arrow"),
    "feather": lambda d: (pa.feather.write_feather(table(), d / "x.feather"), d / "x.feather")[1],
    "dictionary-encoded": lambda d: (pq.write_table(pa.table({
        name: table()[name].dictionary_encode() for name in ("anchor", "positive", "negative")}), d / "d.parquet"),
        d / "d.parquet")[1],
    "string views": lambda d: (pq.write_table(table().cast(pa.schema(
        [(name, pa.string_view()) for name in ("anchor", "positive", "negative")])), d / "d.parquet"),
        d / "d.parquet")[1],
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(formats, "BATCH_ROWS", 8)
    read = source(FORMATS[kind](tmp_path))
    rows = list(read.read())
    assert [(r.anchor, r.positive, r.negatives) for r in rows] == [
        (r["anchor"], r["positive"], (r["negative"],)) for r in ROWS
    ]
    assert [r.number for r in rows] == list(range(50))
    assert (read.report.rows_read, read.report.rows_used, read.report.dropped) == (50, 50, {})


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('anchor,positive,negative\n1984,NA,null\n007,1e5,\n"true","2020-01-01",nan\n')
    rows = [(r.anchor, r.positive, r.negatives) for r in source(path).read()]
    assert rows == [("1984", "NA", ("null",)), ("007", "1e5", ()), ("true", "2020-01-01", ("nan",))]


def test_a_folder_written_by_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert [r.anchor for r in source(tmp_path / "one").read()] == [r["anchor"] for r in ROWS]
    datasets.DatasetDict(train=data, test=data.select(range(5))).save_to_disk(tmp_path / "two")
    assert len(list(source(tmp_path / "two").read())) == 50  # train, where there are splits
    assert len(list(source(tmp_path / "two", split="test").read())) == 5


@pytest.fixture
def splits(tmp_path) -> Path:
    folder = tmp_path / "splits"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name, rows in {
        "data/train-00000-of-00002.jsonl": ROWS[:3], "data/train-00001-of-00002.jsonl": ROWS[3:5],
        "data/test-0.jsonl": ROWS[5:6],
        "dev.jsonl": ROWS[6:8], "_note.jsonl": ROWS[:1], ".cache/train.jsonl": ROWS[:1],
    }.items():  # fmt: skip
        write_jsonl(folder / name, rows)
    (folder / "README.md").write_text("not data")
    return folder


@pytest.mark.parametrize(("split", "expected"), [(None, range(5)), ("train", range(5)), ("test", [5]), ("dev", [6, 7])])
def test_splits_of_a_folder(splits, split, expected):
    assert [r.anchor for r in source(splits, split=split).read()] == [ROWS[i]["anchor"] for i in expected]


def test_a_folder_that_is_not_of_splits_is_read_whole(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[:2])
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "a.jsonl", ROWS[2:3])
    write_jsonl(tmp_path / "train.jsonl", ROWS[3:4])
    assert [r.number for r in source(tmp_path).read()] == [0, 1, 2, 3]
    assert [r.anchor for r in source(tmp_path, split="sub").read()] == [ROWS[2]["anchor"]]


def test_wrong_splits_are_named(splits):
    assert "no split 'valid' in " in refused(splits, split="valid") and "(has: dev, test, train)" in refused(
        splits, split="valid"
    )
    assert_tells(refused(splits / "dev.jsonl", split="dev"), "dev.jsonl … one file … remove split")


def test_globs_and_root(tmp_path, monkeypatch):
    for i in range(3):
        write_jsonl(tmp_path / f"part-{i}.jsonl", ROWS[i : i + 1])
    write_jsonl(tmp_path / "other.jsonl", ROWS[9:])
    assert [r.anchor for r in source(tmp_path / "part-*.jsonl").read()] == [r["anchor"] for r in ROWS[:3]]
    assert [r.anchor for r in source("part-[12].jsonl", root=str(tmp_path)).read()] == [r["anchor"] for r in ROWS[1:3]]
    monkeypatch.chdir(tmp_path)
    assert len(list(source("other.jsonl").read())) == 41
    write_jsonl(tmp_path / "a[1].jsonl", ROWS[:4])  # a name that looks like a glob
    assert len(list(source("a[1].jsonl").read())) == 4
    assert "no file matches" in refused("none-*.jsonl")


def test_uris_are_read_through_arrow(tmp_path):
    pq.write_table(table(), tmp_path / "x.parquet")
    assert len(list(source(f"file://{tmp_path}/x.parquet").read())) == 50
    assert len(list(source(f"file://{tmp_path}").read())) == 50
    assert "no file or folder file:///none" in refused("file:///none/here.parquet")
    assert_tells(
        refused("nosuch://bucket/x.parquet"),
        "data.sources[0] … nosuch://bucket/x.parquet … 'nosuch' … s3, gs, hdfs, hf, https … correct path",
    )


def test_other_schemes_are_read_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, rows in {"a/x-0.jsonl": ROWS[:3], "a/x-1.jsonl": ROWS[3:5], "a/b/x-2.jsonl": ROWS[5:6]}.items():
        memory.pipe(f"/sources/{name}", "".join(json.dumps(row) + "\n" for row in rows).encode())
    pq.write_table(table(), memory.open("/sources/all.parquet", "wb"), row_group_size=13)
    assert [r.anchor for r in source("memory://sources/a").read()] == [ROWS[i]["anchor"] for i in (5, 0, 1, 2, 3, 4)]
    read = source("memory://sources/all.parquet", max_rows=40)
    assert [r.anchor for r in pickle.loads(pickle.dumps(read)).read()] == [r["anchor"] for r in ROWS[:40]]
    first = read.fingerprint()
    assert source("memory://sources/all.parquet").fingerprint() == first
    pq.write_table(table(ROWS[::-1]), memory.open("/sources/all.parquet", "wb"), row_group_size=13)
    assert source("memory://sources/all.parquet").fingerprint() != first
    globs = {"a/x-*.jsonl": 5, "a/x-[!0].jsonl": 2, "a/x-?.jsonl": 5, "a/**/x-*.jsonl": 6, "*/b/*": 1, "*.parquet": 50}
    for pattern, count in globs.items():
        assert len(list(source(f"memory://sources/{pattern}").read())) == count, pattern
    assert_tells(refused("memory://sources/*.csv"), "data.sources[0] … memory://sources/*.csv")
    assert_tells(refused("memory://none/x.csv"), "data.sources[0] … memory://none/x.csv")


class S3(BaseHTTPRequestHandler):
    """What reading from a bucket needs: a listing, sizes and ranges, of the files of one folder."""

    folder: Path

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        address = urlsplit(self.path)
        query, key = parse_qs(address.query), address.path.strip("/").partition("/")[2]
        file = self.folder / key
        if address.path.startswith("/secret"):
            self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        elif "list-type" in query:
            start = query.get("prefix", [""])[0]
            keys = sorted(str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file())
            found = [
                f"<Contents><Key>{k}</Key><Size>{(self.folder / k).stat().st_size}</Size>"
                "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
                for k in keys if k.startswith(start)
            ]  # fmt: skip
            counts = f"<IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>"
            self.answer(200, f"<ListBucketResult>{counts}{''.join(found)}</ListBucketResult>".encode())
        elif key and not file.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            content = file.read_bytes() if key else b""
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last or len(content)) + 1]
            self.answer(206 if "Range" in self.headers else 200, part)

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Fri, 02 Jan 2026 03:04:05 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """(folder behind a bucket, options of its URIs)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (S3,), {"folder": tmp_path}))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield tmp_path, f"?scheme=http&region=any&endpoint_override=127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_s3(bucket):
    folder, options = bucket
    (folder / "deep" / "er").mkdir(parents=True)
    pq.write_table(table(ROWS[:20]), folder / "deep" / "a.parquet", row_group_size=7)
    pq.write_table(table(ROWS[20:]), folder / "deep" / "b.parquet")
    write_stream(folder / "deep" / "er" / "c.arrow")
    for path in ("deep/*.parquet", "deep/[ab].parquet", "de*/?.parquet"):
        read = source(f"s3://bucket/{path}{options}")
        rows = [r.anchor for part in read.parts() for r in pickle.loads(pickle.dumps(read)).rows(part, read.report)]
        assert rows == [r["anchor"] for r in ROWS], path
    assert len(list(source(f"s3://bucket/deep/er{options}", max_rows=8).read())) == 8
    assert [len(f) for f in source(f"s3://bucket/deep/er/c.arrow{options}").fingerprint()] == [3]
    assert "no file or folder s3://bucket/none.csv?" in refused(f"s3://bucket/none.csv{options}")
    message = refused(f"s3://secret/x.csv{options}")
    assert "can't be reached: " in message and "ACCESS_DENIED" in message
    assert_tells(message, "data.sources[0] … check the address … credentials")


def test_places_out_of_reach(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    message = refused("s3://bucket/x.csv?scheme=http&region=any&endpoint_override=127.0.0.1:9")
    assert message.startswith("data.sources[0]: s3://bucket/x.csv?") and "can't be reached: " in message
    assert_tells(message, "data.sources[0] … check the address … credentials")
    message = refused("gs://anonymous@bucket/x.csv?scheme=http&endpoint_override=127.0.0.1:9&retry_limit_seconds=1")
    assert_tells(message, "data.sources[0] … check the address … credentials")
    assert_tells(refused("s3://b/x.csv?nosuch=1"), "s3://b/x.csv … 'nosuch'")
    assert_tells(refused("hdfs://none:1/x.csv"), "data.sources[0] … hdfs://none:1/x.csv")


@pytest.mark.parametrize(
    ("columns", "cells", "expected"),
    [
        (None, {"negatives": [["a", "b"], [], None, ["c", None]]}, [("a", "b"), (), (), ("c",)]),
        (None, {"negative": ["a", None, "b", "c"]}, [("a",), (), ("b",), ("c",)]),
        (["x", "y"], {"x": ["a", None, "b", "c"], "y": ["d", "e", None, None]}, [("a", "d"), ("e",), ("b",), ("c",)]),
        ("x", {"x": ["a", "b", "c", "d"], "negative": ["z"] * 4}, [("a",), ("b",), ("c",), ("d",)]),
        (["x", "l"], {"x": ["a", None, "b", "c"], "l": [["d"], ["e", "f"], None, []]},
         [("a", "d"), ("e", "f"), ("b",), ("c",)]),
        ([], {"negative": ["a"] * 4}, [()] * 4),
        (None, {}, [()] * 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_negatives_of_all_shapes(tmp_path, columns, cells, expected, kind):
    data = {"anchor": list("pqrs"), "positive": list("tuvw"), **cells}
    if kind == "parquet":
        pq.write_table(pa.table(data), tmp_path / "x.parquet")
    else:
        write_jsonl(tmp_path / "x.jsonl", pa.table(data).to_pylist())
    read = source(tmp_path / f"x.{kind}", columns={} if columns is None else {"negatives": columns})
    assert [r.negatives for r in read.read()] == expected


def test_unusable_rows_are_counted_and_named_and_numbers_go_on(tmp_path):
    bad = [
        {"anchor": "", "positive": "p"}, {"anchor": "a", "positive": None}, {"positive": "p"},
        {"anchor": "a", "positive": 3},
        {"anchor": "a", "positive": "p", "negatives": ["n", "  "]}, {"anchor": "a", "positive": "\ud800"},
        {"anchor": "a", "positive": ["p"]},
    ]  # fmt: skip
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0], *bad])
    write_jsonl(tmp_path / "b.jsonl", [ROWS[1], bad[0], ROWS[2]])
    read = source(tmp_path, columns={"negatives": []})
    assert [r.number for r in read.read()] == [0, 5, 7, 8, 10]
    read = source(tmp_path / "a.jsonl")
    assert [r.number for r in read.read()] == [0, 5, 7]
    report = read.report
    assert report.dropped == {
        "anchor is empty": 1, "positive is missing": 1, "anchor is missing": 1, "positive is int, not text": 1,
        "positive has a lone surrogate, which is no character": 1,
    }  # fmt: skip
    assert report.rows_read == 8 and report.rows_used == 3
    assert report.first_dropped[0] == "a.jsonl row 1: anchor is empty"
    assert "5 of 8 rows: anchor is empty (1)" in report.complaint()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow file", "arrow stream", "feather"])
def test_max_rows_and_columns_read_twice(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(formats, "BATCH_ROWS", 8)
    path = FORMATS[kind](tmp_path)
    read = source(path, max_rows=19, columns={"positive": "anchor", "negatives": ["anchor"]})
    rows = list(read.read())
    assert len(rows) == read.report.rows_read == 19
    assert all(r.anchor == r.positive == r.negatives[0] for r in rows)


@pytest.mark.parametrize("max_rows", [None, 1, 19, 26, 34, 1000])
@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow file", "arrow stream", "json array", "folder", "texts"])
def test_parts_joined_are_the_source_also_where_they_are_read_elsewhere(tmp_path, monkeypatch, kind, max_rows):
    monkeypatch.setattr(formats, "BATCH_ROWS", 4)
    monkeypatch.setattr(sources, "PART_ROWS", 10)
    path, num_parts, expected = tmp_path / "data", 1, [*ROWS]
    path.mkdir()
    if kind == "folder":  # two counted files, the first with one row group of 50 rows, the second with many small ones
        pq.write_table(table(), path / "a.parquet")
        pq.write_table(table(), path / "b.parquet", row_group_size=3)
        expected, num_parts = ROWS * 2, 5 + 6
    elif kind == "texts":
        for i in range(3):
            write_jsonl(path / f"{i}.jsonl", ROWS[10 * i : 10 * i + 10])
        expected, num_parts = ROWS[:30], 3
    else:
        path = FORMATS[kind](path)
        num_parts = {"parquet": 8, "arrow file": 7, "arrow stream": 7}.get(kind, 1)
    read = source(path, max_rows=max_rows)
    parts = read.parts()
    if max_rows is None:
        assert len(parts) == num_parts and len(set(parts)) == num_parts
    reports, rows = [], []
    for part in reversed(parts):  # in any order, by any process
        elsewhere, here = pickle.loads(pickle.dumps((read, part)))
        reports.insert(0, elsewhere.new_report())
        found = list(elsewhere.rows(here, reports[0]))
        assert [row.number for row in found] == list(range(len(found))) and len(found) == reports[0].rows_used
        rows[:0] = [row.anchor for row in found]
    assert rows == [row["anchor"] for row in expected[:max_rows]]
    total = read.new_report()
    for report in reports:
        total.add(report)
    assert total.rows_read == total.rows_used == len(rows)
    assert [row.number for row in read.read()] == list(range(len(rows))) and read.report == total


def test_unusable_rows_keep_their_numbers_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_ROWS", 10)
    rows = [dict(row, anchor=None if i in (3, 17) else row["anchor"]) for i, row in enumerate(ROWS[:20])]
    pq.write_table(table(rows), tmp_path / "x.parquet", row_group_size=5)
    read = source(tmp_path / "x.parquet")
    report, numbers = read.new_report(), []
    for part in read.parts():
        numbers.append([row.number for row in read.rows(part, report)])
    assert numbers == [[0, 1, 2, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 8, 9]]
    assert report.first_dropped == [f"x.parquet row {i}: anchor is missing" for i in (3, 17)]
    assert [row.number for row in read.read()] == [i for i in range(20) if i not in (3, 17)]


def test_filters_drop_and_count_by_field_and_bound(tmp_path):
    texts = ["four words are here", "東京 の", "a", "word " * 500, "w" * 3000]
    rows = [{"anchor": "an anchor", "positive": text} for text in texts]
    rows += [{"anchor": "an anchor", "positive": "a positive", "negatives": ["short one", "z"]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert len(list(source(path).read())) == 6
    read = source(path, filters={"min_characters": 2, "max_characters": 2999, "min_words": 2, "max_words": 400})
    assert [row.positive for row in read.read()] == texts[:2]
    assert read.report.dropped == {
        "positive has fewer than 2 characters (filters.min_characters)": 1,
        "positive has more than 400 words (filters.max_words)": 1,
        "positive has more than 2999 characters (filters.max_characters)": 1,
        "negative has fewer than 2 characters (filters.min_characters)": 1,
    }
    assert len(list(source(path, filters={"max_words": 500}).read())) == 6
    assert len(list(source(path, filters={"max_words": 499}).read())) == 5
    assert len(list(source(path, filters={"min_words": 3}).read())) == 0  # of any role


MEDI = [
    {"query": ["Represent the question:", "what is rain"], "pos": ["Represent the page:", "water from clouds"],
     "neg": ["Represent the page:", "a kind of tea"], "task_name": "wiki"},
    {"query": ["", "who wrote it"], "pos": ["", "an author did"], "neg": ["", "nobody"], "task_name": "books"},
    {"query": ["Same:", "a b"], "pos": ["Same:", "b a"], "neg": [["Same:", "c"], ["Other:", "d"]], "task_name": "wiki"},
    {"query": ["Same:", "x"], "pos": ["Same:", "y"], "neg": None, "task_name": "books"},
]  # fmt: skip
MEDI_COLUMNS = {"anchor": "query", "positive": "pos", "negatives": "neg"}


def write_medi(path: Path, rows=MEDI) -> Path:
    """A list, as MEDI is; parquet, with the negatives as lists of pairs."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4))
    else:
        pairs = [[row["neg"]] if row["neg"] and isinstance(row["neg"][0], str) else row["neg"] for row in rows]
        pq.write_table(table([row | {"neg": neg} for row, neg in zip(rows, pairs, strict=True)]), path)
    return path


@pytest.mark.parametrize("name", ["medi.json", "medi.parquet"])
def test_instruction_pairs_of_the_original_dataset(tmp_path, name):
    path = write_medi(tmp_path / name)
    read = source(path, columns=MEDI_COLUMNS | {"instructions": "drop"}, split_by="task_name")
    assert [row[:3] for row in read.read()] == [
        ("what is rain", "water from clouds", ("a kind of tea",)), ("who wrote it", "an author did", ("nobody",)),
        ("a b", "b a", ("c", "d")), ("x", "y", ()),
    ]  # fmt: skip
    assert [row.group for row in read.read()] == ["wiki", "books", "wiki", "books"]
    read = source(path, columns=MEDI_COLUMNS | {"instructions": "prepend"})
    assert [row[:3] for row in read.read()] == [
        ("Represent the question: what is rain", "Represent the page: water from clouds",
         ("Represent the page: a kind of tea",)), ("who wrote it", "an author did", ("nobody",)),
        ("Same: a b", "Same: b a", ("Same: c", "Other: d")), ("Same: x", "Same: y", ()),
    ]  # fmt: skip
    assert [row.group for row in read.read()] == [None] * 4


@pytest.mark.parametrize("kind", ["drop", "prepend"])
def test_cells_that_are_no_pairs_are_counted(tmp_path, kind):
    bad = [
        {"query": "text"}, {"query": ["i", "a", "b"]}, {"query": ["i", None]}, {"query": ["i", " "]}, {"query": None},
        {"neg": ["i", "a", "b"]}, {"neg": [["i", "a"], "b"]}, {"query": {"i": "a"}}, {"neg": [["i", ""]]},
    ]  # fmt: skip
    path = write_medi(tmp_path / "medi.json", [MEDI[0], *(MEDI[0] | cell for cell in bad)])
    read = source(path, columns=MEDI_COLUMNS | {"instructions": kind})
    assert [len(row.negatives) for row in read.read()] == [1, 0]
    assert read.report.dropped == {
        "anchor is no [instruction, text] pair (columns.instructions)": 4, "anchor is empty": 1, "anchor is missing": 1,
        "negative is no [instruction, text] pair (columns.instructions)": 2,
    }  # fmt: skip


def test_pairs_without_columns_instructions_say_so(tmp_path):
    read = source(write_medi(tmp_path / "medi.json"), columns=MEDI_COLUMNS)
    assert not list(read.read())
    assert read.report.dropped == {
        "anchor is a list, not text (if it is [instruction, text], set columns.instructions)": 4
    }
    assert_tells(
        refused(write_medi(tmp_path / "medi.parquet"), columns=MEDI_COLUMNS),
        "data.sources[0] … 'query' … medi.parquet … list<element: string> … columns.anchor … columns.instructions",
    )
    pq.write_table(table(), tmp_path / "x.parquet")
    assert_tells(
        refused(tmp_path / "x.parquet", columns={"instructions": "drop"}),
        "data.sources[0] … 'anchor' … x.parquet … string … [instruction, text] … set columns.anchor",
    )


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_groups_are_the_values_as_text(tmp_path, kind):
    for values, groups in (([1, 2, 1], ["1", "2", "1"]), ([True, False, True], ["True", "False", "True"])):
        rows = [row | {"task": value} for row, value in zip(ROWS, values, strict=False)]
        path = tmp_path / f"x.{kind}"
        if kind == "parquet":
            pq.write_table(table(rows), path)
        else:
            write_jsonl(path, rows)
        assert [row.group for row in source(path, split_by="task").read()] == groups


def test_rows_without_a_group_are_counted_and_missing_columns_named(tmp_path):
    values = ["a", None, "", ["b"], {"c": 1}, "d"]
    path = write_jsonl(tmp_path / "x.jsonl", [row | {"task": value} for row, value in zip(ROWS, values, strict=False)])
    read = source(path, split_by="task")
    assert [(row.number, row.group) for row in read.read()] == [(0, "a"), (5, "d")]
    assert read.report.dropped == {
        "'task' (split_by) is missing": 1, "'task' (split_by) is empty": 1,
        "'task' (split_by) is list, not a single value": 1, "'task' (split_by) is dict, not a single value": 1,
    }  # fmt: skip
    assert_tells(
        refused(path, split_by="topic"),
        "data.sources[0] … 'topic' … x.jsonl … 'anchor', 'positive', 'negative', 'task' … set split_by",
    )
    pq.write_table(table([row | {"task": ["t"]} for row in ROWS]), tmp_path / "x.parquet")
    assert_tells(
        refused(tmp_path / "x.parquet", split_by="task"), "'task' … x.parquet … list<element: string> … set split_by"
    )


def test_classification_sets(tmp_path):
    rows = [{"t": "good", "l": 1}, {"t": "", "l": 0}, {"t": "bad", "l": None}, {"t": "fine words", "l": 0}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    read = source(path, columns={"text": "t", "label": "l"})
    assert list(read.labelled()) == [("good", "1"), ("fine words", "0")]
    assert read.report.dropped == {"text is empty": 1, "'l' (columns.label) is missing": 1}
    assert (read.report.rows_read, read.report.rows_used) == (4, 2)
    read = source(path, columns={"text": "t", "label": "l"}, filters={"min_words": 2}, max_rows=4)
    assert list(read.labelled()) == [("fine words", "0")]
    assert_tells(refused(path, columns={"text": "t", "label": "x"}), "'x' … x.jsonl … 't', 'l' … set columns.label")
    pq.write_table(pa.table({"t": [1, 2], "l": ["a", "b"]}), tmp_path / "x.parquet")
    assert_tells(
        refused(tmp_path / "x.parquet", columns={"text": "t", "label": "l"}),
        "'t' … x.parquet … int64 … set columns.text",
    )
    assert_tells(
        refused(path, columns={"text": "t", "label": "l"}, split_by="l"),
        "data.sources[0] … split_by = l … classification … remove split_by",
    )


def test_a_missing_column_lists_those_there_are(tmp_path):
    pq.write_table(table(), tmp_path / "pairs.parquet")
    assert_tells(
        refused(tmp_path / "pairs.parquet", columns={"positive": "doc"}),
        "data.sources[0] … 'doc' … pairs.parquet … 'anchor', 'positive', 'negative' … set columns.positive",
    )
    write_csv(tmp_path / "x.csv")
    assert_tells(refused(tmp_path / "x.csv", columns={"negatives": "no"}), "'no' … x.csv … 'anchor'")


def test_a_column_of_another_type_is_named(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(pa.table({"anchor": ["a"], "positive": [7], "negative": ["n"]}), tmp_path / "b.parquet")
    assert_tells(refused(tmp_path), "data.sources[0] … 'positive' … b.parquet … int64 … a.parquet … leave it out")
    assert_tells(refused(tmp_path / "b.parquet"), "'positive' … b.parquet … int64 … set columns.positive")
    pq.write_table(pa.table({"anchor": [["a"]], "positive": ["p"]}), tmp_path / "c.parquet")
    assert_tells(refused(tmp_path / "c.parquet"), "'anchor' … c.parquet … list<")


def test_a_column_that_only_some_files_have(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(table().drop_columns(["positive"]), tmp_path / "b.parquet")
    assert_tells(
        refused(tmp_path), "data.sources[0] … 'positive' … a.parquet … b.parquet … 'anchor', 'negative' … leave it out"
    )
    pq.write_table(table().drop_columns(["negative"]), tmp_path / "b.parquet")
    assert_tells(refused(tmp_path), "'negative' … a.parquet … b.parquet")
    assert len(list(source(tmp_path, columns={"negatives": []}).read())) == 100


def test_an_empty_file_among_others_has_no_rows(tmp_path):
    for suffix, write in ((".csv", write_csv), (".jsonl", write_jsonl)):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / f"a{suffix}").write_bytes(b"")
        write(folder / f"b{suffix}")
        assert len(list(source(folder).read())) == 50
        assert refused(folder / f"a{suffix}") == f"data.sources[0]: {folder}/a{suffix} is empty"
    (tmp_path / "x.parquet").write_bytes(b"")
    assert_tells(refused(tmp_path / "x.parquet"), "x.parquet … 0 bytes")


def test_json_files_where_rows_differ(tmp_path):
    """A file without negatives, an empty one, and texts that become numbers: the rows tell, one by one."""
    write_jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b"}])
    (tmp_path / "b.jsonl").write_bytes(b"")
    write_jsonl(tmp_path / "c.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "d.jsonl", [dict(ROWS[0], positive=7), ROWS[1]])
    read = source(tmp_path)
    assert [(row.anchor, row.negatives) for row in read.read()] == [
        ("a", ()), (ROWS[0]["anchor"], ("no 0",)), (ROWS[1]["anchor"], ("no 1",)),
    ]  # fmt: skip
    assert read.report.dropped == {"positive is int, not text": 1}
    assert read.report.first_dropped == ["d.jsonl row 0: positive is int, not text"]
    write_jsonl(tmp_path / "e.jsonl", [{"anchor": "a"}])
    assert_tells(refused(tmp_path), "'positive' … a.jsonl … e.jsonl … 'anchor' … fix that file")


def test_folders_of_several_formats(tmp_path):
    write_jsonl(tmp_path / "x.jsonl")
    write_csv(tmp_path / "x.csv")
    message = (
        "data.sources[0]: {} has files of 2 formats (x.csv, x.jsonl); name those of one with a glob, such as *.jsonl"
    )
    assert refused(tmp_path) == message.format(tmp_path)
    assert refused(tmp_path / "x.*") == message.format(tmp_path / "x.*")
    assert len(list(source(tmp_path / "*.csv").read())) == 50
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    assert_tells(refused(tmp_path / "notes"), f"data.sources[0] … arrow, csv, jsonl, parquet … {tmp_path / 'notes'}")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json array", "csv", "arrow file"])
def test_long_texts_are_read_at_once(tmp_path, monkeypatch, kind):
    """A megabyte, and one that spans many blocks of the reader."""
    rows = [dict(ROWS[0], anchor="é 京 " * 180_000), dict(ROWS[1], positive='word "x"\n' * 1_000_000), *ROWS[2:]]
    monkeypatch.setitem(globals(), "ROWS", rows)
    path = FORMATS[kind](tmp_path)
    started = time.process_time()
    read = list(source(path).read())
    assert time.process_time() - started < 2
    assert [(r.anchor, r.positive) for r in read] == [(r["anchor"], r["positive"]) for r in rows]
    assert len(read[0].anchor.encode()) > 10**6


def test_long_json_lists_are_read_in_blocks(tmp_path, monkeypatch):
    """Wherever a block ends: within a string, an escape, a number, between values."""
    rows = [{"anchor": f"é\\ {i} 🙂\n", "positive": "x" * (i % 7), "n": [i, {"f": -1.5e-3}]} for i in range(40)]
    for indent in (None, 2):
        content = json.dumps(rows, indent=indent)
        (tmp_path / "x.json").write_text(content)
        for size in (16, 23, 64, 101, len(content) - 1):
            monkeypatch.setattr(formats, "READ_BYTES", size)
            read = source(tmp_path / "x.json")
            assert [row.anchor for row in read.read()] == [r["anchor"] for r in rows if r["positive"]]


DAMAGED = """
cut.parquet mess.parquet empty.parquet text.parquet mess.arrow cut.arrow same.parquet bad.jsonl
late.jsonl list.jsonl bad.json deep.jsonl digits.jsonl latin.jsonl cut.jsonl.gz latin.csv head.csv
ragged.csv empty.csv what.xlsx chunk.parquet flipped.parquet same.arrow same.csv open.csv quote.csv wide.jsonl
blank.jsonl empty.jsonl open.json comma.json deep.json latin.json numbers.json
""".split()


def damaged(folder: Path) -> dict[str, tuple[bytes, str]]:
    pq.write_table(table(), folder / "good.parquet")
    parquet = (folder / "good.parquet").read_bytes()
    write_stream(folder / "good.arrow")
    line = b'{"anchor": "a", "positive": "b"}\n'
    latin = "anchor,positive\ncafé,b\n".encode("latin-1")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["anchor", "positive", "positive"])
    pq.write_table(twice, folder / "twice.parquet")
    pyarrow.feather.write_feather(twice, folder / "twice.feather")
    pq.write_table(table(), folder / "sums.parquet", compression="none", write_page_checksum=True)
    sums = (folder / "sums.parquet").read_bytes()
    chunk = pq.read_metadata(folder / "good.parquet").row_group(0).column(1)
    start, end = chunk.data_page_offset + 30, chunk.dictionary_page_offset + chunk.total_compressed_size
    garbage = parquet[:start] + os.urandom(end - start) + parquet[end:]
    return {
        "chunk.parquet": (garbage, "chunk.parquet can't be read: "),
        # One letter of one text: readable, but not what was written.
        "flipped.parquet": (sums.replace(b"question 17", b"question 99"), "flipped.parquet can't be read: could not "
                            "verify page integrity, CRC checksum verification failed"),
        "same.arrow": ((folder / "twice.feather").read_bytes(), "same.arrow has two columns 'positive'; rename one"),
        "same.csv": (b"anchor,positive,positive\na,b,c\n", "same.csv has two columns 'positive'; rename one"),
        "open.csv": (b'anchor,positive\na,b\nc,"d\n' + b"e,f\n" * 1000, "open.csv line 3 is no CSV (unexpected end "
                     "of data); fix it: a quote within a quoted cell is written twice, and one that opens a cell "
                     "closes it; or set format.quoting=none if quotes are part of the texts"),
        "quote.csv": (b'anchor,positive\n"6" pipe",b\n', "quote.csv line 2 is no CSV ("),
        "wide.jsonl": (line.decode().encode("utf-16-le"),
                       "wide.jsonl is UTF-16 or UTF-32 text, not UTF-8; set format.encoding"),
        "blank.jsonl": (b"\n \n\n", "blank.jsonl is empty"),
        "empty.jsonl": (b"", "empty.jsonl is empty"),
        "open.json": (b'[{"anchor": "a"},\n {"anchor": "b"}', "open.json line 2 is not JSON ("),
        "comma.json": (b'[{"anchor": "a"}\n {"anchor": "b"}]',
                       "comma.json line 2 is not JSON (Expecting ',' delimiter"),
        "deep.json": (b'[{"anchor": "a"},\n' + b"[" * 200_000, "deep.json line 2 can't be read ("),
        "latin.json": ('[{"anchor": "é"}]'.encode("latin-1"), "latin.json is not UTF-8 text; convert it"),
        "numbers.json": (b'[{"anchor": "a"},\n 7]', "numbers.json line 2 holds a JSON int, not an object"),
        "cut.parquet": (parquet[: len(parquet) // 2], "cut.parquet can't be read: "),
        "mess.parquet": (parquet[:40] + b"\xff" * 200 + parquet[240:], "mess.parquet can't be read: "),
        "empty.parquet": (b"", "empty.parquet can't be read: "),
        "text.parquet": (b"hello" * 100, "text.parquet can't be read: "),
        "mess.arrow": (b"hello" * 100, "mess.arrow can't be read: "),
        "cut.arrow": ((folder / "good.arrow").read_bytes()[:700], "cut.arrow can't be read: "),
        "same.parquet": ((folder / "twice.parquet").read_bytes(),
                         "same.parquet has two columns 'positive'; rename one"),
        "bad.jsonl": (line * 3 + b"{oops\n" + line, "bad.jsonl line 4 is not JSON ("),
        "late.jsonl": (line * 1500 + b"{oops\n", "late.jsonl line 1501 is not JSON ("),
        "list.jsonl": (line + b"[1]\n", "list.jsonl line 2 holds a JSON list, not an object"),
        "bad.json": (b'[{"anchor": "a"},\n {"anchor" "b"}]', "bad.json line 2 is not JSON ("),
        "deep.jsonl": (line + b"[" * 200_000 + b"\n", "deep.jsonl line 2 can't be read ("),
        "digits.jsonl": (line + b'{"a": ' + b"1" * 10_000 + b"}\n", "digits.jsonl line 2 can't be read ("),
        "latin.jsonl": (line + '{"anchor": "café"}\n'.encode("latin-1"), "latin.jsonl line 2 is not UTF-8 text"),
        "cut.jsonl.gz": (gzip.compress(os.urandom(5000).hex().encode())[:2000], "cut.jsonl.gz"),
        "latin.csv": (latin, "latin.csv is not UTF-8 text; convert it"),
        "head.csv": ("é,positive\na,b\n".encode("latin-1"), "head.csv is not UTF-8 text; convert it"),
        "ragged.csv": (b"anchor,positive\na,b\nc,d,e\n",
                       "ragged.csv line 3 has 3 cells where the header has 2; fix or remove it"),
        "empty.csv": (b"", "empty.csv is empty"),
        "what.xlsx": (b"x", "what.xlsx is of no known format (known: .parquet, "),
    }  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path, name):
    files = damaged(tmp_path)
    assert set(files) == set(DAMAGED)
    content, expected = files[name]
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(content)
    message = refused(path)
    assert expected in message and message.startswith("data.sources[0]: ")


def test_missing_files_are_named(tmp_path):
    assert "no file or folder" in refused(tmp_path / "none.parquet")
    assert "no file or folder" in refused("none.parquet")
    assert_tells(refused("org/name", root=str(tmp_path)), "org/name … correct path … data.root")
    (tmp_path / "empty").mkdir()
    assert_tells(refused(tmp_path / "empty"), "arrow, csv, jsonl, parquet … empty")


def test_the_fingerprint_changes_with_the_files(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl")
    first = source(path).fingerprint()
    assert source(path).fingerprint() == first
    os.utime(path, ns=(1, 1))
    assert source(path).fingerprint() != first


@pytest.fixture
def as_hub(tmp_path, monkeypatch):
    """Sources that `datasets` loads: of a local folder, as the Hub can't be asked here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "find_files", lambda *arguments: [])
    monkeypatch.setattr(formats, "go_offline_if_unreachable", lambda: False)
    folder = tmp_path / f"hub-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    pq.write_table(table().append_column("label", pa.array(range(50))), folder / "train.parquet")
    pq.write_table(table(ROWS[:4]), folder / "test.parquet")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_hub_datasets(as_hub, monkeypatch):
    monkeypatch.setattr(formats, "BATCH_ROWS", 8)
    read = source(as_hub)
    rows = list(read.read())
    assert [(r.anchor, r.positive, r.negatives) for r in rows] == [
        (r["anchor"], r["positive"], (r["negative"],)) for r in ROWS
    ]
    assert len(list(source(as_hub, split="test").read())) == 4
    assert read.fingerprint() == source(as_hub).fingerprint() != source(as_hub, split="test").fingerprint()
    assert "no split 'dev' in" in refused(as_hub, split="dev") and "(has: " in refused(as_hub, split="dev")
    assert "column 'q' not in" in refused(as_hub, columns={"anchor": "q"})
    assert "holds int64, not text" in refused(as_hub, columns={"anchor": "label"})


def test_a_missing_hub_dataset_is_one_sentence_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    message = refused("nobody/nothing-here")
    assert time.monotonic() - started < 20
    assert_tells(message, "data.sources[0] … 'nobody/nothing-here' … Hub is out of reach")


def test_without_a_network_nothing_hangs():
    code = (
        "from gist_dist.config import *; from gist_dist.data.sources import open_sources\n"
        "open_sources(DataConfig(sources=(SourceConfig(path='nobody/nothing-here'),)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert "UserError: data.sources[0]: 'nobody/nothing-here'" in done.stderr and "out of reach" in done.stderr


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv", "rows.arrow"])
def test_a_file_that_git_lfs_has_not_fetched_is_named_so(tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 90868376\n"
    (tmp_path / name).write_text(pointer)
    assert_tells(refused(tmp_path / name), f"{name} … Git LFS … git lfs pull")
