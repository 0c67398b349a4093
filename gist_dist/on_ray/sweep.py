"""`gist-dist sweep RECIPE --over FILE`: many runs on Ray Tune, compared with statistics.

Every trial is an ordinary run in its own folder, output_dir/RECIPE-SWEEP-SETTING-seed-N; all share corpora and guide
caches. What is known of a sweep is in those folders and in output_dir/sweep-NAME/trials: nothing of Tune's own state
is read again, so that the same command does what is left, whatever ended it.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, no_type_check

from gist_dist.common.errors import UserError
from gist_dist.common.events import phase
from gist_dist.common.files import json_object, write_text
from gist_dist.common.text import duration, one_line, plural
from gist_dist.config import RunConfig
from gist_dist.evaluation.names import parse_task
from gist_dist.evaluation.suites import check_evaluation, expanded
from gist_dist.on_ray.cluster.capacity import check_resources, cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.cluster.connect import connected
from gist_dist.on_ray.driver import Stopped, train_and_evaluate
from gist_dist.on_ray.sweep_plan import Planned, SweepConfig, choose, plan_choices, plan_drawn, plan_one, plan_trials
from gist_dist.recipe import parse_config
from gist_dist.report.run import read_run
from gist_dist.report.sweep import Sweep, Trial, points_of, value_of, write_sweep
from gist_dist.runs.evaluations import read_evaluations
from gist_dist.runs.folder import RunFolder

logger = logging.getLogger(__name__)

TRIALS = "trials"
LITTLE: dict[str, float] = {"memory": 1.0}
"""What a trial itself takes of the cluster, in bytes: its workers and evaluations take theirs, and Tune wants some."""
LOOK_SECONDS = 1.0
NEW_OUTPUT = "RAY_AIR_NEW_OUTPUT"


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
                runner.run(tried := list(plan_choices(recipe, over)))
                chosen = {} if runner.is_stopped else choose(over, tried)
            runner.run(list(plan_trials(recipe, over, chosen)))
    trials = [trial for trial in _known_trials(folder) if trial.seed in over.seeds and trial.arm in (over.arms or {""})]
    written = write_sweep(over.name, trials, over.contrasts, over.metric, folder / "report.html")
    if runner.is_stopped:
        raise Stopped(f"stopped with {plural(runner.num_left, 'run')} left, {folder}")
    return written


def check_sweep(recipe: RunConfig, over: SweepConfig) -> None:
    """UserError for settings that are no recipe, for folders of other runs, and for a metric that nothing scores."""
    settings = list(plan_choices(recipe, over)) if over.choose else []
    settings += list(plan_trials(recipe, over, {})) if over.search != "optuna" else [plan_drawn(recipe, over, 0)]
    names = [planned.config.name for planned in settings]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"over: two settings are the same run, {twice}")
    for planned in settings:
        config = planned.config
        check_evaluation(config.evaluate, config.watched)
        if not over.choose:  # the runs of a setting have the chosen values, which are not known yet
            RunFolder(config).refuse_other_recipe()
        scored = {*(parse_task(task).name for task in expanded(config.evaluate).tasks), *config.watched}
        if not scored:
            raise UserError(f"{planned.label}: nothing is scored; set evaluate.tasks, or data.hold_out")
        if over.metric not in scored | {"mean"}:
            raise UserError(
                f"metric {over.metric!r}: {planned.label} does not score it ({', '.join(sorted(scored))} is)"
            )
        if over.stop_early and config.evaluate.every_steps is None:
            raise UserError("stop_early judges runs while they train; set evaluate.every_steps in the recipe")


def folder_of(recipe: RunConfig, over: SweepConfig) -> Path:
    """Of the sweep, beside its runs."""
    return Path(recipe.output_dir) / f"sweep-{over.name}"


class _Runner:
    """Gives trials to Ray Tune, and knows what became of them."""

    def __init__(self, over: SweepConfig, folder: Path, resources: dict[str, float]) -> None:
        self.over, self.folder, self.resources = over, folder, resources
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
        """What has neither finished nor failed was ended by stop_early, or the command was stopped."""
        left = [one for one in planned if not RunFolder(one.config).is_finished()]
        left = [one for one in left if not json_object(_file_of(self.folder, one.config.name)).get("failure")]
        if left and not self.over.stop_early:
            self.is_stopped, self.num_left = True, len(left)


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
    for key, (kind, bounds) in over.domains.items():
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
        planned = plan_one(parse_config(base), over, next(iter(over.arms), ""), parameters, over.seeds[0], {})
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
    if not json_object(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        known = {"arm": planned.arm, "values": planned.values, "seed": planned.seed, "chosen": planned.chosen}
        write_text(file, json.dumps(known | {"run": str(planned.config.run_dir), "failure": None}))


def _note(file: Path, **values: Any) -> None:
    write_text(file, json.dumps(json_object(file) | values))


def _known_trials(folder: Path) -> list[Trial]:
    """In the order of their names."""
    found = [json_object(file) for file in sorted((folder / TRIALS).glob("*.json"))]
    return [
        Trial(tree["arm"], tree["values"], tree["seed"], Path(tree["run"]), tree["chosen"], tree.get("failure"))
        for tree in found
        if {"arm", "values", "seed", "run", "chosen"} <= tree.keys()
    ]
