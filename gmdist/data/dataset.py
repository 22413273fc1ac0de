"""One data set of a run: its shards, their order, and what its samples hold."""

import numpy as np

from gmdist import storage
from gmdist.data.cache import PART_BYTES
from gmdist.data.config import DataConfig
from gmdist.data.decode import UndecodableError
from gmdist.data.fetch import Shards
from gmdist.data.manifest import Manifest
from gmdist.data.members import Layout, array_layouts, label_problem
from gmdist.data.tape import Int64Array, Tape
from gmdist.errors import DataError

REPLACEMENT_ATTEMPTS = 16


class Dataset:
    """The shards of a data set and their order."""

    def __init__(
        self, config: DataConfig, folder: str, manifest: Manifest, lanes: int, block: int, *, rotated: bool = False
    ) -> None:
        """Open it.

        Args:
            config: the seed, and what a sample has to hold.
            folder: local or s3://.
            manifest: its shards.
            lanes, block, rotated: of the tape.

        Raises:
            DataError: the labels are outside the config's classes, or there are none.
        """
        check_labels(config, manifest, folder)
        samples = manifest.shards.columns["samples"]
        self.tape = Tape(samples, seed=config.seed, lanes=lanes, block=block, manifest=manifest.hash, rotated=rotated)
        # Lanes come in turn: with fewer indexes, each would be read again for each sample. At the end of a shard, or of
        # a block, a lane is at two.
        self.shards = Shards(folder, manifest, num_indexes=2 * self.tape.fingerprint.lanes)

    def next_use(self, shards: Int64Array, places: Int64Array) -> Int64Array:
        """When parts of shards are used next, as if all samples of a shard were of one size."""
        columns = self.shards.manifest.shards.columns
        samples = columns["samples"][shards]
        per_byte = samples / np.maximum(1, columns["num_bytes"][shards])
        first = (places * PART_BYTES * per_byte).astype(np.int64)
        last = ((places + 1) * PART_BYTES * per_byte).astype(np.int64)
        most = np.maximum(0, samples - 1)
        return self.tape.next_use(shards, np.minimum(first, most), np.minimum(last, most), self.shards.position)

    def layouts(self, config: DataConfig) -> list[Layout]:
        """The layouts of data.arrays: those that two samples share first, since one may be the odd one out.

        Raises:
            DataError: the samples lack an array.
        """
        if not config.arrays:
            return []
        found: list[list[Layout]] = []
        for shard, index in zip(*self.tape.locate(np.arange(REPLACEMENT_ATTEMPTS)), strict=True):
            try:
                layouts = array_layouts(config, self.shards.read(int(shard), int(index)))
            except UndecodableError as error:
                problem = f"{self.shards.name(int(shard), int(index))}: {error}"
                continue
            if layouts in found:
                return layouts
            found.append(layouts)
        if found:
            return found[0]
        raise DataError(
            f"{problem}; data.arrays is {', '.join(config.arrays)}, and {REPLACEMENT_ATTEMPTS} samples lack it"
        )


def common_layouts(config: DataConfig, datasets: list[Dataset]) -> list[Layout]:
    """The layouts of data.arrays, one for all data sets; DataError if they differ, or samples lack an array."""
    first, *others = datasets
    layouts = first.layouts(config)
    for other in others:
        for extension, (shape, dtype), (first_shape, first_dtype) in zip(
            config.arrays, other.layouts(config), layouts, strict=True
        ):
            if (shape, dtype) != (first_shape, first_dtype):
                raise DataError(
                    f"{other.shards.folder}: {extension} is {dtype} {list(shape)}, but that of {first.shards.folder} "
                    f"is {first_dtype} {list(first_shape)}; a mix has one layout"
                )
    return layouts


def other_classes(one: Manifest, other: Manifest) -> str | None:
    """The first class that two data sets have other names for, in words; None where they agree, or do not say."""
    for label, (name, theirs) in enumerate(zip(one.classes, other.classes, strict=False)):
        if name != theirs:
            return f"its class {label} is '{name}', and '{theirs}'"
    return None


def check_labels(config: DataConfig, manifest: Manifest, folder: str) -> None:
    """DataError if the manifest knows of labels outside the config's classes, or of none where they are asked for."""
    if config.num_classes is None:
        return
    if manifest.num_labels == 0:
        raise DataError(
            f"{folder}: no class labels (.cls members with numbers from 0 on), and data.num_classes is "
            f"{config.num_classes}"
        )
    if manifest.num_labels > config.num_classes:
        shard = manifest.shards[int(manifest.shards.columns["labels"].argmax())]
        problem = label_problem(shard.labels - 1, config.num_classes)
        raise DataError(f"{storage.join(folder, shard.name)}: {problem}")
