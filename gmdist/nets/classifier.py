"""A small network that says what a small image shows; its last but one layer describes images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SIDE = 16  # pixels, after the first convolution
_COLOUR_SCALE = 0.25  # the shape says what it is


@dataclass(frozen=True)
class ClassifierSizes:
    """What it takes and tells apart."""

    image_size: int  # pixels a side, a multiple of 16
    channels: int
    num_classes: int
    width: int = 192  # of the features


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _ink(images: Tensor) -> Tensor:
    """How far each pixel is from the colour of the first corner, 0 to 1 [N, 1, H, W]: shapes in whatever colours."""
    distances = torch.linalg.vector_norm(images - images[:, :, :1, :1], dim=1, keepdim=True)
    return distances / distances.amax(dim=(2, 3), keepdim=True).clamp_min(1e-3)


class Classifier(nn.Module):
    """Three convolutions, one layer of features, one of classes."""

    def __init__(self, sizes: ClassifierSizes) -> None:
        super().__init__()
        assert sizes.image_size % _SIDE == 0, sizes
        self.sizes = sizes
        stride = sizes.image_size // _SIDE
        self.body = nn.Sequential(
            _conv(sizes.channels + 1, 32, (stride + 2) | 1, stride),
            _conv(32, 64, 3, 2),
            _conv(64, 128, 3, 2),
            nn.Flatten(),
            nn.Linear(128 * (_SIDE // 4) ** 2, sizes.width, bias=False),
            nn.BatchNorm1d(sizes.width),
            nn.ReLU(),
        )
        self.head = nn.Linear(sizes.width, sizes.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> features [N, D]."""
        return self.body(torch.cat([images * _COLOUR_SCALE, _ink(images)], dim=1))

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, D] -> [N, classes]."""
        return self.head(features)
