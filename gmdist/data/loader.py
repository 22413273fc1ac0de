"""Batches for one worker: its numbers of the order, read and decoded by threads ahead of use."""

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gmdist import ranged, storage
from gmdist.data.cache import PART_BYTES, Cache
from gmdist.data.config import DataConfig, MixedConfig, batch_key
from gmdist.data.decode import UInt8Array, UndecodableError
from gmdist.data.fetch import Shards
from gmdist.data.manifest import Manifest
from gmdist.data.members import (
    Decoded,
    Layout,
    array_layouts,
    decode_members,
    label_problem,
    stack_captions,
)
from gmdist.data.mix import Fingerprint, Mix
from gmdist.data.prefetch import Prefetcher
from gmdist.data.tape import Int64Array, Tape, default_block, digest, owned, usable_lanes
from gmdist.data.transform import flips, places
from gmdist.errors import DataError

_LOCATED_AT_ONCE = 1 << 14  # samples
_SAMPLES_PER_TASK = 32  # fewer, and threads spend their time waiting for the GIL
_REPLACEMENT_ATTEMPTS = 16

Members = Mapping[str, memoryview]  # a sample's bytes by extension
_Split = Callable[[Int64Array], tuple[Int64Array, Int64Array]]  # numbers -> data sets, and the numbers there


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


class _Located(NamedTuple):
    """Some samples: their numbers, and where they are. [N] each."""

    numbers: Int64Array
    sources: Int64Array  # the data sets
    own: Int64Array  # the numbers there
    shards: Int64Array
    indices: Int64Array  # in the shards


class _Source:
    """One data set: its shards and their order."""

    def __init__(self, config: DataConfig, folder: str, manifest: Manifest, lanes: int, block: int) -> None:
        check_labels(config, manifest, folder)
        samples = manifest.shards.columns["samples"]
        self.shards = Shards(folder, manifest)
        self.tape = Tape(samples, seed=config.seed, lanes=lanes, block=block, manifest=manifest.hash)

    def next_use(self, shards: Int64Array, places: Int64Array) -> Int64Array:
        """When parts of shards are used next, as if all samples of a shard were of one size."""
        columns = self.shards.manifest.shards.columns
        samples = columns["samples"][shards]
        per_byte = samples / np.maximum(1, columns["num_bytes"][shards])
        first = (places * PART_BYTES * per_byte).astype(np.int64)
        last = ((places + 1) * PART_BYTES * per_byte).astype(np.int64)
        most = np.maximum(0, samples - 1)
        return self.tape.next_use(shards, np.minimum(first, most), np.minimum(last, most), self.shards.position)


class Loader:
    """Reads a data set, or a mix of several, in an order that its config alone decides."""

    def __init__(self, config: DataConfig, data: str | list[MixedConfig], rank: int = 0, world_size: int = 1) -> None:
        """Open the data.

        Args:
            config: sizes and order.
            data: the folder of one data set, or several with their weights: config.trained_on.
            rank, world_size: which numbers are this worker's.

        Raises:
            DataError: there is no data set, its labels are outside the config's classes, or it lacks data.arrays.
        """
        mixed = [MixedConfig(data)] if isinstance(data, str) else data
        self.config, self._rank, self._world_size = config, rank, world_size
        self._mix = Mix([part.weight for part in mixed], seed=config.seed, lanes=config.lanes)
        folders = [storage.absolute(part.train) for part in mixed]
        manifests = [Manifest.load(folder) for folder in folders]
        block = config.block or _default_block(self._mix, manifests)
        self.sources = [
            _Source(config, folder, manifest, lanes, block)
            for folder, manifest, lanes in zip(folders, manifests, self._mix.lanes, strict=True)
        ]
        self.fingerprint = Fingerprint(self._mix.weights, tuple(source.tape.fingerprint for source in self.sources))
        self._ends = np.cumsum([source.tape.num_samples for source in self.sources])
        self.num_samples = int(self._ends[-1])
        self._remote = [i for i, source in enumerate(self.sources) if storage.is_s3(source.shards.folder)]
        self._cache = self._open_cache()
        self._bad: set[tuple[int, int, int]] = set()
        self._notes = self._note_shared()
        self._has_told = False  # that the cache's disk is full
        self._spare: deque[Tensor] = deque()  # memory of batches that are gone
        self._lock = threading.Lock()
        self.layouts = self._find_layouts()

    def _open_cache(self) -> Cache | None:
        if self.config.cache_dir is None or not self._remote:
            return None
        uses = {self.sources[i].shards.manifest.hash: functools.partial(self._next_use, i) for i in self._remote}
        cache = Cache(self.config.cache_dir, int(self.config.cache_gib * 2**30), uses)
        for i in self._remote:
            self.sources[i].shards.cache = cache
        return cache

    def _next_use(self, source: int, shards: Int64Array, places: Int64Array) -> Int64Array:
        """When parts of a data set are used next, in numbers of the mix."""
        weights = self._mix.weights
        return self.sources[source].next_use(shards, places) * sum(weights) // weights[source]

    def batches(self, start: int) -> Iterator[Loaded]:
        """This worker's part of one global batch after another, without end, from sample number `start` on.

        Random crops and flips are for training alone: this makes them, `sweep` and `first` do not.
        """
        size = self.config.batch_size
        assert size % self._world_size == 0, (size, self._world_size)
        yield from self._ahead(
            lambda: (owned(first, first + size, self._rank, self._world_size) for first in count(start, size)),
            self._mix.split,
            augmented=True,
        )

    def sweep(self, batch_size: int) -> Iterator[Loaded]:
        """Every sample once, shared among the workers, `batch_size` at a time; the last part may be smaller.

        Several data sets come one after the other, whatever their weights.
        """
        numbers = owned(0, self.num_samples, self._rank, self._world_size)
        parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        yield from self._ahead(lambda: iter(parts), self._one_after_the_other)

    def first(self, count: int) -> Loaded:
        """The samples with the numbers 0 ... count - 1: the same on every worker."""
        return next(self._ahead(lambda: iter([np.arange(count, dtype=np.int64)]), self._mix.split))

    def _one_after_the_other(self, numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """As Mix.split, where all of one data set comes before the next."""
        sources = np.searchsorted(self._ends, numbers, side="right")
        return sources, numbers - np.concatenate([[0], self._ends])[sources]

    def counters(self) -> dict[str, float]:
        """What reading from object storage has cost this process: bytes, requests, retries, stalls."""
        return dict(ranged.counters.snapshot()) if self._remote else {}

    def notes(self) -> list[str]:
        """Lines that the user should read; each is given once."""
        notes, self._notes = self._notes, []
        if self._cache is not None and self._cache.is_disk_full and not self._has_told:
            self._has_told = True
            notes.append(
                f"data.cache_dir: {self.config.cache_dir}: its disk is full; nothing more is kept there, and the run "
                "goes on without it; free some space or set data.cache_gib lower, then start the run again"
            )
        return notes

    def _note_shared(self) -> list[str]:
        """Whether workers fetch the same bytes, because the lanes that each of them reads are not its own."""
        if not self._remote or self._cache is not None:
            return []
        numbers = np.arange(min(self.num_samples, _LOCATED_AT_ONCE))
        sources, own = self._mix.split(numbers)
        lanes = own % np.array([source.tape.fingerprint.lanes for source in self.sources])[sources]
        workers = numbers % self._world_size
        read = len(np.unique(np.stack([sources, lanes, workers]), axis=1).T)
        shared = read / len(np.unique(np.stack([sources, lanes]), axis=1).T)
        if shared <= 1.0:
            return []
        return [
            f"data.lanes: {self.config.lanes}: each part of the shards is fetched by {shared:.2g} of the "
            f"{self._world_size} workers; where the lanes, and so the shards, are a multiple of the workers, each "
            "fetches its own; so does one of a machine's workers for all with data.cache_dir"
        ]

    def _ahead(
        self, batches: Callable[[], Iterator[Int64Array]], split: _Split, *, augmented: bool = False
    ) -> Iterator[Loaded]:
        """Load batches of numbers in order, `prefetch_batches` of them at a time in the threads."""
        with ExitStack() as stack:
            prefetchers = {i: stack.enter_context(self._prefetcher(i, batches(), split)) for i in self._remote}
            pool = ThreadPoolExecutor(self.config.num_threads, thread_name_prefix="loader")
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            underway: deque[_Part] = deque()
            for located in self._located(batches(), split):
                for prefetcher in prefetchers.values():
                    prefetcher.begin_batch()
                underway.append(_Part(self, pool, located, prefetchers, augmented))
                if len(underway) > self.config.prefetch_batches:
                    yield underway.popleft().result()
            while underway:
                yield underway.popleft().result()

    def _prefetcher(self, source: int, batches: Iterator[Int64Array], split: _Split) -> Prefetcher:
        """What reads one data set's samples of some batches, in its share of the memory."""
        weights = self._mix.weights
        memory_bytes = (self.config.prefetch_mib << 20) * weights[source] // sum(weights)

        def own(numbers: Int64Array) -> Int64Array:
            sources, there = split(numbers)
            return there[sources == source]

        read = self.sources[source]
        return Prefetcher(read.shards, read.tape, map(own, batches), memory_bytes)

    def _located(self, batches: Iterator[Int64Array], split: _Split) -> Iterator[_Located]:
        """Batches with the places of their samples: of several batches at once, for numpy's sake."""
        count = 1  # more and more: a run should start at once
        while group := list(islice(batches, count)):
            count = min(2 * count, max(1, _LOCATED_AT_ONCE // self.config.batch_size))
            numbers = np.concatenate(group)
            sources, own = split(numbers)
            shards, indices = np.empty_like(numbers), np.empty_like(numbers)
            for i, source in enumerate(self.sources):
                here = sources == i
                shards[here], indices[here] = source.tape.locate(own[here])
            ends = np.cumsum([len(batch) for batch in group])[:-1]
            columns = (numbers, sources, own, shards, indices)
            yield from map(_Located, *(np.split(column, ends) for column in columns))

    def decode(
        self, sample: "_Sample", members: Members, place: float | None, out: UInt8Array | None
    ) -> tuple[Decoded, int, list[dict[str, Any]]]:
        """A sample or its replacement, cut at a place of its longer side; its hash; and the quarantine lines."""
        source = self.sources[sample.source]
        shard, index = sample.shard, sample.place
        replaced: list[dict[str, Any]] = []
        for attempt in range(_REPLACEMENT_ATTEMPTS):
            try:
                decoded = decode_members(self.config, self.layouts, members, place, out)
                return decoded, source.shards.hash(shard, index), replaced
            except UndecodableError as error:
                reason = str(error)
            except DataError as error:
                raise DataError(f"{source.shards.name(shard, index)}: {error}") from error
            name = source.shards.name(shard, index)
            self._note_bad((sample.source, shard, index), f"{name}: {reason}")
            line = {"number": sample.number, "shard": source.shards.location(shard)}
            replaced.append(line | {"sample": source.shards.index(shard).keys[index], "reason": reason})
            shard, index = source.tape.replacement(sample.own, attempt)
            members = source.shards.read(shard, index)
        raise DataError(f"{name}: {_REPLACEMENT_ATTEMPTS} samples in a row cannot be decoded; this one: {reason}")

    def _find_layouts(self) -> list[Layout]:
        """Those of data.arrays: one for all data sets."""
        found = [_layouts_of(source, self.config) if self.config.arrays else [] for source in self.sources]
        for source, layouts in zip(self.sources, found, strict=True):
            for extension, (shape, dtype), (first_shape, first_dtype) in zip(
                self.config.arrays, layouts, found[0], strict=True
            ):
                if (shape, dtype) != (first_shape, first_dtype):
                    raise DataError(
                        f"{source.shards.folder}: {extension} is {dtype} {list(shape)}, but that of "
                        f"{self.sources[0].shards.folder} is {first_dtype} {list(first_shape)}; a mix has one layout"
                    )
        return found[0]

    def pixels(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for a batch's images, uint8 of a shape."""
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

    def _note_bad(self, sample: tuple[int, int, int], problem: str) -> None:
        allowed = math.ceil(self.config.max_bad_fraction * self.num_samples)  # one in a small data set; 0.0 means none
        with self._lock:
            self._bad.add(sample)
            count = len(self._bad)
        if count > allowed:
            raise DataError(
                f"{count} samples cannot be decoded, more than data.max_bad_fraction allows ({allowed} of "
                f"{self.num_samples}); the last one: {problem}"
            )


def _default_block(mix: Mix, manifests: list[Manifest]) -> int:
    lanes = sum(
        usable_lanes(manifest.shards.columns["samples"], lanes)
        for manifest, lanes in zip(manifests, mix.lanes, strict=True)
    )
    sizes = [int(manifest.shards.columns["num_bytes"].sum()) / manifest.num_samples for manifest in manifests]
    return default_block(lanes, float(np.average(sizes, weights=mix.weights)))


def _layouts_of(source: _Source, config: DataConfig) -> list[Layout]:
    """The layouts of data.arrays: those that two samples share first, since one may be the odd one out."""
    found: list[list[Layout]] = []
    for shard, index in zip(*source.tape.locate(np.arange(_REPLACEMENT_ATTEMPTS)), strict=True):
        try:
            layouts = array_layouts(config, source.shards.read(int(shard), int(index)))
        except UndecodableError as error:
            problem = f"{source.shards.name(int(shard), int(index))}: {error}"
            continue
        if layouts in found:
            return layouts
        found.append(layouts)
    if found:
        return found[0]
    raise DataError(
        f"{problem}; data.arrays is {', '.join(config.arrays)}, and {_REPLACEMENT_ATTEMPTS} samples lack it"
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


class _Sample(NamedTuple):
    """One row of _Located."""

    number: int
    source: int
    own: int
    shard: int
    place: int


class _Part:
    """One worker's part of a batch while threads fill its arrays."""

    def __init__(
        self,
        loader: Loader,
        pool: ThreadPoolExecutor,
        located: _Located,
        prefetchers: dict[int, Prefetcher],
        augmented: bool,
    ) -> None:
        config, count = loader.config, len(located.numbers)
        self._loader, self._numbers, self._prefetchers = loader, located.numbers, prefetchers
        self._shards = [source.shards for source in loader.sources]
        self._samples = list(map(_Sample, *(column.tolist() for column in located)))
        is_flipped = augmented and config.flip
        self._flips = flips(config.seed, self._numbers).tolist() if is_flipped else [False] * count
        is_cut = augmented and config.crop == "random"
        self._places = places(config.seed, self._numbers).tolist() if is_cut else [None] * count
        image_shape = (count, config.image_size, config.image_size, config.channels)
        self._pixels = loader.pixels(image_shape) if config.image else None
        self._images = np.empty(0) if self._pixels is None else self._pixels.numpy()
        self._arrays = [np.empty((count, *shape), dtype) for shape, dtype in loader.layouts]
        self._captions = [b""] * count
        self._labels = [-1] * count
        self._hashes = [0] * count
        tasks = range(0, count, _SAMPLES_PER_TASK)
        self._tasks: list[Future[list[dict[str, Any]]]] = [pool.submit(self._fill, first) for first in tasks]

    def _fill(self, first: int) -> list[dict[str, Any]]:
        samples, replaced = self._samples[first : first + _SAMPLES_PER_TASK], []
        # All are read before any is decoded: so Python's code and data stay in the processor's cache.
        for i, (sample, members) in enumerate(zip(samples, self._read(samples), strict=True), first):
            out = None if self._pixels is None else self._images[i]
            (image, self._labels[i], self._captions[i], arrays), self._hashes[i], lines = self._loader.decode(
                sample, members, self._places[i], out
            )
            if out is not None and image is not None and (self._flips[i] or image is not out):
                out[:] = image[:, ::-1] if self._flips[i] else image
            for into, array in zip(self._arrays, arrays, strict=True):
                into[i] = array
            replaced += lines
        return replaced

    def _read(self, samples: list[_Sample]) -> list[Members]:
        taken = {}
        for source, prefetcher in self._prefetchers.items():
            taken[source] = iter(prefetcher.take([sample.own for sample in samples if sample.source == source]))
        return [
            self._shards[source].read(shard, place, next(taken[source]) if source in taken else None)
            for _, source, _, shard, place in samples
        ]

    def result(self) -> Loaded:
        quarantined = [line for task in self._tasks for line in task.result()]
        config = self._loader.config
        tensors = {"key": torch.from_numpy(self._numbers)}
        if config.num_classes is not None:
            tensors["label"] = torch.from_numpy(np.array(self._labels, np.int64))
        if config.caption is not None:
            tensors["caption"] = torch.from_numpy(stack_captions(self._captions))
        for extension, array in zip(config.arrays, self._arrays, strict=True):
            tensors[batch_key(extension)] = torch.from_numpy(array)
        order = digest(self._numbers, np.array(self._hashes, np.int64))
        loaded = Loaded(tensors, self._pixels, order, quarantined)
        self._loader.reuse(loaded)
        return loaded
