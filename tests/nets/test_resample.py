"""Resampling beside scipy's filters in float64, and against closed forms."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.signal import upfirdn
from torch import Tensor

from gmdist.nets.resample import downsample, low_pass, upsample

_TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0


def filtered(x: Tensor, up: int = 1) -> np.ndarray:
    """All that the filter touches, after `up - 1` zeros behind each pixel."""
    return upfirdn(up * _TAPS, upfirdn(up * _TAPS, x.numpy(), up, axis=2), up, axis=3)


def image(side: int = 6) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_upsampling_is_zeros_between_pixels_and_the_filter() -> None:
    x = image()
    torch.testing.assert_close(upsample(x), torch.from_numpy(filtered(x, 2))[:, :, 1:-1, 1:-1])


def test_downsampling_is_the_filter_and_every_second_pixel() -> None:
    x = image()
    torch.testing.assert_close(downsample(x), torch.from_numpy(filtered(x))[:, :, 2:-1:2, 2:-1:2])


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_blurring(padding: int) -> None:
    x = image()
    cut = 3 - padding
    whole = torch.from_numpy(filtered(x))
    torch.testing.assert_close(low_pass(x, padding, 4.0), 4.0 * whole[:, :, cut : 9 - cut, cut : 9 - cut])


@pytest.mark.parametrize("resample", [upsample, downsample])
def test_flat_images_stay_flat_away_from_the_border(resample: Callable[[Tensor], Tensor]) -> None:
    found = resample(torch.full((1, 2, 16, 16), 0.7))
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], torch.full_like(found, 0.7)[:, :, 2:-2, 2:-2])


def test_up_and_down_are_transposes_of_each_other() -> None:
    # <down(x), y> = <x, up(y)> / 4: what makes each the other's backward, any number of times.
    x, y = image(8), image(4)
    torch.testing.assert_close((downsample(x) * y).sum(), (x * upsample(y)).sum() / 4.0)


def test_they_differentiate_twice() -> None:
    x = image(4).requires_grad_()
    for resample in (upsample, downsample, lambda x: low_pass(x, 1)):
        assert torch.autograd.gradgradcheck(lambda x, f=resample: f(x).square(), x)


def test_they_keep_the_precision_in_every_derivative() -> None:
    x = image(4).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for resample in (upsample, downsample, lambda x: low_pass(x, 1)):
            y = resample(x).square()
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            exact = resample(x.double())
            (wanted,) = torch.autograd.grad(exact.square().sum(), x)
            torch.testing.assert_close(y.double(), exact.square())
            torch.testing.assert_close(first, wanted)
            assert second.dtype == torch.float32
    assert low_pass(x.bfloat16(), 1).dtype == torch.bfloat16
