"""StyleGAN2's generator: counts, modulation beside a kernel for each sample, the variance of what it makes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist.nets.resample import low_pass
from gmdist.nets.stylegan2_generator import (
    StyledConv2d,
    StyleGAN2Generator,
    StyleGAN2GeneratorConfig,
    ToPixels,
    demodulation,
)
from gmdist.nets.stylegan2_mapping import MappingNetwork
from gmdist.nets.stylegan2_sizes import ARCHITECTURES

SMALL = StyleGAN2GeneratorConfig(16, 16, 2, 256, 32)


@pytest.mark.parametrize(
    ("image_size", "channel_base", "published"),
    # github.com/NVlabs/stylegan2-ada-pytorch: paper256, paper512, paper1024
    [(256, 16384, 24_767_458), (512, 32768, 30_276_583), (1024, 32768, 30_370_060)],
)
def test_as_many_parameters_as_published(image_size: int, channel_base: int, published: int) -> None:
    with torch.device("meta"):
        network = StyleGAN2Generator(StyleGAN2GeneratorConfig(channel_base=channel_base), image_size, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == published


@pytest.mark.parametrize(("num_layers", "published"), [(8, 2_101_248), (2, 525_312)])
def test_mapping_parameters(num_layers: int, published: int) -> None:
    assert sum(p.numel() for p in MappingNetwork(512, 0, 512, num_layers).parameters()) == published


def kernels(layer: StyledConv2d | ToPixels, style: Tensor, *, demodulated: bool) -> Tensor:
    """A kernel for each sample (Karras 2020, Eq. 1 and 3): [N, C_out, C_in, k, k]."""
    weight = layer.weight * layer.affine(style)[:, None, :, None, None]
    if isinstance(layer, ToPixels):
        weight = weight * layer.scale
    if demodulated:
        weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    return weight


@pytest.mark.parametrize("up", [False, True])
def test_a_styled_convolution_is_one_with_a_kernel_for_each_sample(up: bool) -> None:
    torch.manual_seed(0)
    layer = StyledConv2d(4, 6, 5, 16 if up else 8, up=up).double()
    with torch.no_grad():
        layer.noise_strength.fill_(0.3)
        layer.bias.normal_()
    x, style = torch.randn(3, 4, 8, 8).double(), torch.randn(3, 5).double()
    noise = torch.randn(3, 1, *[16 if up else 8] * 2).double()
    parts = []
    for sample, kernel in zip(x, kernels(layer, style, demodulated=True), strict=True):
        if up:
            parts.append(low_pass(F.conv_transpose2d(sample[None], kernel.transpose(0, 1), stride=2), 1, 4.0))
        else:
            parts.append(F.conv2d(sample[None], kernel, padding=1))
    wanted = torch.cat(parts) + 0.3 * noise + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, style, noise), math.sqrt(2.0) * F.leaky_relu(wanted, 0.2))
    stored = torch.cat(parts) + 0.3 * layer.noise + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, style, None), math.sqrt(2.0) * F.leaky_relu(stored, 0.2))


def test_pixels_are_not_demodulated() -> None:
    torch.manual_seed(0)
    layer = ToPixels(4, 3, 5).double()
    x, style = torch.randn(3, 4, 8, 8).double(), torch.randn(3, 5).double()
    wanted = [F.conv2d(s[None], k) for s, k in zip(x, kernels(layer, style, demodulated=False), strict=True)]
    torch.testing.assert_close(layer(x, style), torch.cat(wanted))


def test_demodulated_features_have_unit_variance() -> None:
    torch.manual_seed(0)
    weight, style = torch.randn(64, 32, 3, 3), torch.randn(8, 32).exp()
    x = torch.randn(8, 32, 40, 40) * style[:, :, None, None]
    out = F.conv2d(x, weight) * demodulation(weight, style)[:, :, None, None]
    torch.testing.assert_close(out.var(dim=(2, 3)).mean(dim=1), torch.ones(8), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_style_and_every_noise_reaches_the_image(architecture: str) -> None:
    torch.manual_seed(0)
    config = StyleGAN2GeneratorConfig(16, 16, 2, 256, 32, architecture)
    network = StyleGAN2Generator(config, 32, 3).synthesis
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
    styles = torch.randn(2, network.num_styles, 16, requires_grad=True)
    noise = [torch.randn(2, 1, side, side, requires_grad=True) for side in network.noise_sides]
    image = network(styles, noise)
    assert image.shape == (2, 3, 32, 32)
    gradients = torch.autograd.grad(image.square().mean(), [styles, *noise])
    assert all(gradient.abs().sum() > 0.0 for gradient in [*gradients[0].unbind(1), *gradients[1:]])


def test_classes_reach_the_style() -> None:
    torch.manual_seed(0)
    network = MappingNetwork(16, 3, 16, 2)
    latent = torch.randn(1, 16).expand(3, -1)
    styles = network(latent, torch.arange(3))
    assert torch.pdist(styles).min() > 0.1
    torch.testing.assert_close(network(10.0 * latent, torch.arange(3)), styles)  # a latent's length says nothing


def test_small_sides_stay_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    config = StyleGAN2GeneratorConfig(16, 16, 2, 256, 32, num_bf16_sides=1)
    network = StyleGAN2Generator(config, 32, 3).synthesis
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        image = network(torch.randn(2, network.num_styles, 16))
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert image.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "image_size", "problem"),
    [
        (StyleGAN2GeneratorConfig(), 48, "channel_base: makes images whose sides are powers of 2 from 8 on, not 48"),
        (StyleGAN2GeneratorConfig(latent_channels=0), 32, "latent_channels: 0"),
        (StyleGAN2GeneratorConfig(channel_base=65537), 32, "channel_base: 65537; must be from 1 to 65536"),
        (StyleGAN2GeneratorConfig(mapping_layers=0), 32, "mapping_layers: 0"),
        (
            StyleGAN2GeneratorConfig(architecture="dense"),
            32,
            "architecture: 'dense'; must be one of orig, skip, resnet",
        ),
        (StyleGAN2GeneratorConfig(num_bf16_sides=-1), 32, "num_bf16_sides: -1"),
    ],
)
def test_sizes_that_cannot_be(config: StyleGAN2GeneratorConfig, image_size: int, problem: str) -> None:
    assert (config.problem(image_size) or "").startswith(problem)
    assert StyleGAN2GeneratorConfig().problem(256) is None
