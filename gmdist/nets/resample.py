"""Images to half and twice their sides behind a low pass, in operations that differentiate as often as one likes.

They compute in the precision of what they get, autocast or not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_TAPS = 4  # of 1, 3, 3, 1 along each side (Karras 2019, Sec. 2): close to bilinear interpolation, without its offset


def upsample(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2 H, 2 W]: zeros between all pixels, then the low pass with a gain of 4."""
    return _Upsampled.apply(x, 4.0)


def downsample(x: Tensor, gain: float = 1.0) -> Tensor:
    """[N, C, H, W] -> [N, C, H / 2, W / 2]: the low pass with a gain, then every second pixel."""
    return _Downsampled.apply(x, gain)


def low_pass(x: Tensor, padding: int, gain: float = 1.0) -> Tensor:
    """Blur each channel.

    Args:
        x: [N, C, H, W].
        padding: zeros around, at most 3.
        gain: that the result is multiplied by.

    Returns:
        [N, C, H + 2 padding - 3, W + 2 padding - 3].
    """
    return _LowPassed.apply(x, padding, gain)


# The derivative of each is one of the three, as the taps are symmetric. torch would make it with the kernel's own, and
# that of a derivative channel by channel.
class _LowPassed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int, gain: float) -> Tensor:
        ctx.padding, ctx.gain = padding, gain
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, _kernel(x, gain), padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _LowPassed.apply(gradient, _TAPS - 1 - ctx.padding, ctx.gain), None, None


class _Upsampled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        with torch.autocast(x.device.type, enabled=False):
            return F.conv_transpose2d(x, _kernel(x, gain), stride=2, padding=1, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Downsampled.apply(gradient, ctx.gain), None


class _Downsampled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, _kernel(x, gain), stride=2, padding=1, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Upsampled.apply(gradient, ctx.gain), None


def _kernel(x: Tensor, gain: float) -> Tensor:
    """The low pass of each channel, [C, 1, 4, 4], filled where x is: a GPU would wait for a copy from the host."""
    taps = x.new_full((_TAPS,), 3.0)
    taps[:: _TAPS - 1] = 1.0
    return (torch.outer(taps, taps) * (gain / 64.0)).expand(x.shape[1], 1, -1, -1)
