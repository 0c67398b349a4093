"""A step whose loss or gradient is not finite: which of its rows are to blame, and what the user is told."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gist_dist.common.files import write_text
from gist_dist.config import LossConfig, RunConfig
from gist_dist.core.candidates import row_blocks
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import Scored, StepResult
from gist_dist.data.corpus import Corpus
from gist_dist.models.encoder import Student
from gist_dist.training.origin import backward_origin, forward_origin

logger = logging.getLogger(__name__)

NAMED_ROWS = 5
"""As many are named in a sentence; the file has all."""
BLOCK_BYTES = 2.5e8
NO_STUDENT, NO_GUIDE = "the student's embedding is not finite", "the guide's embedding is not finite"


class Report(NamedTuple):
    told: str
    """Names the step, the rows to blame, and where it began."""
    remedy: str


def report_non_finite(
    config: RunConfig, student: Student, corpus: Corpus, plan: BatchPlan, result: StepResult
) -> Report:
    """Writes run_dir/non_finite/step-….json with all its rows."""
    assert result.scored is not None
    reason, blamed = find_offending_rows(result.scored, corpus.num_negatives[plan.rows], config.loss)
    cause, remedy = _cause(config, student, corpus, plan, result, reason)
    rows = [
        {"source": corpus.source_names[source], "row": number, "blamed": bool(is_blamed)}
        for source, number, is_blamed in zip(
            corpus.source[plan.rows].tolist(), corpus.number[plan.rows].tolist(), blamed, strict=True
        )
    ]
    facts = {
        "step": plan.step,
        "what": result.non_finite,
        "loss": str(result.loss),
        "grad_norm": str(result.grad_norm),
        "blamed_for": reason,
        "began": cause,
        "rows": rows,
    }
    value = result.loss if result.non_finite == "loss" else result.grad_norm
    sentence = f"step {plan.step}: the {'loss' if result.non_finite == 'loss' else 'gradient norm'} is {value}"
    named = [row for row in rows if row["blamed"]]
    if named:
        sentence += f"; {reason} of {_name(named)}"
    else:
        sentence += f" in a batch of {_name(rows)}"
    sentence += f" ({_write(config.run_dir / 'non_finite' / f'step-{plan.step:08d}.json', facts)})"
    return Report(f"{sentence}; {cause}" if cause else sentence, remedy)


def _cause(
    config: RunConfig, student: Student, corpus: Corpus, plan: BatchPlan, result: StepResult, reason: str | None
) -> tuple[str | None, str]:
    """Where it began, if that is found, and what to do. Before the first step no learning rate has changed anything."""
    assert result.scored is not None
    usual = "use fp32, or leave out those rows"
    usual = f"lower optim.learning_rate, {usual}" if plan.step > 1 else usual
    if reason == NO_STUDENT:
        origin = forward_origin(config, student, corpus, plan, result.scored)
        return (str(origin), origin.remedy(plan.step)) if origin else (None, usual)
    if reason == NO_GUIDE:
        return None, "use guide.precision=fp32 or another guide, or leave out those rows"
    if result.non_finite == "loss":
        temperature = config.loss.temperature
        return f"all embeddings are finite, and scores overflow at loss.temperature = {temperature}", "raise it"
    weight, is_loss_sound = backward_origin(config, student, corpus, plan, result.scored)
    if not is_loss_sound:
        return "the loss is finite, and its gradient is not", "raise loss.temperature, or leave out those rows"
    began = f", and the backward pass begins to overflow at '{weight}'" if weight else ""
    return f"all embeddings and the loss are finite{began}", usual


def find_offending_rows(scored: Scored, num_negatives: np.ndarray, loss: LossConfig) -> tuple[str | None, np.ndarray]:
    """Which rows [g] have an embedding that is not finite, or else a loss that isn't; (None, none) if that is unknown.

    num_negatives: hard negatives of each row.
    """
    batch = scored.batch
    for reason, embeddings in ((NO_STUDENT, scored.student), (NO_GUIDE, scored.guide)):
        if embeddings is None:
            continue
        bad = (~torch.isfinite(embeddings).all(dim=1)).cpu()
        of_row = np.repeat(np.arange(batch.num_rows), num_negatives)
        blamed = (bad[batch.anchors.cpu()] | bad[batch.positives.cpu()]).numpy()
        blamed[of_row[bad[batch.negatives.cpu()].numpy()]] = True
        if batch.more_positives is not None and batch.further_positives is not None:
            of_table = bad[batch.texts.cpu()]
            places = batch.further_positives.cpu()
            blamed |= (of_table[places.clamp(min=0)] & (places >= 0)).any(dim=1).numpy()
        if blamed.any():
            return reason, blamed
    blamed = np.zeros(batch.num_rows, dtype=bool)

    def is_finite(rows: range) -> bool:
        return bool(torch.isfinite(gist_loss(scored.student, scored.guide, batch, [rows], loss).loss))

    for block in row_blocks(batch, loss, BLOCK_BYTES):
        if not is_finite(block):
            blamed[[row for row in block if not is_finite(range(row, row + 1))]] = True
    return ("the loss is not finite", blamed) if blamed.any() else (None, blamed)


def _name(rows: list[dict[str, Any]]) -> str:
    """The first few rows, by source."""
    by_source: dict[str, list[int]] = {}
    for row in rows[:NAMED_ROWS]:
        by_source.setdefault(row["source"], []).append(row["row"])
    told = [f"{source} row {', '.join(map(str, numbers))}" for source, numbers in by_source.items()]
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return f"{'; '.join(told)}{more}"


def _write(file: Path, facts: dict[str, Any]) -> str:
    try:
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        write_text(file, text)
    except OSError as error:
        return f"the list of all its rows can't be written: {error}"
    return f"counting from 0; all its rows are in {file}"
