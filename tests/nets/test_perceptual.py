"""Perceptual distances: gradients and frequencies against numpy, LPIPS's files, and what both leave to be trained."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.nets import perceptual
from gmdist.nets.perceptual import LPIPS, GradientFrequency, PerceptualConfig, make_perceptual
from tests.nets.vgg import WIDTHS, linear_state, vgg_state


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16 with few channels."""
    monkeypatch.setattr(perceptual, "_VGG16", WIDTHS)
    monkeypatch.setitem(sys.modules, "lpips", None)


def loaded(folder: Path) -> LPIPS:
    torch.save(vgg_state() | linear_state(), folder / "both.pth")
    net = LPIPS()
    net.load(str(folder / "both.pth"))
    return net


def images(channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(3, channels, height, width, generator=generator) * 2 - 1 for _ in range(2))


def reference_gradient_frequency(error: np.ndarray) -> float:
    """Of the difference [C, H, W] of two images, in float64."""
    levels = []
    while True:
        _, height, width = error.shape
        total = np.abs(np.fft.rfft2(error, norm="ortho").real).mean() / 2
        total += np.abs(np.fft.rfft2(error, norm="ortho").imag).mean() / 2
        total += sum(np.abs(np.diff(error, axis=axis)).mean() for axis in (1, 2))
        levels.append(total)
        if len(levels) == 4 or min(height, width) < 16:
            return float(np.mean(levels))
        even = error[:, : height // 2 * 2, : width // 2 * 2]
        error = even.reshape(len(even), height // 2, 2, width // 2, 2).mean(axis=(2, 4))


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 40, 33), (4, 7, 9), (1, 160, 128)])
def test_gradient_frequency_against_numpy(channels: int, height: int, width: int) -> None:
    image, original = images(channels, height, width)
    found = GradientFrequency()(image, original)
    expected = [reference_gradient_frequency(error) for error in (image.double() - original.double()).numpy()]
    assert found.shape == (3,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    bf16 = GradientFrequency()(image.bfloat16(), original)
    assert bf16.dtype == torch.float32
    torch.testing.assert_close(bf16, found, rtol=0.02, atol=0)


def test_gradient_frequency_is_smooth_enough_at_zero() -> None:
    original = images(1, 16, 16)[0]
    image = original.clone().requires_grad_(True)
    distance = GradientFrequency()(image, original)
    assert (distance == 0).all()
    (gradient,) = torch.autograd.grad(distance.sum(), image)
    assert (gradient == 0).all()


def test_of_equal_errors_the_fine_one_is_further() -> None:
    original = torch.zeros(1, 1, 16, 16)
    shifted = original + 0.2
    checkered = original + 0.2 * (1 - 2 * (torch.arange(16)[:, None] + torch.arange(16)).remainder(2))
    measure = GradientFrequency()
    assert measure(checkered, original) > 2 * measure(shifted, original) > 0


def test_lpips_against_its_formula(small: None, tmp_path: Path) -> None:
    image, original = images(3, 20, 17)
    state = {name: value.double() for name, value in vgg_state().items()}

    def features(x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).double()[:, None, None]
        found, number = [], 0
        for widths in WIDTHS:
            x = F.max_pool2d(x, 2) if found else x
            for _ in widths:
                x = F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1).relu()
                number += 2
            number += 1
            found.append(F.normalize(x, dim=1))
        return found

    pairs = zip(features(image.double()), features(original.double()), linear_state().values(), strict=True)
    expected = sum(F.conv2d((a - b).square(), weight.double()).mean(dim=(1, 2, 3)) for a, b, weight in pairs)
    torch.testing.assert_close(loaded(tmp_path)(image, original).double(), expected, rtol=1e-4, atol=1e-6)


def test_lpips_trains_what_makes_the_image_and_nothing_else(small: None, tmp_path: Path) -> None:
    net = loaded(tmp_path)
    image, original = images(1, 16, 16)
    image.requires_grad_(True)
    net(image, original).sum().backward()
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not net.training
    grey = torch.cat([original] * 3, dim=1)
    torch.testing.assert_close(net(image, original), net(torch.cat([image] * 3, dim=1), grey))


def test_lpips_has_finite_slopes_where_all_features_are_zero(small: None, tmp_path: Path) -> None:
    net = loaded(tmp_path)
    with torch.no_grad():
        for name, parameter in net.features.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-100.0)
    image, original = images(3, 16, 16)
    image.requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(image, original).sum(), image)
    assert gradient.isfinite().all()


def test_lpips_is_nan_without_weights(small: None) -> None:
    assert LPIPS()(*images(3, 16, 16)).isnan().all()


def test_lpips_reads_what_others_save(small: None, tmp_path: Path) -> None:
    expected = loaded(tmp_path)(*images(3, 16, 16))
    slices = {(0, 2): 1, (5, 7): 2, (10, 12, 14): 3, (17, 19, 21): 4, (24, 26, 28): 5}
    renamed = {
        f"net.slice{part}.{number}.{kind}": vgg_state()[f"features.{number}.{kind}"]
        for numbers, part in slices.items()
        for number in numbers
        for kind in ("weight", "bias")
    }
    for case, files in {
        "two": {"vgg16-397923af.pth": vgg_state(), "vgg.pth": linear_state()},
        "whole": {"lpips.pt": renamed | linear_state("lins.")},
        "safe": {"vgg16.safetensors": vgg_state(), "lpips.safetensors": linear_state()},
    }.items():
        folder = tmp_path / case
        folder.mkdir()
        for name, state in files.items():
            (save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
        net = LPIPS()
        net.load(str(folder))
        assert torch.equal(net(*images(3, 16, 16)), expected), case


def test_lpips_says_what_is_missing(small: None, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            LPIPS().load(str(path))
        assert "vgg16-397923af.pth" in str(caught.value) or "not [" in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such file" in refusal(tmp_path / "none")
    torch.save(vgg_state(), tmp_path / "vgg16.pth")
    assert "has no linear.0 of LPIPS" in refusal(tmp_path / "vgg16.pth")
    torch.save(linear_state(), tmp_path / "vgg.pth")
    assert "has no features.0.weight" in refusal(tmp_path / "vgg.pth")
    torch.save(vgg_state() | {"features.2.bias": torch.zeros(5)}, tmp_path / "vgg16.pth")
    assert "its features.2.bias of LPIPS is [5], not [4]" in refusal(tmp_path)


class Harm:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("harm"),)


def test_nothing_in_weights_is_run(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Harm()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Harm(), protocol=2))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ConfigError, match=f"{name}'; cannot be read as tensors"):
            LPIPS().load(name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vgg"}, "name: 'vgg'; must be one of none, gradient_frequency, lpips"),
        ({"weight": float("nan")}, "weight: nan"),
        ({"name": "lpips"}, "path: missing; must be a folder or a file for lpips: it needs VGG16"),
        ({"path": "x"}, "path: 'x'; goes with name lpips only"),
        ({"name": "lpips", "path": "x"}, "name: 'lpips'; its network halves images four times"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    assert message in PerceptualConfig(**settings).problem(8)
    assert PerceptualConfig().problem(8) is None


def test_by_name(small: None) -> None:
    assert make_perceptual(PerceptualConfig("none")) is None
    assert isinstance(make_perceptual(PerceptualConfig()), GradientFrequency)
    assert isinstance(make_perceptual(PerceptualConfig("lpips", path="x")), LPIPS)
