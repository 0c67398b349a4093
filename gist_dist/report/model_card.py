"""model/README.md: what a stranger on the Hub has to know about the model, in the form that the Hub reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.stock_model import NO_LIMIT
from gist_dist.report import Run, judge, read_run
from gist_dist.report.card_metadata import licence_of_folder, licence_on_hub, metadata_yaml, on_hub
from gist_dist.report.run import read_json
from gist_dist.report.scores import summarize_scores
from gist_dist.report.shapes import KEPT_PROMPTS, MODULES, POOLING_SETTINGS, TOKENIZER_SETTINGS
from gist_dist.report.suites import summarize_languages, summarize_suites

CITATION = """\
@article{solatorio2024gistembed,
    title = {GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author = {Aivin V. Solatorio},
    journal = {arXiv preprint arXiv:2402.16829},
    year = {2024},
    url = {https://arxiv.org/abs/2402.16829},
}
@inproceedings{reimers-2019-sentence-bert,
    title = {Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks},
    author = {Reimers, Nils and Gurevych, Iryna},
    booktitle = {Proceedings of the 2019 Conference on Empirical Methods in Natural Language Processing},
    month = {11},
    year = {2019},
    publisher = {Association for Computational Linguistics},
    url = {https://arxiv.org/abs/1908.10084},
}"""
RECIPE_SECTIONS = ("seed", "student", "guide", "data", "batch", "loss", "optim")
POOLING = {"mean": "(tokens * mask).sum(1) / mask.sum(1)", "cls": "tokens[:, 0]"}
NOT_STATED = "not stated"


def write_model_card(run_dir: Path) -> None:
    """Write run_dir/model/README.md: metadata with MTEB results, use, training, scores, limitations.

    Names Hub ids in full and local models and data by their last name only: a card is published, the paths
    of the machine are not. Raises UserError if run_dir is no run or holds no model.
    """
    run = read_run(run_dir)
    if not (run.folder / "model").is_dir():
        raise UserError(f"{run.folder}: there is no model/ to write a card for; finish the run first")
    model = _read_model(run.folder / "model")
    sections = [
        _introduction(run),
        _details(run, model),
        _usage(run, model),
        _training(run),
        _evaluation(run),
        _limitations(run),
        _versions(run),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    card = f"---\n{metadata_yaml(run)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    write_text(run.folder / "model" / "README.md", card)


class Model(NamedTuple):
    """What the files of a SentenceTransformer folder tell without loading it."""

    modules: tuple[str, ...]
    """Class names: Transformer, Pooling, Normalize, ..."""
    pooling: str | None
    width: int | None
    max_tokens: int | None
    prompts: dict[str, str]
    """That it was trained with, by name."""


def _read_model(folder: Path) -> Model:
    modules = _read(folder / "modules.json", MODULES) or []
    types = tuple(module["type"].rsplit(".", 1)[-1] for module in modules)
    pooled = [folder / module["path"] / "config.json" for module in modules if module["type"].endswith("Pooling")]
    pooling = _read(pooled[0], POOLING_SETTINGS) if pooled else {}
    mode = pooling.get("pooling_mode")
    kept = _read(folder / "config_sentence_transformers.json", KEPT_PROMPTS).get("prompts") or {}
    limit = _read(folder / "tokenizer_config.json", TOKENIZER_SETTINGS).get("model_max_length")
    return Model(
        types,
        "+".join(mode) if isinstance(mode, list) else mode,
        pooling.get("embedding_dimension"),
        int(limit) if limit and limit < NO_LIMIT else None,
        {name: text for name, text in kept.items() if text},
    )


def _read(file: Path, shape: Any) -> Any:
    return read_json(file, shape, "the model is not whole; remove model/, and the same train command makes it again")


def _introduction(run: Run) -> str:
    student, guide = run.config["student"]["model"], run.section("guide").get("model")
    how = f"under the guidance of {_name(guide)} (GISTEmbed)" if guide else "with GISTEmbed's contrastive loss"
    how = how if run.section("guide") else "with InfoNCE (no guide)"
    return (
        f"# {_escape(run.name)}\n\nA [sentence-transformers](https://www.sbert.net) model that embeds "
        f"texts for semantic similarity, search, clustering. It was fine-tuned from {_name(student)} {how} "
        "by gist_dist."
    )


def _details(run: Run, model: Model) -> str:
    hub, student = _hub(run), run.config["student"]["model"]
    licence = licence_on_hub(student, "model") if on_hub(student) else licence_of_folder(Path(student))
    base = _name(student)
    if on_hub(student) or licence:
        base += f" (licence: {_escape(licence or NOT_STATED)})"
    facts = {
        "Base model": base,
        "Maximum length": f"{model.max_tokens} tokens" if model.max_tokens else "no limit",
        "Embedding": f"{model.width} numbers" if model.width else None,
        "Similarity": "cosine",
        "Modules": " → ".join(model.modules) + (f" (pooling: {model.pooling})" if model.pooling else ""),
        "Language": ", ".join(hub.get("language") or ()) or NOT_STATED,
        "Licence": hub.get("license") or f"{NOT_STATED}; those of the base model and of the training data apply",
    }
    return "## Model\n\n" + "\n".join(f"- **{name}:** {value}" for name, value in facts.items() if value)


def _usage(run: Run, model: Model) -> str:
    brings_code = bool(run.config["student"].get("trust_remote_code"))
    name = json.dumps(_hub(run).get("repo_id") or "path/or/hub-id/of/this/model")
    name += ", trust_remote_code=True" * brings_code
    prompts = {role: text for role, text in (run.config["student"].get("prompts") or {}).items() if text}
    kept = {"anchor": model.prompts.get("query"), "positive": model.prompts.get("document")}
    prompts |= {role: text for role, text in kept.items() if text}
    encode = """embeddings = model.encode(["How do I bake bread?", "A recipe for a simple loaf"])
print(model.similarity(embeddings, embeddings))"""
    if prompts:  # they are kept in the model, as those of queries and documents
        encode = """queries = model.encode_query(["How do I bake bread?"])
documents = model.encode_document(["A recipe for a simple loaf"])
print(model.similarity(queries, documents))"""
    quoted = {role: _escape(json.dumps(text, ensure_ascii=False)) for role, text in prompts.items()}
    said = "\n\nThe model comes with code of its own, which `trust_remote_code=True` runs." * brings_code
    said += "".join(f"\n\nIn training, every {role} began with `{text}`." for role, text in quoted.items())
    return f"""\
## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name})
{encode}
```{said}{_usage_of_transformers(name, model)}"""


def _usage_of_transformers(name: str, model: Model) -> str:
    """Code for a model whose embedding is a pooled last hidden state; others need their own modules."""
    plain = model.modules[:2] == ("Transformer", "Pooling") and not set(model.modules[2:]) - {"Normalize"}
    if not plain or model.pooling not in POOLING:
        return ""
    return f"""

Without sentence-transformers, and with prompts put before the texts by hand:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained({name}), AutoModel.from_pretrained({name})
texts = ["How do I bake bread?", "A recipe for a simple loaf"]
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    tokens = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
embeddings = torch.nn.functional.normalize({POOLING[model.pooling]}, dim=1)
```"""


def _training(run: Run) -> str:
    config, sources = run.config, run.data.get("sources") or []
    loss, optim = run.section("loss"), run.section("optim")
    guide = run.section("guide")
    facts = {
        "Student": _name(config["student"]["model"]),
        "Guide": _name(guide["model"]) if guide.get("model") else "the student itself" if guide else "none",
        "Temperature": loss.get("temperature"),
        "Margin": f"{loss.get('margin')} ({loss.get('margin_kind', 'absolute')})" if guide else None,
        "Global batch": f"{run.section('batch').get('global_size')} rows",
        "Steps": _steps(run),
        "Learning rate": f"{optim.get('learning_rate')}, {optim.get('schedule', 'linear')} schedule",
        "Seed": config.get("seed"),
    }
    table = _table(["", ""], [[name, str(value)] for name, value in facts.items() if value is not None])
    parts = [f"## Training\n\n{table}"]
    if sources:
        columns = ["source", "from", "licence", "rows"]
        parts.append(f"### Data\n\n{_table(columns, [_source_row(run, source) for source in sources])}")
    recipe = yaml.safe_dump(_published_recipe(run), sort_keys=False, allow_unicode=True).replace("`", "'")
    parts.append(f"<details><summary>Recipe</summary>\n\n```yaml\n{recipe}```\n\n</details>")
    return "\n\n".join(parts)


def _steps(run: Run) -> str:
    """How many, and of which the model is, where scores have chosen it."""
    steps, scores = run.metrics[-1]["step"] if run.metrics else 0, summarize_scores(run)
    planned = run.data.get("steps") or steps
    if scores and scores["best"] is not None:
        early = ", ended early" if scores["stopped_early"] else ""
        return f"{scores['best']:,}, the best by {scores['by']} of {scores['last']:,} of {planned:,}{early}"
    return f"{steps:,}" if steps >= planned else f"{steps:,} of {planned:,} (unfinished)"


def _source_row(run: Run, source: dict[str, Any]) -> list[str]:
    """Its licence is what the recipe says, or the Hub's card of the data; nothing is guessed."""
    path, number = source["path"], source.get("recipe_source")
    recipes = run.config["data"]["sources"]
    named = (recipe for recipe in recipes if recipe["path"] == path)
    recipe = recipes[number] if number is not None and number < len(recipes) else next(named, {})
    hub = on_hub(path, run)
    licence = recipe.get("license") or (licence_on_hub(path, "dataset") if hub else None) or NOT_STATED
    return [
        _escape(source["name"]),
        _name(path) if hub else "local files",
        _escape(licence),
        f"{source['rows_used']:,}",
    ]


def _published_recipe(run: Run) -> dict[str, Any]:
    """The sections that decide what was computed, with paths of this machine cut to their last names."""
    recipe = {name: run.config[name] for name in RECIPE_SECTIONS if run.config.get(name) is not None}
    data = {key: value for key, value in recipe["data"].items() if key not in ("root", "cache_dir", "local_copy")}
    data["sources"] = [s | {"path": s["path"] if on_hub(s["path"], run) else _last(s["path"])} for s in data["sources"]]
    for name in ("student", "guide"):
        if model := recipe.get(name, {}).get("model"):
            model = {"model": model if on_hub(model) else _last(model)}
            recipe[name] = {key: value for key, value in recipe[name].items() if key != "cache_dir"} | model
    return recipe | {"data": data}


def _evaluation(run: Run) -> str:
    if not any(row.after is not None for row in run.tasks):
        return "## Evaluation\n\nThis model has not been evaluated on MTEB."
    verdict = judge(run.tasks)
    columns = ["before", "after", "change", *["guide"] * any(row.guide is not None for row in run.tasks)]
    rows = [
        [_escape(row.task), _escape(row.type), _escape(row.metric), *_numbers(vars(row), columns)] for row in run.tasks
    ]
    rows += [[f"**Mean of {verdict['overall']['num_tasks']}**", "", "", *_numbers(verdict["overall"], columns)]]
    local = run.section("evaluate").get("local_tasks")
    note = " The tasks' data was read from a local folder." if local else ""
    table = _table(["task", "type", "main score", *columns], rows)
    legend = f"MTEB main scores × 100; *before* is the student without this training.{note}"
    parts = [f"## Evaluation\n\n{legend}", table, *_benchmarks(run, columns), *_languages(run, columns)]
    return "\n\n".join(parts)


def _benchmarks(run: Run, columns: list[str]) -> Iterator[str]:
    for suite in summarize_suites(run):
        rows = [[_escape(row["mean"]), *_numbers(row, columns)] for row in suite["rows"]]
        told = [f"### {_escape(suite['name'])}", _table(["mean", *columns], rows) if rows else suite["sentence"]]
        told += [f"Without {_escape(', '.join(left))}: {why}." for left, why in (
            (suite["left_out"], "not in the languages that were asked for"),
            (suite["private"], "their data are not public"),
        ) if left]  # fmt: skip
        yield "\n\n".join(told)


def _languages(run: Run, columns: list[str]) -> Iterator[str]:
    if languages := summarize_languages(run):
        rows = [[row["language"], str(row["num_tasks"]), *_numbers(row, columns)] for row in languages]
        yield f"### By language\n\n{_table(['language', 'tasks', *columns], rows)}"


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


def _versions(run: Run) -> str:
    packages = ("gist_dist", "sentence_transformers", "transformers", "torch", "mteb", "python")
    lines = [f"- {name}: {_escape(run.environment[name])}" for name in packages if run.environment.get(name)]
    return "## Versions\n\n" + "\n".join(lines) if lines else ""


def _hub(run: Run) -> dict[str, Any]:
    return run.section("tracking").get("hub") or {}


def _numbers(row: dict[str, Any], columns: list[str]) -> list[str]:
    cells = ["–" if row[c] is None else format(row[c], "+.2f" if c == "change" else ".2f") for c in columns]
    return [cell.replace("-", "−") for cell in cells]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(model_or_data: str) -> str:
    return f"`{_escape(model_or_data if on_hub(model_or_data) else _last(model_or_data))}`"


def _last(path: str) -> str:
    return Path(path.split("?")[0]).name or "local"


def _escape(text: str) -> str:
    """One line that can neither leave its table cell nor bring HTML."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("|", "\\|").replace("`", "'")
