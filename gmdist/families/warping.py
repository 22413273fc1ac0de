"""Images moved by affine maps, each by its own, in one resampling that hardly aliases (Karras 2020, ADA, App. B).

As in the paper, an image is made twice as dense by the low pass of the wavelet sym6, read between its pixels, and made
half as dense by the same low pass. Two things differ. Of sym6 the gain is taken without the phase: the filter is as
orthogonal, and symmetric, so that what is mirrored, turned by quarters or moved by whole pixels is copied; sym6 would
change its finest detail by a tenth. And beyond the border an image goes on mirrored without end, where the paper has
zeros after the first mirror image: so coordinates are folded, and no image is made larger.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.sums import add_rows

_MOMENTS = 6  # of sym6 that vanish
_RADIUS = 10  # taps on each side of the filter's centre; those left out would change a pixel by less than 1e-4


def warped(image: Tensor, maps: Tensor) -> Tensor:
    """Move images: a linear function of them, which can be differentiated by them any number of times.

    Args:
        image: [N, C, H, W], sides of at least 2 pixels.
        maps: float64 [N, 2, 3], invertible: what is at (x, y) goes to maps @ (x, y, 1), in pixels right of and below
            the image's centre.

    Returns:
        [N, C, H, W] of the same type, but computed in fp32 at least. An image that stays in its place stays as it is,
        bit for bit.
    """
    assert min(image.shape[2:]) >= 2, image.shape
    moved = _Warp.apply(at_least_fp32(image), _inverse(maps), False).to(image.dtype)
    stays = (maps == torch.eye(2, 3, dtype=maps.dtype, device=maps.device)).flatten(1).all(dim=1)
    return torch.where(stays[:, None, None, None], image, moved)


def _inverse(maps: Tensor) -> Tensor:
    """The maps [N, 2, 3] back; exact for quarter turns and whole pixels."""
    a, b, c, d = maps[:, :, :2].flatten(1).unbind(dim=1)
    linear = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]
    return torch.cat([linear, -linear @ maps[:, :, 2:]], dim=2)


class _Warp(torch.autograd.Function):
    """Denser, read between pixels, less dense; or the transpose of that, so that each is the other's backward.

    torch's own backward of `grid_sample` adds in another order every time on GPUs. And where a gradient is itself
    differentiated, a loss's autocast would have the products of the backward in bf16.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, sources: Tensor, is_transposed: bool) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]; sources: maps [N, 2, 3] to where what is seen at a place comes from."""
        ctx.save_for_backward(sources)
        ctx.is_transposed = is_transposed
        size = image.shape[2], image.shape[3]
        denser, thinner = ([make(side, image.dtype, image.device) for side in size] for make in (_denser, _thinner))
        corners = _corners(sources, size, image.dtype)
        with torch.autocast(image.device.type, enabled=False):
            if is_transposed:
                dense = _spread(_separably([m.t() for m in thinner], image), corners, _dense(size))
                return _separably([m.t() for m in denser], dense)
            return _separably(thinner, _read(_separably(denser, image), corners, _padded(size)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With respect to the image."""
        (sources,) = ctx.saved_tensors
        return _Warp.apply(gradient, sources, not ctx.is_transposed), None, None


def _dense(size: tuple[int, int]) -> tuple[int, int]:
    """The sides of an image made denser: a place between each two pixels."""
    return 2 * size[0] - 1, 2 * size[1] - 1


def _padded(size: tuple[int, int]) -> tuple[int, int]:
    """The same, with all that the filter touches."""
    height, width = _dense(size)
    return height + 2 * _RADIUS, width + 2 * _RADIUS


def _corners(sources: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of the four dense pixels around the places that are read: where they are, and their weights.

    Args:
        sources: float64 [N, 2, 3].
        size: of the images.
        dtype: of coordinates and weights.

    Yields:
        int64 and dtype [N, H' * W'], for all places of an image of the sides `_padded`.
    """
    dense, padded = _dense(size), _padded(size)
    folded = []
    for axis, side in ((0, dense[1]), (1, dense[0])):  # x, y
        last = side - 1
        # From the middle and in dense pixels, which are twice as many as the image's.
        y, x = (torch.arange(count, device=sources.device, dtype=dtype) - (count - 1) / 2 for count in padded)
        along_x, along_y, begin = sources[:, axis].to(dtype).split(1, dim=1)  # [N, 1]
        row = along_y * y + (2.0 * begin + last / 2)  # [N, H']
        place = ((along_x * x)[:, None, :] + row[:, :, None]).flatten(1)
        place = last - (place.remainder(2 * last) - last).abs()
        first = place.floor().clamp(max=last - 1)
        folded.append((first.long(), place - first))
    (left, to_right), (top, to_bottom) = folded
    index = top * dense[1] + left
    for down, of_row in ((0, 1.0 - to_bottom), (dense[1], to_bottom)):
        for right, of_column in ((0, 1.0 - to_right), (1, to_right)):
            yield index + (down + right), of_row * of_column


def _read(dense: Tensor, corners: Iterator[tuple[Tensor, Tensor]], size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, C, *size]: what is at the corners, weighted."""
    channels, pixels = dense.shape[1], dense.flatten(2)
    total = dense.new_zeros(len(dense), channels, math.prod(size))
    for index, weight in corners:
        total.addcmul_(pixels.gather(2, index[:, None].expand(-1, channels, -1)), weight[:, None])
    return total.view(*dense.shape[:2], *size)


def _spread(values: Tensor, corners: Iterator[tuple[Tensor, Tensor]], size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, C, *size], the transpose of `_read`: to each corner its part."""
    count, channels = values.shape[:2]
    pixels, places = values.flatten(2).mT, math.prod(size)  # [N, H * W, C]
    first = places * torch.arange(count, device=values.device)[:, None]
    total = values.new_zeros(count * places, channels)
    for index, weight in corners:
        add_rows(total, (first + index).flatten(), (pixels * weight[:, :, None]).flatten(0, 1))
    return total.view(count, places, channels).mT.reshape(count, channels, *size)


def _separably(matrices: list[Tensor], image: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H', W']: columns times the first matrix [H', H], rows times the second [W', W]."""
    rows, columns = (matrix.expand(image.shape[0] * image.shape[1], -1, -1) for matrix in matrices)
    result = torch.bmm(torch.bmm(rows, image.flatten(0, 1)), columns.mT)
    return result.view(*image.shape[:2], *result.shape[1:])


@functools.lru_cache(maxsize=64)
def _denser(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [2 * side - 1, side] to pixels and places between them, of a row that goes on mirrored."""
    row = torch.arange(-_RADIUS, side + _RADIUS)
    weights = _taps(torch.arange(2 * side - 1)[:, None] - 2 * row)
    mirrored = side - 1 - (row.remainder(2 * side - 2) - (side - 1)).abs()
    folded = weights.new_zeros(2 * side - 1, side).index_add_(1, mirrored, weights)
    return _averaging(folded, dtype, device)


@functools.lru_cache(maxsize=64)
def _thinner(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [side, 2 * side - 1 + 2 * radius] back to pixels."""
    places = torch.arange(2 * side - 1 + 2 * _RADIUS) - _RADIUS
    return _averaging(_taps(places - 2 * torch.arange(side)[:, None]), dtype, device)


def _averaging(weights: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that sum to 1: even colour stays what it is."""
    with torch.inference_mode(False):  # what is cached may next be used in training
        return (weights / weights.sum(dim=1, keepdim=True)).to(device, dtype)


def _taps(places: Tensor) -> Tensor:
    """The low pass at integer places from its centre, float64: its gain is that of sym6, its phase 0.

    The squared gain is that of every orthogonal wavelet with so many vanishing moments (Daubechies 1988, Sec. 4).
    """
    frequency = torch.arange(256, dtype=torch.float64) * (math.pi / 256) + math.pi / 512  # of half a period
    y = torch.sin(frequency / 2).square()
    halfband = (1.0 - y) ** _MOMENTS * sum(math.comb(_MOMENTS - 1 + k, k) * y**k for k in range(_MOMENTS))
    taps = (halfband.sqrt() * torch.cos(places[..., None] * frequency)).mean(dim=-1)
    return torch.where(places.abs() <= _RADIUS, taps, 0.0)
