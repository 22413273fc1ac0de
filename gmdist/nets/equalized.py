"""Layers whose weights are scaled where they are used, so that all learn alike (Karras 2018, Sec. 4.1)."""

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.resample import downsample, low_pass

_SLOPE = 0.2
ACTIVATION_GAIN = math.sqrt(2.0)  # keeps the variance


class EqualizedConv2d(nn.Module):
    """A convolution that keeps height and width, or halves them behind a low pass.

    `activated` adds a bias and a leaky ReLU with gain sqrt(2).
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, down: bool = False, activated: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activated else None
        self.scale = 1.0 / math.sqrt(in_channels * size * size)
        self.down, self.padding = down, size // 2

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H, W] or of half the sides, times `gain`."""
        gain *= 1.0 if self.bias is None else ACTIVATION_GAIN
        weight, scale = self.weight.to(x.dtype), self.scale * gain
        bias = None if self.bias is None else self.bias.to(x.dtype) * gain
        # Where there is a low pass, it scales.
        if self.down and self.padding == 0:
            x = F.conv2d(downsample(x, scale), weight, bias)
        elif self.down:
            x = F.conv2d(low_pass(x, self.padding + 1, scale), weight, bias, stride=2)
        else:
            x = F.conv2d(x, weight * scale, bias, padding=self.padding)
        return x if bias is None else activate(x)


class EqualizedLinear(nn.Module):
    """A linear layer; `activated` as above.

    With a `lr_multiplier` it learns as if its learning rate were multiplied by it, and begins no smaller for it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        activated: bool = False,
        lr_multiplier: float = 1.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_channels,), bias))
        self.scale, self.bias_scale = lr_multiplier / math.sqrt(in_channels), lr_multiplier
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in] -> [N, C_out]."""
        gain = ACTIVATION_GAIN if self.activated else 1.0
        x = F.linear(x * (self.scale * gain), self.weight.to(x.dtype), self.bias.to(x.dtype) * (self.bias_scale * gain))
        return activate(x) if self.activated else x


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, in place: x comes out of a layer that has no use for it.

    Its gain of ACTIVATION_GAIN is in that layer's weights and bias, of which there are fewer than features: the
    function commutes with factors above 0.
    """
    return F.leaky_relu(x, _SLOPE, inplace=True)


def whole_precision(x: Tensor, wanted: bool) -> AbstractContextManager[None]:
    """Where `wanted`, no autocast: what is fp32 stays fp32."""
    kind = x.device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind) and not wanted)
