"""The order of samples: which sample is number t, for any t, as a pure function of the seed and the shards' sizes.

An epoch is an exact permutation of the data set. The shards are laid end to end in an order drawn for the epoch, and
that tape is cut by sample count into lanes. Number t of the epoch comes from lane `t % lanes`, so neighbours in a batch
come from shards far apart; inside a lane, blocks of samples are shuffled. A worker r of W owns the numbers with
`t % W == r`: nothing about the order depends on W.

Nothing here reads a file, and nothing keeps state but the shard order of the last few epochs, which is derived again
when it is asked for.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from gmdist.checks import at_least
from gmdist.errors import ConfigError, DataError

VERSION = 2  # raise it with any change of the order: a run refuses to go on with another one

Int64Array = npt.NDArray[np.int64]
_Uint64Array = npt.NDArray[np.uint64]

# All lanes together shuffle so many samples, unless they are large: their bytes have to be at hand.
_SHUFFLED_SAMPLES, _SHUFFLED_BYTES, _SMALLEST_BLOCK = 1 << 16, 1 << 30, 16
_FEISTEL_ROUNDS, _FEISTEL_BITS = 12, 5  # with fewer, permutations of a handful of samples are visibly uneven


@dataclass(frozen=True)
class Fingerprint:
    """All that the order depends on. Two runs with equal fingerprints see the same samples in the same order."""

    version: int
    seed: int
    lanes: int
    block: int  # samples
    manifest: str  # hash of the data set's shards

    def check(self, saved: Mapping[str, object]) -> None:
        """Raise DataError if a run that was started with the `saved` fingerprint cannot go on with this one."""
        # Another data set often has other lanes too: it is what the user should read of.
        for key, value in sorted(asdict(self).items(), key=lambda item: item[0] != "manifest"):
            if key not in saved:
                raise DataError(f"the checkpoint's data fingerprint has no '{key}': it was written by another version")
            if saved[key] != value:
                what, remedy = {
                    "version": ("order algorithm", "resume with the version of gmdist that started it"),
                    "seed": ("data.seed", f"set data.seed={saved[key]}"),
                    "lanes": ("number of lanes", f"set data.lanes={saved[key]}"),
                    "block": ("data.block", f"set data.block={saved[key]}"),
                    "manifest": ("data set", "read the data set that the run was started with"),
                }[key]
                raise DataError(
                    f"cannot resume: the {what} was {saved[key]} when the run was started and is {value} now; "
                    f"{remedy}, or start anew in another run.dir"
                )


def _mix(x: _Uint64Array) -> _Uint64Array:
    """The finalizer of splitmix64 (Steele 2014): a bijection of 64-bit words that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Purpose(IntEnum):
    """What a hash of the seed draws: each its own."""

    SHARDS = 1  # their order
    BLOCK = 2  # the order within
    REPLACEMENT = 3
    FLIP = 4
    CROP = 5
    MIX = 6  # the order of data sets in a period
    FIRST_PLACE = 7  # of a rotated tape


def keyed_hash(*words: int | npt.NDArray[np.integer]) -> _Uint64Array:
    """A 64-bit hash of a few integers or arrays of integers, broadcast against each other: at least one dimension."""
    state = np.zeros(1, np.uint64)
    for word in words:
        # Python's and numpy's negative integers wrap to the same 64-bit word.
        bits = np.atleast_1d(np.asarray(word)).astype(np.int64).astype(np.uint64)
        state = _mix(state ^ bits)
    return state


def permute(index: Int64Array, size: Int64Array, key: _Uint64Array) -> Int64Array:
    """The image of each index under a random permutation of [0, size) drawn by its key.

    A Feistel network permutes a power of two, and walks on while it lands outside (Black and Rogaway 2002).

    Args:
        index: [N], 0 <= index < size.
        size: [N], at least 1 and below 2**53.
        key: [N]; equal keys with equal sizes give one permutation.
    """
    bits = np.maximum(_FEISTEL_BITS, np.frexp((size - 1).astype(np.float64))[1]).astype(np.uint64)
    low_bits = bits >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    end = size.astype(np.uint64)

    keys = [_mix(key ^ np.uint64(number)) for number in range(_FEISTEL_ROUNDS)]

    x = index.astype(np.uint64)
    todo = np.flatnonzero(size > 1)
    while len(todo):
        low, high = x[todo] & low_mask[todo], x[todo] >> low_bits[todo]
        low_m, high_m = low_mask[todo], high_mask[todo]
        for number in range(0, _FEISTEL_ROUNDS, 2):
            low ^= _mix(keys[number][todo] ^ high) & low_m
            high ^= _mix(keys[number + 1][todo] ^ low) & high_m
        image = (high << low_bits[todo]) | low
        x[todo] = image
        todo = todo[image >= end[todo]]
    return x.astype(np.int64)


def usable_lanes(samples: Int64Array, lanes: int) -> int:
    """How many of the lanes can begin in shards of their own."""
    return min(lanes, int(np.count_nonzero(samples)))


def default_block(lanes: int, sample_bytes: float) -> int:
    """Samples of a lane that are shuffled together, where nobody says it; sample_bytes: of an average sample."""
    return max(_SMALLEST_BLOCK, int(min(_SHUFFLED_SAMPLES, _SHUFFLED_BYTES / max(1.0, sample_bytes)) / lanes))


class Tape:
    """The order of a data set's samples."""

    def __init__(
        self, samples: npt.ArrayLike, *, seed: int, lanes: int, block: int, manifest: str, rotated: bool = False
    ) -> None:
        """Lay out the order.

        Args:
            samples: how many samples each shard holds; zeros are allowed.
            seed: draws the order.
            lanes: places of the tape that are read in turn; at most the number of shards that are not empty counts.
            block: samples of a lane that are shuffled among themselves.
            manifest: hash that identifies the data set.
            rotated: whether the first lane begins at a place of the tape that is drawn for each epoch. Where lanes
                begin with shards, a sample comes at about the same time of every epoch: beside another data set, it
                would always meet the same part of it.

        Raises:
            DataError: there is no sample at all.
            ConfigError: lanes or block is not positive.
        """
        if problem := at_least(1, lanes=lanes, block=block):
            raise ConfigError(f"data.{problem}")
        self._samples = np.asarray(samples, np.int64).reshape(-1)
        self.num_samples = int(self._samples.sum())
        if self.num_samples == 0:
            raise DataError("the data set has no samples")
        lanes = usable_lanes(self._samples, lanes)
        self.fingerprint = Fingerprint(VERSION, seed, lanes, block, manifest)
        self._rotated = rotated
        # Two epochs are in use where a batch spans them, and prefetching may be one ahead of the step.
        self._shard_order = functools.lru_cache(maxsize=4)(self._draw_shard_order)

    def _draw_shard_order(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards in the epoch's order, and where on the tape each of them ends."""
        keys = keyed_hash(self.fingerprint.seed, Purpose.SHARDS, epoch, np.arange(len(self._samples)))
        order = np.argsort(keys, kind="stable")
        return order, np.cumsum(self._samples[order])

    def _first_place(self, epoch: int) -> int:
        """Where on the tape the epoch's first lane begins; after the tape's last sample its first one follows."""
        if not self._rotated:
            return 0
        return int(keyed_hash(self.fingerprint.seed, Purpose.FIRST_PLACE, epoch)[0] % np.uint64(self.num_samples))

    def locate(self, numbers: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Where the samples with these numbers are.

        Args:
            numbers: [N], any non-negative integers, in any order.

        Returns:
            Shards [N] and the samples' indices inside them [N].
        """
        t = np.asarray(numbers, np.int64).reshape(-1)
        epochs, slots = np.divmod(t, self.num_samples)
        lanes, block = self.fingerprint.lanes, self.fingerprint.block

        place, lane = np.divmod(slots, lanes)
        quotient, remainder = divmod(self.num_samples, lanes)
        lane_start = lane * quotient + np.minimum(lane, remainder)
        lane_size = quotient + (lane < remainder)
        block_number, index = np.divmod(place, block)
        block_start = block_number * block
        block_size = np.minimum(block, lane_size - block_start)
        key = keyed_hash(self.fingerprint.seed, Purpose.BLOCK, epochs, lane, block_number)
        position = lane_start + block_start + permute(index, block_size, key)
        return self._on_tape(epochs, position)

    def block_end(self, number: int) -> int:
        """The first number after `number` at which all lanes begin a new block, or a new epoch begins."""
        epoch, slot = divmod(number, self.num_samples)
        size = self.fingerprint.lanes * self.fingerprint.block
        return epoch * self.num_samples + min(self.num_samples, (slot // size + 1) * size)

    def next_use(self, shards: Int64Array, first: Int64Array, last: Int64Array, after: int) -> Int64Array:
        """When ranges of samples are used next: the number at which the first of their blocks begins.

        Args:
            shards: [N], the ranges' shards.
            first, last: [N], the ranges' first and last samples inside their shards.
            after: all smaller numbers are done.

        Returns:
            Numbers [N], `after` where that block has begun; none is later than the end of the next epoch.
        """
        epoch = after // self.num_samples
        result = self._first_use(epoch, shards, first, last, after)
        later = result < 0
        if later.any():
            result[later] = self._first_use(epoch + 1, shards[later], first[later], last[later], after)
        return result

    def _first_use(self, epoch: int, shards: Int64Array, first: Int64Array, last: Int64Array, after: int) -> Int64Array:
        """The same within one epoch; -1 for ranges that it does not use any more."""
        lanes, block = self.fingerprint.lanes, self.fingerprint.block
        order, ends = self._shard_order(epoch)
        start = np.empty(len(order), np.int64)
        start[order] = (ends - self._samples[order] - self._first_place(epoch)) % self.num_samples
        position, stop = start[shards] + first, start[shards] + last
        quotient, remainder = divmod(self.num_samples, lanes)
        result = np.full(len(shards), -1, np.int64)
        todo = np.ones(len(shards), bool)
        while todo.any():  # one block of each range after the other: they are few
            past = np.where(position < self.num_samples, 0, self.num_samples)
            position, stop = position - past, stop - past
            wide = remainder * (quotient + 1)
            lane = np.where(
                position < wide, position // (quotient + 1), remainder + (position - wide) // max(1, quotient)
            )
            lane_start = lane * quotient + np.minimum(lane, remainder)
            lane_end = lane_start + quotient + (lane < remainder)
            number = (position - lane_start) // block
            begins = epoch * self.num_samples + number * block * lanes
            useful = todo & (begins + block * lanes > after)
            use = np.maximum(begins, after)
            result = np.where(useful & ((result < 0) | (use < result)), use, result)
            position = np.minimum(lane_start + (number + 1) * block, lane_end)
            todo &= position <= stop
        return result

    def replacement(self, number: int, attempt: int) -> tuple[int, int]:
        """The sample (shard, index) that stands in for number t when its own cannot be decoded, at the n-th attempt."""
        position = keyed_hash(self.fingerprint.seed, Purpose.REPLACEMENT, number, attempt) % np.uint64(self.num_samples)
        shard, index = self._on_tape(np.array([number // self.num_samples]), position.astype(np.int64))
        return int(shard[0]), int(index[0])

    def _on_tape(self, epochs: Int64Array, position: Int64Array) -> tuple[Int64Array, Int64Array]:
        shard, index = np.empty_like(position), np.empty_like(position)
        for epoch in np.unique(epochs):
            order, ends = self._shard_order(int(epoch))
            here = epochs == epoch
            place = (position[here] + self._first_place(int(epoch))) % self.num_samples
            rank = np.searchsorted(ends, place, side="right")
            shard[here] = order[rank]
            index[here] = place - (ends[rank] - self._samples[order[rank]])
        return shard, index


def owned(start: int, stop: int, rank: int, world_size: int) -> Int64Array:
    """The numbers in [start, stop) that a worker owns: t % world_size == rank."""
    return np.arange(start + (rank - start) % world_size, stop, world_size, dtype=np.int64)


def digest(numbers: Int64Array, crc32: Int64Array) -> int:
    """The order digest of some samples: a sum, so that workers add up theirs in any order.

    Args:
        numbers: [N], the samples' numbers.
        crc32: [N], the checksums of their bytes.

    Returns:
        A signed 64-bit integer (sums wrap).
    """
    return int(keyed_hash(numbers, crc32).sum(dtype=np.uint64).astype(np.int64)) if len(numbers) else 0
