"""Embedded data sets: real images that installed packages carry, so that nothing is downloaded."""

import io
import os
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from gmdist import storage
from gmdist.data import glyphs
from gmdist.data.manifest import MANIFEST_NAME, PACKED_NAMES, Manifest
from gmdist.data.pack import write_shards
from gmdist.errors import ConfigError, DataError

DIGITS_SIZE = 32  # pixels a side, from 8
IMAGE_SHAPES = {  # of the embedded data sets: pixels a side, channels
    "digits": (DIGITS_SIZE, 1),
    "digits-color": (DIGITS_SIZE, 3),
    "glyphs": (glyphs.GLYPH_SIZE, 1),
    "glyphs-color": (glyphs.GLYPH_SIZE, 3),
    "glyphs-serif": (glyphs.GLYPH_SIZE, 1),
    "glyphs-sans": (glyphs.GLYPH_SIZE, 1),
}
_HAVE_SERIFS = {"glyphs-serif": True, "glyphs-sans": False}  # others have faces of both kinds
_NUM_SHARDS = {"train": 16, "test": 4}
_DIGITS_TEST_EVERY = 6  # of each class


def digits(split: str, *, colour: bool = False) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The 1,797 handwritten digits of scikit-learn (UCI optical recognition of handwritten digits; Alpaydin 1998).

    Every sixth image of a class is in the test split. Images are grey, 8x8 with 17 levels in the source, enlarged to
    32x32 (bicubic).

    Args:
        split: "train" or "test".
        colour: dark strokes on a light ground, in two colours that the key draws; otherwise white on black.

    Returns:
        Pairs of a key and the members "png" and "cls".
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    seen = np.zeros(10, int)
    for number, (levels, label) in enumerate(zip(source.images, source.target, strict=True)):
        is_test = seen[label] % _DIGITS_TEST_EVERY == _DIGITS_TEST_EVERY - 1
        seen[label] += 1
        if is_test != (split == "test"):
            continue
        key = f"{number:04d}"
        small = Image.fromarray(np.rint(levels * (255 / 16)).astype(np.uint8))
        image = small.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
        if colour:
            image = glyphs.coloured(image, *glyphs.pair_of(glyphs.dark_on_light(), key))
        png = io.BytesIO()
        image.save(png, "PNG")
        yield key, {"png": png.getvalue(), "cls": str(label).encode()}


def make(name: str, destination: str) -> dict[str, Manifest]:
    """Write an embedded data set's splits to DESTINATION/train and DESTINATION/test.

    Where they are already, nothing is written; DataError if another data set is there.
    """
    if name in ("digits", "digits-color"):
        classes = tuple(str(digit) for digit in range(10))
        contents = {split: list(digits(split, colour=name == "digits-color")) for split in _NUM_SHARDS}
    elif name in IMAGE_SHAPES:
        found = glyphs.glyphs()
        characters = sorted({glyph.character for glyph in found})
        labels = {character: label for label, character in enumerate(characters)}
        classes = tuple(map(glyphs.name_of, characters))
        contents = {
            split: [
                glyphs.sample(glyph, labels[glyph.character], name == "glyphs-color")
                for glyph in part
                if _HAVE_SERIFS.get(name) in (None, glyph.has_serifs)
            ]
            for split, part in glyphs.split(found).items()
        }
    else:
        raise ConfigError(f"data make: no embedded data set '{name}'; there are: {', '.join(IMAGE_SHAPES)}")
    return {
        split: _write(samples, storage.join(destination, split), classes, _NUM_SHARDS[split])
        for split, samples in contents.items()
    }


def _write(
    samples: list[tuple[str, dict[str, bytes]]], folder: str, classes: tuple[str, ...], num_shards: int
) -> Manifest:
    storage.delete_leftovers(folder, PACKED_NAMES)
    if not storage.list_names(folder):
        return write_shards(samples, folder, classes, num_shards=num_shards)
    with tempfile.TemporaryDirectory(prefix="gmdist-make-") as scratch:
        wanted = write_shards(samples, scratch, classes, num_shards=num_shards)
        if storage.exists(storage.join(folder, MANIFEST_NAME)):
            same = Manifest.load(folder).hash == wanted.hash
        else:  # interrupted before the manifest, if all that is there are parts of it
            names = storage.list_names(folder)
            same = all(_same(storage.join(folder, name), os.path.join(scratch, name)) for name in names)
            if same:
                write_shards(samples, folder, classes, num_shards=num_shards)
    if not same:
        raise DataError(f"{folder}: holds another data set; choose another folder or delete it")
    return wanted


def _same(location: str, other: str) -> bool:
    return storage.exists(other) and storage.exists(location) and storage.read(location) == storage.read(other)
