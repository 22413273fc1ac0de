"""CycleGAN's generator: a residual network between two halvings and two doublings (Zhu 2017, App. 7.2)."""

from dataclasses import dataclass

from torch import Tensor, nn

from gmdist.checks import at_least, between

_MIN_SIDE = 8  # pixels: reflected borders take some of them


@dataclass
class TranslatorConfig:
    """Sizes; the defaults are those for 256 pixels."""

    channels: int = 64  # at the image's sides; twice and four times as many at half and a quarter
    num_blocks: int = 9  # residual, at a quarter of the sides

    def problem(self, image_size: int) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if problem := between(1, 1 << 12, channels=self.channels) or at_least(1, num_blocks=self.num_blocks):
            return problem
        if image_size % 4 or image_size < _MIN_SIDE:
            return f"channels: image sides must be multiples of 4 from {_MIN_SIDE} on, not {image_size}"
        return None


class ResidualBlock(nn.Module):
    """Two convolutions with instance normalization, and the input on top."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_layer(channels, channels), *_layer(channels, channels)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] of the same shape."""
        return x + self.layers(x)


BLOCKS = (ResidualBlock,)  # what families list as `blocks`


class Translator(nn.Module):
    """Images to images."""

    def __init__(self, config: TranslatorConfig, image_channels: int) -> None:
        super().__init__()
        width = config.channels
        self.layers = nn.Sequential(
            *_layer(image_channels, width, 7),
            *_layer(width, 2 * width, stride=2),
            *_layer(2 * width, 4 * width, stride=2),
            *(ResidualBlock(4 * width) for _ in range(config.num_blocks)),
            *_doubling(4 * width, 2 * width),
            *_doubling(2 * width, width),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, image_channels, 7),
            nn.Tanh(),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] in [-1, 1]."""
        return self.layers(image)


def _layer(before: int, after: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution within reflected borders, instance normalization, ReLU."""
    convolution = nn.Conv2d(before, after, size, stride)
    return [nn.ReflectionPad2d(size // 2), convolution, nn.InstanceNorm2d(after), nn.ReLU()]


def _doubling(before: int, after: int) -> list[nn.Module]:
    convolution = nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=1)
    return [convolution, nn.InstanceNorm2d(after), nn.ReLU()]
