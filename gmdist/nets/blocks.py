"""The blocks that convolutional networks are built from: residual, attention, resampling, time embedding."""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least
from gmdist.nets import products
from gmdist.nets.products import AttentionInBf16, Conv2d, Linear

_MAX_WIDTH = 1 << 16
_MOST_WEIGHTS = 1 << 25  # that attention may keep on a processor, 64 MiB: beyond, memory matters more than time

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


def group_norm(channels: int, groups: int | None = None, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm; None: the field's 32 groups, fewer where they would be small or not divide the channels."""
    return nn.GroupNorm(groups or group_norm_groups(channels), channels, eps=eps)


def group_norm_groups(channels: int) -> int:
    """The largest number of groups, at most 32, that divides the channels and leaves each 4 or more."""
    return next(groups for groups in range(min(32, max(channels // 4, 1)), 0, -1) if channels % groups == 0)


def widths_problem(channels: int, multipliers: tuple[int, ...], num_res_blocks: int) -> str | None:
    """Why a network of these widths cannot be, as "key: value; what is valid"; None if it can."""
    if not 2 <= channels <= _MAX_WIDTH or channels % 2:
        return f"channels: {channels}; must be even, from 2 to {_MAX_WIDTH}"
    if not multipliers or not all(1 <= multiplier <= _MAX_WIDTH // channels for multiplier in multipliers):
        return f"multipliers: {list(multipliers)}; must be one or more numbers from 1 to {_MAX_WIDTH // channels}"
    return at_least(1, num_res_blocks=num_res_blocks)


def norm_groups_problem(norm_groups: int | None, widths: list[int]) -> str | None:
    """Why norms of these widths cannot have so many groups, as "key: value; what is valid"; None if they can."""
    if norm_groups is not None and (norm_groups < 1 or any(width % norm_groups for width in widths)):
        fitting = group_norm_groups(math.gcd(*widths))
        return f"norm_groups: {norm_groups}; must divide the widths {widths}, as {fitting} does"
    return None


def at_least_fp32(x: Tensor) -> Tensor:
    """A tensor in fp32, or as it is in float64: norms and sums of bf16 would be rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_init(module: Layer) -> Layer:
    """Zero the weights of a residual branch's last layer, so that the branch starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention (Vaswani 2017, Eq. 1), its heads joined again.

    Args:
        query: [N, heads, L, D].
        key, value: [N, heads, M, D].
        mask: bool [N, M], True for what is attended to, at least one of each sample; None: everything.
        is_causal: each query attends to keys up to its own place; without `mask`, and L is M.

    Returns:
        [N, L, heads D], of the query's type.
    """
    seen = None if mask is None else mask[:, None, None, :]  # [N, 1, 1, M]
    is_bf16 = query.dtype == key.dtype == value.dtype == torch.bfloat16
    is_training = query.is_cpu and is_bf16 and query.requires_grad
    if is_training and not products.HAS_BF16:
        with torch.autocast("cpu", enabled=False):
            exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), seen, is_causal=is_causal)
        heads = exact.to(query.dtype)
    elif is_training and query[..., 0].numel() * key.shape[2] <= _MOST_WEIGHTS:
        if is_causal:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        heads = AttentionInBf16.apply(query, key, value, seen)
    else:
        heads = F.scaled_dot_product_attention(query, key, value, seen, is_causal=is_causal)
    return heads.transpose(1, 2).flatten(2)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projected tokens [N, L, 3 heads D] -> queries, keys and values, each [N, heads, L, D]."""
    # Taken apart along their own dimension, so that the backward puts the three gradients together in one copy.
    query, key, value = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def timestep_embedding(
    timesteps: Tensor,
    channels: int,
    frequency_shift: int = 0,
    sines_first: bool = False,
) -> Tensor:
    """Sinusoidal embedding (Ho 2020, Sec. B; frequencies as in Vaswani 2017, Sec. 3.5).

    Args:
        timesteps: [N], fractional values allowed.
        channels: width of the embedding, even.
        frequency_shift: 0: the longest period, 2 pi times 10,000 timesteps, lies one step beyond the last frequency; 1:
            it is the last one.
        sines_first: false: cosines come first.

    Returns:
        [N, channels], float32.
    """
    assert channels % 2 == 0, channels
    half = channels // 2
    # The order of operations is that of the published networks: another moves the result by 6e-5 at timestep 1000.
    exponents = -math.log(10_000.0) * torch.arange(half, device=timesteps.device, dtype=torch.float32)
    frequencies = torch.exp(exponents / (half - frequency_shift))
    angles = timesteps.float()[:, None] * frequencies  # [N, half]
    parts = (angles.sin(), angles.cos()) if sines_first else (angles.cos(), angles.sin())
    return torch.cat(parts, dim=1)


class ResBlock(nn.Module):
    """GroupNorm - SiLU - conv, twice, with an optional embedding added in between (Ho 2020, App. B)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None = None,
        dropout: float = 0.0,
        norm_groups: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups, norm_eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = Linear(embedding_channels, out_channels) if embedding_channels else None
        self.norm2 = group_norm(out_channels, norm_groups, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """X [N, C_in, H, W], embedding [N, E] or None -> [N, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.embedding is not None:
            assert embedding is not None
            h = h + self.embedding(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class SelfAttention2d(nn.Module):
    """Residual self-attention over the pixels of a feature map."""

    def __init__(
        self, channels: int, num_heads: int = 1, norm_groups: int | None = None, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        assert channels % num_heads == 0, (channels, num_heads)
        self.num_heads = num_heads
        self.norm = group_norm(channels, norm_groups, norm_eps)
        self.qkv = Linear(channels, 3 * channels)
        self.out = zero_init(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        attended = self.out(attention(*split_heads(self.qkv(tokens), self.num_heads)))
        return x + attended.transpose(1, 2).view(n, c, height, width)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution.

    `asymmetric` pads right and below only, as DDPM's UNets and the latent diffusion first stages do; others pad all
    sides.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution (Odena 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
