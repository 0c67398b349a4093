"""Data files, prepared corpora and evaluation sets that are odd, damaged or meant to harm."""

import gzip
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.common.files import sealed, unsealed
from gist_dist.config import SourceConfig
from gist_dist.data import decode as batches
from gist_dist.data import formats, merge, places
from gist_dist.data.corpus import MANIFEST, prepare
from gist_dist.data.sources import Source
from gist_dist.evaluation.local_sets import own_task
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config

ROWS = [{"anchor": f"amber {word}", "positive": f"basin {word}", "task": "a"} for word in tiny.WORDS[:8]]


def source(path, **values) -> Source:
    return Source(SourceConfig(path=str(path), **values), 0, None)


def test_links_that_lead_in_circles_give_every_row_once(tmp_path):
    tiny.write_jsonl(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "deep").mkdir()
    for name in ("a", "b", "deep/c"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    started = time.monotonic()
    for path in (
        tmp_path,
        f"{tmp_path}/**/*.jsonl",
        f"{tmp_path}/**",
        f"{tmp_path}/*.jsonl",
        f"file://{tmp_path}/**/*.jsonl",
    ):
        assert len(list(source(path).read())) == len(ROWS), path
    assert time.monotonic() - started < 2


def test_a_linked_folder_is_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    tiny.write_jsonl(tmp_path / "elsewhere" / "x.jsonl", ROWS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "data", f"{tmp_path}/data/**/*.jsonl"):
        assert len(list(source(path).read())) == len(ROWS)


@pytest.mark.skipif(os.getuid() != 0, reason="takes root, to start a process that gives up its rights")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    file = tiny.write_jsonl(tmp_path / "open.jsonl", ROWS)
    code = (
        "import os, sys; from gist_dist.data.sources import Source; from gist_dist.config import SourceConfig\n"
        "from gist_dist.common.errors import UserError\n"
        "Source(SourceConfig(path=sys.argv[1]), 0, None)  # loads all code, which may be closed to others as well\n"
        "os.setgroups([]); os.setuid(65534)\n"
        "for path in sys.argv[2:]:\n"
        "    try: Source(SourceConfig(path=path), 0, None)\n"
        "    except UserError as error: print(error)"
    )
    for folder in (tmp_path, *list(tmp_path.parents)[:-1]):
        folder.chmod(folder.stat().st_mode | 0o711) if folder.is_relative_to("/tmp/pytest-of-root") else None
    paths = [str(tmp_path / "closed"), str(tmp_path / "closed" / "x.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, str(file), *paths], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("Permission denied" in line for line in lines), done


def test_a_text_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CELL_BYTES", 10_000)
    monkeypatch.setattr(formats, "READ_BYTES", 4096)
    for name, begin in (("x.jsonl", b'{"anchor": "'), ("x.json", b'[{"anchor": "'), ("x.csv", b"anchor,positive\na,")):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(begin + b"a" * 10**6))
        with pytest.raises(UserError, match=f"{path.name} line 1|{path.name} line 2"):
            list(source(path).read())


def bombs(folder: Path) -> dict[str, Path]:
    """Files of a few kilobytes whose 400 rows have one text of 300,000 characters each, or ten of them in a list."""
    text, num_rows = "x" * 300_000, 400
    one = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([text]))
    ten = pa.ListArray.from_arrays(
        pa.array(range(0, 10 * num_rows + 1, 10), pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array([0] * 10 * num_rows, pa.int32()), pa.array([text])),
    )
    table = pa.table({"anchor": one, "positive": pa.array(["b"] * num_rows), "negatives": ten})
    same = np.tile(np.array([len(text), 0x78787878, 0, 0], np.int32), num_rows)
    buffers = [None, pa.py_buffer(same), pa.py_buffer(text.encode())]
    views = pa.Array.from_buffers(pa.string_view(), num_rows, buffers)
    paths = {
        name: folder / name for name in ("flat.parquet", "lists.parquet", "flat.arrow", "lists.arrow", "views.arrow")
    }
    flat = table.drop_columns("negatives")
    for name, content in {
        "flat": flat, "lists": table.drop_columns("anchor").add_column(0, "anchor", [["a"] * num_rows]),
        "views": pa.table({"anchor": views, "positive": ["b"] * num_rows}),
    }.items():  # fmt: skip
        with pa.ipc.new_file(str(folder / f"{name}.arrow"), content.schema) as file:
            file.write_table(content)
        if name != "views":
            pq.write_table(content, folder / f"{name}.parquet", store_schema=False)
    return paths


def test_a_text_that_stands_in_many_rows_is_written_out_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_BYTES", 10**7)
    for name, path in bombs(tmp_path).items():
        assert name == "views.arrow" or path.stat().st_size < 10**6
        pool, rows = pa.default_memory_pool(), 0
        before, most = pool.bytes_allocated(), 0
        (file,) = source(path).files
        for first, (anchors, *others) in file.read(["anchor", "positive", *["negatives"] * ("lists" in name)], 0, None):
            most = max(most, pool.bytes_allocated() - before)
            cells = [text for texts in others[-1] for text in texts] if "lists" in name else anchors
            assert first == rows and sum(map(len, cells)) <= 10**7 and set(map(len, cells)) == {300_000}
            rows += len(anchors)
        assert rows == 400, name
        assert most < 5e7, name  # all of them would take 0.12 or 1.2 GB
    monkeypatch.setattr(batches, "BATCH_BYTES", 200_000)
    with pytest.raises(UserError, match=r"flat.parquet can't be read: row 0 has more than 200,000 bytes of text"):
        list(source(tmp_path / "flat.parquet").read())


def test_texts_of_every_encoding_are_read_whole(tmp_path, monkeypatch):
    """Of chunks whose longest text is looked up first, also where a dictionary was given up half way."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 20_000)
    long = [f"{n} {'y' * 400}" for n in range(700)]
    cells = [*["x" * 3000] * 60, *long, "", None, *["x" * 3000] * 60]
    rows = pa.table({
        "anchor": pa.array([cell or "amber" for cell in cells]), "positive": pa.array(["b"] * len(cells)),
        "negatives": pa.array([[], [None], *([cell, "z"] for cell in cells[2:])], pa.list_(pa.string())),
    })  # fmt: skip
    for options in (
        {}, {"use_dictionary": False}, {"row_group_size": 100}, {"dictionary_pagesize_limit": 50_000},
        {"use_dictionary": False, "column_encoding": {"anchor": "DELTA_BYTE_ARRAY", "positive": "PLAIN"}},
    ):  # fmt: skip
        pq.write_table(rows, tmp_path / "x.parquet", data_page_size=10_000, **options)
        (file,) = source(tmp_path / "x.parquet").files
        for start, count in ((0, None), (250, 300)):
            read = list(file.read(rows.column_names, start, count))
            stop = len(cells) if count is None else start + count
            assert max(len(columns[0]) for _, columns in read) < 100
            for number, name in enumerate(rows.column_names):
                found = [cell for _, columns in read for cell in columns[number]]
                assert found == rows.column(name).to_pylist()[start:stop], (name, options)


def test_offsets_that_point_elsewhere_are_not_followed(tmp_path):
    path, table = tmp_path / "x.arrow", pa.table({"anchor": ["amber", "basin"], "positive": ["cedar", "delta"]})
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
    content, offsets = path.read_bytes(), np.array([0, 5, 10], np.int32).tobytes()
    assert content.count(offsets) == 2
    path.write_bytes(content.replace(offsets, np.array([0, 5, 2**30], np.int32).tobytes()))
    with pytest.raises(UserError, match=r"x.arrow can't be read"):
        list(source(path).read())


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.date64(), pa.duration("s")])
def test_times_that_python_does_not_have(tmp_path, kind):
    path = tmp_path / "x.arrow"
    table = pa.table({"anchor": ["a"], "positive": ["b"], "task": pa.array([2**62], pa.int64()).view(kind)})
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
    with pytest.raises(UserError, match=r"x.arrow can't be read: "):
        list(source(path, split_by="task").read())


def test_a_million_columns_are_not_listed(tmp_path):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{f"column {i} {'x' * 300}": "a" for i in range(2000)}])
    with pytest.raises(UserError, match=r"and 1,980 more\); set columns.anchor") as caught:
        source(path)
    assert len(str(caught.value)) < 6000


def test_a_glob_with_a_range_that_is_none(tmp_path):
    tiny.write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert re.fullmatch(places._glob_regex("[z-a]"), "b") is None
    for path in (f"file://{tmp_path}/[z-a].jsonl", f"{tmp_path}/[z-a].jsonl", f"{tmp_path}/**/[z-a].jsonl"):
        with pytest.raises(UserError, match="no file matches"):
            source(path)


VALUES = ["../../escaped", "/escaped", "a\nb", "<img src=x onerror=alert(1)>", "\x1b[2J", ".", "CON", "a" * 200, "é"]


def test_values_of_a_column_name_sources_and_nothing_on_disk(tmp_path, fuzz_models, capsys):
    rows = [row | {"task": value} for row in ROWS for value in VALUES]
    path = tiny.write_jsonl(
        tmp_path / "data.jsonl", [*rows, *(ROWS[0] | {"task": bad} for bad in ("x" * 201, "\ud800"))]
    )
    place = tmp_path / "a" / "b"
    tree = tiny.recipe(place / "out", fuzz_models.student, None, path, batch={"global_size": 4})
    tree["data"]["sources"][0]["split_by"] = "task"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert main(["plan", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and not [line for line in shown.splitlines() if line.startswith("b ")]
    _, corpus = tiny.prepared(tree)
    assert set(corpus.source_names) == {f"data/{value}" for value in VALUES}
    assert corpus.manifest["reports"][0]["dropped"] == {
        "'task' (split_by) has more than 200 characters, too long for a name": 1,
        "'task' (split_by) has a lone surrogate": 1,
    }
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert made == {"a", "data.jsonl", "recipe.yaml"} and not Path("/escaped").exists()
    assert {path.name for path in place.rglob("*") if path.is_file()} == {MANIFEST, *corpus.manifest["files"]}


def test_a_column_that_tells_rows_apart_makes_no_sources(tmp_path, fuzz_models, monkeypatch):
    monkeypatch.setattr(merge, "MAX_SOURCES", 5)
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [row | {"task": str(i)} for i, row in enumerate(ROWS)])
    tree = tiny.recipe(tmp_path / "out", fuzz_models.student, None, path, batch={"global_size": 4})
    tree["data"]["sources"][0]["split_by"] = "task"
    with pytest.raises(UserError, match=r"data.sources\[0\].split_by = task: the column has 8 values, and at most 5"):
        tiny.prepared(tree)


def test_every_flipped_byte_of_a_corpus_is_found(tmp_path, fuzz_models):
    config = parse_config(fuzz.good_recipe(tmp_path, fuzz_models.student.parent))
    student, guide = Student(config.student), Guide(config.guide)
    corpus = prepare(config, student, guide, progress=lambda line: None)
    rng = random.Random(0)
    for path in sorted(path for path in corpus.folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        for at in rng.sample(range(len(content)), 4):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(UserError, match=r"is damaged .*; remove it, and it is prepared again"):
                prepare(config, student, guide, progress=lambda line: None)
        path.write_bytes(content)
    assert prepare(config, student, guide, progress=lambda line: None).manifest == corpus.manifest


def test_a_manifest_that_was_edited_is_refused():
    tree = {"files": {"a.npy": ["00", 1]}, "rows": [1.5, None, "é"]}
    assert unsealed(sealed(tree)) == tree
    for edited in (sealed(tree).replace(b"a.npy", b"../a.npy"), b"[]", b"{}", b"1", b"", b"\xff", b"[" * 10**5):
        with pytest.raises(ValueError, match=r"it is not the JSON that was written|its checksum is wrong"):
            unsealed(edited)


def test_labels_and_numbers_that_are_none(tmp_path):
    folder = tmp_path / "MySet"
    folder.mkdir()
    for rows, expected in (
        ([{"text": "a", "label": ["x"]}], r"row 1: column 'label' is \['x'\], not a word or number"),
        ([{"text": "\ud800", "label": 1}], "row 1: column 'text' has a lone surrogate"),
        ([{"text": "a", "label": None}], "row 1: column 'label' is empty"),
    ):
        for split in ("train", "test"):
            tiny.write_jsonl(folder / f"{split}.jsonl", rows)
        with pytest.raises(UserError, match=expected):
            own_task("MySet", folder, "1").load_data()
    (folder / "train.jsonl").unlink()
    rows = [{"sentence1": "a", "sentence2": "b", "score": 10**400}]
    tiny.write_jsonl(folder / "test.jsonl", rows)
    with pytest.raises(UserError, match="row 1: column 'score' is 1000"):
        own_task("MySet", folder, "1").load_data()
    (folder / "test.jsonl").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"test.jsonl: can't be read"):
        own_task("MySet", folder, "1").load_data()
    (folder / "test.jsonl").unlink()
    os.mkfifo(folder / "test.jsonl")  # opened, it would wait for a writer
    with pytest.raises(UserError, match="no evaluation set"):
        own_task("MySet", folder, "1")
