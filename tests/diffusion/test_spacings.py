"""Where samplers stop: the timesteps of the field's three spacings, and EDM's sigmas."""

import pytest
import torch

from gmdist.diffusion.spacings import karras_sigmas, leading_timesteps, linspace_timesteps, trailing_timesteps

SPACINGS = (leading_timesteps, trailing_timesteps, linspace_timesteps)


def test_fifty_steps_of_a_thousand() -> None:
    # As DDIM of latent diffusion (leading + 1), Lin 2023 (trailing) and Nichol 2021 (linspace) take them.
    assert leading_timesteps(1000, 50) == list(range(981, 0, -20))
    assert trailing_timesteps(1000, 50) == list(range(999, 18, -20))
    linspace = linspace_timesteps(1000, 50)
    assert (linspace[0], linspace[1], linspace[-2], linspace[-1]) == (999, 979, 20, 0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_descend_within_the_schedule(spacing) -> None:
    assert spacing(1000, 1000) == list(range(999, -1, -1))
    for num_timesteps in (1, 2, 7, 100, 1000):
        for num_steps in {1, 2, 3, 5, 6, 50, 99, 640, num_timesteps}:
            if num_steps <= num_timesteps:
                timesteps = spacing(num_timesteps, num_steps)
                assert len(set(timesteps)) == num_steps
                assert timesteps == sorted(timesteps, reverse=True)
                assert 0 <= timesteps[-1] <= timesteps[0] < num_timesteps
    assert trailing_timesteps(1000, 1) == linspace_timesteps(1000, 1) == [999]


def test_the_eighteen_sigmas_of_edm() -> None:
    # Karras 2022: 18 steps on CIFAR-10, computed in float64 from Eq. 5.
    sigmas = karras_sigmas(18)
    assert sigmas.dtype == torch.float64
    assert sigmas[:3].tolist() == pytest.approx([80.0, 57.58599, 40.78557], rel=1e-6)
    assert sigmas[-2:].tolist() == pytest.approx([0.007528, 0.002], rel=1e-4)
    assert (sigmas.diff() < 0).all()
    assert karras_sigmas(1).tolist() == pytest.approx([80.0])
