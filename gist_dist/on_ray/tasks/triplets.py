"""Classification sets in a recipe are turned into triplets once, and the recipe uses those."""

import hashlib
import json
import logging
import time

import numpy as np

from gist_dist.common.errors import UserError
from gist_dist.common.redact import redact
from gist_dist.common.storage import join, open_store
from gist_dist.config import RunConfig, SourceConfig
from gist_dist.data.sources import Source
from gist_dist.data.triplets import make_triplets, triplet_source, write_triplets
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import embedding_fingerprint, open_guide_cache
from gist_dist.models.tokenizer import token_keys
from gist_dist.on_ray.tasks.precompute import precompute_inputs

logger = logging.getLogger(__name__)

FORMAT = 2


def resolve_classification(config: RunConfig, student: Student, guide: Guide | None) -> RunConfig:
    """The recipe with the triplets of every classification set in its place.

    They are kept in corpora_dir/triplets, and made again when the set, the guide, the student's tokenizer, the seed or
    the settings change. UserError without a guide, which finds the nearest texts.
    """
    sources = tuple(
        _as_triplets(config, number, student, guide) if source.columns.is_classification else source
        for number, source in enumerate(config.data.sources)
    )
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _as_triplets(config: RunConfig, number: int, student: Student, guide: Guide | None) -> SourceConfig:
    source = Source(config.data.sources[number], number, config.data.root)
    if guide is None:
        raise UserError(
            f"{source.where}: triplets of a classification set are made with a guide model; set guide.model"
        )
    prompt = guide.prompts_with(source.config.prompts.guide)["anchor"]
    name = f"{_key(config, source, prompt, student, guide)}.parquet"
    store = open_store(join(config.corpora_dir, "triplets"))
    try:
        if not store.exists(name):
            with store.scratch() as folder:
                write_triplets(folder / name, *_make(config, source, prompt, student, guide))
                store.upload(folder / name, name)
    except OSError as error:
        raise UserError(f"{store.place}: triplets can't be written there: {error}; set data.cache_dir") from error
    return triplet_source(source.config, join(store.place, name))


def _key(config: RunConfig, source: Source, prompt: str, student: Student, guide: Guide) -> str:
    inputs = {
        "format": FORMAT,
        "files": source.fingerprint(),
        "recipe": source.config.model_dump(mode="json", exclude={"name", "weight", "prompts", "license", "loss"}),
        "guide": [embedding_fingerprint(guide), prompt],
        "student": student.tokenizer_fingerprint(),
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(redact(inputs), sort_keys=True).encode()).hexdigest()[:20]


def _make(
    config: RunConfig, source: Source, prompt: str, student: Student, guide: Guide
) -> tuple[list[str], list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The set's texts and labels, and (anchor, positive, negative) as indices into them."""
    started = time.monotonic()
    texts, labels = _labelled(config, source)
    tokens = guide.tokenize([prompt + text for text in texts])  # the anchors of the corpus: cached once for both
    precompute_inputs(config, tokens, guide)
    cache = open_guide_cache(config, guide)
    embeddings = cache.embeddings(cache.find(token_keys(tokens)))
    # Texts that the student can't tell apart are copies; the loss would drop them as well.
    identity = token_keys(student.tokenize(texts))[:, 0].view(np.int64)
    classes = np.unique(labels, return_inverse=True)[1]
    triplets = make_triplets(
        classes, identity, embeddings, source.config.triplets, config.seed, f"{source.where}.columns.label"
    )
    numbers = (source.config.label, f"{len(triplets[0]):,}", f"{len(texts):,}", time.monotonic() - started)
    logger.info("%s: %s triplets of %s labelled texts in %.1f s", *numbers)
    return texts, labels, triplets


def _labelled(config: RunConfig, source: Source) -> tuple[list[str], list[str]]:
    """UserError for a set without usable texts, or with unusable ones where data.unusable_rows says so."""
    pairs = list(source.labelled())
    report = source.report
    if not pairs:
        reason = f"has no usable row; {report.complaint()}" if report.rows_read else "has no rows"
        raise UserError(f"{source.where}: {report.path} {reason}")
    if report.dropped and config.data.unusable_rows == "error":
        raise UserError(f"{source.where}: unusable {report.complaint()}; fix them or set data.unusable_rows=drop")
    if report.dropped:
        logger.info("%s: dropped %s", report.name, report.complaint())
    texts, labels = zip(*pairs, strict=True)
    return list(texts), list(labels)
