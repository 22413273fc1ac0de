"""Bytes to arrays: images, arrays and captions in a few safe formats, checked before they are unpacked."""

import functools
import io
import json
import math
import re
import struct
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from gmdist.errors import DataError

MAX_PIXELS = 1 << 26  # of an encoded image: a few kilobytes can hold gigapixels
MAX_CAPTION_BYTES = 1 << 16  # a batch pads all captions to its longest

NO_IMAGE = "not a JPEG, PNG or WebP image"

UInt8Array = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_SCAN_START = re.compile(rb"\xff\xda")
_MAX_SCANS = 100
_COLORSPACES = {1: "GRAY", 3: "RGB"}  # of CMYK images too, as Pillow converts them
_PNG_START = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH_AT = 24  # in a PNG
_NPY_LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}  # of the header's length, by what it follows
_MAX_NPY_HEADER_BYTES = 1 << 13


class UndecodableError(Exception):
    """A member is missing or unsound. The loader replaces the sample and lists it."""


class Reduced(NamedTuple):
    """An image that was decoded at a fraction of its size."""

    image: UInt8Array  # [ceil(height / factor), ceil(width / factor), C]
    height: int  # pixels of the whole image
    width: int
    factor: int  # 1, 2, 4 or 8


def decode_image(content: Buffer, channels: int, out: UInt8Array | None = None) -> UInt8Array:
    """Decode a JPEG, PNG or WebP image.

    Args:
        content: the encoded image.
        channels: 1 for grey, 3 for RGB; the image is converted. Transparent parts become white.
        out: where a JPEG is decoded to if it fits, C-contiguous; other images have memory of their own.

    Returns:
        uint8 [H, W, C]; `out` itself where it was filled.

    Raises:
        UndecodableError: not one of the formats, damaged, an animation, of 16 bits, or larger than MAX_PIXELS.
    """
    if out is not None and content[:2] == _JPEG_START:
        if len(content) > out.size:  # otherwise they are few, of few pixels
            _check_scans(content)
        try:
            image = _simplejpeg().decode_jpeg(content, colorspace=_COLORSPACES[channels], buffer=out)
            return out if image.shape == out.shape else image
        except ValueError:  # it is larger, or damaged
            pass
    return decode_reduced(content, channels, None).image


def decode_reduced(content: Buffer, channels: int, min_side: int | None) -> Reduced:
    """Decode an image, a large JPEG at a fraction of its size: that is faster than to decode and resize it.

    Args:
        content, channels: as for `decode_image`.
        min_side: the shorter side keeps at least so many pixels; None: all.

    Raises:
        UndecodableError: as `decode_image`.
    """
    if content[:2] == _JPEG_START:
        return _decode_jpeg(content, channels, min_side)
    with open_image(content) as image:
        return Reduced(to_array(image, channels), image.height, image.width, 1)


def image_format(content: Buffer) -> str | None:
    """jpeg, png or webp, by an image's first bytes; None for any other."""
    if content[:2] == _JPEG_START:
        return "jpeg"
    if content[:8] == _PNG_START:
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


@contextmanager
def open_image(content: Buffer) -> Iterator[Image.Image]:
    """A JPEG, PNG or WebP image with Pillow; UndecodableError, as in `decode_image`, also while its pixels are read."""
    plugin: Any
    kind = image_format(content)
    if kind == "jpeg":
        _check_scans(content)
        plugin = JpegImagePlugin.JpegImageFile
    elif kind == "png":
        if content[_BIT_DEPTH_AT : _BIT_DEPTH_AT + 1] == b"\x10":  # Pillow would cut colours to 8 bits in silence
            raise UndecodableError("16 bits a channel; images have 8 bits a channel")
        plugin = PngImagePlugin.PngImageFile
    elif kind == "webp":
        plugin = WebPImagePlugin.WebPImageFile
    else:
        raise UndecodableError(NO_IMAGE)
    try:
        with plugin(io.BytesIO(content)) as image:  # Image.open would warn of sizes that are refused here
            _check_pixels(image.width, image.height)
            if getattr(image, "is_animated", False):
                raise UndecodableError(f"an animation of {image.n_frames} frames; images have one")
            yield image
    except Image.DecompressionBombError as error:
        raise UndecodableError(f"too many pixels; at most {MAX_PIXELS} are accepted") from error
    except (OSError, ValueError, SyntaxError, IndexError, TypeError, struct.error) as error:
        raise UndecodableError(f"damaged: {error}") from error


def _check_scans(content: Buffer) -> None:
    """Each scan of a JPEG goes over all of its pixels, and takes 100 bytes; within one its mark does not occur."""
    if len(_SCAN_START.findall(content)) > _MAX_SCANS:  # faster than bytes.count
        raise UndecodableError(f"more than {_MAX_SCANS} scans; a JPEG has 10 or so")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UndecodableError(f"{width}x{height} pixels; at most {MAX_PIXELS} are accepted")


def to_array(image: Image.Image, channels: int) -> UInt8Array:
    """A Pillow image as uint8 [H, W, C], its transparent parts on white."""
    if image.mode.startswith(("I", "F")):
        raise UndecodableError(f"{image.mode} pixels; images have 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[:, :, None] if channels == 1 else array


def _decode_jpeg(content: Buffer, channels: int, min_side: int | None) -> Reduced:
    simplejpeg, colorspace = _simplejpeg(), _COLORSPACES[channels]
    _check_scans(content)
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
        _check_pixels(width, height)
        for factor in (8, 4, 2) if min_side is not None else ():  # those that the discrete cosine transform is fast at
            least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
            if min(least.values()) >= min_side:
                image = simplejpeg.decode_jpeg(content, colorspace=colorspace, min_factor=2, **least)
                return Reduced(image, height, width, factor)
        return Reduced(simplejpeg.decode_jpeg(content, colorspace=colorspace), height, width, 1)
    except ValueError as error:
        bare = _without_padding(content)
        if bare is None:
            raise UndecodableError(str(error)) from error
    return _decode_jpeg(bare, channels, min_side)


def _without_padding(content: Buffer) -> bytes | None:
    """A JPEG without the zeros that some cameras write before its end; None where there are none.

    libjpeg warns of them as it does of damage.
    """
    image, end, rest = bytes(content).rpartition(_JPEG_END)
    bare = image.rstrip(b"\0")
    if bare.endswith(b"\xff"):  # a byte of the image's own, which is written with a zero
        bare += b"\0"
    return bare + end + rest if end and len(bare) < len(image) else None


@functools.cache
def _simplejpeg() -> Any:
    import simplejpeg  # four times as fast as Pillow, and it releases the GIL

    return simplejpeg


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of an image, resized to `size` pixels a side (Lanczos)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=square)


def check_size(image: UInt8Array, size: int) -> None:
    """DataError if a decoded image [H, W, C] is not `size` pixels a side."""
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        raise DataError(
            f"the image is {width}x{height}, but data.image_size is {size}; pack the data set again with "
            f"`gmdist data pack SRC DEST --image-size {size}`, or set data.resize or data.image_size"
        )


def decode_array(members: Mapping[str, memoryview], extension: str) -> npt.NDArray[Any]:
    """A `.npy` member of numbers, in the machine's byte order or another; it shares the member's memory.

    Raises:
        UndecodableError: no such member, not a `.npy` file, values that are no numbers, or not as long as it says.
    """
    content = _member(members, extension)
    length_bytes = _NPY_LENGTH_BYTES.get(bytes(content[:8]))
    if length_bytes is None:
        raise UndecodableError(f"{extension}: not a .npy file of version 1 or 2")
    start = 8 + length_bytes + int.from_bytes(content[8 : 8 + length_bytes], "little")
    if start > _MAX_NPY_HEADER_BYTES:
        raise UndecodableError(f"{extension}: a header of {start} bytes; at most {_MAX_NPY_HEADER_BYTES} are accepted")
    try:
        shape, fortran_order, dtype = _npy_header(bytes(content[:start]))
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise UndecodableError(f"{extension}: damaged header") from error  # the message may hold all of it
    if dtype.kind not in "fiub" or dtype.itemsize > 8:  # no pickled objects, and what torch has
        raise UndecodableError(f"{extension}: values of type {dtype}; arrays hold numbers of at most 64 bits, or bool")
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 1:
        raise UndecodableError(f"{extension}: {dtype} {list(shape)}; no axis may be shorter than 1")
    if len(shape) > 16 or wanted != len(content) - start:
        raise UndecodableError(
            f"{extension}: {len(content) - start} bytes of values, but {dtype} {list(shape)} take {wanted}"
        )
    return np.ndarray(shape, dtype, content, start, order="F" if fortran_order else "C")


@functools.lru_cache(maxsize=64)  # the samples of a data set have one header, and to parse it takes 20 us
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def decode_caption(members: Mapping[str, memoryview], source: str) -> bytes:
    """A sample's caption: UTF-8 without space at its ends; it may be empty.

    Args:
        members: bytes by extension.
        source: "txt", or "json:KEY" for the text under a key of the `.json` member.

    Raises:
        UndecodableError: no such member or key, not UTF-8, not a text, or longer than MAX_CAPTION_BYTES.
    """
    extension, _, key = source.partition(":")
    try:
        text = str(_member(members, extension), "utf-8-sig")  # Windows puts a mark before UTF-8
        if key:
            tree = json.loads(text)
            found = tree.get(key) if isinstance(tree, dict) else None
            if not isinstance(found, str):
                raise UndecodableError(f"{extension}: no text under the key {key!r}")
            text = found
        caption = text.strip().encode()
    except UnicodeError as error:
        raise UndecodableError(f"{extension}: the caption is not UTF-8 ({error}); convert it to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"{extension}: not JSON: {error}") from error
    if len(caption) > MAX_CAPTION_BYTES:
        raise UndecodableError(f"{extension}: a caption of {len(caption)} bytes; at most {MAX_CAPTION_BYTES}")
    return caption


def _member(members: Mapping[str, memoryview], extension: str) -> memoryview:
    if extension not in members:
        raise UndecodableError(f"no .{extension} among its members {sorted(members)}")
    return members[extension]
