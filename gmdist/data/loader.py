"""Batches for one worker: its numbers of the tape, read and decoded by threads ahead of use."""

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmdist import storage
from gmdist.data.decode import UInt8Array, UndecodableError, check_size, decode_image
from gmdist.data.fetch import Shards
from gmdist.data.shard import Manifest, Sample, parse_label
from gmdist.data.tape import Int64Array, Tape, digest, owned
from gmdist.errors import ConfigError, DataError, check_int64

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_SAMPLES_PER_TASK = 16  # fewer, and threads spend their time waiting for the GIL
_REPLACEMENT_ATTEMPTS = 16


@dataclass
class DataConfig:
    """Where samples come from."""

    train: str  # folder or s3:// prefix of shards
    batch_size: int  # samples a step, over all workers
    image_size: int  # pixels a side
    test: str | None = None  # shards for evaluation; None: no evaluation
    channels: int = 3  # 1 grey, 3 RGB
    num_classes: int | None = None  # labels are 0 ... num_classes - 1; None: labels are not read
    seed: int = 0  # draws the order of samples
    lanes: int = 240  # places of the data set that are read in turn; at most the number of shards counts
    block: int | None = None  # samples of a lane that are shuffled together; None: 65,536 / lanes, at least 256
    num_threads: int = 2  # that read and decode, a worker
    prefetch_batches: int = 4  # that are made ahead of use, a worker
    max_bad_fraction: float = 0.001  # of the data set's samples that may be replaced before the run fails

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        for key in ("batch_size", "image_size", "lanes", "block", "num_threads", "prefetch_batches"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"data.{key}: {getattr(self, key)}; must be at least 1")
        for key, most in (("image_size", 1 << 14), ("batch_size", 1 << 24), ("num_threads", 256), ("block", 1 << 40)):
            if (getattr(self, key) or 0) > most:
                raise ConfigError(f"data.{key}: {getattr(self, key)}; must be at most {most}")
        check_int64("data.seed", self.seed)
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels: {self.channels}; must be 1 (grey) or 3 (RGB)")
        if self.num_classes is not None and self.num_classes < 1:
            raise ConfigError(f"data.num_classes: {self.num_classes}; must be at least 1, or null for no labels")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ConfigError(f"data.max_bad_fraction: {self.max_bad_fraction}; must be between 0 and 1")


@dataclass(frozen=True)
class Loaded:
    """A worker's part of a batch."""

    batch: dict[str, Tensor]  # image: float32 [N, C, H, W] in [-1, 1]; label: int64 [N]; key: int64 [N]
    digest: int  # order digest of these samples
    quarantined: list[dict[str, Any]]  # samples that were replaced: number, shard, sample, reason


class Loader:
    """Reads a data set in the order of its tape."""

    def __init__(self, config: DataConfig, folder: str, rank: int = 0, world_size: int = 1) -> None:
        """Open a data set.

        Args:
            config: sizes and order.
            folder: the shards: config.train or config.test.
            rank, world_size: which numbers are this worker's.

        Raises:
            DataError: there is no data set, or its labels are outside the config's classes.
        """
        folder = storage.absolute(folder)
        manifest = Manifest.load(folder)
        check_labels(config, manifest, folder)
        self.config, self._rank, self._world_size = config, rank, world_size
        self._shards = Shards(folder, manifest)
        self.tape = Tape(
            [shard.samples for shard in manifest.shards],
            seed=config.seed,
            lanes=config.lanes,
            block=config.block,
            manifest=manifest.hash,
        )
        self.num_samples = self.tape.num_samples
        self._bad: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def batches(self, start: int) -> Iterator[Loaded]:
        """This worker's part of one global batch after another, without end, from sample number `start` on."""
        size = self.config.batch_size
        assert size % self._world_size == 0, (size, self._world_size)
        parts = (owned(first, first + size, self._rank, self._world_size) for first in _count(start, size))
        yield from self._ahead(parts)

    def sweep(self, batch_size: int) -> Iterator[Loaded]:
        """Every sample once, shared among the workers, `batch_size` at a time; the last part may be smaller."""
        numbers = owned(0, self.num_samples, self._rank, self._world_size)
        yield from self._ahead(numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size))

    def first(self, count: int) -> Loaded:
        """The samples with the numbers 0 ... count - 1: the same on every worker."""
        return next(self._ahead(iter([np.arange(count, dtype=np.int64)])))

    def _ahead(self, parts: Iterator[Int64Array]) -> Iterator[Loaded]:
        """Load the parts in order, `prefetch_batches` of them at a time in the threads."""
        pool = ThreadPoolExecutor(self.config.num_threads, thread_name_prefix="loader")
        underway: deque[_Part] = deque()
        try:
            for numbers in parts:
                underway.append(_Part(self, pool, numbers))
                if len(underway) > self.config.prefetch_batches:
                    yield underway.popleft().result()
            while underway:
                yield underway.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def decode(self, number: int, shard: int, index: int) -> tuple[UInt8Array, int, int, list[dict[str, Any]]]:
        """Image [H, W, C], label (-1 without), crc32 and quarantine lines of a sample, or of its replacement."""
        replaced: list[dict[str, Any]] = []
        for attempt in range(_REPLACEMENT_ATTEMPTS):
            sample, members = self._shards.read(shard, index)
            name = self._shards.location(shard, index)
            try:
                image = self._decode_image(members)
            except UndecodableError as error:
                self._note_bad(shard, index, f"{name}: {error}")
                line = {"number": number, "shard": self._shards.manifest.shards[shard].name}
                replaced.append(line | {"sample": sample.key, "reason": str(error)})
                shard, index = self.tape.replacement(number, attempt)
                continue
            check_size(image, self.config.image_size, name)
            return image, self._label(sample, members, name), sample.crc32, replaced
        raise DataError(f"{name}: {_REPLACEMENT_ATTEMPTS} samples in a row cannot be decoded")

    def _decode_image(self, members: dict[str, bytes]) -> UInt8Array:
        for extension in IMAGE_EXTENSIONS:
            if extension in members:
                return decode_image(members[extension], self.config.channels)
        raise UndecodableError(
            f"no image among its members {sorted(members)}; images are {', '.join(IMAGE_EXTENSIONS)}"
        )

    def _label(self, sample: Sample, members: dict[str, bytes], name: str) -> int:
        classes = self.config.num_classes
        if classes is None:
            return -1
        if "cls" not in members:
            raise DataError(f"{name}: no class label (.cls), but data.num_classes is {classes}")
        label = parse_label(members["cls"], name)
        if label >= classes:
            raise DataError(_label_problem(name, label, classes))
        return label

    def _note_bad(self, shard: int, index: int, problem: str) -> None:
        allowed = math.ceil(self.config.max_bad_fraction * self.num_samples)  # one in a small data set; 0.0 means none
        with self._lock:
            self._bad.add((shard, index))
            count = len(self._bad)
        if count > allowed:
            raise DataError(
                f"{count} samples cannot be decoded, more than data.max_bad_fraction allows ({allowed} of "
                f"{self.num_samples}); the last one: {problem}"
            )


def check_labels(config: DataConfig, manifest: Manifest, folder: str) -> None:
    """DataError if the manifest knows of labels outside the config's classes, or of none where they are asked for."""
    if config.num_classes is None:
        return
    if manifest.num_labels == 0:
        raise DataError(f"{folder}: no class labels (.cls members), but data.num_classes is {config.num_classes}")
    for shard in manifest.shards:
        if shard.labels > config.num_classes:
            raise DataError(_label_problem(storage.join(folder, shard.name), shard.labels - 1, config.num_classes))


def _label_problem(name: str, label: int, classes: int) -> str:
    return (
        f"{name}: class label {label} is out of range: data.num_classes is {classes}, so labels are 0 to {classes - 1}"
    )


def _count(start: int, step: int) -> Iterator[int]:
    while True:
        yield start
        start += step


class _Part:
    """One worker's part of a batch while threads fill its arrays."""

    def __init__(self, loader: Loader, pool: ThreadPoolExecutor, numbers: Int64Array) -> None:
        config, count = loader.config, len(numbers)
        self._loader, self._numbers = loader, numbers
        self._shards, self._indices = loader.tape.locate(numbers)
        self._images = np.empty((count, config.channels, config.image_size, config.image_size), np.float32)
        self._labels = np.empty(count, np.int64)
        self._crc32 = np.empty(count, np.int64)
        tasks = range(0, count, _SAMPLES_PER_TASK)
        self._tasks: list[Future[list[dict[str, Any]]]] = [pool.submit(self._fill, first) for first in tasks]

    def _fill(self, first: int) -> list[dict[str, Any]]:
        replaced = []
        for i in range(first, min(first + _SAMPLES_PER_TASK, len(self._numbers))):
            image, self._labels[i], self._crc32[i], lines = self._loader.decode(
                int(self._numbers[i]), int(self._shards[i]), int(self._indices[i])
            )
            # 0 ... 255 to [-1, 1]
            np.multiply(image.transpose(2, 0, 1), np.float32(1 / 127.5), out=self._images[i])
            self._images[i] -= 1.0
            replaced += lines
        return replaced

    def result(self) -> Loaded:
        quarantined = [line for task in self._tasks for line in task.result()]
        batch = {"image": torch.from_numpy(self._images), "key": torch.from_numpy(self._numbers)}
        if self._loader.config.num_classes is not None:
            batch["label"] = torch.from_numpy(self._labels)
        return Loaded(batch, digest(self._numbers, self._crc32), quarantined)
