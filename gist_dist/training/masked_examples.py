"""masked_examples.json: candidates that the guide took out of a batch, with their texts, so that a person can judge it.

Made by rank 0 from the embeddings that a step has anyway, once that step is over: no text is encoded for it and no
number of the run depends on it.
"""

# Axes:  r rows looked at   c candidates of the batch

import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gist_dist.common.files import write_text
from gist_dist.config import LossConfig, RunConfig
from gist_dist.core.candidate_table import CandidateTable
from gist_dist.core.candidates import guide_threshold
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import Scored
from gist_dist.data.corpus import Corpus

logger = logging.getLogger(__name__)

FILE_NAME = "masked_examples.json"
MAX_ROWS = 1024  # so many of the batch's rows are looked at: a small part of what the loss itself does
NUM_EACH, MAX_CHARACTERS = 16, 300
_ROWS_AT_A_TIME = 64

_Pick = tuple[float, int, int]
"""Key, row, candidate."""


def masking_is_shown(config: RunConfig, step: int, num_steps: int) -> bool:
    """At the last step, and at scheduled checkpoints, so that a run which does not end has examples too."""
    every = config.checkpoint.every_steps
    return config.guide is not None and (step == num_steps or (every is not None and step % every == 0))


def write_masked_examples(config: RunConfig, corpus: Corpus, plan: BatchPlan, scored: Scored) -> None:
    """Write run_dir/masked_examples.json for a step, without examples where tracking.report_texts is false. A disk that
    can't take it costs the file, not the run."""
    file = config.run_dir / FILE_NAME
    num_each = NUM_EACH if config.tracking.report_texts else 0
    found = masked_examples(corpus, plan, scored, config.loss, config.seed, num_each)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_text(file, text)
    except OSError as error:
        logger.warning("%s can't be written (%s); the report goes without it", file, error)


def masked_examples(
    corpus: Corpus, plan: BatchPlan, scored: Scored, loss: LossConfig, seed: int, num_each: int = NUM_EACH
) -> dict[str, Any]:
    """Candidates that the guide dropped from rows of a batch, as plain values; texts of at most 300 characters.

    num_each of them are those that the student finds closest, which would have cost most as negatives, and as many
    more are drawn at random from all; seeded, at most one a row each time, and no pair of texts twice. "num_masked" of
    "num_candidates" were dropped from the "num_rows" rows looked at: all rows, or 1,024 drawn from more.
    """
    device = scored.student.device
    generator = torch.Generator(device).manual_seed(seed + plan.step)
    rows = torch.randperm(scored.batch.num_rows, generator=generator, device=device)[:MAX_ROWS].sort().values
    assert scored.guide is not None
    tables = {own: CandidateTable(scored.batch, scored.guide, own) for own in scored.batch.configs(loss)}

    def table_of(row: int) -> CandidateTable:
        return tables[scored.batch.config_of(row, loss)]

    num_masked, num_candidates, closest, drawn = 0, 0, [], []
    sections = [torch.arange(own.start, own.stop, device=device) for own, _ in scored.batch.sections]
    chosen_rows = [rows[torch.isin(rows, section)] for section in sections] or [rows]
    for block in (block for some in chosen_rows for block in some.split(_ROWS_AT_A_TIME) if len(block)):
        table = table_of(int(block[0]))
        left_out = table.left_out(block)
        dropped = table.masked(block) & ~left_out
        num_masked += int(dropped.count_nonzero())
        num_candidates += left_out.numel() - int(left_out.count_nonzero())
        random = torch.rand(dropped.shape, generator=generator, device=device)
        closest += _best_of_each_row(block, table.scores(scored.student, block), dropped)
        drawn += _best_of_each_row(block, random, dropped)
    seen: set[tuple[int, int]] = set()
    chosen = [("closest", pick) for pick in _first_distinct(table_of, closest, num_each, seen)]
    chosen += [("random", pick) for pick in _first_distinct(table_of, drawn, num_each, seen)]
    return {
        "step": plan.step,
        "num_rows": len(rows),
        "num_candidates": num_candidates,
        "num_masked": num_masked,
        "examples": [
            {"chosen": how} | _describe(corpus, plan, table_of(row), scored.student, row, column)
            for how, (row, column) in chosen
        ],
    }


def _best_of_each_row(rows: Tensor, keys: Float[Tensor, "r c"], dropped: Bool[Tensor, "r c"]) -> list[_Pick]:
    """(key, row, candidate) of every row that lost a candidate: the dropped one with the largest key."""
    best, column = keys.masked_fill(~dropped, -torch.inf).max(dim=1)
    picks = zip(best.tolist(), rows.tolist(), column.tolist(), strict=True)
    return [pick for pick in picks if pick[0] > -torch.inf]


def _first_distinct(
    table_of: Callable[[int], CandidateTable], picks: Iterable[_Pick], count: int, seen: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """(row, candidate) by falling key, leaving out pairs of texts that were seen, in either order."""
    chosen: list[tuple[int, int]] = []
    for _, row, column in sorted(picks, reverse=True):
        table = table_of(row)
        query, candidate = int(table.query(row, column)), int(table.texts[column])
        pair = min(query, candidate), max(query, candidate)
        if len(chosen) < count and pair not in seen:
            seen.add(pair)
            chosen.append((row, column))
    return chosen


def _describe(
    corpus: Corpus, plan: BatchPlan, table: CandidateTable, student: Tensor, row: int, column: int
) -> dict[str, Any]:
    """One example: its texts, and the cosines by which both models compare them."""
    number, at = int(plan.rows[row]), torch.tensor([row], device=table.texts.device)
    guide_positive = table.guide_positive(at)
    cosines = {
        "threshold": guide_threshold(guide_positive, table.loss),
        "guide_positive": guide_positive,
        "guide_candidate": table.of_pair(table.guide, row, column),
        "student_positive": table.of_positive(student, at),
        "student_candidate": table.of_pair(student, row, column),
    }
    texts = {
        "anchor": table.batch.anchors[row],
        "positive": table.batch.positives[row],
        "candidate": table.texts[column],
    }
    return {
        "source": corpus.source_names[int(corpus.source[number])],
        "row": int(corpus.number[number]),
        "block": table.block_of[column],
        **{role: _cut(corpus.text(int(plan.texts[int(text)]))) for role, text in texts.items()},
        **{name: round(float(cosine), 4) for name, cosine in cosines.items()},
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
