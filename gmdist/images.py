"""Tensors to PNG files: single images and grids."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmdist.errors import DivergedError

_GAP = 2  # white pixels between images of a grid


def to_uint8(images: Tensor) -> Tensor:
    """Float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] on the CPU."""
    levels = ((images.float() + 1.0) * 127.5).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


def drawn_uint8(images: Tensor) -> Tensor:
    """`to_uint8` of what a model has drawn; DivergedError where that is not finite: no pixel could show it."""
    if not images.isfinite().all():
        raise DivergedError("the model's images are not finite; check its weights")
    return to_uint8(images)


def png(image: Tensor | np.ndarray) -> bytes:
    """One image, uint8 [H, W, C] with C 1 or 3, as a PNG file."""
    array = np.asarray(image)
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay images out in rows.

    Args:
        images: uint8 [N, H, W, C].
        columns: images a row; None: ten where that fills the rows, else about a square.

    Returns:
        uint8 [H', W', C].
    """
    count, height, width, channels = images.shape
    if columns is None:
        columns = 10 if count % 10 == 0 else max(1, round((count * height / width) ** 0.5))
    rows = -(-count // columns)
    across, down = width + _GAP, height + _GAP
    canvas = torch.full((rows * down - _GAP, columns * across - _GAP, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down, i % columns * across
        canvas[top : top + height, left : left + width] = image
    return canvas
