"""How much a worker does at once where the recipe leaves it open: by its GPU's memory and the size of the models."""

import math

from gist_dist.config import CPU_CHUNK_TOKENS, BatchConfig

GRAPH_BYTES = 55
"""Of a token in bf16, for each layer and unit of its width: counted on BERT. Twice as many in fp32."""
CHUNK_SHARE, KEPT_SHARE = 0.3, 0.3
"""Of the memory that the weights leave: for one chunk's graph, and for those that are kept. Steps with shares of
0.1 and 0.4 took less than half of an H200's memory, and what they lacked was larger chunks (docs/log.md)."""
MOST_CHUNK_TOKENS, LEAST_CHUNKS = 131_072, 2
TRAINING_BYTES = 24
"""Of a parameter that is trained: weights 4, gradients 4, their fp64 sums 8, Adam's two means 8."""


def fitted(
    batch: BatchConfig,
    memory_bytes: float,
    num_parameters: int,
    guide_bytes: float,
    width: int,
    layers: int,
    bf16: bool,
    own_tokens: float,
) -> BatchConfig:
    """The section with numbers for a GPU of so much memory. width, layers: of the student's transformer. own_tokens: of
    an average batch, a worker's share where all are there: it makes LEAST_CHUNKS at least."""
    free = max(0.0, memory_bytes - TRAINING_BYTES * num_parameters - guide_bytes)
    graph_bytes = GRAPH_BYTES * width * layers * (1 if bf16 else 2)
    most = min(MOST_CHUNK_TOKENS, CHUNK_SHARE * free / graph_bytes, own_tokens / LEAST_CHUNKS)
    tokens = max(1, int(most) // CPU_CHUNK_TOKENS) * CPU_CHUNK_TOKENS
    chosen = {"chunk_tokens": tokens, "activation_gb": float(math.floor(KEPT_SHARE * free / 1e9))}
    return batch.model_copy(update={key: value for key, value in chosen.items() if getattr(batch, key) is None})
