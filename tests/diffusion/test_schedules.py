"""Noise schedules against reference values, float64.

The values are those of the original implementations: linear (Ho 2020), scaled linear (Stable Diffusion v1 and latent
diffusion on ImageNet), cosine (Nichol 2021), sigmoid (GeoDiff), all with 1000 steps.
"""

import pytest
import torch

from gmdist.diffusion import schedules

GOLDEN = {
    "linear": (schedules.linear(), 0.9999, 0.0785872, 4.03583e-5, 157.407),
    "scaled linear, SD": (schedules.scaled_linear(), 0.99915, 0.2776697, 0.00466010, 14.61464),
    "scaled linear, LDM": (schedules.scaled_linear(1000, 0.0015, 0.0195), 0.9985, 0.1158445, 1.42304e-4, 83.8225),
    "cosine": (schedules.cosine(), 0.99995872, 0.4938436, 2.42877e-9, 20291.0),
    "sigmoid": (schedules.sigmoid(), 0.99985079, 0.3019311, 3.96818e-5, 158.743),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    abar, first, middle, last, sigma_max = GOLDEN[name]
    assert abar.dtype == torch.float64
    assert abar.shape == (1000,)
    assert abar[0].item() == pytest.approx(first, rel=1e-6)
    assert abar[499].item() == pytest.approx(middle, rel=1e-6)
    assert abar[999].item() == pytest.approx(last, rel=2e-6)
    assert ((1 - abar[999]) / abar[999]).sqrt().item() == pytest.approx(sigma_max, rel=1e-5)
    assert (abar.diff() < 0).all()


def test_sigma_min_of_stable_diffusion() -> None:
    abar = schedules.scaled_linear()
    assert ((1 - abar[0]) / abar[0]).sqrt().item() == pytest.approx(0.0291672, rel=1e-5)


def test_zero_terminal_snr_of_stable_diffusion() -> None:
    # Computed in float64 by the algorithm of Lin 2023.
    abar = schedules.scaled_linear()
    rescaled = schedules.zero_terminal_snr(abar)
    assert rescaled[0].item() == pytest.approx(abar[0].item(), rel=1e-12)
    assert rescaled[998].item() == pytest.approx(1.96789e-7, rel=1e-5)
    assert rescaled[999].item() == 0.0
    assert 1 - (rescaled[998] / rescaled[997]).item() == pytest.approx(0.751137, rel=1e-5)
    assert (rescaled.diff() < 0).all()


@pytest.mark.parametrize("name", GOLDEN)
def test_zero_terminal_snr_of_any_schedule(name: str) -> None:
    abar = GOLDEN[name][0]
    rescaled = schedules.zero_terminal_snr(abar)
    assert rescaled[-1].item() == 0.0
    assert rescaled[0].item() == pytest.approx(abar[0].item(), rel=1e-12)
    # What is left is a straight line of what was there, in sqrt(abar).
    kept, roots = rescaled.sqrt(), abar.sqrt()
    slopes = kept.diff() / roots.diff()
    torch.testing.assert_close(slopes, slopes[:1].expand(999), rtol=1e-6, atol=0.0)
