"""Where the first number that is not finite comes from: a module of the forward pass, or the backward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gist_dist.config import LossConfig, RunConfig
from gist_dist.core.candidates import row_blocks
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import BatchPlan
from gist_dist.core.step import Scored
from gist_dist.data.corpus import Corpus
from gist_dist.models.compiled import not_compiled
from gist_dist.models.encoder import Student

GROWN = 1e4
"""Activations beyond it have grown: those of sound models are below."""
MOST_CHUNKS = 32
"""So many are encoded again in search of a gradient; then it stays unknown."""
STATES = 3
"""Axes of hidden states at most; what has more is a mask or a bias, which may hold -inf."""


@dataclass(frozen=True)
class Origin:
    """The first module that gives what is not finite from what is."""

    module: str
    kind: str
    """Its class."""
    value: float
    """nan or inf."""
    largest_input: float
    has_bad_weight: bool

    def __str__(self) -> str:
        given = f"inputs of at most {self.largest_input:.2g}" if self.largest_input else "finite inputs"
        weight = ", of a weight that is not finite" if self.has_bad_weight else ""
        first = f"in the forward pass '{self.module}' ({self.kind}) is the first to give {self.value}"
        return f"{first}, from {given}{weight}"

    def remedy(self, step: int) -> str:
        if self.has_bad_weight or self.largest_input > GROWN:
            return "the weights have grown too large: lower optim.learning_rate" if step > 1 else "use another model"
        if "attention" in self.kind.lower() and self.value != self.value:
            return (
                "no learning rate changes that: a row of attention that is masked whole gives NaN; set "
                "student.attention (eager or sdpa), leave out student.dropout, or leave out those rows"
            )
        return "no learning rate changes that: use student.precision=fp32, or leave out those rows"


def forward_origin(
    config: RunConfig, student: Student, corpus: Corpus, plan: BatchPlan, scored: Scored
) -> Origin | None:
    """Encodes the chunk of the first text whose embedding is not finite again; None where no module is to blame."""
    (bad,) = torch.nonzero(~torch.isfinite(scored.student).all(dim=1), as_tuple=True)
    chunk = next(number for number, chunk in enumerate(plan.student_chunks) if int(bad[0]) in chunk.texts)
    with torch.no_grad(), _watched(student.model) as found:
        _encode(config, student, corpus, plan, chunk)
    return found[0] if found else None


def backward_origin(
    config: RunConfig, student: Student, corpus: Corpus, plan: BatchPlan, scored: Scored
) -> tuple[str | None, bool]:
    """The weight with which the backward pass begins to be not finite, if that is found, and whether the loss's own
    gradient is finite."""
    gradient = _of_loss(config.loss, config.batch.loss_gb, scored)
    if not bool(torch.isfinite(gradient).all()):
        return None, False
    for number, chunk in enumerate(plan.student_chunks[:MOST_CHUNKS]):
        embeddings = _encode(config, student, corpus, plan, number)
        embeddings.backward(gradient[torch.from_numpy(chunk.texts).to(gradient.device)].to(embeddings.dtype))
        bad = [name for name, p in student.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        student.model.zero_grad(set_to_none=True)
        if bad:
            return bad[-1], True
    return None, True


def _of_loss(loss: LossConfig, loss_gb: float, scored: Scored) -> Tensor:
    blocks = row_blocks(scored.batch, loss, loss_gb * 1e9)
    return gist_loss(scored.student, scored.guide, scored.batch, blocks, loss).gradient


def _encode(config: RunConfig, student: Student, corpus: Corpus, plan: BatchPlan, chunk: int) -> Tensor:
    """As the step did."""
    tokens = corpus.student_tokens(plan.texts[plan.student_chunks[chunk].texts])
    return student.encode(student.inputs(tokens), dropout_seed=(config.seed, plan.step, chunk))


@contextmanager
def _watched(model: Any) -> Iterator[list[Origin]]:
    """Every module's outputs are looked at; not compiled, where no module is called by itself."""
    found = list[Origin]()

    def look(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if found or not (bad := [t for t in _states(output) if not _is_finite(t)]):
            return
        inputs = [*_states(given), *_states(named)]
        if all(map(_is_finite, inputs)):
            largest = max((float(t.detach().abs().max()) for t in inputs if t.numel()), default=0.0)
            value = float("nan") if any(bool(t.isnan().any()) for t in bad) else float("inf")
            weights = module.parameters(recurse=not [*module.children()])
            found.append(Origin(name, type(module).__name__, value, largest, not all(map(_is_finite, weights))))

    def hook(name: str) -> Any:
        return lambda *arguments: look(name, *arguments)

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        with not_compiled(model):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _states(value: Any) -> Iterator[Tensor]:
    """Hidden states and embeddings in what a module is given or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim <= STATES:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _states(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _states(item)


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(torch.isfinite(values).all())
