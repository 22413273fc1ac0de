"""PSNR in closed form, and SSIM against scipy's convolution in float64."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from gmdist.nets.image_quality import psnr, ssim


def pair(channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images [2, C, H, W] in [-1, 1], and the same with noise."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(2, channels, 4, 4, generator=generator) * 1.6 - 0.8
    original = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.randn(original.shape, generator=generator) * torch.tensor([0.05, 0.3]).view(2, 1, 1, 1)
    return (original + noise).clamp(-1, 1), original


def reference_ssim(x: np.ndarray, y: np.ndarray, size: int) -> float:
    """Wang 2004, Sec. III-B and C, of one channel [H, W] with a window of `size` pixels."""
    x, y = 127.5 * (x + 1), 127.5 * (y + 1)
    offsets = np.arange(size) - size // 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    mean = lambda image: convolve2d(image, window, mode="valid")
    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return float(similarity.mean())


@pytest.mark.parametrize(
    ("channels", "height", "width", "window"),
    [(1, 32, 32, 11), (3, 24, 17, 11), (1, 8, 20, 7), (3, 9, 9, 9), (1, 1, 1, 1)],
)
def test_ssim_against_float64(channels: int, height: int, width: int, window: int) -> None:
    image, original = pair(channels, height, width)
    expected = [
        np.mean([reference_ssim(x, y, window) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)])
        for a, b in zip(image, original, strict=True)
    ]
    found = ssim(image, original)
    assert found.shape == (2,)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as bf16 runs evaluate
        torch.testing.assert_close(ssim(image, original), found, rtol=0, atol=0)


def test_ssim_of_equal_and_of_opposite_images() -> None:
    _, original = pair(3, 16, 16)
    torch.testing.assert_close(ssim(original, original), torch.ones(2))
    assert (ssim(-original, original) < 0.5).all()


def test_psnr_of_known_errors() -> None:
    original = torch.zeros(3, 1, 4, 4)
    image = original + torch.tensor([0.1, 2.0, 0.0]).view(3, 1, 1, 1)
    # The range is 2: an error of 0.1 is 20 log10(20), one of 2 is 0 dB; without error there is a bound.
    torch.testing.assert_close(psnr(image, original), torch.tensor([26.0206, 0.0, 100.0]), atol=1e-4, rtol=0)
