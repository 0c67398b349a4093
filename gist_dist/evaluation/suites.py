"""Whole benchmarks and languages: what evaluate.benchmark and evaluate.languages stand for, as tasks by name.

A benchmark is one of MTEB's, or ``local_tasks/NAME.yaml`` with ``tasks: [...]`` of its own.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.plain_yaml import load_plain
from gist_dist.common.text import did_you_mean, near, one_line, plural
from gist_dist.config import HELD_OUT, EvaluateConfig, RunConfig
from gist_dist.evaluation.local_sets import listed
from gist_dist.evaluation.names import SUITES, TaskName, parse_task
from gist_dist.evaluation.tasks import check_tasks, import_mteb, local_folder, registered_tasks


@dataclass(frozen=True)
class Suite:
    """A benchmark, or what evaluate.languages leaves of it."""

    name: str
    tasks: tuple[str, ...]
    """As parse_task reads them."""
    left_out: tuple[str, ...] = ()
    """Its tasks without a part in evaluate.languages."""
    private: tuple[str, ...] = ()
    """Its tasks whose data are not public, which the leaderboard's means leave out as well."""


def suites_of(evaluate: EvaluateConfig) -> list[Suite]:
    """UserError for a benchmark or a language that nobody knows."""
    for language in evaluate.languages:
        _check_language(language)
    return [_suite(name, evaluate) for name in evaluate.benchmark]


def expanded(evaluate: EvaluateConfig) -> EvaluateConfig:
    """With the tasks of its benchmarks among its tasks, and of each the parts in its languages. Once more, it changes
    nothing."""
    if not evaluate.benchmark and not evaluate.languages:
        return evaluate
    suites = suites_of(evaluate)
    tasks = [_in_languages(task, evaluate, or_none=False) for task in evaluate.tasks]
    tasks += [task for suite in suites for task in suite.tasks]
    return evaluate.model_copy(update={"tasks": tuple(dict.fromkeys(tasks))})


def with_suites(config: RunConfig) -> RunConfig:
    """The recipe with its benchmarks' tasks by name; what is scored while the run trains stays what it is."""
    evaluate = config.evaluate
    if not evaluate.benchmark and not evaluate.languages:
        return config
    watched = {task: task if task == HELD_OUT else _in_languages(task, evaluate, False) for task in config.watched}
    during = {"during": tuple(watched.values()), "keep_best": watched.get(str(evaluate.keep_best), evaluate.keep_best)}
    return config.model_copy(update={"evaluate": expanded(evaluate).model_copy(update=during)})


def check_evaluation(evaluate: EvaluateConfig, others: tuple[str, ...] = ()) -> None:
    """check_tasks, with the tasks of benchmarks; and that a benchmark's data are there, where the Hub is said to be
    out of reach. UserError names what is missing."""
    check_tasks(expanded(evaluate), others)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "on", "yes", "true"):
        return
    for suite in suites_of(evaluate):
        names = [parse_task(task).name for task in suite.tasks]
        if missing := [name for name in names if not _has_data(name, evaluate.local_tasks)]:
            where = evaluate.local_tasks or "a folder that evaluate.local_tasks names"
            raise UserError(
                f"evaluate.benchmark: {suite.name}: HF_HUB_OFFLINE is set, and data of {len(missing)} of its "
                f"{plural(len(names), 'task')} are on this machine nowhere: {listed(missing)}; put each into {where} "
                "under its name, or unset HF_HUB_OFFLINE"
            )


def write_suites(evaluate: EvaluateConfig, folder: Path) -> None:
    """folder/benchmarks.json, for reports; removed where there is no benchmark."""
    if suites := suites_of(evaluate):
        write_text(folder / SUITES, json.dumps([asdict(suite) for suite in suites], indent=1))
    else:
        (folder / SUITES).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ benchmarks


def _suite(name: str, evaluate: EvaluateConfig) -> Suite:
    own = _own_benchmarks(evaluate.local_tasks).get(name)
    tasks, private = (_own_tasks(own), ()) if own else _tasks_of_mteb(name, evaluate.local_tasks)
    kept = {task: _in_languages(task, evaluate, or_none=True) for task in tasks}
    if not any(kept.values()):
        raise UserError(
            f"evaluate.languages: {name} has no task in {', '.join(evaluate.languages)}; choose another benchmark"
        )
    left_out = tuple(parse_task(task).name for task, part in kept.items() if part is None)
    return Suite(name, tuple(filter(None, kept.values())), left_out, private)


def _own_benchmarks(local_tasks: str | None) -> dict[str, Path]:
    folder = Path(local_tasks).expanduser() if local_tasks else None
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder and folder.is_dir() else {}


def _own_tasks(file: Path) -> list[str]:
    try:
        content = load_plain(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {one_line(error)}") from None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{file}: a benchmark of your own is `tasks:` with a list of names of tasks")
    return [parse_task(task).text for task in tasks]


def _tasks_of_mteb(name: str, local_tasks: str | None) -> tuple[list[str], tuple[str, ...]]:
    mteb = import_mteb()
    try:
        benchmark = mteb.get_benchmark(name)
    except KeyError:
        known = [each.name for each in mteb.get_benchmarks()]
        known += [alias for each in mteb.get_benchmarks() for alias in each.aliases]
        raise UserError(_unknown_benchmark(name, [*known, *_own_benchmarks(local_tasks)], local_tasks)) from None
    tasks = [_part_that_it_scores(task).text for task in benchmark.tasks if task.metadata.is_public]
    return tasks, tuple(task.metadata.name for task in benchmark.tasks if not task.metadata.is_public)


def _part_that_it_scores(task: Any) -> TaskName:
    """What a benchmark leaves of a task: some subsets, some splits."""
    name = task.metadata.name
    whole = import_mteb().get_task(name)
    subsets = () if set(task.hf_subsets) == set(whole.hf_subsets) else tuple(task.hf_subsets)
    splits = () if set(task.eval_splits) == set(whole.eval_splits) else tuple(task.eval_splits)
    return TaskName(name, subsets, splits)


def _unknown_benchmark(name: str, known: list[str], local_tasks: str | None) -> str:
    where = f", and there is no {Path(local_tasks) / name}.yaml" if local_tasks else ""
    hint = did_you_mean(near(name, known, cutoff=0.5))
    return f"evaluate.benchmark: {name!r}: MTEB has no benchmark of that name{where}{hint}"


# ------------------------------------------------------------------------------------------------- languages


def _check_language(code: str) -> None:
    import_mteb()
    from mteb.languages import ISO_TO_LANGUAGE

    if code.split("-")[0] in ISO_TO_LANGUAGE:
        return
    names = {name.lower(): iso for iso, name in ISO_TO_LANGUAGE.items()}
    hint = did_you_mean([names[code.lower()]] if code.lower() in names else near(code, ISO_TO_LANGUAGE))
    raise UserError(f"evaluate.languages: {code!r} is no code of a language (ISO 639-3, such as deu){hint}")


def _in_languages(written: str, evaluate: EvaluateConfig, or_none: bool) -> Any:
    """The part of a task in the wanted languages: a subset counts that has one of them. Parts that are named stay.

    or_none: None where there is none, in place of a UserError.
    """
    task = parse_task(written)
    if not evaluate.languages or task.name not in registered_tasks():
        return task.text
    whole = registered_tasks()[task.name].metadata.hf_subsets_to_langscripts
    found = [
        subset
        for subset, languages in whole.items()
        if subset in (task.subsets or whole)
        and any({language, language.split("-")[0]} & set(evaluate.languages) for language in languages)
    ]
    if found:
        return task.text if task.subsets and not or_none else _part(task, found, whole).text
    if or_none:
        return None
    told = ", ".join(evaluate.languages)
    raise UserError(f"evaluate.languages: {task.text} is not in {told}; leave it out of the tasks")


def _part(task: TaskName, subsets: list[str], whole: dict[str, Any]) -> TaskName:
    return task._replace(subsets=() if len(subsets) == len(whole) else tuple(subsets))


# --------------------------------------------------------------------------------------------- data at hand


def _has_data(name: str, local_tasks: str | None) -> bool:
    """In local_tasks, in the Hub's cache, or in that of `datasets`."""
    if local_folder(name, local_tasks) is not None or name not in registered_tasks():
        return True
    metadata = registered_tasks()[name].metadata
    if hasattr(metadata, "tasks"):
        return all(_has_data(part.metadata.name, local_tasks) for part in metadata.tasks)
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = str(metadata.dataset["path"])
    in_hub = Path(HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    return in_hub.is_dir() or (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir()
