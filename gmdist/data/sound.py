"""Whole shards from object storage as they are there, whatever happens to bytes on their way."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import BinaryIO, TypeVar

from gmdist import storage
from gmdist.data import tar
from gmdist.data.shard import open_shard
from gmdist.errors import DataError, StorageError

_PART_BYTES = 8 << 20  # of an upload in parts, by the AWS CLI, by boto3, and from here

_Result = TypeVar("_Result")


def read_sound(
    location: str, version: storage.Stat, read: Callable[[tar.Readable, str], _Result], stopped: Event | None = None
) -> _Result:
    """What a function makes of a shard's bytes, and raises as a DataError, of bytes that were not damaged on their way.

    They are sound where their hash is the ETag. Where the ETag is no such hash, and where the function raises, two
    readings have to agree.

    Args:
        location: of the shard.
        version: that is meant.
        read: takes a file and its name, and reads the file to its end.
        stopped: ends the reading early, with a StorageError.
    """
    if version.is_local:
        with open_shard(location, version) as file:
            return read(file, location)
    before = set()
    for _ in range(storage.READ_ATTEMPTS):
        with open_shard(location, version, stopped) as file:
            hashed = _Hashed(file, in_parts="-" in version.etag)
            try:
                result: _Result | DataError = read(hashed, location)
            except DataError as error:
                result = error
        if isinstance(result, DataError):
            if hashed.md5() in before:
                raise result
        elif hashed.etag() == version.etag or hashed.md5() in before:
            return result
        before.add(hashed.md5())
    raise DataError(f"{location}: its bytes are others each time that they are read; check the network and the storage")


@contextmanager
def open_sound(location: str, version: storage.Stat) -> Iterator[BinaryIO]:
    """A shard to be read from its start to its end: one in object storage is copied to a temporary file first."""
    if version.is_local:
        with open_shard(location, version) as file:
            yield file
        return

    def copy(file: tar.Readable, _: str) -> BinaryIO:
        with _naming_temporary():
            temporary = tempfile.TemporaryFile(prefix="gmdist-shard-")
        while content := file.read(_PART_BYTES):
            with _naming_temporary():
                temporary.write(content)
        return temporary

    with read_sound(location, version, copy) as copied:
        copied.seek(0)
        yield copied


@contextmanager
def _naming_temporary() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: {error.strerror or error}; free space for a shard's copy, or set TMPDIR"
        ) from error


class _Hashed:
    """A file that is read from its start, and hashes of what was read."""

    def __init__(self, file: BinaryIO, *, in_parts: bool) -> None:
        self._file, self._in_parts = file, in_parts
        self._whole, self._part = _md5(), _md5()
        self._part_bytes = 0
        self._parts: list[bytes] = []

    def read(self, size: int, /) -> bytes:
        content = self._file.read(size)
        self._whole.update(content)
        rest = memoryview(content if self._in_parts else b"")
        while rest:
            piece, rest = rest[: _PART_BYTES - self._part_bytes], rest[_PART_BYTES - self._part_bytes :]
            self._part.update(piece)
            self._part_bytes += len(piece)
            if self._part_bytes == _PART_BYTES:
                self._end_part()
        return content

    def _end_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part, self._part_bytes = _md5(), 0

    def md5(self) -> str:
        """Of all that was read."""
        return self._whole.hexdigest()

    def etag(self) -> str:
        """What the object's ETag is if it was uploaded at once, or in parts of 8 MiB."""
        if not self._in_parts:
            return self.md5()
        parts = [*self._parts, self._part.digest()] if self._part_bytes else self._parts
        return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def _md5(content: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(content, usedforsecurity=False)
