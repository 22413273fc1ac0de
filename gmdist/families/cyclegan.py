"""CycleGAN: images of two domains into each other, without pairs (Zhu 2017)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.checks import between, nonnegative, one_of
from gmdist.families.family import DIRECTIONS, Batch, Family, Metrics, Phase, Surroundings
from gmdist.families.gan_losses import LOSSES, discriminator_loss, generator_loss, mean_signs
from gmdist.nets import cyclegan
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.cyclegan import Translator, TranslatorConfig
from gmdist.nets.discriminator import PatchDiscriminator, sizes_problem

_DOMAINS = ("a", "b")


@dataclass
class CycleGANConfig:
    """Sizes and loss; the defaults are the paper's, but for the norms of the discriminators, which are of groups."""

    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    discriminator_channels: int = 64  # after the first layer; twice as many after each next, at most 8 times
    discriminator_layers: int = 3  # that halve the image; each adds to what a logit judges: 16, 34, 70, 142 pixels
    loss: str = "least_squares"
    cycle_weight: float = 10.0  # of an image's difference from what comes back
    identity_weight: float = 5.0  # of an image's difference from what is made of it where it is of the target already
    pool_size: int = 50  # translations that a worker keeps of each domain, half of what discriminators see; 0: none

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.translator.problem(image_size):
            return f"translator.{problem}"
        if problem := sizes_problem(self.discriminator_channels, self.discriminator_layers, image_size, "layers"):
            return f"discriminator_{problem}"
        return (
            one_of(LOSSES, loss=self.loss)
            or nonnegative(cycle_weight=self.cycle_weight, identity_weight=self.identity_weight)
            or between(0, 1 << 16, pool_size=self.pool_size)
        )


class CycleGAN(Family):
    """Two generators and two discriminators: two optimizers.

    Both generators minimise, of images a and b (Zhu 2017, Eq. 3 and Sec. 5.2),

        adversarial(a2b(a)) + adversarial(b2a(b))  +  cycle |b2a(a2b(a)) - a|  +  cycle |a2b(b2a(b)) - b|
        +  identity |a2b(b) - b|  +  identity |b2a(a) - a|
    """

    averaged = ("generators",)
    blocks = cyclegan.BLOCKS
    inputs = ("image", "image_b")

    def __init__(self, config: CycleGANConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        channels, size = surroundings.image_channels, surroundings.image_size
        self.generators = nn.ModuleDict({name: Translator(config.translator, channels) for name in DIRECTIONS})
        sizes = channels, config.discriminator_channels, config.discriminator_layers
        self.discriminators = nn.ModuleDict({name: PatchDiscriminator(*sizes) for name in _DOMAINS})
        # The latest translations into each domain, the oldest first; NaN where there is none yet.
        shape = config.pool_size, channels, size, size
        self._pools = {f"pool_{name}": torch.full(shape, torch.nan) for name in _DOMAINS}

    def phases(self) -> list[Phase]:
        """The generators, then the discriminators."""
        return [
            Phase("g", "generators", self.g_loss),
            Phase("d", "discriminators", self.d_loss),
        ]

    def g_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """To be taken for the other domain, to come back, and to leave what is there already."""
        loss = batch["image"].new_zeros(())
        metrics: Metrics = {}
        for direction, image, target in self._both(batch):
            there, back = self.generators[direction], self.generators[_opposite(direction)]
            translated = there(image)
            network = self.discriminators[direction[-1]]
            real = at_least_fp32(network(target)) if self.config.loss == "relativistic" else None
            adversarial = self._whole(generator_loss(self.config.loss, at_least_fp32(network(translated)), real))
            cycle = (back(translated) - image).abs().mean()
            loss = loss + adversarial + self.config.cycle_weight * cycle
            metrics |= {f"{direction}_adversarial": adversarial.detach(), f"{direction}_cycle": cycle.detach()}
            if self.config.identity_weight:
                identity = (there(target) - target).abs().mean()
                loss = loss + self.config.identity_weight * identity
                metrics[f"{direction}_identity"] = identity.detach()
        return loss, {"loss": loss.detach(), **metrics}

    def d_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """Images of each domain against translations into it, of now and of before."""
        loss = batch["image"].new_zeros(())
        metrics: Metrics = {}
        for direction, image, target in self._both(batch):
            with torch.no_grad():
                translated = at_least_fp32(self.generators[direction](image))
                translated = self._pooled(f"pool_{direction[-1]}", translated, batch["key"])
            network = self.discriminators[direction[-1]]
            real, fake = at_least_fp32(network(target)), at_least_fp32(network(translated))
            # Half as strong, that the discriminators learn more slowly (Zhu 2017, App. 7.1).
            loss = loss + 0.5 * self._whole(discriminator_loss(self.config.loss, real, fake))
            real_sign, fake_sign = mean_signs(self.config.loss, real.detach(), fake.detach())
            metrics |= {f"{direction[-1]}_real_sign": real_sign, f"{direction[-1]}_fake_sign": fake_sign}
        return loss, {"loss": loss.detach(), **metrics}

    def translate(self, image: Tensor, direction: str) -> Tensor:
        return at_least_fp32(self.generators[direction](image)).clamp(-1.0, 1.0)

    def preview(self, batch: Batch) -> Tensor:
        """Each image of a beside its translation, and each of b beside its own."""
        pictures = [(image, self.translate(image, direction)) for direction, image, _ in self._both(batch)]
        return torch.cat([part for pair in pictures for part in pair], dim=3)

    def evaluate(self, batch: Batch) -> Metrics:
        """How far held-out images are from what comes back: means over pixels."""
        metrics = {}
        for direction, image, _ in self._both(batch):
            back = self.translate(self.translate(image, direction), _opposite(direction))
            metrics[f"{direction}_cycle"] = (back - image).abs().mean()
        return metrics

    def worker_state(self) -> dict[str, Tensor]:
        return self._pools

    def load_worker_state(self, state: dict[str, Tensor]) -> None:
        self._pools = dict(state)

    def _whole(self, loss: Tensor) -> Tensor:
        """Without the half of least squares in Mao 2017: Zhu 2017 (Sec. 4), whose weights these are, has none."""
        return 2.0 * loss if self.config.loss == "least_squares" else loss

    def _both(self, batch: Batch) -> list[tuple[str, Tensor, Tensor]]:
        """For each direction, the images that it begins with and those of the domain where it ends."""
        a, b = batch["image"], batch["image_b"]
        return [("a2b", a, b), ("b2a", b, a)]

    def _pooled(self, name: str, images: Tensor, keys: Tensor) -> Tensor:
        """The images [N, C, H, W], half of them replaced by older ones, by key; the pool takes in all of them."""
        size = self.config.pool_size
        if not size:
            return images
        pool = self._pools[name].to(images.device)
        older = pool[rng.integers(self.seed, f"{name}/which", keys, size)]
        takes = rng.uniform(self.seed, name, keys) < 0.5
        takes &= older.isfinite().all(dim=(1, 2, 3))  # neither a place that is empty, nor what a bad step has left
        self._pools[name] = torch.cat([pool, images])[-size:]
        return torch.where(takes[:, None, None, None], older, images)


def _opposite(direction: str) -> str:
    return DIRECTIONS[1 - DIRECTIONS.index(direction)]
