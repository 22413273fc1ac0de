"""StyleGAN2's discriminator: counts, the spread of a minibatch by hand, classes, the variance of features."""

import pytest
import torch

from gmdist.nets.stylegan2_discriminator import StyleGAN2Discriminator, StyleGAN2DiscriminatorConfig, minibatch_std
from gmdist.nets.stylegan2_sizes import ARCHITECTURES


@pytest.mark.parametrize(
    ("image_size", "channel_base", "published"),
    # github.com/NVlabs/stylegan2-ada-pytorch: paper256, paper512, paper1024
    [(256, 16384, 24_001_089), (512, 32768, 28_982_849), (1024, 32768, 29_012_513)],
)
def test_as_many_parameters_as_published(image_size: int, channel_base: int, published: int) -> None:
    with torch.device("meta"):
        network = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(channel_base), image_size, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == published


def test_the_spread_of_a_group_is_a_feature_of_its_samples() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 2, 2, dtype=torch.float64)
    found = minibatch_std(x, 3)  # samples 0, 2, 4 and 1, 3, 5
    assert found.shape == (6, 1, 2, 2)
    for first in (0, 1):
        wanted = (x[first::2].var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(found[first::2], wanted.expand(3, 1, 2, 2))
    torch.testing.assert_close(minibatch_std(x, 4)[0, 0, 0, 0], (x.var(dim=0, unbiased=False) + 1e-8).sqrt().mean())


def test_workers_that_share_a_batch_compare_the_same_samples() -> None:
    # A worker owns every so many-th sample.
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for num_workers in (2, 4):
        parts = [minibatch_std(x[rank::num_workers], 2) for rank in range(num_workers)]
        torch.testing.assert_close(torch.stack(parts, dim=1).flatten(0, 1), minibatch_std(x, 2))


def test_logits_do_not_depend_on_the_layout() -> None:
    torch.manual_seed(0)
    network = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(256, 32), 32, 3)
    image = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(network(image.contiguous(memory_format=torch.channels_last)), network(image))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", [9, 18, 24, 28])
def test_sides_that_are_no_powers_of_two(architecture: str, side: int) -> None:
    torch.manual_seed(0)
    network = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(256, 32, architecture=architecture), side, 3)
    image = torch.randn(2, 3, side, side, requires_grad=True)
    network(image).sum().backward()
    assert image.grad is not None
    assert (image.grad.abs().amax(dim=(0, 1)) > 0.0).all()  # every pixel counts, those of the last row too


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_follow_the_class_and_every_parameter(architecture: str) -> None:
    torch.manual_seed(0)
    config = StyleGAN2DiscriminatorConfig(256, 32, architecture=architecture, mapping_layers=2)
    network = StyleGAN2Discriminator(config, 32, 1, 3)
    image = torch.randn(1, 1, 32, 32).expand(3, -1, -1, -1)
    logits = network(image, torch.arange(3))
    assert logits.shape == (3, 1)
    assert torch.pdist(logits).min() > 1e-3
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0.0 for p in network.parameters())


def test_the_variance_of_features_stays() -> None:
    # What equalized weights and the gains of the activation and of the shortcut are for.
    torch.manual_seed(0)
    network = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(4096, 128), 32, 3)
    x = network.pixels[0](torch.randn(64, 3, 1, 1).expand(-1, -1, 32, 32))  # a low pass leaves flat images as they are
    for block in network.blocks:
        x = block(x)
        assert 0.5 < x[:, :, 1:-1, 1:-1].square().mean() < 2.0


@pytest.mark.parametrize(
    ("config", "image_size", "problem"),
    [
        (StyleGAN2DiscriminatorConfig(), 7, "channel_base: judges images whose sides are at least 8 pixels, not 7"),
        (StyleGAN2DiscriminatorConfig(0), 32, "channel_base: 0"),
        (StyleGAN2DiscriminatorConfig(channel_max=0), 32, "channel_max: 0"),
        (StyleGAN2DiscriminatorConfig(channel_max=65537), 32, "channel_max: 65537; must be from 1 to 65536"),
        (StyleGAN2DiscriminatorConfig(minibatch_std_group=-1), 32, "minibatch_std_group: -1"),
    ],
)
def test_sizes_that_cannot_be(config: StyleGAN2DiscriminatorConfig, image_size: int, problem: str) -> None:
    assert (config.problem(image_size) or "").startswith(problem)
    assert StyleGAN2DiscriminatorConfig().problem(256) is None
