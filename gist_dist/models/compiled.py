"""student.compile and guide.compile: torch.compile of a transformer's layers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

COMPILE = {"dynamic": True, "options": {"fallback_random": True}}
"""One graph for all lengths. Dropout from torch's own generator: the second encode has to repeat the first one's."""


def compile_layers(model: nn.Module) -> None:
    """One by one, so that they share their graphs, and what is around them, packed or padded, stays as it is."""
    for layer in _repeated_layers(model):
        layer.compile(**COMPILE)


def _repeated_layers(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(type(layer) is type(child[0]) for layer in child):
            yield from child
        else:
            yield from _repeated_layers(child)


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Within it every module is called by itself."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
