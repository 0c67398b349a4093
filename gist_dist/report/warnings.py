"""What a careful reader would point at."""

from collections.abc import Iterable
from typing import Any

from gist_dist.common.text import listed, one_line, percent, plural
from gist_dist.report.run import Run
from gist_dist.report.scores import summarize_scores

LITTLE_WEIGHT, MUCH_WEIGHT = 0.005, 0.9
"""Shares of the negatives' softmax weight; facts and figures: docs/methodology.md, What the mask is worth."""


def find_warnings(run: Run, training: dict[str, Any], verdict: dict[str, Any]) -> list[dict[str, str]]:
    """What a careful reader would point at: [{code, text}], codes stable for scripts."""
    return [{"code": code, "text": text} for code, text in _warnings(run, training, verdict)]


def _warnings(run: Run, training: dict[str, Any], verdict: dict[str, Any]) -> Iterable[tuple[str, str]]:
    steps, planned = training["steps"], training["planned_steps"]
    first, last = training["loss_first"], training["loss_last"]
    ended_early = (summarize_scores(run) or {}).get("stopped_early")
    if planned and steps < planned and not ended_early:
        yield "unfinished", f"Training stopped at step {steps} of {planned}; the report covers those steps."
    if bad := training["non_finite_steps"]:
        at, end = f"The loss or its gradient was not finite at {plural(len(bad), 'step')} ({listed(bad)})", "."
        if run.section("optim").get("non_finite") == "skip":
            end = ": skipped, the weights stayed as they were."
        yield "non_finite_loss", at + end
    elif steps >= 40 and None not in (first, last) and last >= first:
        yield (
            "loss_not_falling",
            f"The loss did not fall: {first:.4g} in the first steps, {last:.4g} in the last.",
        )
    yield from _guide_warnings(run, training, verdict)
    if (training["rows_without_negatives_fraction"] or 0) > 0.01:
        share = percent(training["rows_without_negatives_fraction"])
        remedy = "raise batch.global_size" + (" or lower loss.margin" if run.config.get("guide") else "")
        yield (
            "rows_without_negatives",
            f"{share} of the rows had no negative left and taught nothing: {remedy}.",
        )
    if (training["padding_fraction"] or 0) > 0.3:
        share = percent(training["padding_fraction"])
        yield (
            "padding",
            f"{share} of the encoded tokens were padding: lower batch.chunk_tokens or raise "
            "batch.global_size, so that the texts of a chunk are of one length.",
        )
    for source in run.data.get("reports") or run.data.get("sources", ()):
        rows, used = (source.get("rows_read") or 0) + (source.get("rows_added") or 0), source.get("rows_used") or 0
        if rows and (rows - used) / rows > 0.05:
            share = percent((rows - used) / rows)
            yield "rows_dropped", f"{share} of the rows of {source.get('name')} were dropped as unusable."
    for evaluation in run.evaluations:
        for task, error in evaluation.failed.items():
            yield "scores_failed", f"After step {evaluation.step}, {task} failed: {one_line(str(error))}"
    for label, errors in run.failures.items():
        for task, error in errors.items():
            yield "task_failed", f"MTEB task {task} failed ({label}): {one_line(str(error))}"
    for section in ("student", "guide"):
        if run.section(section).get("trust_remote_code"):
            yield "remote_code", f"{section}.trust_remote_code was on: code that came with the model was run."
    for complaint in run.logged:
        yield "checkpoint", f"From the log: {one_line(complaint)}"
    if run.unreadable_lines:
        damaged = plural(run.unreadable_lines, "line")
        yield "metrics_damaged", f"{damaged} of metrics.jsonl can't be read; what is shown is without them."


def _guide_warnings(run: Run, training: dict[str, Any], verdict: dict[str, Any]) -> Iterable[tuple[str, str]]:
    masked, before, of_guide = (
        training["masked_fraction"],
        *(verdict["overall"][side] for side in ("before", "guide")),
    )
    if None not in (before, of_guide) and of_guide < before:
        yield (
            "guide_weaker",
            f"The guide scores {of_guide:.2f} on these tasks, less than the untrained student with {before:.2f}: it "
            "may mask the wrong candidates. Take a stronger one, or lower loss.margin.",
        )
    if not run.config.get("guide") or masked["all"] is None:
        return
    weight = training["masked_weight"]["all"]  # None in runs of before it was measured
    if masked["all"] == 0:
        yield (
            "nothing_masked",
            "The guide masked no candidate at all: it cost time and changed nothing. Raise loss.margin or "
            "take another guide.",
        )
    elif weight is not None and weight < LITTLE_WEIGHT:
        yield (
            "little_masked",
            f"The masked candidates held {percent(weight)} of the negatives' softmax weight: without the guide "
            "the run would have been about the same. gist-dist inspect shows where a guide matters: a lower "
            "temperature, a larger batch, clustered batches, other data.",
        )
    if (masked["all"] if weight is None else weight) > (0.5 if weight is None else MUCH_WEIGHT):
        share = f"{percent(masked['all'])} of the candidates"
        if weight is not None:
            share = f"{percent(weight)} of the negatives' weight in the softmax"
        yield (
            "much_masked",
            f"The guide masked {share}: it hardly separates positives from other texts, or loss.margin is too high.",
        )
    if (masked["ap"] or 0) > 0.5:
        yield (
            "guide_ranks_positives_low",
            f"To the guide, {percent(masked['ap'])} of the other rows' positives are closer to an anchor "
            "than its own: check that it suits the data (language, domain, prompts), and that anchors and "
            "positives match.",
        )
