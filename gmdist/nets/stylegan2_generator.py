"""StyleGAN2's generator (Karras 2020, "Analyzing and improving the image quality of StyleGAN")."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least, between, one_of
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.equalized import ACTIVATION_GAIN, EqualizedConv2d, EqualizedLinear, activate, whole_precision
from gmdist.nets.resample import low_pass, upsample
from gmdist.nets.stylegan2_mapping import MappingNetwork
from gmdist.nets.stylegan2_sizes import ARCHITECTURES, MAX_CHANNELS, ChannelsBySide

FIRST_SIDE = 4


@dataclass
class StyleGAN2GeneratorConfig(ChannelsBySide):
    """Sizes."""

    latent_channels: int = 512  # standard normal numbers that an image is made from
    style_channels: int = 512  # of what the mapping makes of them
    mapping_layers: int = 8  # between the two
    channel_base: int = 16384  # width times side of the image, at every resolution; 32768 in the largest models
    channel_max: int = 512
    # skip: an image at each side, which the next adds to; resnet: shortcuts around blocks; orig: neither
    architecture: str = "skip"
    num_bf16_sides: int = 4  # largest sides whose blocks autocast reaches; the others stay in fp32

    def problem(self, image_size: int) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        problem = (
            between(1, MAX_CHANNELS, latent_channels=self.latent_channels, style_channels=self.style_channels)
            or between(1, MAX_CHANNELS, channel_base=self.channel_base, channel_max=self.channel_max)
            or at_least(1, mapping_layers=self.mapping_layers)
            or at_least(0, num_bf16_sides=self.num_bf16_sides)
            or one_of(ARCHITECTURES, architecture=self.architecture)
        )
        if problem:
            return problem
        if image_size < 2 * FIRST_SIDE or image_size & (image_size - 1):
            return f"channel_base: makes images whose sides are powers of 2 from 8 on, not {image_size}"
        return None


class StyledConv2d(nn.Module):
    """A convolution whose input channels a style scales; then noise and a leaky ReLU. `up` doubles the sides.

    Demodulation leaves nothing of a scale of the weights: they need no equalized one.
    """

    noise: Tensor

    def __init__(self, in_channels: int, out_channels: int, style_channels: int, side: int, *, up: bool) -> None:
        super().__init__()
        self.affine = EqualizedLinear(style_channels, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.register_buffer("noise", torch.randn(side, side))  # where none is given
        self.up = up

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        """Features [N, C_in, H, W], styles [N, W], noise [N, 1, H, W] of the output's sides -> [N, C_out, H, W]."""
        style = self.affine(style)
        # Features are scaled before and after the convolution instead of a kernel for each sample: it is the same sum.
        x = _modulated(x, style)
        weight = self.weight.to(x.dtype)
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = low_pass(x, 1, gain=4.0)
        else:
            x = F.conv2d(x, weight, padding=1)
        # The activation's gain is in what comes before it.
        factor = demodulation(self.weight, style) * ACTIVATION_GAIN
        noise = (self.noise if noise is None else noise) * (self.noise_strength * ACTIVATION_GAIN)
        x = torch.addcmul(noise.to(x.dtype), x, factor.to(x.dtype)[:, :, None, None])
        return activate(x.add_(self.bias.to(x.dtype)[:, None, None] * ACTIVATION_GAIN))


class ToPixels(nn.Module):
    """A 1x1 convolution whose input channels a style scales, without demodulation: images of features."""

    def __init__(self, in_channels: int, image_channels: int, style_channels: int) -> None:
        super().__init__()
        self.affine = EqualizedLinear(style_channels, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(image_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(image_channels))
        self.scale = 1.0 / math.sqrt(in_channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """[N, C, H, W], [N, W] -> images [N, C, H, W], at least fp32."""
        x = _modulated(x, self.affine(style) * self.scale)
        return at_least_fp32(F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))


class SynthesisBlock(nn.Module):
    """Features of twice the sides: two styled convolutions, and a shortcut around them where there is one."""

    def __init__(
        self, in_channels: int, out_channels: int, style_channels: int, side: int, *, shortcut: bool, in_fp32: bool
    ) -> None:
        super().__init__()
        self.conv1 = StyledConv2d(in_channels, out_channels, style_channels, side, up=True)
        self.conv2 = StyledConv2d(out_channels, out_channels, style_channels, side, up=False)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, activated=False) if shortcut else None
        self.in_fp32 = in_fp32

    def forward(self, x: Tensor, styles: Sequence[Tensor], noise: Sequence[Tensor | None]) -> Tensor:
        """[N, C_in, H / 2, W / 2], two of [N, W], two of [N, 1, H, W] -> [N, C_out, H, W]."""
        with whole_precision(x, self.in_fp32):
            x = at_least_fp32(x) if self.in_fp32 else x
            y = self.conv2(self.conv1(x, styles[0], noise[0]), styles[1], noise[1])
            if self.skip is None:
                return y
            return (y + upsample(self.skip(x))) * math.sqrt(0.5)


BLOCKS = (SynthesisBlock,)  # what families list as `blocks`


class SynthesisNetwork(nn.Module):
    """Styles to images."""

    def __init__(self, config: StyleGAN2GeneratorConfig, image_size: int, image_channels: int) -> None:
        super().__init__()
        self.architecture = config.architecture
        self.sides = [FIRST_SIDE << i for i in range(image_size.bit_length() - FIRST_SIDE.bit_length() + 1)]
        width, style = config.width(FIRST_SIDE), config.style_channels
        self.constant = nn.Parameter(torch.randn(width, FIRST_SIDE, FIRST_SIDE))
        self.conv = StyledConv2d(width, width, style, FIRST_SIDE, up=False)
        num_fp32 = len(self.sides) - config.num_bf16_sides
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                config.width(side // 2),
                config.width(side),
                style,
                side,
                shortcut=config.architecture == "resnet",
                in_fp32=i < num_fp32,
            )
            for i, side in enumerate(self.sides[1:], 1)
        )
        shown = self.sides if config.architecture == "skip" else self.sides[-1:]
        self.pixels = nn.ModuleList(ToPixels(config.width(side), image_channels, style) for side in shown)
        self.num_fp32 = num_fp32

    @property
    def num_styles(self) -> int:
        """How many layers take a style of their own; those that make pixels take the next block's first."""
        return 2 * len(self.sides)

    @property
    def noise_sides(self) -> list[int]:
        """The sides of the noise of each layer that takes some."""
        return [self.sides[0], *(side for side in self.sides[1:] for _ in range(2))]

    def forward(self, styles: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Make images.

        Args:
            styles: [N, num_styles, W].
            noise: [N, 1, H, W] for each of `noise_sides`; None: that which comes with the network.

        Returns:
            [N, C, H, W], around [-1, 1] and unbounded, fp32.
        """
        at: Sequence[Tensor | None] = [None] * len(self.noise_sides) if noise is None else noise
        style = styles.unbind(1)
        with whole_precision(styles, self.num_fp32 > 0):
            x = self.conv(self.constant.expand(len(styles), -1, -1, -1), style[0], at[0])
        image = self._shown(x, style[1], 0, None)
        for i, block in enumerate(self.blocks, 1):
            x = block(x, style[2 * i - 1 : 2 * i + 1], at[2 * i - 1 : 2 * i + 1])
            image = self._shown(x, style[2 * i + 1], i, image)
        assert image is not None
        return image

    def _shown(self, x: Tensor, style: Tensor, i: int, below: Tensor | None) -> Tensor | None:
        """The image of the i-th side, on top of the one below; None where no image is made yet."""
        if self.architecture != "skip" and i < len(self.blocks):
            return None
        with whole_precision(x, i < self.num_fp32):
            image = self.pixels[i if self.architecture == "skip" else 0](x, style)
        with whole_precision(x, wanted=True):
            return image if below is None else image + upsample(below)


class StyleGAN2Generator(nn.Module):
    """Latents, and classes where there are some, to styles to images."""

    mean_style: Tensor

    def __init__(
        self, config: StyleGAN2GeneratorConfig, image_size: int, image_channels: int, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.mapping = MappingNetwork(config.latent_channels, num_classes, config.style_channels, config.mapping_layers)
        self.synthesis = SynthesisNetwork(config, image_size, image_channels)
        self.register_buffer("mean_style", torch.zeros(config.style_channels))  # that truncation is towards

    def forward(self, latent: Tensor, label: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """[N, Z], int64 [N] -> images [N, C, H, W], with one style for all layers."""
        style = self.mapping(latent, label)
        return self.synthesis(style[:, None].expand(-1, self.synthesis.num_styles, -1), noise)


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """What gives features unit variance again, if those that come in have it (Karras 2020, Eq. 3).

    Args:
        weight: [C_out, C_in, k, k].
        style: [N, C_in].

    Returns:
        [N, C_out], fp32.
    """
    with whole_precision(style, wanted=True):
        squares = at_least_fp32(weight).square().sum(dim=(2, 3))
        return (F.linear(at_least_fp32(style).square(), squares) + 1e-8).rsqrt()


def _modulated(x: Tensor, style: Tensor) -> Tensor:
    """[N, C, H, W] times [N, C]."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x * style.to(x.dtype)[:, :, None, None]
