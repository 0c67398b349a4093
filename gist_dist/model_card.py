"""model/README.md: what a stranger on the Hub has to know about the model, in the form that the Hub reads."""

import json
import re
from pathlib import Path
from typing import Any

from gist_dist.errors import UserError
from gist_dist.files import write_atomically
from gist_dist.report import Run, TaskRow, judge, read_run

CITATION = """\
@article{solatorio2024gistembed,
    title = {GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author = {Aivin V. Solatorio},
    journal = {arXiv preprint arXiv:2402.16829},
    year = {2024},
    url = {https://arxiv.org/abs/2402.16829},
}"""
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")


def write_model_card(run_dir: Path) -> None:
    """Write run_dir/model/README.md: metadata with MTEB results, use, training, scores, limitations.

    Names Hub ids in full and local models and data by their last name only: a card is published, the paths
    of the machine are not. Raises UserError if run_dir is no run or holds no model.
    """
    run = read_run(run_dir)
    if not (run.folder / "model").is_dir():
        raise UserError(f"{run.folder}: there is no model/ to write a card for; finish the run first")
    sections = (_introduction, _usage, _training, _evaluation, _limitations, _citation)
    body = "\n\n".join(section(run) for section in sections)
    card = f"---\n{_metadata(run)}\n---\n\n{body}\n"
    write_atomically(run.folder / "model" / "README.md", lambda file: file.write_text(card, encoding="utf-8"))


def _metadata(run: Run) -> str:
    from huggingface_hub import ModelCardData

    results = [_eval_result(run, row) for row in run.tasks if row.after is not None]
    tags = [
        "sentence-transformers",
        "feature-extraction",
        "sentence-similarity",
        "gist_dist",
        *["mteb"] * bool(results),
    ]
    student = run.config["student"]["model"]
    datasets = [source["path"] for source in run.config["data"]["sources"] if _on_hub(source["path"], run)]
    return ModelCardData(
        model_name=run.name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=student if _on_hub(student) else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=tags,
        eval_results=results or None,
    ).to_yaml()


def _eval_result(run: Run, row: TaskRow) -> Any:
    from huggingface_hub import EvalResult

    result = json.loads((run.folder / "mteb" / "trained" / f"{row.task}.json").read_text(encoding="utf-8"))
    splits = list(result["scores"])
    # The data of a local folder has no revision on the Hub.
    revision = result.get("dataset_revision") or ""
    return EvalResult(
        task_type=row.type,
        dataset_type=_mteb_dataset(row.task),
        dataset_name=f"MTEB {row.task}",
        dataset_split=splits[0] if len(splits) == 1 else None,
        dataset_revision=revision if re.fullmatch("[0-9a-f]{40}", revision) else None,
        metric_type=row.metric,
        metric_value=row.after,
    )


def _mteb_dataset(task: str) -> str:
    """Hub id of an MTEB task's data; the task's name where it is none of MTEB's (a user's own set)."""
    from mteb.get_tasks import TASK_LIST

    paths = (known.metadata.dataset["path"] for known in TASK_LIST if known.metadata.name == task)
    return next(paths, task)


def _introduction(run: Run) -> str:
    student, guide = run.config["student"]["model"], (run.config.get("guide") or {}).get("model")
    how = f"under the guidance of {_name(guide)} (GISTEmbed)" if guide else "with InfoNCE (no guide)"
    return (
        f"# {_escape(run.name)}\n\nA [sentence-transformers](https://www.sbert.net) model that embeds "
        f"texts for semantic similarity, search, clustering. It was fine-tuned from {_name(student)} {how} "
        "by gist_dist."
    )


def _usage(run: Run) -> str:
    prompts = run.config["student"].get("prompts") or {}
    said = "".join(
        f"\n\nIn training, every {role} began with `{_escape(text)}`." for role, text in prompts.items() if text
    )
    return f"""\
## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/hub-id/of/this/model")
embeddings = model.encode(["How do I bake bread?", "A recipe for a simple loaf"])
print(model.similarity(embeddings, embeddings))
```{said}"""


def _training(run: Run) -> str:
    config, sources = run.config, run.data.get("sources") or []
    loss, optim = config.get("loss") or {}, config.get("optim") or {}
    steps = run.metrics[-1]["step"] if run.metrics else 0
    planned = run.data.get("steps") or steps
    facts = {
        "Student": _name(config["student"]["model"]),
        "Guide": _name(config["guide"]["model"]) if config.get("guide") else "none",
        "Temperature": loss.get("temperature"),
        "Margin": f"{loss.get('margin')} ({loss.get('margin_kind', 'absolute')})" if config.get("guide") else None,
        "Global batch": f"{(config.get('batch') or {}).get('global_size')} rows",
        "Steps": f"{steps:,}" if steps >= planned else f"{steps:,} of {planned:,} (unfinished)",
        "Learning rate": f"{optim.get('learning_rate')}, {optim.get('schedule', 'linear')} schedule",
        "Seed": config.get("seed"),
    }
    table = _table(["", ""], [[name, str(value)] for name, value in facts.items() if value is not None])
    if not sources:
        return f"## Training\n\n{table}"
    origin = {s["path"]: _name(s["path"]) if _on_hub(s["path"], run) else "local files" for s in sources}
    rows = [[_escape(s["name"]), origin[s["path"]], f"{s['rows_used']:,}"] for s in sources]
    return f"## Training\n\n{table}\n\n### Data\n\n{_table(['source', 'from', 'rows'], rows)}"


def _evaluation(run: Run) -> str:
    if not any(row.after is not None for row in run.tasks):
        return "## Evaluation\n\nThis model has not been evaluated on MTEB."
    verdict = judge(run.tasks)
    columns = ["before", "after", "change", *["guide"] * any(row.guide is not None for row in run.tasks)]
    rows = [[_escape(row.task), row.type, row.metric, *_numbers(vars(row), columns)] for row in run.tasks]
    rows += [[f"**Mean of {verdict['overall']['num_tasks']}**", "", "", *_numbers(verdict["overall"], columns)]]
    local = (run.config.get("evaluate") or {}).get("local_tasks")
    note = " The tasks' data was read from a local folder." if local else ""
    table = _table(["task", "type", "main score", *columns], rows)
    legend = f"MTEB main scores × 100; *before* is the student without this training.{note}"
    return f"## Evaluation\n\n{legend}\n\n{table}"


def _limitations(run: Run) -> str:
    verdict = judge(run.tasks)
    lines = [f"- {_escape(detail['text'])}" for detail in verdict["details"] if detail["about"] == "loss"]
    if verdict["overall"]["change"] is None:
        lines.append("- It was not compared with the model that it was trained from.")
    for task in run.failures.get("trained", {}):
        lines.append(f"- The evaluation on {_escape(task)} failed, so nothing is known of it.")
    lines.append("- The numbers are of one run with one seed; how much they vary from seed to seed was not measured.")
    lines.append("- Whether training texts also occur in the evaluation data was not checked.")
    return "## Limitations\n\n" + "\n".join(lines)


def _citation(run: Run) -> str:
    return f"## Citation\n\n```bibtex\n{CITATION}\n```"


def _numbers(row: dict[str, Any], columns: list[str]) -> list[str]:
    cells = ["–" if row[c] is None else format(row[c], "+.2f" if c == "change" else ".2f") for c in columns]
    return [cell.replace("-", "−") for cell in cells]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(model_or_data: str) -> str:
    return f"`{_escape(model_or_data if _on_hub(model_or_data) else Path(model_or_data).name)}`"


def _on_hub(path: str, run: Run | None = None) -> bool:
    """Whether it reads as a Hub id: OWNER/NAME or NAME, and no file or folder of this machine."""
    root = Path((run.config["data"].get("root") if run else None) or ".").expanduser()
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) and not path.endswith(DATA_SUFFIXES)
    return bool(looks) and not (root / path).exists()


def _escape(text: str) -> str:
    """One line that can neither leave its table cell nor bring HTML."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("|", "\\|").replace("`", "'")
