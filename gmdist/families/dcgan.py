"""DCGAN: convolutions throughout, batch normalization in both networks (Radford 2016)."""

from dataclasses import dataclass, field

from gmdist.families.family import Surroundings
from gmdist.families.gan import GAN, GANConfig
from gmdist.nets import dcgan
from gmdist.nets.dcgan import DCGANDiscriminator, DCGANGenerator


@dataclass
class DCGANConfig(GANConfig):
    """Sizes and objective."""

    networks: dcgan.DCGANConfig = field(default_factory=dcgan.DCGANConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.networks.problem(image_size):
            return f"networks.{problem}"
        return super().problem(image_size)


class DCGAN(GAN):
    """It is told no classes. Its weights are not averaged: the statistics of batches belong to the latest ones."""

    averaged = ()

    def __init__(self, config: DCGANConfig, surroundings: Surroundings) -> None:
        shape = surroundings.image_size, surroundings.image_channels
        super().__init__(
            config,
            DCGANGenerator(config.networks, *shape),
            DCGANDiscriminator(config.networks, *shape),
            config.networks.latent_channels,
            surroundings,
        )
