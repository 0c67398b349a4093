"""Data files, evaluation sets and run folders that are odd, damaged or meant to harm; all from a seed."""

import csv
import decimal
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import tiny
import yaml
from hostile import TEXTS, change, damage, damage_store, value, yaml_soup

NAMES = ("anchor", "query", "a.b", "", "é", "x" * 300, "\x1b[1m", "a b")
GROUPS = ("a", "b", "../../escaped", "x\ny", "<b>", "x" * 500, "\ud800", None, 1, 2.5, ["a"])


def source(rng: random.Random, folder: Path) -> dict[str, Any]:
    """Writes files; one of data.sources that names them, more or less. Some are nearly good, some are not at all."""
    folder.mkdir(parents=True)
    odds = rng.choice((0.0, 0.03, 0.1, 0.5))

    def perhaps(often: float = 1.0) -> bool:
        return rng.random() < odds * often

    anchor, positive = rng.sample(NAMES, 2) if perhaps(2) else ("anchor", "positive")
    columns: dict[str, Any] = {"anchor": anchor, "positive": positive}
    if perhaps(3):
        columns["negatives"] = rng.choice((None, "negatives", ["n1", "n2"], []))
    if perhaps():
        columns["instructions"] = rng.choice(("drop", "prepend"))
    described: dict[str, Any] = {"columns": columns}
    if perhaps():
        described["columns"] = {"text": anchor, "label": "task"}
    elif rng.random() < 0.4:
        described["split_by"] = "task"
    if perhaps(2):
        described["max_rows"] = rng.choice((1, 5, 10**12))
    if perhaps():
        described["filters"] = {"max_words": rng.choice((1, 3)), "min_characters": rng.choice((None, 2))}
    rows = [_row(rng, anchor, positive, perhaps) for _ in range(rng.choice((0, 1, 20, 60, 60, 60)))]
    kind = rng.choice(tuple(WRITERS))
    for number in range(rng.choice((1, 1, 2, 3))):
        _write_file(rng, folder, number, kind if not perhaps() else rng.choice(tuple(WRITERS)), rows, perhaps)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if rng.random() < 0.2:
        (folder / "loop").symlink_to(".")
        (folder / "again").symlink_to(folder)
        (folder / "broken.jsonl").symlink_to("nowhere")
        os.mkfifo(folder / "pipe.jsonl")
    places = [
        folder,
        folder,
        files[0],
        f"{folder}/**/part*",
        *([f"{folder}/*", f"{folder}/[z-a]**"] if perhaps() else []),
    ]
    described["path"] = str(rng.choice(places))
    if perhaps():
        described["split"] = rng.choice(("train", "test", "../x", ""))
    return described


LAYOUTS = (
    ("anchor", "positive", "negative_1", "negative_2"),
    ("query", "pos", "neg", "prompt"),
    ("query", "positive_passages", "negative_passages"),
    ("messages", "positive_messages", "negative_messages"),
    ("query", "response", "rejected_response"),
    ("sentence1", "sentence2", "score"),
    ("text", "label"),
)


def layout(rng: random.Random, folder: Path) -> dict[str, Any]:
    """A source in a layout of the field's, its cells of any shape; or a folder of judged texts."""
    folder.mkdir(parents=True)
    odds = rng.choice((0.0, 0.03, 0.2))
    described: dict[str, Any] = {"path": str(folder)}
    if rng.random() < 0.3:
        _judged(rng, folder, odds)
        return described | rng.choice((*[{}] * 6, {"split": "test"}, {"max_rows": 2}))
    names = [*rng.choice(LAYOUTS)]
    rng.shuffle(names)
    shape = rng.choice((0, 0, 0, 1, 2, 3, 4, 5))
    rows = [{name: _shaped(rng, shape, odds) for name in names} for _ in range(rng.choice((1, 20, 60)))]
    kind = rng.choice((".jsonl", ".json", ".parquet", ".csv", ".tsv"))
    content = _nested(rows) if kind == ".parquet" else WRITERS[kind](rng, rows)
    if kind == ".json" and rng.random() < 0.5:
        content = b'{"n": 1, "data": ' + content + rng.choice((b"}", b"}", b"", b', "more": [1]}'))
    (folder / f"x{kind}").write_bytes(damage(rng, content) if rng.random() < odds else content)
    if rng.random() < 0.2:
        described["columns"] = rng.choice(
            ({"instructions": "drop"}, {"instructions": "prepend"}, {"prompt": names[0]}, {"anchor": names[0]},
             {"positive": names[-1], "negatives": names[:1]}, {"anchor": names[0], "positive": names[0]})
        )  # fmt: skip
    if rng.random() < (0.3 if kind in (".csv", ".tsv") else 0.05):
        described["format"] = rng.choice(
            ({"delimiter": ";"}, {"quoting": "none"}, {"encoding": "cp1252"}, {"encoding": "utf-16"}, {"names": names},
             {"encoding": "unicode_escape"}, {"names": ["anchor", "positive"], "delimiter": "\t", "quoting": "none"})
        )  # fmt: skip
    return described


def _nested(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), file)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):  # cells of two kinds
        return b"PAR1"
    return file.getvalue()


def _shaped(rng: random.Random, shape: int, odds: float) -> Any:
    """A text, lists of texts, passages or conversations, or anything."""
    if rng.random() < odds:
        return rng.choice(
            (None, "", [], [None], [[]], {}, [{}], {"text": 1}, value(rng), [{"role": 1, "content": None}])
        )
    text = tiny.words(rng, 1, 6)
    passage = {"docid": "1", "title": rng.choice(("", None, "of it")), "text": text}
    messages = [{"role": "user", "content": text}]
    system = [{"role": "system", "content": rng.choice(("find", None))}, *messages]
    shapes = (text, [text, *rng.choice(([], [text], ["", None]))], [passage, *rng.choice(([], [passage]))], messages)
    return (*shapes, [messages, system], system)[shape]


def _judged(rng: random.Random, folder: Path, odds: float) -> None:
    numbers = range(rng.choice((0, 30, 30)))
    lines = [f"q{i}\td{rng.choice((i, 0))}\t{rng.choice((0, 1, 1, 1, 2.5))}" for i in numbers]
    texts = {i: _shaped(rng, 0, odds) for i in numbers}
    if rng.random() < 0.5:
        (folder / "qrels").mkdir()
        _write_lines(
            folder / "corpus.jsonl",
            [json.dumps({"_id": f"d{i}", "title": "t", "text": texts[i]}, default=str) for i in texts],
        )
        _write_lines(
            folder / "queries.jsonl", [json.dumps({"_id": f"q{i}", "text": texts[i]}, default=str) for i in texts]
        )
        place, lines = folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", *lines]
    else:
        _write_lines(folder / "collection.tsv", [f"d{i}\t{texts[i]}" for i in texts])
        _write_lines(folder / "queries.train.tsv", [f"q{i}\t{texts[i]}" for i in texts])
        place, lines = folder / "qrels.train.tsv", [line.replace("\t", "\t0\t", 1) for line in lines]
    _write_lines(place, lines)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        if rng.random() < odds:
            file.write_bytes(damage(rng, file.read_bytes()))


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogatepass")


def _row(rng: random.Random, anchor: str, positive: str, perhaps: Callable[..., bool]) -> dict[str, Any]:
    def text() -> Any:
        return value(rng) if perhaps() else tiny.words(rng, 1, 6)

    row = {anchor: text(), positive: text(), "n1": text(), "n2": rng.choice((None, text()))}
    row |= {"negatives": rng.choice((None, [], [text()], [text(), text()], text())), "task": rng.choice(GROUPS)}
    return {key: [text(), text()] for key in row} if perhaps(0.3) else row


def _write_file(
    rng: random.Random, folder: Path, number: int, kind: str, rows: list[dict[str, Any]], perhaps: Callable[..., bool]
) -> None:
    content = WRITERS[kind](rng, rows)
    if perhaps(1.5):
        content = damage(rng, content)
    suffix = rng.choice(tuple(WRITERS)) if perhaps(0.3) else kind
    if suffix in (".jsonl", ".csv", ".json", ".tsv") and rng.random() < 0.15:
        content, suffix = gzip.compress(content), f"{suffix}.gz"
        content = damage(rng, content) if perhaps() else content
    place = folder / rng.choice(("", "", "train", "data", ".hidden" if perhaps() else ""))
    place.mkdir(exist_ok=True)
    (place / f"{rng.choice(('part', 'train', 'test') if perhaps() else ('part',))}-{number}{suffix}").write_bytes(
        content
    )


def _jsonl(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    lines = [_json(rng, row) for row in rows]
    for _ in range(rng.choice((0, 0, 0, 0, 1))):
        bad = rng.choice(
            (
                "[" * 3000,
                "9" * 5000,
                "null",
                "1",
                '"x"',
                "{",
                '{"a": 1, "a": 2}',
                "{'a': 1}",
                "[1]",
                "\x85",
                "{}",
                "NaN",
            )
        )
        lines.insert(rng.randrange(len(lines) + 1), bad)
    return rng.choice(("", "", "\ufeff")).encode() + "\n".join(lines).encode("utf-8", "surrogatepass")


def _json_list(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    joined = rng.choice((*[",", ", ", ",\n"] * 3, "\n", ",,")).join(_json(rng, row) for row in rows)
    return f"{rng.choice(('', ' '))}[{joined}{rng.choice((*[']'] * 9, '', '],', '] x'))}".encode(
        "utf-8", "surrogatepass"
    )


def _json(rng: random.Random, row: dict[str, Any]) -> str:
    return json.dumps(row, default=str, ensure_ascii=rng.random() < 0.7)


def _csv(rng: random.Random, rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO()
    names = list(rows[0]) if rows else ["anchor", "positive"]
    writer = csv.writer(file, delimiter=delimiter, quoting=rng.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)))
    writer.writerow(names if rng.random() < 0.95 else [*names, names[0]])
    for row in rows:
        writer.writerow([row.get(name, "") for name in names])
    text = file.getvalue() + rng.choice((*[""] * 20, '"unclosed', "a", ",,,,,,,,,,", "\n\n", "\0", '"a"b"'))
    return text.encode(rng.choice((*["utf-8"] * 9, "latin-1", "utf-16")), rng.choice(("replace", "ignore")))


def _table(rng: random.Random, rows: list[dict[str, Any]]) -> pa.Table:
    """Columns of text where they can be, and else of all kinds."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["anchor", "positive"]
    columns = {}
    for name in names:
        cells = [cell if isinstance(cell := row.get(name), str) and _is_unicode(cell) else "amber" for row in rows]
        array = pa.array(cells, rng.choice((pa.string(), pa.large_string(), pa.string_view())))
        if rng.random() < (0.3 if name in ("negatives", "task") else 0.03):
            array = rng.choice(KINDS)(len(rows), cells)
        columns[name if _is_unicode(name) else "x"] = array
    return pa.table(columns)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


FAR = 2**62
KINDS: tuple[Callable[[int, list[str]], pa.Array], ...] = (
    lambda n, cells: pa.array([[cell] for cell in cells], pa.list_(pa.string())),
    lambda n, cells: pa.array([[[cell, cell]] for cell in cells], pa.large_list(pa.list_(pa.string()))),
    lambda n, cells: pa.array([[cell, cell] for cell in cells], pa.list_(pa.string(), 2)),
    lambda n, cells: pa.array([{"a": cell} for cell in cells], pa.struct({"a": pa.string()})),
    lambda n, cells: pa.array([[(cell, 1)] for cell in cells], pa.map_(pa.string(), pa.int32())),
    lambda n, cells: pa.array(cells, pa.string()).dictionary_encode(),
    lambda n, cells: pa.array([cell.encode() for cell in cells], pa.binary()),
    lambda n, cells: pa.array([None] * n, pa.null()),
    lambda n, cells: pa.array([None] * n, pa.string()),
    lambda n, cells: pa.array(range(n), pa.int64()),
    lambda n, cells: pa.array([float("nan")] * n, pa.float32()),
    lambda n, cells: pa.array([FAR + i for i in range(n)], pa.timestamp("ns")),
    lambda n, cells: pa.array([-FAR // 2] * n, pa.timestamp("s", "Nowhere/Land")),
    lambda n, cells: pa.array([FAR] * n, pa.duration("s")),
    lambda n, cells: pa.array([2**31 - 1] * n, pa.int32()).cast(pa.date32()),
    lambda n, cells: pa.array([decimal.Decimal("1.5")] * n, pa.decimal128(38, 10)),
    lambda n, cells: pa.array([True] * n),
)


def _parquet(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    file, table = io.BytesIO(), _table(rng, rows)
    if any(pa.types.is_string_view(kind) for kind in table.schema.types):
        table = pa.table({name: _plain(column) for name, column in zip(table.column_names, table.columns, strict=True)})
    try:
        pq.write_table(
            table, file, compression=rng.choice(("none", "snappy", "zstd")), row_group_size=rng.choice((3, 1000))
        )
    except (pa.ArrowException, ValueError):  # a kind that parquet has not
        return b"PAR1"
    return file.getvalue()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_string_view(column.type) else column


def _arrow(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    table, sink = _table(rng, rows), pa.BufferOutputStream()
    opened = rng.choice((pa.ipc.new_file, pa.ipc.new_stream))
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "zstd", "lz4")))
    with opened(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rng.choice((3, 1000)))
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[random.Random, list[dict[str, Any]]], bytes]] = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": lambda rng, rows: _csv(rng, rows, "\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}


# -------------------------------------------------------------------------------------------------- evaluation sets


def _cell(rng: random.Random, row: int) -> Any:
    return tiny.words(rng, 1, 5) if rng.random() < 0.99 else value(rng)


MARKUP = [text for text in TEXTS if "\ud800" not in text and len(text) < 1000]
MARKUP += ["<img src=x onerror=alert(1)>", "]]>", "&lt;"]


def _one_of(*cells: Any) -> Callable[[random.Random, int], Any]:
    return lambda rng, row: rng.choice(cells) if rng.random() < 0.99 else value(rng)


def _id(prefix: str) -> Callable[[random.Random, int], str]:
    return lambda rng, row: f"{prefix}{row}"


STS = {"test": {"sentence1": _cell, "sentence2": _cell, "score": _one_of(0, 1, 2.5, "3")}}
CLASSIFICATION = {split: {"text": _cell, "label": _one_of(0, 1, "a", "b")} for split in ("train", "test")}
RETRIEVAL = {
    "corpus": {"_id": _id("d"), "text": _cell, "title": _one_of("", None, "t")},
    "queries": {"_id": _id("q"), "text": _cell},
    "qrels": {"query-id": _id("q"), "corpus-id": _id("d"), "score": _one_of(1, 1, 0, 2)},
}
TOP_RANKED = {"top_ranked": {"query-id": _id("q"), "corpus-ids": _one_of(["d0"], ["d0", "d1"], ["dx"])}}


def task(rng: random.Random, folder: Path) -> str:
    """Writes a set into the folder and gives its name."""
    name = rng.choice((*["MySet"] * 9, "STS12", "SciFact", "Banking77Classification", "é", "a b"))
    place = folder / name
    place.mkdir(parents=True)
    odds = rng.choice((0.0, 0.1, 0.4))
    for part, columns in rng.choice((STS, CLASSIFICATION, RETRIEVAL, RETRIEVAL | TOP_RANKED)).items():
        rows = [{name: make(rng, i) for name, make in columns.items()} for i in range(rng.choice((8, 8, 8, 0)))]
        kind = rng.choice((".jsonl", ".csv", ".tsv", ".parquet") if part != "top_ranked" else (".jsonl", ".parquet"))
        content = WRITERS[kind](rng, rows)
        if rng.random() < odds:
            content = damage(rng, content)
        target = place / f"{part}{kind}" if rng.random() < 0.8 else place / part / f"test{kind}"
        target.parent.mkdir(exist_ok=True)
        if rng.random() >= odds / 4:
            target.write_bytes(content)
        elif rng.random() < 0.5:
            os.mkfifo(target)
        else:
            target.mkdir()
    if rng.random() < odds:
        (place / f"{name}.py").write_text("open('EXECUTED', 'w')\n")
        (place / "README.md").write_text(f"---\n{yaml_soup(rng)[:3000]}\n---\n")
    return name


# ----------------------------------------------------------------------------------------------------- run folders


def run_folder(rng: random.Random, folder: Path) -> Path:
    """A run in which texts that may come from outside are markup, or worse, and whose writers may have been killed."""
    from test_report import make_run

    make_run(folder, steps=rng.choice((0, 3, 50)), guide=rng.random() < 0.7)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(_with_other_texts(rng, config), allow_unicode=True))
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(_with_other_texts(rng, data)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    named = ({**line, "sources": {rng.choice(MARKUP): 256}} for line in lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    (folder / "mteb" / "failures.json").write_text(json.dumps({"trained": {rng.choice(MARKUP): rng.choice(MARKUP)}}))
    if rng.random() < 0.3:
        file = rng.choice([folder / "metrics.jsonl", *(folder / "mteb").rglob("*.json")])
        file.write_bytes(damage(rng, file.read_bytes()))
    return folder


def plain_run(folder: Path, steps: int, guide: bool = True) -> Path:
    """All files that a report is made of."""
    from test_report import make_run
    from test_report_page import many_examples, write_examples

    run = make_run(folder, steps=steps, guide=guide)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tracking"] = {"hub": {"repo_id": "me/mine", "license": "mit", "language": ["en"]}}
    config["student"]["prompts"] = {"anchor": "query: ", "positive": ""}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if guide:
        write_examples(run, many_examples())
    (run / "mteb" / "failures.json").write_text(json.dumps({"trained": {"SciFact": "OSError: no space"}}))
    (run / "logs").mkdir()
    event = {"message": "checkpoint /x/step-00000100 is damaged (state.json is missing)", "problem": "checkpoint"}
    (run / "logs" / "events.jsonl").write_text(json.dumps(event) + "\n")
    return run


MONSTERS = (1e308, -1e308, 10**400, float("inf"), "x" * 300, [[[[]]]], "\udfff")


def damaged_run(rng: random.Random, folder: Path) -> Path:
    """Values, keys, lines and bytes of its files become others; files go, or become folders and links."""
    run = plain_run(folder, rng.choice((0, 3, 60)), guide=rng.random() < 0.8)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        what = rng.random()
        if what < 0.2:
            damage_store(rng, run)
            continue
        files = [run / name for name in ("config.yaml", "data.json", "metrics.jsonl", "masked_examples.json")]
        file = rng.choice(
            [file for file in (*files, *files, *(run / "mteb").rglob("*.json")) if file.is_file()] or [None]
        )
        if file is None:
            continue
        if file.name == "metrics.jsonl":
            lines = file.read_bytes().decode("utf-8", "replace").splitlines()
            at = rng.randrange(len(lines) + 1)
            lines[at : at + 1] = [_edited(rng, line) for line in lines[at : at + 1]] or ["{}"]
            file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        else:
            text = file.read_bytes().decode("utf-8", "replace")
            file.write_bytes(_edited(rng, text, is_yaml=file.suffix == ".yaml").encode("utf-8", "surrogatepass"))
    return run


def _edited(rng: random.Random, text: str, is_yaml: bool = False) -> str:
    try:
        tree = yaml.safe_load(text) if is_yaml else json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError):  # damaged once already
        return text
    if not isinstance(tree, dict | list) or rng.random() < 0.05:
        tree = value(rng)
    else:
        change(rng, tree)
    if rng.random() < 0.1:
        tree = {"deep": tree}
        for _ in range(rng.choice((30, 300))):
            tree = {"deep": tree}
    if is_yaml:
        return yaml.safe_dump(tree, sort_keys=False)
    text = json.dumps(tree, default=str)
    number = rng.choice(("0.5", "3", "256"))
    return text.replace(number, json.dumps(rng.choice(MONSTERS)), 1) if rng.random() < 0.2 else text


def _with_other_texts(rng: random.Random, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _with_other_texts(rng, inner) for key, inner in tree.items()}
    if isinstance(tree, list):
        return [_with_other_texts(rng, inner) for inner in tree]
    return rng.choice(MARKUP) if isinstance(tree, str) and rng.random() < 0.5 else tree
