"""Linear and convolutional layers and attention, computed on processors by what multiplies fastest there.

For products in fp32 torch calls MKL, which leaves AVX-512 alone on processors that are not Intel's. oneDNN, which torch
calls for most convolutions and for bf16, uses it, and takes about half the time there. A processor without instructions
for bf16 has them emulated; the same products in fp32, of the same rounded operands and rounded in the end, take a
quarter of the time (docs/benchmarks.md).
"""

import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count


def _processor() -> frozenset[str]:
    described = Path("/proc/cpuinfo")
    return frozenset(described.read_text().split()) if described.exists() else frozenset()


def _has_bf16(processor: frozenset[str]) -> bool:
    return "avx" not in processor or not processor.isdisjoint({"avx512_bf16", "amx_bf16", "avx_ne_convert"})


def _is_onednn_faster(processor: frozenset[str]) -> bool:
    is_there = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return is_there and bool(processor) and "GenuineIntel" not in processor


# Whether this processor multiplies bf16, or cannot be asked; whether it has AVX-512 and is not Intel's.
HAS_BF16, IS_ONEDNN_FASTER = _has_bf16(_processor()), _is_onednn_faster(_processor())
_FEWEST_ROWS = 64  # of a linear layer: below, other layouts or types cost as much as the product


class Linear(nn.Linear):
    """torch's layer; where oneDNN computes it, it can be differentiated once."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        if x.is_cpu and x.numel() >= _FEWEST_ROWS * x.shape[-1]:
            if not HAS_BF16 and _is_bf16(x, self.weight):
                rows: Tensor = _LinearInFp32.apply(*_to_bf16(x.flatten(0, -2), self.weight, self.bias))
                return rows.unflatten(0, x.shape[:-1])
            if _is_for_onednn(x, self.weight):
                # Not torch.nn.functional.linear: DeepSpeed puts its own there at stage 3.
                product: Tensor = torch.ops.aten.linear(x.to_mkldnn(), self.weight, self.bias)
                return product.to_dense()
        # As rows: of more dimensions DeepSpeed's own, at stage 3, rounds the product and the sum with the bias apart.
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.ndim > 2 else super().forward(x)


class Conv2d(nn.Conv2d):
    """torch's layer, with zeros around the image, neither dilated nor grouped."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        if x.is_cpu and not HAS_BF16 and _is_bf16(x, self.weight):
            assert x.ndim == 4, x.shape
            convolved: Tensor = _Conv2dInFp32.apply(
                *_to_bf16(x, self.weight, self.bias), list(self.stride), list(self.padding)
            )
            return convolved
        if self.kernel_size == (1, 1) and x.is_cpu and _is_for_onednn(x, self.weight):
            # Of one pixel, which dilation leaves as it is. Without it torch, in one thread, multiplies by MKL.
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, dilation=2)
        return super().forward(x)


class AttentionInBf16(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V of bf16 [N, heads, L or M, D], where bool [1 or N, 1, 1 or L, M] says what is seen.

    In about half of the time that torch's kernel takes on a processor, with errors of at most 1.5 times that kernel's:
    scores are fp32 until their softmax, all other products bf16. It keeps the weights, bf16 [N, heads, L, M].
    """

    @staticmethod
    def forward(ctx: "_Context", query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        """[N, heads, L, D]."""
        with torch.autocast("cpu", enabled=False):
            scores = (query.float() @ key.float().transpose(2, 3)).mul_(query.shape[3] ** -0.5)
            if seen is not None:
                scores.masked_fill_(~seen, -torch.inf)
            weights = scores.softmax(dim=3).bfloat16()
            ctx.save_for_backward(query, key, value, weights)
            return weights @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: "_Context", grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of queries, keys and values."""
        query, key, value, weights = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            for_scores = torch._softmax_backward_data(grad @ value.transpose(2, 3), weights, 3, torch.bfloat16)
            for_query, for_key = _scaled(for_scores, key), _scaled(for_scores.transpose(2, 3), query)
            return for_query, for_key, weights.transpose(2, 3) @ grad, None


def _scaled(one: Tensor, other: Tensor) -> Tensor:
    """The product of [N, heads, L, M] and [N, heads, M, D], divided by sqrt(D) before it is rounded."""
    nothing = other.new_empty(()).expand(1, 1, 1)
    product = torch.baddbmm(nothing, one.flatten(0, 1), other.flatten(0, 1), beta=0, alpha=other.shape[3] ** -0.5)
    return product.unflatten(0, one.shape[:2])


def _is_bf16(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype != torch.float64  # which it leaves alone
    return x.dtype == weight.dtype == torch.bfloat16


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    is_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return IS_ONEDNN_FASTER and is_fp32 and not torch.compiler.is_compiling()


def _to_bf16(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.bfloat16() for tensor in tensors]


class _Context(Protocol):
    """What `torch.autograd.Function` keeps from a forward to its backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    stride: list[int]
    padding: list[int]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _LinearInFp32(torch.autograd.Function):
    """[M, C_in], [C_out, C_in], [C_out] or None, all bf16 -> bf16 [M, C_out]; what it keeps is bf16."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            product = x.float() @ weight.float().t()
            return (product if bias is None else product.add_(bias)).bfloat16()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            exact = grad.float()
            return (
                (exact @ weight.float()).bfloat16() if for_x else None,
                (exact.t() @ x.float()).bfloat16() if for_weight else None,
                exact.sum(dim=0).bfloat16() if for_bias else None,
            )


class _Conv2dInFp32(torch.autograd.Function):
    """[N, C_in, H, W], [C_out, C_in, k, k], [C_out] or None, all bf16 -> bf16; what it keeps is bf16."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        with torch.autocast("cpu", enabled=False):
            exact = None if bias is None else bias.float()
            return F.conv2d(x.float(), weight.float(), exact, stride, padding).bfloat16()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            found = torch.ops.aten.convolution_backward(
                grad.float(), x.float(), weight.float(), [len(weight)], ctx.stride, ctx.padding, [1, 1], False, [0, 0],
                1, ctx.needs_input_grad[:3],
            )  # fmt: skip
            return *_to_bf16(*found), None, None


# What torch does not know of yet, and a run's count of FLOPs needs.
@register_flop_formula(torch.ops.aten.mkldnn_linear)
def _flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.aten.mkldnn_linear_backward)
def _flops_of_backward(x: list[int], _: list[int], weight: list[int], wanted: list[bool], **__: Any) -> int:
    return (wanted[0] + wanted[1]) * 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _flops_of_attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _flops_of_attention_backward(
    grad: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
