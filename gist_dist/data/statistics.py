"""What becomes of every source: rows read, dropped and taken, its share of an epoch, and texts that had to repeat."""

from typing import Any

import numpy as np

from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler


def data_summary(corpus: Corpus, sampler: Sampler) -> dict[str, Any]:
    """What became of the data, and what the first epoch does with it: the content of a run's data.json."""
    epoch = sampler.epoch(0)
    return {
        "sources": source_accounts(corpus, sampler),
        "reports": corpus.manifest["reports"],
        "num_rows": corpus.num_rows,
        "num_positives": len(corpus.pairs[1]),
        "num_texts": corpus.num_texts,
        "held_out": len(sampler.held_out),
        "rows_per_epoch": sampler.rows_per_epoch,
        "steps_per_epoch": sampler.steps_per_epoch,
        "steps": sampler.num_steps,
        "rows_moved": epoch.rows_moved,
        "duplicates_admitted": epoch.duplicates_admitted,
        "content": corpus.manifest["content"],
    }


def source_accounts(corpus: Corpus, sampler: Sampler) -> list[dict[str, Any]]:
    """The manifest's account of every source and what the first epoch does with it; plain values, as in data.json."""
    epoch, sources, num_sources = sampler.epoch(0), corpus.manifest["sources"], len(corpus.manifest["sources"])
    weights = [sampler.config.data.sources[number].weight for number in corpus.recipe_sources]
    anchors, positives, texts = _distinct_texts(corpus, num_sources)
    batches, batches_alone = _batches_of(corpus, epoch.batches, num_sources)
    commonest = _rows_of_commonest_text(corpus, sampler, num_sources)
    accounts = []
    for number, source in enumerate(sources):
        account = source | {
            "recipe_source": corpus.recipe_sources[number],
            "rows_dropped": sum(source["dropped"].values()),
            "weight": weights[number],
            "rows_per_epoch": sampler.rows_per_source[number],
            "share_of_epoch": sampler.rows_per_source[number] / sampler.rows_per_epoch,
            "batches": int(batches[number]),
            "batches_alone": int(batches_alone[number]),
            "distinct_anchors": int(anchors[number]),
            "distinct_positives": int(positives[number]),
            "distinct_texts": int(texts[number]),
            "rows_of_commonest_text": int(commonest[number]),
            "rows_moved": int(epoch.moved[number]),
            "duplicates_admitted": int(epoch.duplicates[number]),
        }
        accounts.append(account | {"why_duplicates": _why_duplicates(account)})
    return accounts


def _why_duplicates(account: dict[str, Any]) -> str | None:
    if not account["duplicates_admitted"]:
        return None
    rows, used, alone = account["rows_per_epoch"], account["rows_used"], account["batches_alone"]
    counts = {role: account[f"distinct_{role}"] for role in ("anchors", "positives")}
    role = min(counts, key=lambda role: counts[role])
    passes = f", taken {rows / used:.3g} times," if rows > used else ""
    return (
        f"{counts[role]:,} distinct {role} in {used:,} rows{passes} and the commonest text in "
        f"{account['rows_of_commonest_text']:,} of an epoch's; batches of its own: {alone:,}, mixed ones with some of "
        f"its rows: {account['batches'] - alone:,}"
    )


def _distinct_texts(corpus: Corpus, num_sources: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors, positives and texts in any role of every source; texts with equal token ids count once."""
    identities, identity = np.unique(corpus.identity, return_inverse=True)
    rows = np.arange(corpus.num_rows)
    negatives = corpus.source[np.repeat(rows, corpus.num_own_negatives)], corpus.own_negatives_of(rows)

    def count(*parts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        source, texts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        pairs = np.unique(source.astype(np.int64) * len(identities) + identity[texts])
        return np.bincount(pairs // len(identities), minlength=num_sources)

    anchors = corpus.source, corpus.anchors
    positives = np.concatenate([corpus.source, np.repeat(corpus.source, corpus.num_further)]), corpus.pairs[1]
    return count(anchors), count(positives), count(anchors, positives, negatives)


def _batches_of(corpus: Corpus, batches: list[np.ndarray], num_sources: int) -> tuple[np.ndarray, np.ndarray]:
    """How many batches hold rows of every source, and how many no others."""
    batch_at = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    batch, source = np.divmod(np.unique(batch_at * num_sources + corpus.source[np.concatenate(batches)]), num_sources)
    alone = np.bincount(batch, minlength=len(batches))[batch] == 1
    return np.bincount(source, minlength=num_sources), np.bincount(source[alone], minlength=num_sources)


def _rows_of_commonest_text(corpus: Corpus, sampler: Sampler, num_sources: int) -> np.ndarray:
    """For every source, in how many of its rows of an epoch its commonest text is."""
    rows = np.concatenate(sampler.epoch(0).batches)
    owner, texts = sampler.shared_texts.of_rows(rows)
    num_texts = int(texts.max(initial=0)) + 1
    pairs, counts = np.unique(corpus.source[rows[owner]].astype(np.int64) * num_texts + texts, return_counts=True)
    commonest = np.ones(num_sources, dtype=np.int64)
    np.maximum.at(commonest, pairs // num_texts, counts)
    return commonest


def repeated_texts(corpus: Corpus, rows: np.ndarray) -> int:
    """How often a row of this batch has a text that another row before it has; equal token ids are one text."""
    owner, texts = corpus.own_texts_of(rows)
    distinct, identity = np.unique(corpus.identity[texts], return_inverse=True)
    return len(np.unique(owner * len(distinct) + identity)) - len(distinct)
