"""Prefetching: whole parts where samples are dense, exact ranges where they are not, in the order of use, in bounds."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmdist.data import prefetch
from gmdist.data.prefetch import GAP_BYTES, PART_BYTES, Prefetcher, plan
from gmdist.data.tape import Int64Array, Tape
from gmdist.errors import DataError, StorageError


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40 * GAP_BYTES), st.integers(1, 2 * GAP_BYTES)),
        unique_by=lambda sample: sample[:2],
        max_size=60,
    )
)
def test_parts_hold_every_sample_once(samples: list[tuple[int, int, int]]) -> None:
    numbers = np.arange(len(samples), dtype=np.int64) * 3 + 7
    shards = np.array([shard for shard, _, _ in samples], np.int64)
    spans = np.array([(start, start + size) for _, start, size in samples], np.int64).reshape(-1, 2)
    parts = plan(numbers, shards, spans, is_kept=True)
    held = [
        (number, part.shard, *span)
        for part in parts
        for number, span in zip(part.numbers.tolist(), part.spans.tolist(), strict=True)
    ]
    assert sorted(held) == [
        (number, shard, *span)
        for number, shard, span in zip(numbers.tolist(), shards.tolist(), spans.tolist(), strict=True)
    ]
    firsts = [part.numbers.min() for part in parts]
    assert firsts == sorted(firsts)
    for part in parts:
        assert part.start == part.spans[:, 0].min()
        assert part.stop == part.spans[:, 1].max()
        assert part.stop - part.start <= max(PART_BYTES, 2 * GAP_BYTES)
        ends = np.maximum.accumulate(np.sort(part.spans, axis=0)[:, 1])
        assert (np.sort(part.spans[:, 0])[1:] - ends[:-1] <= GAP_BYTES).all()


class FakeIndex:
    """Samples of one size, one after the other."""

    def __init__(self, samples: int, num_bytes: int) -> None:
        starts = np.arange(samples, dtype=np.int64) * num_bytes
        self.spans = np.stack([starts, starts + num_bytes], axis=1)


class FakeShards:
    """Shards in memory that note what is asked of them. A byte's value tells where it is from."""

    def __init__(self, shards: int, samples: int, num_bytes: int) -> None:
        self.samples, self.num_bytes = samples, num_bytes
        self.content = [
            np.random.default_rng(shard).integers(256, size=samples * num_bytes, dtype=np.uint8).tobytes()
            for shard in range(shards)
        ]
        self.fetched: list[tuple[int, int, int]] = []
        self.failure: Exception | None = None
        self.position = 0

    def index(self, shard: int) -> FakeIndex:
        return FakeIndex(self.samples, self.num_bytes)

    def fetch_cached(self, shard: int, start: int, stop: int, stopped: threading.Event, *, keep: bool) -> bytes:
        self.fetched.append((shard, start, stop))
        if self.failure:
            raise self.failure
        return self.content[shard][start:stop]


SHARDS, SAMPLES, BYTES = 5, 40, 1000


def tape_of(block: int = 10) -> Tape:
    return Tape([SAMPLES] * SHARDS, seed=0, lanes=SHARDS, block=block, manifest="x")


def batches_of(numbers: Int64Array, size: int = 8) -> Iterator[Int64Array]:
    return iter([numbers[i : i + size] for i in range(0, len(numbers), size)])


def taken(prefetcher: Prefetcher, numbers: Int64Array, size: int) -> Iterator[tuple[int, bytes]]:
    """Every number with its bytes, taken as a loader does: batch after batch."""
    for first in range(0, len(numbers), size):
        prefetcher.begin_batch()
        for number in numbers[first : first + size].tolist():
            yield number, prefetcher.take([number])[0]


def test_what_is_taken_is_the_tape_s(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    numbers = np.arange(37, 437, 3, dtype=np.int64)
    with Prefetcher(shards, tape, batches_of(numbers), 1 << 20) as prefetcher:
        for number, content in taken(prefetcher, numbers, 8):
            (shard,), (index,) = tape.locate([number])
            start = int(index) * BYTES
            assert content == shards.content[int(shard)][start : start + BYTES]
        assert prefetcher.take([]) == []
    assert prefetcher._reserved == 0


def test_the_first_batch_is_read_exactly_and_blocks_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GAP_BYTES", 2 * BYTES)
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    numbers = np.arange(SHARDS * SAMPLES, dtype=np.int64)
    with Prefetcher(shards, tape, batches_of(numbers, 5), 1 << 20) as prefetcher:
        assert len(list(taken(prefetcher, numbers, 5))) == len(numbers)
    first = shards.fetched[:5]
    assert all(stop - start == BYTES for _, start, stop in first)
    # From the second block on, a part is a whole block of a lane.
    later = shards.fetched[-3 * SHARDS :]
    assert sorted({stop - start for _, start, stop in later}) == [10 * BYTES]
    assert sum(stop - start for _, start, stop in shards.fetched) <= 1.2 * SHARDS * SAMPLES * BYTES


@pytest.mark.parametrize("memory", [1, BYTES, 7 * BYTES, 50 * BYTES])
def test_memory_is_bounded(memory: int) -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    numbers = np.arange(3 * SHARDS * SAMPLES, dtype=np.int64)
    with Prefetcher(shards, tape, batches_of(numbers), memory) as prefetcher:
        for some in np.split(numbers, range(8, len(numbers), 8)):
            prefetcher.begin_batch()
            assert len(prefetcher.take(some.tolist())) == len(some)
            assert prefetcher._reserved <= max(memory, BYTES)
    assert prefetcher._coming == {}


def test_a_run_that_ends_has_not_read_much_more() -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    window = SHARDS * 10
    endless = (np.arange(first, first + 5, dtype=np.int64) for first in range(0, 10**6, 5))
    with Prefetcher(shards, tape, endless, 1 << 30) as prefetcher:
        assert len(list(taken(prefetcher, np.arange(3 * window), 5))) == 3 * window
        time.sleep(0.05)
        assert sum(stop - start for _, start, stop in shards.fetched) <= 6 * window * BYTES


def test_threads_may_take_in_any_order() -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    numbers = np.arange(SHARDS * SAMPLES, dtype=np.int64)
    found: dict[int, bytes] = {}
    with Prefetcher(shards, tape, batches_of(numbers), 100 * BYTES) as prefetcher:

        def take(part: list[int]) -> None:
            for number in part:
                found[number] = prefetcher.take([number])[0]

        for _ in range(0, len(numbers), 8):
            prefetcher.begin_batch()
        threads = [threading.Thread(target=take, args=(numbers[i::4].tolist(),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(found) == numbers.tolist()


def test_a_failure_reaches_whoever_takes() -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    shards.failure = DataError("shard-000001.tar: missing")
    with (
        Prefetcher(shards, tape, batches_of(np.arange(20, dtype=np.int64)), 1 << 20) as prefetcher,
        pytest.raises(DataError, match="missing"),
    ):
        prefetcher.take([0])

    def broken() -> Iterator[Int64Array]:
        raise ValueError("no numbers")
        yield

    with Prefetcher(shards, tape, broken(), 1 << 20) as prefetcher, pytest.raises(ValueError, match="no numbers"):
        prefetcher.take([0])


def test_a_worker_without_samples_of_a_data_set_waits_and_ends() -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    drawn = 0

    def empty() -> Iterator[Int64Array]:
        nonlocal drawn
        while True:
            drawn += 1
            yield np.empty(0, np.int64)

    with Prefetcher(shards, tape, empty(), 1 << 20) as prefetcher:
        before, deadline_s = -1, time.monotonic() + 30
        while drawn != before:  # a window or two are looked through, and no more
            assert time.monotonic() < deadline_s
            before = drawn
            time.sleep(0.2)
    prefetcher._planner.join(10)
    assert not prefetcher._planner.is_alive()


def test_samples_after_many_batches_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_WINDOW_SAMPLES", 10)
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    batches = [np.empty(0, np.int64)] * 100 + [np.arange(8, dtype=np.int64)]
    with Prefetcher(shards, tape, iter(batches), 1 << 20) as prefetcher:
        for _ in batches:
            prefetcher.begin_batch()
        assert len(prefetcher.take(list(range(8)))) == 8


def test_closing_wakes_whoever_waits() -> None:
    shards, tape = FakeShards(SHARDS, SAMPLES, BYTES), tape_of()
    errors: list[Exception] = []
    with Prefetcher(shards, tape, batches_of(np.arange(10, dtype=np.int64)), 1 << 20) as prefetcher:

        def take() -> None:
            try:
                prefetcher.take([5000])  # never planned
            except StorageError as error:
                errors.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        time.sleep(0.05)
    thread.join(10)
    assert len(errors) == 1
    prefetcher._planner.join(10)
    assert not prefetcher._planner.is_alive()
