"""Data as the field's tools write it: found by its names, read without a script, nothing of it lost or misread."""

import csv
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from facts import assert_tells
from test_sources import refused, source

from gist_dist.common.errors import UserError
from gist_dist.config import SourceConfig
from gist_dist.data.judged import MOST_NEGATIVES, open_hub

PAIR = [("how to bake bread", "knead flour and water"), ("how to open a door", "turn the handle")]


def rows_of(read) -> list[tuple]:
    return [(row.anchor, row.positive, row.negatives) for row in read.read()]


def pairs_of(read) -> list[tuple]:
    """A row for each of its positives."""
    return [(row.anchor, text, row.negatives) for row in read.read() for text in (row.positive, *row.further)]


def write(folder: Path, rows: list[dict], kind: str = "jsonl") -> Path:
    path = folder / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def passage(text, title="", number=0) -> dict:
    return {"docid": str(number), "title": title, "text": text}


def said_by(*texts) -> list[dict]:
    return [{"role": "user", "content": text} for text in texts]


LAYOUTS = {
    "sentence-transformers, in another order": (
        [{"id": 1, "negative_2": "c", "negative_1": "b", "positive": "p", "negative_10": "d", "anchor": "a"}],
        [("a", "p", ("b", "c", "d"))],
    ),
    "question and answer": ([{"answer": "p", "question": "a", "topic": "t"}], [("a", "p", ())]),
    "query, positive, negative": ([{"negative": "n", "positive": "p", "query": "a"}], [("a", "p", ("n",))]),
    "sentence1 and sentence2": ([{"sentence2": "p", "sentence1": "a"}], [("a", "p", ())]),
    "SimCSE's supervised pairs": ([{"sent0": "a", "sent1": "p", "hard_neg": "n"}], [("a", "p", ("n",))]),
    "FlagEmbedding": (
        [{"query": "a", "pos": ["p", "q"], "neg": ["n", "m"], "type": "x"}, {"query": "b", "pos": ["r"], "neg": []}],
        [("a", "p", ("n", "m")), ("a", "q", ("n", "m")), ("b", "r", ())],
    ),
    "columns of positives": (
        [{"query": "a", "positive_1": "p", "positive_2": "q", "negative_1": "n"},
         {"query": "b", "positive_1": "", "positive_2": "r", "negative_1": "n"}],
        [("a", "p", ("n",)), ("a", "q", ("n",)), ("b", "r", ("n",))],
    ),
    "blanks in lists": (
        [{"query": "a", "pos": ["p", "", None], "neg": ["", None, " ", "n"]},
         {"query": "b", "pos": ["q"], "neg": [""]}],
        [("a", "p", ("n",)), ("b", "q", ())],
    ),
    "Tevatron": (
        [{"query_id": "7", "query": "a", "positive_passages": [passage("p", "of p"), passage("q")],
          "negative_passages": [passage("n", "of n"), passage("m")]}],
        [("a", "of p p", ("of n n", "m")), ("a", "q", ("of n n", "m"))],
    ),
    "MTEB's triplets with lists": (
        [{"query": "a", "positive": ["p"], "negative": ["n", "m"]}], [("a", "p", ("n", "m"))]),
    "ms-swift, flat": (
        [{"query": "a", "response": "p", "rejected_response": ["n", "m"]}], [("a", "p", ("n", "m"))]),
    "ms-swift, messages": (
        [{"messages": said_by("a"), "positive_messages": [said_by("p"), said_by("q")],
          "negative_messages": [said_by("n")]}],
        [("a", "p", ("n",)), ("a", "q", ("n",))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_by_their_names(tmp_path, layout, kind):
    rows, expected = LAYOUTS[layout]
    read = source(write(tmp_path, rows, kind), several_positives="apart")
    assert rows_of(read) == expected
    report = read.report
    assert not report.dropped and report.rows_read == len(rows)
    assert report.rows_used == report.rows_read + report.rows_added == len(expected)
    if report.rows_added:
        assert f"x: {len(rows)} rows are {len(expected)}, one for each positive" in report.told()[-1]
    together = source(tmp_path / f"x.{kind}")
    assert pairs_of(together) == expected
    report = together.report
    assert (report.rows_used, report.further_positives, report.rows_added) == (len(rows), len(expected) - len(rows), 0)
    if report.rows_of_several:
        told = f"{report.rows_of_several} of {len(rows)} rows have several positives, {report.rows_of_several + 1} in"
        assert told in report.told()[-1]


def test_a_column_that_is_named_goes_before_one_that_is_found(tmp_path):
    path = write(tmp_path, [{"query": "a", "title": "t", "positive": "p", "neg": ["n"], "other": "o"}])
    assert rows_of(source(path, columns={"anchor": "title"})) == [("t", "p", ("n",))]
    assert rows_of(source(path, columns={"positive": "title", "negatives": "other"})) == [("a", "t", ("o",))]
    named = {"anchor": "title", "positive": "query", "negatives": []}
    assert rows_of(source(path, columns=named)) == [("t", "a", ())]


def test_what_is_read_is_told(tmp_path):
    path = write(tmp_path, [{"query": "a", "pos": ["p"], "neg": ["n"], "prompt": "ask: "}])
    read = source(path)
    assert rows_of(read) == [("a", "p", ("n",))]
    assert read.report.told() == [
        "x: reads 'query' as anchor, 'pos' as positive, 'neg' as negatives; 'prompt' is not used (set columns.prompt "
        "to put it before the anchor)"
    ]
    read = source(path, columns={"prompt": "prompt"})
    assert rows_of(read) == [("ask: a", "p", ("n",))]
    assert read.report.told() == [
        "x: reads 'query' as anchor, 'pos' as positive, 'neg' as negatives, 'prompt' before the anchor"
    ]
    plain = source(write(tmp_path, [{"anchor": "a", "positive": "p", "negative": "n"}]))
    assert rows_of(plain) and plain.report.told() == []


def test_two_columns_that_could_be_a_role_are_asked_about(tmp_path):
    assert_tells(
        refused(write(tmp_path, [{"query": "a", "answer": "p", "document": "d"}])),
        "data.sources[0] … 'answer' … 'document' … positive … set columns.positive",
    )
    assert_tells(
        refused(write(tmp_path, [{"query": "a", "question": "p", "positive": "d"}])),
        "'query' … 'question' … anchor … set columns.anchor",
    )


def test_pairs_with_grades_and_classification_sets_are_told_what_they_are(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": 0.1}]
    assert_tells(
        refused(write(tmp_path, rows)),
        "data.sources[0] … 'score' … 'sentence1' … 'sentence2' … set columns.anchor … columns.positive",
    )
    named = {"anchor": "sentence1", "positive": "sentence2"}
    assert rows_of(source(tmp_path / "x.jsonl", columns=named)) == [("a", "b", ())]
    assert_tells(
        refused(write(tmp_path, [{"text": "a", "label": 1}])),
        "data.sources[0] … 'text' … 'label' … set columns: {text: text, label: label}",
    )


def test_a_list_of_positives_is_never_taken_for_an_instruction(tmp_path):
    rows = [{"query": f"a{i}", "pos": [f"p{i}", f"second {i}"]} for i in range(3)]
    expected = [(f"a{i}", text, ()) for i in range(3) for text in (f"p{i}", f"second {i}")]
    assert pairs_of(source(write(tmp_path, rows))) == expected
    apart = source(tmp_path / "x.jsonl", several_positives="apart")
    assert rows_of(apart) == expected and [row.number for row in apart.read()] == [0, 0, 1, 1, 2, 2]


def test_positives_in_columns_that_are_named(tmp_path):
    rows = [{"q": "a", "x": "p", "y": ["r", "p"], "z": None}, {"q": "b", "x": None, "y": [], "z": "s"}]
    read = source(write(tmp_path, rows), columns={"anchor": "q", "positive": ["x", "y", "z"]})
    assert [(row.positive, row.further) for row in read.read()] == [("p", ("r",)), ("s", ())]
    assert read.report.told()[0] == "x: reads 'q' as anchor, 'x', 'y', 'z' as positives"
    assert "columns.positive" in refused(tmp_path / "x.jsonl", columns={"anchor": "q", "positive": ["x", "w"]})
    with pytest.raises(ValueError, match="positive"):
        source(tmp_path / "x.jsonl", columns={"anchor": "q", "positive": []})
    with pytest.raises(ValueError, match="several_positives"):
        source(tmp_path / "x.jsonl", several_positives="both")


def test_positives_that_are_no_texts_are_counted_and_the_others_used(tmp_path):
    rows = [{"query": "a", "pos": ["p", 7]}, {"query": "b", "pos": []}, {"query": "c", "pos": [""]},
            {"query": "d", "pos": [["i", "t"]]}, {"query": ["e", "f"], "pos": ["p", "q"]},
            {"query": {"x": 1}, "pos": "p"}]  # fmt: skip
    whole = source(write(tmp_path, rows))
    assert rows_of(whole) == [] and whole.report.dropped["positive is int, not text"] == 1
    read = source(tmp_path / "x.jsonl", several_positives="apart")
    assert rows_of(read) == [("a", "p", ())]
    assert read.report.dropped == {
        "positive is int, not text": 1, "positive is missing": 1, "positive is empty": 1,
        "positive is a list, not text (if it is [instruction, text], set columns.instructions)": 1,
        "anchor is a list, not text (if it is [instruction, text], set columns.instructions)": 1,
        "anchor is an object without a text, not text": 1,
    }  # fmt: skip
    assert (read.report.rows_read, read.report.rows_added, read.report.rows_used) == (6, 1, 1)
    assert "6 of 7 rows: " in read.report.complaint()


def test_conversations(tmp_path):
    system, turns = (
        {"role": "system", "content": "Find the page."},
        [*said_by("a"), {"role": "assistant", "content": "b"}],
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "c"}]}]
    image = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    rows = [
        {"messages": cell, "positive_messages": said_by("p")} for cell in ([system, *said_by("a")], turns, parts, image)
    ]
    read = source(write(tmp_path, rows))
    assert rows_of(read) == [("c", "p", ())]
    assert read.report.dropped == {
        "anchor has a system message (set columns.instructions to prepend, or to drop it)": 1,
        "anchor is a conversation of 2 messages, not one text": 1, "anchor has a message that is not text": 1,
    }  # fmt: skip
    for instructions, anchor in (("drop", "a"), ("prepend", "Find the page. a")):
        assert rows_of(source(tmp_path / "x.jsonl", columns={"instructions": instructions}))[0][0] == anchor


def test_text_that_parquet_calls_binary(tmp_path):
    pq.write_table(pa.table({"anchor": ["é".encode(), b"a"], "positive": [b"\xff\xfe", b"p"]}), tmp_path / "x.parquet")
    read = source(tmp_path / "x.parquet")
    assert rows_of(read) == [("a", "p", ())]
    assert read.report.dropped == {"positive is binary that is not UTF-8, not text": 1}


@pytest.mark.parametrize(
    "rows",
    [
        [{"query": "a", "response": "b", "label": 0.0}],
        [{"messages": said_by("a"), "positive_messages": [said_by("b")], "label": 1}],
    ],
)
def test_graded_pairs_of_ms_swift_are_asked_about(tmp_path, rows):
    assert "the source has 'label' beside" in refused(write(tmp_path, rows))
    columns = dict(zip(("anchor", "positive"), rows[0], strict=False))
    assert rows_of(source(write(tmp_path, rows), columns=columns)) == [("a", "b", ())]


@pytest.mark.parametrize("grade", ["label", "score"])
def test_columns_that_one_may_think_are_used_are_spoken_of(tmp_path, grade):
    read = source(write(tmp_path, [{"anchor": "a", "positive": "b", grade: 0, "images": ["x.jpg"]}]))
    assert rows_of(read) == [("a", "b", ())]
    (told,) = read.report.told()
    assert f"'{grade}' is not used, and every row is taken as a positive pair" in told
    assert "'images' is not used: only texts are trained" in told
    if grade == "label":
        read = source(write(tmp_path, [{"anchor": "a", "positive": "b", "label": 0}]), columns={"label": "label"})
        assert rows_of(read) and not read.report.told()


def test_lists_in_csv_as_pandas_writes_them(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("""query,pos,neg\nq,"['p1', 'its']","['n1']"\n[a],[b] c,[not a list]\n""")
    assert pairs_of(source(path)) == [("q", "p1", ("n1",)), ("q", "its", ("n1",)), ("[a]", "[b] c", ("[not a list]",))]


def test_notes_beside_the_data_are_not_what_is_advised(tmp_path):
    write(tmp_path, [{"anchor": "a", "positive": "b"}], "parquet")
    (tmp_path / "metadata.json").write_text("{}")
    assert refused(tmp_path).endswith("name those of one with a glob, such as *.parquet")


# ------------------------------------------------------------------------------------------------------- text formats


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(tmp_path, delimiter, name):
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\r\n").writerows(
            [("anchor", "positive"), *PAIR, ("a,b;c|d\te", 'said "x"\r\nsecond line')]
        )
    assert [row[:2] for row in rows_of(source(tmp_path / name))] == [*PAIR, ("a,b;c|d\te", 'said "x"\r\nsecond line')]


def test_delimiter_quoting_and_encoding_that_are_set(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes('anchor^positive\n"où^café\n"a" b^c\n'.encode("cp1252"))
    options = {"delimiter": "^", "quoting": "none", "encoding": "cp1252"}
    assert [row[:2] for row in rows_of(source(path, format=options))] == [('"où', "café"), ('"a" b', "c")]
    assert_tells(refused(path, format={"delimiter": "^"}), "x.csv … UTF-8 … convert … format.encoding … cp1252")
    assert "x.csv is not ascii text" in refused(path, format=options | {"encoding": "ascii"}) or "UTF-8" in refused(
        path, format=options | {"encoding": "ascii"}
    )
    assert_tells(
        refused(path, format=options | {"encoding": "shift_jis", "quoting": "none"}), "shift_jis … format.encoding"
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, kind, encoding):
    rows = [{"anchor": f"é{i}" * 50, "positive": "東京 😀"} for i in range(100)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == "csv":
        text = "anchor\tpositive\n" + "".join(f"{row['anchor']}\t{row['positive']}\n" for row in rows)
    if kind == "json":
        text = json.dumps(rows)
    (tmp_path / f"x.{kind}").write_bytes(text.encode(encoding))
    assert [row[:2] for row in rows_of(source(tmp_path / f"x.{kind}"))] == [tuple(row.values()) for row in rows]


def test_files_without_a_header(tmp_path):
    path = tmp_path / "triples.train.tsv"
    path.write_text('what is "rain\twater from clouds\ttea\n"a b\tc\td\n')
    assert_tells(refused(path), "columns.anchor … format.names … header")
    options = {"names": ["anchor", "positive", "negative"], "quoting": "none"}
    assert rows_of(source(path, format=options)) == [
        ('what is "rain', "water from clouds", ("tea",)), ('"a b', "c", ("d",))
    ]  # fmt: skip
    assert_tells(refused(path, format=options | {"names": ["anchor", "positive"]}), "line 1 … 3 … 2 … format.names")


def test_a_format_of_no_use_is_refused(tmp_path):
    path = write(tmp_path, [{"anchor": "a", "positive": "b"}], "parquet")
    assert_tells(
        refused(path, format={"encoding": "cp1252"}), "data.sources[0].format.encoding … CSV, TSV … JSON … remove"
    )
    path = write(tmp_path, [{"anchor": "a", "positive": "b"}])
    assert_tells(refused(path, format={"delimiter": ";"}), "format.delimiter … CSV … TSV")
    for options in (
        {"delimiter": '"'},
        {"delimiter": ";;"},
        {"encoding": "base64"},
        {"encoding": "no"},
        {"names": ["a", "a"]},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            source(path, format=options)
    (tmp_path / "y.csv").write_text("anchor\tpositive\na\tb\n")
    assert rows_of(source(tmp_path / "y.csv", format={"delimiter": "tab"})) == [("a", "b", ())]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("head", [{}, {"version": "1.1", "count": 2, "last": True, "none": None}])
def test_json_that_holds_its_rows_in_an_object(tmp_path, indent, head):
    rows = [{"query": a, "pos": [p]} for a, p in PAIR]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(head | {"data": rows, "after": {"x": [1]}}, indent=indent))
    assert [row[:2] for row in rows_of(source(path))] == PAIR
    path.write_text(json.dumps({"data": "a text", "anchor": "a", "positive": "p"}))
    assert rows_of(source(path)) == [("a", "p", ())]


def test_what_follows_a_list_is_not_lost_silently(tmp_path):
    path = write(tmp_path, [{"anchor": "a", "positive": "b"}], "json")
    path.write_text(path.read_text() + "\n" + path.read_text())
    assert_tells(refused(path), "x.json line 6 … list … remove")


# ----------------------------------------------------------------------------------------------------- retrieval sets


def beir(
    folder: Path, split: str = "train", lines: str = "q1\td1\t1\nq1\td2\t2\nq2\td3\t0\nq2\td9\t1\nq3\td3\t1\n"
) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [("d1", "of one", "one"), ("d2", "", "two"), ("d3", None, "three")]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": i, "title": t, "text": x}) + "\n" for i, t, x in corpus)
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"query {i}"}) + "\n" for i in (1, 2, 3))
    )
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def test_beir_folders(tmp_path):
    read = source(beir(tmp_path / "set"))
    expected = [("query 1", "of one one"), ("query 1", "two"), ("query 3", "three")]
    assert [row[:2] for row in pairs_of(read)] == expected and len(rows_of(read)) == 2
    assert read.report.dropped == {"positive is missing": 1}  # d9 is not in the corpus
    assert read.report.first_dropped == ["train.tsv row 1: positive is missing"]
    assert [row[:2] for row in rows_of(source(tmp_path / "set", several_positives="apart"))] == expected
    first = read.fingerprint()
    beir(tmp_path / "set", lines="q1\td1\t1\n")
    assert source(tmp_path / "set").fingerprint() != first
    assert len(rows_of(source(tmp_path / "set", max_rows=1))) == 1


def test_splits_of_beir_folders(tmp_path):
    folder = beir(tmp_path / "set", "test")
    assert refused(folder) == f"data.sources[0]: no split train in {folder} (has: test); set split"
    assert len(pairs_of(source(folder, split="test"))) == 3
    assert "no split 'dev' in" in refused(folder, split="dev")
    (folder / "qrels" / "test.tsv").unlink()
    assert_tells(refused(folder), "documents … queries … qrels")


def test_damaged_judgements_are_named(tmp_path):
    folder = beir(tmp_path / "set", lines="q1\td1\t1\nq1\td2\tgood\n")
    assert_tells(refused(folder), "train.tsv row 2 … score … 'good'")
    (folder / "qrels" / "train.tsv").write_text("q1\td1\n")
    assert_tells(refused(folder), "train.tsv … 2 columns … query-id, corpus-id, score")


@pytest.mark.parametrize("separator", ["\t", " "])
def test_ms_marco_folders(tmp_path, separator):
    (tmp_path / "collection.tsv").write_text('0\tsaid "one\n1\ttwo\n')
    (tmp_path / "queries.train.tsv").write_text("7\tquery seven\n8\tquery eight\n")
    lines = [separator.join(judgement) for judgement in ("7001", "8011", "8000")]
    (tmp_path / "qrels.train.tsv").write_text("".join(line + "\n" for line in lines))
    assert [row[:2] for row in rows_of(source(tmp_path))] == [("query seven", 'said "one'), ("query eight", "two")]


def test_documents_judged_0_are_dealt_out_as_hard_negatives(tmp_path):
    lines = "q1\td1\t1\nq1\td2\t0\nq1\td3\t2\nq2\td3\t1\nq2\td1\t-1\nq1\td9\t0\nq3\td1\t0\n"
    folder = beir(tmp_path / "set", lines=lines)
    expected = [("query 1", "of one one", ("two",)), ("query 1", "three", ()), ("query 2", "three", ())]
    apart = {"several_positives": "apart"}
    assert [row[:3] for row in rows_of(source(folder, **apart))] == expected
    assert [row[2] for row in rows_of(source(folder, columns={"negatives": []}, **apart))] == [(), (), ()]
    assert [row[:3] for row in rows_of(source(folder, max_rows=1, **apart))] == expected[:1]
    assert [row[:3] for row in pairs_of(source(folder))] == [expected[0], ("query 1", "three", ("two",)), expected[2]]
    beir(tmp_path / "set", lines="q1\td1\t1\nq1\td1\t0\nq1\td2\t0\n")
    assert [row[2] for row in rows_of(source(folder))] == [("two",)], "what is relevant is no negative"


def test_a_row_has_a_bounded_number_of_judged_negatives(tmp_path):
    folder = beir(tmp_path / "set", lines="q1\td1\t1\n" + "".join(f"q1\tn{i}\t0\n" for i in range(50)))
    with (folder / "corpus.jsonl").open("a") as file:
        file.writelines(json.dumps({"_id": f"n{i}", "text": f"no {i}"}) + "\n" for i in range(50))
    (row,) = rows_of(source(folder))
    assert row[2] == tuple(f"no {i}" for i in range(MOST_NEGATIVES))


def mteb(folder: Path, prefix: str = "", numbers: bool = False) -> Path:
    """As MTEB keeps a retrieval set on the Hub: parquet files, and its subsets in the card."""

    def ids(letter: str, *numbered: int) -> list[Any]:
        return [*numbered] if numbers else [f"{letter}{number}" for number in numbered]

    tables = {
        "corpus": {"_id": ids("d", 1, 2), "title": ["of one", ""], "text": ["one", "two"]},
        "queries": {"_id": ids("q", 1, 2), "text": ["query 1", "query 2"]},
        "qrels": {"query-id": ids("q", 1, 2, 1), "corpus-id": ids("d", 1, 2, 2), "score": [1, 1, 0]},
    }
    subsets = []
    for part, table in tables.items():
        split = part if part != "qrels" else "train"
        place = folder / f"{prefix}{part}" / f"{split}-00000-of-00001.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), place)
        name = f"{prefix}{part}" if prefix or part != "qrels" else "default"
        path = str(place.relative_to(folder))
        subsets.append({"config_name": name, "data_files": [{"split": split, "path": path}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': subsets})}---\n")
    return folder


MTEB_ROWS = [("query 1", "of one one", ("two",)), ("query 2", "two", ())]


@pytest.mark.parametrize("numbers", [False, True])
def test_mteb_folders(tmp_path, numbers):
    assert [row[:3] for row in rows_of(source(mteb(tmp_path / "set", numbers=numbers)))] == MTEB_ROWS
    assert "no split 'dev' in" in refused(tmp_path / "set", split="dev")
    (tmp_path / "set" / "qrels").rename(tmp_path / "set" / "data")
    assert [row[:3] for row in rows_of(source(tmp_path / "set"))] == MTEB_ROWS


def read_hub(folder: Path, **options: Any) -> list[tuple]:
    """By datasets' own loading code."""
    reader = pickle.loads(pickle.dumps(open_hub(SourceConfig(path=str(folder), **options), "data.sources[0]")))
    assert reader.paths == [] and reader.num_bytes > 0 and reader.fingerprint() == reader.fingerprint()
    columns = [name for name in ("anchor", "positive", "negatives") if name in reader.head().columns]
    ((start, cells),) = reader.read(columns, 0, None)
    assert start == 0
    return [*zip(*cells, strict=True)]


def test_retrieval_sets_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected = [(anchor, [positive], [*negatives]) for anchor, positive, negatives in MTEB_ROWS]
    assert read_hub(mteb(tmp_path / "one")) == expected
    assert read_hub(mteb(tmp_path / "many", "eng-"), subset="eng") == expected
    with pytest.raises(UserError, match=r"no split 'dev' in .* \(has: train\); set split"):
        read_hub(tmp_path / "one", split="dev")
    pairs = mteb(tmp_path / "pairs")
    (pairs / "README.md").unlink()
    for part in ("corpus", "queries", "qrels"):
        shutil.rmtree(pairs / part)
    pq.write_table(pa.table({"anchor": ["a"], "positive": ["b"]}), pairs / "train.parquet")
    assert read_hub(pairs) == [("a", "b")]


def test_a_retrieval_set_whose_judgements_are_another_set(tmp_path, monkeypatch):
    """As BEIR has them on the Hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = mteb(tmp_path / "set")
    subsets = yaml.safe_load((folder / "README.md").read_text().split("---")[1])["configs"][:2]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': subsets})}---\n")
    with pytest.raises(UserError, match=r"set-qrels' can't be loaded as a Hub dataset: "):
        read_hub(folder)
    (folder / "qrels").rename(tmp_path / "set-qrels")
    expected = [(anchor, [positive], [*negatives]) for anchor, positive, negatives in MTEB_ROWS]
    assert read_hub(folder) == expected


def test_a_retrieval_set_of_the_hub_that_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    told = refused(Path("mteb/no-such-set"))
    assert "'mteb/no-such-set' is no file here, and can't be loaded as a Hub dataset" in told


def test_judgements_without_a_line_have_no_rows(tmp_path):
    folder = beir(tmp_path / "set")
    (folder / "qrels" / "train.tsv").write_text("")
    assert rows_of(source(folder)) == []


def test_a_list_of_objects_is_not_taken_for_an_instruction(tmp_path):
    path = write(tmp_path, [{"query": [passage("a"), passage("b")], "pos": "p"}], "parquet")
    assert refused(path).endswith(", not text; set columns.anchor")
