"""From images of any size to squares of one: resize, crop and flip, drawn by the sample's number alone."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from gmdist.data.decode import Buffer, Reduced, UInt8Array, decode_reduced
from gmdist.data.tape import Int64Array, Purpose, keyed_hash

# The filter, and to how many times the target plain averages may shrink an image before it. Three times is not seen in
# what Lanczos makes, and takes half its time where images are eight times as large; boxes are fast without.
FILTERS: dict[str, tuple[Image.Resampling, float | None]] = {
    "area": (Image.Resampling.BOX, None),
    "lanczos": (Image.Resampling.LANCZOS, 3.0),
}
# A JPEG is decoded to no less than so many times the target. With 1, Lanczos differs from that of the whole image by
# 28 to 50 dB; with 2, by 45 or more.
_DECODED_AT_LEAST = 2


def flips(seed: int, numbers: Int64Array) -> npt.NDArray[np.bool_]:
    """Which of the samples with these numbers [N] are mirrored, each with probability one half: [N]."""
    return keyed_hash(seed, Purpose.FLIP, numbers) >> np.uint64(63) == 1


def places(seed: int, numbers: Int64Array) -> npt.NDArray[np.float64]:
    """Where along the longer side the samples with these numbers [N] are cut, uniform in [0, 1): [N]."""
    return (keyed_hash(seed, Purpose.CROP, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def decode_square(content: Buffer, channels: int, size: int, method: str, place: float | None) -> UInt8Array:
    """Decode an image, resize it until its shorter side has `size` pixels, and cut a square.

    Args:
        content: a JPEG, PNG or WebP image.
        channels: 1 for grey, 3 for RGB.
        size: pixels a side.
        method: "area" or "lanczos".
        place: of the square along the longer side, from 0 to 1; None: the centre.

    Returns:
        uint8 [size, size, C].

    Raises:
        UndecodableError: not a sound image.
    """
    return square(decode_reduced(content, channels, _DECODED_AT_LEAST * size), size, method, place)


def square(reduced: Reduced, size: int, method: str, place: float | None) -> UInt8Array:
    """The largest square of an image at a place of its longer side, resized; arguments as for `decode_square`."""
    image, height, width, factor = reduced
    side = min(height, width)
    spare = max(height, width) - side
    offset = spare // 2 if place is None else int(place * (spare + 1))
    left, top = (offset, 0) if width > height else (0, offset)
    if factor == 1 and side == size:
        return image[top : top + size, left : left + size]
    # Only what is kept is resized: an image of 1 x 1,000,000 pixels stays small. The box is the same part of the whole
    # image for any factor, though the last pixel of a reduced one may reach over its edge.
    box = (left / factor, top / factor, (left + side) / factor, (top + side) / factor)
    grey = image.shape[2] == 1
    resample, reducing_gap = FILTERS[method]
    whole = Image.fromarray(image[:, :, 0] if grey else image)
    resized = np.asarray(whole.resize((size, size), resample, box, reducing_gap))
    return resized[:, :, None] if grey else resized
