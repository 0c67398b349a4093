"""Rows out of files of every format: right values, right order, right numbers, nothing lost silently."""

import bz2
import csv
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from gist_dist.config import DataConfig, SourceConfig
from gist_dist.data import sources as module
from gist_dist.data.sources import Source, open_sources
from gist_dist.errors import UserError

ROWS = [
    {"anchor": f"question {i}", "positive": f'answer "{i}",\nsecond line é 東京', "negative": f"no {i}"}
    for i in range(50)
]


def source(path, root=None, **config) -> Source:
    return open_sources(DataConfig(sources=(SourceConfig(path=str(path), **config),), root=root))[0]


def refused(path, **config) -> str:
    with pytest.raises(UserError) as caught:
        list(source(path, **config).rows())
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
    monkeypatch.setattr(module, "BATCH_ROWS", 8)
    read = source(FORMATS[kind](tmp_path))
    rows = list(read.rows())
    assert [(r.anchor, r.positive, r.negatives) for r in rows] == [
        (r["anchor"], r["positive"], (r["negative"],)) for r in ROWS
    ]
    assert [r.number for r in rows] == list(range(50))
    assert (read.report.rows_read, read.report.rows_used, read.report.dropped) == (50, 50, {})


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('anchor,positive,negative\n1984,NA,null\n007,1e5,\n"true","2020-01-01",nan\n')
    rows = [(r.anchor, r.positive, r.negatives) for r in source(path).rows()]
    assert rows == [("1984", "NA", ("null",)), ("007", "1e5", ()), ("true", "2020-01-01", ("nan",))]


def test_a_folder_written_by_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert [r.anchor for r in source(tmp_path / "one").rows()] == [r["anchor"] for r in ROWS]
    datasets.DatasetDict(train=data, test=data.select(range(5))).save_to_disk(tmp_path / "two")
    assert len(list(source(tmp_path / "two").rows())) == 50  # train, where there are splits
    assert len(list(source(tmp_path / "two", split="test").rows())) == 5


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
    assert [r.anchor for r in source(splits, split=split).rows()] == [ROWS[i]["anchor"] for i in expected]


def test_a_folder_that_is_not_of_splits_is_read_whole(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[:2])
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "a.jsonl", ROWS[2:3])
    write_jsonl(tmp_path / "train.jsonl", ROWS[3:4])
    assert [r.number for r in source(tmp_path).rows()] == [0, 1, 2, 3]
    assert [r.anchor for r in source(tmp_path, split="sub").rows()] == [ROWS[2]["anchor"]]


def test_wrong_splits_are_named(splits):
    assert "no split 'valid' in " in refused(splits, split="valid") and "(has: dev, test, train)" in refused(
        splits, split="valid"
    )
    assert "is one file and has no splits; remove split" in refused(splits / "dev.jsonl", split="dev")


def test_globs_and_root(tmp_path, monkeypatch):
    for i in range(3):
        write_jsonl(tmp_path / f"part-{i}.jsonl", ROWS[i : i + 1])
    write_jsonl(tmp_path / "other.jsonl", ROWS[9:])
    assert [r.anchor for r in source(tmp_path / "part-*.jsonl").rows()] == [r["anchor"] for r in ROWS[:3]]
    assert [r.anchor for r in source("part-[12].jsonl", root=str(tmp_path)).rows()] == [r["anchor"] for r in ROWS[1:3]]
    monkeypatch.chdir(tmp_path)
    assert len(list(source("other.jsonl").rows())) == 41
    write_jsonl(tmp_path / "a[1].jsonl", ROWS[:4])  # a name that looks like a glob
    assert len(list(source("a[1].jsonl").rows())) == 4
    assert "no file matches" in refused("none-*.jsonl")


def test_uris_are_read_through_arrow(tmp_path):
    pq.write_table(table(), tmp_path / "x.parquet")
    assert len(list(source(f"file://{tmp_path}/x.parquet").rows())) == 50
    assert len(list(source(f"file://{tmp_path}").rows())) == 50
    assert "no file or folder file:///none" in refused("file:///none/here.parquet")
    assert "can't be opened" in refused("nosuch://bucket/x.parquet")


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
    assert [r.negatives for r in read.rows()] == expected


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
    assert [r.number for r in read.rows()] == [0, 5, 8, 10]
    read = source(tmp_path / "a.jsonl")
    assert [r.number for r in read.rows()] == [0]
    report = read.report
    assert report.dropped == {
        "anchor is empty": 1, "positive is missing": 1, "anchor is missing": 1, "positive is int, not text": 1,
        "negative is empty": 1, "positive has a lone surrogate, which is no character": 1,
        "positive is list, not text": 1,
    }  # fmt: skip
    assert report.rows_read == 8 and report.rows_used == 1
    assert report.first_dropped[0] == "a.jsonl row 1: anchor is empty"
    assert "7 of 8 rows: anchor is empty (1)" in report.complaint()


def test_max_rows_and_columns_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 8)
    write_jsonl(tmp_path / "x.jsonl")
    read = source(tmp_path / "x.jsonl", max_rows=19, columns={"positive": "anchor", "negatives": ["anchor"]})
    rows = list(read.rows())
    assert len(rows) == read.report.rows_read == 19
    assert all(r.anchor == r.positive == r.negatives[0] for r in rows)


def test_a_missing_column_lists_those_there_are(tmp_path):
    pq.write_table(table(), tmp_path / "pairs.parquet")
    assert refused(tmp_path / "pairs.parquet", columns={"positive": "doc"}) == (
        "data.sources[0]: column 'doc' not in pairs.parquet (has: 'anchor', 'positive', 'negative'); "
        "set columns.positive"
    )
    write_csv(tmp_path / "x.csv")
    assert "column 'no' not in x.csv (has: 'anchor'" in refused(tmp_path / "x.csv", columns={"negatives": "no"})


def test_a_column_of_another_type_is_named(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(pa.table({"anchor": ["a"], "positive": [7], "negative": ["n"]}), tmp_path / "b.parquet")
    assert "column 'positive' of b.parquet holds int64, not text; set columns.positive" in refused(tmp_path)
    pq.write_table(pa.table({"anchor": [["a"]], "positive": ["p"]}), tmp_path / "c.parquet")
    assert "column 'anchor' of c.parquet holds list<" in refused(tmp_path / "c.parquet")


DAMAGED = """
cut.parquet mess.parquet empty.parquet text.parquet mess.arrow cut.arrow same.parquet bad.jsonl
late.jsonl list.jsonl bad.json deep.jsonl digits.jsonl latin.jsonl cut.jsonl.gz latin.csv head.csv
ragged.csv empty.csv what.xlsx
""".split()


def damaged(folder: Path) -> dict[str, tuple[bytes, str]]:
    pq.write_table(table(), folder / "good.parquet")
    parquet = (folder / "good.parquet").read_bytes()
    write_stream(folder / "good.arrow")
    line = b'{"anchor": "a", "positive": "b"}\n'
    latin = "anchor,positive\ncafé,b\n".encode("latin-1")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["anchor", "positive", "positive"])
    pq.write_table(twice, folder / "twice.parquet")
    return {
        "cut.parquet": (parquet[: len(parquet) // 2], "cut.parquet can't be read: "),
        "mess.parquet": (parquet[:40] + b"\xff" * 200 + parquet[240:], "mess.parquet can't be read: "),
        "empty.parquet": (b"", "empty.parquet can't be read: "),
        "text.parquet": (b"hello" * 100, "text.parquet can't be read: "),
        "mess.arrow": (b"hello" * 100, "mess.arrow can't be read: "),
        "cut.arrow": ((folder / "good.arrow").read_bytes()[:700], "cut.arrow can't be read: "),
        "same.parquet": ((folder / "twice.parquet").read_bytes(), "same.parquet can't be read: "),
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
        "ragged.csv": (b"anchor,positive\na,b\nc,d,e\n", "ragged.csv can't be read: CSV parse error: Row #3: "),
        "empty.csv": (b"", "empty.csv can't be read: Empty CSV file"),
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
    assert "correct path, or data.root if it is elsewhere" in refused("org/name", root=str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no arrow, csv, jsonl, parquet file in folder" in refused(tmp_path / "empty")


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
    monkeypatch.setattr(module, "_find_files", lambda *arguments: [])
    monkeypatch.setattr(module, "go_offline_if_unreachable", lambda: False)
    folder = tmp_path / f"hub-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    pq.write_table(table().append_column("label", pa.array(range(50))), folder / "train.parquet")
    pq.write_table(table(ROWS[:4]), folder / "test.parquet")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_hub_datasets(as_hub, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 8)
    read = source(as_hub)
    rows = list(read.rows())
    assert [(r.anchor, r.positive, r.negatives) for r in rows] == [
        (r["anchor"], r["positive"], (r["negative"],)) for r in ROWS
    ]
    assert len(list(source(as_hub, split="test").rows())) == 4
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
    assert message == (
        "data.sources[0]: 'nobody/nothing-here' is no file here, and can't be had as a Hub dataset: "
        "the Hub is out of reach and its cache hasn't it"
    )


def test_without_a_network_nothing_hangs():
    code = (
        "from gist_dist.config import *; from gist_dist.data.sources import open_sources\n"
        "open_sources(DataConfig(sources=(SourceConfig(path='nobody/nothing-here'),)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert "UserError: data.sources[0]: 'nobody/nothing-here'" in done.stderr and "out of reach" in done.stderr
