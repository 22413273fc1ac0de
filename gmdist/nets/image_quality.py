"""How close images are to their originals: peak signal-to-noise ratio and structural similarity."""

import math

import torch
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5  # pixels (Wang 2004, Sec. III-C)
_K1, _K2 = 0.01, 0.03
_RANGE = 2.0  # pixels are in [-1, 1]


def quality(image: Tensor, original: Tensor) -> dict[str, Tensor]:
    """Both as means over images, and the mean squared error; arguments as below."""
    return {
        "psnr_db": psnr(image, original).mean(),
        "ssim": ssim(image, original).mean(),
        "mse": (image - original).square().mean(),
    }


def psnr(image: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 100.

    Args:
        image, original: [N, C, H, W] in [-1, 1].

    Returns:
        [N].
    """
    mse = (image - original).square().mean(dim=(1, 2, 3))
    return 20.0 * math.log10(_RANGE) - 10.0 * torch.log10(mse.clamp_min(_RANGE**2 * 1e-10))


def ssim(image: Tensor, original: Tensor) -> Tensor:
    """Structural similarity (Wang 2004, Eq. 13), a mean over all places of the window and all channels.

    The window is Gaussian, 11 pixels a side with sigma 1.5; in smaller images the largest odd size that fits. The index
    compares means, so intensities count from black: it is that of the same images in [0, 255].

    Args:
        image, original: [N, C, H, W] in [-1, 1], fp32 or wider.

    Returns:
        [N].
    """
    window = min(_WINDOW, *image.shape[2:])
    weights = _gaussian(window - 1 + window % 2)
    image, original = image + 1.0, original + 1.0
    mean_x, mean_y = _smoothed(image, weights), _smoothed(original, weights)
    variance_x = _smoothed(image.square(), weights) - mean_x.square()
    variance_y = _smoothed(original.square(), weights) - mean_y.square()
    covariance = _smoothed(image * original, weights) - mean_x * mean_y
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    similarity = (2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)
    similarity = similarity / ((mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(1, 2, 3))


def _gaussian(size: int) -> list[float]:
    """A window's weights, which add up to 1."""
    weights = [math.exp(-0.5 * ((i - size // 2) / _SIGMA) ** 2) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def _smoothed(x: Tensor, weights: list[float]) -> Tensor:
    """[N, C, H, W] -> [N, C, H - size + 1, W - size + 1]."""
    # Sums of shifted images: a convolution may round to TF32 or bf16, and variances are differences of near numbers.
    for dim in (2, 3):
        length = x.shape[dim] - len(weights) + 1
        total = weights[0] * x.narrow(dim, 0, length)
        for i, weight in enumerate(weights[1:], start=1):
            total += weight * x.narrow(dim, i, length)
        x = total
    return x
