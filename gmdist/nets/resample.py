"""Images to half and twice their sides behind a low pass, in operations that differentiate twice."""

import torch
import torch.nn.functional as F
from torch import Tensor

# A low pass along each side (Karras 2019, Sec. 2): close to what bilinear interpolation does, without its offset.
_TAPS = (1.0, 3.0, 3.0, 1.0)


def upsample(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2 H, 2 W]: zeros between all pixels, then the low pass with a gain of 4."""
    return F.conv_transpose2d(x, _kernel(x, 4.0), stride=2, padding=1, groups=x.shape[1])


def downsample(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H / 2, W / 2]: the low pass, then every second pixel."""
    return F.conv2d(x, _kernel(x), stride=2, padding=1, groups=x.shape[1])


def low_pass(x: Tensor, padding: int, gain: float = 1.0) -> Tensor:
    """Blur each channel.

    Args:
        x: [N, C, H, W].
        padding: zeros around.
        gain: that the result is multiplied by.

    Returns:
        [N, C, H + 2 padding - 3, W + 2 padding - 3].
    """
    return F.conv2d(x, _kernel(x, gain), padding=padding, groups=x.shape[1])


def _kernel(x: Tensor, gain: float = 1.0) -> Tensor:
    """The low pass of each channel, [C, 1, 4, 4]."""
    taps = torch.tensor(_TAPS, device=x.device, dtype=x.dtype)
    return (torch.outer(taps, taps) * (gain / sum(_TAPS) ** 2)).expand(x.shape[1], 1, -1, -1)
