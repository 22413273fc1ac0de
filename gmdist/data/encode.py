"""Images on their way into shards: checked, and cut, resized and encoded anew where that is asked."""

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import ExifTags, Image

from gmdist.data.config import MAX_IMAGE_SIZE
from gmdist.data.decode import UndecodableError, center_crop_resize, decode_image, image_format, open_image, to_array
from gmdist.data.shard import IMAGE_EXTENSIONS, parse_label
from gmdist.errors import ConfigError, DataError

_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # by format
_TURNS = {  # by the orientation of EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUALITY = {"jpeg": 95, "webp": 90}  # defaults


@dataclass(frozen=True)
class Encoding:
    """How images are stored."""

    image_size: int | None = None  # pixels a side of the centred square; None: as they are
    format: str | None = None  # png, jpeg or webp; None: png where image_size is set, otherwise as they are
    quality: int | None = None  # of jpeg and webp, 1 to 100; None: 95 and 90

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        if self.image_size is not None and not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ConfigError(f"--image-size: {self.image_size}; must be from 1 to {MAX_IMAGE_SIZE}")
        if self.format is not None and self.format not in _EXTENSIONS:
            raise ConfigError(f"--format: '{self.format}'; must be one of {', '.join(_EXTENSIONS)}")
        if self.quality is not None and self.format not in _QUALITY:
            raise ConfigError(f"--quality: {self.quality}; goes with --format {' or '.join(_QUALITY)}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality: {self.quality}; must be from 1 to 100")

    @property
    def keeps_files(self) -> bool:
        """Whether every image keeps its bytes."""
        return self.image_size is None and self.format is None


def encode(members: Mapping[str, bytes], encoding: Encoding) -> dict[str, bytes]:
    """A sample as it is stored: its images encoded, its other members as they are.

    Raises:
        UndecodableError: an image or a text is not sound.
    """
    encoded: dict[str, bytes] = {}
    for extension, content in members.items():
        if extension in IMAGE_EXTENSIONS:
            stored, content = _encode_image(extension, content, encoding)
        else:
            _check_text(extension, content)
            stored = extension
        if stored in encoded:
            raise UndecodableError(f"two images that would both be its .{stored}")
        encoded[stored] = content
    return encoded


def _check_text(extension: str, content: bytes) -> None:
    try:
        if extension == "txt":
            content.decode()
        elif extension == "json":
            json.loads(content.decode("utf-8-sig"))
        elif extension == "cls":
            parse_label(content, "its .cls")
    except DataError as error:
        raise UndecodableError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"its .{extension} is no {'UTF-8' if extension == 'txt' else 'JSON'}") from error


def _encode_image(extension: str, content: bytes, encoding: Encoding) -> tuple[str, bytes]:
    """An image's extension and bytes in the shard."""
    wanted = _EXTENSIONS[encoding.format or "png"]
    is_so = encoding.image_size is None and encoding.quality is None and image_format(content) == encoding.format
    if encoding.keeps_files or is_so:
        decode_image(content, 3)
        return extension if encoding.keeps_files or extension.replace("jpeg", "jpg") == wanted else wanted, content
    try:
        return wanted, _encoded(content, encoding)
    except (OSError, ValueError) as error:  # WebP has no more than 16,383 pixels a side
        raise UndecodableError(str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its camera says that it was held; as it is, where that cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error):
        return image
    turns = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turns is None else image.transpose(turns)


def _encoded(content: bytes, encoding: Encoding) -> bytes:
    with open_image(content) as opened:
        opened.load()  # damage is met here, and not where its EXIF is looked for
        upright = _upright(opened)
        grey = upright.mode in ("L", "LA", "1")
        array = to_array(upright, 1 if grey else 3)
    image = Image.fromarray(array[:, :, 0] if grey else array)
    if encoding.image_size is not None:
        image = center_crop_resize(image, encoding.image_size)
    buffer = io.BytesIO()
    name = encoding.format or "png"
    options = {"quality": encoding.quality or _QUALITY[name]} if name in _QUALITY else {}
    image.save(buffer, name, **options)
    return buffer.getvalue()
