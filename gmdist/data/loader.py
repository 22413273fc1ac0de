"""Batches for one worker: its numbers of the tape, read and decoded by threads ahead of use."""

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmdist import ranged, storage
from gmdist.data.cache import PART_BYTES, Cache
from gmdist.data.decode import UInt8Array, UndecodableError
from gmdist.data.fetch import Shards
from gmdist.data.manifest import Manifest
from gmdist.data.members import (
    Decoded,
    Layout,
    array_layouts,
    batch_key,
    decode_members,
    label_problem,
    stack_captions,
    validate_members,
)
from gmdist.data.prefetch import Prefetcher
from gmdist.data.tape import Int64Array, Tape, digest, owned
from gmdist.data.transform import flips, places
from gmdist.errors import ConfigError, DataError, check_int64
from gmdist.s3 import S3Config

_LOCATED_AT_ONCE = 2048
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
    image: bool = True  # False: none is read, for data sets of latents or tokens
    resize: str = "none"  # of the shorter side to image_size: "area", "lanczos"; "none": images have that size
    crop: str = "center"  # what is kept of a resized image's longer side; "random": drawn by the sample's number
    flip: bool = False  # every other image is mirrored, drawn by the sample's number
    num_classes: int | None = None  # labels are 0 ... num_classes - 1; None: labels are not read
    caption: str | None = None  # "txt": that member; "json:KEY": a text of the json member; None: captions are not read
    arrays: tuple[str, ...] = ()  # members that are arrays, such as latent.npy
    seed: int = 0  # draws the order of samples, crops and flips
    lanes: int = 240  # places of the data set that are read in turn; at most the number of shards counts
    block: int | None = None  # samples of a lane that are shuffled together; None: 65,536 / lanes, at least 256
    num_threads: int = 2  # that read and decode, a worker
    prefetch_batches: int = 4  # that are made ahead of use, a worker
    prefetch_mib: int = 1024  # of samples from object storage that are read ahead of use, a worker
    cache_dir: str | None = None  # local folder that keeps what was read from object storage; None: nothing is kept
    cache_gib: float = 100.0  # most that it takes, for all workers of a machine
    s3: S3Config = field(default_factory=S3Config)  # where object storage is
    max_bad_fraction: float = 0.001  # of the data set's samples that may be replaced before the run fails

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        for key in ("batch_size", "image_size", "lanes", "block", "num_threads", "prefetch_batches", "prefetch_mib"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"data.{key}: {getattr(self, key)}; must be at least 1")
        for key, most in (("image_size", 1 << 14), ("batch_size", 1 << 24), ("num_threads", 256), ("block", 1 << 40)):
            if (getattr(self, key) or 0) > most:
                raise ConfigError(f"data.{key}: {getattr(self, key)}; must be at most {most}")
        if self.cache_dir is not None and (not self.cache_dir or storage.is_s3(self.cache_dir)):
            raise ConfigError(f"data.cache_dir: '{self.cache_dir}'; must be a local folder, or null for no cache")
        if not self.cache_gib > 0:
            raise ConfigError(f"data.cache_gib: {self.cache_gib}; must be above 0")
        self.s3.validate()
        check_int64("data.seed", self.seed)
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels: {self.channels}; must be 1 (grey) or 3 (RGB)")
        if self.num_classes is not None and self.num_classes < 1:
            raise ConfigError(f"data.num_classes: {self.num_classes}; must be at least 1, or null for no labels")
        validate_members(self)
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ConfigError(f"data.max_bad_fraction: {self.max_bad_fraction}; must be between 0 and 1")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A worker's part of a batch."""

    # label: int64 [N]; key: int64 [N]; caption: uint8 [N, L], UTF-8 padded with zeros; data.arrays: [N, ...], under
    # their names without .npy. Without what the config does not ask for.
    tensors: dict[str, Tensor]
    pixels: Tensor | None  # uint8 [N, H, W, C]; its memory is used again when this object is gone
    digest: int  # order digest of these samples
    quarantined: list[dict[str, Any]]  # samples that were replaced: number, shard, sample, reason

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        """The batch as families take it, image: float32 [N, C, H, W] in [-1, 1]; bytes travel to the device."""
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        if self.pixels is not None:
            pixels = self.pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
            batch["image"] = pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 127.5).sub_(1.0)
        return batch

    @property
    def batch(self) -> dict[str, Tensor]:
        """The same on the CPU."""
        return self.batch_on(torch.device("cpu"))


class Loader:
    """Reads a data set in the order of its tape."""

    def __init__(self, config: DataConfig, folder: str, rank: int = 0, world_size: int = 1) -> None:
        """Open a data set.

        Args:
            config: sizes and order.
            folder: the shards: config.train or config.test.
            rank, world_size: which numbers are this worker's.

        Raises:
            DataError: there is no data set, its labels are outside the config's classes, or it lacks data.arrays.
        """
        folder = storage.absolute(folder)
        manifest = Manifest.load(folder)
        check_labels(config, manifest, folder)
        self.config, self._rank, self._world_size = config, rank, world_size
        cache = None
        if config.cache_dir is not None and storage.is_s3(folder):
            cache = Cache(config.cache_dir, int(config.cache_gib * 2**30), manifest.hash, self._next_use)
        self._shards = Shards(folder, manifest, cache)
        self.tape = Tape(
            manifest.shards.columns["samples"],
            seed=config.seed,
            lanes=config.lanes,
            block=config.block,
            manifest=manifest.hash,
        )
        self.num_samples = self.tape.num_samples
        self._bad: set[tuple[int, int]] = set()
        self._has_told = False  # that the cache's disk is full
        self._spare: deque[Tensor] = deque()  # memory of batches that are gone
        self._lock = threading.Lock()
        self.layouts = self._find_layouts()

    def _next_use(self, shards: Int64Array, places: Int64Array) -> Int64Array:
        """When parts of shards are used next, as if all samples of a shard were of one size."""
        columns = self._shards.manifest.shards.columns
        samples = columns["samples"][shards]
        per_byte = samples / np.maximum(1, columns["num_bytes"][shards])
        first = (places * PART_BYTES * per_byte).astype(np.int64)
        last = ((places + 1) * PART_BYTES * per_byte).astype(np.int64)
        most = np.maximum(0, samples - 1)
        return self.tape.next_use(shards, np.minimum(first, most), np.minimum(last, most), self._shards.position)

    def batches(self, start: int) -> Iterator[Loaded]:
        """This worker's part of one global batch after another, without end, from sample number `start` on.

        Random crops and flips are for training alone: this makes them, `sweep` and `first` do not.
        """
        size = self.config.batch_size
        assert size % self._world_size == 0, (size, self._world_size)
        yield from self._ahead(
            lambda: (owned(first, first + size, self._rank, self._world_size) for first in count(start, size)),
            augmented=True,
        )

    def sweep(self, batch_size: int) -> Iterator[Loaded]:
        """Every sample once, shared among the workers, `batch_size` at a time; the last part may be smaller."""
        numbers = owned(0, self.num_samples, self._rank, self._world_size)
        yield from self._ahead(lambda: (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)))

    def first(self, count: int) -> Loaded:
        """The samples with the numbers 0 ... count - 1: the same on every worker."""
        return next(self._ahead(lambda: iter([np.arange(count, dtype=np.int64)])))

    def counters(self) -> dict[str, float]:
        """What reading from object storage has cost this process: bytes, requests, retries, stalls."""
        return dict(ranged.counters.snapshot()) if storage.is_s3(self._shards.folder) else {}

    def notes(self) -> list[str]:
        """Lines that the user should read; each is given once."""
        cache = self._shards.cache
        if cache is None or not cache.is_disk_full or self._has_told:
            return []
        self._has_told = True
        return [
            f"data.cache_dir: {self.config.cache_dir}: its disk is full; nothing more is kept there, and the run goes "
            "on without it; free some space or set data.cache_gib lower, then start the run again"
        ]

    def _ahead(self, batches: Callable[[], Iterator[Int64Array]], augmented: bool = False) -> Iterator[Loaded]:
        """Load batches of numbers in order, `prefetch_batches` of them at a time in the threads."""
        with ExitStack() as stack:
            prefetcher = None
            if storage.is_s3(self._shards.folder):
                memory_bytes = self.config.prefetch_mib << 20
                prefetcher = stack.enter_context(Prefetcher(self._shards, self.tape, batches(), memory_bytes))
            pool = ThreadPoolExecutor(self.config.num_threads, thread_name_prefix="loader")
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            underway: deque[_Part] = deque()
            for numbers, shards, indices in self._located(batches()):
                underway.append(_Part(self, pool, numbers, shards, indices, prefetcher, augmented))
                if len(underway) > self.config.prefetch_batches:
                    yield underway.popleft().result()
            while underway:
                yield underway.popleft().result()

    def _located(self, batches: Iterator[Int64Array]) -> Iterator[tuple[Int64Array, Int64Array, Int64Array]]:
        """Batches with their samples' shards and indices: of several batches at once, for numpy's sake."""
        while group := list(islice(batches, max(1, _LOCATED_AT_ONCE // self.config.batch_size))):
            ends = np.cumsum([len(numbers) for numbers in group])[:-1]
            shards, indices = self.tape.locate(np.concatenate(group))
            yield from zip(group, np.split(shards, ends), np.split(indices, ends), strict=True)

    def decode(
        self, number: int, shard: int, index: int, place: float | None, out: UInt8Array | None, content: bytes | None
    ) -> tuple[Decoded, int, list[dict[str, Any]]]:
        """A sample or its replacement, cut at a place of its longer side; its crc32; and the quarantine lines."""
        replaced: list[dict[str, Any]] = []
        for attempt in range(_REPLACEMENT_ATTEMPTS):
            sample, members = self._shards.read(shard, index, content)
            content = None
            try:
                return decode_members(self.config, self.layouts, members, place, out), sample.crc32, replaced
            except UndecodableError as error:
                reason = str(error)
            except DataError as error:
                raise DataError(f"{self._shards.name(shard, index)}: {error}") from error
            name = self._shards.name(shard, index)
            self._note_bad(shard, index, f"{name}: {reason}")
            line = {"number": number, "shard": self._shards.manifest.shards[shard].name}
            replaced.append(line | {"sample": sample.key, "reason": reason})
            shard, index = self.tape.replacement(number, attempt)
        raise DataError(f"{name}: {_REPLACEMENT_ATTEMPTS} samples in a row cannot be decoded; this one: {reason}")

    def _find_layouts(self) -> list[Layout]:
        """Those of the first sample that has all of data.arrays."""
        if not self.config.arrays:
            return []
        for shard, index in zip(*self.tape.locate(np.arange(_REPLACEMENT_ATTEMPTS)), strict=True):
            _, members = self._shards.read(int(shard), int(index))
            try:
                return array_layouts(self.config, members)
            except UndecodableError as error:
                problem = f"{self._shards.name(int(shard), int(index))}: {error}"
        raise DataError(
            f"{problem}; data.arrays is {', '.join(self.config.arrays)}, and {_REPLACEMENT_ATTEMPTS} samples lack it"
        )

    def pixels(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for a batch's images, uint8 of a shape."""
        if torch.cuda.is_available():  # pinned memory travels while the step goes on, and torch uses it again
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        while self._spare:
            spare = self._spare.popleft()
            if spare.shape == shape:
                return spare
        return torch.empty(shape, dtype=torch.uint8)

    def reuse(self, loaded: Loaded) -> None:
        """Use a batch's memory again when it is gone: fresh memory costs a tenth of the time, in page faults."""
        if loaded.pixels is not None and not loaded.pixels.is_pinned():
            weakref.finalize(loaded, self._spare.append, loaded.pixels).atexit = False

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
    if manifest.num_labels > config.num_classes:
        shard = manifest.shards[int(manifest.shards.columns["labels"].argmax())]
        problem = label_problem(shard.labels - 1, config.num_classes)
        raise DataError(f"{storage.join(folder, shard.name)}: {problem}")


class _Part:
    """One worker's part of a batch while threads fill its arrays."""

    def __init__(
        self,
        loader: Loader,
        pool: ThreadPoolExecutor,
        numbers: Int64Array,
        shards: Int64Array,
        indices: Int64Array,
        prefetcher: Prefetcher | None,
        augmented: bool,
    ) -> None:
        config, count = loader.config, len(numbers)
        self._loader, self._numbers, self._shards, self._indices = loader, numbers, shards, indices
        self._prefetcher = prefetcher
        self._flips = flips(config.seed, numbers) if augmented and config.flip else np.zeros(count, bool)
        self._places = places(config.seed, numbers) if augmented and config.crop == "random" else None
        image_shape = (count, config.image_size, config.image_size, config.channels)
        self._pixels = loader.pixels(image_shape) if config.image else None
        self._images = np.empty(0) if self._pixels is None else self._pixels.numpy()
        self._arrays = [np.empty((count, *shape), dtype) for shape, dtype in loader.layouts]
        self._captions = [b""] * count
        self._labels = np.empty(count, np.int64)
        self._crc32 = np.empty(count, np.int64)
        tasks = range(0, count, _SAMPLES_PER_TASK)
        self._tasks: list[Future[list[dict[str, Any]]]] = [pool.submit(self._fill, first) for first in tasks]

    def _fill(self, first: int) -> list[dict[str, Any]]:
        replaced = []
        for i in range(first, min(first + _SAMPLES_PER_TASK, len(self._numbers))):
            number = int(self._numbers[i])
            (image, label, caption, arrays), crc32, lines = self._loader.decode(
                number,
                int(self._shards[i]),
                int(self._indices[i]),
                None if self._places is None else float(self._places[i]),
                self._images[i] if self._loader.config.image else None,
                self._prefetcher.take(number) if self._prefetcher else None,
            )
            self._labels[i], self._captions[i], self._crc32[i] = label, caption, crc32
            if image is not None and (self._flips[i] or not np.may_share_memory(image, self._images[i])):
                self._images[i] = image[:, ::-1] if self._flips[i] else image
            for into, array in zip(self._arrays, arrays, strict=True):
                into[i] = array
            replaced += lines
        return replaced

    def result(self) -> Loaded:
        quarantined = [line for task in self._tasks for line in task.result()]
        config = self._loader.config
        tensors = {"key": torch.from_numpy(self._numbers)}
        if config.num_classes is not None:
            tensors["label"] = torch.from_numpy(self._labels)
        if config.caption is not None:
            tensors["caption"] = torch.from_numpy(stack_captions(self._captions))
        for extension, array in zip(config.arrays, self._arrays, strict=True):
            tensors[batch_key(extension)] = torch.from_numpy(array)
        loaded = Loaded(tensors, self._pixels, digest(self._numbers, self._crc32), quarantined)
        self._loader.reuse(loaded)
        return loaded
