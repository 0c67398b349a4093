"""How much a worker does at once where the recipe leaves it open: by its GPU's memory and the size of the models."""

import math

from gist_dist.config import CPU_CHUNK_TOKENS, BatchConfig

GRAPH_BYTES = 55
"""Of a token in bf16, for each layer and unit of its width: counted on BERT. Twice as many in fp32."""
CHUNK_SHARE, KEPT_SHARE = 0.2, 0.4
"""Of the memory that the weights leave: for one chunk's graph, and for those that are kept. Steps with shares of
0.1 and 0.4 took less than half of an H200's memory (benchmarks/results/gpu.md)."""
MOST_CHUNK_TOKENS = 131_072
TRAINING_BYTES = 24
"""Of a parameter that is trained: weights, gradients, fp64 sums, Adam's means."""


def fitted(
    batch: BatchConfig,
    memory_bytes: float,
    num_parameters: int,
    guide_bytes: float,
    width: int,
    layers: int,
    bf16: bool,
) -> BatchConfig:
    """The section with numbers for a GPU of so much memory. width, layers: of the student's transformer."""
    free = max(0.0, memory_bytes - TRAINING_BYTES * num_parameters - guide_bytes)
    graph_bytes = GRAPH_BYTES * width * layers * (1 if bf16 else 2)
    tokens = 1 << int(math.log2(max(1.0, CHUNK_SHARE * free / graph_bytes)))
    tokens = min(MOST_CHUNK_TOKENS, max(CPU_CHUNK_TOKENS, tokens))
    chosen = {"chunk_tokens": tokens, "activation_gb": float(math.floor(KEPT_SHARE * free / 1e9))}
    return batch.model_copy(update={key: value for key, value in chosen.items() if getattr(batch, key) is None})
