"""Diagonal Gaussians that networks give by their means and log-variances."""

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # that networks' log-variances are clamped to, as in latent diffusion's published code


def kl_of_dimensions(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each dimension in nats (Kingma 2014, App. B): of any shape, the same."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def reparameterized(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The sample that standard normal noise stands for (Kingma 2014, Sec. 2.4); all of one shape."""
    return mean + torch.exp(0.5 * logvar) * noise
