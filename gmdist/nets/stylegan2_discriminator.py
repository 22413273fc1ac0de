"""StyleGAN2's discriminator (Karras 2020, "Analyzing and improving the image quality of StyleGAN", App. B)."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least, between, one_of
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.equalized import EqualizedConv2d, EqualizedLinear, whole_precision
from gmdist.nets.resample import downsample
from gmdist.nets.stylegan2_mapping import MappingNetwork
from gmdist.nets.stylegan2_sizes import ARCHITECTURES, MAX_CHANNELS, ChannelsBySide

LAST_SIDE = 4  # of features at most, before they are one vector; of images whose sides are powers of 2 always


@dataclass
class StyleGAN2DiscriminatorConfig(ChannelsBySide):
    """Sizes."""

    channel_base: int = 16384  # width times side of the image, at every resolution; 32768 in the largest models
    channel_max: int = 512
    minibatch_std_group: int = 4  # samples whose spread is a feature of each; 0: none
    # resnet: shortcuts around blocks; skip: the image at each side comes in; orig: neither
    architecture: str = "resnet"
    mapping_layers: int = 8  # of the network that reads classes
    num_bf16_sides: int = 4  # largest sides whose blocks autocast reaches; the others stay in fp32

    def problem(self, image_size: int) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        problem = (
            between(1, MAX_CHANNELS, channel_base=self.channel_base, channel_max=self.channel_max)
            or at_least(0, minibatch_std_group=self.minibatch_std_group, num_bf16_sides=self.num_bf16_sides)
            or at_least(0, mapping_layers=self.mapping_layers)
            or one_of(ARCHITECTURES, architecture=self.architecture)
        )
        if problem:
            return problem
        if image_size < 2 * LAST_SIDE:
            return f"channel_base: judges images whose sides are at least {2 * LAST_SIDE} pixels, not {image_size}"
        return None


class DiscriminatorBlock(nn.Module):
    """Two convolutions that halve the sides; a shortcut, so weighted that the variance stays."""

    def __init__(self, in_channels: int, out_channels: int, *, shortcut: bool = True, in_fp32: bool = False) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, down=True)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, down=True, activated=False) if shortcut else None
        self.in_fp32 = in_fp32

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / 2, W / 2], rounded up."""
        with whole_precision(x, self.in_fp32):
            x = _padded(at_least_fp32(x) if self.in_fp32 else x)
            if self.skip is None:
                return self.conv2(self.conv1(x))
            return self.skip(x, math.sqrt(0.5)) + self.conv2(self.conv1(x), math.sqrt(0.5))


BLOCKS = (DiscriminatorBlock,)  # what families list as `blocks`


class StyleGAN2Discriminator(nn.Module):
    """Images, and their classes where there are some, to one logit each."""

    def __init__(
        self, config: StyleGAN2DiscriminatorConfig, image_size: int, image_channels: int, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.group, self.num_bf16_sides = config.minibatch_std_group, config.num_bf16_sides
        sides = [image_size]
        while sides[-1] > LAST_SIDE:
            sides.append((sides[-1] + 1) // 2)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(
                config.width(side),
                config.width(half),
                shortcut=config.architecture == "resnet",
                in_fp32=i >= config.num_bf16_sides,
            )
            for i, (side, half) in enumerate(pairwise(sides))
        )
        taken_in = sides if config.architecture == "skip" else sides[:1]
        self.pixels = nn.ModuleList(EqualizedConv2d(image_channels, config.width(side), 1) for side in taken_in)
        width = config.width(sides[-1])
        self.conv = EqualizedConv2d(width + bool(self.group), width, 3)
        self.hidden = EqualizedLinear(width * sides[-1] ** 2, width, activated=True)
        self.out = EqualizedLinear(width, width if num_classes else 1)
        self.mapping = MappingNetwork(0, num_classes, width, config.mapping_layers) if num_classes else None

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """[N, C, H, W] in [-1, 1], int64 [N] -> logits [N, 1], at least fp32."""
        x = self._taken_in(image, 0)
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i < len(self.pixels):
                image = downsample(_padded(image))
                x = x + self._taken_in(image, i)
        with whole_precision(x, wanted=True):
            x = at_least_fp32(x)
            if self.group:
                x = torch.cat([x, minibatch_std(x, self.group)], dim=1)
            x = self.out(self.hidden(self.conv(x).flatten(1)))
            if self.mapping is None:
                return x
            assert label is not None
            # Projection on what the class is mapped to (Miyato 2018, Eq. 5).
            return (x * self.mapping(None, label)).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])

    def _taken_in(self, image: Tensor, i: int) -> Tensor:
        """Features of the image at its i-th side."""
        with whole_precision(image, i >= self.num_bf16_sides):
            return self.pixels[i](image)


def _padded(x: Tensor) -> Tensor:
    """[N, C, H, W] -> the same with zeros below and right of odd sides, so that every side has a half."""
    height, width = x.shape[2:]
    return F.pad(x, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """The mean standard deviation of features over groups of samples, as one more channel (Karras 2018, Sec. 3).

    Args:
        x: [N, C, H, W].
        group: samples that are compared; the whole batch where it is smaller, or does not divide.

    Returns:
        [N, 1, H, W]. Sample i is compared with those whose index has the same remainder by N / group: as workers own
        every so many-th sample, these are the same however many workers share a batch.
    """
    count, _, height, width = x.shape
    size = group if count % group == 0 else count
    groups = at_least_fp32(x).reshape(size, count // size, -1)
    spread = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=1)  # [N / group]
    return spread.repeat(size)[:, None, None, None].expand(-1, -1, height, width).to(x.dtype)
