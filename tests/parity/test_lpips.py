"""LPIPS against the lpips package with the same random VGG16, and SSIM against scikit-image."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from gmdist.nets.image_quality import ssim
from gmdist.nets.perceptual import LPIPS

pytestmark = pytest.mark.parity

# Simonyan 2015, Tab. 1, column D; M: a pool. As torchvision's vgg16 lists its features.
LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def vgg16(pretrained: bool) -> SimpleNamespace:
    """What lpips takes of torchvision, whose compiled part need not be installed: the layers of VGG16."""
    assert not pretrained
    layers, width = [], 3
    for out in LAYERS:
        if out == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)]
            width = out
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # so that no layer dies out
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return SimpleNamespace(features=nn.Sequential(*layers))


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    """The lpips package's network: its linear weights, and a VGG16 of random weights."""
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    torchvision.models, models.vgg16 = models, vgg16
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.models", models)
        import lpips

        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def ours(peer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> LPIPS:
    """Ours with the same VGG16, saved as torchvision saves it; the linear weights are found in the peer's package."""
    folder: Path = tmp_path_factory.mktemp("lpips")
    features = {
        f"features.{name.split('.', 1)[1]}": value
        for name, value in peer.net.state_dict().items()  # slice1.0.weight
    }
    torch.save(features, folder / "vgg16.pth")
    net = LPIPS()
    net.load(str(folder))
    return net


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 64, 64), (1, 32, 32), (3, 16, 50)])
def test_lpips(peer: nn.Module, ours: LPIPS, channels: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    original = torch.rand(3, channels, height, width, generator=generator) * 2 - 1
    noise = torch.randn(original.shape, generator=generator) * torch.tensor([0.02, 0.2, 1.0]).view(3, 1, 1, 1)
    image = (original + noise).clamp(-1, 1).requires_grad_(True)
    expected = peer(image.expand(-1, 3, -1, -1), original.expand(-1, 3, -1, -1)).flatten()
    found = ours(image, original)
    assert expected.min() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(distance.sum(), image)[0] for distance in (found, expected)]
    assert (slopes[0] - slopes[1]).norm() < 1e-4 * slopes[1].norm()


def test_lpips_reads_the_whole_state_of_the_peer(peer: nn.Module, ours: LPIPS, tmp_path: Path) -> None:
    torch.save(peer.state_dict(), tmp_path / "lpips.pth")
    net = LPIPS()
    net.load(str(tmp_path / "lpips.pth"))
    for (name, found), expected in zip(net.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 32, 32), (3, 40, 27), (3, 11, 11)])
def test_ssim(channels: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    original = torch.rand(3, channels, height, width, generator=generator) * 2 - 1
    image = (original + 0.3 * torch.randn(original.shape, generator=generator)).clamp(-1, 1)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
    expected = [
        structural_similarity(*(127.5 * (picture.double().numpy() + 1) for picture in pair), data_range=255, **settings)
        for pair in zip(image, original, strict=True)
    ]
    torch.testing.assert_close(ssim(image, original), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)
