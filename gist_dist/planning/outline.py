"""What a run is about to do, in a few lines: shown before it takes a GPU."""

from gist_dist.common.text import plural
from gist_dist.config import RunConfig
from gist_dist.data.corpus import Corpus
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Encoder, Student, kept_prompts

LONG_TEXT = 4096
"""Tokens of a text that is worth a word where nothing cuts it."""


def outline(config: RunConfig, student: Student, guide: Encoder | None, corpus: Corpus, sampler: Sampler) -> list[str]:
    """A line for each of student, guide, data, steps, workers and what comes after; `gist-dist plan` tells more."""
    told = {
        "student": _model(student),
        "guide": _guide(config, guide),
        "data": f"{corpus.num_rows:,} rows{_several(corpus)} with {corpus.num_texts:,} distinct texts"
        f" of {plural(len(corpus.source_names), 'source')}",
        "steps": f"{sampler.num_steps:,} of {config.batch.global_size:,} rows"
        f" ({sampler.num_steps / sampler.steps_per_epoch:.2f} epochs), temperature {config.loss.temperature:g}",
        "workers": _workers(config),
        "then": _evaluation(config),
    }
    if len(sampler.held_out):
        told["data"] += f", {plural(len(sampler.held_out), 'row')} of them held out"
    if warning := long_text_line(student, corpus):
        told["data"] += f"; {warning}"
    lines = [f"{name:9}{text}" for name, text in told.items()]
    return lines[:2] + [f"{'prompts':9}{line}" for line in prompt_lines(config, student, guide)] + lines[2:]


def _several(corpus: Corpus) -> str:
    count = len(corpus.pairs[1])
    return f" and {count:,} positives" if count > corpus.num_rows else ""


def prompt_lines(config: RunConfig, student: Student, guide: Encoder | None) -> list[str]:
    """What is put before texts, from wherever it comes, and what encode() of the saved model should be told of; none
    where there are no prompts."""
    lines = []
    for encoder, role in ((student, "student"), (guide, "guide")):
        if encoder is None:
            continue
        of_sources = [encoder.prompts_with(getattr(source.prompts, role)) for source in config.data.sources]
        if not any(text for prompts in of_sources for text in prompts.values()):
            continue
        shown = ", ".join(f"{name} {_short(text)}" for name, text in encoder.prompts.items())
        others = sum(prompts != encoder.prompts for prompts in of_sources)
        more = f"; {plural(others, 'source has its', 'sources have their')} own" if others else ""
        lines.append(f"{role}: {shown}{more}")
    note = kept_prompts(student, config).note
    return [*lines, f"of the saved model, {note}"] if note else lines


def long_text_line(student: Encoder, corpus: Corpus) -> str | None:
    """A word of texts that nothing cuts."""
    longest = int(corpus.student_lengths.max(initial=0))
    if student.max_tokens or longest <= LONG_TEXT:
        return None
    return f"the longest text has {longest:,} tokens, and the student has no limit; set student.max_tokens to cut it"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


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
    if config.watched:
        return f"while it trains {while_training(config)}; then {_afterwards(config)}"
    return _afterwards(config)


def while_training(config: RunConfig) -> str:
    """held_out every 100 steps, the best by mean is kept, ended after 3 evaluations without a gain."""
    evaluate, every = config.evaluate, config.evaluate.every_steps
    if every is None:
        when = "before and after"
    elif isinstance(every, tuple):
        when = f"after {plural(len(every), 'step')} and the last"
    else:
        when = f"every {plural(int(every), 'step')}" if every >= 1 else f"every {every:g} of an epoch"
    text = f"{', '.join(config.watched[:5])}{' …' * (len(config.watched) > 5)} {when}"
    if evaluate.keep_best:
        text += f", the best by {evaluate.keep_best} is kept"
    if evaluate.stop_after:
        text += f", ended after {plural(evaluate.stop_after, 'evaluation')} without a gain"
    return text


def _afterwards(config: RunConfig) -> str:
    evaluate = config.evaluate
    if not evaluate.is_wanted:
        return "no evaluation (evaluate.tasks is empty)"
    models = ["the trained model", "the untrained student"][: 1 + evaluate.baseline]
    models += ["the guide"] * bool(evaluate.guide and config.guide and config.guide.model)
    what = [*evaluate.benchmark, *[plural(len(evaluate.tasks), "MTEB task")] * bool(evaluate.tasks)]
    return f"{' and '.join(what)} on {', '.join(models)}"
