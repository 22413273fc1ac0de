"""ADA's augmentation bgc (Karras 2020, "Training generative adversarial networks with limited data", App. B).

Each transform of a sample takes place with probability p: pixels are moved, then the geometry changes, then the colour.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gmdist import rng
from gmdist.families.warping import warped
from gmdist.nets.blocks import at_least_fp32

_SHIFT = 0.125  # of a side, the most, by whole pixels
_SCALE = 0.2  # standard deviation of log2, of both sides and of their ratio
_DRIFT = 0.125  # standard deviation, of a side
_BRIGHTNESS = 0.2  # standard deviation, of images in [-1, 1]
_CONTRAST, _SATURATION = 0.5, 1.0  # standard deviations of log2


class Transforms(NamedTuple):
    """What is done to each sample, float64 [N] or [N, 2], in this order; neutral where it is left out."""

    mirror: Tensor  # -1: left becomes right; or 1
    quarters: Tensor  # turns by 90 degrees: 0 to 3
    shift: Tensor  # [N, 2]: shares of the width and height, to be rounded to whole pixels
    scale: Tensor
    angle: Tensor  # radians, before the stretch
    stretch: Tensor  # of the width; the height becomes smaller by it
    last_angle: Tensor  # radians, after it
    drift: Tensor  # [N, 2]: shares of the width and height
    brightness: Tensor  # that is added
    contrast: Tensor  # factor
    luma: Tensor  # -1: the negative in brightness, of the same colours; or 1
    hue: Tensor  # radians around the grey axis
    saturation: Tensor  # factor of the distance from the grey axis


def augmented(image: Tensor, keys: Tensor, p: Tensor, seed: int, purpose: str) -> Tensor:
    """Augment images, differentiably.

    Args:
        image: [N, C, H, W] in [-1, 1], of 1 or 3 channels. What comes out may lie outside.
        keys: int64 [N].
        p: scalar on the same device, 0 to 1. At 0, images come out bit for bit.
        seed, purpose: of the random numbers.

    Returns:
        [N, C, H, W] of the same type.
    """
    transforms = draw(keys, p, seed, purpose)
    return recolored(
        warped(image, maps(transforms, image.shape[2], image.shape[3])), colors(transforms, image.shape[1])
    )


def draw(keys: Tensor, p: Tensor, seed: int, purpose: str) -> Transforms:
    """What is done to the samples with keys int64 [N]; p is a scalar."""
    drawn = rng.uniform(seed, f"{purpose}/uniform", keys, (21,)).double()
    u, gates = drawn[:, :8], iter(drawn[:, 8:].unbind(dim=1))
    n = rng.normal(seed, f"{purpose}/normal", keys, (7,)).double()
    # Of each rotation, so that with probability p there is one or both: (1 - p_rot)^2 = 1 - p.
    p_rot = 1.0 - (1.0 - p).sqrt()

    def gated(value: Tensor, neutral: float, chance: Tensor = p) -> Tensor:
        takes_place = next(gates) < chance
        return torch.where(takes_place if value.ndim == 1 else takes_place[:, None], value, neutral)

    return Transforms(
        mirror=gated(_sign(u[:, 0]), 1.0),
        quarters=gated((4.0 * u[:, 1]).floor(), 0.0),
        shift=gated(_SHIFT * (2.0 * u[:, 2:4] - 1.0), 0.0),
        scale=gated(torch.exp2(_SCALE * n[:, 0]), 1.0),
        angle=gated(_angle(u[:, 4]), 0.0, p_rot),
        stretch=gated(torch.exp2(_SCALE * n[:, 1]), 1.0),
        last_angle=gated(_angle(u[:, 5]), 0.0, p_rot),
        drift=gated(_DRIFT * n[:, 2:4], 0.0),
        brightness=gated(_BRIGHTNESS * n[:, 4], 0.0),
        contrast=gated(torch.exp2(_CONTRAST * n[:, 5]), 1.0),
        luma=gated(_sign(u[:, 6]), 1.0),
        hue=gated(_angle(u[:, 7]), 0.0),
        saturation=gated(torch.exp2(_SATURATION * n[:, 6]), 1.0),
    )


def maps(transforms: Transforms, height: int, width: int) -> Tensor:
    """All that changes the geometry of images of this size, as one map each, which `warped` takes: [N, 2, 3]."""
    t = transforms
    quarter = _rotation(torch.cos(t.quarters * (math.pi / 2)).round(), torch.sin(t.quarters * (math.pi / 2)).round())
    copied = quarter @ _diagonal(t.mirror, torch.ones_like(t.mirror))
    stretched = _diagonal(t.scale * t.stretch, t.scale / t.stretch) @ _rotation(t.angle.cos(), t.angle.sin())
    general = _rotation(t.last_angle.cos(), t.last_angle.sin()) @ stretched
    shift, drift = (torch.stack([width * share[:, 0], height * share[:, 1]], dim=1) for share in (t.shift, t.drift))
    offset = general @ shift.round()[:, :, None] + drift[:, :, None]
    return torch.cat([general @ copied, offset], dim=2)


def colors(transforms: Transforms, channels: int) -> Tensor:
    """All that changes the colour, as one matrix each: [N, C, C + 1], the last column is added.

    One channel is what becomes of three alike, whose hue and saturation do nothing.
    """
    t = transforms
    hue, luma, saturation = (value[:, None, None] for value in (t.hue, t.luma, t.saturation))
    identity = torch.eye(3, dtype=t.hue.dtype, device=t.hue.device)
    grey = torch.full_like(identity, 1.0 / 3.0)  # the projection on the grey axis v = (1, 1, 1) / sqrt(3)
    # The product with v from the left: rows and columns of the identity, each moved on by one, make its two signs.
    across = (identity.roll(1, 0) - identity.roll(-1, 0)) / math.sqrt(3.0)
    rotated = hue.cos() * identity + hue.sin() * across + (1.0 - hue.cos()) * grey  # Rodrigues
    reflected = identity - (1.0 - luma) * grey
    saturated = saturation * identity + (1.0 - saturation) * grey
    linear = saturated @ rotated @ reflected * t.contrast[:, None, None]
    offset = linear.sum(dim=2, keepdim=True) * t.brightness[:, None, None]
    if channels == 1:
        return torch.cat([linear.sum(dim=(1, 2))[:, None, None] / 3.0, offset.mean(dim=1, keepdim=True)], dim=2)
    assert channels == 3, channels
    return torch.cat([linear, offset], dim=2)


def recolored(image: Tensor, matrices: Tensor) -> Tensor:
    """Images [N, C, H, W] by matrices [N, C, C + 1]; where it changes nothing, bit for bit."""
    *factors, offset = matrices.to(at_least_fp32(image).dtype)[..., None, None].unbind(dim=2)  # [N, C, 1, 1]
    changed = offset
    for factor, channel in zip(factors, image.split(1, dim=1), strict=True):
        changed = changed + factor * channel
    identity = torch.eye(*matrices.shape[1:], dtype=matrices.dtype, device=matrices.device)
    stays = (matrices == identity).flatten(1).all(dim=1)
    return torch.where(stays[:, None, None, None], image, changed.to(image.dtype))


def _sign(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)


def _angle(u: Tensor) -> Tensor:
    return math.pi * (2.0 * u - 1.0)


def _rotation(cosine: Tensor, sine: Tensor) -> Tensor:
    """[N, 2, 2]."""
    return torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    """[N, 2, 2]."""
    return torch.diag_embed(torch.stack([x, y], dim=1))
