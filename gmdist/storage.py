"""Files in local folders and under s3://, behind a few functions. The only importer of boto3.

A location is a string: a local path or s3://bucket/key. Nothing else is accepted: a location comes from configs, and
some libraries run `pipe:` locations as commands.

Writing is atomic: a reader sees the old content or the new, never a part. Errors are StorageErrors that name the
location; a missing file is a FileNotFoundError.
"""

import errno
import functools
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmdist.errors import ConfigError, StorageError

_PIECE_BYTES = 1 << 23


@dataclass(frozen=True)
class Stat:
    """What tells one version of a file from another."""

    num_bytes: int
    etag: str  # S3's ETag; for a local file its modification time in nanoseconds


def is_s3(location: str) -> bool:
    """Whether the location is in object storage. Raises ConfigError for any other scheme than s3://."""
    if location.startswith("s3://"):
        return True
    if "://" in location or location.startswith("pipe:"):
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
            bucket, key = _split(location)
            return _client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return Path(location).read_bytes()


def read_range(location: str, offset: int, num_bytes: int) -> bytes:
    """`num_bytes` of a file from `offset` on; StorageError if the file ends before."""
    if num_bytes == 0:
        return b""  # HTTP has no empty range: S3 answers with the whole object
    with naming(location):
        if is_s3(location):
            bucket, key = _split(location)
            span = f"bytes={offset}-{offset + num_bytes - 1}"
            content = _client().get_object(Bucket=bucket, Key=key, Range=span)["Body"].read()
        else:
            with open(location, "rb") as file:
                content = os.pread(file.fileno(), num_bytes, offset)
    if len(content) != num_bytes:
        raise StorageError(f"{location}: asked for {num_bytes} bytes at {offset}, got {len(content)}: the file was cut")
    return content


def checksum(location: str) -> tuple[int, int]:
    """Size in bytes and crc32 of a file, read in pieces."""
    num_bytes, crc32 = 0, 0
    with naming(location), ExitStack() as stack:
        if is_s3(location):
            bucket, key = _split(location)
            pieces = _client().get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(_PIECE_BYTES)
        else:
            file = stack.enter_context(open(location, "rb"))
            pieces = iter(lambda: file.read(_PIECE_BYTES), b"")
        for piece in pieces:
            num_bytes, crc32 = num_bytes + len(piece), zlib.crc32(piece, crc32)
    return num_bytes, crc32


def write(location: str, content: bytes) -> None:
    """Replace a file's content at once; parent folders are made."""
    with naming(location):
        if is_s3(location):
            bucket, key = _split(location)
            _client().put_object(Bucket=bucket, Key=key, Body=content)
            return
        path = Path(location)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except FileNotFoundError as error:  # under /proc and the like
            raise StorageError(f"{location}: no file can be made there; choose another folder") from error
        finally:
            temporary.unlink(missing_ok=True)


def copy_from_local(path: str, location: str) -> None:
    """Write a local file's content to a location."""
    if is_s3(location):
        with naming(location):
            bucket, key = _split(location)
            _client().upload_file(path, bucket, key)  # multipart above boto3's threshold
    else:
        write(location, Path(path).read_bytes())


def stat(location: str) -> Stat:
    """Size and version of a file."""
    with naming(location):
        if is_s3(location):
            bucket, key = _split(location)
            head = _client().head_object(Bucket=bucket, Key=key)
            return Stat(head["ContentLength"], head["ETag"].strip('"'))
        status = os.stat(location)
        return Stat(status.st_size, str(status.st_mtime_ns))


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
            return sorted(_list_s3(folder))
        if not os.path.isdir(folder):
            return []
        return sorted(entry.name for entry in os.scandir(folder) if not entry.name.endswith(".tmp"))


def delete_tree(folder: str) -> None:
    """Delete a folder or prefix with all that is in it; nothing happens where there is none."""
    with naming(folder):
        if is_s3(folder):
            bucket, prefix = _split_folder(folder)
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            for page in pages:
                keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
                if keys:
                    _client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
            return
        while os.path.isdir(folder):
            with suppress(FileNotFoundError):  # somebody else deletes it too
                shutil.rmtree(folder)


def delete(location: str) -> None:
    """Delete a file; nothing happens where there is none."""
    with naming(location):
        if is_s3(location):
            bucket, key = _split(location)
            _client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(location).unlink(missing_ok=True)


def _split(location: str) -> tuple[str, str]:
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, key


def _split_folder(folder: str) -> tuple[str, str]:
    bucket, prefix = _split(folder.rstrip("/"))
    return bucket, prefix + "/" if prefix else ""


def _list_s3(folder: str) -> Iterator[str]:
    bucket, prefix = _split_folder(folder)
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    for page in pages:
        # Consoles mark a folder by an empty object that is named like its prefix.
        yield from (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", []) if entry["Key"] != prefix)
        yield from (entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", []))


@functools.cache
def _client() -> Any:
    # Endpoint, region and credentials come from boto3's own chain: environment, profile, instance role.
    import boto3
    from botocore.config import Config

    config = Config(retries={"mode": "standard", "max_attempts": 8}, connect_timeout=5, read_timeout=15)
    return boto3.session.Session().client("s3", config=config)


@contextmanager
def naming(location: str) -> Iterator[None]:
    """Turn the system's and boto3's errors into ones that name the location and the way out."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not location.startswith("s3://"):
            raise
        advice = {
            errno.ENOSPC: "free some space or choose another folder",
            errno.EDQUOT: "the quota is used up; free some space or choose another folder",
            errno.EACCES: "check its permissions",
            errno.EROFS: "the file system is read-only; choose another folder",
        }.get(error.errno or 0, "check that the path can be read and written")
        raise StorageError(f"{location}: {error.strerror or error}; {advice}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
            raise
        code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
        if code in ("404", "NoSuchKey", "NotFound"):
            raise FileNotFoundError(errno.ENOENT, "no such object", location) from error
        advice = {
            "NoSuchBucket": "there is no such bucket; check its name and AWS_ENDPOINT_URL",
            "403": "access denied; check the credentials' permissions for this bucket",
            "AccessDenied": "access denied; check the credentials' permissions for this bucket",
            "ExpiredToken": "the credentials have expired; renew them",
        }.get(code, str(error).splitlines()[0])
        raise StorageError(f"{location}: {advice}") from error
