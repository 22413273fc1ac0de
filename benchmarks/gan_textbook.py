"""StyleGAN2 as it is written down: a kernel for each sample in a grouped convolution, on the parameters of ours."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist.families.stylegan2 import StyleGAN2
from gmdist.nets.equalized import EqualizedConv2d, EqualizedLinear
from gmdist.nets.stylegan2_discriminator import StyleGAN2Discriminator, minibatch_std
from gmdist.nets.stylegan2_generator import StyledConv2d, SynthesisNetwork, ToPixels
from gmdist.nets.stylegan2_mapping import MappingNetwork, normalized


def rewrite(family: StyleGAN2) -> None:
    """Let its networks, of the default architectures and without classes, compute so."""
    assert family.generator.synthesis.architecture == "skip"
    family.generator.mapping.forward = functools.partial(mapping, family.generator.mapping)
    family.generator.synthesis.forward = functools.partial(synthesis, family.generator.synthesis)
    family.discriminator.forward = functools.partial(discriminator, family.discriminator)


def mapping(network: MappingNetwork, latent: Tensor, label: None = None) -> Tensor:
    """Latents [N, Z] -> styles [N, W]."""
    x = normalized(latent)
    for layer in network.layers:
        x = linear(layer, x)
    return x


def synthesis(network: SynthesisNetwork, styles: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Styles [N, L, W] and noise -> images [N, C, H, W]."""
    style = styles.unbind(1)
    x = styled(network.conv, network.constant.expand(len(styles), -1, -1, -1), style[0], noise[0])
    image = pixels(network.pixels[0], x, style[1])
    for i, block in enumerate(network.blocks, 1):
        x = styled(block.conv1, x, style[2 * i - 1], noise[2 * i - 1])
        x = styled(block.conv2, x, style[2 * i], noise[2 * i])
        image = filtered(image, up=2, padding=(2, 1)) + pixels(network.pixels[i], x, style[2 * i + 1])
    return image


def discriminator(network: StyleGAN2Discriminator, image: Tensor, label: None = None) -> Tensor:
    """Images [N, C, H, W] -> logits [N, 1]."""
    x = convolved(network.pixels[0], image)
    for block in network.blocks:
        y = convolved(block.conv2, filtered(convolved(block.conv1, x), padding=(2, 2)), stride=2, padding=0)
        x = (y + convolved(block.skip, filtered(x, down=2, padding=(1, 1)))) * math.sqrt(0.5)
    x = torch.cat([x, minibatch_std(x, network.group)], dim=1)
    return linear(network.out, linear(network.hidden, convolved(network.conv, x).flatten(1)))


def styled(layer: StyledConv2d, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
    """Modulation and demodulation of kernels (Karras 2020, Eq. 1 and 3), noise, bias, leaky ReLU."""
    x = of_samples(x, kernels(layer, style, demodulated=True), up=layer.up)
    x = x + noise * layer.noise_strength + layer.bias[:, None, None]
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0)


def pixels(layer: ToPixels, x: Tensor, style: Tensor) -> Tensor:
    """Modulation alone."""
    return of_samples(x, kernels(layer, style, demodulated=False), up=False) + layer.bias[:, None, None]


def kernels(layer: StyledConv2d | ToPixels, style: Tensor, *, demodulated: bool) -> Tensor:
    """[N, C_out, C_in, k, k]."""
    weight = layer.weight * linear(layer.affine, style)[:, None, :, None, None]
    if isinstance(layer, ToPixels):
        weight = weight * layer.scale
    if demodulated:
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    return weight


def of_samples(x: Tensor, weight: Tensor, *, up: bool) -> Tensor:
    """Each sample with its own kernel: one convolution with a group for each."""
    count, num_out, num_in, size, _ = weight.shape
    x = x.reshape(1, -1, *x.shape[2:])
    if up:
        weight = weight.transpose(1, 2).reshape(-1, num_out, size, size)
        x = F.conv_transpose2d(x, weight, stride=2, groups=count)
    else:
        x = F.conv2d(x, weight.view(-1, num_in, size, size), padding=size // 2, groups=count)
    x = x.view(count, num_out, *x.shape[2:])
    return filtered(x, padding=(1, 1), gain=4.0) if up else x


def convolved(layer: EqualizedConv2d, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    """A convolution, and bias and leaky ReLU where it has them."""
    x = F.conv2d(x, layer.weight * layer.scale, stride=stride, padding=layer.padding if padding is None else padding)
    return x if layer.bias is None else F.leaky_relu(x + layer.bias[:, None, None], 0.2) * math.sqrt(2.0)


def linear(layer: EqualizedLinear, x: Tensor) -> Tensor:
    """A product, and a leaky ReLU where it has one."""
    x = F.linear(x, layer.weight * layer.scale, layer.bias * layer.bias_scale)
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0) if layer.activated else x


def filtered(x: Tensor, padding: tuple[int, int], up: int = 1, down: int = 1, gain: float = 1.0) -> Tensor:
    """Zeros between pixels, zeros around, a depthwise 4x4 low pass with a gain, every `down`-th pixel."""
    if up > 1:
        count, channels, height, width = x.shape
        x = F.pad(x.view(count, channels, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
        x = x.view(count, channels, height * up, width * up)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8.0
    kernel = (torch.outer(taps, taps) * (gain * up**2)).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, 2 * padding), kernel, stride=down, groups=x.shape[1])
