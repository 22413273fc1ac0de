"""The gated PixelCNN: each value of a grid predicted from those above and to the left (van den Oord 2016b, Sec. 2)."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import at_least, between
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.causal_transformer import Choose
from gmdist.nets.products import Conv2d

_MAX_WIDTH = 1 << 16
_MAX_KERNEL = 31


@dataclass
class GatedPixelCNNConfig:
    """Sizes of the network."""

    channels: int = 128  # of each stack
    depth: int = 12  # layers
    kernel_size: int = 5  # side of the square of which a layer sees the part that comes before
    dropout: float = 0.0  # of what each layer adds

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if problem := between(1, _MAX_WIDTH, channels=self.channels) or at_least(1, depth=self.depth):
            return problem
        if not 3 <= self.kernel_size <= _MAX_KERNEL or self.kernel_size % 2 == 0:
            return f"kernel_size: {self.kernel_size}; must be odd, from 3 to {_MAX_KERNEL}"
        if not 0.0 <= self.dropout < 1.0:
            return f"dropout: {self.dropout}; must be at least 0 and below 1"
        return None


def _gated(x: Tensor) -> Tensor:
    """[N, 2 C, H, W] -> [N, C, H, W] (van den Oord 2016b, Eq. 2)."""
    value, gate = x.chunk(2, dim=1)
    return torch.tanh(value) * torch.sigmoid(gate)


class GatedLayer(nn.Module):
    """One layer of both stacks (van den Oord 2016b, Fig. 2).

    Its inputs are shifted by one row and by one column before the first layer, so nothing in it is masked: the vertical
    stack sees its own row and those above, the horizontal one its own column and those to the left.
    """

    def __init__(self, channels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        self.vertical = Conv2d(channels, 2 * channels, (self.reach + 1, kernel_size))
        self.horizontal = Conv2d(channels, 2 * channels, (1, self.reach + 1))
        self.link = Conv2d(2 * channels, 2 * channels, 1)
        self.condition = nn.Linear(channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.mix = Conv2d(channels, channels, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks' features, each [N, C, H, W], under the condition [N, C] -> the same."""
        for_vertical, for_horizontal = self.shifts(told)
        vertical, linked, _ = self.rows(vertical, self.no_rows(vertical), for_vertical)
        return vertical, self.columns(horizontal, linked + for_horizontal)

    def no_rows(self, x: Tensor) -> Tensor:
        """What is above the first row of features [N, C, H, W]."""
        return x.new_zeros(len(x), x.shape[1], self.reach, x.shape[3])

    def shifts(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """What the condition [N, C] adds in either stack (van den Oord 2016b, Eq. 4), each [N, 2 C, 1, 1]."""
        vertical, horizontal = self.condition(told)[:, :, None, None].chunk(2, dim=1)
        return vertical, horizontal

    def rows(self, x: Tensor, above: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vertical stack for some rows.

        Args:
            x: their features [N, C, R, W].
            above: those of as many rows above them as the layer reaches, [N, C, reach, W].
            shift: what the condition adds, [N, 2 C, 1, 1].

        Returns:
            The rows' new features [N, C, R, W], what they tell the horizontal stack [N, 2 C, R, W], and `above` for the
            row that follows.
        """
        window = torch.cat([above, x], dim=2)
        features = self.vertical(F.pad(window, (self.reach, self.reach)))
        return _gated(features + shift), self.link(features), window[:, :, x.shape[2] :]

    def columns(self, x: Tensor, told: Tensor) -> Tensor:
        """The horizontal stack for features [N, C, R, W], told by the vertical one and by the condition [N, 2 C, R, W].

        Returns:
            [N, C, R, W].
        """
        features = self.horizontal(F.pad(x, (self.reach, 0))) + told
        return x + self.mix(self.dropout(_gated(features)))


BLOCKS = (GatedLayer,)  # what families list as `blocks`: compiled, and computed again in the backward, as one


class GatedPixelCNN(nn.Module):
    """Values of a grid in the order of rows, the channels of a place in turn (van den Oord 2016a, Sec. 2.1).

    Both stacks see the places before; what a channel sees of those before it at its own place enters in the last
    layers, one pair for each channel.
    """

    def __init__(
        self, config: GatedPixelCNNConfig, num_codes: int, channels: int, num_classes: int, *, is_embedded: bool
    ) -> None:
        """Draw the weights.

        Args:
            config: the sizes.
            num_codes: values are 0 to num_codes - 1.
            channels: values of a place; 1 where they are embedded.
            num_classes: 0 without labels.
            is_embedded: whether values are names of things; false: they are numbers, as the levels of a pixel are.
        """
        super().__init__()
        assert channels == 1 or not is_embedded, channels
        width = config.channels
        self.num_codes, self.num_classes, self.is_embedded = num_codes, num_classes, is_embedded
        self.entry = nn.Embedding(num_codes, width) if is_embedded else Conv2d(channels, width, 1)
        self.label = nn.Embedding(num_classes + 1, width)
        layers = (GatedLayer(width, config.kernel_size, config.dropout) for _ in range(config.depth))
        self.layers = nn.ModuleList(layers)
        self.hidden = nn.ModuleList(Conv2d(width + before, width, 1) for before in range(channels))
        self.out = nn.ModuleList(Conv2d(width, num_codes, 1) for _ in range(channels))
        self._reach = config.depth * (config.kernel_size // 2)  # columns to the left that one depends on

    def forward(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits of each value, given the label and the values before it.

        Args:
            codes: int64 [N, C, H, W].
            label: int64 [N]; `num_classes` means "no class". None: that, for all.

        Returns:
            [N, C, H, W, K], at least fp32.
        """
        x, told = self._entered(codes), self._told(label, codes)
        vertical, horizontal = F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1))
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, told)
        logits = [self._logits(horizontal, codes, channel) for channel in range(codes.shape[1])]
        return torch.stack(logits, dim=1)

    def draw(self, codes: Tensor, given_rows: int, label: Tensor | None, choose: Choose) -> Tensor:
        """Draw one value after another: the vertical stack once a row, the horizontal one where a value depends on it.

        Args:
            codes: int64 [N, C, H, W], of which the first rows are kept.
            given_rows: how many.
            label: as in `forward`.
            choose: draws a value by its logits.

        Returns:
            int64 [N, C, H, W].
        """
        codes, told = codes.clone(), self._told(label, codes)
        layers = cast(list[GatedLayer], list(self.layers))
        row = torch.zeros_like(self._entered(codes[:, :, :1]))  # above the first
        above = [layer.no_rows(row) for layer in layers]
        shifts = [layer.shifts(told) for layer in layers]
        for i in range(codes.shape[2]):
            linked, x = list[tuple[GatedLayer, Tensor]](), row
            for number, (layer, (vertical, horizontal)) in enumerate(zip(layers, shifts, strict=True)):
                x, link, above[number] = layer.rows(x, above[number], vertical)
                linked.append((layer, link + horizontal))
            if i >= given_rows:
                self._draw_row(codes, i, linked, choose)
            row = self._entered(codes[:, :, i : i + 1])
        return codes

    def _draw_row(self, codes: Tensor, i: int, linked: list[tuple[GatedLayer, Tensor]], choose: Choose) -> None:
        """Draw row i of the values, in place; each layer's horizontal stack is told [N, 2 width, 1, W] of it."""
        _, channels, _, width = codes.shape
        entered = torch.zeros_like(self._entered(codes[:, :, i : i + 1]))  # to the left of each column
        for j in range(width):
            seen = slice(max(0, j - self._reach), j + 1)
            x = entered[..., seen]
            for layer, link in linked:
                x = layer.columns(x, link[..., seen])
            place = codes[:, :, i : i + 1, j : j + 1]
            for channel in range(channels):
                logits = self._logits(x[..., -1:], place, channel)[:, 0, 0]
                place[:, channel, 0, 0] = choose(logits, (i * width + j) * channels + channel)
            if j + 1 < width:
                entered[..., j + 1 : j + 2] = self._entered(place)

    def _entered(self, codes: Tensor) -> Tensor:
        """Values [N, C, H, W] as features [N, width, H, W]."""
        if self.is_embedded:
            return self.entry(codes[:, 0]).permute(0, 3, 1, 2)
        return self.entry(self._numbers(codes))

    def _numbers(self, codes: Tensor) -> Tensor:
        """Values as numbers in [-1, 1], in the type of the weights."""
        return (codes * (2.0 / (self.num_codes - 1)) - 1.0).to(self.label.weight.dtype)

    def _told(self, label: Tensor | None, codes: Tensor) -> Tensor:
        """The condition of codes [N, ...]: [N, width]."""
        if label is None:
            label = torch.full((len(codes),), self.num_classes, device=codes.device)
        return self.label(label)

    def _logits(self, x: Tensor, codes: Tensor, channel: int) -> Tensor:
        """Logits of a channel [N, H, W, K]: of features [N, width, H, W] and the channels before it."""
        x = torch.cat([x, self._numbers(codes[:, :channel])], dim=1)
        x = self.out[channel](F.relu(self.hidden[channel](F.relu(x))))
        return at_least_fp32(x.permute(0, 2, 3, 1))
