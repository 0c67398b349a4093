"""Sweeps on one GPU, or CPU, without Ray: their small runs side by side, each in a process.

    python studies/one_gpu.py RECIPE --over FILE [--over FILE ...] [--minutes 5] [section.key=value ...]

For a machine that has a GPU and no Ray. Batches, steps, models, MTEB's scores and the page are those of `gist-dist
sweep`, whose files it takes (grid only); many runs of small models fill a GPU that one of them leaves idle. No run
begins when the minutes are over, and the same command goes on: a run that has its scores is not run again. With
--minutes 0 only the pages are written.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

os.environ |= {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}

import torch

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.core.collectives import World
from gist_dist.core.device import prepare_cuda
from gist_dist.data.corpus import open_corpus, prepare
from gist_dist.data.sampler import Sampler
from gist_dist.evaluation.evaluate import evaluate_task
from gist_dist.evaluation.tasks import load_task
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.guide_cache import GuideCache, embedding_fingerprint, fill, open_guide_cache
from gist_dist.models.precision import settled
from gist_dist.on_ray.sweep_plan import Planned, SweepConfig, choose, load_sweep, plan_choices, plan_trials
from gist_dist.recipe import load_recipe
from gist_dist.report.sweep import Trial, write_sweep
from gist_dist.runs.folder import RunFolder
from gist_dist.training.trainer import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def go_without_polars() -> None:
    """MTEB's tables want it, its scores don't."""
    if find_spec("polars") is None:
        import datasets  # noqa: F401  (it looks whether polars is there)

        sys.modules["polars"] = polars = ModuleType("polars")
        polars.__spec__ = ModuleSpec("polars", None)
        polars.__getattr__ = _of_polars  # type: ignore[method-assign]


def _of_polars(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *given, **named: None})


@dataclass(frozen=True)
class Inputs:
    """What a run's process opens."""

    corpus: str
    guide_fingerprint: str | None = None
    guide_width: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--over", action="append", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--minutes", type=float, default=1e9)
    arguments = parser.parse_intermixed_args()
    _begin()
    ends = time.monotonic() + 60 * arguments.minutes
    recipe = load_recipe(arguments.recipe, arguments.overrides).absolute_paths()
    sweeps = [load_sweep(file) for file in arguments.over]
    runner = Runner(arguments.processes, ends) if arguments.minutes else None
    tried = {over.name: list(plan_choices(recipe, over)) if over.choose else [] for over in sweeps}
    if runner:
        runner.run(_longest_first(tried.values()))
    chosen = {over.name: choose(over, tried[over.name]) for over in sweeps if all(map(has_scores, tried[over.name]))}
    trials = {over.name: list(plan_trials(recipe, over, chosen[over.name])) for over in sweeps if over.name in chosen}
    if runner:
        # Seed by seed over all sweeps: whatever ends them leaves pairs.
        runner.run(sorted(_longest_first(trials.values()), key=lambda one: one.seed))
        runner.close()
    for over in sweeps:
        if over.name in trials:
            write_page(recipe, over, trials[over.name])


def _longest_first(planned: Iterable[list[Planned]]) -> list[Planned]:
    """Small batches make many steps."""
    return sorted((one for some in planned for one in some), key=lambda one: one.config.batch.global_size)


def write_page(recipe: RunConfig, over: SweepConfig, planned: list[Planned]) -> None:
    done = [one for one in planned if has_scores(one)]
    trials = [Trial(one.arm, one.values, one.seed, one.config.run_dir, one.chosen) for one in done]
    page = Path(recipe.output_dir) / f"sweep-{over.name}" / "report.html"
    written = write_sweep(over.name, trials, over.contrasts, over.metric, page)
    print(f"\n{over.name}: {len(done)} of {len(planned)} runs", *written.lines(), sep="\n", flush=True)


def has_scores(planned: Planned) -> bool:
    folder = planned.config.run_dir / "mteb" / "trained"
    return all((folder / f"{task}.json").exists() for task in planned.config.evaluate.tasks)


class Runner:
    """Processes that a run is given to when one is free."""

    def __init__(self, processes: int, ends: float) -> None:
        self.pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin)
        self.ends, self.began = ends, time.monotonic()
        self.inputs: dict[str, Inputs] = {}

    def run(self, planned: list[Planned]) -> None:
        """What has no scores yet of these. A run that fails is told, and ends nothing."""
        left = [(one, settled(one.config)) for one in planned if not has_scores(one)]
        for _, config in left:
            if self._key(config) not in self.inputs:
                self.inputs[self._key(config)] = _prepare(config)
                print(f"{self._seconds():4.0f} s  prepared", flush=True)
        futures = {
            self.pool.submit(_run, config.model_dump(mode="json"), self.inputs[self._key(config)], self._left()): one
            for one, config in left
        }
        for done, future in enumerate(as_completed(futures), 1):
            name = futures[future].config.name
            told = _told(future)
            print(f"{self._seconds():4.0f} s  {done} of {len(futures)}: {name}: {told}", flush=True)

    def close(self) -> None:
        self.pool.shutdown()

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _left(self) -> float:
        """Wall-clock time of the last moment to begin."""
        return time.time() + self.ends - time.monotonic()

    def _key(self, config: RunConfig) -> str:
        tree = config.model_dump(mode="json")
        return json.dumps([tree["data"], tree["student"]["model"], tree["guide"], config.guide_mode], sort_keys=True)


def _told(future) -> str:
    try:
        return future.result()
    except Exception as error:
        return "failed: " + "".join(traceback.format_exception_only(error)).strip()[-300:]


def _begin() -> None:
    """In every process, before MTEB is imported."""
    go_without_polars()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        prepare_cuda()


def _prepare(config: RunConfig) -> Inputs:
    """The corpus and the guide's embeddings, and MTEB's data in the cache of datasets."""
    student = Student(config.student)
    guide = Guide.of_run(config, DEVICE) if config.has_guide_model else None
    corpus = prepare(config, student, guide, progress=lambda line: None)
    for task in config.evaluate.tasks:
        load_task(task, config.evaluate.local_tasks).load_data()
    if guide is None or config.guide_mode != "cache":
        return Inputs(corpus.place)
    cache = open_guide_cache(config, guide)
    lengths = corpus.guide_lengths
    fill(cache, corpus.guide_keys, corpus.guide_tokens, lengths, guide, config.batch.tokens_at_once)
    return Inputs(corpus.place, embedding_fingerprint(guide), guide.width)


def _run(recipe: dict, inputs: Inputs, last_call: float) -> str:
    """Train and score; gives the seconds that both took."""
    from gist_dist.recipe import parse_config

    if time.time() > last_call:
        return "not begun"
    config = parse_config(recipe)
    run, times = RunFolder(config), [time.monotonic()]
    run.create(config)
    student, corpus = Student(config.student, DEVICE), open_corpus(config, inputs.corpus)
    cache = None
    if inputs.guide_fingerprint:
        place = config.guide_cache_dir
        cache = GuideCache(place, inputs.guide_fingerprint, inputs.guide_width, config.data.local_copy)
    elif config.has_guide_model:
        raise UserError("guide.mode online: one_gpu.py takes guides from the cache")
    num_steps = Sampler(corpus, config).num_steps
    times.append(time.monotonic())
    train(config, corpus, student, cache, World())
    run.mark_trained(num_steps)
    times.append(time.monotonic())
    for task in config.evaluate.tasks:
        evaluate_task(run.folder / "model", task, config.evaluate, run.folder / "mteb" / "trained")
    times.append(time.monotonic())
    run.mark_finished()
    for folder in (run.folder / "model", run.folder / "checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
    begin, training, scoring = (after - before for before, after in pairwise(times))
    return f"{begin:.0f} s to begin, {training:.0f} to train {num_steps} steps, {scoring:.0f} to score"


if __name__ == "__main__":
    main()
