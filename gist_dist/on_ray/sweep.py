"""`gist-dist sweep RECIPE --over FILE`: many runs on Ray Tune, compared with statistics.

Every trial is an ordinary run in its own folder, output_dir/RECIPE-SWEEP-SETTING-seed-N; all share corpora and guide
caches. What is known of a sweep is in those folders and in output_dir/sweep-NAME/trials: nothing of Tune's own state
is read again, so that the same command does what is left, whatever ended it.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, no_type_check

from pydantic import Field, model_validator

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.files import write_text
from gist_dist.common.plain_yaml import load_plain
from gist_dist.common.text import SHORT, duration, one_line, plural
from gist_dist.common.untrusted import load_plain_json
from gist_dist.config import RunConfig, Section
from gist_dist.evaluation.suites import check_evaluation
from gist_dist.on_ray.cluster.capacity import check_resources, cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.driver import Stopped, train_and_evaluate
from gist_dist.recipe import parse_config, parse_section
from gist_dist.report.run import read_run
from gist_dist.report.sweep import Sweep, Trial, label_of, points_of, value_of, write_sweep
from gist_dist.runs.evaluations import read_evaluations
from gist_dist.runs.folder import RunFolder

logger = logging.getLogger(__name__)

TRIALS = "trials"
LONGEST_NAME = 100
LITTLE: dict[str, float] = {"memory": 1.0}
"""What a trial itself takes of the cluster, in bytes: its workers and evaluations take theirs, and Tune wants some."""
LOOK_SECONDS = 1.0
NEW_OUTPUT = "RAY_AIR_NEW_OUTPUT"
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


def sweep(recipe: RunConfig, over: SweepConfig) -> Sweep:
    """All that is left to do, then the page. UserError before anything is trained; Stopped as in training."""
    recipe = recipe.absolute_paths()
    check_sweep(recipe, over)
    folder = folder_of(recipe, over)
    with connected(recipe.cluster) as resources:
        check_resources(recipe.cluster, resources)
        runner = _Runner(over, folder, resources)
        if over.search == "optuna":
            runner.search(recipe)
        else:
            chosen = dict[tuple[str, str], dict[str, Any]]()
            if over.choose:
                runner.run(list(plan_choices(recipe, over)))
                chosen = choose(over, list(plan_choices(recipe, over)))
            runner.run(list(plan_trials(recipe, over, chosen)))
    trials = [trial for trial in _known_trials(folder) if trial.seed in over.seeds and trial.arm in (over.arms or {""})]
    trials = [_with_failure(trial, runner.failures) for trial in trials]
    written = write_sweep(over.name, trials, over.contrasts, over.metric, folder / "report.html")
    if runner.is_stopped:
        raise Stopped(f"stopped with {plural(runner.num_left, 'run')} left, {folder}")
    return written


def check_sweep(recipe: RunConfig, over: SweepConfig) -> None:
    """UserError for settings that are no recipe, for folders of other runs, and for a metric that nothing scores."""
    settings = list(plan_choices(recipe, over)) if over.choose else []
    settings += list(plan_trials(recipe, over, {})) if over.search != "optuna" else [_drawn(recipe, over, 0)]
    names = [planned.config.name for planned in settings]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"over: two settings are the same run, {twice}")
    for planned in settings:
        config = planned.config
        check_evaluation(config.evaluate, config.watched)
        if not over.choose:  # the runs of a setting have the chosen values, which are not known yet
            RunFolder(config).refuse_other_recipe()
        scored = {*config.evaluate.tasks, *config.watched}
        if not scored:
            raise UserError(f"{planned.label}: nothing is scored; set evaluate.tasks, or data.hold_out")
        if over.metric not in scored | {"mean"}:
            raise UserError(
                f"metric {over.metric!r}: {planned.label} does not score it ({', '.join(sorted(scored))} is)"
            )
        if over.stop_early and config.evaluate.every_steps is None:
            raise UserError("stop_early judges runs while they train; set evaluate.every_steps in the recipe")


def plan_trials(
    recipe: RunConfig, over: SweepConfig, chosen: Mapping[tuple[str, str], dict[str, Any]]
) -> Iterator[Planned]:
    """Seed by seed, so that whatever ends a sweep leaves pairs."""
    for seed in over.seeds:
        for arm, values in settings_of(over):
            own = chosen.get((arm, _key(values)), {})
            yield _planned(recipe, over, arm, values, seed, own)


def plan_choices(recipe: RunConfig, over: SweepConfig) -> Iterator[Planned]:
    """Every setting with every combination of what it chooses from."""
    for arm, values in settings_of(over):
        for own in _combinations(over.choose):
            yield _planned(recipe, over, arm, values, over.choose_seed, own)


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
    for key, domain in over.over.items():
        kind, bounds = next(iter(domain.items())) if isinstance(domain, dict) else ("choice", domain)
        value = draws[kind](*bounds)
        drawn[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    return drawn


def _drawn(recipe: RunConfig, over: SweepConfig, number: int) -> Planned:
    arm = next(iter(over.arms), "")
    return _planned(recipe, over, arm, _draw(over, number), over.seeds[0], {})


def _planned(
    recipe: RunConfig, over: SweepConfig, arm: str, values: dict[str, Any], seed: int, chosen: dict[str, Any]
) -> Planned:
    tree = recipe.model_dump(mode="json")
    for key, value in (over.arms.get(arm, {}) | values | chosen).items():
        _set(tree, key, value)
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


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """UserError for a key below something that has none."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            inner = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            inner = node.setdefault(part, {})
            if inner is None:
                inner = node[part] = {}
        if not isinstance(inner, dict | list):
            raise UserError(f"sweep: {key}: {'.'.join(parents[: depth + 1])} has no keys")
        node = inner
    node[last] = value


def folder_of(recipe: RunConfig, over: SweepConfig) -> Path:
    """Of the sweep, beside its runs."""
    return Path(recipe.output_dir) / f"sweep-{over.name}"


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True)


class _Runner:
    """Gives trials to Ray Tune, and knows what became of them."""

    def __init__(self, over: SweepConfig, folder: Path, resources: dict[str, float]) -> None:
        self.over, self.folder, self.resources = over, folder, resources
        self.failures: dict[str, str] = {}
        self.is_stopped, self.num_left = False, 0

    def run(self, planned: list[Planned]) -> None:
        """What is not finished of these."""
        if self.is_stopped:
            return
        for one in planned:
            _remember(self.folder, one)
        left = [one for one in planned if not RunFolder(one.config).is_finished()]
        done = len(planned) - len(left)
        told = f"{plural(len(planned), 'run')}, {done} done before" if done else plural(len(planned), "run")
        logger.info("sweep %s: %s", self.over.name, told, extra=phase("sweeping"))
        if left:
            from ray import tune

            self._tune(left, {"number": tune.grid_search(list(range(len(left))))}, None, len(left))
            self._look(left)

    def search(self, recipe: RunConfig) -> None:
        """Optuna, told of what earlier commands have found."""
        try:
            import optuna  # noqa: F401
            from ray.tune.search.optuna import OptunaSearch
        except ImportError:
            raise UserError("search optuna: its package is missing; pip install 'gist-dist[optuna]'") from None
        known = [trial for trial in _known_trials(self.folder) if trial.seed == self.over.seeds[0]]
        scored = [(trial, value) for trial in known if (value := self._value(trial)) is not None]
        left = self.over.samples - len(scored)
        logger.info("sweep %s: %s, %d done before", self.over.name, plural(self.over.samples, "run"), len(scored))
        if left <= 0:
            return
        searcher = OptunaSearch(
            metric="score", mode="max", seed=0, points_to_evaluate=[dict(trial.values) for trial, _ in scored] or None,
            evaluated_rewards=[value for _, value in scored] or None,
        )  # fmt: skip
        self._tune(recipe, _space(self.over), searcher, left)

    def _value(self, trial: Trial) -> float | None:
        if not (trial.folder / "config.yaml").is_file():
            return None
        points = points_of(read_run(trial.folder))
        return value_of(points, sorted(points), self.over.metric)

    def _tune(self, work: "list[Planned] | RunConfig", space: dict[str, Any], searcher: Any, samples: int) -> None:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        recipes = [one.config.model_dump(mode="json") for one in work] if isinstance(work, list) else None
        base = None if isinstance(work, list) else work.model_dump(mode="json")
        scheduler = None
        if stop := self.over.stop_early:
            scheduler = ASHAScheduler(
                time_attr="evaluations", max_t=10**6, grace_period=stop.grace, reduction_factor=stop.factor
            )
        trainable: Any = tune.with_parameters(_run_trial, recipes=recipes, base=base, over=self.over)
        config = work[0].config if isinstance(work, list) else work
        tuner = tune.Tuner(
            tune.with_resources(trainable, LITTLE),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="score", mode="max", search_alg=searcher, scheduler=scheduler,
                num_samples=1 if searcher is None else samples, max_concurrent_trials=self._concurrent(config),
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(self.folder), verbose=0, callbacks=[_tell(samples)],
            ),
        )  # fmt: skip
        with _quiet_tune():
            tuner.fit()

    def _concurrent(self, config: RunConfig) -> int:
        """Runs that fit side by side, each with its workers and, where it is scored while it trains, one evaluation."""
        if self.over.max_concurrent:
            return self.over.max_concurrent
        cluster, has = config.cluster, self.resources
        each = {"CPU": cpus_per_worker(cluster, has), "GPU": gpus_per_worker(cluster, has)}
        places = cluster.max_workers + bool(config.watched)
        return max(1, int(min(has.get(kind, 0) / (places * need) + 1e-9 for kind, need in each.items() if need)))

    def _look(self, planned: list[Planned]) -> None:
        """What has not been finished: it failed, was ended early, or the command was stopped."""
        for one in planned:
            file = _file_of(self.folder, one.config.name)
            failure = _read(file).get("failure")
            if failure:
                self.failures[one.config.name] = failure
            elif not RunFolder(one.config).is_finished() and not self.over.stop_early:
                self.is_stopped, self.num_left = True, self.num_left + 1


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Without Tune's boxes: a line of ours tells of every run."""
    before = os.environ.get(NEW_OUTPUT)
    os.environ[NEW_OUTPUT] = "0"
    try:
        yield
    finally:
        os.environ.pop(NEW_OUTPUT)
        os.environ.update({} if before is None else {NEW_OUTPUT: before})


def _space(over: SweepConfig) -> dict[str, Any]:
    from ray import tune

    kinds = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    space = {}
    for key, domain in over.over.items():
        kind, bounds = next(iter(domain.items())) if isinstance(domain, dict) else ("choice", domain)
        space[key] = tune.choice(bounds) if kind == "choice" else kinds[kind](*bounds)
    return space


@no_type_check
def _run_trial(parameters, recipes, base, over) -> None:
    """What Tune runs: it has an ordinary run made, and tells of its scores."""
    import ray
    from ray import tune

    if recipes is not None:
        config = parse_config(recipes[parameters["number"]])
    else:
        planned = _planned(parse_config(base), over, next(iter(over.arms), ""), parameters, over.seeds[0], {})
        config = planned.config
        _remember(folder_of(config, over), planned)
    # Outside of the placement group of the trial, which has no room for workers; it ends with the trial.
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": "DEFAULT"}
    running = ray.remote(**options)(_train).remote(config.model_dump(mode="json"), str(folder_of(config, over)))
    seen = 0
    while not ray.wait([running], timeout=LOOK_SECONDS)[0]:
        scored = [evaluation for evaluation in read_evaluations(config.run_dir) if evaluation.step]
        if over.stop_early and len(scored) > seen:
            seen = len(scored)
            value = scored[-1].value("mean" if over.metric not in scored[-1].scores else over.metric)
            tune.report({"score": -math.inf if value is None else value, "evaluations": seen, "name": config.name})
    failure = ray.get(running)
    points = {} if failure else points_of(read_run(config.run_dir))
    value = value_of(points, sorted(points), over.metric)
    score = -math.inf if value is None else value
    tune.report({"score": score, "evaluations": seen + 1, "name": config.name, "failure": failure or ""})


@no_type_check
def _train(recipe, folder) -> str | None:
    """In a process of its own: the run; gives why it failed, if it did."""
    config = parse_config(recipe)
    file = _file_of(Path(folder), config.name)
    _note(file, failure=None)
    try:
        summary = train_and_evaluate(config)
        failure = f"{plural(summary.num_failed, 'evaluation')} failed" if summary.num_failed else None
    except UserError as error:
        failure = one_line(error)
    except Stopped:
        return None
    _note(file, failure=failure)
    return failure


@no_type_check
def _tell(total: int):
    """A line in the log for every run that ends."""
    from ray import tune

    class Tell(tune.Callback):
        done = 0

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            self._say(trial, "")

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            self._say(trial, "ended by an error of its process")

        def _say(self, trial, how) -> None:
            self.done += 1
            last = trial.last_result or {}
            score, seconds = last.get("score", -math.inf), last.get("time_total_s") or 0.0
            told = how or last.get("failure") or (f"{score:.2f}" if math.isfinite(score) else "no score")
            logger.info("run %d of %d: %s: %s, in %s", self.done, total, last.get("name", ""), told, duration(seconds))

    return Tell()


def _file_of(folder: Path, name: str) -> Path:
    return folder / TRIALS / f"{name}.json"


def _remember(folder: Path, planned: Planned) -> None:
    """Which setting a run is of; what is there of an earlier command is left."""
    file = _file_of(folder, planned.config.name)
    if not _read(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        known = {"arm": planned.arm, "values": planned.values, "seed": planned.seed, "chosen": planned.chosen}
        write_text(file, json.dumps(known | {"run": str(planned.config.run_dir), "failure": None}))


def _note(file: Path, **values: Any) -> None:
    write_text(file, json.dumps(_read(file) | values))


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = load_plain_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _known_trials(folder: Path) -> list[Trial]:
    """In the order of their names."""
    found = [_read(file) for file in sorted((folder / TRIALS).glob("*.json"))]
    return [
        Trial(tree["arm"], tree["values"], tree["seed"], Path(tree["run"]), tree["chosen"], tree.get("failure"))
        for tree in found
        if {"arm", "values", "seed", "run", "chosen"} <= tree.keys()
    ]


def _with_failure(trial: Trial, failures: Mapping[str, str]) -> Trial:
    failure = failures.get(trial.folder.name, trial.failure)
    return Trial(trial.arm, trial.values, trial.seed, trial.folder, trial.chosen, failure)
