"""`gist-dist cotrain A B --rounds n`: two students that guide each other, round after round.

In round r a student goes on from its own model of round r - 1 and is guided by the other's model of round r - 1; in
round 1 both are what their recipes name. Neither depends on who is trained first. Beside them, each student is trained
as often and as long with a fixed guide: the recipe's, or the other student untrained.

Every training is an ordinary run in a folder of its own, output_dir/NAME-round-r and NAME-fixed-round-r; the same
command goes on where it was.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gist_dist.common.errors import UserError
from gist_dist.config import GuideConfig, RunConfig, SourcePrompts
from gist_dist.evaluation.suites import check_evaluation
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.driver import prepare, train_and_evaluate
from gist_dist.recipe import parse_config
from gist_dist.report.rounds import Rounds, write_rounds
from gist_dist.runs.folder import RunFolder

logger = logging.getLogger(__name__)


class Planned(NamedTuple):
    """One training of the whole."""

    student: str
    """Name of its recipe."""
    kind: str
    """"cotrained" or "fixed"."""
    round: int
    config: RunConfig


def cotrain(first: RunConfig, second: RunConfig, rounds: int, with_fixed: bool = True) -> Rounds:
    """All that is left to do, then the page. UserError before anything is trained; Stopped as in training."""
    pair = first.absolute_paths(), second.absolute_paths()
    check_cotrain(*pair, rounds)
    runs = list(plan_rounds(*pair, rounds, with_fixed))
    for planned in runs:
        RunFolder(planned.config).refuse_other_recipe()
    for planned in runs[:2]:
        if not RunFolder(planned.config).is_trained():
            check_evaluation(planned.config.evaluate, planned.config.watched)
            prepare(
                planned.config, clustered=False
            )  # mistakes in the second recipe are named before the first is trained
    with connected(pair[0].cluster):
        for planned in runs:
            logger.info("round %d of %d: %s with %s", planned.round, rounds, planned.student, _guide_of(planned))
            train_and_evaluate(planned.config)  # of a run that is done, what is left: nothing, or tasks that failed
    folders = [(p.student, p.kind, p.round, p.config.run_dir) for p in runs]
    return write_rounds(folders, Path(pair[0].output_dir) / f"cotrain-{first.name}-{second.name}.html")


def check_cotrain(first: RunConfig, second: RunConfig, rounds: int) -> None:
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least 1")
    if first.name == second.name:
        raise UserError(f"both recipes have the name {first.name}, and their runs would share folders; rename one")
    for recipe in (first, second):
        if recipe.guide_refresh:
            raise UserError(
                f"{recipe.name}: guide.refresh = {recipe.guide_refresh} makes a copy of the student its guide, but "
                "in co-training the other student is the guide; leave it out"
            )
        if not (recipe.optim.steps or recipe.optim.epochs):
            logger.info("%s: every round is one epoch; optim.steps or optim.epochs says otherwise", recipe.name)


def plan_rounds(first: RunConfig, second: RunConfig, rounds: int, with_fixed: bool = True) -> Iterator[Planned]:
    """In the order in which they are trained."""
    for number in range(1, rounds + 1):
        for own, other in ((first, second), (second, first)):
            guide = other.student.model if number == 1 else _model(other, "cotrained", number - 1)
            yield Planned(own.name, "cotrained", number, _round(own, other, "cotrained", number, guide))
    for number in range(1, (rounds if with_fixed else 0) + 1):
        for own, other in ((first, second), (second, first)):
            yield Planned(own.name, "fixed", number, _round(own, other, "fixed", number, other.student.model))


def _round(own: RunConfig, other: RunConfig, kind: str, number: int, guide_model: str) -> RunConfig:
    """The recipe of one round; each has a seed of its own, so that it sees its batches in another order."""
    student = own.student
    if number > 1:
        student = student.model_copy(update={"model": _model(own, kind, number - 1), "revision": None})
    recipe = own.model_copy(update={
        "name": _name(own, kind, number),
        "seed": (own.seed + number - 1) % 2**32,
        "student": student,
        "evaluate": own.evaluate.model_copy(update={
            "baseline": own.evaluate.baseline and kind == "cotrained" and number == 1, "guide": False,
        }),
        "tracking": own.tracking.model_copy(update={
            "hub": own.tracking.hub.model_copy(update={"repo_id": None}),
        }),
    })  # fmt: skip
    if kind == "cotrained" or not own.has_guide_model:
        recipe = _guided_by(recipe, own, other, guide_model, is_first=number == 1 or kind == "fixed")
    return parse_config(recipe.model_dump(mode="json"), recipe.name)


def _guided_by(recipe: RunConfig, own: RunConfig, other: RunConfig, model: str, is_first: bool) -> RunConfig:
    """By the other student as its recipe encodes: its limit of tokens, prompts and precision."""
    kept = ("max_tokens", "prompts", "precision", "attention", "trust_remote_code")
    guide = GuideConfig(
        model=model,
        revision=other.student.revision if is_first else None,
        mode="cache" if own.guide_mode == "cache" else "online",
        cache_dir=own.guide.cache_dir if own.guide else None,
        **{key: getattr(other.student, key) for key in kept},
    )
    sources = tuple(
        source.model_copy(update={"prompts": SourcePrompts(student=source.prompts.student)})
        for source in recipe.data.sources
    )
    return recipe.model_copy(update={"guide": guide, "data": recipe.data.model_copy(update={"sources": sources})})


def _name(recipe: RunConfig, kind: str, number: int) -> str:
    return f"{recipe.name}-round-{number}" if kind == "cotrained" else f"{recipe.name}-fixed-round-{number}"


def _model(recipe: RunConfig, kind: str, number: int) -> str:
    return str(recipe.model_copy(update={"name": _name(recipe, kind, number)}).run_dir / "model")


def _guide_of(planned: Planned) -> str:
    guide: Any = planned.config.guide
    return "the other student as guide" if planned.kind == "cotrained" else f"{guide.model} as the fixed guide"
