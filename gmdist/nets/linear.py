"""Linear layers of transformers, by the faster of a processor's two libraries."""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_FEWEST_ROWS = 64  # below, changing the layout costs as much as the product


class Linear(nn.Linear):
    """torch's layer; where oneDNN computes it, it can be differentiated once.

    For products in fp32 torch calls MKL, which leaves AVX-512 alone on processors that are not Intel's. oneDNN, which
    torch calls for convolutions and for bf16, uses it, and takes about half the time there (docs/benchmarks.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        if _is_for_onednn(x, self.weight):
            # Not torch.nn.functional.linear: DeepSpeed puts its own there at stage 3.
            product: Tensor = torch.ops.aten.linear(x.to_mkldnn(), self.weight, self.bias)
            return product.to_dense()
        # As rows: of more dimensions DeepSpeed's own, at stage 3, rounds the product and the sum with the bias apart.
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.ndim > 2 else super().forward(x)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    described = Path("/proc/cpuinfo")
    return described.exists() and "GenuineIntel" not in described.read_text()


# What torch does not know of yet, and a run's count of FLOPs needs.
@register_flop_formula(torch.ops.aten.mkldnn_linear)
def _flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.aten.mkldnn_linear_backward)
def _flops_of_backward(x: list[int], _: list[int], weight: list[int], wanted: list[bool], **__: Any) -> int:
    return (wanted[0] + wanted[1]) * 2 * math.prod(x) * weight[0]
