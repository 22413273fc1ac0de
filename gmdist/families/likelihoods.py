"""Likelihoods p(x|z) of images, given what a decoder says of every pixel and channel."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LIKELIHOODS = ("gaussian", "bernoulli", "discretized_logistic")
LEVEL_WIDTH = 2.0 / 255.0  # between neighbours of the 256 levels in [-1, 1]


@dataclass
class LikelihoodConfig:
    """A distribution of each value of an image, independent of the others."""

    name: str = "gaussian"  # or bernoulli, discretized_logistic
    scale: float = 1.0  # of gaussian and discretized_logistic, for pixels in [-1, 1]; where it is learned, the first
    learned_scale: bool = True  # one for all pixels, trained along; not of bernoulli, which has none

    @property
    def learned_log_scale(self) -> float | None:
        """Where the learned logarithm of the scale starts; None: none is learned."""
        return math.log(self.scale) if self.learned_scale and self.name != "bernoulli" else None

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if self.name not in LIKELIHOODS:
            return f"name: '{self.name}'; must be one of {', '.join(LIKELIHOODS)}"
        if not 1e-6 <= self.scale <= 1e6:
            return f"scale: {self.scale}; must be from 1e-6 to 1e6"
        return None


def log_likelihood(name: str, image: Tensor, output: Tensor, log_scale: Tensor) -> Tensor:
    """The log-likelihood log p(image | z) in nats: of a density for gaussian, else of a probability.

    Args:
        name: of LIKELIHOODS.
        image: [N, C, H, W] in [-1, 1].
        output: of the decoder [N, C, H, W]: means, logits or locations.
        log_scale: a scalar, or [1].

    Returns:
        [N].
    """
    if name == "gaussian":
        standardized = (image - output) * torch.exp(-log_scale)
        values = -0.5 * standardized.square() - log_scale - 0.5 * math.log(2.0 * math.pi)
    elif name == "bernoulli":  # -1 is 0 and 1 is 1. Greys between them count in part, as is the custom.
        values = 0.5 * (image + 1.0) * output - F.softplus(output)
    else:
        assert name == "discretized_logistic", name
        values = _discretized_logistic(image, output, log_scale)
    return values.flatten(1).sum(dim=1)


def _discretized_logistic(image: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """The logarithm of the mass that a logistic distribution has around each of 256 levels (Salimans 2017, Eq. 2).

    The lowest level takes all below it and the highest all above, so the masses add up to 1.
    """
    inverse = torch.exp(-log_scale)
    above = (image + 0.5 * LEVEL_WIDTH - location) * inverse
    below = (image - 0.5 * LEVEL_WIDTH - location) * inverse
    # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): exact where both are near 0 or 1 and their difference would vanish.
    up_to, beyond = F.logsigmoid(above), F.logsigmoid(-below)
    within = up_to + beyond + torch.log(-torch.expm1(-LEVEL_WIDTH * inverse))
    return torch.where(
        image < -1.0 + 0.5 * LEVEL_WIDTH, up_to, torch.where(image > 1.0 - 0.5 * LEVEL_WIDTH, beyond, within)
    )


def expected_image(name: str, output: Tensor) -> Tensor:
    """What a decoder's output [N, C, H, W] shows, in [-1, 1]: the mean, or the location."""
    return torch.tanh(0.5 * output) if name == "bernoulli" else output.clamp(-1.0, 1.0)


def bits_per_dim(name: str, nats: float, num_values: int) -> float:
    """-log2 p of a pixel's channel, of a log-likelihood of images of so many values.

    A density is turned into the probability of a level by the level's width. It is that probability where the density
    hardly changes within a level: a scale far above 2/255.
    """
    bits = -nats / (num_values * math.log(2.0))
    return bits - math.log2(LEVEL_WIDTH) if name == "gaussian" else bits
