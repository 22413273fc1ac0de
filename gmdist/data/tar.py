"""Strict reading of tar archives: every header checked, every name safe, read to the end-of-archive blocks.

The standard library's reader takes a damaged header for the end of an archive, and so loses what follows in silence.
"""

import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, Protocol

from gmdist.errors import DataError

MAX_MEMBER_BYTES = 1 << 30
_MAX_EXTENDED_HEADER_BYTES = 1 << 20
BLOCK = 512
_MAX_DIGITS = 20
# By first bytes, which in a plain archive are a member's name.
_COMPRESSED = {
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"BZh[1-9]1AY&SY"): "bzip2",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
    re.compile(rb"\x28\xb5\x2f\xfd"): "zstd",
}
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


class Readable(Protocol):
    """A file that is read from its start to its end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes; fewer only at the end."""


def members(file: Readable, location: str) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset and content of each regular file of a tar archive, to its end-of-archive blocks."""
    position = 0
    extended: dict[str, Any] = {}  # path and size of the next member
    while True:
        header = file.read(BLOCK)
        if position == 0:
            _check_plain(header, location)
        _check_size(header, BLOCK, location, position)
        if header == bytes(BLOCK):
            if _exactly(file, BLOCK, location, position + BLOCK) != bytes(BLOCK):
                raise DataError(f"{location}: a zero block at {position} that does not end the archive")
            _check_tail(file, location)
            return
        info = _header(header, location, position)
        position += BLOCK
        size = extended.get("size", info.size) if info.type not in _EXTENSIONS else info.size
        limit = _MAX_EXTENDED_HEADER_BYTES if info.type in _EXTENSIONS else MAX_MEMBER_BYTES
        if not 0 <= size <= limit:
            raise DataError(f"{location}: the member at {position} says {size} bytes; at most {limit} are accepted")
        content = _exactly(file, -(-size // BLOCK) * BLOCK, location, position)[:size]
        start, position = position, position + -(-size // BLOCK) * BLOCK
        if info.type == tarfile.XHDTYPE:
            extended |= _pax_records(content, location, start)
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            name = _safe_name(extended.get("path", info.name), location)
            extended = {}
            yield name, start, content
        elif info.type == tarfile.DIRTYPE:
            if size:  # readers differ in whether they skip that much
                raise DataError(f"{location}: folder {info.name!r} says {size} bytes; folders in shards have none")
            extended = {}
        elif info.type == tarfile.XGLTYPE:
            if _pax_records(content, location, start):
                raise DataError(f"{location}: a PAX header at byte {start} names or sizes all members at once")
        else:
            kind = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}.get(
                info.type, "no regular file"
            )
            raise DataError(f"{location}: member {info.name!r} is {kind}; shards hold regular files only")


def _exactly(file: Readable, size: int, location: str, position: int) -> bytes:
    content = file.read(size)
    _check_size(content, size, location, position)
    return content


def _check_plain(header: bytes, location: str) -> None:
    for start, program in _COMPRESSED.items():
        if start.match(header):
            raise DataError(f"{location}: compressed with {program}; shards are plain tar files, decompress it first")


def _check_size(content: bytes, size: int, location: str, position: int) -> None:
    if len(content) != size:
        raise DataError(
            f"{location}: ends at byte {position + len(content)}, before the end of the archive: it was cut"
        )


def _check_tail(file: Readable, location: str) -> None:
    # Archives are padded with zeros to a record of 10 KiB; anything else is a second archive glued on.
    while block := file.read(1 << 16):
        if block.count(0) != len(block):
            raise DataError(f"{location}: data follows the end of the archive: are these several tar files in one?")


def _header(block: bytes, location: str, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{location}: damaged tar header at byte {position} ({error})") from error


def _pax_records(content: bytes, location: str, position: int) -> dict[str, Any]:
    r"""The records "LENGTH KEY=VALUE\n" of a PAX header; only path and size matter here."""
    records: dict[str, Any] = {}
    start = 0
    while start < len(content):
        length_text, _, _ = content[start : start + _MAX_DIGITS].partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 8 else 0
        record = content[start + len(length_text) + 1 : start + length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise DataError(f"{location}: damaged PAX header at byte {position}")
        if key == b"path":
            records["path"] = value[:-1].decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value[:-1].isdigit() or len(value) > _MAX_DIGITS:
                raise DataError(f"{location}: damaged PAX header at byte {position}")
            records["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise DataError(f"{location}: a sparse member at byte {position}; shards hold plain regular files only")
        start += length
    return records


def _safe_name(name: str, location: str) -> str:
    """The member's name without a leading "./"; DataError for one that would leave a folder it is unpacked in."""
    normal = posixpath.normpath(name)
    unsafe = name.startswith("/") or ".." in name.split("/") or "\\" in name
    if unsafe or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise DataError(f"{location}: member name {name!r} is unsafe; names are relative UTF-8 paths")
    return normal
