"""What Gaussian posteriors tell of images."""

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # over images, of a posterior's mean (Burda 2015, Sec. 5.2)


def moments(mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """Means over a batch of posteriors [N, Z], from whose means over all images the functions below are found.

    In float64: variances are small differences of them, where posteriors lie far from the prior.
    """
    mean, logvar = mean.double(), logvar.double()
    return {
        "posterior_mean": mean.mean(dim=0),  # [Z]
        "posterior_outer": mean.T @ mean / len(mean),  # [Z, Z]
        "posterior_variance": logvar.exp().mean(dim=0),  # [Z]
        "posterior_logvar": logvar.sum(dim=1).mean(),
    }


def covariance_of_means(means: dict[str, Tensor]) -> Tensor:
    """The covariance of the posteriors' means over images [Z, Z], of means of `moments`."""
    return means["posterior_outer"] - torch.outer(means["posterior_mean"], means["posterior_mean"])


def active_units(means: dict[str, Tensor]) -> int:
    """Latent dimensions whose posterior's mean depends on the image (Burda 2015, Sec. 5.2)."""
    return int((covariance_of_means(means).diagonal() > ACTIVE_VARIANCE).sum())


def mutual_information(means: dict[str, Tensor]) -> Tensor:
    """An upper bound of I(x; z) under q(z|x) in nats, tight where the posteriors add up to a Gaussian.

    I(x; z) = h(z) - E_x h(z|x), and no distribution with the covariance of z has more entropy than the Gaussian. The
    bound is at most the mean KL term. Unlike estimates within a batch (Hoffman 2016), which cannot exceed the
    logarithm of its size, it is a function of means over images alone.
    """
    covariance = covariance_of_means(means) + torch.diag(means["posterior_variance"])
    return 0.5 * (torch.linalg.slogdet(covariance).logabsdet - means["posterior_logvar"])
