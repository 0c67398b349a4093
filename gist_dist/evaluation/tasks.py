"""The MTEB task of a name: one of MTEB's, its data from the Hub or a local folder, or an evaluation set of the user's;
of it the parts that the name says (names.py).

A folder ``local_tasks/<Name>`` is read instead of the Hub if Name is registered; otherwise it is an evaluation set of
the user's (local_sets.py).
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_dist.common.errors import UserError
from gist_dist.common.storage import copies_folder
from gist_dist.common.text import did_you_mean, near, one_line
from gist_dist.config import HELD_OUT, EvaluateConfig
from gist_dist.evaluation.local_sets import check_column, listed, own_task
from gist_dist.evaluation.names import TaskName, parse_task

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


def check_tasks(evaluate: EvaluateConfig, others: Sequence[str] = ()) -> None:
    """Find out, without network, what would stop an evaluation: unknown tasks, missing or wrong local files.

    others: tasks that are scored besides evaluate.tasks; held_out is the run's own. Raises UserError that names the
    task, or the file and column.
    """
    names = [name for name in dict.fromkeys((*evaluate.tasks, *others)) if name != HELD_OUT]
    if not names:
        return
    if evaluate.local_tasks is not None and not Path(evaluate.local_tasks).expanduser().is_dir():
        raise UserError(f"evaluate.local_tasks: no folder '{evaluate.local_tasks}'; create it or set null")
    _refuse_two_parts(evaluate.tasks)
    for written in names:
        name = parse_task(written).name
        folder = local_folder(name, evaluate.local_tasks)
        task = load_task(written, evaluate.local_tasks)
        if task.metadata.modalities != ["text"]:
            needed = " and ".join(task.metadata.modalities)
            raise UserError(f"evaluate.tasks: {name} is about {needed}; only tasks on text can be evaluated")
        if folder is not None and name in registered_tasks():
            _check_registered(task, folder)
        elif folder is not None:
            task.load_data()


def _refuse_two_parts(tasks: Sequence[str]) -> None:
    """MTEB has one result file a task, and a mean counts it once."""
    parts: dict[str, str] = {}
    for name, part in ((task.name, task.part) for task in map(parse_task, tasks)):
        if parts.setdefault(name, part) != part:
            raise UserError(
                f"evaluate.tasks: {name}{part} and {name}{parts[name]}: a task has one result; write one of them"
            )


def load_task(written: str, local_tasks: str | None) -> "AbsTask":
    """The MTEB task of that name, or the part of it; its data are read when it is evaluated. UserError if there is
    none."""
    wanted = parse_task(written)
    folder = local_folder(wanted.name, local_tasks)
    if wanted.name in registered_tasks():
        _check_part(wanted)
        return _part_of_registered(wanted) if folder is None else _registered_task(wanted, folder)
    if folder is None:
        raise UserError(_unknown_task(wanted.name, local_tasks))
    if wanted.part:
        raise UserError(
            f"evaluate.tasks: {wanted.text}: {folder} is a set of your own and has no parts; write its name"
        )
    return own_task(wanted.name, folder, data_revision(folder))


def _check_part(wanted: TaskName) -> None:
    metadata = registered_tasks()[wanted.name].metadata
    for kind, given, known in (
        ("part", wanted.subsets, list(metadata.hf_subsets)),
        ("split", wanted.splits, list(metadata.eval_splits)),
    ):
        for each in given:
            if each not in known:
                hint = did_you_mean(near(each, known)) or f"; it has {listed(known)}"
                raise UserError(f"evaluate.tasks: {wanted.name} has no {kind} {each!r}{hint}")


def _part_of_registered(wanted: TaskName) -> "AbsTask":
    subsets, splits = list(wanted.subsets) or None, list(wanted.splits) or None
    return import_mteb().get_task(wanted.name, hf_subsets=subsets, eval_splits=splits)


def estimated_characters(written: str, local_tasks: str | None) -> float:
    """Rough amount of text that a task encodes, to start the longest first; infinite if nobody knows."""
    wanted = parse_task(written)
    registered, folder = registered_tasks().get(wanted.name), local_folder(wanted.name, local_tasks)
    statistics = (registered.metadata.descriptive_stats if registered else None) or {}
    characters = sum(_characters(split, wanted.subsets) for name, split in statistics.items() if _counts(name, wanted))
    on_disk = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder else 0
    return float(characters or on_disk or math.inf)


def _counts(split: str, wanted: TaskName) -> bool:
    """A classification reads its training rows as well."""
    return not wanted.splits or split in wanted.splits or split == "train"


def _characters(split: dict[str, Any], subsets: Sequence[str]) -> int:
    """How many characters all texts of the parts have, by MTEB's statistics of a split."""
    by_subset = split.get("hf_subset_descriptive_stats") or {}
    if subsets and by_subset:
        return sum(_characters(part, ()) for name, part in by_subset.items() if name in subsets)
    told = [value.get("total_text_length") or 0 for value in split.values() if isinstance(value, dict)]
    return split.get("number_of_characters") or sum(told)


def registered_tasks() -> dict[str, Any]:
    """MTEB's own tasks: name -> class."""
    import_mteb()
    from mteb.get_tasks import TASK_LIST

    return {task.metadata.name: task for task in TASK_LIST}


def import_mteb() -> Any:
    """mteb, which wants to create its cache folder when imported, also where the home folder is read-only."""
    default = Path.home() / ".cache" / "mteb"
    if "MTEB_CACHE" not in os.environ and (folder := _writable(default, "mteb")) != default:
        os.environ["MTEB_CACHE"] = str(folder)
    import mteb

    return mteb


def _writable(folder: Path, otherwise: str) -> Path:
    """The folder, created; or, where that is not allowed, one in the system's temporary folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    if not os.access(folder, os.W_OK):
        folder = copies_folder(None, otherwise)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_folder(name: str, local_tasks: str | None) -> Path | None:
    if local_tasks is None or Path(name).name != name or name == "..":
        return None
    folder = Path(local_tasks).expanduser().absolute() / name
    return folder if folder.is_dir() else None


def _unknown_task(name: str, local_tasks: str | None) -> str:
    names = list(registered_tasks())
    where = "MTEB has no task of that name"
    if local_tasks is not None:
        names += [f.name for f in Path(local_tasks).expanduser().glob("*") if f.is_dir()]
        where += f", and '{local_tasks}' no such folder"
    return f"evaluate.tasks: '{name}': {where}{did_you_mean(near(name, names))}"


def data_revision(folder: Path) -> str:
    return f"local-{content_hash(folder)[:16]}"


def content_hash(folder: Path, skip: str | None = None) -> str:
    """SHA-256 over names and contents of a folder's files, without hidden ones (a download's leftovers)."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != skip):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------- registered tasks on local folders


def _registered_task(wanted: TaskName, folder: Path) -> "AbsTask":
    """MTEB's own task class with another dataset path; its loader, transforms and scores stay MTEB's.

    Of a multilingual task the subsets that the folder holds are run, or those that are wanted.
    """
    import datasets

    name = wanted.name
    base = registered_tasks()[name]
    if hasattr(base.metadata, "tasks"):
        parts = ", ".join(part.metadata.name for part in base.metadata.tasks[:3])
        raise UserError(f"{folder}: {name} is the mean of other tasks; give each a folder ({parts}, ...)")
    dataset = {**base.metadata.dataset, "path": str(folder), "revision": data_revision(folder)}

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        with _fresh_datasets_cache(self.metadata.revision):
            base.load_data(self, *args, **kwargs)

    # The metadata belong to the class: MTEB drops those of an instance when it unloads a task.
    attributes = {"metadata": base.metadata.model_copy(update={"dataset": dataset}), "load_data": load_data}
    task = type(base.__name__, (base,), {**attributes, "__module__": base.__module__})()
    if wanted.splits:
        task.filter_eval_splits(list(wanted.splits))
    if wanted.subsets:
        task.filter_languages(None, hf_subsets=list(wanted.subsets))
    if task.metadata.is_multilingual and _standard_loader(base):
        try:
            held = datasets.get_dataset_config_names(str(folder))
        except Exception as error:  # of YAML in a README.md, of a script beside the data, …
            raise UserError(f"{folder}: {one_line(error)}") from None
        lacking = [s for s in wanted.subsets if s not in held and f"{s}-corpus" not in held]
        if lacking:
            raise UserError(f"{folder}: has no data of {name}'s part {lacking[0]!r} (has: {listed(held)})")
        task.hf_subsets = [s for s in task.hf_subsets if s in held or f"{s}-corpus" in held]
        if not task.hf_subsets:
            named = ", ".join(base.metadata.hf_subsets)
            raise UserError(f"{folder}: has none of {name}'s subsets {named} (has: {', '.join(held)})")
    return task


def _standard_loader(task: Any) -> bool:
    from mteb.abstasks import AbsTask, AbsTaskRetrieval

    return task.load_data in (AbsTask.load_data, AbsTaskRetrieval.load_data) and not task.fast_loading


@contextlib.contextmanager
def _fresh_datasets_cache(revision: str) -> Iterator[None]:
    """Let `datasets` cache below a folder named by content.

    It keys a local folder by its last name and its files' names, and so would serve what lay there before.
    """
    import datasets

    usual = datasets.config.HF_DATASETS_CACHE
    cache = _writable(Path(usual) / "gist_dist" / revision, f"datasets/{revision}")
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


def _check_registered(task: "AbsTask", folder: Path) -> None:
    """Files, splits and, where the task reads them as they are, columns."""
    import datasets
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval

    if not _standard_loader(type(task).__mro__[1]):
        return
    splits = [*task.eval_splits, *([task.train_split] if isinstance(task, AbsTaskClassification) else [])]
    with _fresh_datasets_cache(task.metadata.revision):
        for configs, columns in _expected_data(task):
            try:
                held = datasets.get_dataset_config_names(str(folder))
                config = next((c for c in configs if c in held), None)
                if config is None:
                    raise UserError(f"{folder}: no '{configs[0]}' data (has: {listed(held)})")
                files = datasets.load_dataset_builder(str(folder), config).config.data_files
            except UserError:
                raise
            except Exception as error:  # of YAML in a README.md, of a script beside the data, …
                raise UserError(f"{folder}: {one_line(error)}") from None
            # MTEB's retrieval loader takes a data set's only split, whatever its name.
            only_split = isinstance(task, AbsTaskRetrieval) and len(files) == 1
            if missing := [] if only_split else [split for split in splits if split not in files]:
                raise UserError(f"{folder}: '{config}' has no split '{missing[0]}' (has: {listed(files)})")
            for split in files:
                for names in columns:
                    check_column(Path(files[split][0]), names)


def _expected_data(task: "AbsTask") -> list[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """For each data set that the task loads: the names it may have, and those that each of its columns may have."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS

    if isinstance(task, AbsTaskRetrieval):
        expected: list[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = []
        for subset in task.hf_subsets:
            prefix = "" if subset == "default" else f"{subset}-"
            qrels = (f"{prefix}qrels",) if prefix else ("default", "qrels")
            expected += [
                ((f"{prefix}corpus",), (("_id", "id"), ("text",))),
                ((f"{prefix}queries", "query"), (("_id", "id"), ("text",))),
                (qrels, (("query-id",), ("corpus-id",), ("score",))),
            ]
        return expected
    columns: tuple[tuple[str, ...], ...] = ()
    own_columns = "dataset_transform" not in vars(type(task).__mro__[1])
    if isinstance(task, AbsTaskSTS) and own_columns:
        columns = tuple((str(c),) for c in (*task.column_names, "score"))
    if isinstance(task, AbsTaskClassification) and own_columns and isinstance(task.input_column_name, str):
        columns = ((task.input_column_name,), (task.label_column_name,))
    return [((subset,), columns) for subset in task.hf_subsets]
