"""Gaussians beside torch's own."""

import torch
from torch.distributions import Normal, kl_divergence

from gmdist.nets.gaussian import kl_of_dimensions, reparameterized


def test_divergence_and_samples_against_torch() -> None:
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    there = Normal(mean, (0.5 * logvar).exp())
    torch.testing.assert_close(kl_of_dimensions(mean, logvar), kl_divergence(there, Normal(0.0, 1.0)))
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    at = there.cdf(reparameterized(mean, logvar, noise))  # noise and sample are the same quantile of their own
    torch.testing.assert_close(at, Normal(0.0, 1.0).cdf(noise))
