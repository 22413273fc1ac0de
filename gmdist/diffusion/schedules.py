"""Noise schedules: how much of the signal is left at each timestep.

Each function returns abar [T], float64: the product of (1 - beta) up to and including timestep t, so that
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho 2020, Eq. 4).
"""

import math

import torch
from torch import Tensor

LINEAR_BETAS = (1e-4, 0.02)  # first and last, Ho 2020
SCALED_LINEAR_BETAS = (0.00085, 0.012)  # Rombach 2022


def linear(num_timesteps: int = 1000, beta_start: float = LINEAR_BETAS[0], beta_end: float = LINEAR_BETAS[1]) -> Tensor:
    """Linear in beta (Ho 2020, Sec. 4). Returns abar [T], float64."""
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return torch.cumprod(1.0 - betas, dim=0)


def scaled_linear(
    num_timesteps: int = 1000, beta_start: float = SCALED_LINEAR_BETAS[0], beta_end: float = SCALED_LINEAR_BETAS[1]
) -> Tensor:
    """Linear in sqrt(beta); the defaults are Stable Diffusion's (Rombach 2022). Returns abar [T], float64."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return torch.cumprod(1.0 - roots.square(), dim=0)


def sigmoid(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Betas along a sigmoid from -6 to 6, as in GeoDiff (Xu 2022). Returns abar [T], float64."""
    curve = torch.sigmoid(torch.linspace(-6.0, 6.0, num_timesteps, dtype=torch.float64))
    return torch.cumprod(1.0 - (beta_start + curve * (beta_end - beta_start)), dim=0)


def cosine(num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Squared cosine in abar, betas clipped (Nichol 2021, Eq. 17). Returns abar [T], float64."""
    times = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    curve = torch.cos((times + offset) / (1.0 + offset) * math.pi / 2.0).square()
    betas = (1.0 - curve[1:] / curve[:-1]).clamp(max=max_beta)
    return torch.cumprod(1.0 - betas, dim=0)


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the first timestep stays and the last is pure noise (Lin 2023, Alg. 1).

    Args:
        abar: a schedule [T], float64, T at least 2.

    Returns:
        [T], float64; the last value is 0 exactly.
    """
    roots = abar.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))).square()
