"""Batches for one worker: its numbers of the order, read and decoded by threads ahead of use."""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count, islice

import numpy as np

from gmdist import ranged, storage
from gmdist.data.batch import BatchMaker, Loaded, Located, Underway
from gmdist.data.cache import Cache
from gmdist.data.config import DataConfig, MixedConfig
from gmdist.data.dataset import Dataset
from gmdist.data.latents import average_sample_bytes
from gmdist.data.manifest import Manifest
from gmdist.data.mix import Fingerprint, Mix
from gmdist.data.prefetch import Prefetcher
from gmdist.data.tape import Int64Array, default_block, owned, usable_lanes

_LOCATED_AT_ONCE = 1 << 14  # samples

_Split = Callable[[Int64Array], tuple[Int64Array, Int64Array]]  # numbers -> data sets, and the numbers there


class Loader:
    """Reads a data set, or a mix of several, in an order that its config alone decides."""

    def __init__(
        self,
        config: DataConfig,
        data: str | list[MixedConfig],
        rank: int = 0,
        world_size: int = 1,
        beside: "Loader | None" = None,
    ) -> None:
        """Open the data.

        Args:
            config: sizes and order.
            data: the folder of one data set, or several with their weights: config.trained_on.
            rank, world_size: which numbers are this worker's.
            beside: another of this worker, read at the same time by the same numbers: both share one cache, and tapes
                are rotated, so that samples do not meet by their places in shards.

        Raises:
            DataError: there is no data set, its labels are outside the config's classes, or it lacks data.arrays.
        """
        mixed = [MixedConfig(data)] if isinstance(data, str) else data
        self.config, self._rank, self._world_size = config, rank, world_size
        self._mix = Mix([part.weight for part in mixed], seed=config.seed, lanes=config.lanes)
        folders = [storage.absolute(part.train) for part in mixed]
        manifests = [Manifest.load(folder) for folder in folders]
        block = config.block or _default_block(self._mix, folders, manifests)
        self.datasets = [
            Dataset(config, folder, manifest, lanes, block, rotated=beside is not None)
            for folder, manifest, lanes in zip(folders, manifests, self._mix.lanes, strict=True)
        ]
        self.fingerprint = Fingerprint(self._mix.weights, tuple(dataset.tape.fingerprint for dataset in self.datasets))
        self._ends = np.cumsum([dataset.tape.num_samples for dataset in self.datasets])
        self.num_samples = int(self._ends[-1])
        self._remote = [i for i, dataset in enumerate(self.datasets) if storage.is_s3(dataset.shards.folder)]
        self._cache: Cache | None = self._open_cache(None if beside is None else beside._cache)
        self._notes = self._note_shared()
        self._has_told = False  # that the cache keeps nothing more
        self._maker = BatchMaker(config, self.datasets)
        self.max_bad = self._maker.max_bad

    def _open_cache(self, shared: Cache | None) -> Cache | None:
        if self.config.cache_dir is None or not self._remote:
            return None
        uses = {self.datasets[i].shards.manifest.hash: functools.partial(self._next_use, i) for i in self._remote}
        cache = shared or Cache(self.config.cache_dir, int(self.config.cache_gib * 2**30), {})
        cache.share(uses)
        for i in self._remote:
            self.datasets[i].shards.cache = cache
        return cache

    def _next_use(self, dataset: int, shards: Int64Array, places: Int64Array) -> Int64Array:
        """When parts of a data set are used next, in numbers of the mix."""
        weights = self._mix.weights
        return self.datasets[dataset].next_use(shards, places) * sum(weights) // weights[dataset]

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

    def sweep(self, batch_size: int, count: int | None = None) -> Iterator[Loaded]:
        """Every sample once, shared among the workers, `batch_size` at a time; the last part may be smaller.

        Several data sets come one after the other, whatever their weights. With a `count`, so many samples at most,
        spread evenly over all.
        """
        yield from self.at(self.swept(self.num_samples, batch_size, count))

    def swept(self, num_samples: int, batch_size: int, count: int | None = None) -> list[Int64Array]:
        """This worker's numbers of a sweep over so many samples, part by part; arguments as for `sweep`."""
        count = min(count or num_samples, num_samples)
        numbers = owned(0, count, self._rank, self._world_size) * num_samples // count
        return [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]

    def at(self, parts: list[Int64Array]) -> Iterator[Loaded]:
        """The samples of these numbers, part by part, in the order of a sweep: 0 to num_samples - 1, [N] each."""
        return self._ahead(lambda: iter(parts), self._one_after_the_other)

    def names(self, numbers: Int64Array) -> list[tuple[str, str]]:
        """Where the samples of a sweep with these numbers [N] are: their shards' locations, and their keys there."""
        located = next(self._located(iter([numbers]), self._one_after_the_other))
        found = []
        columns = (located.datasets, located.shards, located.indices)
        for i, shard, index in zip(*(column.tolist() for column in columns), strict=True):
            shards = self.datasets[i].shards
            found.append((shards.location(shard), shards.index(shard).keys[index]))
        return found

    def first(self, count: int) -> Loaded:
        """The samples with the numbers 0 ... count - 1: the same on every worker."""
        return next(self.numbered([np.arange(count, dtype=np.int64)]))

    def numbered(self, parts: list[Int64Array]) -> Iterator[Loaded]:
        """The samples with these numbers of the order, part by part: any, [N] each."""
        return self._ahead(lambda: iter(parts), self._mix.split)

    def _one_after_the_other(self, numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """As Mix.split, where all of one data set comes before the next."""
        datasets = np.searchsorted(self._ends, numbers, side="right")
        return datasets, numbers - np.concatenate([[0], self._ends])[datasets]

    def counters(self) -> dict[str, float]:
        """What reading from object storage has cost this process: bytes, requests, retries, stalls."""
        return dict(ranged.counters.snapshot()) if self._remote else {}

    def notes(self) -> list[str]:
        """Lines that the user should read; each is given once."""
        notes, self._notes = self._notes, []
        if self._cache is not None and self._cache.problem is not None and not self._has_told:
            self._has_told = True
            notes.append(
                f"data.cache_dir: {self.config.cache_dir}: {self._cache.problem}; nothing more is kept there, and the "
                "run goes on without it; free some space, set data.cache_gib lower or choose another folder, then "
                "start the run again"
            )
        return notes

    def _note_shared(self) -> list[str]:
        """Whether workers fetch the same bytes, because the lanes that each of them reads are not its own."""
        if not self._remote or self._cache is not None:
            return []
        numbers = np.arange(min(self.num_samples, _LOCATED_AT_ONCE))
        datasets, own = self._mix.split(numbers)
        lanes = own % np.array([dataset.tape.fingerprint.lanes for dataset in self.datasets])[datasets]
        workers = numbers % self._world_size
        read = len(np.unique(np.stack([datasets, lanes, workers]), axis=1).T)
        shared = read / len(np.unique(np.stack([datasets, lanes]), axis=1).T)
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
            underway: deque[Underway] = deque()
            for located in self._located(batches(), split):
                for prefetcher in prefetchers.values():
                    prefetcher.begin_batch()
                underway.append(Underway(self._maker, pool, located, prefetchers, augmented=augmented))
                if len(underway) > self.config.prefetch_batches:
                    yield underway.popleft().result()
            while underway:
                yield underway.popleft().result()

    def _prefetcher(self, dataset: int, batches: Iterator[Int64Array], split: _Split) -> Prefetcher:
        """What reads one data set's samples of some batches, in its share of the memory."""
        weights = self._mix.weights
        memory_bytes = (self.config.prefetch_mib << 20) * weights[dataset] // sum(weights)

        def own(numbers: Int64Array) -> Int64Array:
            datasets, there = split(numbers)
            return there[datasets == dataset]

        read = self.datasets[dataset]
        return Prefetcher(read.shards, read.tape, map(own, batches), memory_bytes)

    def _located(self, batches: Iterator[Int64Array], split: _Split) -> Iterator[Located]:
        """Batches with the places of their samples: of several batches at once, for numpy's sake."""
        count = 1  # more and more: a run should start at once
        while group := list(islice(batches, count)):
            count = min(2 * count, max(1, _LOCATED_AT_ONCE // self.config.batch_size))
            numbers = np.concatenate(group)
            datasets, own = split(numbers)
            shards, indices = np.empty_like(numbers), np.empty_like(numbers)
            for i, dataset in enumerate(self.datasets):
                here = datasets == i
                shards[here], indices[here] = dataset.tape.locate(own[here])
            ends = np.cumsum([len(batch) for batch in group])[:-1]
            columns = (numbers, datasets, own, shards, indices)
            yield from map(Located, *(np.split(column, ends) for column in columns))


def _default_block(mix: Mix, folders: list[str], manifests: list[Manifest]) -> int:
    lanes = sum(
        usable_lanes(manifest.shards.columns["samples"], lanes)
        for manifest, lanes in zip(manifests, mix.lanes, strict=True)
    )
    sizes = [average_sample_bytes(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    return default_block(lanes, float(np.average(sizes, weights=mix.weights)))
