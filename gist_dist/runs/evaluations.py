"""Scores of a run while it trains: a folder of the run for every step that was scored.

evaluations/step-00000100/model     the student of that step, until it is scored; the best and the newest stay longer
                          <task>.json, details/   MTEB's results
                          scores.json             what was found; with it the evaluation is done

A worker writes the model, the driver everything else. Whoever starts next sees what is left to do.
"""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field, TypeAdapter

from gist_dist.common.files import write_folder, write_text
from gist_dist.common.untrusted import Number, Shape, load_plain_json, problem
from gist_dist.config import EvaluateConfig

EVALUATIONS = "evaluations"
"""In a run's folder."""
LAST_MODEL = "model-last"
"""In a run's folder: the student of the last step, where another one is the run's model."""
SCORES = "scores.json"
STEP = re.compile(r"step-(\d{8,})")
LOSS = "loss"
"""What evaluate.keep_best calls the loss of the held-out rows."""


@dataclass(frozen=True)
class Evaluation:
    """What was found after one step."""

    step: int
    """0: of the untrained student."""
    scores: dict[str, float]
    """Task -> MTEB's main score, 0 to 1."""
    loss: float | None = None
    """Mean over the held-out rows, in batches as in training; None where no rows are held out."""
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    """Task -> one sentence."""

    def value(self, of: str) -> float | None:
        """By which steps are compared, more being better: points of a task or of the mean, or the negative loss. None
        where it is not known, as after a failure."""
        if of == LOSS:
            return None if self.loss is None or not math.isfinite(self.loss) else -self.loss
        if of == "mean":
            finite = not self.failed and self.scores and all(map(math.isfinite, self.scores.values()))
            return 100 * fmean(self.scores.values()) if finite else None
        score = self.scores.get(of, math.nan)
        return 100 * score if math.isfinite(score) else None

    def line(self) -> dict[str, Any]:
        """For metrics.jsonl and the trackers; numbers that are not finite are null."""
        scores = {task: score if math.isfinite(score) else None for task, score in self.scores.items()}
        told: dict[str, Any] = {"scores": scores, "loss": self.loss, "seconds": self.seconds}
        return {"step": self.step, "evaluation": {key: value for key, value in told.items() if value is not None}}


class _Scores(Shape):
    step: int = Field(ge=0, le=10**15)
    scores: dict[str, Number | None]
    loss: Number | None = None
    seconds: Number = 0.0
    failed: dict[str, str] = Field(default_factory=dict)


SHAPE: TypeAdapter[Any] = TypeAdapter(_Scores)


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / EVALUATIONS / f"step-{step:08}"


def model_of(run_dir: Path, step: int) -> Path:
    return folder_of(run_dir, step) / "model"


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    tree = asdict(evaluation) | {"scores": evaluation.line()["evaluation"]["scores"]}
    write_text(folder_of(run_dir, evaluation.step) / SCORES, json.dumps(tree, indent=1, allow_nan=False))


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """Those that are done, by step; a damaged file counts as none."""
    found = []
    for step in _steps(run_dir):
        try:
            tree = load_plain_json((folder_of(run_dir, step) / SCORES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not problem(SHAPE, tree) and tree["step"] == step:
            scores = {task: math.nan if score is None else float(score) for task, score in tree["scores"].items()}
            found.append(Evaluation(**tree | {"scores": scores}))
    return found


def is_done(run_dir: Path, step: int) -> bool:
    """The folder is listed, as NFS remembers for half a minute that a file was not there."""
    try:
        return SCORES in os.listdir(folder_of(run_dir, step))
    except OSError:
        return False


def unscored(run_dir: Path) -> list[int]:
    """Steps whose model waits to be scored."""
    return [step for step in _steps(run_dir) if model_of(run_dir, step).is_dir() and not is_done(run_dir, step)]


@dataclass(frozen=True)
class Verdict:
    """What the evaluations so far say of the run."""

    best: int | None = None
    """The step whose model is the run's; None without evaluate.keep_best or a score."""
    stop: int | None = None
    """The step after which training ends early, if it does."""


def judge(
    evaluations: list[Evaluation], keep_best: str | None, stop_after: int | None = None, least_gain: float = 0.0
) -> Verdict:
    """The best step, the first of equal ones; and where evaluate.stop_after ran out. The untrained student, step 0, is
    what the first step has to beat for a gain, and never the run's model. What was scored after the end counts for
    nothing, so that the verdict is the same however far training went on meanwhile."""
    if keep_best is None:
        return Verdict()
    best: int | None = None
    highest, to_beat, without_gain = -math.inf, -math.inf, 0
    for evaluation in evaluations:
        value = evaluation.value(keep_best)
        if value is None:
            continue
        if evaluation.step > 0 and value > highest:
            best, highest = evaluation.step, value
        if value > to_beat + (least_gain if math.isfinite(to_beat) else 0):
            to_beat, without_gain = value, 0
        else:
            without_gain += 1
        if stop_after and without_gain >= stop_after:
            return Verdict(best, evaluation.step)
    return Verdict(best)


def verdict_so_far(run_dir: Path, evaluate: EvaluateConfig) -> Verdict:
    """The verdict on what a run's folder holds."""
    return judge(read_evaluations(run_dir), evaluate.keep_best, evaluate.stop_after, evaluate.least_gain)


def adopt_best(run_dir: Path, verdict: Verdict, last: int) -> None:
    """Make the best step's model the run's, and keep that of the last step beside it. May be ended anywhere and called
    again. last: the run's last step, or the one after which it was stopped early."""
    model, aside = run_dir / "model", run_dir / LAST_MODEL
    if verdict.best is None or (verdict.best == last and model.is_dir()):
        return
    source = model_of(run_dir, last)
    if verdict.best != last and not aside.is_dir():
        write_folder(aside, partial(shutil.copytree, source if source.is_dir() else model))
    if model_of(run_dir, verdict.best).is_dir():
        write_folder(model, partial(shutil.copytree, model_of(run_dir, verdict.best)))


def remove_models(run_dir: Path, keep: set[int | None]) -> None:
    """Remove the models of steps that were scored, but for those to keep."""
    for step in _steps(run_dir):
        if step not in keep and is_done(run_dir, step):
            shutil.rmtree(model_of(run_dir, step), ignore_errors=True)


def remove_all_models(run_dir: Path) -> None:
    """Those too that were not scored, because training had ended before."""
    for step in _steps(run_dir):
        shutil.rmtree(model_of(run_dir, step), ignore_errors=True)
        if not is_done(run_dir, step):
            shutil.rmtree(folder_of(run_dir, step), ignore_errors=True)


def _steps(run_dir: Path) -> list[int]:
    try:
        names = os.listdir(run_dir / EVALUATIONS)
    except OSError:
        return []
    return sorted(int(found[1]) for name in names if (found := STEP.fullmatch(name)))
