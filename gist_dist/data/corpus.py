"""Prepared rows on disk: every distinct text once, with the token ids of both models, memory-mapped.

<place>/<key>/manifest.json       what it was made from, what became of every row, and the SHA-256 of every file
              texts-*.arrow       text, student_ids, guide_ids: the shards of gist_dist.data.shards
              <array>-*.npy       rows and what is known of every text, merged by gist_dist.data.merge

The manifest is written last: a folder without it is being prepared, or was when its run was killed; the next run with
the same recipe goes on from the parts that are committed.
"""

import hashlib
import json
import logging
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gist_dist.common.errors import Damaged, UserError
from gist_dist.common.files import sealed, unsealed
from gist_dist.common.progress import Progress, Say, progress_of
from gist_dist.common.redact import redact
from gist_dist.common.storage import STALE_SECONDS, Store, check_file, copies_folder, join, local_copy, open_store
from gist_dist.config import ROLES, RunConfig
from gist_dist.data.merge import merge
from gist_dist.data.ragged import expand
from gist_dist.data.row_rules import RowRules, row_rules
from gist_dist.data.shards import MANIFEST, Commit, Job, Prompts
from gist_dist.data.sources import Source, SourceReport, open_sources

if TYPE_CHECKING:
    from gist_dist.data.clusters import RowClusters
    from gist_dist.models.encoder import Encoder

logger = logging.getLogger(__name__)

PREPARING = "preparing data"
"""The phase, as a terminal shows it."""
SAY = progress_of(logger, PREPARING)
FORMAT = 4
KEY = re.compile(r"[0-9a-f]{20}")
MERGED = re.compile(r"(part|index|rows)-")
CONTENT = (
    *("anchors", "positives", "negatives", "negative_offsets", "source", "identity", "guide_keys", "label"),
    *("further", "further_offsets"),
)
"""The arrays that batches are a function of, where they are there."""
Runner = Callable[[Job, Callable[[int, int], None]], Iterable[tuple[int, Commit | None]]]
"""Runs every part of a job, in any order, and gives its number and commit as soon as it is done. It calls the second
argument with the number of a part and how many of its rows are read by now."""


class Corpus:
    """A prepared folder, opened. Row and text numbers index everything here; arrays and token ids stay on disk."""

    def __init__(self, folder: Path, place: str | None = None, verify: bool = False) -> None:
        """place: where others open the same corpus, by open_corpus(); by default the folder. verify: read every file
        in full first, since a reader of flipped bytes ends anywhere. UserError for one that is damaged."""
        self.folder, self.place = folder, place or str(folder)
        try:
            self.manifest = unsealed((folder / MANIFEST).read_bytes())
            self._check_files(contents=verify)
            arrays = {name: _map_array(folder / file) for name, file in self.manifest["arrays"].items()}
        except (Damaged, OSError, ValueError, KeyError) as error:  # numpy's are ValueErrors
            raise _damaged(self.place, error) from error
        self.anchors, self.positives = arrays["anchors"], arrays["positives"]
        self.source, self.number = arrays["source"], arrays["number"]
        """For every row, the index in manifest["sources"], and the number within the source as it was read."""
        self.label = arrays.get("label")
        """A number for every row, equal for anchors of one columns.label, 0 for none. None where no label is."""
        self.identity, self.student_lengths = arrays["identity"], arrays["student_lengths"]
        n = self.num_texts
        self.guide_lengths = arrays.get("guide_lengths", np.broadcast_to(np.int32(0), n))
        self.guide_keys = arrays.get("guide_keys", np.broadcast_to(np.uint64(0), (n, 2)))
        """128 bits of the guide's token ids: equal for the same input. All 0 where no guide was prepared for."""
        self._negatives, self._negative_offsets = arrays["negatives"], arrays["negative_offsets"]
        none = np.broadcast_to(np.int64(0), self.num_rows + 1)
        self._further = arrays.get("further", np.empty(0, np.int64))
        self._further_offsets = arrays.get("further_offsets", none)
        self._at = arrays["at"]
        """Position of every text in the texts files, one after the other."""
        self._texts = _TextFiles(folder, self.manifest["shards"])
        self.recipe: RunConfig | None = None
        """Whose rules the rows follow."""
        self.clusters: RowClusters | None = None
        """Where batches are filled by them (data.mixing: clustered)."""
        self.mined: np.ndarray | None = None
        """Text numbers of mined negatives, a line for each row and -1 where there is none [rows k]; see adopt()."""
        self.mined_digest: str | None = None
        """Digest of the mined negatives that a run begins with."""

    @property
    def num_rows(self) -> int:
        return len(self.anchors)

    @property
    def num_texts(self) -> int:
        return len(self.identity)

    @property
    def texts_in_use(self) -> np.ndarray:
        """Numbers of the texts that some row has: all."""
        return np.arange(self.num_texts)

    @property
    def recipe_sources(self) -> list[int]:
        """Index into data.sources of every source: split_by makes several of one."""
        return [source.get("recipe_source", number) for number, source in enumerate(self.manifest["sources"])]

    @cached_property
    def rules(self) -> RowRules:
        """Known positives, and the loss of each source."""
        return RowRules() if self.recipe is None else row_rules(self.recipe, self)

    @property
    def source_names(self) -> list[str]:
        return [source["name"] for source in self.manifest["sources"]]

    @property
    def made_for_it(self) -> dict[str, str]:
        """Hashes of what was made beside the corpus and decides batches as it does: clusters, and the mined negatives
        that a run begins with."""
        digests = {"clusters": self.clusters and self.clusters.digest, "mined": self.mined_digest}
        return {name: digest for name, digest in digests.items() if digest}

    @cached_property
    def num_further(self) -> np.ndarray:
        """How many positives every row has beside the first."""
        return np.diff(self._further_offsets)

    def further_of(self, rows: np.ndarray) -> np.ndarray:
        """Text numbers of the further positives of all these rows, joined."""
        starts = self._further_offsets[rows]
        return self._further[expand(starts, self._further_offsets[rows + 1] - starts)[1]]

    def own_texts_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in rows, text number) of all that these rows have by their source: what decides who shares a batch."""
        places = np.arange(len(rows))
        owners = [places, places, *(np.repeat(places, n[rows]) for n in (self.num_further, self.num_own_negatives))]
        texts = [self.anchors[rows], self.positives[rows], self.further_of(rows), self.own_negatives_of(rows)]
        return np.concatenate(owners), np.concatenate(texts)

    def texts_of(self, rows: np.ndarray) -> np.ndarray:
        """Text numbers of all that these rows have, joined."""
        return np.concatenate(
            [self.anchors[rows], self.positives[rows], self.further_of(rows), self.negatives_of(rows)]
        )

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Those of all rows."""
        return self.pairs_of(np.arange(self.num_rows))

    def pairs_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Anchor and positive of each of these rows, and then again the anchor with each further positive."""
        anchors = self.anchors[rows]
        again = np.repeat(anchors, self.num_further[rows])
        return np.concatenate([anchors, again]), np.concatenate([self.positives[rows], self.further_of(rows)])

    @cached_property
    def num_own_negatives(self) -> np.ndarray:
        """How many negatives every row has in its source."""
        return np.diff(self._negative_offsets)

    @property
    def num_negatives(self) -> np.ndarray:
        """With those that were mined."""
        return self.num_own_negatives if self.mined is None else self._num_with_mined

    def adopt(self, mined: np.ndarray | None) -> None:
        """From now on rows have these mined negatives, behind their own [rows k]."""
        self.mined = mined
        if mined is not None:
            self._num_with_mined = self.num_own_negatives + (mined >= 0).sum(axis=1)

    def negatives_of(self, rows: np.ndarray) -> np.ndarray:
        """Text numbers of the hard negatives of all these rows, joined: a row's own, then its mined ones."""
        own = self.own_negatives_of(rows)
        if self.mined is None:
            return own
        mined = self.mined[rows]
        owner, column = np.nonzero(mined >= 0)
        owners = np.concatenate([np.repeat(np.arange(len(rows)), self.num_own_negatives[rows]), owner])
        return np.concatenate([own, mined[owner, column]])[np.argsort(owners, kind="stable")]

    def own_negatives_of(self, rows: np.ndarray) -> np.ndarray:
        """Those of the source. Which rows share a batch depends on them alone: mined ones change as training goes."""
        starts, ends = self._negative_offsets[rows], self._negative_offsets[rows + 1]
        return self._negatives[expand(starts, ends - starts)[1]]

    def text(self, text: int) -> str:
        return self._texts.text(int(self._at[text]))

    def student_tokens(self, texts: np.ndarray) -> list[np.ndarray]:
        return self._texts.tokens("student_ids", self._at[texts])

    def guide_tokens(self, texts: np.ndarray) -> list[np.ndarray]:
        return self._texts.tokens("guide_ids", self._at[texts])

    def _check_files(self, contents: bool) -> None:
        """Damaged unless all are as they were written; without contents, their sizes alone."""
        checks = [
            (self.folder / name, size, digest if contents else None)
            for name, (digest, size) in self.manifest["files"].items()
        ]
        with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter
            list(pool.map(lambda check: check_file(*check), checks))


class _TextFiles:
    """The record batches of all texts files, each opened when a text of it is asked for first."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]]) -> None:
        self.folder, self.shards = folder, shards
        self.starts = np.cumsum([0, *(size for shard in shards for size in shard["batches"])])
        """Position of the first text of every batch."""
        self.first_batches = np.cumsum([0, *(len(shard["batches"]) for shard in shards)])
        self.readers: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self.batches: dict[int, pa.RecordBatch] = {}
        self.ragged: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        _allow_open_files(len(shards))

    def text(self, at: int) -> str:
        batch = int(np.searchsorted(self.starts, at, side="right")) - 1
        return self._batch(batch).column("text")[at - int(self.starts[batch])].as_py()

    def tokens(self, column: str, at: np.ndarray) -> list[np.ndarray]:
        batches = np.searchsorted(self.starts, at, side="right") - 1
        rows = at - self.starts[batches]
        return [self._row(column, batch, row) for batch, row in zip(batches.tolist(), rows.tolist(), strict=True)]

    def _row(self, column: str, batch: int, row: int) -> np.ndarray:
        found = self.ragged.get((column, batch))
        if found is None:
            lists = self._batch(batch).column(column)
            found = self.ragged[column, batch] = lists.offsets.to_numpy(), lists.values.to_numpy()
        offsets, values = found
        return values[offsets[row] : offsets[row + 1]]

    def _batch(self, number: int) -> pa.RecordBatch:
        if number not in self.batches:
            shard = int(np.searchsorted(self.first_batches, number, side="right")) - 1
            if shard not in self.readers:
                self.readers[shard] = pa.ipc.open_file(pa.memory_map(str(self.folder / self.shards[shard]["texts"])))
            self.batches[number] = self.readers[shard].get_batch(number - int(self.first_batches[shard]))
        return self.batches[number]


def prepare(
    config: RunConfig,
    student: "Encoder",
    guide: "Encoder | None",
    progress: Say = SAY,
    run_parts: Runner | None = None,
) -> Corpus:
    """Read, check and tokenize all sources, or open what an equal recipe has prepared before.

    guide: what the steps' guide encodes with; None without one, or where the student is its own. run_parts: how the
    parts of the work are run; None: one after the other in this process. UserError for sources that can't be read, for
    unusable rows where data.unusable_rows says so, and for a global batch larger than the usable rows.
    """
    sources = open_sources(config.data)
    inputs = _inputs(config, sources, student, guide)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]
    place = join(config.corpora_dir, key)
    store = open_store(place)
    try:
        if not (was_there := store.exists(MANIFEST)):
            _collect(config.corpora_dir)
            job = Job(
                place=place,
                sources=sources,
                prompts=[_prompts(source, student, guide) for source in sources],
                parts=[(number, part) for number, source in enumerate(sources) for part in source.parts()],
                student=student.tokenizer,
                guide=guide.tokenizer if guide else None,
            )
            _build(job, store, inputs, _Prepared(len(job.parts), progress), run_parts or run_in_process)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{config.corpora_dir}: the prepared corpus can't be written there: {reason}") from error
    corpus = open_corpus(config, place, verify=was_there)
    with suppress(OSError):  # it may be another user's, or be read-only
        _remove_leftovers(store, corpus.manifest)
    for source, report in zip(sources, corpus.manifest["reports"], strict=True):
        _tell_rows(source, SourceReport(**report), config)
    if config.batch.global_size > corpus.num_rows:
        raise UserError(
            f"batch.global_size = {config.batch.global_size}: the data has only {corpus.num_rows} usable rows; "
            "lower it or add data"
        )
    return corpus


def open_corpus(config: RunConfig, place: str, verify: bool = False) -> Corpus:
    """A prepared corpus, read where it lies, or from a checked copy on this node's disk: of a corpus in object storage,
    or where the recipe sets data.local_copy. Several processes of a node share the copy, and one makes it.
    verify: see Corpus."""
    store = open_store(place)
    if store.local and not config.data.local_copy:
        return _with_recipe(Corpus(store.local, verify=verify), config)
    try:
        content = store.read_bytes(MANIFEST)
        files = {name: digest for name, (digest, _) in unsealed(content)["files"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(place, error) from error
    key = place.partition("?")[0].rsplit("/", 1)[-1]
    folder = copies_folder(config.data.local_copy, "corpora", key)
    local_copy(store, files | {MANIFEST: hashlib.sha256(content).hexdigest()}, folder)
    return _with_recipe(Corpus(folder, place), config)


def _with_recipe(corpus: Corpus, config: RunConfig) -> Corpus:
    corpus.recipe = config
    return corpus


def run_in_process(job: Job, tick: Callable[[int, int], None]) -> Iterator[tuple[int, Commit | None]]:
    for number in range(len(job.parts)):
        for told in job.run(number):
            if isinstance(told, int):
                tick(number, told)
            else:
                yield number, told


def _inputs(config: RunConfig, sources: list[Source], student: "Encoder", guide: "Encoder | None") -> dict[str, Any]:
    """All that the prepared corpus depends on; its hash names the folder."""
    return {
        "format": FORMAT,
        "sources": [
            {
                "files": redact(source.fingerprint()),  # new credentials make no other data
                "recipe": redact(source.config.model_dump(mode="json", exclude={"weight", "license", "loss"})),
                "prompts": asdict(_prompts(source, student, guide)),
            }
            for source in sources
        ],
        "tokens": [encoder.tokenizer_fingerprint() if encoder else None for encoder in (student, guide)],
    }


def _prompts(source: Source, student: "Encoder", guide: "Encoder | None") -> Prompts:
    of_student = student.prompts_with(source.config.prompts.student)
    of_guide = guide.prompts_with(source.config.prompts.guide) if guide else None
    return Prompts(**{role: (of_student[role], of_guide[role] if of_guide else "") for role in ROLES})


def _build(job: Job, store: Store, inputs: dict[str, Any], progress: "_Prepared", run_parts: Runner) -> None:
    """All parts, then what they make together; the manifest last."""
    try:
        commits = {}
        for number, commit in run_parts(job, progress.tick):
            if commit is None:
                return  # another run was first
            commits[number] = commit
            progress.done(number, commit)
        ordered = [commits[number] for number in range(len(job.parts))]
        _refuse_empty(job, ordered)
        logger.info("putting the parts together")
        with store.scratch() as folder:
            manifest = merge(job, store, ordered, folder)
        tokens, files = [fingerprint or "" for fingerprint in inputs["tokens"]], manifest["files"]
        arrays = [files[manifest["arrays"][name]][0] for name in CONTENT if name in manifest["arrays"]]
        # What batches are a function of: not where the files lie, nor how the work was divided.
        manifest["content"] = hashlib.sha256(" ".join((*tokens, *arrays)).encode()).hexdigest()
        store.write_bytes(MANIFEST, sealed(manifest | {"inputs": inputs}))
    except (Damaged, OSError) as error:
        if store.exists(MANIFEST):  # another run was first, and has removed what its corpus does not need
            return
        if isinstance(error, Damaged):
            remedy = "it must be a folder or URI that all nodes share (data.cache_dir)"
            raise UserError(f"{store.place}: {error}; {remedy}") from error
        raise


def _refuse_empty(job: Job, commits: list[Commit]) -> None:
    """UserError for the first source that has no usable row."""
    reports = [source.new_report() for source in job.sources]
    for (number, _), commit in zip(job.parts, commits, strict=True):
        reports[number].add(SourceReport(**commit.report))
    for source, report in zip(job.sources, reports, strict=True):
        if not report.rows_read:
            raise UserError(f"{source.where}: {report.path} has no rows")
        if not report.rows_used:
            raise UserError(f"{source.where}: {report.path} has no usable row; {report.complaint()}")


def _tell_rows(source: Source, report: SourceReport, config: RunConfig) -> None:
    for line in report.told():
        logger.info("%s", line)
    if not report.dropped:
        return
    if config.data.unusable_rows == "error":
        raise UserError(f"{source.where}: unusable {report.complaint()}; fix them or set data.unusable_rows=drop")
    logger.info("%s: dropped %s", report.name, report.complaint())


class _Prepared:
    """How many rows are prepared, and how long the rest takes as far as parts tell."""

    def __init__(self, num_parts: int, say: Say) -> None:
        self.num_parts, self.num_done = num_parts, 0
        self.rows_of: dict[int, int] = {}
        """Rows read of each part that has begun."""
        self.progress = Progress(num_parts, say)

    def tick(self, part: int, num_rows: int) -> None:
        self.rows_of[part] = num_rows
        self.progress.reach(self.num_done, self.describe())

    def done(self, part: int, commit: Commit) -> None:
        self.num_done += 1
        self.rows_of[part] = commit.report["rows_read"]
        self.progress.reach(self.num_done, self.describe(), now=self.num_done == self.num_parts)

    def describe(self) -> str:
        rows, seconds = sum(self.rows_of.values()), self.progress.seconds
        return (
            f"prepared {rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s), {self.num_done} of "
            f"{self.num_parts} parts"
        )


def _remove_leftovers(store: Store, manifest: dict[str, Any]) -> None:
    """Remove what a finished corpus no longer needs: commits, what only merging needs, and what killed runs have left
    unfinished. Another run that still works on the same parts then finds the manifest."""
    named, now = {MANIFEST, *manifest["files"]}, time.time()
    for name, info in store.infos().items():
        if name not in named and (MERGED.match(name) or now - info.modified > STALE_SECONDS):
            store.delete(name)


def _collect(corpora: str) -> None:
    """Remove the corpora that were never finished and that nobody has worked on for a day."""
    root, last_change = open_store(corpora), dict[str, float]()
    infos = root.infos()
    for name, info in infos.items():
        key = name.split("/")[0]
        if KEY.fullmatch(key) and "/" in name:
            last_change[key] = max(last_change.get(key, 0.0), info.modified)
    for key, changed in last_change.items():
        if f"{key}/{MANIFEST}" not in infos and time.time() - changed > STALE_SECONDS:
            root.delete_folder(key)


def _damaged(place: str, why: object) -> UserError:
    return UserError(f"{place} is damaged ({why}); remove it, and it is prepared again")


def _map_array(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))  # a plain array: views of a memmap object are slow to make


def _allow_open_files(count: int) -> None:
    """Every memory map holds a file open, and the usual limit is a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and count + 512 > soft:
        enough = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
