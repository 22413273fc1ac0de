"""A DCGAN that is told classes, by concatenation (Mirza 2014) or by projection (Miyato 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gmdist.checks import one_of
from gmdist.errors import ConfigError
from gmdist.families.dcgan import DCGANConfig
from gmdist.families.family import Condition, Surroundings, conditioned_labels
from gmdist.families.gan import GAN
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.dcgan import CONDITIONINGS, DCGANDiscriminator, DCGANGenerator


@dataclass
class ConditionalGANConfig(DCGANConfig):
    """Sizes and objective, and how the discriminator is told."""

    # concatenation: a plane for each class beside the image; projection: the logit grows with the class's embedding
    conditioning: str = "projection"

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        return one_of(CONDITIONINGS, conditioning=self.conditioning) or super().problem(image_size)


class ConditionalGAN(GAN):
    """The generator gets an embedding of the class beside the latent. Nothing is averaged, as in `DCGAN`."""

    averaged = ()

    generator: DCGANGenerator

    def __init__(self, config: ConditionalGANConfig, surroundings: Surroundings) -> None:
        classes = surroundings.num_classes
        if not classes:
            raise ConfigError("family.name: 'conditional_gan'; needs data with labels: set data.num_classes")
        shape = surroundings.image_size, surroundings.image_channels, classes
        super().__init__(
            config,
            DCGANGenerator(config.networks, *shape),
            DCGANDiscriminator(config.networks, *shape, config.conditioning),
            config.networks.latent_channels,
            surroundings,
            classes,
        )

    def drawn_latents(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """With the class's embedding behind the latent, so that there is a way between classes too."""
        label = conditioned_labels(keys, condition, self.num_classes)
        return self.generator.told(super().drawn_latents(keys), label)

    def from_latents(self, latents: Tensor) -> Tensor:
        return at_least_fp32(self.generator.layers(latents[:, :, None, None])).clamp(-1.0, 1.0)

    def between(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        size = self.latent_channels
        classes = torch.lerp(one[:, size:], other[:, size:], share)
        return torch.cat([super().between(one[:, :size], other[:, :size], share), classes], dim=1)
