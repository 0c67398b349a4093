"""The recipe with the budgets of this worker's GPU, where it leaves them open."""

import logging
from typing import Any

import numpy as np
import torch

from gist_dist.config import RunConfig
from gist_dist.core.budgets import fitted
from gist_dist.core.collectives import World, all_reduce_max
from gist_dist.data.corpus import Corpus
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.load import transformer_of

logger = logging.getLogger(__name__)


def with_budgets(config: RunConfig, student: Student, guide: Guide | None, corpus: Corpus, world: World) -> RunConfig:
    """Equal on all workers, by the one with the least memory: all have to cut chunks alike. By the recipe's number of
    workers and not by how many there are, so that a run goes on alike with fewer. Unchanged on a CPU.

    guide: the model, where it encodes within the step.
    """
    batch = config.batch
    if student.device.type != "cuda" or None not in (batch.chunk_tokens, batch.activation_gb):
        return config
    own = float(torch.cuda.get_device_properties(student.device).total_memory)
    least = -all_reduce_max({"memory": -own}, student.device, world)["memory"]
    shape: Any = transformer_of(student.model).config.get_text_config()
    batch = fitted(
        batch,
        least,
        sum(parameter.numel() for parameter in student.parameters()),
        float(sum(p.numel() * p.element_size() for p in guide.model.parameters())) if guide else 0.0,
        shape.hidden_size,
        shape.num_hidden_layers,
        student.precision == "bf16",
        _batch_tokens(config, corpus) / config.cluster.max_workers,
    )
    told = f"{batch.tokens_at_once:,}", batch.kept_bytes / 1e9
    logger.info("by this GPU's memory: batch.chunk_tokens = %s, batch.activation_gb = %g", *told)
    return config.model_copy(update={"batch": batch})


def _batch_tokens(config: RunConfig, corpus: Corpus) -> float:
    """Of an average batch, with every text counted where it stands."""
    tokens = float(corpus.student_lengths[corpus.texts_of(np.arange(corpus.num_rows))].sum())
    return config.batch.global_size * tokens / corpus.num_rows
