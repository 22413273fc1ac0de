"""What the KL term of a VAE counts for, as a function of the images seen."""

import math
from dataclasses import dataclass

from torch import Tensor

from gmdist.checks import at_least, nonnegative, one_of

SCHEDULES = ("constant", "linear", "cosine", "sigmoid", "cyclical", "capacity")
_STEEPNESS = 12.0  # of the sigmoid, from end to end


@dataclass
class BetaConfig:
    """The weight of the KL term, and how it gets there."""

    schedule: str = "constant"  # or linear, cosine, sigmoid, cyclical, which rise to `value`; or capacity
    value: float = 1.0  # beta (Higgins 2017, Eq. 4), at the end of a rise; 1: the ELBO. Of capacity: gamma
    start: float = 0.0  # beta at the beginning of a rise
    num_images: int = 100_000  # seen, from the first to the end of the schedule
    num_cycles: int = 4  # of cyclical: rises within num_images
    rise: float = 0.5  # of cyclical: the part of a cycle that the rise takes; in the rest beta is `value`
    capacity_nats: float = 25.0  # of capacity: what the KL term is held at in the end
    free_nats: float = 0.0  # that each latent dimension may carry of a sample before it costs anything: free bits

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := one_of(SCHEDULES, schedule=self.schedule) or nonnegative(value=self.value, start=self.start):
            return problem
        if problem := nonnegative(capacity_nats=self.capacity_nats, free_nats=self.free_nats):
            return problem
        if self.num_images < 0:
            return f"num_images: {self.num_images}; must be at least 0: a schedule cannot end before its first image"
        if problem := at_least(1, num_cycles=self.num_cycles):
            return problem
        if not 0.0 < self.rise <= 1.0:
            return f"rise: {self.rise}; must be above 0 and at most 1"
        if self.schedule == "capacity" and self.free_nats > 0.0:
            return f"free_nats: {self.free_nats}; must be 0 with the schedule capacity, which holds the KL term itself"
        return None


def progress(seen: int, num_images: int) -> float:
    """The part of a schedule that is over, in [0, 1]; all of it where the schedule has no length."""
    return min(seen / num_images, 1.0) if num_images > 0 else 1.0


def beta(config: BetaConfig, seen: int) -> float:
    """The weight of the KL term after so many images."""
    t = progress(seen, config.num_images)
    if config.schedule == "linear":  # (Sonderby 2016)
        risen = t
    elif config.schedule == "cosine":
        risen = 0.5 - 0.5 * math.cos(math.pi * t)
    elif config.schedule == "sigmoid":  # (Bowman 2016, Fig. 2), moved and stretched to begin at 0 and end at 1
        risen = 0.5 + 0.5 * math.tanh(0.5 * _STEEPNESS * (t - 0.5)) / math.tanh(0.25 * _STEEPNESS)
    elif config.schedule == "cyclical" and t < 1.0:  # (Fu 2019); in integers, or rounding would put a restart off
        risen = min(seen * config.num_cycles % config.num_images / config.num_images / config.rise, 1.0)
    else:
        risen = 1.0
    return config.start + (config.value - config.start) * risen


def capacity_nats(config: BetaConfig, seen: int) -> float:
    """C, which rises in proportion to the images seen (Burgess 2018, Sec. 5)."""
    return config.capacity_nats * progress(seen, config.num_images)


def kl_loss(config: BetaConfig, kl: Tensor, seen: int) -> Tensor:
    """What the KL term adds to the loss of each sample.

    Args:
        config: the schedule.
        kl: of each latent dimension, in nats [N, Z].
        seen: images so far.

    Returns:
        [N].
    """
    if config.schedule == "capacity":
        return config.value * (kl.sum(dim=1) - capacity_nats(config, seen)).abs()  # (Burgess 2018, Eq. 8)
    # Free bits (Kingma 2016, Eq. 15) of each sample by itself. There they are of the mean over a minibatch: then a loss
    # would depend on how a batch is cut among workers.
    return beta(config, seen) * kl.clamp_min(config.free_nats).sum(dim=1)
