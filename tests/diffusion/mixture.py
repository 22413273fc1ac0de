"""A case that is known exactly: data from a mixture of two normal distributions, noised."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gmdist.diffusion.samplers import Level

MEANS = torch.tensor([-1.0, 0.5], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
BETWEEN = -0.25


def expectation(x: Tensor, level: Level, std: float) -> Tensor:
    """E[x_0 | x_t]: what a perfect denoiser gives."""
    alpha, sigma = level
    variance = (alpha * std) ** 2 + sigma**2
    away = x[..., None] - alpha * MEANS
    share = torch.softmax(SHARES.log() - away**2 / (2 * variance), -1)
    return (share * (MEANS + alpha * std**2 / variance * away)).sum(-1)


def denoiser(path: Sequence[Level], std: float) -> Callable[[Tensor, int], Tensor]:
    """A perfect denoiser, as samplers call it."""
    return lambda x, i: expectation(x, path[i], std)


def cdf(x: Tensor, level: Level, std: float) -> Tensor:
    """The share of x_t below x."""
    alpha, sigma = level
    total = ((alpha * std) ** 2 + sigma**2) ** 0.5
    return (SHARES * torch.special.ndtr((x[..., None] - alpha * MEANS) / total)).sum(-1)


def transported(x: Tensor, start: Level, end: Level, std: float) -> Tensor:
    """Where the probability flow ODE takes x from one level to another.

    Its flow carries one distribution into the other and keeps the order of points: in one dimension it keeps their
    quantiles, so no solver is needed. By bisection.
    """
    quantile = cdf(x, start, std)
    low, high = torch.full_like(x, -200.0), torch.full_like(x, 200.0)
    for _ in range(80):
        middle = (low + high) / 2
        is_below = cdf(middle, end, std) < quantile
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


def check_distribution(x: Tensor, std: float, share: float = 0.015) -> None:
    """Samples have the mixture's shares, means and standard deviations."""
    left = x < BETWEEN
    torch.testing.assert_close(left.double().mean(), SHARES[0], rtol=0.0, atol=share)
    for side, mean in ((x[left], MEANS[0]), (x[~left], MEANS[1])):
        torch.testing.assert_close(side.mean(), mean, rtol=0.0, atol=0.01)
        torch.testing.assert_close(side.std().item(), std, rtol=0.06, atol=0.0)
