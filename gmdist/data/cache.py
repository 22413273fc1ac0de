"""Parts of shards kept on a local disk, within a limit: what is used last in the future is deleted first.

Workers of one machine share the folder: a part is fetched by one of them. A part is a file of a shard's bytes on a
grid of 8 MiB; what it holds is checked like all that is read, by the checksum of each sample.
"""

import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gmdist.data.tape import Int64Array
from gmdist.errors import StorageError

PART_BYTES = 8 << 20
# Of the limit: freed at once, because finding out what to delete looks at every part; and written before the next look
# at what other workers have written.
_ROOM, _UNCHECKED = 0.02, 0.002

_PART_NAME = re.compile(r"([0-9a-f]{16})-([0-9]{7,})-([0-9]{5,})")

NextUse = Callable[[Int64Array, Int64Array], Int64Array]  # shards and places on the grid -> numbers, [N] each


@dataclass(frozen=True)
class PartName:
    """A part of a data set."""

    data: str  # the manifest's hash
    shard: int
    place: int  # on the grid

    def __str__(self) -> str:
        return f"{self.data}-{self.shard:07d}-{self.place:05d}"

    @classmethod
    def parse(cls, name: str) -> "PartName | None":
        """The part that a file holds; None for a file that is none."""
        found = _PART_NAME.fullmatch(name)
        return cls(found[1], int(found[2]), int(found[3])) if found else None


class Cache:
    """A folder of parts. Threads and processes share it."""

    def __init__(self, folder: str, limit_bytes: int, next_uses: Mapping[str, NextUse]) -> None:
        """Open the folder, and delete what an earlier process left half-written.

        Args:
            folder: on a local disk.
            limit_bytes: that its parts may take; for moments a little more, while several workers write.
            next_uses: tell when parts are used next, by the hash of the data set's manifest; parts of other data sets
                are the first to go.

        Raises:
            StorageError: the folder cannot be written, or its disk is smaller than the limit.
        """
        self._folder, self._limit_bytes, self._next_uses = Path(folder), limit_bytes, dict(next_uses)
        self._lock = threading.Lock()
        self.problem: str | None = None  # of its disk; then nothing more is kept
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self._folder):
                if name.endswith(".tmp") and PartName.parse(name.removesuffix(".tmp")):
                    _delete_unless_locked(self._folder / name)
            disk = os.statvfs(self._folder)
            self._used_bytes = sum(self._parts().values())
        except OSError as error:
            raise StorageError(f"data.cache_dir: {folder}: {error.strerror}; choose another folder") from error
        self._unchecked_bytes = 0  # written since the folder was last looked through
        room_bytes = disk.f_bavail * disk.f_frsize + self._used_bytes
        if room_bytes < limit_bytes:
            raise StorageError(
                f"data.cache_dir: {folder}: its disk has {room_bytes / 2**30:.1f} GiB for the cache, and "
                f"data.cache_gib is {limit_bytes / 2**30:g}; free some space, set it lower, or choose another folder"
            )

    def share(self, next_uses: Mapping[str, NextUse]) -> None:
        """Keep parts for another reader too, whose numbers mean the same times; before anything is read."""
        for data, other in next_uses.items():
            own = self._next_uses.get(data)
            self._next_uses[data] = other if own is None else _sooner(own, other)

    def find(self, part: PartName, start: int, stop: int) -> bytes | None:
        """The bytes [start, stop) of a part, counted from its own start; None if it is not there."""
        try:
            with open(self._path(part), "rb", buffering=0) as file:
                content = os.pread(file.fileno(), stop - start, start)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:  # of the disk: what it should keep is fetched
            self.problem = error.strerror
            return None
        return content if len(content) == stop - start else None

    def keep(self, part: PartName, num_bytes: int, fetch: Callable[[], bytes | bytearray]) -> bytes | bytearray:
        """A whole part: fetched, and kept if there is room for it; or from another worker, if one is fetching it."""
        if self.problem is not None:
            return fetch()
        path = self._path(part)
        temporary = path.with_suffix(".tmp")
        content = None
        try:
            with _locked(temporary) as file:
                if (found := self.find(part, 0, num_bytes)) is not None:
                    return found
                content = fetch()
                if self._make_room(part, len(content)):
                    file.truncate(0)
                    file.write(content)
                    file.flush()
                    os.replace(temporary, path)
        except OSError as error:
            self.problem = error.strerror
        return fetch() if content is None else content

    def drop(self, part: PartName) -> None:
        """Delete a part whose bytes are wrong."""
        try:
            self._path(part).unlink(missing_ok=True)
        except OSError as error:
            self.problem = error.strerror

    def _path(self, part: PartName) -> Path:
        return self._folder / str(part)

    def _parts(self) -> dict[PartName, int]:
        """Sizes of the parts that are there, bytes."""
        parts = {}
        for entry in os.scandir(self._folder):
            if name := PartName.parse(entry.name):
                with suppress(FileNotFoundError):  # another worker has deleted it
                    parts[name] = entry.stat().st_size
        return parts

    def _make_room(self, part: PartName, num_bytes: int) -> bool:
        """Delete what is used later than this part until it fits; False where it is itself what is used last."""
        with self._lock:
            # Other workers write too: look through the folder every now and then, and before anything is deleted.
            is_kept = True
            if (
                self._used_bytes + num_bytes > self._limit_bytes
                or self._unchecked_bytes > self._limit_bytes * _UNCHECKED
            ):
                parts = self._parts()
                self._used_bytes, self._unchecked_bytes = sum(parts.values()), 0
                is_kept = self._delete(parts, part, num_bytes)
            if is_kept:
                self._used_bytes += num_bytes
                self._unchecked_bytes += num_bytes
            return is_kept

    def _delete(self, parts: dict[PartName, int], incoming: PartName, num_bytes: int) -> bool:
        """Delete what is used last until the limit holds; whether the incoming part is kept, or is itself used last."""
        excess = self._used_bytes + num_bytes - self._limit_bytes
        if excess <= 0:
            return True
        others = [name for name in parts if name.data not in self._next_uses]
        uses: dict[PartName, int] = {}
        for data, next_use in self._next_uses.items():
            own = [name for name in (*parts, incoming) if name.data == data]
            places = np.array([(name.shard, name.place) for name in own], np.int64).reshape(-1, 2)
            uses.update(zip(own, next_use(places[:, 0], places[:, 1]).tolist(), strict=True))
        last_first = others + sorted(uses.keys() - {incoming}, key=lambda name: -uses[name])
        later = [name for name in last_first if name not in uses or uses[name] > uses[incoming]]
        is_kept = sum(parts[name] for name in later) >= excess
        wanted = excess if is_kept else excess - num_bytes
        spare = int(self._limit_bytes * _ROOM) if is_kept else 0
        freed = 0
        for name in later if is_kept else last_first:
            if freed >= wanted and freed + parts[name] > wanted + spare:
                break
            self._path(name).unlink(missing_ok=True)
            freed += parts[name]
        self._used_bytes -= freed
        return is_kept


def _sooner(one: NextUse, other: NextUse) -> NextUse:
    """When parts are used next that two readers read."""
    return lambda shards, places: np.minimum(one(shards, places), other(shards, places))


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A file that is this worker's alone: the others wait, and a lock ends with its holder.

    Afterwards it is deleted, unless it was made something else. Not later: then it may be the next worker's.
    """
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                try:
                    yield file
                finally:
                    if _is_at(path, file):
                        path.unlink()
                return
        # Whoever had it before has deleted it, or made it the part.


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _delete_unless_locked(path: Path) -> None:
    with suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
