"""StyleGAN2's discriminator (Karras 2020, "Analyzing and improving the image quality of StyleGAN", App. B)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.blocks import at_least_fp32

_FILTER = (1.0, 3.0, 3.0, 1.0)  # a low pass, along each side, before every second pixel is dropped
_LAST_SIDE = 4
_MAX_WIDTH = 1 << 14


@dataclass
class StyleGAN2DiscriminatorConfig:
    """Sizes."""

    channel_base: int = 16384  # width times side of the image, at every resolution; 32768 in the largest models
    channel_max: int = 512
    minibatch_std_group: int = 4  # samples whose spread is a feature of each; 0: none

    def width(self, side: int) -> int:
        """Of features of this side."""
        return max(min(self.channel_base // side, self.channel_max), 1)

    def problem(self, image_size: int) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        for key in ("channel_base", "channel_max"):
            value = getattr(self, key)
            if not 1 <= value <= _MAX_WIDTH * _LAST_SIDE:
                return f"{key}: {value}; must be from 1 to {_MAX_WIDTH * _LAST_SIDE}"
        if self.minibatch_std_group < 0:
            return f"minibatch_std_group: {self.minibatch_std_group}; must be at least 0"
        if image_size < 2 * _LAST_SIDE or image_size & (image_size - 1):
            return f"name: 'stylegan2'; judges images whose sides are powers of 2 from 8 on, not {image_size}"
        return None


class EqualizedConv2d(nn.Module):
    """A convolution whose weights are scaled where they are used, so that all learn alike (Karras 2018, Sec. 4.1).

    `down` halves height and width, after a low pass; `activated` adds a leaky ReLU with gain sqrt(2).
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
        weight = self.weight * self.scale
        if self.down:
            x = low_pass(x, self.padding)
            x = F.conv2d(x, weight, stride=2)
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        return x * gain if self.bias is None else _activate(x, self.bias[:, None, None], gain)


class EqualizedLinear(nn.Module):
    """A linear layer scaled alike; `activated` as above."""

    def __init__(self, in_channels: int, out_channels: int, *, activated: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale, self.activated = 1.0 / math.sqrt(in_channels), activated

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in] -> [N, C_out]."""
        x = F.linear(x, self.weight * self.scale)
        return _activate(x, self.bias, 1.0) if self.activated else x + self.bias


class DiscriminatorBlock(nn.Module):
    """Two convolutions that halve the sides, and a shortcut, so weighted that the variance stays."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, down=True)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, down=True, activated=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / 2, W / 2]."""
        return self.skip(x, math.sqrt(0.5)) + self.conv2(self.conv1(x), math.sqrt(0.5))


BLOCKS = (DiscriminatorBlock,)  # what families list as `blocks`


class StyleGAN2Discriminator(nn.Module):
    """Images to one logit each."""

    def __init__(self, config: StyleGAN2DiscriminatorConfig, image_size: int, image_channels: int) -> None:
        super().__init__()
        self.group = config.minibatch_std_group
        self.pixels = EqualizedConv2d(image_channels, config.width(image_size), 1)
        sides = [image_size >> i for i in range(image_size.bit_length() - _LAST_SIDE.bit_length())]
        self.blocks = nn.Sequential(
            *(DiscriminatorBlock(config.width(side), config.width(side // 2)) for side in sides)
        )
        width = config.width(_LAST_SIDE)
        self.conv = EqualizedConv2d(width + bool(self.group), width, 3)
        self.hidden = EqualizedLinear(width * _LAST_SIDE**2, width, activated=True)
        self.out = EqualizedLinear(width, 1)

    def forward(self, image: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> logits [N, 1]."""
        x = self.blocks(self.pixels(image))
        if self.group:
            x = torch.cat([x, minibatch_std(x, self.group)], dim=1)
        return self.out(self.hidden(self.conv(x).flatten(1)))


def low_pass(x: Tensor, padding: int) -> Tensor:
    """Blur each channel before every second pixel of a convolution is dropped (Zhang 2019, Sec. 3.2).

    Args:
        x: [N, C, H, W].
        padding: of the convolution that follows, with stride 2 and a kernel of 2 * padding + 1.

    Returns:
        [N, C, H', W'], such that the convolution gives half of H and W.
    """
    taps = torch.tensor(_FILTER, device=x.device, dtype=x.dtype)
    kernel = torch.outer(taps, taps) / taps.sum().square()
    channels = x.shape[1]
    # As many zeros as keep features in their place: the filter has 4 taps, the kernel 2 * padding + 1.
    before, after = padding + 1, padding + 1
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x, kernel.expand(channels, 1, 4, 4), groups=channels)


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """The mean standard deviation of features over groups of samples, as one more channel (Karras 2018, Sec. 3).

    Args:
        x: [N, C, H, W].
        group: samples that are compared; the whole batch where it is smaller, or does not divide.

    Returns:
        [N, 1, H, W]. Sample i is compared with those whose index has the same remainder by N / group.
    """
    count, _, height, width = x.shape
    size = group if count % group == 0 else count
    groups = at_least_fp32(x).view(size, count // size, -1)
    spread = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=1)  # [N / group]
    return spread.repeat(size)[:, None, None, None].expand(-1, -1, height, width).to(x.dtype)


def _activate(x: Tensor, bias: Tensor, gain: float) -> Tensor:
    """Leaky ReLU of slope 0.2 with a gain that keeps the variance."""
    return F.leaky_relu(x + bias, 0.2) * (math.sqrt(2.0) * gain)
