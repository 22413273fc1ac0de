"""Samples of object storage read ahead of use: the tape says what comes, so what is fetched is what will be used.

The numbers that a worker will use are planned a window at a time. In a window, samples that lie near each other in a
shard are read as one part of at most 8 MiB, and the parts are fetched in the order of their first use, by a few
threads, as far ahead as the memory allows. Windows begin small, so that a run starts at once, and end where the tape's
blocks end: then a part is used whole, and fetched once an epoch.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat, takewhile
from typing import NamedTuple

import numpy as np

from gmdist.data.fetch import Shards
from gmdist.data.tape import Int64Array, Tape
from gmdist.errors import StorageError

PART_BYTES = 8 << 20
# Between two samples, bytes that are read and thrown away rather than asked for apart: at 1 Gbit/s they take as long
# as a request takes of CPU time.
GAP_BYTES = 256 << 10
CONNECTIONS = 8
_FIRST_WINDOWS = (1, 4)  # batches
_WINDOW_SAMPLES = 1 << 16


@dataclass(frozen=True)
class Part:
    """A range of a shard that holds samples of one window."""

    shard: int
    start: int  # bytes
    stop: int
    numbers: Int64Array  # [N], the samples' numbers
    spans: Int64Array  # [N, 2], where each sample's bytes are in the shard: first, last + 1
    is_kept: bool  # whether the cache should have it


def plan(numbers: Int64Array, shards: Int64Array, spans: Int64Array, *, is_kept: bool) -> list[Part]:
    """The parts that hold some samples, in the order of their first use.

    Args:
        numbers: [N], in the order of use.
        shards: [N].
        spans: [N, 2], bytes.
        is_kept: whether the cache should have them.
    """
    order = np.lexsort((spans[:, 0], shards))
    shard_list, low, high = shards[order].tolist(), spans[order, 0].tolist(), spans[order, 1].tolist()
    parts: list[tuple[int, Part]] = []
    first, start, stop = 0, 0, 0
    for place in range(len(order) + 1):
        if place < len(order) and place > first:
            near = low[place] - stop <= GAP_BYTES and high[place] - start <= PART_BYTES
            if near and shard_list[place] == shard_list[first]:
                stop = max(stop, high[place])
                continue
        if place > first:
            taken = order[first:place]
            parts.append(
                (int(taken.min()), Part(shard_list[first], start, stop, numbers[taken], spans[taken], is_kept))
            )
        if place < len(order):
            first, start, stop = place, low[place], high[place]
    return [part for _, part in sorted(parts, key=lambda item: item[0])]


class _Coming(NamedTuple):
    """A sample that is on its way."""

    part: Future[list[bytes]]
    place: int  # there
    num_bytes: int


class Prefetcher:
    """Fetches the samples that one iteration over a data set will use. A context manager."""

    def __init__(self, shards: Shards, tape: Tape, batches: Iterator[Int64Array], memory_bytes: int) -> None:
        """Begin to fetch.

        Args:
            shards: the data set.
            tape: its order.
            batches: numbers [N] of the samples in the order of their use, a batch at a time.
            memory_bytes: that samples may take which are fetched and not taken yet; a larger sample comes alone.
        """
        self._shards, self._tape, self._batches, self._memory_bytes = shards, tape, batches, memory_bytes
        self._changed = threading.Condition()
        self._reserved = 0  # bytes
        self._coming: dict[int, _Coming] = {}  # by number
        self._begun = 0  # batches
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._connections = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
        self._planner = threading.Thread(target=self._run, name="plan", daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._planner.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        self._connections.shutdown(wait=False, cancel_futures=True)

    def take(self, numbers: list[int]) -> list[bytes]:
        """The bytes of samples' spans, once: waits until they are there, and forgets them."""
        taken: list[bytes] = []
        while len(taken) < len(numbers):
            found = self._claim(numbers[len(taken) :])
            contents = []
            for coming in found:
                samples = coming.part.result()
                contents.append(samples[coming.place])
                samples[coming.place] = b""
            with self._changed:
                self._reserved -= sum(coming.num_bytes for coming in found)
                self._changed.notify_all()
            taken += contents
            self._shards.position = numbers[len(taken) - 1]
        return taken

    def begin_batch(self) -> None:
        """Tell that samples of the next batch are about to be taken, or that it has none here."""
        with self._changed:
            self._begun += 1
            self._changed.notify_all()

    def _has_begun(self, batch: int) -> bool:
        return self._begun > batch

    def _claim(self, numbers: list[int]) -> list[_Coming]:
        """Where the first of some numbers are, as many as are on their way: to wait for all could be for ever."""
        with self._changed:
            while numbers[0] not in self._coming:
                if self._failure is not None:
                    raise self._failure
                if self._closed.is_set():
                    raise StorageError("reading was stopped")
                self._changed.wait()
            return [self._coming.pop(number) for number in takewhile(self._coming.__contains__, numbers)]

    def _run(self) -> None:
        """Plan and fetch windows until there are no more batches, or the prefetcher is closed."""
        before = 0  # the first batch of the window before
        try:
            for window, (batch, numbers) in enumerate(self._windows()):
                is_first = window < len(_FIRST_WINDOWS)
                # No more than a window ahead: the run may end before it is used.
                if window > len(_FIRST_WINDOWS) and not self._wait_until(partial(self._has_begun, before)):
                    return
                before = batch
                for part in self._plan(numbers, is_kept=not is_first):
                    if not self._start(part):
                        return
        except BaseException as error:  # noqa: BLE001 - whoever takes a sample raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_until(self, ready: Callable[[], bool]) -> bool:
        """Wait for a change that makes it ready; False if the prefetcher is closed."""
        with self._changed:
            while not ready() and not self._closed.is_set():
                self._changed.wait()
        return not self._closed.is_set()

    def _start(self, part: Part) -> bool:
        """Fetch a part as soon as there is room for it; False if the prefetcher is closed."""
        sizes = (part.spans[:, 1] - part.spans[:, 0]).tolist()
        num_bytes = sum(sizes)
        if not self._wait_until(lambda: self._reserved == 0 or self._reserved + num_bytes <= self._memory_bytes):
            return False
        with self._changed:
            self._reserved += num_bytes
            future = self._connections.submit(self._fetch, part)
            for place, (number, size) in enumerate(zip(part.numbers.tolist(), sizes, strict=True)):
                self._coming[number] = _Coming(future, place, size)
            self._changed.notify_all()
        return True

    def _fetch(self, part: Part) -> list[bytes]:
        content = memoryview(
            self._shards.fetch_cached(part.shard, part.start, part.stop, self._closed, keep=part.is_kept)
        )
        return [bytes(content[low - part.start : high - part.start]) for low, high in part.spans.tolist()]

    def _windows(self) -> Iterator[tuple[int, Int64Array]]:
        """The numbers of the batches, grouped: a few at first, then up to the end of the tape's blocks.

        Each with the place of its first batch. A window may hold no number at all: where several data sets are mixed,
        there may be nothing of this one for a worker.
        """
        first = 0
        for most_batches in chain(_FIRST_WINDOWS, repeat(_WINDOW_SAMPLES)):
            window: list[Int64Array] = []
            num_samples, end = 0, None
            for numbers in self._batches:
                if self._closed.is_set():
                    return
                window.append(numbers)
                num_samples += len(numbers)
                if len(numbers):
                    end = end or self._tape.block_end(int(numbers[0]))
                    if int(numbers[-1]) + 1 >= end:
                        break
                if len(window) >= most_batches or num_samples >= _WINDOW_SAMPLES:
                    break
            if not window:
                return
            yield first, np.concatenate(window)
            first += len(window)

    def _plan(self, numbers: Int64Array, *, is_kept: bool) -> Iterator[Part]:
        """The parts of a window; of several, one after the other, where its samples do not fit into the memory."""
        shards, indices = self._tape.locate(numbers)
        spans = np.empty((len(numbers), 2), np.int64)
        needed = np.unique(shards).tolist()
        for shard, index in zip(needed, self._connections.map(self._shards.index, needed), strict=True):
            here = shards == shard
            spans[here] = index.spans[indices[here]]
        ends = np.cumsum(spans[:, 1] - spans[:, 0])
        first = 0
        while first < len(numbers):
            before = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + self._memory_bytes, side="right")))
            yield from plan(numbers[first:stop], shards[first:stop], spans[first:stop], is_kept=is_kept)
            first = stop
