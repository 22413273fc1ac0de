"""Convolutional encoder and decoder of a KL-regularised autoencoder (Rombach 2022, App. G)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least
from gmdist.nets.blocks import (
    Downsample,
    ResBlock,
    SelfAttention2d,
    Upsample,
    at_least_fp32,
    group_norm,
    norm_groups_problem,
    widths_problem,
)
from gmdist.nets.gaussian import LOGVAR_RANGE
from gmdist.nets.products import Conv2d


@dataclass
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are those of Stable Diffusion's kl-f8 (83,653,863 parameters).

    The number of levels sets the downsampling. At 128 channels (Rombach 2022, Tab. 8, and after):

        f2   multipliers (1, 2)           latent_channels 2
        f4   multipliers (1, 2, 4)        latent_channels 3
        f8   multipliers (1, 2, 4, 4)     latent_channels 4, or 16 without quant_convs (83,819,683 parameters)
        f16  multipliers (1, 1, 2, 2, 4)  latent_channels 16
    """

    channels: int = 128  # width at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # width of each level / channels; every level but the last halves
    num_res_blocks: int = 2  # a level of the encoder; the decoder has one more
    latent_channels: int = 4
    quant_convs: bool = True  # 1x1 convolutions on both sides of the latent; the 16-channel first stages have none
    norm_groups: int | None = None  # None: at most 32, as many as divide a width and leave each 4 channels or more

    @property
    def downsampling(self) -> int:
        """Image side / latent side."""
        return 2 ** (len(self.multipliers) - 1)

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        return (
            at_least(1, latent_channels=self.latent_channels)
            or widths_problem(self.channels, self.multipliers, self.num_res_blocks)
            or norm_groups_problem(self.norm_groups, sorted({self.channels * m for m in self.multipliers}))
        )


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int, norm_groups: int | None) -> None:
        super().__init__()
        self.before = ResBlock(channels, channels, norm_groups=norm_groups)
        self.attention = SelfAttention2d(channels, norm_groups=norm_groups)
        self.after = ResBlock(channels, channels, norm_groups=norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, h, w]."""
        return self.after(self.attention(self.before(x)))


class Encoder(nn.Module):
    """Image to the mean and log-variance of its latent."""

    def __init__(self, config: AutoencoderConfig, image_channels: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = Conv2d(image_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            blocks: list[nn.Module] = []
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(width, out, norm_groups=config.norm_groups))
                width = out
            if level < len(widths) - 1:
                blocks.append(Downsample(width, asymmetric=True))
            self.levels.append(nn.Sequential(*blocks))
        self.middle = Middle(width, config.norm_groups)
        self.norm_out = group_norm(width, config.norm_groups)
        self.conv_out = Conv2d(width, 2 * config.latent_channels, 3, padding=1)
        width = 2 * config.latent_channels
        self.quant = Conv2d(width, width, 1) if config.quant_convs else nn.Identity()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [N, C, H, W] -> mean and log-variance, each [N, Z, h, w], at least fp32."""
        h = self.conv_in(image)
        for level in self.levels:
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(self.middle(h))))
        mean, logvar = at_least_fp32(self.quant(h)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)


class Decoder(nn.Module):
    """Latent to image."""

    def __init__(self, config: AutoencoderConfig, image_channels: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        width = config.latent_channels
        self.quant = Conv2d(width, width, 1) if config.quant_convs else nn.Identity()
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], config.norm_groups)
        self.levels = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            blocks: list[nn.Module] = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResBlock(width, out, norm_groups=config.norm_groups))
                width = out
            if level < len(widths) - 1:
                blocks.append(Upsample(width))
            self.levels.append(nn.Sequential(*blocks))
        self.norm_out = group_norm(width, config.norm_groups)
        self.conv_out = Conv2d(width, image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent [N, Z, h, w] -> image [N, C, H, W], unbounded, at least fp32."""
        h = self.middle(self.conv_in(self.quant(latent)))
        for level in self.levels:
            h = level(h)
        return at_least_fp32(self.conv_out(F.silu(self.norm_out(h))))


class Autoencoder(nn.Module):
    """Encoder and decoder in one network, so that one optimizer trains both.

    `learned_logvar` adds `logvar`, the log-scale of the reconstruction's likelihood. It is [1], as ZeRO stage 3 cannot
    share out a scalar.
    """

    def __init__(self, config: AutoencoderConfig, image_channels: int, learned_logvar: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder(config, image_channels)
        self.decoder = Decoder(config, image_channels)
        self.logvar = nn.Parameter(torch.zeros(1)) if learned_logvar else None

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [N, C, H, W] in [-1, 1] -> mean and log-variance of the latent, each [N, Z, h, w]."""
        return self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [N, Z, h, w] -> image [N, C, H, W], unbounded."""
        return self.decoder(latent)
