"""Gradient caching: encode without graphs, learn the gradient of the embeddings, encode again with graphs.

The memory of a step is then one chunk's activations, whatever the batch (Gao et al. 2021, arXiv 2101.06983). Chunks
whose activations fit a budget keep their graph in the first pass and need no second encode.
"""

# Axes:  t texts of one chunk   d student width

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

Encode = Callable[[int], Float[Tensor, "t d"]]
"""Embeddings of the texts of the chunk with that number; equal however often it is called (dropout included)."""


FIXED_ROW = "fixed_row"
"""Name, in an embedding, of the row that takes no gradient; see make_sparse()."""


def make_sparse(embedding: nn.Embedding) -> None:
    """Its gradients are of the chunk's tokens, not of the whole vocabulary. GradientSums leaves out that of its
    padding: torch would look for padding in every backward pass, and the host wait for it."""
    embedding.sparse = True
    if embedding.padding_idx is not None:
        setattr(embedding, FIXED_ROW, embedding.padding_idx)
        embedding.padding_idx = None


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
            # A saved output that kept its own graph would be a reference cycle; a checkpointed layer starts again from
            # its input and must find that it needs a gradient.
            return tensor.detach().requires_grad_(tensor.requires_grad)

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
    """Parameter gradients, added up over chunks and workers in fp64.

    fp32 sums depend on who adds what first, and Adam blows that rounding up to whole updates where a gradient should
    vanish (key biases). In fp64 the order leaves no trace once the sum is rounded to fp32: a run on any number of
    workers takes the same steps. Costs 8 bytes a parameter.

    Of an embedding with sparse gradients, only the rows that the batch's tokens touch are added up and sent.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
        self.parameters = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: id(p) in tables)
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = self.parameters[0].new_zeros(sum(sizes), dtype=torch.float64)
        self.sums = [s.view_as(p) for s, p in zip(flat.split(sizes), self.parameters, strict=True)]
        self.has_grad = [False] * len(sizes)
        """Which parameters have a gradient."""
        self.rows = {n: p.new_zeros(len(p), dtype=torch.bool) for n, p in enumerate(self.parameters) if id(p) in tables}
        """Which rows of a table, an embedding with sparse gradients, have one."""
        fixed = {id(m.weight): row for m in model.modules() if (row := getattr(m, FIXED_ROW, None)) is not None}
        self.fixed_rows = {n: fixed[id(p)] for n, p in enumerate(self.parameters) if id(p) in fixed}
        self.dense = flat[: sum(p.numel() for p in self.parameters if id(p) not in tables)]
        """All sums but those of the tables, in one piece."""

    def accumulate(self) -> None:
        """Move what the parameters' .grad hold into the sums."""
        for number, parameter in enumerate(self.parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            self.has_grad[number] = True
            if gradient.is_sparse:
                touched = gradient._indices()[0]
                self.sums[number].index_add_(0, touched, gradient._values().to(torch.float64))
                self.rows[number][touched] = True
            else:
                self.sums[number] += gradient
                if number in self.rows:
                    self.rows[number][:] = True

    def reduce(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Add up the workers' sums. all_reduce: sums a tensor over workers, in place.

        A worker that encoded nothing has no gradient where others have one: who has which is agreed upon first.
        """
        flags = torch.cat([torch.tensor(self.has_grad, device=self.sums[0].device), *self.rows.values()]).int()
        all_reduce(flags)
        has_grad, *touched = flags.bool().split([len(self.has_grad), *map(len, self.rows.values())])
        self.has_grad = has_grad.tolist()
        self.rows = dict(zip(self.rows, touched, strict=True))
        all_reduce(self.dense)
        for number, rows in self.rows.items():
            share = self.sums[number][rows]
            all_reduce(share)
            self.sums[number][rows] = share

    def write_to_grad(self) -> None:
        """Move the sums into the parameters' .grad; a parameter without any gradient keeps None."""
        for number, row in self.fixed_rows.items():
            self.sums[number][row] = 0
        for number, parameter in enumerate(self.parameters):
            parameter.grad = self.sums[number].to(parameter.dtype, copy=True) if self.has_grad[number] else None
            self.has_grad[number] = False
        self.dense.zero_()
        for number, rows in self.rows.items():
            self.sums[number].masked_fill_(rows.unsqueeze(1), 0)  # an index by a mask would have to be waited for
            rows.zero_()


def second_pass(
    encode: Encode,
    embeddings: dict[int, Float[Tensor, "t d"]],
    gradients: dict[int, Float[Tensor, "t d"]],
    sums: GradientSums | None = None,
) -> None:
    """Add to ``sums``, or without to the parameters' .grad, what the embeddings' gradients amount to; consumes
    ``embeddings``."""
    for chunk in list(embeddings):
        embedding = embeddings.pop(chunk)
        if not embedding.requires_grad:
            embedding = encode(chunk)
        embedding.backward(gradients[chunk].to(embedding.dtype))
        if sums:
            sums.accumulate()
