"""The disk cache: what is used last in the future goes first, the limit holds, and a full disk stops nothing."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from gmdist.data.cache import Cache, PartName
from gmdist.data.tape import Int64Array
from gmdist.errors import StorageError

SIZE = 100
DATA = "0123456789abcdef"


def content_of(shard: int, place: int) -> bytearray:
    return bytearray(f"{shard},{place};".encode().ljust(SIZE, b"."))


def by_shard(shards: Int64Array, places: Int64Array) -> Int64Array:
    """Shard n is used at number n."""
    return shards


def cache_of(folder: Path, parts: float, next_use=by_shard) -> Cache:
    return Cache(str(folder), int(parts * SIZE), {DATA: next_use})


def part(shard: int, place: int = 0) -> PartName:
    return PartName(DATA, shard, place)


def put(cache: Cache, shard: int, place: int = 0, data: str = DATA) -> None:
    content = content_of(shard, place)
    assert cache.keep(PartName(data, shard, place), SIZE, lambda: content) == content


def kept(folder: Path) -> list[int]:
    return sorted(name.shard for name in map(PartName.parse, os.listdir(folder)) if name)


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 10)
    assert cache.find(part(3, 1), 0, 5) is None
    put(cache, 3, 1)
    assert cache.find(part(3, 1), 0, 5) == b"3,1;."
    assert cache.find(part(3, 1), SIZE - 1, SIZE) == b"."
    assert cache.find(part(3, 1), 0, SIZE + 1) is None  # a part that was cut is none
    cache.drop(part(3, 1))
    assert cache.find(part(3, 1), 0, 5) is None
    cache.drop(part(3, 1))


def test_what_is_used_last_goes_first(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 4)
    for shard in (5, 9, 2, 7):
        put(cache, shard)
    put(cache, 4)
    assert kept(tmp_path) == [2, 4, 5, 7]
    put(cache, 8)  # later than all that is there: not kept, but read
    assert kept(tmp_path) == [2, 4, 5, 7]
    put(cache, 1)
    assert kept(tmp_path) == [1, 2, 4, 5]


def test_fewer_misses_than_with_the_least_recently_used(tmp_path: Path) -> None:
    # Epochs over 10 parts through a cache of 5: the least recently used would always be the one that comes next.
    now = 0

    def next_use(shards: Int64Array, places: Int64Array) -> Int64Array:
        return now + (shards - now) % 10

    cache = cache_of(tmp_path, 5, next_use)
    misses = 0
    for now in range(100):
        if cache.find(part(now % 10), 0, SIZE) is None:
            misses += 1
            put(cache, now % 10)
    assert misses <= 60


def test_other_data_sets_go_before_anything(tmp_path: Path) -> None:
    gone = "f" * 16
    other = Cache(str(tmp_path), 4 * SIZE, {gone: by_shard})
    for shard in (0, 1, 2):
        put(other, shard, data=gone)
    cache = cache_of(tmp_path, 4)
    for shard in (100, 101, 102, 103):
        put(cache, shard)
    assert kept(tmp_path) == [100, 101, 102, 103]


def test_data_sets_of_one_run_are_weighed_against_each_other(tmp_path: Path) -> None:
    second = "e" * 16
    cache = Cache(str(tmp_path), 4 * SIZE, {DATA: by_shard, second: lambda shards, _: 10 * shards})
    for shard in (3, 25):
        put(cache, shard)
    for shard in (1, 2):
        put(cache, shard, data=second)  # used at 10 and 20
    put(cache, 4)
    put(cache, 9, data=second)  # at 90: last of all, so it is not kept
    assert sorted((n.data == second, n.shard) for n in map(PartName.parse, os.listdir(tmp_path)) if n) == [
        (False, 3),
        (False, 4),
        (True, 1),
        (True, 2),
    ]


def test_readers_share_a_cache(tmp_path: Path) -> None:
    second = "e" * 16
    cache = cache_of(tmp_path, 4)
    # The first data set is read by both: forwards, and backwards from 100.
    cache.share({second: lambda shards, _: 10 * shards, DATA: lambda shards, _: 100 - shards})
    for shard in (3, 98, 40):
        put(cache, shard)
    put(cache, 2, data=second)  # used at 20
    put(cache, 99)
    put(cache, 3, data=second)  # at 30: last of all, so it is not kept
    assert sorted((n.data == second, n.shard) for n in map(PartName.parse, os.listdir(tmp_path)) if n) == [
        (False, 3),
        (False, 98),
        (False, 99),
        (True, 2),
    ]


def test_the_limit_holds_while_others_write(tmp_path: Path) -> None:
    caches = [cache_of(tmp_path, 20) for _ in range(3)]
    random = np.random.default_rng(0)
    for shard in random.permutation(300).tolist():
        put(caches[shard % 3], shard)
        assert len(kept(tmp_path)) <= 20 + len(caches)


def test_one_worker_fetches_for_all(tmp_path: Path) -> None:
    caches, fetches, together = [cache_of(tmp_path, 10) for _ in range(4)], [], threading.Barrier(4)

    def fetch() -> bytearray:
        fetches.append(1)
        time.sleep(0.05)
        return content_of(1, 0)

    def keep(cache: Cache) -> None:
        together.wait()
        cache.keep(part(1), SIZE, fetch)

    threads = [threading.Thread(target=keep, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetches) == 1


def test_waiting_for_a_part_that_does_not_fit(tmp_path: Path) -> None:
    put(cache_of(tmp_path, 1.5), 0)  # used before the other, which is never kept
    caches = [cache_of(tmp_path, 1.5) for _ in range(4)]

    def fetch() -> bytearray:
        time.sleep(0.02)
        return content_of(1, 0)

    found: list[bytes | bytearray] = []
    threads = [
        threading.Thread(target=lambda cache=cache: found.append(cache.keep(part(1), SIZE, fetch))) for cache in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content_of(1, 0)] * 4
    assert os.listdir(tmp_path) == [str(part(0))]


@pytest.mark.parametrize("left", [0, SIZE - 1])
def test_a_part_that_was_cut_is_fetched_again(tmp_path: Path, left: int) -> None:
    cache = cache_of(tmp_path, 10)
    put(cache, 1)
    path = tmp_path / str(part(1))
    os.truncate(path, left)
    put(cache, 1)
    assert path.read_bytes() == content_of(1, 0)


def test_a_folder_in_a_parts_place_stops_the_keeping_only(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 1000)
    (tmp_path / str(part(1))).mkdir()
    assert cache.find(part(1), 0, 1) is None
    put(cache, 1)
    assert cache.problem == "Is a directory"


def test_a_folder_that_vanishes_stops_the_keeping_only(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", 10)
    put(cache, 1)
    shutil.rmtree(tmp_path / "cache")
    put(cache, 2)
    assert cache.problem == "No such file or directory"
    put(cache, 3)


def test_files_of_others_stay(tmp_path: Path) -> None:
    others = {"mine.tmp", "2024-05-01", "x-\u00b2-1", "a-1-2.tmp"}
    for name in others:
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / f"{part(1)}.tmp").write_bytes(b"of a worker that was killed")
    cache = cache_of(tmp_path, 2)
    assert set(os.listdir(tmp_path)) == others
    for shard in range(4):
        put(cache, shard)
    assert others < set(os.listdir(tmp_path))


def test_workers_that_want_a_part_do_not_disturb_each_other_when_a_fetch_fails(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 1000)

    def work(seed: int) -> None:
        fails = np.random.default_rng(seed).random(60) < 0.5
        for shard, fail in zip(range(60), fails, strict=True):

            def fetch(fail=fail, shard=shard) -> bytes:
                if fail:
                    raise StorageError("reading was stopped")
                return b"%d" % shard

            with suppress(StorageError):
                assert cache.keep(part(shard), len(b"%d" % shard), fetch) == b"%d" % shard

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.problem is None
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise StorageError("reading was stopped")

    with pytest.raises(StorageError, match="stopped"):
        cache_of(tmp_path, 10).keep(part(1), 3, fail)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_is_too_full_is_brought_back(tmp_path: Path) -> None:
    large = cache_of(tmp_path, 10)
    for shard in range(10):
        put(large, shard)
    small = cache_of(tmp_path, 4)
    put(small, 20)  # later than all that is there: not kept
    assert kept(tmp_path) == [0, 1, 2, 3]


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    left, busy = tmp_path / f"{DATA}-0000001-00000.tmp", tmp_path / f"{DATA}-0000002-00000.tmp"
    left.write_bytes(b"half")
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    holder += "; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(busy)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        cache = cache_of(tmp_path, 10)
        assert os.listdir(tmp_path) == [busy.name]
    finally:
        process.kill()
        process.wait()
    put(cache, 2)  # its lock has ended with it
    assert kept(tmp_path) == [2]


def test_a_failed_fetch_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 10)

    def fetch() -> bytearray:
        raise StorageError("stalled")

    with pytest.raises(StorageError, match="stalled"):
        cache.keep(part(1), SIZE, fetch)
    put(cache, 1)
    assert kept(tmp_path) == [1]


def test_a_full_disk_stops_the_keeping_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tmp_path, 10)
    put(cache, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    put(cache, 2)
    assert cache.problem == os.strerror(errno.ENOSPC)
    put(cache, 3)
    assert sorted(os.listdir(tmp_path)) == [str(PartName(DATA, 1, 0))]
    assert cache.find(part(1), 0, 3) == b"1,0"


def test_a_disk_that_fails_ends_the_keeping_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tmp_path, 10)
    put(cache, 1)

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", failing)
    assert cache.find(part(1), 0, 3) is None
    monkeypatch.undo()
    assert cache.problem == os.strerror(errno.EIO)
    assert cache.keep(part(2), 3, lambda: b"2,0") == b"2,0"
    monkeypatch.setattr(Path, "unlink", failing)
    cache.drop(part(1))


def test_a_disk_that_is_too_small_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=rf"data.cache_dir: {tmp_path}: its disk has .* and data.cache_gib is 1e\+09"
    ):
        Cache(str(tmp_path), 10**9 << 30, {DATA: by_shard})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"data.cache_dir: .*file.*choose another folder"):
        cache_of(tmp_path / "file" / "x", 1)
