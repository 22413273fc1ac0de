"""Batches in the making: threads read and decode samples into memory that batches take turns in."""

import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gmdist.data.config import DataConfig, batch_key
from gmdist.data.dataset import REPLACEMENT_ATTEMPTS, Dataset, common_layouts
from gmdist.data.decode import UInt8Array, UndecodableError
from gmdist.data.members import Decoded, decode_members, stack_captions
from gmdist.data.prefetch import Prefetcher
from gmdist.data.tape import Int64Array, digest
from gmdist.data.transform import flips, places
from gmdist.errors import DataError

_SAMPLES_PER_TASK = 32  # fewer, and threads spend their time waiting for the GIL
# Samples are read before they are decoded, so that Python's code and data stay in the processor's cache: up to so many
# bytes, or one sample.
_READ_BYTES = 1 << 20

Members = Mapping[str, memoryview]  # a sample's bytes by extension
QuarantineLine = dict[str, Any]  # of a sample that was replaced: number, shard, sample, reason


class Located(NamedTuple):
    """Some samples: their numbers, and where they are. [N] each."""

    numbers: Int64Array
    datasets: Int64Array
    own: Int64Array  # the numbers in their data sets
    shards: Int64Array
    indices: Int64Array  # in the shards


@dataclass(frozen=True, eq=False)
class Loaded:
    """A worker's part of a batch."""

    # label: int64 [N]; key: int64 [N]; caption: uint8 [N, L], UTF-8 padded with zeros; data.arrays: [N, ...], under
    # their names without .npy. Without what the config does not ask for.
    tensors: dict[str, Tensor]
    pixels: Tensor | None  # uint8 [N, H, W, C]; its memory is used again when this object is gone
    digest: int  # order digest of these samples
    quarantined: list[QuarantineLine]

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        """The batch as families take it, image: float32 [N, C, H, W] in [-1, 1]; bytes travel to the device.

        Captions stay on the host, where they are read.
        """
        batch = {
            name: tensor if name == "caption" else tensor.to(device, non_blocking=True)
            for name, tensor in self.tensors.items()
        }
        if self.pixels is not None:
            batch["image"] = as_floats(self.pixels.to(device, non_blocking=True))
        return batch

    @property
    def batch(self) -> dict[str, Tensor]:
        """The same on the CPU."""
        return self.batch_on(torch.device("cpu"))


def as_floats(pixels: Tensor) -> Tensor:
    """Bytes [N, H, W, C] as families take images: float32 [N, C, H, W] in [-1, 1]."""
    moved = pixels.permute(0, 3, 1, 2)
    return moved.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 127.5).sub_(1.0)


class BatchMaker:
    """Makes batches of some data sets; of samples that cannot be decoded, others take the places."""

    def __init__(self, config: DataConfig, datasets: list[Dataset]) -> None:
        """DataError if the samples lack data.arrays, or those of two data sets differ."""
        self.config, self.datasets = config, datasets
        self.layouts = common_layouts(config, datasets)
        self._num_samples = sum(dataset.tape.num_samples for dataset in datasets)
        # One in a small data set; 0.0 means none.
        self.max_bad = math.ceil(config.max_bad_fraction * self._num_samples)
        self._bad: set[tuple[int, int, int]] = set()
        self._spare: deque[Tensor] = deque()  # memory of batches that are gone
        self._lock = threading.Lock()

    def decode(
        self, sample: "_Sample", members: Members, place: float | None, out: UInt8Array | None, *, flipped: bool
    ) -> tuple[Decoded, int, list[QuarantineLine]]:
        """A sample or its replacement, cut at a place of its longer side; its hash; and what it replaces.

        Images are flipped by the caller. Where there is none, arrays are those of the mirror image.
        """
        mirrored = flipped and not self.config.image
        dataset = self.datasets[sample.dataset]
        shard, index = sample.shard, sample.place
        replaced: list[QuarantineLine] = []
        for attempt in range(REPLACEMENT_ATTEMPTS):
            try:
                decoded = decode_members(self.config, self.layouts, members, place, out, mirrored=mirrored)
                return decoded, dataset.shards.hash(shard, index), replaced
            except UndecodableError as error:
                reason = str(error)
            except DataError as error:
                raise DataError(f"{dataset.shards.name(shard, index)}: {error}") from error
            name = dataset.shards.name(shard, index)
            self._note_bad((sample.dataset, shard, index), f"{name}: {reason}")
            line = {"number": sample.number, "data_set": sample.dataset, "shard": dataset.shards.location(shard)}
            replaced.append(line | {"sample": dataset.shards.index(shard).keys[index], "reason": reason})
            shard, index = dataset.tape.replacement(sample.own, attempt)
            members = dataset.shards.read(shard, index)
        raise DataError(f"{name}: {REPLACEMENT_ATTEMPTS} samples in a row cannot be decoded; this one: {reason}")

    def _note_bad(self, sample: tuple[int, int, int], problem: str) -> None:
        with self._lock:
            self._bad.add(sample)
            count = len(self._bad)
        if count > self.max_bad:
            raise DataError(
                f"{count} samples cannot be decoded, more than data.max_bad_fraction allows ({self.max_bad} of "
                f"{self._num_samples}); the last one: {problem}"
            )

    def pixels(self, count: int) -> Tensor | None:
        """Memory for the images of a batch, uint8 [N, H, W, C]; None: data.image is false."""
        if not self.config.image:
            return None
        shape = (count, self.config.image_size, self.config.image_size, self.config.channels)
        if torch.cuda.is_available():  # pinned memory travels while the step goes on, and torch uses it again
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        while self._spare:
            spare = self._spare.popleft()
            if spare.shape == shape:
                return spare
        return torch.from_numpy(np.empty(shape, np.uint8))

    def reuse(self, loaded: Loaded) -> None:
        """Use a batch's memory again when it is gone: fresh memory costs a tenth of the time, in page faults."""
        if loaded.pixels is not None and not loaded.pixels.is_pinned():
            weakref.finalize(loaded, self._spare.append, loaded.pixels).atexit = False


class _Sample(NamedTuple):
    """One row of Located."""

    number: int
    dataset: int
    own: int
    shard: int
    place: int  # in the shard


class Underway:
    """A batch while threads fill its arrays."""

    def __init__(
        self,
        maker: BatchMaker,
        pool: ThreadPoolExecutor,
        located: Located,
        prefetchers: dict[int, Prefetcher],
        *,
        augmented: bool,
    ) -> None:
        """Begin.

        Args:
            maker: of batches.
            pool: the threads.
            located: the samples.
            prefetchers: that read the data sets in object storage.
            augmented: whether the config's crops and flips are made.
        """
        config, size = maker.config, len(located.numbers)
        self._maker, self._numbers, self._prefetchers = maker, located.numbers, prefetchers
        self._samples = list(map(_Sample, *(column.tolist() for column in located)))
        is_flipped = augmented and config.flip
        self._flips = flips(config.seed, self._numbers).tolist() if is_flipped else [False] * size
        is_cut = augmented and config.crop == "random"
        self._places = places(config.seed, self._numbers).tolist() if is_cut else [None] * size
        self._pixels = maker.pixels(size)
        self._images = None if self._pixels is None else self._pixels.numpy()
        self._arrays = [np.empty((size, *shape), dtype) for shape, dtype in maker.layouts]
        self._captions = [b""] * size
        self._labels = [-1] * size
        self._hashes = [0] * size
        tasks = range(0, size, _SAMPLES_PER_TASK)
        self._tasks: list[Future[list[QuarantineLine]]] = [pool.submit(self._fill, first) for first in tasks]

    def _fill(self, first: int) -> list[QuarantineLine]:
        replaced: list[QuarantineLine] = []
        for i, sample, members in self._read(first):
            out = None if self._images is None else self._images[i]
            (image, self._labels[i], self._captions[i], arrays), self._hashes[i], lines = self._maker.decode(
                sample, members, self._places[i], out, flipped=self._flips[i]
            )
            if out is not None and image is not None and (self._flips[i] or image is not out):
                out[:] = image[:, ::-1] if self._flips[i] else image
            for into, array in zip(self._arrays, arrays, strict=True):
                into[i] = array
            replaced += lines
        return replaced

    def _read(self, first: int) -> Iterator[tuple[int, _Sample, Members]]:
        """The samples of a task: their places in the batch, they, and their bytes."""
        shards = [dataset.shards for dataset in self._maker.datasets]
        portion: list[_Sample] = []
        portion_bytes = 0
        for sample in self._samples[first : first + _SAMPLES_PER_TASK]:
            num_bytes = shards[sample.dataset].num_bytes(sample.shard, sample.place)
            if portion and portion_bytes + num_bytes > _READ_BYTES:
                yield from zip(count(first), portion, self._contents(portion), strict=False)
                first, portion, portion_bytes = first + len(portion), [], 0
            portion.append(sample)
            portion_bytes += num_bytes
        yield from zip(count(first), portion, self._contents(portion), strict=False)

    def _contents(self, samples: list[_Sample]) -> list[Members]:
        taken = {}
        for i, prefetcher in self._prefetchers.items():
            taken[i] = iter(prefetcher.take([sample.own for sample in samples if sample.dataset == i]))
        datasets = self._maker.datasets
        return [
            datasets[i].shards.read(shard, place, next(taken[i]) if i in taken else None)
            for _, i, _, shard, place in samples
        ]

    def result(self) -> Loaded:
        """The batch, when it is full."""
        quarantined = [line for task in self._tasks for line in task.result()]
        config = self._maker.config
        tensors = {"key": torch.from_numpy(self._numbers)}
        if config.num_classes is not None:
            tensors["label"] = torch.from_numpy(np.array(self._labels, np.int64))
        if config.caption is not None:
            tensors["caption"] = torch.from_numpy(stack_captions(self._captions))
        for extension, array in zip(config.arrays, self._arrays, strict=True):
            tensors[batch_key(extension)] = torch.from_numpy(array)
        order = digest(self._numbers, np.array(self._hashes, np.int64))
        loaded = Loaded(tensors, self._pixels, order, quarantined)
        self._maker.reuse(loaded)
        return loaded
