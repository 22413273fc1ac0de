"""A small network that says what a small image shows; its last but one layer describes images."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32  # pixels, that images are averaged to: a multiple of 8


@dataclass(frozen=True)
class ClassifierSizes:
    """What it takes and tells apart."""

    image_size: int  # pixels a side, a multiple of SIDE
    channels: int
    num_classes: int
    width: int = 192  # of the features


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Halves height and width."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """Three convolutions, one layer of features, one of classes."""

    def __init__(self, sizes: ClassifierSizes) -> None:
        super().__init__()
        assert sizes.image_size % SIDE == 0, sizes
        self.sizes = sizes
        self.body = nn.Sequential(
            _conv(sizes.channels, 32, 5),
            _conv(32, 64, 3),
            _conv(64, 128, 3),
            nn.Flatten(),
            nn.Linear(128 * (SIDE // 8) ** 2, sizes.width, bias=False),
            nn.BatchNorm1d(sizes.width),
            nn.ReLU(),
        )
        self.head = nn.Linear(sizes.width, sizes.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> features [N, D]."""
        return self.body(F.avg_pool2d(images, self.sizes.image_size // SIDE))

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, D] -> [N, classes]."""
        return self.head(features)
