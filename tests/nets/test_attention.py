"""Attention beside its definition in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist.nets.blocks import attention


def defined(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Vaswani 2017, Eq. 1, and the heads of a token one after the other."""
    logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    return torch.cat((logits.softmax(dim=3) @ value).unbind(dim=1), dim=2)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(masked: bool) -> None:
    parts, mask = drawn(7, torch.float32, masked)
    errors = errors_of(lambda *found: attention(*found, mask), parts, mask)
    assert errors[0] < 1e-6
    assert max(errors) < 2e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 8.0])  # 8: scores up to 30, of which bf16 keeps a tenth
@pytest.mark.parametrize(("num_keys", "width"), [(7, 8), (300, 8), (300, 32)])
@pytest.mark.parametrize("seed", range(4))
def test_attention_in_bf16_is_nearly_as_accurate_as_torchs(
    seed: int, num_keys: int, width: int, sharpness: float, masked: bool
) -> None:
    parts, mask = drawn(num_keys, torch.bfloat16, masked, width, seed)
    parts[0] *= sharpness
    seen = None if mask is None else mask[:, None, None]
    kernels = errors_of(
        lambda *found: F.scaled_dot_product_attention(*found, seen).transpose(1, 2).flatten(2), parts, mask
    )
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            errors = errors_of(lambda *found: attention(*found, mask), parts, mask)
        assert all(error < 1.6 * kernel for error, kernel in zip(errors, kernels, strict=True)), (errors, kernels)


def drawn(
    num_keys: int, dtype: torch.dtype, masked: bool, width: int = 8, seed: int = 0
) -> tuple[list[Tensor], Tensor | None]:
    """Queries, keys and values, and a mask of keys."""
    torch.manual_seed(seed)
    parts = [torch.randn(2, 3, length, width, dtype=dtype) for length in (50, num_keys, num_keys)]
    return parts, torch.arange(num_keys) < torch.tensor([[num_keys // 2], [num_keys]]) if masked else None


def errors_of(attend: Callable[..., Tensor], parts: list[Tensor], mask: Tensor | None) -> list[float]:
    """Of the output and the three gradients, relative, beside float64."""
    found = [part.clone().requires_grad_() for part in parts]
    wanted = [part.double().requires_grad_() for part in parts]
    output, expected = attend(*found), defined(*wanted, None if mask is None else mask[:, None, None])
    assert output.dtype == parts[0].dtype
    weights = torch.randn(output.shape, dtype=output.dtype)
    pairs = list(
        zip(
            (output, *torch.autograd.grad(output, found, weights)),
            (expected, *torch.autograd.grad(expected, wanted, weights.double())),
            strict=True,
        )
    )
    assert all(one.dtype == parts[0].dtype for one, _ in pairs)
    return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]


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
    rounding = 1e-6 if precision == "fp32" else 2.0**-8
    assert (output.double() - expected).norm() < rounding * expected.norm()
