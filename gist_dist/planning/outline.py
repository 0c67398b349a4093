"""What a run is about to do, in a few lines: shown before it takes a GPU."""

from gist_dist.common.text import plural
from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Encoder


def outline(config: RunConfig, student: Encoder, guide: Encoder | None, corpus: Corpus, sampler: Sampler) -> list[str]:
    """A line for each of student, guide, data, steps, workers and what comes after; `gist-dist plan` tells more."""
    told = {
        "student": _model(student),
        "guide": _guide(config, guide),
        "data": f"{corpus.num_rows:,} rows with {corpus.num_texts:,} distinct texts"
        f" of {plural(len(corpus.source_names), 'source')}",
        "steps": f"{sampler.num_steps:,} of {config.batch.global_size:,} rows"
        f" ({sampler.num_steps / sampler.steps_per_epoch:.2f} epochs), temperature {config.loss.temperature:g}",
        "workers": _workers(config),
        "then": _evaluation(config),
    }
    return [f"{name:9}{text}" for name, text in told.items()]


def _model(encoder: Encoder) -> str:
    millions = sum(parameter.numel() for parameter in encoder.model.parameters()) / 1e6
    limit = encoder.max_tokens
    tokens = f"at most {limit} tokens" if limit else "no limit of tokens"
    return f"{encoder.config.model}: {millions:,.1f} M parameters, {tokens}, {encoder.config.precision}"


def _guide(config: RunConfig, guide: Encoder | None) -> str:
    section = config.guide
    if section is None:
        return "none: every candidate counts as a negative"
    margin = f"{config.loss.margin_kind} margin {config.loss.margin:g}"
    refresh = f", a copy of the student after every {section.refresh:,} steps" if section.refresh else ""
    if guide is None:
        return f"the student itself, {margin}"
    how = "cached before training" if section.mode == "cache" else section.mode
    return f"{_model(guide)}, {how}{refresh}, {margin}"


def _workers(config: RunConfig) -> str:
    low, high = config.cluster.min_workers, config.cluster.max_workers
    every = config.checkpoint.every_steps
    checkpoints = f"a checkpoint every {plural(every, 'step')}" if every else "a checkpoint at the end only"
    return f"{low} to {high}, {checkpoints}" if low < high else f"{high}, {checkpoints}"


def _evaluation(config: RunConfig) -> str:
    evaluate = config.evaluate
    if not evaluate.tasks:
        return "no evaluation (evaluate.tasks is empty)"
    models = ["the trained model", "the untrained student"][: 1 + evaluate.baseline]
    models += ["the guide"] * bool(evaluate.guide and config.guide and config.guide.model)
    return f"{plural(len(evaluate.tasks), 'MTEB task')} on {', '.join(models)}"
