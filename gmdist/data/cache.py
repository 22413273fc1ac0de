"""Parts of shards kept on a local disk, within a limit: what is used last in the future is deleted first.

Workers of one machine share the folder: a part is fetched by one of them. A part is a file of a shard's bytes on a
grid of 8 MiB; what it holds is checked like all that is read, by the checksum of each sample.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gmdist.data.tape import Int64Array
from gmdist.errors import StorageError

PART_BYTES = 8 << 20
_ROOM = 0.02  # of the limit: freed at once, because finding out what to delete looks at every part

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
        data, *numbers = name.split("-")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            return None
        return cls(data, int(numbers[0]), int(numbers[1]))


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
        self._folder, self._limit_bytes, self._next_uses = Path(folder), limit_bytes, next_uses
        self._lock = threading.Lock()
        self.is_disk_full = False  # then nothing more is kept
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self._folder):
                if name.endswith(".tmp"):
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

    def find(self, part: PartName, start: int, stop: int) -> bytes | None:
        """The bytes [start, stop) of a part, counted from its own start; None if it is not there."""
        try:
            with open(self._path(part), "rb", buffering=0) as file:
                content = os.pread(file.fileno(), stop - start, start)
        except FileNotFoundError:
            return None
        return content if len(content) == stop - start else None

    def keep(self, part: PartName, fetch: Callable[[], bytes | bytearray]) -> bytes | bytearray:
        """A whole part: fetched, and kept if there is room for it; or from another worker, if one is fetching it."""
        if self.is_disk_full:
            return fetch()
        path = self._path(part)
        temporary = path.with_suffix(".tmp")
        content = None
        try:
            with open(temporary, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # one worker fetches, the others wait; a lock ends with its holder
                if path.exists():
                    with suppress(FileNotFoundError):
                        return path.read_bytes()
                content = fetch()
                if self._make_room(part, len(content)):
                    file.truncate(0)
                    file.write(content)
                    file.flush()
                    os.replace(temporary, path)
                else:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(f"data.cache_dir: {path}: {error.strerror}; choose another folder") from error
            self.is_disk_full = True
            temporary.unlink(missing_ok=True)
        return fetch() if content is None else content

    def drop(self, part: PartName) -> None:
        """Delete a part whose bytes are wrong."""
        self._path(part).unlink(missing_ok=True)

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
        """Delete what is used later than this part until it fits; False where it does not fit."""
        with self._lock:
            # Other workers write too: look through the folder every now and then, and before anything is deleted.
            spare_bytes = int(self._limit_bytes * _ROOM)
            if self._used_bytes + num_bytes > self._limit_bytes or self._unchecked_bytes > spare_bytes:
                parts = self._parts()
                self._used_bytes, self._unchecked_bytes = sum(parts.values()), 0
                excess_bytes = self._used_bytes + num_bytes - self._limit_bytes
                if excess_bytes > 0 and not self._delete(parts, part, excess_bytes, spare_bytes):
                    return False
            self._used_bytes += num_bytes
            self._unchecked_bytes += num_bytes
            return True

    def _delete(self, parts: dict[PartName, int], incoming: PartName, excess: int, spare: int) -> bool:
        """Delete `excess` bytes, and up to `spare` more, of parts that are used later than the incoming one."""
        others = [name for name in parts if name.data not in self._next_uses]
        uses: dict[PartName, int] = {}
        for data, next_use in self._next_uses.items():
            own = [name for name in (*parts, incoming) if name.data == data]
            places = np.array([(name.shard, name.place) for name in own], np.int64).reshape(-1, 2)
            uses.update(zip(own, next_use(places[:, 0], places[:, 1]).tolist(), strict=True))
        later = sorted((name for name in uses if uses[name] > uses[incoming]), key=lambda name: -uses[name])
        victims, freed = [], 0
        for name in others + later:
            if freed >= excess and freed + parts[name] > excess + spare:
                break
            victims.append(name)
            freed += parts[name]
        if freed < excess:
            return False
        for name in victims:
            self._path(name).unlink(missing_ok=True)
        self._used_bytes -= freed
        return True


def _delete_unless_locked(path: Path) -> None:
    with suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
