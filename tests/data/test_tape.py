"""The order of samples: exact epochs, purity, independence of the workers, good shuffling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmdist.data.tape import Tape, default_block, digest, keyed_hash, owned, permute
from gmdist.errors import ConfigError, DataError

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
tapes = st.builds(
    lambda sizes, seed, lanes, block, rotated: Tape(
        sizes, seed=seed, lanes=lanes, block=block, manifest="m", rotated=rotated
    ),
    shard_sizes,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 20),
    st.integers(1, 50),
    st.booleans(),
)


def pairs(tape: Tape, numbers: np.ndarray) -> list[tuple[int, int]]:
    shard, index = tape.locate(numbers)
    return list(zip(shard.tolist(), index.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(tape=tapes)
def test_every_epoch_is_an_exact_permutation(tape) -> None:
    everything = {(shard, index) for shard, size in enumerate(tape._samples) for index in range(size)}
    for epoch in (0, 1, 10**6):
        numbers = np.arange(epoch * tape.num_samples, (epoch + 1) * tape.num_samples)
        got = pairs(tape, numbers)
        assert len(got) == len(everything)
        assert set(got) == everything


@settings(max_examples=80, deadline=None)
@given(tape=tapes, counts=st.lists(st.integers(1, 7), min_size=1, max_size=6), data=st.data())
def test_any_sequence_of_worker_counts_gives_one_order(tape, counts, data) -> None:
    batch = int(np.lcm.reduce(counts))
    seen, start = {}, 0
    for count in counts:
        steps = data.draw(st.integers(1, 3))
        for first in range(start, start + steps * batch, batch):
            for rank in range(count):
                numbers = owned(first, first + batch, rank, count)
                assert len(numbers) == batch // count
                seen |= dict(zip(numbers.tolist(), pairs(tape, numbers), strict=True))
        start += steps * batch
    assert sorted(seen) == list(range(start))
    assert [seen[t] for t in range(start)] == pairs(tape, np.arange(start))


@settings(max_examples=80, deadline=None)
@given(tape=tapes, numbers=st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_locating_is_pure(tape, numbers) -> None:
    whole = pairs(tape, np.array(numbers))
    one_by_one = [pairs(tape, np.array([t]))[0] for t in reversed(numbers)]
    assert whole == one_by_one[::-1]
    f = tape.fingerprint
    settings = {"seed": f.seed, "lanes": f.lanes, "block": f.block, "manifest": f.manifest}
    again = Tape(tape._samples, **settings, rotated=tape._rotated)
    assert pairs(again, np.array(numbers)) == whole


@settings(max_examples=60, deadline=None)
@given(tape=tapes, number=st.integers(0, 10**12), attempt=st.integers(0, 20))
def test_replacements_exist_and_are_pure(tape, number, attempt) -> None:
    shard, index = tape.replacement(number, attempt)
    assert 0 <= index < tape._samples[shard]
    assert tape.replacement(number, attempt) == (shard, index)


def test_replacements_are_spread() -> None:
    tape = Tape([50, 0, 50], seed=1, lanes=4, block=8, manifest="m")
    assert len({tape.replacement(t, 0) for t in range(400)}) > 90
    assert len({tape.replacement(7, attempt) for attempt in range(16)}) > 10


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation(size, seed) -> None:
    index = np.arange(size)
    image = permute(index, np.full(size, size), np.repeat(keyed_hash(seed), size))
    assert sorted(image.tolist()) == index.tolist()


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17])
def test_permute_is_even(size: int) -> None:
    draws = 100_000
    keys = keyed_hash(np.arange(draws), size)
    for place in range(size):
        image = permute(np.full(draws, place), np.full(draws, size), keys)
        counts = np.bincount(image, minlength=size)
        expected = draws / size
        assert ((counts - expected) ** 2 / expected).sum() < size - 1 + 6 * np.sqrt(2 * size)


@settings(max_examples=150, deadline=None)
@given(tape=tapes, after=st.integers(0, 2000), data=st.data())
def test_the_next_use_is_when_the_block_begins(tape, after, data) -> None:
    shard = data.draw(st.sampled_from(np.flatnonzero(tape._samples).tolist()))
    first, last = sorted(data.draw(st.integers(0, int(tape._samples[shard]) - 1)) for _ in range(2))
    (found,) = tape.next_use(*(np.array([value]) for value in (shard, first, last)), after)
    size, epoch = tape.fingerprint.lanes * tape.fingerprint.block, after // tape.num_samples
    for start in (epoch * tape.num_samples, (epoch + 1) * tape.num_samples):
        numbers = np.arange(start, start + tape.num_samples)
        shards, indices = tape.locate(numbers)
        begins = start + (numbers - start) // size * size
        here = (shards == shard) & (indices >= first) & (indices <= last) & (begins + size > after)
        if here.any():
            assert found == max(after, begins[here].min())
            return
    raise AssertionError("it is not used any more")


def test_a_rotated_tape_gives_a_sample_no_time_of_its_own() -> None:
    # Four shards and lanes: a sample's place in its shard is when it comes, but for the shuffle in its block.
    def times(rotated: bool) -> np.ndarray:
        """In each of 200 epochs, when of 250 the sample 100 of shard 0 comes."""
        tape = Tape([250] * 4, seed=0, lanes=4, block=10, manifest="m", rotated=rotated)
        shards, indices = tape.locate(np.arange(200 * 1000))
        return np.flatnonzero((shards == 0) & (indices == 100)) % 1000 // 4

    assert set(times(False)) == set(range(100, 110))
    counts = np.bincount(times(True) // 25, minlength=10)
    assert ((counts - 20) ** 2 / 20).sum() < 9 + 5 * np.sqrt(18)


def test_neighbours_come_from_different_shards() -> None:
    tape = Tape([100] * 50, seed=0, lanes=240, block=16, manifest="m")
    assert tape.fingerprint.lanes == 50
    shard, _ = tape.locate(np.arange(50))
    assert len(set(shard.tolist())) > 45


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        tape = Tape([30, 40], seed=seed, lanes=2, block=16, manifest="m")
        return pairs(tape, np.arange(epoch * 70, epoch * 70 + 70))

    orders = [order(0, 0), order(0, 1), order(1, 0), order(-1, 0)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 20


def test_huge_epochs_do_not_overflow() -> None:
    tape = Tape([3, 4], seed=0, lanes=2, block=3, manifest="m")
    assert len(set(pairs(tape, np.arange(7 * 10**15, 7 * 10**15 + 7)))) == 7


def test_a_fingerprint_that_differs_is_refused() -> None:
    def fingerprint(**changes):
        settings = {"seed": 1, "lanes": 2, "block": 8, "manifest": "m"} | changes
        return Tape([5, 5], **settings).fingerprint

    saved = fingerprint().__dict__
    fingerprint().check(saved)
    for changes, word in (
        ({"seed": 2}, "data.seed=1"),
        ({"lanes": 1}, "data.lanes=2"),
        ({"block": 9}, "data.block=8"),
        ({"manifest": "other"}, "data set"),
    ):
        with pytest.raises(DataError, match=word):
            fingerprint(**changes).check(saved)
    with pytest.raises(DataError, match="version"):
        fingerprint().check(saved | {"version": 99})
    with pytest.raises(DataError, match="no 'block'"):
        fingerprint().check({key: value for key, value in saved.items() if key != "block"})


def test_unusable_tapes_are_refused() -> None:
    for sizes in ([], [0], [0, 0]):
        with pytest.raises(DataError, match="no samples"):
            Tape(sizes, seed=0, lanes=1, block=1, manifest="m")
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        Tape([1], seed=0, lanes=0, block=1, manifest="m")
    with pytest.raises(ConfigError, match=r"data\.block"):
        Tape([1], seed=0, lanes=1, block=0, manifest="m")


def test_the_digest_adds_up_in_any_split_and_sees_every_change() -> None:
    numbers, crc32 = np.arange(100), np.arange(100) * 7919
    whole = digest(numbers, crc32)
    mask = 2**64 - 1
    for count in (1, 3, 7):
        parts = sum(digest(numbers[r::count], crc32[r::count]) for r in range(count))
        assert (parts - whole) & mask == 0
    assert digest(numbers[:0], crc32[:0]) == 0
    swapped = crc32.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert digest(numbers, swapped) != whole
    assert digest(numbers + 1, crc32) != whole


def test_order_stays_what_it_is() -> None:
    # Golden: this implementation on 2026-11-21. A change of the order must raise tape.VERSION.
    tape = Tape([5, 0, 7, 4], seed=3, lanes=3, block=4, manifest="m")
    assert pairs(tape, np.arange(8)) == GOLDEN
    assert digest(np.arange(3), np.array([10, 20, 30])) == GOLDEN_DIGEST


GOLDEN = [(2, 0), (0, 0), (3, 2), (2, 3), (2, 6), (3, 1), (2, 2), (0, 1)]
GOLDEN_DIGEST = -1245225623249800056


def test_the_default_block_shuffles_widely_but_not_more_than_a_gibibyte() -> None:
    assert [default_block(lanes, 1000.0) for lanes in (1, 16, 240)] == [65536, 4096, 273]
    assert [default_block(lanes, 2.0**17) for lanes in (1, 16, 240, 10_000)] == [8192, 512, 34, 16]
