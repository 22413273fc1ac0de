"""DiffAugment, as its paper has it (Zhao 2020, "Differentiable augmentation for data-efficient GAN training")."""

import torch
from torch import Tensor

from gmdist import rng
from gmdist.nets.blocks import at_least_fp32

POLICIES = ("color", "translation", "cutout")  # in this order
_MAX_SHIFT = 0.125  # of a side
_CUT = 0.5  # of a side


def augmented(image: Tensor, keys: Tensor, policies: tuple[str, ...], seed: int, purpose: str) -> Tensor:
    """Augment images, differentiably.

    Args:
        image: [N, C, H, W] in [-1, 1]. What comes out may lie outside.
        keys: int64 [N].
        policies: of POLICIES.
        seed, purpose: of the random numbers.

    Returns:
        [N, C, H, W] of the same type.
    """
    # All are drawn, whatever the policies: one of them is the same with others and without.
    u = rng.uniform(seed, purpose, keys, (7,))
    x = at_least_fp32(image)
    if "color" in policies:
        x = recolored(x, u[:, 0] - 0.5, 2.0 * u[:, 1], u[:, 2] + 0.5)
    if "translation" in policies:
        x = translated(x, *(_shifts(u[:, 3 + i], x.shape[2 + i]) for i in (0, 1)))
    if "cutout" in policies:
        x = cut_out(x, *(_centers(u[:, 5 + i], x.shape[2 + i]) for i in (0, 1)))
    return x.to(image.dtype)


def recolored(image: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """[N, C, H, W] plus the brightness; then distances to the mean of a pixel, then of the image, times factors [N]."""
    brightness, saturation, contrast = (value[:, None, None, None] for value in (brightness, saturation, contrast))
    image = image + brightness
    grey = image.mean(dim=1, keepdim=True)
    image = grey + saturation * (image - grey)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return mean + contrast * (image - mean)


def translated(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """[N, C, H, W] moved by whole pixels, int64 [N]; what comes in is 0."""
    for axis, shift in ((2, down), (3, right)):
        side = image.shape[axis]
        source = torch.arange(side, device=image.device) - shift[:, None]  # [N, side]
        is_inside = (source >= 0) & (source < side)
        source, is_inside = (_along(value, axis) for value in (source.clamp(0, side - 1), is_inside))
        image = torch.where(is_inside, image.gather(axis, source.expand_as(image)), 0.0)
    return image


def cut_out(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """[N, C, H, W] with a rectangle of half its sides, around a row and a column int64 [N], set to 0."""
    is_cut = torch.ones((), dtype=torch.bool, device=image.device)
    for axis, center in ((2, row), (3, column)):
        length = _cut_length(image.shape[axis])
        place = torch.arange(image.shape[axis], device=image.device) - (center[:, None] - length // 2)
        is_cut = is_cut & _along((place >= 0) & (place < length), axis)
    return torch.where(is_cut, 0.0, image)


def _shifts(u: Tensor, side: int) -> Tensor:
    """Whole pixels, evenly from minus to plus the largest: int64 [N]."""
    largest = int(side * _MAX_SHIFT + 0.5)
    return (u * (2 * largest + 1)).long() - largest


def _centers(u: Tensor, side: int) -> Tensor:
    """Of what is cut out, evenly over all that lie inside or on the border: int64 [N]."""
    return (u * (side + 1 - _cut_length(side) % 2)).long()


def _cut_length(side: int) -> int:
    return int(side * _CUT + 0.5)


def _along(values: Tensor, axis: int) -> Tensor:
    """[N, side] so that it is of an image's axis 2 or 3."""
    return values[:, None, :, None] if axis == 2 else values[:, None, None, :]
