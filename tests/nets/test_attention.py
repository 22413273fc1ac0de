"""Attention beside its definition in float64."""

import pytest
import torch
from torch import Tensor

from gmdist.nets.blocks import attention


def defined(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Vaswani 2017, Eq. 1, and the heads of a token one after the other."""
    logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    return torch.cat((logits.softmax(dim=3) @ value).unbind(dim=1), dim=2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_attention_and_its_gradients(precision: str, masked: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    parts = [torch.randn(2, 3, length, 8, dtype=dtype) for length in (5, 7, 7)]
    mask = torch.arange(7) < torch.tensor([[4], [7]]) if masked else None
    found = [part.clone().requires_grad_() for part in parts]
    wanted = [part.double().requires_grad_() for part in parts]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        output = attention(*found, mask)
    expected = defined(*wanted, None if mask is None else mask[:, None, None])
    assert output.dtype == dtype
    weights = torch.randn(output.shape)
    (output.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    # One rounding of bf16: what is between is computed in fp32. The gradient that comes in is rounded, too.
    rounding = 1e-6 if precision == "fp32" else 2.0**-9
    assert (output.double() - expected).norm() < rounding * expected.norm()
    for part, exact in zip(found, wanted, strict=True):
        assert part.grad.dtype == dtype
        assert (part.grad.double() - exact.grad).norm() < 2 * rounding * exact.grad.norm()


def test_attention_of_many_tokens_and_its_gradients_in_bf16() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, 300, 8, dtype=torch.bfloat16) for _ in range(3)]
    found = [part.clone().requires_grad_() for part in parts]
    wanted = [part.double().requires_grad_() for part in parts]
    output, expected = attention(*found), defined(*wanted, None)
    weights = torch.randn(output.shape)
    (output.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (output.double() - expected).norm() < 0.01 * expected.norm()
    for part, exact in zip(found, wanted, strict=True):
        assert (part.grad.double() - exact.grad).norm() < 0.02 * exact.grad.norm()


def test_attention_without_gradients_in_bf16() -> None:
    parts = [torch.randn(2, 3, 5, 8, dtype=torch.bfloat16) for _ in range(3)]
    expected = defined(*(part.double() for part in parts), None)
    assert (attention(*parts).double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_causal_attention(precision: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 6, 8).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    before = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = defined(query.double(), key.double(), value.double(), before)
    output = attention(query.requires_grad_(), key, value, is_causal=True)
    rounding = 1e-6 if precision == "fp32" else 2.0**-9
    assert (output.double() - expected).norm() < rounding * expected.norm()
