"""Gradient caching: encode without graphs, learn the gradient of the embeddings, encode again with graphs.

The memory of a step is then one chunk's activations, whatever the batch (Gao et al. 2021, arXiv 2101.06983). Chunks
whose activations fit a budget keep their graph in the first pass and need no second encode.
"""

# Axes:  t texts of one chunk   d student width

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

Encode = Callable[[int], Float[Tensor, "t d"]]
"""Embeddings of the texts of the chunk with that number; equal however often it is called (dropout included)."""


class ActivationBudget:
    """How many bytes of activations may be kept from the first pass to the second; learns what a token costs."""

    def __init__(self, budget_bytes: float, model: nn.Module) -> None:
        self.budget_bytes = budget_bytes
        self.bytes_per_token = 0.0
        self.used_bytes = 0.0
        self._weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def reset(self) -> None:
        self.used_bytes = 0.0

    def allows(self, num_tokens: int) -> bool:
        return self.budget_bytes > 0 and self.used_bytes + self.bytes_per_token * num_tokens <= self.budget_bytes

    @contextmanager
    def measured(self, num_tokens: int) -> Iterator[None]:
        """Count the bytes that autograd saves within, weights excepted, each storage once."""
        storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice within

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                storages[storage.data_ptr()] = storage
            return tensor.detach()  # a saved output that kept its own graph would be a reference cycle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        saved = sum(storage.nbytes() for storage in storages.values())
        self.used_bytes += saved
        self.bytes_per_token = max(self.bytes_per_token, saved / max(1, num_tokens))


def first_pass(
    encode: Encode, chunks: Sequence[int], num_tokens: Sequence[int], budget: ActivationBudget
) -> dict[int, Float[Tensor, "t d"]]:
    """Embeddings of every chunk; those that carry a graph fitted the activation budget.

    num_tokens: padded tokens of each chunk in ``chunks``.
    """
    budget.reset()
    embeddings = {}
    for chunk, tokens in zip(chunks, num_tokens, strict=True):
        if budget.allows(tokens):
            with budget.measured(tokens):
                embeddings[chunk] = encode(chunk)
        else:
            with torch.no_grad():
                embeddings[chunk] = encode(chunk)
    return embeddings


class GradientSums:
    """Parameter gradients, added up over chunks in fp64.

    fp32 sums depend on who adds what first, and Adam blows that rounding up to whole updates where a gradient should
    vanish (key biases). In fp64 the order leaves no trace once the sum is rounded to fp32: a run on any number of
    workers takes the same steps. Costs 8 bytes a parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def take(self) -> None:
        """Move what the parameters' .grad hold into the sums."""
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if self.sums[number] is None:
                self.sums[number] = parameter.grad.to(torch.float64, copy=True)
            else:
                self.sums[number] += parameter.grad
            parameter.grad = None

    def give(self) -> None:
        """Move the sums into the parameters' .grad; a parameter without any gradient keeps None."""
        for number, parameter in enumerate(self.parameters):
            total, self.sums[number] = self.sums[number], None
            parameter.grad = None if total is None else total.to(parameter.dtype)


def second_pass(
    encode: Encode,
    embeddings: dict[int, Float[Tensor, "t d"]],
    gradients: dict[int, Float[Tensor, "t d"]],
    sums: GradientSums,
) -> None:
    """Add to ``sums`` what the embeddings' gradients amount to; consumes ``embeddings``."""
    for chunk in list(embeddings):
        embedding = embeddings.pop(chunk)
        if not embedding.requires_grad:
            embedding = encode(chunk)
        embedding.backward(gradients[chunk].to(embedding.dtype))
        sums.take()
