"""Dropout drawn our way: the same function as torch's, but for which numbers are dropped."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gist_dist.models import cpu_dropout
from gist_dist.models.cpu_dropout import FastDropout

SHAPE = (5, 2, 5, 2)
"""Texts, heads, tokens and width of a head."""


def inputs(mask: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(1)
    queries_keys_values = [torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lengths = torch.tensor([5, 5, 4, 2, 1])
    real = (torch.arange(SHAPE[2]) < lengths[:, None])[:, None, None, :].expand(-1, 1, SHAPE[2], -1)
    return queries_keys_values, real if mask else None


def kept_by_hand(seed: int, p: float, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """What draws of these shapes keep after torch.manual_seed(seed), from the Mersenne Twister up.

    Four numbers share 64 bits, the lowest first, and each is dropped if its 16, as a signed number, are among the
    lowest p of all. A draw takes whole words.
    """
    twister = np.random.RandomState(seed)
    drawn = []
    for shape in shapes:
        high, low = twister.randint(0, 2**32, size=(-(-math.prod(shape) // 4), 2), dtype=np.uint32).astype(int).T
        bits = np.stack([low % 2**16, low // 2**16, high % 2**16, high // 2**16], axis=1).flatten()
        signed = np.where(bits < 2**15, bits, bits - 2**16)[: math.prod(shape)]
        drawn.append(torch.from_numpy(signed + 2**15 >= round(p * 2**16)).view(shape))
    return drawn


@pytest.fixture(params=[2**18, 2 * 5 * 5 * 2], ids=["one piece", "two texts a piece"])
def pieces(monkeypatch, request) -> int:
    monkeypatch.setattr(cpu_dropout, "SCORES_AT_ONCE", request.param)
    return request.param


@pytest.mark.parametrize("mask", [False, True])
def test_attention_is_that_of_the_formula_and_so_are_its_gradients(pieces, mask):
    (query, key, value), real = inputs(mask)

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        with FastDropout():
            return F.scaled_dot_product_attention(*tensors, attn_mask=real, dropout_p=0.4)

    texts, heads, length, _ = SHAPE
    drawn = [texts] if pieces == 2**18 else [2, 2, 1]
    kept = kept_by_hand(7, 0.4, *((count, heads, length, length) for count in drawn))
    scores = (query @ key.transpose(-1, -2)) / math.sqrt(SHAPE[3])
    weights = torch.softmax(scores if real is None else scores.masked_fill(~real, -torch.inf), dim=-1)
    expected = (weights * torch.cat(kept) / 0.6) @ value
    torch.testing.assert_close(attention(query, key, value), expected)
    assert torch.autograd.gradcheck(attention, (query, key, value))
    with torch.no_grad():
        assert torch.equal(attention(query, key, value), attention(*(x.detach() for x in (query, key, value))))


MASKS = {
    "left padding, causal": lambda real, t: real.flip(-1)[:, None, None, :] & torch.ones(t, t).tril().bool(),
    "right padding, window": lambda real, t: real[:, None, None, :] & torch.ones(t, t).tril(1).triu(-1).bool(),
    "nothing at all": lambda real, t: torch.zeros(len(real), 1, t, t, dtype=torch.bool),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_tokens_that_may_see_none_get_what_torch_gives_them(pieces, mask, monkeypatch):
    """Zeros, and gradients that are finite; with nothing dropped, all of it is torch's own attention."""
    monkeypatch.setattr(cpu_dropout, "_kept", lambda shape, p: torch.ones(shape, dtype=torch.bool))
    length, heads = 5, 2
    real = torch.arange(length) < torch.tensor([5, 5, 4, 2, 1])[:, None]
    allowed = MASKS[mask](real, length)
    assert not allowed.any(dim=-1).all()
    tensors, _ = inputs(False)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=allowed)
    with FastDropout():
        output = 0.75 * F.scaled_dot_product_attention(*tensors, attn_mask=allowed, dropout_p=0.25)
    assert output.shape == (len(real), heads, length, 2)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    ours, its = (torch.autograd.grad((o * weights).sum(), tensors) for o in (output, expected))
    torch.testing.assert_close(ours, its)


def test_dropout_is_that_of_the_formula_and_so_is_its_gradient():
    value = torch.randn(12, 10, dtype=torch.float64, requires_grad=True)

    def dropout(tensor: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        with FastDropout():
            return torch.nn.Dropout(0.3)(tensor)

    (kept,) = kept_by_hand(3, 0.3, (12, 10))
    expected = value * kept / 0.7
    torch.testing.assert_close(dropout(value), expected)
    assert torch.autograd.gradcheck(dropout, value)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_each_number_is_dropped_on_its_own_with_the_given_probability(p):
    torch.manual_seed(5)
    dropped = (~cpu_dropout._kept(torch.Size((1000, 1001)), p)).double().flatten()
    spread = math.sqrt(p * (1 - p) / dropped.numel())
    assert abs(dropped.mean() - p) < 5 * spread + 2**-16
    for distance in (1, 2, 3, 4, 1001):  # four come from one draw
        together = (dropped[distance:] * dropped[:-distance]).mean()
        assert abs(together - p * p) < 5 * p * math.sqrt((1 - p * p) / dropped.numel()) + 2**-15
    torch.manual_seed(5)
    assert torch.equal(dropped == 0, cpu_dropout._kept(torch.Size((1000, 1001)), p).flatten())


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "fp32 under autocast"])
def test_bf16_loses_little_more_than_the_formula_step_by_step_in_bf16(monkeypatch, autocast):
    """Against fp64: output and gradients of attention with dropout and a mask, in several pieces."""
    torch.manual_seed(2)
    shape, p = (6, 4, 24, 16), 0.2
    *inputs, direction = (torch.randn(shape).bfloat16().double() for _ in range(4))
    real = (torch.arange(shape[2]) < torch.tensor([24, 20, 16, 9, 2, 1])[:, None])[:, None, None, :]
    real = real.expand(-1, 1, shape[2], -1)
    kept = torch.rand(*shape[:3], shape[2]) >= p
    pieces = iter(kept.split(2))
    monkeypatch.setattr(cpu_dropout, "SCORES_AT_ONCE", 2 * 4 * 24 * 24)
    monkeypatch.setattr(cpu_dropout, "_kept", lambda shape, p: next(pieces))

    def by_formula(query, key, value):
        scores = (query @ key.transpose(-1, -2)) / math.sqrt(shape[3])
        return (torch.softmax(scores.masked_fill(~real, -torch.inf), dim=-1) * kept / (1 - p)) @ value

    def fast(*tensors):
        with FastDropout(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.scaled_dot_product_attention(*tensors, attn_mask=real, dropout_p=p)

    def outcome(attention, dtype):
        tensors = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        output = attention(*tensors)
        output.backward(direction.to(output.dtype))
        return [output.detach(), *(tensor.grad for tensor in tensors)]

    exact, naive = outcome(by_formula, torch.float64), outcome(by_formula, torch.bfloat16)
    ours = outcome(fast, torch.float32 if autocast else torch.bfloat16)
    assert ours[0].dtype == torch.bfloat16
    for true, mine, theirs in zip(exact, ours, naive, strict=True):
        assert (mine - true).norm() < 1.3 * (theirs - true).norm() < 0.02 * true.norm()


def test_the_rest_is_left_to_torch():
    """Evaluation, half precision, causal attention: bit for bit what torch gives with the same seed."""
    single = torch.randn(2, 3, 5, 4)
    cases = [
        lambda: F.dropout(single, 0.5, training=False),
        lambda: F.dropout(single, 0.0),
        lambda: F.dropout(single.half(), 0.5),
        lambda: F.scaled_dot_product_attention(single, single, single),
        lambda: F.scaled_dot_product_attention(single, single, single, dropout_p=0.5, is_causal=True),
        lambda: F.scaled_dot_product_attention(single, single, single, torch.zeros(5, 5), dropout_p=0.5),
        lambda: F.scaled_dot_product_attention(single[:, :, :2], single, single, dropout_p=0.5),
    ]
    for case in cases:
        torch.manual_seed(0)
        expected = case()
        torch.manual_seed(0)
        with FastDropout():
            assert torch.equal(case(), expected)
    torch.manual_seed(0)
    expected = F.dropout(single, 0.5)
    torch.manual_seed(0)
    with FastDropout():
        assert not torch.equal(F.dropout(single, 0.5), expected)
