"""Samplers: from noise to data along a descending path of noise levels.

All have one shape: `sampler(denoise, x, path, noise) -> x`. The path holds S + 1 levels (alpha_i, sigma_i) of
x_i = alpha_i x_0 + sigma_i eps, noisiest first; the last one is (1, 0), or the noise that is to be left in the result.
`denoise(x, i)` predicts x_0 at level i < S, and `noise(i)` draws a standard normal tensor of x's shape for the step
that leaves level i.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Level = tuple[float, float]  # alpha, sigma
Denoise = Callable[[Tensor, int], Tensor]  # (x [N, ...], index of the level) -> x_0 [N, ...]
Noise = Callable[[int], Tensor]  # index of the level -> [N, ...]

_FEW_STEPS = 15  # DPM-Solver++ ends with a step of order one below this many


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


def euler(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """Euler steps of the probability flow ODE dy/ds = (y - x_0) / s of y = x / alpha over s = sigma / alpha.

    Karras 2022, Alg. 1 without its correction. In exact numbers it is DDIM; alpha must be above 0.
    """
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(path)):
        slope = (x - alpha * denoise(x, i)) / sigma
        x = next_alpha * (x / alpha + (next_sigma / next_alpha - sigma / alpha) * slope)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """Euler steps to less noise than asked for, and fresh noise up to it, as k-diffusion samples; alpha above 0.

    The step goes to s_down of y = x / alpha and s = sigma / alpha, with s_next^2 = s_down^2 + s_up^2. In exact numbers
    it is `ddpm`.
    """
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(path)):
        s, s_next = sigma / alpha, next_sigma / next_alpha
        s_down = s_next**2 / s
        s_up = (s_next**2 - s_down**2) ** 0.5
        slope = (x - alpha * denoise(x, i)) / sigma
        x = next_alpha * (x / alpha + (s_down - s) * slope)
        if next_sigma > 0.0:
            x = x + next_alpha * s_up * noise(i)
    return x


def heun(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """Heun's method on the same ODE as `euler`, of order two, with 2 S - 1 evaluations (Karras 2022, Alg. 1).

    The last step is Euler's, as the denoiser has no level to correct it at. Alpha must be above 0.
    """
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(path)):
        step = next_sigma / next_alpha - sigma / alpha
        slope = (x - alpha * denoise(x, i)) / sigma
        ahead = next_alpha * (x / alpha + step * slope)
        if i + 2 < len(path):
            slope_ahead = (ahead - next_alpha * denoise(ahead, i + 1)) / next_sigma
            ahead = next_alpha * (x / alpha + step * (slope + slope_ahead) / 2.0)
        x = ahead
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """DPM-Solver++(2M), of order two with one evaluation a step (Lu 2022, "DPM-Solver++", Alg. 2).

    x_0 is extrapolated along lambda = ln(alpha / sigma) from its last two predictions. The first step has order one,
    and so has the last where it removes all noise or where steps are few, which keeps it stable.
    """
    lambdas = [_log_ratio(level) for level in path]
    last = len(path) - 2
    before = None
    for i, ((_, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(path)):
        x0 = denoise(x, i)
        h = lambdas[i + 1] - lambdas[i]
        direction = x0
        if before is not None and not (i == last and (next_sigma == 0.0 or last + 1 < _FEW_STEPS)):
            ratio = h / (2.0 * (lambdas[i] - lambdas[i - 1]))
            direction = (1.0 + ratio) * x0 - ratio * before
        x = (next_sigma / sigma) * x - (next_alpha * math.expm1(-h)) * direction
        before = x0
    return x


def _log_ratio(level: Level) -> float:
    """ln(alpha / sigma), infinite at pure noise and at clean data."""
    alpha, sigma = level
    if alpha == 0.0 or sigma == 0.0:
        return math.inf if alpha else -math.inf
    return math.log(alpha / sigma)


def flow_euler(denoise: Denoise, x: Tensor, path: Sequence[Level], noise: Noise) -> Tensor:
    """Euler steps of dx/dt = eps - x_0 along the straight path alpha = 1 - t, sigma = t (Liu 2023, Eq. 1)."""
    for i, ((_, sigma), (_, next_sigma)) in enumerate(pairwise(path)):
        velocity = (x - denoise(x, i)) / sigma
        x = x + (next_sigma - sigma) * velocity
    return x
