"""What GANs share: a generator and a discriminator, their losses and penalties, and what shows how they do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.checks import at_least, nonnegative, one_of
from gmdist.families.augmentation import Augmentation, AugmentConfig
from gmdist.families.family import (
    Batch,
    Condition,
    Family,
    Metrics,
    Phase,
    Surroundings,
    between_gaussians,
    conditioned_labels,
)
from gmdist.families.gan_losses import (
    COMPARING,
    LOSSES,
    discriminator_loss,
    generator_loss,
    interpolation_penalty,
    mean_signs,
    squared_gradients,
    undecided,
)
from gmdist.nets.blocks import at_least_fp32

_UNDECIDED = 0.05  # a share of logits with the wrong sign that is still a contest
_SMALL_SPREAD = 0.3  # of generated images, beside that of real ones
_SAME = 0.05  # times as far apart as real images are: the same image, but for noise
_MANY_REPEATED = 0.5  # of generated images
_COVERED = 0.99  # of the classes: one of a hundred may be missing
_NO_DISTANCE = 1e-9  # between images: what rounding leaves


@dataclass
class ObjectiveConfig:
    """What generator and discriminator minimise."""

    loss: str = "non_saturating"  # minimax, non_saturating, hinge, least_squares, wasserstein or relativistic
    r1_gamma: float = 0.0  # weight of the squared gradient at real images; 0: none
    r2_gamma: float = 0.0  # the same at generated ones
    interpolation_weight: float = 0.0  # of (|gradient| - 1)^2 between both; 10 with wasserstein; 0: none
    penalty_every: int = 1  # steps between updates by R1 and R2, each so many times as strong

    @property
    def penalizes(self) -> bool:
        """Whether there is an R1 or an R2."""
        return bool(self.r1_gamma or self.r2_gamma)

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        return (
            one_of(LOSSES, loss=self.loss)
            or nonnegative(r1_gamma=self.r1_gamma, r2_gamma=self.r2_gamma)
            or nonnegative(interpolation_weight=self.interpolation_weight)
            or at_least(1, penalty_every=self.penalty_every)
        )


@dataclass
class GANConfig:
    """What every GAN can be told."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        for key in ("objective", "augmentation"):
            if problem := getattr(self, key).problem():
                return f"{key}.{problem}"
        if self.augmentation.kind == "ada" and image_size < 2:
            return f"augmentation.kind: 'ada'; moves images of 2 pixels and more, and data.image_size is {image_size}"
        if self.augmentation.adapts and self.objective.loss in COMPARING:
            return (
                f"augmentation.p: null; with objective.loss '{self.objective.loss}' the logits of real images alone "
                "say nothing that it could follow: set it to a number from 0 to 1"
            )
        return None


class GAN(Family):
    """A generator of images from latents, and a discriminator of real and generated ones: two optimizers.

    Both learn from the same samples: of each, its number is the key of a latent, and its class is that of the image
    generated beside it.
    """

    averaged: tuple[str, ...] = ("generator",)

    def __init__(
        self,
        config: GANConfig,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_channels: int,
        surroundings: Surroundings,
        num_classes: int = 0,
    ) -> None:
        """The generator takes latents and labels, the discriminator images and labels; no labels without classes."""
        super().__init__()
        self.objective, self.seed = config.objective, surroundings.seed
        self.latent_channels, self.num_classes = latent_channels, num_classes
        if num_classes:
            self.inputs, self.conditions = ("image", "label"), ("label",)
        self.generator, self.discriminator = generator, discriminator
        self.augmentation = Augmentation(config.augmentation, surroundings.seed)

    def phases(self) -> list[Phase]:
        """The discriminator, its penalty where that comes less often, and the generator."""
        at_once = self.objective.penalizes and self.objective.penalty_every == 1
        differentiates = at_once or self.objective.interpolation_weight > 0.0
        phases = [Phase("d", "discriminator", self.d_loss, higher_order=differentiates)]
        if self.objective.penalizes and not at_once:
            every = self.objective.penalty_every
            phases.append(Phase("d_penalty", "discriminator", self.d_penalty, every, higher_order=True))
        return [*phases, Phase("g", "generator", self.g_loss)]

    def generate(self, keys: Tensor, label: Tensor | None, purpose: str) -> Tensor:
        """Images [N, C, H, W], of latents for int64 keys [N]; another purpose, other images."""
        latent = rng.normal(self.seed, f"latent/{purpose}", keys, (self.latent_channels,))
        return at_least_fp32(self.generator(latent, label))

    def logits(self, image: Tensor, label: Tensor | None, keys: Tensor, purpose: str) -> Tensor:
        """Logits [N, ...], at least fp32, of images as the augmentation changes them."""
        image = self.augmentation(image, keys, f"augment/{purpose}")
        return at_least_fp32(self.discriminator(image, label))

    def d_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """Real images against generated ones, through which no gradient goes."""
        keys, image, label = batch["key"], batch["image"], self._label(batch)
        with torch.no_grad():
            generated = self.generate(keys, label, "d")
        fake = self.logits(generated, label, keys, "d/fake")
        real = self.logits(image, label, keys, "d/real")
        self.augmentation.observe(real - undecided(self.objective.loss))
        loss = discriminator_loss(self.objective.loss, real, fake)
        real_sign, fake_sign = mean_signs(self.objective.loss, real.detach(), fake.detach())
        metrics = {"real_sign": real_sign, "fake_sign": fake_sign}
        if self.objective.interpolation_weight:
            share = rng.uniform(self.seed, "interpolation", keys)
            penalty = interpolation_penalty(
                lambda points: self.logits(points, label, keys, "d/real"), image, generated, share
            )
            loss = loss + self.objective.interpolation_weight * penalty
            metrics["interpolation"] = penalty.detach()
        if self.objective.penalizes and self.objective.penalty_every == 1:
            penalty, found = self.d_penalty(batch, seen)
            loss, metrics = loss + penalty, metrics | found | {"penalty": penalty.detach()}
        return loss, {**metrics, "loss": loss.detach()}

    def d_penalty(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """R1 at real images, R2 at generated ones (Mescheder 2018, Eq. 9 and 10)."""
        keys, label = batch["key"], self._label(batch)
        terms, metrics = [], {}
        if self.objective.r1_gamma:
            real = squared_gradients(lambda image: self.logits(image, label, keys, "r1"), batch["image"])
            terms.append(0.5 * self.objective.r1_gamma * real[0].mean() + 0.0 * real[1].mean())
            metrics["r1"] = real[0].detach().mean()
        if self.objective.r2_gamma:
            with torch.no_grad():
                generated = self.generate(keys, label, "r2")
            fake = squared_gradients(lambda image: self.logits(image, label, keys, "r2"), generated)
            terms.append(0.5 * self.objective.r2_gamma * fake[0].mean() + 0.0 * fake[1].mean())
            metrics["r2"] = fake[0].detach().mean()
        # The logits themselves count nothing, and let a gradient of zero reach every parameter, as ZeRO asks.
        loss = torch.stack(terms).sum()
        return loss, {"loss": loss.detach(), **metrics}

    def g_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """That the discriminator takes generated images for real ones."""
        keys, label = batch["key"], self._label(batch)
        fake = self.logits(self.generate(keys, label, "g"), label, keys, "g/fake")
        real = None
        if self.objective.loss == "relativistic":
            with torch.no_grad():
                real = self.logits(batch["image"], label, keys, "g/real")
        loss = generator_loss(self.objective.loss, fake, real)
        return loss, {"loss": loss.detach()}

    def after_step(self, seen: int) -> Metrics:
        """The augmentation's strength moves on."""
        return self.augmentation.update()

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        label = conditioned_labels(keys, condition, self.num_classes)
        return self.generate(keys, label, "sample").clamp(-1.0, 1.0)

    def drawn_latents(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        return rng.normal(self.seed, "latent/sample", keys, (self.latent_channels,))

    def from_latents(self, latents: Tensor) -> Tensor:
        return at_least_fp32(self.generator(latents, None)).clamp(-1.0, 1.0)

    def between(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        return between_gaussians(one, other, share)

    def evaluate(self, batch: Batch) -> Metrics:
        """How the discriminator does with held-out images and generated ones, and how far apart each of them are.

        Means over images: signs of logits, the images themselves and their squares, and whether the batch has the same
        generated image again.
        """
        image, label = batch["image"], self._label(batch)
        generated = self.sample(batch["key"], None if label is None else Condition(label))
        logits = (at_least_fp32(self.discriminator(of, label)) for of in (image, generated))
        real_sign, fake_sign = mean_signs(self.objective.loss, *logits)
        apart = torch.cdist(generated.flatten(1), generated.flatten(1)).square() / generated[0].numel()
        apart.fill_diagonal_(math.inf)
        # Of pairs of two images: the means count each with itself, too.
        real_distance = _distance(image.square().mean(), image.mean(dim=0)) * len(image) / max(len(image) - 1, 1)
        repeated = apart.amin(dim=1) < _SAME * real_distance
        return {
            "real_sign": real_sign,
            "fake_sign": fake_sign,
            "square": generated.double().square().mean(),
            "mean": generated.double().mean(dim=0),
            "real_square": image.double().square().mean(),
            "real_mean": image.double().mean(dim=0),
            "repeated": repeated.double().mean(),
        }

    def summarize(self, means: dict[str, Tensor]) -> dict[str, float]:
        """The signs; and `spread`, how far generated images are apart, beside real ones."""
        signs = {name: means[name] for name in ("real_sign", "fake_sign", "repeated")}
        distance, real = (_distance(means[f"{of}square"], means[f"{of}mean"]).item() for of in ("", "real_"))
        spread = distance / real if real > _NO_DISTANCE else math.nan  # of one image alone, or equal ones
        return super().summarize(signs) | {"spread": spread}

    def concerns(self, found: Mapping[str, float]) -> list[str]:
        concerns = []
        right = found.get("real_sign", 0.0), -found.get("fake_sign", 0.0)
        if min(right) > 1.0 - 2.0 * _UNDECIDED:
            concerns.append(
                "the discriminator tells nearly all held-out images from generated ones: the generator may learn little"
                " from it; a larger penalty, or a lower optim.discriminator.lr, would hold it back"
            )
        if right[0] < -1.0 + 2.0 * _UNDECIDED:
            concerns.append(
                "the discriminator takes nearly all held-out images for generated ones: it knows its training images by"
                " heart; family.augmentation.kind 'ada' is made against that"
            )
        if found.get("spread", 1.0) < _SMALL_SPREAD:
            concerns.append(
                f"generated images are {found['spread']:.2f} times as far apart as real ones: the generator makes few "
                "kinds of image"
            )
        if found.get("repeated", 0.0) > _MANY_REPEATED:
            concerns.append(
                f"{found['repeated']:.0%} of generated images come more than once among few: the generator makes few "
                "images, however different they are"
            )
        if found.get("class_coverage", 1.0) < _COVERED:
            concerns.append(f"generated images show {found['class_coverage']:.0%} of the classes")
        return concerns

    def _label(self, batch: Batch) -> Tensor | None:
        """The classes of a batch, int64 [N]; None where nothing is told of them."""
        return batch["label"] if self.num_classes else None


def _distance(square: Tensor, mean: Tensor) -> Tensor:
    """The mean squared difference of two images, by the means of all images' squares and of themselves [C, H, W]."""
    return 2.0 * (square - mean.square().mean())
