"""DCGAN's networks (Radford 2016), told of classes by concatenation (Mirza 2014) or projection (Miyato 2018)."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.batch_norm import BatchNorm

CONDITIONINGS = ("concatenation", "projection")
_FIRST_SIDE = 4


@dataclass
class DCGANConfig:
    """Sizes of both networks; the defaults are the paper's."""

    latent_channels: int = 100  # standard normal numbers that an image is made from
    generator_channels: int = 128  # of the features before the image; twice as many at each half of the sides
    discriminator_channels: int = 128  # of the features of half the image's sides, and so on
    max_channels: int = 1024

    def problem(self, image_size: int) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        for key in ("latent_channels", "generator_channels", "discriminator_channels", "max_channels"):
            if not 1 <= getattr(self, key) <= 1 << 16:
                return f"{key}: {getattr(self, key)}; must be from 1 to {1 << 16}"
        if image_size < 2 * _FIRST_SIDE or image_size & (image_size - 1):
            return f"generator_channels: makes images whose sides are powers of 2 from 8 on, not {image_size}"
        return None

    def widths(self, first: int, image_size: int) -> list[int]:
        """Channels at each half of the image's sides, down to 4."""
        count = int(math.log2(image_size // _FIRST_SIDE))
        return [min(first << i, self.max_channels) for i in range(count)]


class DCGANGenerator(nn.Module):
    """Latents to images: transposed convolutions that double the sides, batch normalization, ReLU, tanh."""

    def __init__(self, config: DCGANConfig, image_size: int, image_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, config.latent_channels) if num_classes else None
        widths = config.widths(config.generator_channels, image_size)[::-1]
        latent = config.latent_channels * (2 if num_classes else 1)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, widths[0], _FIRST_SIDE, bias=False),
            BatchNorm(widths[0]),
            nn.ReLU(),
        ]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), BatchNorm(after), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], image_channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        _initialize(self)

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """[N, Z], int64 [N] -> [N, C, H, W] in [-1, 1]."""
        return self.layers(self.told(latent, label)[:, :, None, None])

    def told(self, latent: Tensor, label: Tensor | None) -> Tensor:
        """The first layer's input: the latent, and beside it the embedding of the class where there are some."""
        if self.embedding is None:
            return latent
        assert label is not None
        return torch.cat([latent, self.embedding(label)], dim=1)


class DCGANDiscriminator(nn.Module):
    """Images to logits: convolutions that halve the sides, batch normalization but in the first, leaky ReLU."""

    def __init__(
        self,
        config: DCGANConfig,
        image_size: int,
        image_channels: int,
        num_classes: int = 0,
        conditioning: str = "projection",
    ) -> None:
        """`conditioning`: of CONDITIONINGS, how classes are told: as more channels of the image, or in the logit."""
        super().__init__()
        self.num_classes, self.concatenates = num_classes, bool(num_classes) and conditioning == "concatenation"
        widths = config.widths(config.discriminator_channels, image_size)
        before = image_channels + (num_classes if self.concatenates else 0)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            layers.append(nn.Conv2d(before, width, 4, 2, 1, bias=i == 0))
            layers += [BatchNorm(width)] if i else []
            layers.append(nn.LeakyReLU(0.2))
            before = width
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(before * _FIRST_SIDE**2, 1)
        projects = bool(num_classes) and not self.concatenates
        self.embedding = nn.Embedding(num_classes, before * _FIRST_SIDE**2) if projects else None
        _initialize(self)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """[N, C, H, W], int64 [N] -> logits [N, 1]."""
        if self.concatenates:
            assert label is not None
            planes = F.one_hot(label, self.num_classes).to(image.dtype)[:, :, None, None]
            image = torch.cat([image, planes.expand(-1, -1, *image.shape[2:])], dim=1)
        features = self.layers(image).flatten(1)
        logits = self.out(features)
        if self.embedding is not None:
            assert label is not None
            logits = logits + (self.embedding(label) * features).sum(dim=1, keepdim=True)
        return logits


def _initialize(network: nn.Module) -> None:
    """Weights of standard deviation 0.02 (Radford 2016, Sec. 4)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.02)
