"""A network as a value: which one, and what its constructor takes."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from gmdist.errors import ConfigError
from gmdist.nets.autoencoder import Autoencoder, AutoencoderConfig
from gmdist.nets.blocks import group_norm_groups
from gmdist.nets.dit import DiT, DiTConfig
from gmdist.nets.unet import UNet, UNetConfig


@dataclass(frozen=True)
class NetworkSpec:
    """A UNet, DiT or autoencoder, by its config's class."""

    config: UNetConfig | DiTConfig | AutoencoderConfig
    in_channels: int  # of an autoencoder: of its images, on both sides
    num_classes: int = 0  # 0: without labels
    out_channels: int | None = None  # of a UNet; None: in_channels
    size: int | None = None  # side of the input: a DiT has it, for others it is what they were trained on, or None
    latent_scale: float | None = None  # of an autoencoder: its latents times this have unit variance; None: unknown
    latent_shift: float | None = None  # of an autoencoder: what is taken from its latents before; None: nothing

    def build(self) -> nn.Module:
        """The network, with freshly drawn weights."""
        if isinstance(self.config, UNetConfig):
            return UNet(self.config, self.in_channels, self.num_classes, self.out_channels)
        if isinstance(self.config, DiTConfig):
            assert self.size is not None
            return DiT(self.config, self.in_channels, self.num_classes, self.size)
        return Autoencoder(self.config, self.in_channels)

    def outline(self) -> nn.Module:
        """The network without memory for weights, for names and shapes."""
        with torch.device("meta"):
            return self.build()

    def norm_groups(self) -> int:
        """The number of groups of every GroupNorm of the network; ConfigError where they differ."""
        norms = [module for module in self.outline().modules() if isinstance(module, nn.GroupNorm)]
        groups = sorted({norm.num_groups for norm in norms})
        if len(groups) > 1:
            widths = sorted({norm.num_channels for norm in norms})
            raise ConfigError(
                f"norm_groups: null; the norms of widths {widths} have {groups} groups, and diffusers has one number "
                f"for all: train it with norm_groups: {group_norm_groups(math.gcd(*widths))} in the network's config"
            )
        return groups[0]
