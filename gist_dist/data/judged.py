"""Retrieval sets as training data: documents, queries, and judgements that pair them by their ids.

corpus.jsonl, queries.jsonl, qrels/train.tsv                   BEIR
corpus/…, queries/…, qrels/train.parquet (or default/, data/)  MTEB, in a folder
subsets corpus, queries, default (or qrels)                    MTEB and BEIR on the Hub; eng-corpus, … with subset: eng
collection.tsv, queries.train.tsv, qrels.train.tsv             MS MARCO

A query and all documents that are judged relevant to it (the title before the text) make a row; with several_positives:
apart each of them does. Those judged 0 are the query's hard negatives: somebody has looked at them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gist_dist.common.errors import UserError
from gist_dist.config import SourceConfig, TextFormat
from gist_dist.data.decode import batches_of
from gist_dist.data.formats import Head, HubRows, SourceFile, hub_splits, hub_subsets
from gist_dist.data.layouts import text_of

PACKED = r"(?:\.gz|\.bz2|\.zst)?"
TABLE = rf"\.(?:jsonl|parquet){PACKED}"
SHARD = r"(?:-\d+-of-\d+|-[0-9a-f]{8,})?"


class Layout(NamedTuple):
    """Patterns of paths within a folder; the group is a split, where the name has one."""

    documents: str
    queries: str
    judgements: str


LAYOUTS = (
    Layout(
        rf"corpus(?:/[^/]+)?{TABLE}",
        rf"queries(?:/[^/]+)?{TABLE}",
        rf"qrels{TABLE}|(?:qrels|default|data)/([\w.-]+?){SHARD}(?:\.tsv{PACKED}|{TABLE})",
    ),
    Layout(rf"collection\.tsv{PACKED}", rf"queries\.([\w.-]+?)\.tsv{PACKED}", rf"qrels\.([\w.-]+?)\.tsv{PACKED}"),
)
COLUMNS = ("anchor", "positive", "negatives")
MOST_NEGATIVES = 8
"""Most documents judged 0 that a row takes: pools of evaluation sets hold hundreds for a query."""
JUDGEMENTS = {3: ("query-id", "corpus-id", "score"), 4: ("query-id", "run", "corpus-id", "score")}
"""By their number of columns: BEIR's, and TREC's, which has no header."""
TSV = TextFormat(delimiter="\t", quoting="none")

Reader = SourceFile | HubRows


class Judged(NamedTuple):
    """Ids of a query, of documents that are relevant to it, and of some that are not."""

    query: str
    documents: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class JudgedPairs:
    """The judgements of one split, read like a file with the columns anchor, positive (a list) and negatives."""

    documents: tuple[Reader, ...]
    queries: tuple[Reader, ...]
    judgements: tuple[Reader, ...]
    together: bool = True
    """A row has all documents that are relevant to its query, or each makes a row."""

    @property
    def _all(self) -> tuple[Reader, ...]:
        return self.documents + self.queries + self.judgements

    @property
    def name(self) -> str:
        return self.judgements[0].name

    @property
    def where(self) -> str:
        return self.judgements[0].where

    @property
    def paths(self) -> list[str]:
        return [path for reader in self._all for path in reader.paths]

    @property
    def num_bytes(self) -> int:
        return sum(reader.num_bytes for reader in self._all)

    def fingerprint(self) -> list[Any]:
        return [MOST_NEGATIVES, *(reader.fingerprint() for reader in self._all)]

    def head(self) -> Head:
        return Head(dict.fromkeys(COLUMNS), None)

    def read(self, wanted: list[str], start: int, num_rows: int | None) -> Iterator[tuple[int, list[list[Any]]]]:
        """As SourceFile.read. Only texts that are judged are held in memory; one that is missing is null."""
        pairs = self._rows()[start : None if num_rows is None else start + num_rows]
        queries = _texts(self.queries, {pair.query for pair in pairs})
        judged = {document for pair in pairs for document in pair.documents}
        if "negatives" in wanted:
            judged.update(*(pair.negatives for pair in pairs))
        documents = _texts(self.documents, judged)

        def cells(pair: Judged) -> dict[str, Any]:
            positive, negatives = ([documents.get(d) for d in ids] for ids in (pair.documents, pair.negatives))
            return {"anchor": queries.get(pair.query), "positive": positive, "negatives": negatives}

        records = (tuple(row[name] for name in wanted) for row in map(cells, pairs))
        for batch in batches_of(records):
            yield start, [list(column) for column in zip(*batch, strict=True)]
            start += len(batch)

    def _rows(self) -> list[Judged]:
        """In the order of the judgements; where documents make rows, those judged 0 are dealt out over them."""
        relevant, rejected = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        order = list[tuple[str, str]]()
        for query, document, score in self._scores():
            if score > 0:
                relevant[query].append(document)
                order.append((query, document))
            elif score == 0:  # below it stands for spam, or for not judged
                rejected[query].append(document)
        negatives = {query: [d for d in rejected[query] if d not in relevant[query]] for query in relevant}
        if self.together:
            return [Judged(q, tuple(found), tuple(negatives[q][:MOST_NEGATIVES])) for q, found in relevant.items()]
        rows, seen = [], defaultdict[str, int](int)
        for query, document in order:
            own = negatives[query][seen[query] :: len(relevant[query])][:MOST_NEGATIVES]
            rows.append(Judged(query, (document,), tuple(own)))
            seen[query] += 1
        return rows

    def _scores(self) -> Iterator[tuple[str, str, float]]:
        """Query id, document id and score of every judgement."""
        for file in self.judgements:
            has_header = isinstance(file, SourceFile) and file.format == "csv"
            reader = _with_names(file) if isinstance(file, SourceFile) and has_header else file
            if reader is None:
                continue
            known = reader.head().columns
            if missing := [name for name in JUDGEMENTS[3] if name not in known]:
                listed = ", ".join(known)
                raise UserError(f"{reader.where}: judgements in {reader.name} have no {missing[0]} (has: {listed})")
            for at, columns in reader.read([*JUDGEMENTS[3]], 0, None):
                for number, (query, document, score) in enumerate(zip(*columns, strict=True), start=at):
                    if _is_number(score):
                        yield str(query), str(document), float(score)
                    elif number > 0 or not has_header:
                        raise UserError(
                            f"{reader.where}: {reader.name} row {number}: score '{score}' is no number; fix it"
                        )


def _with_names(file: SourceFile) -> SourceFile | None:
    """A table of judgements, its first line among them; None where it is empty."""
    file = replace(file, options=TSV)
    first = file.first_cells()
    if len(first) == 1:  # as TREC separates them
        file = replace(file, options=TSV.model_copy(update={"delimiter": " "}))
        first = file.first_cells()
    if not first:
        return None
    if len(first) not in JUDGEMENTS:
        raise UserError(
            f"{file.where}: {file.name} has {len(first)} columns; judgements are query-id, corpus-id, score, or "
            "TREC's four columns"
        )
    return replace(file, options=file.options.model_copy(update={"names": JUDGEMENTS[len(first)]}))


def find_judged(files: Iterable[tuple[str, SourceFile]], config: SourceConfig, where: str) -> list[JudgedPairs]:
    """The judged pairs among a folder's files, given with their paths within it; none where it is no retrieval set.
    UserError for one whose split is missing, or has to be named."""
    files = list(files)
    for layout in LAYOUTS:
        documents, queries, judgements = ([*_matching(pattern, files)] for pattern in layout)
        if not documents or not (queries or judgements):
            continue
        splits = defaultdict[str, list[SourceFile]](list)
        for split, file in judgements:
            splits[split or "train"].append(file)
        if not splits:
            raise UserError(
                f"{where}: {config.path} has documents and queries and no judgements (qrels) that pair them; add "
                "them, or name the file to read"
            )
        split = _split_to_read(splits, config, where)
        of_split = tuple(file for name, file in queries if name in (None, split))
        if not of_split:
            raise UserError(f"{where}: {config.path} has judgements of {split} and no queries of it")
        together = config.several_positives == "together"
        return [JudgedPairs(tuple(file for _, file in documents), of_split, tuple(splits[split]), together)]
    return []


def open_hub(config: SourceConfig, where: str) -> HubRows | JudgedPairs:
    """A Hub dataset: its rows, or its judged pairs where its subsets are those of a retrieval set."""
    known, prefix = hub_subsets(config), f"{config.subset}-" if config.subset else ""
    documents, queries = f"{prefix}corpus", f"{prefix}queries"
    if not {documents, queries} <= set(known):
        return HubRows(config, where)
    judged = config.model_copy(
        update={"subset": next((n for n in (f"{prefix}qrels", config.subset or "default") if n in known), None)}
    )
    if judged.subset is None:  # BEIR keeps them apart
        judged = judged.model_copy(update={"path": f"{config.path}-qrels", "revision": None})
    split = _split_to_read(hub_splits(judged), config, where)

    def whole(subset: str) -> tuple[Reader, ...]:
        splits = hub_splits(config.model_copy(update={"subset": subset}))
        named = next((s for s in (subset.removeprefix(prefix), split) if s in splits), None)
        wanted = [named] if named else splits
        return tuple(HubRows(config.model_copy(update={"subset": subset, "split": s}), where) for s in wanted)

    judgements = HubRows(judged.model_copy(update={"split": split}), where)
    return JudgedPairs(whole(documents), whole(queries), (judgements,), config.several_positives == "together")


def _split_to_read(known: Iterable[str], config: SourceConfig, where: str) -> str:
    known = sorted(known)
    split = config.split or ("train" if "train" in known else None)
    if split not in known:
        told = f"no split '{split}'" if split else "no split train"
        raise UserError(f"{where}: {told} in {config.path} (has: {', '.join(known)}); set split")
    return split


def _matching(pattern: str, files: list[tuple[str, SourceFile]]) -> Iterator[tuple[str | None, SourceFile]]:
    """(split, if the name has one, and file)"""
    for path, file in files:
        if found := re.fullmatch(pattern, path):
            yield (found[1] if found.re.groups else None), file


def _texts(readers: Sequence[Reader], wanted: set[str]) -> dict[str, Any]:
    """By id, of those that are wanted."""
    texts = dict[str, Any]()
    for reader in readers:
        if isinstance(reader, SourceFile) and reader.format == "csv":
            reader = replace(reader, options=TSV.model_copy(update={"names": ("id", "text")}))
        known, _, may_have_more = reader.head()
        id_column = next((name for name in ("_id", "id") if name in known), None)
        if known and (id_column is None or "text" not in known):
            listed = ", ".join(known)
            raise UserError(f"{reader.where}: {reader.name} has no ids and texts (_id and text; has: {listed})")
        columns = [id_column or "_id", "text", "title" if "title" in known or may_have_more else "text"]
        for _, cells in reader.read(columns, 0, None):
            for id, text, title in zip(*cells, strict=True):
                if str(id) in wanted:
                    has_title = columns[2] == "title" and title
                    texts[str(id)] = text_of({"text": text, "title": title}, None) if has_title else text
    return texts


def _is_number(score: Any) -> bool:
    try:
        float(score)
    except (TypeError, ValueError):
        return False
    return True
