"""MTEB scores of one model: one task evaluated and kept, and what was kept read back.

Everything that is scored is an MTEB task run by ``mteb.evaluate``, so every score is MTEB's own. Which task a name
stands for is in evaluation_tasks.py.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_atomically, write_text
from gist_dist.common.stock_model import Prompts, adopted, ensure_padding, hold_limit, prompts_of
from gist_dist.common.text import one_line
from gist_dist.common.untrusted import Shape, load_plain_json, problem
from gist_dist.config import EvaluateConfig
from gist_dist.evaluation.names import parse_task
from gist_dist.evaluation.tasks import content_hash, data_revision, import_mteb, load_task, local_folder

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


@dataclass(frozen=True)
class Score:
    """What MTEB found for one model on one task."""

    task: str
    kind: str
    """MTEB's task type: STS, Classification, Retrieval, ..."""
    main_score: float
    """0 to 1, the mean over the task's evaluation splits and subsets."""
    metric: str
    """Name of the main score, such as cosine_spearman."""
    seconds: float
    """Time that data loading and evaluation took."""
    part: str = ""
    """What of the task was scored, as in its name; "": all."""
    languages: dict[str, float] = field(default_factory=dict)
    """ISO 639-3 code -> mean over the subsets in that language; {} where the task tells none."""


Name = Annotated[str, Field(min_length=1, max_length=255)]


class _Entry(Shape):
    main_score: float
    hf_subset: str | None = None
    languages: list[str] = Field(default_factory=list)


class _Result(Shape):
    """A task's file, as MTEB writes it."""

    task_name: Name
    scores: dict[str, list[_Entry]]
    evaluation_time: float | None
    dataset_revision: str | None = None


class _Details(Shape):
    """The file that evaluate_task puts beside it."""

    kind: Name = "unknown"
    metric: Name = "main_score"
    part: str = ""


RESULT, DETAILS = TypeAdapter(_Result), TypeAdapter(_Details)


def evaluate_task(
    model: str | Path,
    task: str,
    evaluate: EvaluateConfig,
    folder: Path,
    prompts: Mapping[str, str | None] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Score a model (SentenceTransformer folder or Hub id) on one task, or a part of it; the result is
    folder/<name of the task>.json.

    prompts: put over the model's own, by MTEB's names ("query", "document", a task's name or type); null: the model's
    own. None: the model as it is. A result of the same model content, prompts, precision and local data is left as it
    is; any other is removed before the evaluation begins, so that one that fails or is killed leaves none. UserError
    for an unusable task or data that can't be loaded.
    """
    folder = Path(folder)
    file, part = result_file(folder, task), parse_task(task).part
    identity = model_identity(model, revision, prompts)
    if finished_score(folder, task, evaluate, identity) is not None:
        return file
    file.unlink(missing_ok=True)

    import_mteb()
    import torch
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    mteb_task = load_task(task, evaluate.local_tasks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = SentenceTransformer(str(model), device=device, revision=revision, trust_remote_code=trust_remote_code)
    if prompts is not None:
        encoder.prompts.update({name: text for name, text in prompts.items() if name not in Prompts._fields})
        encoder.prompts, encoder.default_prompt_name, _ = adopted(encoder, prompts_of(encoder, prompts))
    ensure_padding(encoder)
    hold_limit(encoder)
    try:
        with warnings.catch_warnings():
            # Of MTEB about its libraries and its own older tasks; what concerns the user is in its log as well.
            warnings.simplefilter("ignore")
            wrapped = SentenceTransformerEncoderWrapper(encoder)
            with torch.autocast(device, torch.bfloat16, enabled=evaluate.precision == "bf16"):  # weights rounded once
                result = _mteb_result(wrapped, mteb_task, evaluate)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{task}: the GPU ran out of memory; lower evaluate.batch_size = {evaluate.batch_size}"
        ) from error

    meta = mteb_task.metadata
    told = {"kind": meta.type, "metric": meta.main_score, "model": identity, "precision": evaluate.precision}
    details = json.dumps(told | {"part": part} if part else told, indent=2)
    card = json.dumps(_model_meta(wrapped), default=str, indent=4)
    write_text(folder / "model_meta.json", card)
    write_text(_details_file(file), details)
    write_atomically(file, result.to_disk)  # last: what is there counts
    return file


def _mteb_result(model: Any, task: "AbsTask", evaluate: EvaluateConfig) -> Any:
    """All splits and subsets, or an error: MTEB keeps nothing of a task that raises half way without a cache."""
    try:
        outcome = import_mteb().evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": evaluate.batch_size, "show_progress_bar": False},
        )
    except UserError:
        raise
    except Exception as error:
        if getattr(task, "data_loaded", True):
            raise
        raise UserError(_no_data(task, evaluate, error)) from error
    if not outcome.task_results:
        # MTEB reports data of private tasks that can't be loaded instead of raising.
        raise UserError(_no_data(task, evaluate, outcome.exceptions[0].exception))
    (result,) = outcome.task_results
    return result


def _no_data(task: "AbsTask", evaluate: EvaluateConfig, error: object) -> str:
    name, folder = task.metadata.name, evaluate.local_tasks
    if local := local_folder(name, folder):
        remedy = f"repair {local}"
    elif folder is not None:
        remedy = f"put them into {Path(folder) / name}, or make the Hub reachable"
    else:
        remedy = f"make the Hub reachable, or set evaluate.local_tasks to a folder that has {name}"
    return f"{name}: its data can't be loaded ({one_line(error)}); {remedy}"


def _model_meta(wrapped: Any) -> dict[str, Any]:
    """MTEB's metadata of the model, with what it leaves open and the model itself tells."""
    parameters = list(wrapped.model.parameters())
    known = {
        "n_parameters": sum(p.numel() for p in parameters),
        "memory_usage_mb": round(sum(p.numel() * p.element_size() for p in parameters) / 2**20),
        "use_instructions": any((wrapped.model.prompts or {}).values()),
    }
    return wrapped.mteb_model_meta.to_dict() | known


def read_results(folder: Path) -> dict[str, Score]:
    """All results below a folder that evaluate_task wrote to, or MTEB itself; {} if there is none."""
    return {score.task: score for score in map(read_result, result_files(folder))}


def result_files(folder: Path) -> list[Path]:
    return sorted(f for f in Path(folder).glob("*.json") if f.name != "model_meta.json" and f.is_file())


def read_result(file: Path) -> Score:
    """UserError if the file is not an MTEB result."""
    details_file = _details_file(file)
    result = _read(file, RESULT)
    details = _read(details_file, DETAILS) if details_file.is_file() else {}
    mains = [entry["main_score"] for split in result["scores"].values() for entry in split]
    if not mains:
        raise UserError(f"{file}: not an MTEB result (it has no score); delete it and evaluate again")
    return Score(
        task=result["task_name"],
        kind=details.get("kind", "unknown"),
        main_score=fmean(mains) if all(map(math.isfinite, mains)) else math.nan,
        metric=details.get("metric", "main_score"),
        seconds=float(result["evaluation_time"] or 0.0),
        part=details.get("part", ""),
        languages=_by_language(result["scores"]),
    )


def _by_language(scores: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for entry in (entry for split in scores.values() for entry in split):
        for language in {code.split("-")[0] for code in entry.get("languages", [])}:
            found.setdefault(language, []).append(entry["main_score"])
    return {language: fmean(found[language]) for language in sorted(found)}


def _read(file: Path, shape: Any) -> dict[str, Any]:
    try:
        content = load_plain_json(file.read_text(encoding="utf-8"))
        if wrong := problem(shape, content):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not an MTEB result ({one_line(error)}); delete it and evaluate again") from None
    return dict(content)


def finished_score(folder: Path, task: str, evaluate: EvaluateConfig, identity: str) -> Score | None:
    """The result that is there, if it is of this model and this part of the task and, for a local task, of the data as
    they are now."""
    wanted, file = parse_task(task), result_file(folder, task)
    try:
        score = read_result(file)
        details = json.loads(_details_file(file).read_text(encoding="utf-8"))
        revision = json.loads(file.read_text(encoding="utf-8"))["dataset_revision"]
        local = local_folder(wanted.name, evaluate.local_tasks)
        same_data = local is None or revision == data_revision(local)
    except (UserError, OSError, ValueError, KeyError):
        return None
    same_task = (score.task, score.part) == (wanted.name, wanted.part)
    same_model = details.get("model") == identity and details.get("precision", "fp32") == evaluate.precision
    return score if same_data and same_task and same_model else None


def model_identity(
    model: str | Path, revision: str | None = None, prompts: Mapping[str, str | None] | None = None
) -> str:
    """Hash of the prompts and of a model folder's content (but its card) or of Hub id and revision."""
    content = content_hash(Path(model), skip="README.md") if Path(model).is_dir() else f"{model}@{revision}"
    given = {name: text for name, text in (prompts or {}).items() if text is not None}
    return hashlib.sha256(json.dumps([content, given], sort_keys=True).encode()).hexdigest()[:16]


def result_file(folder: Path, task: str) -> Path:
    """MTEB has one a task, whichever part of it was scored."""
    return Path(folder) / f"{parse_task(task).name}.json"


def _details_file(result: Path) -> Path:
    # Beside, not in, MTEB's result: that file stays exactly as MTEB writes it.
    return result.parent / "details" / result.name
