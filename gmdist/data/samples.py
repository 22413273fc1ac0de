"""Embedded data sets: real images that an installed package carries, so that nothing is downloaded."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from gmdist import storage
from gmdist.data.pack import write_shards
from gmdist.data.shard import Manifest
from gmdist.errors import ConfigError

DIGITS_SIZE = 32  # pixels a side, from 8
_DIGITS_SHARDS = 16
_DIGITS_TEST_EVERY = 6  # of each class


def digits(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The 1,797 handwritten digits of scikit-learn (UCI optical recognition of handwritten digits; Alpaydin 1998).

    Every sixth image of a class is in the test split. Images are grey, 8x8 with 17 levels in the source, enlarged to
    32x32 (bicubic).

    Args:
        split: "train" or "test".

    Returns:
        Pairs of a key and the members "png" and "cls".
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    seen = np.zeros(10, int)
    for number, (image, label) in enumerate(zip(source.images, source.target, strict=True)):
        is_test = seen[label] % _DIGITS_TEST_EVERY == _DIGITS_TEST_EVERY - 1
        seen[label] += 1
        if is_test != (split == "test"):
            continue
        small = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
        large = small.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
        png = io.BytesIO()
        large.save(png, "PNG")
        yield f"{number:04d}", {"png": png.getvalue(), "cls": str(label).encode()}


def make(name: str, destination: str) -> dict[str, Manifest]:
    """Write an embedded data set's splits to DESTINATION/train and DESTINATION/test."""
    if name != "digits":
        raise ConfigError(f"data make: no embedded data set '{name}'; there is: digits")
    classes = tuple(str(digit) for digit in range(10))
    return {
        split: write_shards(digits(split), storage.join(destination, split), classes, num_shards=shards)
        for split, shards in (("train", _DIGITS_SHARDS), ("test", 4))
    }
