"""Noise schedules against reference values, float64.

The values are those of the original implementations: linear (Ho 2020), scaled linear (Stable Diffusion v1 and latent
diffusion on ImageNet), cosine (Nichol 2021), all with 1000 steps.
"""

import pytest
import torch

from gmdist.diffusion import schedules

GOLDEN = {
    "linear": (schedules.linear(), 0.9999, 0.0785872, 4.03583e-5, 157.407),
    "scaled linear, SD": (schedules.scaled_linear(), 0.99915, 0.2776697, 0.00466010, 14.61464),
    "scaled linear, LDM": (schedules.scaled_linear(1000, 0.0015, 0.0195), 0.9985, 0.1158445, 1.42304e-4, 83.8225),
    "cosine": (schedules.cosine(), 0.99995872, 0.4938436, 2.42877e-9, 20291.0),
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
