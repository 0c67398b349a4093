"""The front matter of a model card, as the Hub, sentence-transformers and MTEB's readers expect it."""

import json
import re
from pathlib import Path
from typing import Any

from gist_dist.common.hub import go_offline_if_unreachable
from gist_dist.common.plain_yaml import load_plain
from gist_dist.evaluation.evaluate import result_files
from gist_dist.evaluation.tasks import registered_tasks
from gist_dist.report import Run, TaskRow

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")


def metadata_yaml(run: Run) -> str:
    """sentence-transformers' own card data, with the scores of the trained model as a model-index."""
    from huggingface_hub import ModelCardData
    from sentence_transformers.base.model_card import YAML_FIELDS
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

    hub = run.section("tracking").get("hub") or {}
    kept = [json.loads(file.read_text(encoding="utf-8")) for file in result_files(run.folder / "mteb" / "trained")]
    by_task = {result["task_name"]: result for result in kept}
    results = [r for row in run.tasks if row.after is not None for r in _eval_results(row, by_task[row.task])]
    student, rows = run.config["student"]["model"], run.data.get("num_rows")
    data = SentenceTransformerModelCardData(
        language=list(hub.get("language") or ()), license=hub.get("license"), local_files_only=True
    )
    data.add_tags(["gist_dist", "gistembed", *[f"dataset_size:{rows}"] * bool(rows), *["mteb"] * bool(results)])
    data.base_model = student if on_hub(student) else None
    data.datasets = list(dict.fromkeys(s["path"] for s in run.config["data"]["sources"] if on_hub(s["path"], run)))
    fields: dict[str, Any] = {name: value for name in YAML_FIELDS if (value := getattr(data, name, None))}
    metrics = list(dict.fromkeys(result.metric_type for result in results))
    if results:
        fields |= {"model_name": run.name, "metrics": metrics, "eval_results": results}
    return ModelCardData(**fields).to_yaml()


def _eval_results(row: TaskRow, result: dict[str, Any]) -> list[Any]:
    """A task's results, one for each split and subset, in points."""
    from huggingface_hub import EvalResult

    known = registered_tasks().get(row.task)
    # The data of a local folder has no revision on the Hub.
    revision = result.get("dataset_revision") or ""
    return [
        EvalResult(
            task_type=row.type,
            dataset_type=known.metadata.dataset["path"] if known else row.task,
            dataset_name=f"MTEB {row.task}",
            dataset_config=entry.get("hf_subset"),
            dataset_split=split,
            dataset_revision=revision if re.fullmatch("[0-9a-f]{40}", revision) else None,
            metric_type=row.metric,
            metric_value=round(100 * float(entry["main_score"]), 2),
        )
        for split, entries in result["scores"].items()
        for entry in entries
    ]


def licence_on_hub(repo_id: str, kind: str) -> str | None:
    """What the card of a Hub model or dataset states; None where it states none or can't be asked."""
    if go_offline_if_unreachable():
        return None
    from huggingface_hub import DatasetCard, ModelCard

    try:
        card = {"model": ModelCard, "dataset": DatasetCard}[kind].load(repo_id, ignore_metadata_errors=True)
        stated = card.data.get("license")
    except Exception:  # of a card that is no part of the run: it must not end it
        return None
    return _in_words(stated)


def licence_of_folder(folder: Path) -> str | None:
    """What the card in a model's folder states; None where there is none."""
    try:
        _, front, _ = (folder.expanduser() / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return _in_words(load_plain(front)["license"])
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        return None


def _in_words(stated: Any) -> str | None:
    named = [text for text in (stated if isinstance(stated, list) else [stated]) if isinstance(text, str)]
    return ", ".join(named) or None


def on_hub(path: str, run: Run | None = None) -> bool:
    """Whether it reads as a Hub id: OWNER/NAME or NAME, and no file or folder of this machine."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", path)
    root = (run.config["data"].get("root") if run else None) or "."
    try:
        return bool(looks) and not path.endswith(DATA_SUFFIXES) and not (Path(root).expanduser() / path).exists()
    except (OSError, RuntimeError):  # a root that can't be here: of another machine's user, or too long
        return True
