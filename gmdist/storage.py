"""Files in local folders and under s3://, behind a few functions.

A location is a string: a local path or s3://bucket/key. Nothing else is accepted: a location comes from configs, and
some libraries run `pipe:` locations as commands.

Writing is atomic: a reader sees the old content or the new, never a part. Errors are StorageErrors that name the
location; a missing file is a FileNotFoundError.
"""

import errno
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from gmdist import ranged, s3
from gmdist.checksum import crc32
from gmdist.errors import ConfigError, StorageError

# Bytes can be damaged on their way: what a checksum refuses is asked for again. Even where a quarter of all answers are
# damaged, fewer than one read in ten million ends a run.
READ_ATTEMPTS = 12

_PIECE_BYTES = 1 << 23
_CACHED_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")  # of `write_from`
_OTHERWISE = {
    errno.EISDIR: "there is a folder where a file is meant",
    errno.ENOTDIR: "there is a file where a folder is meant",
    errno.ELOOP: "its links lead in a circle",
}


class NotAFileError(StorageError):
    """There is something at the place of a file, and it is none: no other attempt and no permission will help."""


@dataclass(frozen=True)
class Stat:
    """What tells one version of a file from another."""

    num_bytes: int
    etag: str  # S3's ETag; for a local file "mtime-" and its modification time in nanoseconds, or empty where unknown

    @property
    def is_local(self) -> bool:
        """Whether this is the version of a local file, which says nothing of its copy in object storage."""
        return not self.etag or self.etag.startswith("mtime-")


def is_s3(location: str) -> bool:
    """Whether the location is in object storage. Raises ConfigError for any other scheme than s3://."""
    bucket = location.partition("://")[2].partition("/")[0]
    if "@" in bucket:  # it is not shown
        raise ConfigError("a location with '@': must not hold credentials: boto3 finds them; use s3://bucket/prefix")
    if location.startswith("s3://") and bucket:
        return True
    if "://" in location or location.startswith(("pipe:", "s3:")):
        raise ConfigError(f"{location}: not a location that gmdist reads; use s3://bucket/prefix or a local path")
    return False


def absolute(location: str) -> str:
    """The location as every process sees it, whatever its working directory."""
    return location.rstrip("/") if is_s3(location) else os.path.abspath(os.path.expanduser(location))


def join(location: str, *parts: str) -> str:
    """The location of a file inside a folder or prefix."""
    return "/".join([location.rstrip("/"), *parts])


def read(location: str) -> bytes:
    """The whole content of a file."""
    with naming(location):
        if is_s3(location):
            return bytes(ranged.read_object(location))
        return Path(location).read_bytes()


def read_range(location: str, offset: int, num_bytes: int, version: Stat, stopped: Event | None = None) -> bytearray:
    """`num_bytes` of a file from `offset` on.

    Args:
        location: of the file.
        offset, num_bytes: bytes.
        version: of an object in storage, the version that is meant.
        stopped: ends the reading early, with a StorageError.

    Raises:
        StorageError: the file ends before, or the object is another version (`s3.ChangedError`).
    """
    if num_bytes == 0:
        return bytearray()  # HTTP has no empty range: S3 answers with the whole object
    with naming(location):
        if is_s3(location):
            filled = min(num_bytes, version.num_bytes - offset)
            if filled == num_bytes:
                stop, (total, etag) = offset + num_bytes, (version.num_bytes, version.etag)
                return ranged.read_range(location, offset, stop, etag=etag, num_bytes=total, stopped=stopped)
        else:
            content = bytearray(num_bytes)
            with open(location, "rb", buffering=0) as file:
                filled = os.preadv(file.fileno(), [content], offset)
    if filled != num_bytes:
        raise StorageError(f"{location}: asked for {num_bytes} bytes at {offset}, got {filled}: the file was cut")
    return content


class _Pieces(io.RawIOBase):
    """One version of an object from its start to its end, a range at a time."""

    def __init__(self, location: str, version: Stat, stopped: Event | None) -> None:
        self._location, self._version, self._stopped, self._position = location, version, stopped, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        num_bytes = min(len(buffer), self._version.num_bytes - self._position)
        buffer[:num_bytes] = read_range(self._location, self._position, num_bytes, self._version, self._stopped)
        self._position += num_bytes
        return num_bytes


def open_read(location: str, version: Stat, stopped: Event | None = None) -> io.BufferedReader:
    """A file to be read from its start to its end; an object in storage in pieces of 8 MiB.

    Reading an object raises StorageErrors: `s3.ChangedError` if it is not that version any more, and one when `stopped`
    is set.
    """
    with naming(location):
        if is_s3(location):
            return io.BufferedReader(_Pieces(location, version, stopped), _PIECE_BYTES)
        return open(location, "rb")


def checksum(location: str) -> tuple[int, int]:
    """Size in bytes and crc32 of a file, read in pieces that stay in the processor's cache."""
    num_bytes, value, piece = 0, 0, memoryview(bytearray(_CACHED_BYTES))
    with naming(location), open_read(location, stat(location)) as file:
        while count := file.readinto(piece):
            num_bytes, value = num_bytes + count, crc32(piece[:count], value)
    return num_bytes, value


def read_checked(location: str, num_bytes: int, expected_crc32: int) -> bytes:
    """The whole content of a file whose size and crc32 are known; StorageError if it has others, however often read."""
    for _ in range(READ_ATTEMPTS):
        content = read(location)
        if len(content) == num_bytes and crc32(content) == expected_crc32:
            return content
    raise StorageError(f"{location}: damaged (its size or crc32 differs)")


class _Memory(io.RawIOBase):
    """Bytes in memory as a file that does not copy them."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        piece = self._content[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def write(location: str, content: bytes | memoryview) -> None:
    """Replace a file's content at once; parent folders are made."""
    write_from(location, io.BytesIO(content) if isinstance(content, bytes) else io.BufferedReader(_Memory(content)))


def copy_from_local(path: str, location: str) -> None:
    """Write a local file's content to a location."""
    with open(path, "rb") as file:
        write_from(location, file)


def copy(source: str, location: str) -> None:
    """Replace a file's content by that of another of the same storage; in a bucket, none of it comes through here."""
    if not is_s3(source):
        copy_from_local(source, location)
        return
    with naming(location):
        bucket, key = s3.split(source)
        s3.ask(lambda client: client.copy({"Bucket": bucket, "Key": key}, *s3.split(location)))


def write_json(location: str, content: dict[str, Any]) -> None:
    """Replace a file's content by a JSON object that holds a checksum of itself, for `read_json`."""
    text = json.dumps(content | {"crc32": _crc32_of(content)}, indent=1) + "\n"
    write(location, text.encode())


def read_json(location: str) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is damaged, or something else.
    """
    problem = "its crc32 differs"
    for _ in range(READ_ATTEMPTS):
        try:
            content = json.loads(read(location))
            if content.pop("crc32") == _crc32_of(content):
                return content
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = repr(error)
    raise ValueError(problem)


def _crc32_of(content: dict[str, Any]) -> int:
    return crc32(json.dumps(content, sort_keys=True).encode())


def write_from(location: str, source: BinaryIO) -> None:
    """Replace a file's content at once by that of an open file, from its start; to S3 in parts where it is large."""
    num_bytes = source.seek(0, os.SEEK_END)
    source.seek(0)
    with naming(location):
        if is_s3(location):
            bucket, key = s3.split(location)

            def upload(client: Any) -> None:
                source.seek(0)
                if num_bytes <= _PIECE_BYTES:
                    client.put_object(Bucket=bucket, Key=key, Body=source.read())
                else:
                    client.upload_fileobj(source, bucket, key)

            s3.ask(upload)
            return
        path = Path(location)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                shutil.copyfileobj(source, file, _PIECE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except FileNotFoundError as error:  # under /proc and the like
            raise StorageError(f"{location}: no file can be made there; choose another folder") from error
        finally:
            temporary.unlink(missing_ok=True)


def stat(location: str) -> Stat:
    """Size and version of a file."""
    with naming(location):
        if is_s3(location):
            return Stat(*s3.head(location))
        status = os.stat(location)
        return Stat(status.st_size, f"mtime-{status.st_mtime_ns}")


def exists(location: str) -> bool:
    """Whether there is such a file (not a folder or prefix)."""
    try:
        stat(location)
    except FileNotFoundError:
        return False
    return is_s3(location) or os.path.isfile(location)


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder or prefix; [] where there is none."""
    with naming(folder):
        if is_s3(folder):
            return sorted(name for name, _ in _list_s3(folder))
        if not os.path.isdir(folder):
            return []
        return sorted(entry.name for entry in os.scandir(folder) if not entry.name.endswith(".tmp"))


def list_stats(folder: str) -> dict[str, Stat]:
    """The files directly inside a folder or prefix, by name: their sizes and versions; {} where there is none."""
    with naming(folder):
        if is_s3(folder):
            return dict(sorted((name, version) for name, version in _list_s3(folder) if version is not None))
        stats = {}
        for entry in os.scandir(folder) if os.path.isdir(folder) else ():
            # Links to nowhere and in circles are no files.
            if entry.name.endswith(".tmp") or not os.path.isfile(entry.path):
                continue
            with suppress(FileNotFoundError):  # it vanished
                status = entry.stat()
                stats[entry.name] = Stat(status.st_size, f"mtime-{status.st_mtime_ns}")
        return dict(sorted(stats.items()))


def delete_tree(folder: str, first: str | None = None) -> None:
    """Delete a folder or prefix with all that is in it; nothing happens where there is none.

    Args:
        folder: of a local link the target stays; a local file goes too.
        first: the name of what goes before all else, so that a folder without it may be one that is deleted in part.

    Raises:
        StorageError: something cannot be deleted.
    """
    with naming(folder):
        if is_s3(folder):
            bucket, prefix = _folder_prefix(folder)
            if first is not None:
                s3.ask(lambda client: client.delete_object(Bucket=bucket, Key=prefix + first))
            for page in _pages("list_objects_v2", Bucket=bucket, Prefix=prefix):
                if keys := [entry["Key"] for entry in page.get("Contents", [])]:
                    s3.delete_objects(bucket, keys)
            return
        path = folder.rstrip("/")  # with it, a link would be its target
        if os.path.islink(path) or os.path.isfile(path):
            Path(path).unlink(missing_ok=True)
        elif first is not None and os.path.isdir(path):
            delete_tree(join(path, first))
        while os.path.isdir(path):
            with suppress(FileNotFoundError):  # somebody else deletes it too
                shutil.rmtree(path)


def delete(location: str) -> None:
    """Delete a file; nothing happens where there is none."""
    with naming(location):
        if is_s3(location):
            bucket, key = s3.split(location)
            s3.ask(lambda client: client.delete_object(Bucket=bucket, Key=key))
        else:
            Path(location).unlink(missing_ok=True)


def delete_leftovers(folder: str, own: re.Pattern[str] | None = None) -> None:
    """Delete what writers that were killed have left directly inside a folder.

    Args:
        folder: or prefix.
        own: the names that the caller writes. Unfinished uploads of these are ended; others may be somebody else's.
            In a local folder the temporary files of `write_from` are deleted.
    """
    with naming(folder):
        if is_s3(folder):
            if own is None:
                return
            bucket, prefix = _folder_prefix(folder)
            pages = _pages("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
            for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
                if own.fullmatch(upload["Key"].removeprefix(prefix)):
                    s3.client().abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        elif os.path.isdir(folder):
            for entry in list(os.scandir(folder)):
                if _TEMPORARY.fullmatch(entry.name):
                    delete(entry.path)


def _folder_prefix(folder: str) -> tuple[str, str]:
    bucket, prefix = s3.split(folder.rstrip("/"))
    return bucket, prefix + "/" if prefix else ""


def _pages(operation: str, **what: str) -> list[dict[str, Any]]:
    """All answers to a question that has more than one."""
    return s3.ask(lambda client: list(client.get_paginator(operation).paginate(**what)))


def _list_s3(folder: str) -> Iterator[tuple[str, Stat | None]]:
    """Names directly inside a prefix, with the versions of the objects and None for further prefixes."""
    bucket, prefix = _folder_prefix(folder)
    for page in _pages("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/"):
        for entry in page.get("Contents", []):
            if entry["Key"] != prefix:  # consoles mark a folder by an empty object that is named like its prefix
                yield entry["Key"].removeprefix(prefix), Stat(entry["Size"], entry["ETag"].strip('"'))
        for entry in page.get("CommonPrefixes", []):
            yield entry["Prefix"].removeprefix(prefix).rstrip("/"), None


@contextmanager
def naming(location: str) -> Iterator[None]:
    """Turn the system's and boto3's errors into ones that name the location and the way out."""
    try:
        yield
    except OSError as error:
        if _is_boto3s(error):  # some are the system's errors too
            raise s3.explain(location, error) from error
        if isinstance(error, FileNotFoundError) and not (is_s3(location) and error.filename != location):
            raise
        advice = {
            errno.ENOSPC: "free some space or choose another folder",
            errno.EDQUOT: "the quota is used up; free some space or choose another folder",
            errno.EACCES: "check its permissions",
            errno.EMFILE: "too few files may be open at once; raise the limit (ulimit -n)",
            errno.EROFS: "the file system is read-only; choose another folder",
            **_OTHERWISE,
        }.get(error.errno or 0, "check that the path can be read and written")
        if error.errno == errno.ENOTDIR and (files := list(filter(Path.is_file, Path(location).parents))):
            advice = f"{files[0]} is a file, where a folder is meant"
        kind = NotAFileError if error.errno in _OTHERWISE else StorageError
        raise kind(f"{location}: {error.strerror or error}; {advice}") from error
    except Exception as error:
        if not _is_boto3s(error):
            raise
        raise s3.explain(location, error) from error


def _is_boto3s(error: Exception) -> bool:
    return type(error).__module__.startswith(("botocore", "boto3", "s3transfer"))
