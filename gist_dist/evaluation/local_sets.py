"""A user's own evaluation sets as MTEB tasks, so that their scores are MTEB's own.

The kind of a set follows from its files, as parquet, jsonl, csv or tsv:

    STS              test.*  with sentence1, sentence2, score
    Classification   train.* and test.*  with text, label
    Retrieval        corpus.*  queries.*  qrels.*  with the columns of BEIR or MTEB
    Reranking        the same and top_ranked.*  with query-id, corpus-ids

Instead of NAME.parquet there may be NAME-<anything>.parquet and, in MTEB's and BEIR's layouts, a folder:
corpus/, queries/, qrels/ or default/, with a file for each split.
"""

import csv
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from gist_dist.common.errors import UserError
from gist_dist.common.text import SHORT, one_line

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
DOCUMENT_ID = ("_id", "id", "doc_id", "docid", "corpus-id")
QUERY_ID = ("_id", "id", "query-id", "query_id", "qid")
QUERY_TEXT = ("text", "query", "question")
QRELS_QUERY = ("query-id", "query_id", "qid")
QRELS_DOCUMENT = ("corpus-id", "corpus_id", "doc_id", "docid")
RELEVANCE = ("score", "relevance", "label")
_OwnKind = Literal["STS", "Classification", "Retrieval", "Reranking"]
UNREADABLE = (OSError, ValueError, pa.ArrowException)


def own_task(name: str, folder: Path, revision: str) -> "AbsTask":
    """The MTEB task of a folder, whose data load_data reads and checks. UserError names file and column."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    kinds: dict[_OwnKind, tuple[Any, Callable[[Path], dict[str, Any]], Literal["t2t", "t2c"], str]] = {
        "STS": (AbsTaskSTS, _read_sts, "t2t", "cosine_spearman"),
        "Classification": (AbsTaskClassification, _read_classification, "t2c", "accuracy"),
        "Retrieval": (AbsTaskRetrieval, _read_retrieval, "t2t", "ndcg_at_10"),
        "Reranking": (AbsTaskRetrieval, _read_retrieval, "t2t", "map_at_1000"),
    }
    kind = _own_kind(folder)
    base, read, category, metric = kinds[kind]

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        self.dataset = read(folder)
        self.data_loaded = True

    metadata = TaskMetadata(
        name=name,
        description=f"The evaluation set {name} of this project.",
        dataset={"path": str(folder), "revision": revision},
        type=kind,
        category=category,
        eval_splits=["test"],
        eval_langs=["und-Zyyy"],
        main_score=metric,
    )
    return type(f"Own{kind}", (base,), {"metadata": metadata, "load_data": load_data})()


def _own_kind(folder: Path) -> _OwnKind:
    if _part_files(folder, "corpus") or _part_files(folder, "queries"):
        return "Reranking" if _part_files(folder, "top_ranked") else "Retrieval"
    if test := _split_files(folder, "test"):
        columns = set(_column_names(test[0]))
        if columns & {"sentence1", "sentence2"}:
            return "STS"
        if columns & {"text", "label"}:
            return "Classification"
        raise UserError(
            f"{test[0]}: columns {listed(columns)} are neither those of STS (sentence1, sentence2, score) "
            "nor those of classification (text, label)"
        )
    raise UserError(
        f"{folder}: not a task of MTEB's, and no evaluation set: give test.* (STS), train.* and test.* "
        f"(classification) or corpus.*, queries.* and qrels.* (retrieval), as {', '.join(SUFFIXES)}"
    )


def _read_sts(folder: Path) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict

    files = _split_files(folder, "test")
    data = _read(files, {"sentence1": ("sentence1",), "sentence2": ("sentence2",), "score": ("score",)})
    for side in ("sentence1", "sentence2"):
        _check_texts(data[side], files[0], side)
    data["score"] = _numbers(data["score"], files[0], "score")
    if len(set(data["score"])) < 2:
        raise UserError(f"{files[0]}: column 'score' is {data['score'][0]} in all rows; it has to differ")
    return DatasetDict(test=Dataset.from_dict(data))


def _read_classification(folder: Path) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict

    splits = {}
    for split in ("train", "test"):
        if not (files := _split_files(folder, split)):
            raise UserError(f"{folder}: no {split}.*; classification learns train.* and is scored on test.*")
        splits[split] = _read(files, {"text": ("text",), "label": ("label",)})
        _check_texts(splits[split]["text"], files[0], "text")
        _check_labels(splits[split]["label"], files[0])
    labels = sorted(set(splits["train"]["label"]), key=lambda label: (isinstance(label, str), label))
    if unknown := set(splits["test"]["label"]) - set(labels):
        raise UserError(f"{folder}: test.* has labels that train.* lacks: {listed(unknown)}")
    if len(labels) < 2:
        raise UserError(f"{folder}: train.* has one label only: {labels[0]!r}")
    # MTEB's scores of two classes want 0 and 1, so a label becomes its rank.
    rank = {label: i for i, label in enumerate(labels)}
    for data in splits.values():
        data["label"] = [rank[label] for label in data["label"]]
    return DatasetDict({split: Dataset.from_dict(data) for split, data in splits.items()})


def _read_retrieval(folder: Path) -> dict[str, Any]:
    from datasets import Dataset

    files = {part: _part_files(folder, part) for part in ("corpus", "queries", "top_ranked")}
    files["qrels"] = _part_files(folder, "qrels") or _part_files(folder, "default")
    for part in ("corpus", "queries", "qrels"):
        if not files[part]:
            raise UserError(f"{folder}: no {part}.*; retrieval needs corpus.*, queries.* and qrels.*")
    columns = {"id": DOCUMENT_ID, "text": ("text",), "title": ("title",)}
    corpus = _read(files["corpus"], columns, optional={"title": ""})
    queries = _read(files["queries"], {"id": QUERY_ID, "text": QUERY_TEXT})
    for part, data in (("corpus", corpus), ("queries", queries)):
        data["id"] = _identifiers(data["id"], files[part][0])
        _check_texts(data["text"], files[part][0], "text")
    corpus["title"] = [title or "" for title in corpus["title"]]
    _check_texts(corpus["title"], files["corpus"][0], "title")
    documents = set(corpus["id"])
    split = {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(queries),
        "relevant_docs": _relevance(files["qrels"], set(queries["id"]), documents),
        "top_ranked": _top_ranked(files["top_ranked"], documents) if files["top_ranked"] else None,
    }
    return {"default": {"test": split}}


def _relevance(files: list[Path], queries: set[str], corpus: set[str]) -> dict[str, dict[str, int]]:
    columns = {"query": QRELS_QUERY, "document": QRELS_DOCUMENT, "score": RELEVANCE}
    qrels = _read(files, columns, optional={"score": 1})
    grades = _numbers(qrels["score"], files[0], "score")
    relevance: dict[str, dict[str, int]] = {}
    strangers = 0
    pairs = zip(map(str, qrels["query"]), map(str, qrels["document"]), strict=True)
    for (query, document), grade in zip(pairs, grades, strict=True):
        if grade != int(grade) or grade < 0:
            raise UserError(f"{files[0]}: score {grade} of query '{query}' is not a whole number from 0 up")
        if query in queries and document in corpus:
            relevance.setdefault(query, {})[document] = int(grade)
        else:
            strangers += 1
    if not any(grade for grades in relevance.values() for grade in grades.values()):
        raise UserError(f"{files[0]}: no row joins a query with a relevant document that corpus.* has")
    if strangers:
        logger.warning("%s: %d rows left out: their query or document does not exist", files[0], strangers)
    return relevance


def _top_ranked(files: list[Path], corpus: set[str]) -> dict[str, list[str]]:
    data = _read(files, {"query": QRELS_QUERY, "documents": ("corpus-ids", "corpus_ids")})
    ranked = {}
    for query, documents in zip(map(str, data["query"]), data["documents"], strict=True):
        if not isinstance(documents, list):
            raise UserError(f"{files[0]}: corpus-ids of query '{query}' are no list; use parquet or jsonl")
        ranked[query] = [str(document) for document in documents]
        if missing := [d for d in ranked[query] if d not in corpus]:
            raise UserError(f"{files[0]}: document '{missing[0]}' of query '{query}' is not in corpus.*")
    return ranked


def _split_files(folder: Path, split: str) -> list[Path]:
    for place in (folder, folder / "default", folder / "data"):
        if files := _named_files(place, split):
            return files
    return []


def _part_files(folder: Path, part: str) -> list[Path]:
    """corpus.csv, or the files in corpus/: its split "test", or its only one, as MTEB chooses."""
    if files := _named_files(folder, part):
        return files
    splits = sorted({f.stem.split("-")[0] for f in (folder / part).glob("*") if f.suffix in SUFFIXES})
    if len(splits) > 1 and "test" not in splits:
        raise UserError(f"{folder / part}: has the splits {listed(splits)}; name the one to evaluate 'test'")
    return _named_files(folder / part, "test" if "test" in splits else splits[0]) if splits else []


def _named_files(folder: Path, name: str) -> list[Path]:
    """NAME.csv or NAME-<anything>.csv."""
    named = (f for f in folder.glob(f"{name}*") if f.stem == name or f.stem.startswith(f"{name}-"))
    files = sorted(f for f in named if f.suffix in SUFFIXES and f.is_file())
    if len({f.suffix for f in files}) > 1:
        raise UserError(f"{folder}: both {files[0].name} and {files[-1].name}; keep one")
    return files


def _read(
    files: list[Path], columns: dict[str, tuple[str, ...]], optional: dict[str, Any] | None = None
) -> dict[str, list[Any]]:
    """The named columns of all files, each under the first of its names that a file has."""
    table: dict[str, list[Any]] = {name: [] for name in columns}
    for file in files:
        data = _read_file(file)
        rows = len(next(iter(data.values()), []))
        for name, alternatives in columns.items():
            found = next((data[a] for a in alternatives if a in data), None)
            if found is None and optional and name in optional:
                found = [optional[name]] * rows
            elif found is None:
                check_column(file, alternatives)
            assert found is not None  # check_column has said so otherwise
            table[name] += found
    if not next(iter(table.values())):
        raise UserError(f"{files[0]}: has no rows")
    return table


def _read_file(file: Path) -> dict[str, list[Any]]:
    """Columns as lists; everything in a csv or tsv stays text, so that an id 007 keeps its zeros."""
    try:
        if file.suffix == ".parquet":
            return pq.read_table(file).to_pydict()
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise UserError(f"{file}: not every line is a JSON object")
            names = dict.fromkeys(name for row in rows for name in row)
            return {name: [row.get(name) for row in rows] for name in names}
        csv.field_size_limit(sys.maxsize)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            header = next(reader, [])
            records = []
            for record in filter(None, reader):
                if len(record) != len(header):
                    fields = f"{len(record)} fields, the header {len(header)}"
                    raise UserError(f"{file}: line {reader.line_num} has {fields}")
                records.append(record)
        return {name: [record[i] for record in records] for i, name in enumerate(header)}
    except (*UNREADABLE, RecursionError, OverflowError, csv.Error) as error:  # JSON without end, dates Python has not
        raise UserError(f"{file}: can't be read: {one_line(error)}") from None


def _column_names(file: Path) -> list[str]:
    if file.suffix != ".parquet":
        return list(_read_file(file))
    try:
        return pq.read_schema(file).names
    except UNREADABLE as error:
        raise UserError(f"{file}: can't be read: {one_line(error)}") from None


def check_column(file: Path, alternatives: tuple[str, ...]) -> None:
    """UserError if a file of a kind that we read has none of these columns."""
    if file.suffix in SUFFIXES and not set(alternatives) & set(has := _column_names(file)):
        wanted = " or ".join(f"'{name}'" for name in alternatives)
        raise UserError(f"{file}: no column {wanted} (has: {listed(has)})")


def _check_texts(values: list[Any], file: Path, column: str) -> None:
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise UserError(f"{file}: row {row}: column '{column}' is {SHORT.repr(value)}, not a text")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{file}: row {row}: column '{column}' has a lone surrogate, which is no character")


def _check_labels(values: list[Any], file: Path) -> None:
    for row, value in enumerate(values, 1):
        if value is None or not isinstance(value, str | int | float) or value != value:
            found = "empty" if value is None else f"{SHORT.repr(value)}, not a word or number"
            raise UserError(f"{file}: row {row}: column 'label' is {found}")


def _numbers(values: list[Any], file: Path, column: str) -> list[float]:
    numbers = []
    for row, value in enumerate(values, 1):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise UserError(f"{file}: row {row}: column '{column}' is {SHORT.repr(value)}, not a number")
    return numbers


def _identifiers(values: list[Any], file: Path) -> list[str]:
    seen: set[str] = set()
    for row, value in enumerate(values, 1):
        if value in (None, ""):
            raise UserError(f"{file}: row {row}: the id is empty")
        if str(value) in seen:
            raise UserError(f"{file}: row {row}: id {SHORT.repr(value)} is there twice")
        seen.add(str(value))
    return [str(value) for value in values]


def listed(names: Any) -> str:
    """For a sentence: at most eight, quoted and sorted."""
    names = sorted(repr(str(name)) for name in names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
