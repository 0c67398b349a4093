"""Retrieval sets as training data: folders in which queries and documents have ids, and judgements pair them.

corpus.jsonl, queries.jsonl, qrels/train.tsv                   BEIR
collection.tsv, queries.train.tsv, qrels.train.tsv             MS MARCO

Every document that is judged relevant to a query makes a row: the query and the document (its title before its text).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.config import SourceConfig, TextFormat
from gist_dist.data.decode import batches_of
from gist_dist.data.formats import Head, SourceFile
from gist_dist.data.layouts import text_of

PACKED = r"(?:\.gz|\.bz2|\.zst)?"
BEIR = (rf"corpus\.jsonl{PACKED}", rf"queries\.jsonl{PACKED}", rf"qrels/([\w.-]+?)\.tsv{PACKED}")
MS_MARCO = (rf"collection\.tsv{PACKED}", rf"queries\.([\w.-]+?)\.tsv{PACKED}", rf"qrels\.([\w.-]+?)\.tsv{PACKED}")
COLUMNS = ("anchor", "positive")
JUDGEMENTS = {3: ("query-id", "corpus-id", "score"), 4: ("query-id", "run", "corpus-id", "score")}
"""By their number of columns: BEIR's, and TREC's, which has no header."""
TSV = TextFormat(delimiter="\t", quoting="none")


@dataclass(frozen=True)
class JudgedPairs:
    """The pairs of one split, read like a file with the columns anchor and positive."""

    documents: SourceFile
    queries: SourceFile
    judgements: SourceFile

    @property
    def name(self) -> str:
        return self.judgements.name

    @property
    def where(self) -> str:
        return self.judgements.where

    @property
    def paths(self) -> list[str]:
        return [file.path for file in (self.documents, self.queries, self.judgements)]

    def fingerprint(self) -> list[Any]:
        return [file.fingerprint() for file in (self.documents, self.queries, self.judgements)]

    def head(self) -> Head:
        return Head(dict.fromkeys(COLUMNS), None)

    def read(self, wanted: list[str], start: int, num_rows: int | None) -> Iterator[tuple[int, list[list[Any]]]]:
        """As SourceFile.read. Only texts that are judged are held in memory; one that is missing is null."""
        pairs = list(islice(self._relevant(), start, None if num_rows is None else start + num_rows))
        texts = {
            "anchor": _texts(self.queries, {query for query, _ in pairs}),
            "positive": _texts(self.documents, {document for _, document in pairs}),
        }
        at = {"anchor": 0, "positive": 1}
        records = (tuple(texts[name].get(pair[at[name]]) for name in wanted) for pair in pairs)
        for batch in batches_of(records):
            yield start, [list(cells) for cells in zip(*batch, strict=True)]
            start += len(batch)

    def _relevant(self) -> Iterator[tuple[str, str]]:
        """(query id, document id) of every judgement above 0, in order."""
        file = replace(self.judgements, options=TSV)
        first = file.first_cells()
        if len(first) == 1:  # as TREC separates them
            file = replace(file, options=TSV.model_copy(update={"delimiter": " "}))
            first = file.first_cells()
        if not first:
            return
        if len(first) not in JUDGEMENTS:
            raise UserError(
                f"{file.where}: {file.name} has {len(first)} columns; judgements are query-id, corpus-id, score, or "
                "TREC's four columns"
            )
        names = JUDGEMENTS[len(first)]
        file = replace(file, options=file.options.model_copy(update={"names": names}))
        for at, columns in file.read(["query-id", "corpus-id", "score"], 0, None):
            for number, (query, document, score) in enumerate(zip(*columns, strict=True), start=at):
                if number == 0 and not _is_number(score):
                    continue  # the header
                if not _is_number(score):
                    raise UserError(f"{file.where}: {file.name} row {number}: score '{score}' is no number; fix it")
                if float(score) > 0:
                    yield query, document


def find_judged(files: Iterable[tuple[str, SourceFile]], config: SourceConfig, where: str) -> list[JudgedPairs]:
    """Of a folder's files and their paths within it; none where it is no retrieval set. UserError for one whose split
    is missing, or has to be named."""
    files = list(files)
    for kinds in (BEIR, MS_MARCO):
        documents, queries, judgements = ([*_matching(kind, files)] for kind in kinds)
        if not documents or not (queries or judgements):
            continue
        splits = {split: file for split, file in judgements}
        if not splits:
            raise UserError(
                f"{where}: {config.path} has documents and queries and no judgements ({kinds[2].split('/')[0]}) that "
                "pair them; add them, or name the file to read"
            )
        split = config.split or ("train" if "train" in splits else None)
        if split not in splits:
            told = f"no split '{split}'" if split else "no split train"
            raise UserError(f"{where}: {told} in {config.path} (has: {', '.join(sorted(splits))}); set split")
        of_split = [file for name, file in queries if name in (None, split)]
        if not of_split:
            raise UserError(f"{where}: {config.path} has judgements of {split} and no queries of it")
        return [JudgedPairs(documents[0][1], of_split[0], splits[split])]
    return []


def _matching(pattern: str, files: list[tuple[str, SourceFile]]) -> Iterator[tuple[Any, SourceFile]]:
    """(split, if the name has one, and file)"""
    for path, file in files:
        if found := re.fullmatch(pattern, path):
            yield (found[1] if found.re.groups else None), file


def _texts(file: SourceFile, wanted: set[str]) -> dict[str, Any]:
    """By id, of those that are wanted."""
    if file.format == "csv":
        file = replace(file, options=TSV.model_copy(update={"names": ("id", "text")}))
        columns = ["id", "text", "text"]
    else:
        columns = ["_id", "text", "title"]
    texts = dict[str, Any]()
    for _, cells in file.read(columns, 0, None):
        for id, text, title in zip(*cells, strict=True):
            if str(id) in wanted:
                passage = {"text": text, "title": title} if file.format == "jsonl" and title else None
                texts[str(id)] = text_of(passage, None) if passage else text
    return texts


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
