"""What a sweep runs: its file, and the trials that follow from it."""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gist_dist.common.errors import UserError
from gist_dist.common.plain_yaml import load_plain
from gist_dist.common.text import SHORT, one_line
from gist_dist.config import RunConfig, Section
from gist_dist.recipe import parse_config, parse_section, set_value
from gist_dist.report.run import read_run
from gist_dist.report.sweep import label_of, points_of, value_of

LONGEST_NAME = 100
DOMAINS = {"uniform": 2, "loguniform": 2, "randint": 2, "choice": None}
"""How a value is drawn -> how many numbers that takes."""


class StopEarly(Section):
    """Ray Tune's ASHA over the evaluations while the runs train: at every rung the worse runs end."""

    grace: int = Field(default=2, ge=1)
    """Evaluations that every run has."""
    factor: int = Field(default=3, ge=2)
    """One run in so many passes a rung."""


class SweepConfig(Section):
    """The file of a sweep."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)
    """Part of the runs' names."""
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=30)], dict[str, Any]] = Field(
        default_factory=dict
    )
    """Name -> values of the recipe (dotted keys) that it replaces; {} is the recipe as it is. Compared by contrasts."""
    over: dict[str, Any] = Field(default_factory=dict)
    """Dotted key of the recipe -> a list of values (every combination is run, with every arm), or, where search draws
    them, how: {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]} without high, or a list."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = (0,)
    """Each setting is run with each: the same in all, so that settings are compared pair by pair."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """optuna (needs gist-dist[optuna]) draws where scores were high; one arm and one seed."""
    samples: int = Field(default=16, ge=1, le=10_000)
    """Settings that random and optuna draw."""
    choose: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted key -> values of which each setting takes the best, found beforehand with choose_seed: so that no arm has
    the other's learning rate."""
    choose_seed: int = Field(default=1000, ge=0, lt=2**32)
    """Not among seeds: what was chosen by a score is not scored by it."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of arms; tested as one family (Holm), at all values of over."""
    metric: str = "mean"
    """Of all tasks that are scored, or one of them."""
    stop_early: StopEarly | None = None
    max_concurrent: int | None = Field(default=None, ge=1)
    """Runs at once; null: as many as the cluster has room for."""

    @model_validator(mode="after")
    def _consistent(self) -> "SweepConfig":
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: at least one, all different")
        for pair in self.contrasts:
            for arm in pair:
                if arm not in self.arms:
                    raise ValueError(f"contrasts: there is no arm {arm!r} (arms: {', '.join(self.arms) or 'none'})")
        for key, values in self.over.items():
            self._check_values(key, values)
        if self.choose and self.search != "grid":
            raise ValueError(f"choose: search {self.search} draws values itself; put them into over")
        if self.choose and self.choose_seed in self.seeds:
            raise ValueError(f"choose_seed {self.choose_seed} is one of seeds; take another")
        for key, values in self.choose.items():
            if not values or key in self.over:
                raise ValueError(f"choose.{key}: a list of values that over does not have")
        if self.search != "grid" and not self.over:
            raise ValueError(f"search {self.search}: over says nothing to draw from")
        if self.search == "optuna" and (len(self.arms) > 1 or len(self.seeds) > 1):
            raise ValueError("search optuna: one arm and one seed; compare what it finds in a sweep of its own")
        return self

    @property
    def domains(self) -> dict[str, tuple[str, list[Any]]]:
        """How the values of every key are drawn, and from what; a list is a choice."""
        return {
            key: next(iter(domain.items())) if isinstance(domain, dict) else ("choice", domain)
            for key, domain in self.over.items()
        }

    def _check_values(self, key: str, values: Any) -> None:
        if isinstance(values, list) and values:
            return
        kinds = ", ".join(DOMAINS)
        if self.search == "grid":
            raise ValueError(f"over.{key}: a list of values; {kinds} are drawn by search random or optuna")
        if not isinstance(values, dict) or len(values) != 1 or next(iter(values)) not in DOMAINS:
            raise ValueError(f"over.{key}: {SHORT.repr(values)} is neither a list nor one of {kinds}")
        kind, bounds = next(iter(values.items()))
        number = DOMAINS[kind]
        if not isinstance(bounds, list) or not bounds or (number and len(bounds) != number):
            raise ValueError(f"over.{key}.{kind}: {SHORT.repr(bounds)} is no list of {number or 'values'}")
        if number and not (all(type(b) in (int, float) for b in bounds) and bounds[0] < bounds[1]):
            raise ValueError(f"over.{key}.{kind}: two numbers, the smaller first")
        if kind == "loguniform" and bounds[0] <= 0:
            raise ValueError(f"over.{key}.loguniform: both above 0")
        if kind == "randint" and not all(type(b) is int for b in bounds):
            raise ValueError(f"over.{key}.randint: whole numbers")


@dataclass(frozen=True)
class Planned:
    """A trial, before it is run."""

    arm: str
    values: dict[str, Any]
    seed: int
    config: RunConfig
    chosen: dict[str, Any]

    @property
    def label(self) -> str:
        return label_of(self.arm, self.values | self.chosen) or "the recipe"


def load_sweep(path: Path) -> SweepConfig:
    """UserError that names the file and the field."""
    try:
        tree = load_plain(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a sweep is a mapping (arms, over, seeds, …); found {type(tree).__name__}")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:40] or "sweep"
    return parse_section(SweepConfig, {"name": name} | tree, str(path))


def plan_trials(
    recipe: RunConfig, over: SweepConfig, chosen: Mapping[tuple[str, str], dict[str, Any]]
) -> Iterator[Planned]:
    """Seed by seed, so that whatever ends a sweep leaves pairs."""
    for seed in over.seeds:
        for arm, values in settings_of(over):
            own = chosen.get((arm, _key(values)), {})
            yield plan_one(recipe, over, arm, values, seed, own)


def plan_choices(recipe: RunConfig, over: SweepConfig) -> Iterator[Planned]:
    """Every setting with every combination of what it chooses from."""
    for arm, values in settings_of(over):
        for own in _combinations(over.choose):
            yield plan_one(recipe, over, arm, values, over.choose_seed, own)


def choose(over: SweepConfig, tried: list[Planned]) -> dict[tuple[str, str], dict[str, Any]]:
    """Setting -> the values whose run scored best; UserError where none of a setting has a score."""
    points = {planned.config.name: points_of(read_run(planned.config.run_dir)) for planned in tried}
    tasks = sorted({task for found in points.values() for task in found})
    best: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
    for planned in tried:
        value = value_of(points[planned.config.name], tasks, over.metric)
        setting = planned.arm, _key(planned.values)
        if value is not None and value > best.get(setting, (-math.inf, {}))[0]:
            best[setting] = value, planned.chosen
    for planned in tried:
        if (planned.arm, _key(planned.values)) not in best:
            raise UserError(
                f"{label_of(planned.arm, planned.values)}: no run with choose_seed has a score to choose by"
            )
    return {setting: own for setting, (_, own) in best.items()}


def settings_of(over: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arm and values of every setting; what random draws is a function of the file."""
    arms = over.arms or {"": {}}
    if over.search == "grid":
        drawn = list(_combinations(over.over))
    else:
        drawn = [_draw(over, number) for number in range(over.samples)]
    for values in drawn:
        for arm in arms:
            yield arm, values


def _combinations(lists: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _draw(over: SweepConfig, number: int) -> dict[str, Any]:
    """The values of one sample."""
    rng = random.Random(f"{over.name} {number}")
    draws: dict[str, Callable[..., Any]] = {
        "uniform": rng.uniform,
        "loguniform": lambda low, high: math.exp(rng.uniform(math.log(low), math.log(high))),
        "randint": lambda low, high: rng.randrange(low, high),
        "choice": lambda *values: rng.choice(values),
    }
    drawn = {}
    for key, (kind, bounds) in over.domains.items():
        value = draws[kind](*bounds)
        drawn[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    return drawn


def plan_drawn(recipe: RunConfig, over: SweepConfig, number: int) -> Planned:
    arm = next(iter(over.arms), "")
    return plan_one(recipe, over, arm, _draw(over, number), over.seeds[0], {})


def plan_one(
    recipe: RunConfig, over: SweepConfig, arm: str, values: dict[str, Any], seed: int, chosen: dict[str, Any]
) -> Planned:
    tree = recipe.model_dump(mode="json")
    for key, value in (over.arms.get(arm, {}) | values | chosen).items():
        set_value(tree, key, value, f"sweep {over.name}, {key}")
    tree |= {"seed": seed, "name": _name(recipe.name, over.name, arm, values | chosen, seed)}
    tree["tracking"]["hub"]["repo_id"] = None
    told = label_of(arm, values | chosen) or "the recipe"
    return Planned(arm, values, seed, parse_config(tree, f"sweep {over.name}, {told}"), chosen)


def _name(recipe: str, sweep: str, arm: str, values: dict[str, Any], seed: int) -> str:
    """Readable where it is short enough, and else by a hash of the values."""
    told = [f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in values.items()]
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-") for part in (arm, *told) if part]
    name = "-".join([recipe, sweep, *parts, f"seed-{seed}"])
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps([recipe, sweep, arm, values], sort_keys=True).encode()).hexdigest()[:10]
    return "-".join([recipe[:30], sweep, digest, f"seed-{seed}"])


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True)
