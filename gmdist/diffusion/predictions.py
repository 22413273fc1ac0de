"""Parameterizations: what a network sees and gives, as linear functions of the data and the noise.

Each function takes alpha and sigma of x_t = alpha x_0 + sigma eps, as numbers or tensors [N], and returns coefficients
of the same kind.
"""

from dataclasses import dataclass

from torch import Tensor

Scalar = float | Tensor


@dataclass(frozen=True)
class Prediction:
    """The coefficients of a parameterization at one noise level."""

    target: tuple[Scalar, Scalar]  # of x_0 and eps: their sum is what the network learns to give
    x0: tuple[Scalar, Scalar]  # of x_t and the network's output: their sum is the clean data that the output stands for
    scale: Scalar = 1.0  # of x_t, before the network sees it


def eps(alpha: Scalar, sigma: Scalar) -> Prediction:
    """The noise (Ho 2020, Eq. 14). It says nothing of the data where alpha is 0."""
    return Prediction(target=(0.0, 1.0), x0=(1.0 / alpha, -sigma / alpha))


def x0(alpha: Scalar, sigma: Scalar) -> Prediction:
    """The clean data."""
    return Prediction(target=(1.0, 0.0), x0=(0.0, 1.0))


def v(alpha: Scalar, sigma: Scalar) -> Prediction:
    """The velocity alpha eps - sigma x_0, for alpha^2 + sigma^2 = 1 (Salimans 2022, Sec. 4)."""
    return Prediction(target=(-sigma, alpha), x0=(alpha, -sigma))


def flow(alpha: Scalar, sigma: Scalar) -> Prediction:
    """The direction eps - x_0 of a straight path, for alpha + sigma = 1 (Liu 2023, Eq. 1)."""
    return Prediction(target=(-1.0, 1.0), x0=(1.0, -sigma))


def edm(alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5) -> Prediction:
    """The network between c_in, c_skip and c_out, for alpha = 1 (Karras 2022, Eq. 7 and Table 1).

    The target (x_0 - c_skip x_t) / c_out is written out in x_0 and eps, so that nothing cancels at low noise.
    """
    total = (sigma**2 + sigma_data**2) ** 0.5  # the standard deviation of x_t
    return Prediction(
        target=(sigma / (sigma_data * total), -sigma_data / total),
        x0=((sigma_data / total) ** 2, sigma * sigma_data / total),
        scale=1.0 / total,
    )
