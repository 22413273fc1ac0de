"""DCGAN's networks: counts by hand, and what classes change."""

import pytest
import torch

from gmdist.nets.dcgan import CONDITIONINGS, DCGANConfig, DCGANDiscriminator, DCGANGenerator

SMALL = DCGANConfig(8, 8, 8, 32)


def test_as_many_parameters_as_the_paper_draws() -> None:
    # Radford 2016, Fig. 1: 100 numbers to 1024x4x4, 512, 256, 128, and 3x64x64; kernels of 4, scales and biases.
    with torch.device("meta"):
        network = DCGANGenerator(DCGANConfig(), 64, 3)
    widths = [100, 1024, 512, 256, 128]
    kernels = sum(16 * a * b for a, b in zip([*widths], [*widths[1:], 3], strict=True))
    assert sum(p.numel() for p in network.parameters()) == kernels + 2 * sum(widths[1:]) + 3


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_classes_change_images_and_logits(conditioning: str) -> None:
    torch.manual_seed(0)
    generator = DCGANGenerator(SMALL, 16, 1, 3).eval()
    discriminator = DCGANDiscriminator(SMALL, 16, 1, 3, conditioning).eval()
    latent, label = torch.randn(1, 8).expand(3, -1), torch.arange(3)
    images = generator(latent, label)
    assert images.shape == (3, 1, 16, 16)
    assert torch.pdist(images.flatten(1)).min() > 0.0
    logits = discriminator(images[:1].expand(3, -1, -1, -1), label)
    assert logits.shape == (3, 1)
    assert torch.pdist(logits).min() > 0.0


def test_widths_stop_at_the_largest() -> None:
    assert DCGANConfig(generator_channels=128).widths(128, 64) == [128, 256, 512, 1024]
    assert SMALL.widths(8, 64) == [8, 16, 32, 32]


@pytest.mark.parametrize(
    ("config", "image_size", "problem"),
    [
        (SMALL, 48, "generator_channels: makes images whose sides are powers of 2 from 8 on, not 48"),
        (DCGANConfig(latent_channels=0), 32, "latent_channels: 0"),
        (DCGANConfig(max_channels=0), 32, "max_channels: 0"),
    ],
)
def test_sizes_that_cannot_be(config: DCGANConfig, image_size: int, problem: str) -> None:
    assert (config.problem(image_size) or "").startswith(problem)
