"""Spacings: at which of a model's noise levels a sampler stops on its way down."""

import torch
from torch import Tensor


def leading_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Evenly spaced timesteps, largest first, the last one 1 for any step above 1 ("leading" + 1)."""
    assert 1 <= num_steps <= num_timesteps, (num_steps, num_timesteps)
    stride = num_timesteps // num_steps
    offset = 1 if stride > 1 else 0
    return [i * stride + offset for i in reversed(range(num_steps))]


def trailing_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Evenly spaced timesteps that begin at the noisiest one (Lin 2023, "Common diffusion noise schedules", 3.3)."""
    assert 1 <= num_steps <= num_timesteps, (num_steps, num_timesteps)
    stride = num_timesteps / num_steps
    return [round(num_timesteps - i * stride) - 1 for i in range(num_steps)]


def linspace_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Evenly spaced timesteps from the noisiest to 0, both included; the noisiest alone for one step."""
    assert 1 <= num_steps <= num_timesteps, (num_steps, num_timesteps)
    if num_steps == 1:
        return [num_timesteps - 1]
    return [round(i * (num_timesteps - 1) / (num_steps - 1)) for i in reversed(range(num_steps))]


def karras_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Sigmas from sigma_max to sigma_min, evenly spaced in sigma^(1 / rho) (Karras 2022, Eq. 5). [S], float64."""
    assert num_steps >= 1, num_steps
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64)
    return roots**rho
