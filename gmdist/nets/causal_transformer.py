"""A decoder-only transformer over a grid of codes: each is predicted from those before it (LlamaGen, Sun 2024)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.blocks import at_least_fp32, attention, split_heads
from gmdist.nets.products import Linear
from gmdist.nets.transformer import heads_problem

_EPS = 1e-5
_STD = 0.02  # of all weights at the start, but those of the last layer
_HIDDEN_MULTIPLE = 256  # of the feed-forward layers' width
_LONGEST_PERIOD = 10_000.0  # of rotations, times 2 pi, in rows or columns

Choose = Callable[[Tensor, int], Tensor]  # (logits [N, K] of a value, its number in the order) -> codes int64 [N]


@dataclass
class CausalTransformerConfig:
    """Sizes of the transformer; the defaults are those of LlamaGen-B."""

    channels: int = 768  # width of a token
    depth: int = 12  # blocks
    num_heads: int = 12
    dropout: float = 0.1  # of embedded tokens, and of what each branch adds

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if problem := heads_problem(self.channels, self.num_heads):
            return problem
        if self.channels // self.num_heads % 4:
            return f"num_heads: {self.num_heads}; must leave each a multiple of 4 of the {self.channels} channels"
        if self.depth < 1:
            return f"depth: {self.depth}; must be at least 1"
        if not 0.0 <= self.dropout < 1.0:
            return f"dropout: {self.dropout}; must be at least 0 and below 1"
        return None


def rotation_table(grid: tuple[int, int], head_channels: int) -> Tensor:
    """Cosines and sines of each position's rotations (Su 2021, Eq. 15): half of them by its row, half by its column.

    What comes before the grid, the condition, is at no position and is not rotated.

    Args:
        grid: rows and columns.
        head_channels: of a head, a multiple of 4.

    Returns:
        [2, 1 + rows * columns, head_channels / 2], float32.
    """
    quarter = head_channels // 4
    frequencies = _LONGEST_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    by_row, by_column = (torch.arange(count, dtype=torch.float64)[:, None] * frequencies for count in grid)
    rows, columns = grid
    angles = torch.cat([by_row.repeat_interleave(columns, dim=0), by_column.repeat(rows, 1)], dim=1)
    angles = F.pad(angles, (0, 0, 1, 0))  # [1 + rows * columns, 2 * quarter]
    return torch.stack([angles.cos(), angles.sin()]).float()


def turned(x: Tensor, rotations: Tensor) -> Tensor:
    """Features [N, heads, L, D] with each pair of neighbours turned by rotations [2, L, D / 2]."""
    cosines, sines = rotations
    first, second = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


class Past:
    """Keys and values of the tokens that a block has seen, with room for those to come."""

    def __init__(self, room: int) -> None:
        self._room, self._length = room, 0
        self._kept: Tensor | None = None  # [2, N, heads, room, D]

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with those of M more tokens [N, heads, M, D] at the end."""
        if self._kept is None:
            self._kept = key.new_empty(2, *key.shape[:2], self._room, key.shape[3])
        start, self._length = self._length, self._length + key.shape[2]
        self._kept[0, :, :, start : self._length], self._kept[1, :, :, start : self._length] = key, value
        keys, values = self._kept[:, :, :, : self._length]
        return keys, values


class RotaryAttention(nn.Module):
    """Multi-head attention of tokens to themselves and to those before, which know where they are by rotations."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.out = Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, past: Past | None = None) -> Tensor:
        """Tokens [N, L, C], rotations [2, L, D / 2] -> [N, L, C]; with a past that is not empty, L is 1."""
        query, key, value = split_heads(self.qkv(x), self.num_heads)
        query, key = turned(query, rotations), turned(key, rotations)
        if past is not None:
            key, value = past.extended(key, value)
        assert x.shape[1] in (1, key.shape[2]), (x.shape, key.shape)
        return self.out(attention(query, key, value, is_causal=x.shape[1] > 1))


class SwiGLU(nn.Module):
    """Feed-forward with a gate of SiLU (Shazeer 2020, Eq. 6), 8/3 times as wide, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = _HIDDEN_MULTIPLE * math.ceil(8 * channels // 3 / _HIDDEN_MULTIPLE)
        self.up = Linear(channels, 2 * hidden, bias=False)
        self.down = Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class CausalBlock(nn.Module):
    """Attention and feed-forward, each residual after a norm."""

    def __init__(self, config: CausalTransformerConfig) -> None:
        super().__init__()
        width = config.channels
        self.norm1 = nn.RMSNorm(width, eps=_EPS)
        self.attention = RotaryAttention(width, config.num_heads)
        self.norm2 = nn.RMSNorm(width, eps=_EPS)
        self.feed_forward = SwiGLU(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotations: Tensor, past: Past | None = None) -> Tensor:
        """Tokens [N, L, C] -> [N, L, C]; arguments as in `RotaryAttention`."""
        x = x + self.dropout(self.attention(self.norm1(x), rotations, past))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


BLOCKS = (CausalBlock,)  # what families list as `blocks`: compiled, and computed again in the backward, as one


class CausalTransformer(nn.Module):
    """Codes of a grid in the order of rows, after a token for the class; its last row stands for "no class"."""

    rotations: Tensor

    def __init__(
        self, config: CausalTransformerConfig, num_codes: int, grid: tuple[int, int], num_classes: int
    ) -> None:
        """Draw the weights.

        Args:
            config: the sizes.
            num_codes: codes are 0 to num_codes - 1.
            grid: rows and columns of codes.
            num_classes: 0 without labels.
        """
        super().__init__()
        width = config.channels
        self.grid, self.num_classes = grid, num_classes
        self.codes = nn.Embedding(num_codes, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.norm_out = nn.RMSNorm(width, eps=_EPS)
        self.out = Linear(width, num_codes, bias=False)
        self.register_buffer("rotations", rotation_table(grid, width // config.num_heads), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=_STD)
        nn.init.zeros_(self.out.weight)

    def forward(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits of each code, given the label and the codes before it.

        Args:
            codes: int64 [N, 1, rows, columns].
            label: int64 [N]; `num_classes` means "no class". None: that, for all.

        Returns:
            [N, 1, rows, columns, K], at least fp32.
        """
        before = torch.cat([self._first(label, codes), self.codes(codes.flatten(1)[:, :-1])], dim=1)
        return self._logits(self._seen(before, 0)).unflatten(1, codes.shape[1:])

    def draw(self, codes: Tensor, given_rows: int, label: Tensor | None, choose: Choose) -> Tensor:
        """Draw one code after another; keys and values of those before are computed once.

        Args:
            codes: int64 [N, 1, rows, columns], of which the first rows are kept.
            given_rows: how many.
            label: as in `forward`.
            choose: draws a code by its logits.

        Returns:
            int64 [N, 1, rows, columns].
        """
        flat, first = codes.flatten(1).clone(), given_rows * self.grid[1]
        past = [Past(flat.shape[1]) for _ in self.blocks]
        new, start = torch.cat([self._first(label, codes), self.codes(flat[:, :first])], dim=1), 0
        for number in range(first, flat.shape[1]):
            logits = self._logits(self._seen(new, start, past)[:, -1])
            flat[:, number] = choose(logits, number)
            new, start = self.codes(flat[:, number : number + 1]), number + 1
        return flat.view_as(codes)

    def _first(self, label: Tensor | None, codes: Tensor) -> Tensor:
        """What comes before the codes [N, ...]: [N, 1, C]."""
        if label is None:
            label = torch.full((len(codes),), self.num_classes, device=codes.device)
        return self.label(label)[:, None]

    def _seen(self, tokens: Tensor, start: int, past: list[Past] | None = None) -> Tensor:
        """Tokens [N, L, C], from the position `start` on, after all blocks."""
        x, rotations = self.dropout(tokens), self.rotations[:, start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, rotations, None if past is None else past[i])
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.out(self.norm_out(x)))
