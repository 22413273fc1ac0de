"""Parameter counts against the published models, and shapes."""

import pytest
import torch

from gmdist.nets.autoencoder import Autoencoder, AutoencoderConfig
from gmdist.nets.blocks import timestep_embedding
from gmdist.nets.unet import UNet, UNetConfig


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_kl_f8_has_the_published_size() -> None:
    # Stable Diffusion's first stage: encoder 34,163,592, decoder 49,490,179, quantisation convolutions 72 + 20.
    with torch.device("meta"):
        net = Autoencoder(AutoencoderConfig(), 3)
    assert count(net) == 83_653_863
    assert count(net.encoder) == 34_163_592 + 72
    assert count(net.decoder) == 49_490_179 + 20


def test_16_channel_first_stage_has_the_published_size() -> None:
    # That of Stable Diffusion 3 and FLUX.
    with torch.device("meta"):
        net = Autoencoder(AutoencoderConfig(latent_channels=16, quant_convs=False), 3)
    assert count(net) == 83_819_683


def test_ddpm_cifar_has_the_published_size() -> None:
    # Ho 2020's CIFAR-10 network.
    with torch.device("meta"):
        net = UNet(UNetConfig(), 3)
    assert count(net) == 35_746_307


@pytest.mark.parametrize(("multipliers", "side"), [((1,), 16), ((1, 2), 8), ((1, 2, 2), 4)])
def test_autoencoder_shapes(multipliers: tuple[int, ...], side: int) -> None:
    config = AutoencoderConfig(8, multipliers, 1, 3)
    net = Autoencoder(config, 1)
    mean, logvar = net.encode(torch.randn(2, 1, 16, 16))
    assert mean.shape == logvar.shape == (2, 3, side, side)
    assert config.downsampling == 16 // side
    assert net.decode(mean).shape == (2, 1, 16, 16)


def test_norms_of_an_autoencoder() -> None:
    net = Autoencoder(AutoencoderConfig(16, (1, 2), 1, 3, norm_groups=8), 1)
    assert {norm.num_groups for norm in net.modules() if isinstance(norm, torch.nn.GroupNorm)} == {8}
    assert AutoencoderConfig(16, (1, 2), norm_groups=8).problem() is None
    problem = AutoencoderConfig(16, (1, 2), norm_groups=32).problem()
    assert problem == "norm_groups: 32; must divide the widths [16, 32], as 4 does"


def test_unet_depends_on_time_and_label() -> None:
    torch.manual_seed(0)
    net = UNet(UNetConfig(16, (1, 2), 1, (0, 1), 2, 0.0), 3, num_classes=4).eval()
    for parameter in net.parameters():  # the last layers of branches are zero at the start
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 3, 8, 8)
    results = [net(x, torch.tensor([t]), torch.tensor([y])) for t, y in ((5, 1), (500, 1), (5, 4))]
    assert results[0].shape == x.shape
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_timestep_embedding_against_the_formula() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 3.5]), 6)
    assert embedding.shape == (2, 6)
    for i in range(3):
        angle = torch.tensor(3.5) * 10_000 ** (-i / 3)
        assert embedding[1, i] == pytest.approx(angle.cos().item(), abs=1e-6)
        assert embedding[1, 3 + i] == pytest.approx(angle.sin().item(), abs=1e-6)
