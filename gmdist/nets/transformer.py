"""What transformers are built from: attention to tokens and to a context, feed-forward, both over a feature map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.blocks import attention, group_norm, split_heads, zero_init
from gmdist.nets.products import Conv2d, Linear


def heads_problem(channels: int, num_heads: int) -> str | None:
    """Why tokens of this width cannot have as many heads, as "key: value; what is valid"; None if they can."""
    if channels < 1:
        return f"channels: {channels}; must be at least 1"
    if num_heads < 1 or channels % num_heads:
        return f"num_heads: {num_heads}; must divide the width {channels}"
    return None


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other (Vaswani 2017, Sec. 3.2.2), one product for all three projections.

    `qk_norm` normalises queries and keys of each head (Dehghani 2023, Sec. 2): logits stay bounded at high rates.
    """

    def __init__(self, channels: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        assert channels % num_heads == 0, (channels, num_heads)
        self.num_heads = num_heads
        self.qkv = Linear(channels, 3 * channels)
        self.query_norm = HeadNorm(channels // num_heads) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(channels // num_heads) if qk_norm else nn.Identity()
        self.out = Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [N, L, C] -> [N, L, C]; mask bool [N, L], True for tokens that are attended to."""
        query, key, value = split_heads(self.qkv(x), self.num_heads)
        return self.out(attention(self.query_norm(query), self.key_norm(key), value, mask))


class Attention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves where it is None; no bias but the output's."""

    def __init__(self, channels: int, num_heads: int, context_channels: int | None = None) -> None:
        super().__init__()
        assert channels % num_heads == 0, (channels, num_heads)
        self.num_heads = num_heads
        self.query = Linear(channels, channels, bias=False)
        self.key = Linear(context_channels or channels, channels, bias=False)
        self.value = Linear(context_channels or channels, channels, bias=False)
        self.out = Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens [N, L, C], context [N, M, D] -> [N, L, C]; mask bool [N, M], True for what is attended to."""
        source = x if context is None else context
        projected = (self.query(x), self.key(source), self.value(source))
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        return self.out(attention(query, key, value, mask))


class HeadNorm(nn.Module):
    """Root-mean-square norm of a head's features with a learned gain (Zhang 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, heads, L, C] -> [N, heads, L, C], of the same type."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6).to(x.dtype)


class GatedFeedForward(nn.Module):
    """Two linear layers with a gated GELU between them, four times as wide (GEGLU, Shazeer 2020, Eq. 6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = Linear(channels, 8 * channels)
        self.down = Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, four times as wide; `approximate` is that of torch's GELU."""

    def __init__(self, channels: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.up = Linear(channels, 4 * channels)
        self.down = Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each residual after a norm (Rombach 2022, App. E.2.1)."""

    def __init__(self, channels: int, num_heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, num_heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = GatedFeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [N, L, C], context [N, M, D], mask bool [N, M] or None -> [N, L, C]."""
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


class Transformer2d(nn.Module):
    """Transformer blocks over the pixels of a feature map, as one residual branch.

    `linear_projections`: its first and last layer are linear (Stable Diffusion 2, SDXL), not 1x1 convolutions. They
    compute the same; their weights differ in shape.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        context_channels: int,
        linear_projections: bool = False,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.linear_projections = linear_projections
        self.norm = group_norm(channels, norm_groups)
        self.project_in = Linear(channels, channels) if linear_projections else Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(TransformerBlock(channels, num_heads, context_channels) for _ in range(depth))
        self.project_out = zero_init(
            Linear(channels, channels) if linear_projections else Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feature map [N, C, H, W], context [N, M, D], mask bool [N, M] or None -> [N, C, H, W]."""
        height, width = x.shape[2:]
        h = self.norm(x)
        if self.linear_projections:
            tokens = self.project_in(h.flatten(2).transpose(1, 2))  # [N, HW, C]
        else:
            tokens = self.project_in(h).flatten(2).transpose(1, 2)
        # Sums keep the layout of their first operand: tokens of strided channels would be copied before every norm.
        tokens = tokens.contiguous()
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        if self.linear_projections:
            return x + self.project_out(tokens).transpose(1, 2).unflatten(2, (height, width))
        return x + self.project_out(tokens.transpose(1, 2).unflatten(2, (height, width)))
