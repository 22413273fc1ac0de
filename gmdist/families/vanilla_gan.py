"""The first GAN: two plain networks (Goodfellow 2014)."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from gmdist.checks import between
from gmdist.families.family import Surroundings
from gmdist.families.gan import GAN, GANConfig, ObjectiveConfig


@dataclass
class VanillaGANConfig(GANConfig):
    """Sizes of both networks, whose hidden layers have one width."""

    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig("non_saturating"))
    latent_channels: int = 64  # standard normal numbers that an image is made from
    hidden_channels: int = 512  # of both networks
    depth: int = 3  # hidden layers

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        return between(
            1, 1 << 16, latent_channels=self.latent_channels, hidden_channels=self.hidden_channels, depth=self.depth
        ) or super().problem(image_size)


class VanillaGAN(GAN):
    """It is told no classes."""

    def __init__(self, config: VanillaGANConfig, surroundings: Surroundings) -> None:
        shape = surroundings.image_channels, surroundings.image_size, surroundings.image_size
        pixels = surroundings.image_channels * surroundings.image_size**2
        generator = nn.Sequential(*_layers(config.latent_channels, pixels, config), nn.Tanh(), nn.Unflatten(1, shape))
        discriminator = nn.Sequential(nn.Flatten(), *_layers(pixels, 1, config))
        super().__init__(config, _Told(generator), _Told(discriminator), config.latent_channels, surroundings)


class _Told(nn.Module):
    """A network that does without the label that others get."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        """What the layers make of x."""
        return self.layers(x)


def _layers(in_channels: int, out_channels: int, config: VanillaGANConfig) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(config.depth):
        layers += [nn.Linear(config.hidden_channels if i else in_channels, config.hidden_channels), nn.LeakyReLU(0.2)]
    return [*layers, nn.Linear(config.hidden_channels, out_channels)]
