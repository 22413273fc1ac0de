"""Bytes to arrays: images of a few safe formats, checked before they are unpacked."""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from gmdist.errors import DataError

MAX_PIXELS = 1 << 26  # of an encoded image: a few kilobytes can hold gigapixels

NO_IMAGE = "not a JPEG, PNG or WebP image"

UInt8Array = npt.NDArray[np.uint8]


class UndecodableError(Exception):
    """The bytes are not a sound image. The loader replaces the sample and lists it."""


def decode_image(content: bytes, channels: int) -> UInt8Array:
    """Decode a JPEG, PNG or WebP image.

    Args:
        content: the encoded image.
        channels: 1 for grey, 3 for RGB; the image is converted. Transparent parts become white.

    Returns:
        uint8 [H, W, C].

    Raises:
        UndecodableError: not one of the formats, damaged, or larger than MAX_PIXELS.
    """
    if content[:2] == b"\xff\xd8":
        return _decode_jpeg(content, channels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UndecodableError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are accepted")
                return to_array(image, channels)
    except UnidentifiedImageError as error:
        raise UndecodableError(NO_IMAGE) from error  # Pillow's message is the address of a buffer
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UndecodableError(str(error)) from error


def to_array(image: Image.Image, channels: int) -> UInt8Array:
    """A Pillow image as uint8 [H, W, C], its transparent parts on white."""
    if image.mode.startswith(("I", "F")):
        raise UndecodableError(f"{image.mode} pixels; images have 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[:, :, None] if channels == 1 else array


def _decode_jpeg(content: bytes, channels: int) -> UInt8Array:
    import simplejpeg  # four times as fast as Pillow, and it releases the GIL

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
        if width * height > MAX_PIXELS:
            raise UndecodableError(f"{width}x{height} pixels; at most {MAX_PIXELS} are accepted")
        return simplejpeg.decode_jpeg(content, colorspace="GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        raise UndecodableError(str(error)) from error


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of an image, resized to `size` pixels a side (Lanczos)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=square)


def check_size(image: UInt8Array, size: int, name: str) -> None:
    """DataError if a decoded image [H, W, C] is not `size` pixels a side."""
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        raise DataError(
            f"{name}: the image is {width}x{height}, but data.image_size is {size}; pack the data set again with "
            f"`gmdist data pack SRC DEST --image-size {size}`, or set data.image_size"
        )
