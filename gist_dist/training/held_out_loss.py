"""The loss of the rows that a run holds out, as a step would have it: in batches of global_size, without dropout."""

# Axes:  u texts of a batch   d student width   e guide width

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gist_dist.config import GuideConfig, RolePrompts, RunConfig
from gist_dist.core.candidates import row_blocks
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import BatchPlan, plan_batch
from gist_dist.core.step import batch_index
from gist_dist.data.corpus import Corpus
from gist_dist.data.held_out import held_out_rows
from gist_dist.models.encoder import Guide
from gist_dist.models.guide_cache import GuideCache, encode_inputs


def held_out_loss(
    config: RunConfig,
    corpus: Corpus,
    student: Path,
    guide: Guide | GuideCache | None,
    device: torch.device | str = "cpu",
) -> float:
    """Mean over the rows, of a saved student. guide: as in training, and the student itself in mode self; the recipe's
    first one where guide.refresh renews it, so that steps can be compared."""
    frozen = _frozen(config, student, device)
    rows = held_out_rows(config, corpus)
    rows = rows[np.random.default_rng(config.seed).permutation(len(rows))]
    total = 0.0
    for batch in np.array_split(rows, math.ceil(len(rows) / config.batch.global_size)):
        plan = plan_batch(corpus, batch, 0, config.batch.tokens_at_once, with_guide=False)
        embedded = _embedded(frozen, corpus.student_tokens(plan.texts), config)
        index = batch_index(plan, embedded.device)
        blocks = row_blocks(index, config.loss, config.batch.loss_gb * 1e9)
        guided = _guided(config, corpus, plan, guide, embedded)
        total += float(gist_loss(embedded, guided, index, blocks, config.loss).loss) * len(batch)
    return total / len(rows)


def _frozen(config: RunConfig, saved: Path, device: torch.device | str) -> Guide:
    """Which knows the prompts that it was trained with: as Student.save names them, or as the recipe has them."""
    same = {key: getattr(config.student, key) for key in ("precision", "attention", "trust_remote_code", "max_tokens")}
    frozen = Guide(GuideConfig(model=str(saved), **same), device)
    frozen.learn_prompts([config.student.prompts, *(source.prompts.student for source in config.data.sources)])
    for source in config.data.sources:
        of_source = {role: frozen.model.prompts.get(f"{source.label}-{role}") for role in ("query", "document")}
        frozen.learn_prompts([RolePrompts(anchor=of_source["query"], positive=of_source["document"])])
    return frozen


def _embedded(encoder: Guide, tokens: list[np.ndarray], config: RunConfig) -> Tensor:
    vectors = encode_inputs(encoder, tokens, config.batch.tokens_at_once)
    return torch.from_numpy(vectors).float().to(encoder.device)


def _guided(
    config: RunConfig, corpus: Corpus, plan: BatchPlan, guide: Guide | GuideCache | None, student: Tensor
) -> Tensor | None:
    """The guide's embeddings of the batch's texts [u e]."""
    if isinstance(guide, GuideCache):
        found = torch.from_numpy(guide.embeddings(guide.find(corpus.guide_keys[plan.texts])))
        return found.float().to(student.device)
    if guide is not None:
        return _embedded(guide, corpus.guide_tokens(plan.texts), config)
    return student if config.guide_mode == "self" else None
