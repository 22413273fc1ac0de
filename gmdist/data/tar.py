"""Strict reading of tar archives: every header checked, every name safe, read to the end-of-archive blocks.

The standard library's reader takes a damaged header for the end of an archive, and so loses what follows in silence.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from gmdist.errors import DataError

MAX_MEMBER_BYTES = 1 << 30
_MAX_EXTENDED_HEADER_BYTES = 1 << 20
BLOCK = 512
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def members(file: BinaryIO, location: str) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset and content of each regular file of a tar archive, to its end-of-archive blocks."""
    position = 0
    extended: dict[str, str] = {}
    while True:
        header = _exactly(file, BLOCK, location, position)
        if header == bytes(BLOCK):
            if _exactly(file, BLOCK, location, position + BLOCK) != bytes(BLOCK):
                raise DataError(f"{location}: a zero block at {position} that does not end the archive")
            _check_tail(file, location)
            return
        info = _header(header, location, position)
        position += BLOCK
        size = int(extended.get("size", info.size)) if info.type not in _EXTENSIONS else info.size
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
            extended = {}
        elif info.type != tarfile.XGLTYPE:
            kind = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}.get(
                info.type, "no regular file"
            )
            raise DataError(f"{location}: member {info.name!r} is {kind}; shards hold regular files only")


def _exactly(file: BinaryIO, size: int, location: str, position: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise DataError(
            f"{location}: ends at byte {position + len(content)}, before the end of the archive: it was cut"
        )
    return content


def _check_tail(file: BinaryIO, location: str) -> None:
    # Archives are padded with zeros to a record of 10 KiB; anything else is a second archive glued on.
    while block := file.read(1 << 16):
        if block.count(0) != len(block):
            raise DataError(f"{location}: data follows the end of the archive: are these several tar files in one?")


def _header(block: bytes, location: str, position: int) -> tarfile.TarInfo:
    if position == 0 and block[:2] == b"\x1f\x8b":
        raise DataError(f"{location}: compressed with gzip; shards are plain tar files, decompress it first")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{location}: damaged tar header at byte {position} ({error})") from error


def _pax_records(content: bytes, location: str, position: int) -> dict[str, str]:
    r"""The records "LENGTH KEY=VALUE\n" of a PAX header; only path and size matter here."""
    records = {}
    rest = content
    while rest:
        length_text, _, _ = rest.partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 8 else 0
        record = rest[len(length_text) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise DataError(f"{location}: damaged PAX header at byte {position}")
        if key == b"path" or (key == b"size" and value[:-1].isdigit()):
            records[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse"):
            raise DataError(f"{location}: a sparse member at byte {position}; shards hold plain regular files only")
        rest = rest[length:]
    return records


def _safe_name(name: str, location: str) -> str:
    """The member's name without a leading "./"; DataError for one that would leave a folder it is unpacked in."""
    normal = posixpath.normpath(name)
    unsafe = name.startswith("/") or normal.startswith("..") or "\\" in name
    if unsafe or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise DataError(f"{location}: member name {name!r} is unsafe; names are relative UTF-8 paths")
    return normal
