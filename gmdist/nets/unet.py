"""The UNet of denoising diffusion: residual blocks under a time and class embedding (Ho 2020, Dhariwal 2021)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.blocks import (
    Downsample,
    ResBlock,
    SelfAttention2d,
    Upsample,
    group_norm,
    timestep_embedding,
    widths_problem,
    zero_init,
)


@dataclass
class UNetConfig:
    """Sizes of the UNet; the defaults are those of DDPM on CIFAR-10 (35,746,307 parameters without classes)."""

    channels: int = 128  # width at full resolution
    multipliers: tuple[int, ...] = (1, 2, 2, 2)  # width of each level / channels; every level but the last halves
    num_res_blocks: int = 2  # a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (1,)  # levels with self-attention after each residual block
    num_heads: int = 1
    dropout: float = 0.0  # above 0, its masks depend on the number of workers

    @property
    def downsampling(self) -> int:
        """Input side / lowest side: the input's side must be a multiple of it."""
        return 2 ** (len(self.multipliers) - 1)

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if problem := widths_problem(self.channels, self.multipliers, self.num_res_blocks):
            return problem
        levels = range(len(self.multipliers))
        if not set(self.attention_levels) <= set(levels):
            return f"attention_levels: {list(self.attention_levels)}; the levels are 0 to {len(levels) - 1}"
        attended = {self.channels * self.multipliers[level] for level in (*self.attention_levels, levels[-1])}
        if self.num_heads < 1 or any(width % self.num_heads for width in attended):
            return f"num_heads: {self.num_heads}; must divide the attended widths {sorted(attended)}"
        if not 0.0 <= self.dropout < 1.0:
            return f"dropout: {self.dropout}; must be at least 0 and below 1"
        return None


class Stage(nn.Module):
    """A residual block, with self-attention after it where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, config: UNetConfig, attend: bool) -> None:
        super().__init__()
        self.residual = ResBlock(in_channels, out_channels, embedding, config.dropout)
        self.attention = SelfAttention2d(out_channels, config.num_heads) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """X [N, C_in, H, W], embedding [N, E] -> [N, C_out, H, W]."""
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """Denoiser of images or latents; `num_classes` adds a class embedding with one more row for "no class"."""

    def __init__(self, config: UNetConfig, in_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.channels = config.channels
        embedding = 4 * config.channels
        self.time = nn.Sequential(nn.Linear(config.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        self.conv_in = nn.Conv2d(in_channels, config.channels, 3, padding=1)

        widths = [config.channels * m for m in config.multipliers]
        width = config.channels
        skips = [width]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(Stage(width, out, embedding, config, level in config.attention_levels))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList(
            [Stage(width, width, embedding, config, True), Stage(width, width, embedding, config, False)]
        )

        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(Stage(width + skips.pop(), out, embedding, config, level in config.attention_levels))
                width = out
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, in_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict eps or v.

        Args:
            x: [N, C, H, W], the noised input.
            timesteps: [N].
            label: int64 [N]; `num_classes` means "no class". None for a network without classes.

        Returns:
            [N, C, H, W], float32.
        """
        embedding = self.time(timestep_embedding(timesteps, self.channels))
        if self.label is not None:
            assert label is not None
            embedding = embedding + self.label(label)
        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = module(h, embedding) if isinstance(module, Stage) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, embedding)
        for module in self.up:
            if isinstance(module, Stage):
                h = module(torch.cat([h, skips.pop()], dim=1), embedding)
            else:
                h = module(h)
        return self.conv_out(F.silu(self.norm_out(h))).float()
