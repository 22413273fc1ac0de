"""StyleGAN2's discriminator: counts, the low pass beside scipy's, the spread of a minibatch by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn

from gmdist.nets.stylegan2 import (
    EqualizedConv2d,
    StyleGAN2Discriminator,
    StyleGAN2DiscriminatorConfig,
    low_pass,
    minibatch_std,
)


@pytest.mark.parametrize(
    ("image_size", "channel_base", "published"),
    # github.com/NVlabs/stylegan2-ada-pytorch: paper256, paper512, paper1024
    [(256, 16384, 24_001_089), (512, 32768, 28_982_849), (1024, 32768, 29_012_513)],
)
def test_as_many_parameters_as_published(image_size: int, channel_base: int, published: int) -> None:
    with torch.device("meta"):
        network = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(channel_base), image_size, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == published


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_halve_after_a_low_pass(size: int) -> None:
    torch.manual_seed(0)
    layer = EqualizedConv2d(2, 3, size, down=True, activated=False).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0
    blurred = upfirdn(taps, upfirdn(taps, x.numpy(), axis=2), axis=3)  # all that the filter touches, 11 x 11
    cut = 1 if size == 3 else 2  # evenly from all sides, so that features keep their places
    torch.testing.assert_close(low_pass(x, size // 2), torch.from_numpy(blurred)[:, :, cut:-cut, cut:-cut])
    wanted = F.conv2d(low_pass(x, size // 2), layer.weight / (2 * size * size) ** 0.5, stride=2)
    torch.testing.assert_close(layer(x), wanted)
    assert layer(x).shape == (1, 3, 4, 4)


def test_the_spread_of_a_group_is_a_feature_of_its_samples() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 2, 2, dtype=torch.float64)
    found = minibatch_std(x, 3)  # samples 0, 2, 4 and 1, 3, 5
    assert found.shape == (6, 1, 2, 2)
    for first in (0, 1):
        wanted = (x[first::2].var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(found[first::2], wanted.expand(3, 1, 2, 2))
    torch.testing.assert_close(minibatch_std(x, 4)[0, 0, 0, 0], (x.var(dim=0, unbiased=False) + 1e-8).sqrt().mean())


def test_the_variance_of_features_stays() -> None:
    # What equalized weights and the gains of the activation and of the shortcut are for.
    torch.manual_seed(0)
    network = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(4096, 128), 32, 3)
    x = network.pixels(torch.randn(64, 3, 1, 1).expand(-1, -1, 32, 32))  # a low pass leaves flat images as they are
    for block in network.blocks:
        x = block(x)
        assert 0.5 < x[:, :, 1:-1, 1:-1].square().mean() < 2.0


@pytest.mark.parametrize(
    ("config", "image_size", "problem"),
    [
        (StyleGAN2DiscriminatorConfig(), 48, "name: 'stylegan2'; judges images whose sides are powers of 2 from 8 on"),
        (StyleGAN2DiscriminatorConfig(), 4, "name: 'stylegan2'"),
        (StyleGAN2DiscriminatorConfig(0), 32, "channel_base: 0"),
        (StyleGAN2DiscriminatorConfig(channel_max=0), 32, "channel_max: 0"),
        (StyleGAN2DiscriminatorConfig(minibatch_std_group=-1), 32, "minibatch_std_group: -1"),
    ],
)
def test_sizes_that_cannot_be(config: StyleGAN2DiscriminatorConfig, image_size: int, problem: str) -> None:
    assert (config.problem(image_size) or "").startswith(problem)
    assert StyleGAN2DiscriminatorConfig().problem(256) is None
