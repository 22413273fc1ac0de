"""A vision transformer as encoder and decoder of image patches (Yu 2022, "Vector-quantized image modeling")."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least, between
from gmdist.nets.blocks import attention, split_heads, timestep_embedding
from gmdist.nets.products import Conv2d, Linear
from gmdist.nets.transformer import heads_problem

_MAX_WIDTH = 1 << 14


@dataclass
class ViTConfig:
    """Sizes of one half; small 512, 8, 8, 2048, base 768, 12, 12, 3072, large 1280, 32, 16, 5120."""

    channels: int = 512  # width of a token
    depth: int = 8  # blocks
    num_heads: int = 8
    hidden_channels: int = 2048  # width of the feed-forward
    head_channels: int | None = 64  # of queries, keys and values; None: channels / num_heads

    @property
    def attention_channels(self) -> int:
        """Width of all heads together: in the published large decoder narrower than its tokens."""
        return self.num_heads * self.head_channels if self.head_channels else self.channels

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if not 4 <= self.channels <= _MAX_WIDTH or self.channels % 4:
            return f"channels: {self.channels}; must be divisible by 4, from 4 to {_MAX_WIDTH}"
        if problem := at_least(1, num_heads=self.num_heads):
            return problem
        if self.head_channels is not None and self.head_channels < 1:
            return f"head_channels: {self.head_channels}; must be at least 1, or null for channels / num_heads"
        if self.head_channels is None and (problem := heads_problem(self.channels, self.num_heads)):
            return problem
        return at_least(1, depth=self.depth) or between(1, 4 * _MAX_WIDTH, hidden_channels=self.hidden_channels)


class Norm(nn.LayerNorm):
    """LayerNorm whose weights may be bf16 where its input is fp32, which on processors torch refuses."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        kind = torch.promote_types(x.dtype, self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(kind), self.bias.to(kind), self.eps)


class ViTBlock(nn.Module):
    """Self-attention without biases of its inputs, a feed-forward with tanh; each residual after a norm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, self.num_heads = config.channels, config.num_heads
        self.norm1 = Norm(width)
        self.qkv = Linear(width, 3 * config.attention_channels, bias=False)
        self.out = Linear(config.attention_channels, width)
        self.norm2 = Norm(width)
        self.up = Linear(width, config.hidden_channels)
        self.down = Linear(config.hidden_channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, L, C] -> [N, L, C]."""
        attended = attention(*split_heads(self.qkv(self.norm1(x)), self.num_heads))
        x = x + self.out(attended)
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


BLOCKS = (ViTBlock,)  # what families list as `blocks`: compiled, and computed again in the backward, as one


class ViTEncoder(nn.Module):
    """Images to one token a patch."""

    positions: Tensor

    def __init__(self, config: ViTConfig, image_channels: int, patch_size: int, num_patches: int) -> None:
        """num_patches: along a side."""
        super().__init__()
        self.patches = Conv2d(image_channels, config.channels, patch_size, stride=patch_size)
        self.register_buffer("positions", _positions(num_patches, config.channels), persistent=False)
        self.blocks = nn.Sequential(*(ViTBlock(config) for _ in range(config.depth)))
        self.norm = Norm(config.channels)
        _initialize(self)

    def forward(self, image: Tensor) -> Tensor:
        """[N, C_image, H, W] -> [N, L, C], row by row."""
        # The sum keeps the layout of its first operand, and so do all that follow: channels have to be last in it.
        x = self.positions + self.patches(image).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(x))


class ViTDecoder(nn.Module):
    """One token a patch to images."""

    positions: Tensor

    def __init__(self, config: ViTConfig, image_channels: int, patch_size: int, num_patches: int) -> None:
        """num_patches: along a side."""
        super().__init__()
        self.num_patches = num_patches
        self.register_buffer("positions", _positions(num_patches, config.channels), persistent=False)
        self.blocks = nn.Sequential(*(ViTBlock(config) for _ in range(config.depth)))
        self.norm = Norm(config.channels)
        self.pixels = nn.ConvTranspose2d(config.channels, image_channels, patch_size, stride=patch_size)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, L, C], row by row -> [N, C_image, H, W], unbounded."""
        x = self.norm(self.blocks(x + self.positions))
        return self.pixels(x.transpose(1, 2).unflatten(2, (self.num_patches, self.num_patches)))


def _positions(num_patches: int, channels: int) -> Tensor:
    """Fixed embeddings of rows, then of columns [L, C], float32 (Dosovitskiy 2021, App. D.4, with sines)."""
    places = timestep_embedding(torch.arange(num_patches), channels // 2)  # [P, C / 2]
    rows = places[:, None].expand(-1, num_patches, -1)
    columns = places[None].expand(num_patches, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def _initialize(network: nn.Module) -> None:
    """Glorot's uniform weights, patches' as those of the linear layer that they are, and no biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
