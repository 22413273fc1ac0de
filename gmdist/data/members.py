"""What a run reads of a sample, as its config says: image, label, caption and arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gmdist.data.config import DataConfig
from gmdist.data.decode import UInt8Array, UndecodableError, check_size, decode_array, decode_caption, decode_image
from gmdist.data.shard import IMAGE_EXTENSIONS, parse_label
from gmdist.data.transform import decode_square
from gmdist.errors import DataError

Layout = tuple[tuple[int, ...], np.dtype[Any]]  # of an array: shape, and dtype in the machine's byte order


class Decoded(NamedTuple):
    """What a batch takes of one sample."""

    image: UInt8Array | None  # [H, W, C], perhaps in the memory that was given for it; None: data.image is false
    label: int  # -1 without
    caption: bytes  # UTF-8; empty without
    arrays: list[npt.NDArray[Any]]  # in the order of data.arrays


def decode_members(
    config: DataConfig,
    layouts: list[Layout],
    members: Mapping[str, memoryview],
    place: float | None,
    out: UInt8Array | None,
    *,
    mirrored: bool = False,
) -> Decoded:
    """Decode what the config asks for.

    Args:
        config: of the data set.
        layouts: of config.arrays, each.
        members: the sample's bytes by extension.
        place: of the square that is cut from a resized image, along its longer side, from 0 to 1; None: the centre.
        out: memory that an image [H, W, C] may be decoded to; None: there is no image.
        mirrored: whether arrays are those of the mirror image.

    Raises:
        UndecodableError: a member is missing or unsound.
        DataError: the image's size or the label is not the config's.
    """
    image = image_of(config, members, place, out) if config.image else None
    caption = b"" if config.caption is None else decode_caption(members, config.caption)
    arrays = _arrays(config, layouts, members, mirrored=mirrored) if config.arrays else []
    return Decoded(image, _label(config, members), caption, arrays)


def _arrays(
    config: DataConfig, layouts: list[Layout], members: Mapping[str, memoryview], *, mirrored: bool
) -> list[npt.NDArray[Any]]:
    names = [mirror_name(extension) if mirrored else extension for extension in config.arrays]
    arrays = [decode_array(members, name) for name in names]
    for extension, array, layout in zip(config.arrays, arrays, layouts, strict=True):
        if _layout(array) != layout:
            shape, dtype = layout
            raise UndecodableError(
                f"{extension}: {array.dtype} {list(array.shape)}, but others of the data set are {dtype} {list(shape)}"
            )
    return arrays


def array_layouts(config: DataConfig, members: Mapping[str, memoryview]) -> list[Layout]:
    """The layouts of config.arrays in a sample; UndecodableError if it lacks one."""
    return [_layout(decode_array(members, extension)) for extension in config.arrays]


def _layout(array: npt.NDArray[Any]) -> Layout:
    return array.shape, array.dtype.newbyteorder("=")


def mirror_name(extension: str) -> str:
    """The member that holds an array of the mirror image: latent_flip.npy beside latent.npy."""
    return extension.removesuffix(".npy") + "_flip.npy"


def image_of(
    config: DataConfig, members: Mapping[str, memoryview], place: float | None, out: UInt8Array | None
) -> UInt8Array:
    """A sample's image [H, W, C]; arguments and errors as for `decode_members`."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            if config.resize != "none":
                return decode_square(members[extension], config.channels, config.image_size, config.resize, place)
            image = decode_image(members[extension], config.channels, out)
            check_size(image, config.image_size)
            return image
    raise UndecodableError(f"no image among its members {sorted(members)}; images are {', '.join(IMAGE_EXTENSIONS)}")


def _label(config: DataConfig, members: Mapping[str, memoryview]) -> int:
    classes = config.num_classes
    if classes is None:
        return -1
    if "cls" not in members:
        raise UndecodableError(f"no class label (.cls), but data.num_classes is {classes}")
    try:
        label = parse_label(bytes(members["cls"]), "cls")
    except DataError as error:
        raise UndecodableError(str(error)) from error
    if label >= classes:
        raise DataError(label_problem(label, classes))
    return label


def label_problem(label: int, classes: int) -> str:
    """What to say of a label that is not below the number of classes."""
    return f"class label {label} is out of range: data.num_classes is {classes}, so labels are 0 to {classes - 1}"


def stack_captions(captions: list[bytes]) -> npt.NDArray[np.uint8]:
    """Captions in one array, padded with zeros to the longest: [N, L]."""
    longest = max(map(len, captions), default=0)
    padded = bytearray().join(caption.ljust(longest, b"\0") for caption in captions)
    return np.frombuffer(padded, np.uint8).reshape(len(captions), longest)
