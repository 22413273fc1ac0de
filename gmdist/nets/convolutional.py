"""A convolutional encoder and decoder: strided convolutions down, transposed ones up (van den Oord 2017, Sec. 4.1)."""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.products import Conv2d

_MAX_WIDTH = 1 << 14


@dataclass
class ConvolutionalConfig:
    """Sizes of both halves."""

    channels: tuple[int, ...] = (64, 128)  # after each layer that halves the image; the decoder's in reverse
    num_res_blocks: int = 2  # of each half, at the lowest resolution

    @property
    def downsampling(self) -> int:
        """Pixels a side that one place of the bottleneck stands for."""
        return 2 ** len(self.channels)

    def problem(self, image_size: int) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if not self.channels or not all(1 <= width <= _MAX_WIDTH for width in self.channels):
            return f"channels: {list(self.channels)}; must be one or more numbers from 1 to {_MAX_WIDTH}"
        if self.num_res_blocks < 0:
            return f"num_res_blocks: {self.num_res_blocks}; must be at least 0"
        if image_size % self.downsampling:
            return f"channels: image sides must be divisible by {self.downsampling}, not {image_size}"
        return None


class PlainResBlock(nn.Module):
    """ReLU - 3x3 convolution - ReLU - 1x1 convolution, added to the input; no norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


BLOCKS = (PlainResBlock,)  # what families list as `blocks`: compiled, and computed again in the backward, as one


class ConvolutionalEncoder(nn.Sequential):
    """Images [N, C_in, H, W] -> features [N, C_out, H / 2^levels, W / 2^levels]."""

    def __init__(self, config: ConvolutionalConfig, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in pairwise((in_channels, *config.channels)):
            layers += [Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
        width = config.channels[-1]
        layers += [PlainResBlock(width) for _ in range(config.num_res_blocks)]
        super().__init__(*layers, Conv2d(width, out_channels, 1))


class ConvolutionalDecoder(nn.Sequential):
    """Features [N, C_in, h, w] -> images [N, C_out, 2^levels h, 2^levels w], unbounded."""

    def __init__(self, config: ConvolutionalConfig, in_channels: int, out_channels: int) -> None:
        widths = config.channels[::-1]
        layers: list[nn.Module] = [Conv2d(in_channels, widths[0], 3, padding=1)]
        layers += [PlainResBlock(widths[0]) for _ in range(config.num_res_blocks)]
        for wide, narrow in pairwise((*widths, out_channels)):
            layers += [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
        super().__init__(*layers)
