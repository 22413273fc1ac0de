"""The diffusion transformer: patches of a latent under adaptive norms (Peebles 2023)."""

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least
from gmdist.nets.blocks import at_least_fp32, timestep_embedding
from gmdist.nets.products import Conv2d, Linear
from gmdist.nets.transformer import FeedForward, SelfAttention, heads_problem

_FREQUENCIES = 256  # width of the sinusoidal embedding of a timestep
_EPS = 1e-6
_MAX_WIDTH = 1 << 16


@dataclass
class DiTConfig:
    """Sizes of the transformer; the defaults are those of DiT-B."""

    channels: int = 768  # width of a token
    depth: int = 12  # blocks
    num_heads: int = 12
    patch_size: int = 2  # side of the square that becomes a token; divides the input's side
    qk_norm: bool = False  # normalise queries and keys of each head, for high learning rates
    learned_sigma: bool = False  # as many output channels again, for the variance; our losses and samplers use none
    frequency_shift: int = 1  # of the timestep embedding: 1 as in diffusers, 0 as in Peebles' own code
    feed_forward_norm_eps: float = 1e-6  # diffusers' published DiT has 1e-5 there; other norms have 1e-6
    block_embeddings: bool = False  # each block has its own embedding of time and class, as diffusers trains them

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if not 4 <= self.channels <= _MAX_WIDTH or self.channels % 4:
            return f"channels: {self.channels}; must be a multiple of 4, from 4 to {_MAX_WIDTH}"
        if problem := at_least(1, depth=self.depth) or heads_problem(self.channels, self.num_heads):
            return problem
        if problem := at_least(1, patch_size=self.patch_size):
            return problem
        if self.frequency_shift not in (0, 1):
            return f"frequency_shift: {self.frequency_shift}; must be 0 or 1"
        if not 0.0 < self.feed_forward_norm_eps < 1.0:
            return f"feed_forward_norm_eps: {self.feed_forward_norm_eps}; must be above 0 and below 1"
        return None


def dit_small() -> DiTConfig:
    """DiT-S/2."""
    return DiTConfig(channels=384, depth=12, num_heads=6)


def dit_base() -> DiTConfig:
    """DiT-B/2."""
    return DiTConfig(channels=768, depth=12, num_heads=12)


def dit_large() -> DiTConfig:
    """DiT-L/2."""
    return DiTConfig(channels=1024, depth=24, num_heads=16)


def dit_xl() -> DiTConfig:
    """DiT-XL/2."""
    return DiTConfig(channels=1152, depth=28, num_heads=16)


def position_embedding(side: int, channels: int) -> Tensor:
    """Fixed embedding of a square of tokens, rows first: half the channels for the column, half for the row.

    Each half is sines, then cosines, at the frequencies of Vaswani 2017, Sec. 3.5.

    Returns:
        [side * side, channels], float32.
    """
    assert channels % 4 == 0, channels
    exponents = torch.arange(channels // 4, dtype=torch.float64) / (channels // 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10_000.0**-exponents  # [side, channels / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, channels / 2]
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)  # each [side * side, channels / 2]
    return torch.cat([columns, rows], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens [N, L, C] by what their sample says, each [N, C]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, shifted, scaled and gated by the condition; at the start the identity.

    adaLN-Zero (Peebles 2023, Sec. 3.2).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.channels
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=_EPS)
        self.attention = SelfAttention(width, config.num_heads, config.qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=config.feed_forward_norm_eps)
        self.feed_forward = FeedForward(width, approximate="tanh")
        self.modulation = Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [N, L, C], condition [N, C] -> [N, L, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.feed_forward(modulate(self.norm2(x), shift2, scale2))


BLOCKS = (DiTBlock,)  # what families list as `blocks`: compiled, and computed again in the backward, as one


class DiT(nn.Module):
    """Denoiser of square latents of one size; `num_classes` adds a class embedding with one more row for "no class"."""

    positions: Tensor

    def __init__(self, config: DiTConfig, in_channels: int, num_classes: int, size: int) -> None:
        """Draw the weights.

        Args:
            config: the sizes.
            in_channels: of the noised input.
            num_classes: 0 without labels.
            size: side of the input, a multiple of the patch.
        """
        super().__init__()
        assert size % config.patch_size == 0, (size, config.patch_size)
        self.config, self.in_channels, self.size = config, in_channels, size
        width, patch = config.channels, config.patch_size
        self.patches = Conv2d(in_channels, width, patch, stride=patch)
        self.time = _time_layers(width)  # of all blocks, or of the first, and of the output
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        others = range(1, config.depth) if config.block_embeddings else ()
        self.block_times = nn.ModuleList(_time_layers(width) for _ in others)
        self.block_labels = nn.ModuleList(nn.Embedding(num_classes + 1, width) for _ in others if num_classes)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=_EPS)
        self.modulation_out = Linear(width, 2 * width)
        self.out_channels = in_channels * (2 if config.learned_sigma else 1)
        self.out = Linear(width, patch * patch * self.out_channels)
        self.register_buffer("positions", position_embedding(size // patch, width), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            first = name.partition(".")[0]
            if name.endswith(".bias") or "modulation" in name or first == "out":
                nn.init.zeros_(parameter)
            elif first in ("time", "label", "block_times", "block_labels"):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))  # patches too: a linear layer of their pixels

    def forward(self, x: Tensor, timesteps: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict eps, v, or whatever the loss asks for.

        Args:
            x: [N, C, H, W], the noised input; H and W are the size that the network was made for.
            timesteps: [N], fractional values allowed.
            label: int64 [N]; `num_classes` means "no class". For a network with classes, and no other.

        Returns:
            [N, C, H, W], at least fp32. The channels of a learned variance are left out.
        """
        assert x.shape[2] == x.shape[3] == self.size, (x.shape, self.size)
        frequencies = timestep_embedding(timesteps, _FREQUENCIES, frequency_shift=self.config.frequency_shift)
        embeddings = [(self.time, self.label), *zip_longest(self.block_times, self.block_labels)]
        conditions = [_condition(*pair, frequencies.to(x.dtype), label) for pair in embeddings]  # each [N, width]
        # The sum keeps the layout of its first operand, and so do all that follow: channels have to be last in it.
        tokens = self.positions + self.patches(x).flatten(2).transpose(1, 2)  # [N, L, width]
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, conditions[i if self.config.block_embeddings else 0])
        shift_out, scale_out = self.modulation_out(F.silu(conditions[0])).chunk(2, dim=1)
        tokens = self.out(modulate(self.norm_out(tokens), shift_out, scale_out))  # [N, L, patch * patch * channels]
        return at_least_fp32(self._joined(tokens)[:, : self.in_channels])

    def _joined(self, tokens: Tensor) -> Tensor:
        """Tokens [N, L, patch * patch * channels], channels last, -> [N, channels, H, W]."""
        patch, side = self.config.patch_size, math.isqrt(tokens.shape[1])
        patches = tokens.view(-1, side, side, patch, patch, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, self.size, self.size)


def _time_layers(width: int) -> nn.Sequential:
    return nn.Sequential(Linear(_FREQUENCIES, width), nn.SiLU(), Linear(width, width))


def _condition(time: nn.Module, table: nn.Module | None, frequencies: Tensor, label: Tensor | None) -> Tensor:
    """Frequencies [N, 256] and, where there is a table of classes, label [N] -> [N, width]."""
    if table is None:
        return time(frequencies)
    assert label is not None
    return time(frequencies) + table(label)
