"""What images go through before a GAN's discriminator sees them: nothing, DiffAugment or ADA, whose strength adapts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmdist.checks import at_least, one_of
from gmdist.families import ada, diffaugment
from gmdist.families.family import Metrics
from gmdist.workers import all_sum

KINDS = ("none", "diffaugment", "ada")


@dataclass
class AugmentConfig:
    """What is done to images, and how much; the defaults of ADA are those of Karras 2020."""

    kind: str = "none"  # none, diffaugment or ada
    policies: tuple[str, ...] = diffaugment.POLICIES  # of diffaugment: color, translation, cutout
    p: float | None = None  # of ada: the probability of each transform; None: it adapts, from 0 on
    target: float = 0.6  # of an adapting p: the mean sign of the logits of images that it holds
    speed_kimg: float = 500.0  # of an adapting p: images in which it can go from 0 to 1
    interval: int = 4  # of an adapting p: steps from one change to the next

    @property
    def adapts(self) -> bool:
        """Whether p follows the discriminator."""
        return self.kind == "ada" and self.p is None

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := one_of(KINDS, kind=self.kind):
            return problem
        known = set(self.policies) <= set(diffaugment.POLICIES)
        if not self.policies or not known or len(set(self.policies)) < len(self.policies):
            return (
                f"policies: {list(self.policies)}; must be one or more of {', '.join(diffaugment.POLICIES)}, each once"
            )
        if self.p is not None and not 0.0 <= self.p <= 1.0:
            return f"p: {self.p}; must be from 0 to 1, or null to adapt"
        if not -1.0 < self.target < 1.0:
            return f"target: {self.target}; must be above -1 and below 1, as a mean of signs is"
        if not 0.0 < self.speed_kimg < math.inf:
            return f"speed_kimg: {self.speed_kimg}; must be a number above 0"
        return at_least(1, interval=self.interval)


class Augmentation(nn.Module):
    """The augmentation of a family, and what its strength has to be known by: buffers alone.

    Signs are summed in `observe` over a step's micro-batches, and by `update` over all workers; as integers, so that
    neither the order nor the number of workers changes a bit.
    """

    p: Tensor  # scalar
    observed: Tensor  # int64 [3], of this step, on this worker: the sum of signs, the logits, their images
    total: Tensor  # int64 [3], the same of all workers since p has last changed
    steps: Tensor  # int64 scalar: since then

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        if config.adapts:
            self.register_buffer("p", torch.zeros(()))
            self.register_buffer("observed", torch.zeros(3, dtype=torch.int64))
            self.register_buffer("total", torch.zeros(3, dtype=torch.int64))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, image: Tensor, keys: Tensor, purpose: str) -> Tensor:
        """Images [N, C, H, W] in [-1, 1], of 1 or 3 channels, as the discriminator is to see them.

        Args:
            image: real or generated; gradients go through, twice too.
            keys: int64 [N], the samples' numbers.
            purpose: which images they are: "augment/real". Others with the same keys get other random numbers.
        """
        config = self.config
        if config.kind == "none":
            return image
        if config.kind == "diffaugment":
            return diffaugment.augmented(image, keys, config.policies, self.seed, purpose)
        p = self.p if config.p is None else torch.full((), config.p, device=image.device)
        return ada.augmented(image, keys, p, self.seed, purpose)

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Take in the logits [N, ...] that the discriminator has given a micro-batch of augmented real images."""
        if self.config.adapts:
            self.observed[0] += (logits > 0).sum() - (logits < 0).sum()
            self.observed[1] += logits.numel()
            self.observed[2] += len(logits)

    @torch.no_grad()
    def update(self) -> Metrics:
        """End a step, over all workers: every few of them, p changes."""
        if not self.config.adapts:
            return {}
        observed = all_sum(self.observed)
        sign = _mean_sign(observed)
        self.total += observed
        self.observed.zero_()
        self.steps += 1
        is_due = self.steps >= self.config.interval
        self.p.copy_(torch.where(is_due, adapted(self.p, self.total, self.config), self.p))
        self.total.masked_fill_(is_due, 0)
        self.steps.masked_fill_(is_due, 0)
        return {"augment/p": self.p.clone(), "augment/real_sign": sign}


def adapted(p: Tensor, total: Tensor, config: AugmentConfig) -> Tensor:
    """The probability p that follows on p, scalars, by what was observed since it last changed (Karras 2020, Sec. 3).

    It stays in [0, 1]. The paper bounds it below alone; above 1, where all is augmented already, it would only have to
    come down again before anything changes.

    Args:
        p: scalar.
        total: int64 [3]: the sum of the signs of logits of real images, the logits, their images.
        config: its target and speed.
    """
    overfits = torch.sign(_mean_sign(total) - config.target)  # r_t, Eq. 1
    return (p + overfits * (total[2] / (1000.0 * config.speed_kimg))).clamp(0.0, 1.0)


def _mean_sign(observed: Tensor) -> Tensor:
    """0 where nothing was observed."""
    return observed[0] / observed[1].clamp(min=1)
