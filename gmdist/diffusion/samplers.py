"""Samplers: from noise to data along a descending path of noise levels.

All have one shape: `sampler(denoise, x, path, noise) -> x`. The path holds S + 1 levels (alpha_i, sigma_i) of
x_i = alpha_i x_0 + sigma_i eps, noisiest first, the last one (1, 0). `denoise(x, i)` predicts x_0 at level i < S, and
`noise(i)` draws a standard normal tensor of x's shape for the step that leaves level i.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Level = tuple[float, float]  # alpha, sigma
Denoise = Callable[[Tensor, int], Tensor]  # (x [N, ...], index of the level) -> x_0 [N, ...]
Noise = Callable[[int], Tensor]  # index of the level -> [N, ...]


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


def path_of(abar: Tensor, timesteps: Sequence[int]) -> list[Level]:
    """The levels of a variance-preserving schedule abar [T] at the timesteps, and the clean level after them."""
    kept = abar[torch.tensor(timesteps)].double()
    return [*zip(kept.sqrt().tolist(), (1.0 - kept).sqrt().tolist(), strict=True), (1.0, 0.0)]


def ddim(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """Deterministic DDIM (Song 2021, Eq. 12 with sigma 0); `noise` is not drawn."""
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(path)):
        x0 = denoise(x, i)
        eps = (x - alpha * x0) / sigma
        x = next_alpha * x0 + next_sigma * eps
    return x


def ddpm(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """Ancestral sampling with the posterior's variance (Ho 2020, Eq. 7), between any two levels of the path."""
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(path)):
        x0 = denoise(x, i)
        # q(x_next | x, x_0): with r = alpha / next_alpha and the step's variance sigma^2 - r^2 next_sigma^2.
        ratio = alpha / next_alpha
        step_variance = sigma**2 - (ratio * next_sigma) ** 2
        x = (ratio * next_sigma**2 / sigma**2) * x + (next_alpha * step_variance / sigma**2) * x0
        if next_sigma > 0.0:
            x = x + (step_variance**0.5 * next_sigma / sigma) * noise(i)
    return x
