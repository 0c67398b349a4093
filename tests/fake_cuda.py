"""A GPU that isn't there: tensors that say they are on cuda:0 and keep their numbers on the CPU.

Every operation on them is seen: tensors of two devices in one raise, and what would make the host wait, what is copied
between the devices and what would be a kernel are counted. To torch's compiled parts they are CPU tensors, so autograd
works in a torch without CUDA; autocast is the CPU's, and attention and dropout are put in as the one kernel that they
are on a GPU.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount", "is_nonzero"}
"""Operations whose result the host has to know."""
NO_KERNELS = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty"}
NO_KERNELS |= {"empty_strided", "new_empty_strided", "_indices", "_values", "_nnz", "_sparse_coo_tensor_unsafe"}
"""Beside views."""
COPIES = {"_to_copy", "copy_"}


class FakeTensor(torch.Tensor):
    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "FakeTensor":
        strides = raw.stride() if raw.layout == torch.strided else None
        made = torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=strides, dtype=raw.dtype, device="cpu")
        made.raw = raw
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_sparse = property(lambda self: self.raw.is_sparse)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside FakeCuda")

    def tolist(self) -> Any:
        FakeCuda.current.wait("tolist")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"FakeTensor({tuple(self.shape)}, {self.dtype})"


class FakeCuda(TorchDispatchMode):
    """Within it cuda:0 can be used, and is watched."""

    current: "FakeCuda"

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        FakeCuda.current = self

    def reset(self) -> None:
        self.waits, self.copies, self.kernels = Counter[str](), Counter[str](), Counter[str]()

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        to = kwargs.get("device")
        # To torch's compiled parts, the backward passes among them, what is here is on the CPU, and stays.
        is_asked = name == "_to_copy" and torch._C._current_autograd_node() is None
        is_moved = to is not None and (is_asked or not fakes)
        goes_there = torch.device(to).type == "cuda" if is_moved else bool(fakes)
        if name == "copy_":
            goes_there = isinstance(args[0], FakeTensor)
        if fakes or goes_there:
            self._watch(func, name, args, kwargs, tensors, goes_there)
        given = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        given |= {"device": torch.device("cpu")} if goes_there and to is not None else {}
        with _disable_current_modes():
            out = func(*tree_map(_raw, args), **tree_map(_raw, given))
        if not goes_there:
            return out
        known = {id(fake.raw): fake for fake in fakes} if func._schema.is_mutable else {}

        def there(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else FakeTensor(value)

        return tree_map(there, out)

    def _watch(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Any], goes_there: bool) -> None:
        strangers = [t for t in tensors if not isinstance(t, FakeTensor) and t.dim()]
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            if isinstance(source, FakeTensor) != goes_there:
                way = "to the GPU" if goes_there else "to the host"
                self.copies[f"{way} at {_place()}"] += 1
                is_free = kwargs.get("non_blocking", len(args) > 2 and args[2]) and source.numel()
                if not goes_there or not is_free:
                    self.wait(f"copy {way}")
        elif strangers:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} at {_place()}")
        is_by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1:2])
        )
        if name in WAITS or is_by_mask:
            self.wait(name)
        if not func.is_view and name not in NO_KERNELS:
            self.kernels[name] += 1


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, FakeTensor) else value


def _place() -> str:
    """The innermost line of ours or of a model."""
    ours = [f for f in traceback.extract_stack() if "/gist_dist/" in f.filename or "/transformers/" in f.filename]
    return f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}" if ours else "no place of ours"


def move(model: nn.Module) -> None:
    """Its parameters and buffers to the GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = nn.Parameter(FakeTensor(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(buffer)


class _Kernel(torch.autograd.Function):
    """One kernel forward and one backward, whatever the CPU needs for its numbers."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], name: str, *tensors: torch.Tensor) -> torch.Tensor:
        watched = FakeCuda.current
        raws = [_raw(tensor).detach().requires_grad_() for tensor in tensors]
        with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            ctx.out = function(*raws)
        ctx.raws, ctx.name = raws, name
        watched.kernels[name] += 1
        return FakeTensor(ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        FakeCuda.current.kernels[f"{ctx.name}_backward"] += 1
        with _disable_current_modes():
            found = torch.autograd.grad(ctx.out, ctx.raws, _raw(gradient))
        return None, None, *(FakeTensor(f) for f in found)


class _Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.cuda and the kernels of attention and dropout are, for the rest of the test."""
    sdpa, dropout, autocast = F.scaled_dot_product_attention, F.dropout, torch.autocast

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        if not isinstance(query, FakeTensor):
            return sdpa(query, key, value, attn_mask, dropout_p, **options)
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
        mask = _raw(attn_mask)
        return _Kernel.apply(
            lambda q, k, v: sdpa(q, k, v, mask, dropout_p, **options).contiguous(), "attention", query, key, value
        )

    def flash(query: Any, key: Any, value: Any, ends: Any, *others: Any, scale: float | None = None) -> Any:
        sizes, probability = _raw(ends).diff().tolist(), others[3]

        def by_text(*states: torch.Tensor) -> torch.Tensor:
            texts = zip(*(t.transpose(0, 1).split(sizes, dim=1) for t in states), strict=True)
            outputs = [sdpa(q[None], k[None], v[None], dropout_p=probability, scale=scale)[0] for q, k, v in texts]
            return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()

        assert query.dtype == torch.bfloat16, "FlashAttention has no fp32"
        return (_Kernel.apply(by_text, "attention", query, key, value),)

    def drop(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if isinstance(input, FakeTensor) and training and p:
            return torch.native_dropout(input, p, True)[0]
        return dropout(input, p, training, inplace)

    @contextmanager
    def device(_: Any) -> Any:
        yield

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(F, "dropout", drop)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which torch hides what operations are made of
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: FakeCuda.current.wait("synchronize"))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True)


def without_cpu_dropout(student: Any) -> None:
    student.dropout = nullcontext()
