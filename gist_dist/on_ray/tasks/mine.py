"""`gist-dist mine`: hard negatives for every row by the guide, written as sources that a recipe can use.

<output>/<source>.parquet   anchor, positive, negatives: the row's own first, then the mined ones, nearest first
         sources.yaml       data.sources of a recipe that trains on them
         mining.json        what it was made from, and what became of the rows
"""

import hashlib
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import yaml

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.files import write_atomically
from gist_dist.common.progress import Progress, progress_of
from gist_dist.common.redact import redact
from gist_dist.common.text import one_line
from gist_dist.config import Columns, GuideConfig, RunConfig, SourceConfig
from gist_dist.data.corpus import PREPARING, Corpus
from gist_dist.data.kept_arrays import find_array, keep_array
from gist_dist.data.mining import (
    MINED,
    REASONS,
    Mined,
    MineOptions,
    Search,
    by_row,
    minable_rows,
    mine_block,
    options_of,
    plan_corpus_search,
)
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import GuideCache, embedding_fingerprint
from gist_dist.models.precision import settled
from gist_dist.on_ray.cluster.capacity import check_resources, gpus_per_worker
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.tasks.pool import Answer, Failed, Lost, Pool, failure
from gist_dist.on_ray.tasks.precompute import precompute
from gist_dist.on_ray.tasks.prepare import prepare_on_ray

logger = logging.getLogger(__name__)

FORMAT = 1
MINING = "hard negatives"
"""The phase, as a terminal shows it."""
ROWS_PER_GROUP = 2**13
SHORT_OF = {reason: f"because of {reason}" for reason in REASONS} | {"rank": "because no more are near enough in rank"}


@dataclass(frozen=True)
class MiningReport:
    """What mining.json holds."""

    folder: Path
    counts: dict[str, Any]

    def lines(self) -> list[str]:
        """For the user."""
        counts, short = self.counts, self.counts["short"]
        told = [
            f"{counts['mined']:,} negatives for {counts['rows']:,} rows ({counts['anchors']:,} distinct anchors), out "
            f"of {counts['pool']:,} texts, in {counts['seconds']['search']:.1f} s"
        ]
        if counts["mined"]:
            told.append(
                f"mean similarity to the anchor: positives {counts['positive_similarity']:.4f}, negatives "
                f"{counts['negative_similarity']:.4f}"
            )
        if short:
            reasons = ", ".join(f"{rows:,} {SHORT_OF[reason]}" for reason, rows in short.items())
            told.append(f"{sum(short.values()):,} rows got fewer than {counts['negatives']}: {reasons}")
        return [*told, f"{self.folder / 'sources.yaml'} lists the sources for a recipe's data section"]


def mine(config: RunConfig, options: MineOptions, output: Path) -> MiningReport:
    """Prepare the corpus, have its embeddings in the guide cache, search on Ray, write the sources.

    An interrupted call goes on where it was; what is finished, of the same inputs, is left as it is. Raises UserError.
    """
    started, output = time.monotonic(), Path(output).expanduser().absolute()
    _refuse_other_folder(output)
    recipe = settled(config.absolute_paths())
    config = _minable(_with_model(recipe, options))
    logger.info("loading models and preparing data", extra=phase(PREPARING))
    student, guide = Student(config.student), Guide.of_run(config)
    with connected(config.cluster) as resources:
        corpus = prepare_on_ray(config, student, guide)
        inputs = _inputs(recipe, options, corpus, guide)
        if finished := _finished(output, inputs):
            logger.info("%s holds these negatives already", output)
            return finished
        precompute(config, corpus, guide)
        search = plan_corpus_search(corpus, options)
        ready = time.monotonic()
        blocks = output / f".blocks-{_key(inputs)}"
        mined = list(_search(config, options, corpus, guide, search, blocks, resources))
    searched = time.monotonic()
    counts = _write_sources(output, recipe, corpus, search, mined, options)
    counts["seconds"] = {"prepare": ready - started, "search": searched - ready, "write": time.monotonic() - searched}
    document = {"inputs": inputs, "options": asdict(options), "model": config.guide_or_student.model, "counts": counts}
    _write_text(output / "mining.json", json.dumps(document, indent=1))
    for folder in output.glob(".blocks-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return MiningReport(output, counts)


def mine_for_training(
    config: RunConfig, corpus: Corpus, guide: Guide, resources: dict[str, float]
) -> tuple[np.ndarray, str]:
    """data.mine: what the guide finds for every row before training [rows k], kept beside the corpora; with its name.

    config: with absolute paths. An interrupted call goes on where it was. UserError as in mining.
    """
    assert config.data.mine is not None
    options = options_of(config.data.mine)
    inputs = {"format": FORMAT, "data": corpus.manifest["content"], "guide": embedding_fingerprint(guide)}
    inputs |= {"seed": config.seed, "options": asdict(options)}
    if found := find_array(config, MINED, inputs):
        return found
    precompute(config, corpus, guide)
    rows, started = minable_rows(config, corpus), time.monotonic()
    search, blocks = plan_corpus_search(corpus, options, rows), config.run_dir / f".mining-{_key(inputs)}"
    parts = [part.texts for part in _search(config, options, corpus, guide, search, blocks, resources)]
    mined = by_row(corpus, rows, search, np.concatenate(parts))
    name = keep_array(config, MINED, inputs, mined)
    shutil.rmtree(blocks, ignore_errors=True)
    num_found = int((mined >= 0).sum())
    logger.info(
        "mined %.2f of %d hard negatives a row, in %.1f s%s", num_found / len(rows), options.negatives,
        time.monotonic() - started,
        "; a smaller data.mine.relative_margin lets more pass" if 2 * num_found < options.negatives * len(rows) else "",
    )  # fmt: skip
    return mined, name


def _with_model(config: RunConfig, options: MineOptions) -> RunConfig:
    """With the model that scores as the guide; prompts in the recipe are the recipe's guide's."""
    if options.model is None:
        if not config.has_guide_model:
            raise UserError("guide: there is no guide model to score with; set guide.model or give --model")
        return config
    kept = config.guide.cache_dir if config.guide else None
    guide = GuideConfig(model=options.model, cache_dir=kept)
    sources = (
        s.model_copy(update={"prompts": s.prompts.model_copy(update={"guide": None})}) for s in config.data.sources
    )
    data = config.data.model_copy(update={"sources": tuple(sources)})
    return config.model_copy(update={"guide": guide, "data": data}).absolute_paths()


def _minable(config: RunConfig) -> RunConfig:
    """Without the classification sets: what is nearest to their texts is of the same class."""
    kept = tuple(source for source in config.data.sources if not source.columns.is_classification)
    if not kept:
        raise UserError("data.sources are classification sets, whose triplets have negatives of other classes already")
    for source in config.data.sources:
        if source.columns.is_classification:
            logger.info("%s is a classification set, with negatives of other classes: none is mined", source.label)
    batch = config.batch.model_copy(update={"global_size": 2})  # nothing is trained: any number of rows will do
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": kept}), "batch": batch})


def _inputs(recipe: RunConfig, options: MineOptions, corpus: Corpus, guide: Guide) -> dict[str, Any]:
    """All that the written sources depend on."""
    chosen = {name: value for name, value in asdict(options).items() if name != "model"}
    sources = redact([source.model_dump(mode="json") for source in recipe.data.sources])
    content = {"corpus": corpus.manifest["content"], "guide": embedding_fingerprint(guide)}
    return {"format": FORMAT, **content, "options": chosen, "seed": recipe.seed, "sources": sources}


def _key(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_other_folder(output: Path) -> None:
    """UserError if there is anything but what an earlier call has left."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if names and "mining.json" not in names and not any(name.startswith(".blocks-") for name in names):
        raise UserError(f"--output {output} holds other files ({min(names)}); name a new folder")


def _finished(output: Path, inputs: dict[str, Any]) -> MiningReport | None:
    """UserError if the folder holds negatives of other inputs."""
    if not (output / "mining.json").exists():
        return None
    document = json.loads((output / "mining.json").read_text())
    if document["inputs"] != inputs:
        changed = ", ".join(name for name in inputs if document["inputs"].get(name) != inputs[name])
        raise UserError(f"--output {output} holds negatives of other inputs ({changed} differ); name another folder")
    return MiningReport(output, document["counts"])


def _search(
    config: RunConfig,
    options: MineOptions,
    corpus: Corpus,
    guide: Guide,
    search: Search,
    folder: Path,
    resources: dict[str, float],
) -> Iterator[Mined]:
    """Every block of anchors as a Ray task. What is done is kept in `folder`, where the next call finds it."""
    told = f"{len(search.pool):,}", f"{len(search.anchors):,}"
    logger.info("searching %s texts for %s anchors", *told, extra=phase(MINING))
    check_resources(config.cluster.model_copy(update={"num_workers": 1}), resources)
    cpus, gpus = config.cluster.cpus_per_worker or 1.0, gpus_per_worker(config.cluster, resources)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=config.cluster.max_failures)(_mine_block)
    place = (config.guide_cache_dir, embedding_fingerprint(guide), guide.width, config.data.local_copy)
    shared, keys, call = ray.put(search), ray.put(corpus.guide_keys), uuid.uuid4().hex
    blocks = {folder / f"{block.start:012d}-{block.stop:012d}.npz": block for block in search.blocks()}
    missing = [file for file in blocks if not file.exists()]
    progress, done = Progress(len(missing), progress_of(logger, MINING)), len(blocks) - len(missing)
    options_of_all = (call, place, options, config.seed, config.batch.loss_gb, cpus, gpus)
    with Pool(lambda file: remote.remote(shared, keys, blocks[file], *options_of_all), missing) as pool:
        for file, outcome in pool.outcomes():
            if isinstance(outcome, Failed):
                raise failure(outcome.cause, "mining") from outcome.cause
            if isinstance(outcome, Lost):
                raise UserError(
                    f"mining: a worker was lost for good: {one_line(outcome.error)}; what is done is kept: run again, "
                    "with a smaller batch.loss_gb if memory ran out"
                ) from outcome.error
            assert isinstance(outcome, Answer)
            _save(file, outcome.value)
            done += 1
            line = f"searched for {done} of {len(blocks)} blocks of anchors"
            progress.reach(done - len(blocks) + len(missing), line)
    for file in blocks:
        with np.load(file) as fields:
            yield Mined(**fields)


def _mine_block(
    search: Search,
    keys: np.ndarray,
    block: slice,
    call: str,
    place: tuple[str, str, int, str | None],
    options: MineOptions,
    seed: int,
    memory_gb: float,
    cpus: float,
    gpus: float,
) -> Mined:
    torch.set_num_threads(max(1, int(cpus)))
    guide_cache = _opened(call, *place)

    def embeddings(texts: np.ndarray) -> np.ndarray:
        return guide_cache.embeddings(guide_cache.find(keys[texts]))

    return mine_block(search, block, embeddings, options, seed, memory_gb, "cuda" if gpus else "cpu")


@lru_cache(maxsize=1)
def _opened(call: str, *place: Any) -> GuideCache:
    """Once for all blocks of a call that this process searches for; another call may find more shards."""
    return GuideCache(*place)


def _save(file: Path, mined: Mined) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as stream:
            np.savez(stream, **asdict(mined))

    write_atomically(file, write)


def _write_sources(
    output: Path,
    recipe: RunConfig,
    corpus: Corpus,
    search: Search,
    blocks: list[Mined],
    options: MineOptions,
) -> dict[str, Any]:
    """One parquet for each source of the recipe, and sources.yaml; returns the counts."""
    mined, shortage = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("texts", "shortage"))
    anchor_of = np.searchsorted(search.anchors, corpus.anchors)
    recipe_source = np.array(corpus.recipe_sources)[corpus.source]
    names = [re.sub(r"[^\w.-]", "_", source.label, flags=re.ASCII)[:100] for source in recipe.data.sources]
    listed, counts = list[SourceConfig](), list[dict[str, Any]]()
    for number, source in enumerate(recipe.data.sources):
        if source.columns.is_classification:
            listed.append(source)
            continue
        rows = np.flatnonzero(recipe_source == len(counts))
        rows = rows[np.argsort(corpus.number[rows], kind="stable")]
        again = f"-{number}" * (names.index(names[number]) < number)
        file = output / f"{names[number]}{again}.parquet"
        write_atomically(file, partial(_write_rows, corpus, rows, mined[anchor_of[rows]], source))
        listed.append(_as_source(source, file))
        counts.append({"name": source.label, "rows": len(rows), "short": _by_reason(shortage[anchor_of[rows]])})
    described = {"sources": [source.model_dump(mode="json", exclude_defaults=True) for source in listed]}
    _write_text(output / "sources.yaml", yaml.safe_dump(redact(described), sort_keys=False, allow_unicode=True))

    positive_scores, scores = (
        np.concatenate([getattr(b, name) for b in blocks]) for name in ("positive_scores", "scores")
    )
    is_mined = ~np.isnan(scores)
    return {
        "rows": corpus.num_rows,
        "anchors": len(search.anchors),
        "pool": len(search.pool),
        "negatives": options.negatives,
        "mined": int((mined[anchor_of] >= 0).sum()),
        "short": _by_reason(shortage[anchor_of]),
        "refused": dict(zip(REASONS, np.sum([b.refused for b in blocks], axis=0).tolist(), strict=True)),
        "positive_similarity": float(positive_scores.mean()),
        "negative_similarity": float(scores[is_mined].mean()) if is_mined.any() else None,
        "sources": counts,
    }


def _by_reason(shortage: np.ndarray) -> dict[str, int]:
    """Rows with fewer negatives than asked for, by what took most of their candidates."""
    return {reason: n for place, reason in enumerate(REASONS) if (n := int((shortage == place).sum()))}


def _write_rows(corpus: Corpus, rows: np.ndarray, mined: np.ndarray, source: SourceConfig, file: Path) -> None:
    has_several = bool(corpus.num_further[rows].any())
    positive = pa.list_(pa.string()) if has_several else pa.string()
    columns = {"anchor": pa.string(), "positive": positive, "negatives": pa.list_(pa.string())}
    schema = pa.schema(columns | ({source.split_by: pa.string()} if source.split_by else {}))
    groups = [name.partition(f"{source.label}/")[2] or None for name in corpus.source_names]
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            part, found = rows[start : start + ROWS_PER_GROUP], mined[start : start + ROWS_PER_GROUP]
            own = np.split(corpus.negatives_of(part), np.cumsum(corpus.num_negatives[part])[:-1])
            negatives = [np.concatenate([texts, more[more >= 0]]) for texts, more in zip(own, found, strict=True)]
            further = np.split(corpus.further_of(part), np.cumsum(corpus.num_further[part])[:-1])
            positives = zip(corpus.positives[part], further, strict=True)
            values = {
                "anchor": _texts(corpus, corpus.anchors[part]),
                "positive": [_texts(corpus, np.array([first, *more])) for first, more in positives]
                if has_several
                else _texts(corpus, corpus.positives[part]),
                "negatives": [_texts(corpus, texts) for texts in negatives],
            }
            if source.split_by:
                values[source.split_by] = [groups[number] for number in corpus.source[part]]
            writer.write_batch(pa.record_batch(values, schema=schema))


def _texts(corpus: Corpus, texts: np.ndarray) -> list[str]:
    return [corpus.text(text) for text in texts.tolist()]


def _as_source(source: SourceConfig, file: Path) -> SourceConfig:
    """What the recipe says of the source, but for how its rows were read."""
    kept = {name: getattr(source, name) for name in ("prompts", "weight", "split_by")}
    return SourceConfig(path=str(file), name=source.label, columns=Columns(negatives=("negatives",)), **kept)


def _write_text(file: Path, text: str) -> None:
    write_atomically(file, lambda aside: aside.write_text(text, encoding="utf-8"))
