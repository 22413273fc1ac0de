"""Tar shards in the WebDataset convention, and their indexes.

A shard is a plain tar file: members that follow each other and share a key (the name up to the first dot of its last
component) make one sample, the rest of the name says what a member holds. The index of a shard holds offset, size and
crc32 of every member. Reading is strict: a shard that another reader would cut short or misread is an error here.
"""

import codecs
import functools
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from gmdist import s3, storage
from gmdist.checksum import crc32
from gmdist.data import tar
from gmdist.data.manifest import ShardEntry
from gmdist.data.tape import keyed_hash
from gmdist.errors import DataError

FORMAT_VERSION = 1
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset's readers leave out
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class Member(NamedTuple):
    """One file of a sample: where its bytes are in the shard."""

    offset: int  # bytes from the start of the shard
    num_bytes: int
    crc32: int


class Sample(NamedTuple):
    """One sample of a shard."""

    key: str
    members: dict[str, Member]  # by extension: "png", "cls"


class ShardIndex:
    """Where each member of each sample of one shard is."""

    def __init__(self, keys: list[str], extensions: list[str], members: npt.NDArray[np.int64]) -> None:
        """members: offset, num_bytes and crc32 [samples, extensions, 3]; num_bytes is -1 where a sample lacks one."""
        self.keys, self.extensions, self._members = keys, extensions, members

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        rows = zip(self.extensions, self.rows(index), strict=True)
        return Sample(self.keys[index], {extension: Member(*row) for extension, row in rows if row[1] >= 0})

    def rows(self, index: int) -> list[tuple[int, int, int]]:
        """Offset, num_bytes and crc32 of each extension's member of a sample; num_bytes is -1 where it lacks one."""
        return self._members[index].tolist()

    @functools.cached_property
    def hashes(self) -> npt.NDArray[np.int64]:
        """One hash of each sample's bytes [samples]: of its members' checksums, in the order of their extensions."""
        result = np.zeros(len(self), np.uint64)
        for e in np.argsort(self.extensions):
            num_bytes, checksums = self._members[:, e, 1], self._members[:, e, 2]
            result = np.where(num_bytes >= 0, keyed_hash(result.astype(np.int64), checksums), result)
        return result.astype(np.int64)

    @functools.cached_property
    def spans(self) -> npt.NDArray[np.int64]:
        """Where each sample's members begin and end in the shard, bytes: [samples, 2]."""
        offset, num_bytes = self._members[:, :, 0], self._members[:, :, 1]
        there = num_bytes >= 0
        begin = np.where(there, offset, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
        end = np.where(there, offset + num_bytes, 0).max(axis=1, initial=0)
        return np.stack([begin, end], axis=1)

    def lies_within(self, num_bytes: int) -> bool:
        """Whether there is a row of members for each sample, and all of them lie in a shard of so many bytes."""
        if self._members.shape[:2] != (len(self.keys), len(self.extensions)):
            return False
        offset, size = self._members[:, :, 0], self._members[:, :, 1]
        there = size >= 0
        return not (there & ((offset < 0) | (size > num_bytes) | (offset > num_bytes - size))).any()

    @classmethod
    def of(cls, samples: list[Sample]) -> "ShardIndex":
        """The index of a shard with these samples."""
        extensions = sorted({extension for sample in samples for extension in sample.members})
        members = np.empty((len(samples), len(extensions), 3), np.int64)
        for s, sample in enumerate(samples):
            for e, extension in enumerate(extensions):
                members[s, e] = sample.members.get(extension, Member(0, -1, 0))
        return cls([sample.key for sample in samples], extensions, members)

    def to_bytes(self) -> bytes:
        """The index as a safetensors file."""
        columns = {field: np.ascontiguousarray(self._members[:, :, i]) for i, field in enumerate(Member._fields)}
        arrays: dict[str, npt.NDArray[Any]] = columns | {
            "keys": _json_array(self.keys),
            "extensions": _json_array(self.extensions),
        }
        # One entry only: safetensors writes several in a random order, and the manifest's hash sees these bytes.
        return save_safetensors(arrays, {"format": str(FORMAT_VERSION)})

    @classmethod
    def from_bytes(cls, content: bytes, location: str) -> "ShardIndex":
        """Read an index; DataError names the location if it is none."""
        try:
            arrays = load_safetensors(content)
            header_bytes = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
            if metadata["format"] != str(FORMAT_VERSION):
                raise DataError(f"{location}: index of format {metadata['format']}; run `gmdist data index` again")
            keys, extensions = (json.loads(arrays[name].tobytes()) for name in ("keys", "extensions"))
            return cls(keys, extensions, np.stack([arrays[field] for field in Member._fields], axis=-1))
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{location}: not a shard index ({error}); run `gmdist data index` again") from error


def _json_array(names: list[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def index_name(shard_name: str) -> str:
    """The name of a shard's index file."""
    return shard_name.removesuffix(".tar") + ".index.safetensors"


def shards_among(folder: str, stats: Mapping[str, storage.Stat]) -> dict[str, storage.Stat]:
    """The shards among a folder's files, hidden ones left out.

    DataError if there are none, or one has a name that a manifest cannot list.
    """
    found = {name: stat for name, stat in stats.items() if name.lower().endswith(".tar") and not name.startswith(".")}
    if not found:
        raise DataError(f"{folder}: no .tar shards here; make them with `gmdist data pack SRC DEST`")
    for name in found:
        if not name.isprintable() or "\\" in name:
            raise DataError(f"{folder}: {name!r}: a shard's name has to be printable UTF-8 without \\; rename it")
        if not name.endswith(".tar"):
            raise DataError(f"{folder}: {name!r}: a shard's name has to end in .tar; rename it")
    return found


def load_index(folder: str, entry: ShardEntry) -> ShardIndex:
    """Read a shard's index and check it against the manifest."""
    location = storage.join(folder, index_name(entry.name))
    for _ in range(storage.READ_ATTEMPTS):
        try:
            content = storage.read(location)
        except FileNotFoundError as error:
            raise DataError(f"{location}: missing; run `gmdist data index {folder}`") from error
        if crc32(content) == entry.index_crc32:
            break
    else:
        raise DataError(f"{location}: differs from the manifest's checksum; run `gmdist data index {folder}`")
    index = ShardIndex.from_bytes(content, location)
    if len(index) != entry.samples:
        raise DataError(f"{location}: {len(index)} samples, but the manifest says {entry.samples}")
    if not index.lies_within(entry.num_bytes):
        raise DataError(
            f"{location}: its samples are not of a shard of {entry.num_bytes} bytes; run `gmdist data index`"
        )
    return index


def parse_label(content: bytes, name: str) -> int:
    """A `.cls` member: a non-negative decimal integer."""
    text = content.removeprefix(codecs.BOM_UTF8).strip()
    if not text.isdigit() or len(text) > 9:
        raise DataError(f"{name}: the class label is {text[:20]!r}; it must be a non-negative integer")
    return int(text)


def _labels_with(content: bytes) -> int:
    """A `.cls` member's label + 1; 0 if it is none: only a run that reads labels minds, and replaces that sample."""
    try:
        return parse_label(content, "cls") + 1
    except DataError:
        return 0


class ShardWriter:
    """Writes one shard as USTAR, and its index. The same samples make the same bytes."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._samples: list[Sample] = []
        self._labels = 0

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._buffer.tell()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: its key, without dots in the last component, and its members by extension."""
        assert "." not in key.rpartition("/")[2], key
        located = {}
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(content), 0o644
            try:
                header = info.tobuf(tarfile.USTAR_FORMAT)
            except ValueError:  # a name of more than 100 bytes, which another writer has made
                header = info.tobuf(tarfile.PAX_FORMAT)
            self._buffer.write(header)
            located[extension] = Member(self._buffer.tell(), len(content), crc32(content))
            self._buffer.write(content)
            self._buffer.write(bytes(-len(content) % tar.BLOCK))
            if extension == "cls":
                self._labels = max(self._labels, _labels_with(content))
        self._samples.append(Sample(key, located))

    def save(self, folder: str, name: str) -> ShardEntry:
        """Write the shard and its index, and return its line of the manifest."""
        self._buffer.write(bytes(2 * tar.BLOCK))
        self._buffer.write(bytes(-self._buffer.tell() % tarfile.RECORDSIZE))
        location = storage.join(folder, name)
        storage.write_from(location, self._buffer)
        index = ShardIndex.of(self._samples).to_bytes()
        storage.write(storage.join(folder, index_name(name)), index)
        status = storage.stat(location)
        return ShardEntry(name, status.etag, len(self._samples), status.num_bytes, crc32(index), self._labels)


def scan(file: tar.Readable, location: str) -> tuple[ShardIndex, int]:
    """Read a whole shard strictly.

    Args:
        file: the shard, from its start.
        location: its name, for errors.

    Returns:
        Its index, and the largest class label + 1 (0 without labels).

    Raises:
        DataError: a damaged header or a missing end, a name that leaves the archive, anything but regular files and
            folders, a key that is repeated or interleaved with another.
    """
    samples: list[Sample] = []
    labels = 0
    for key, members in walk(file, location):
        located = {extension: Member(m[0], len(m[1]), crc32(m[1])) for extension, m in members.items()}
        samples.append(Sample(key, located))
        if "cls" in members:
            labels = max(labels, _labels_with(members["cls"][1]))
    return ShardIndex.of(samples), labels


def walk(file: tar.Readable, location: str) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """The samples of a shard, read strictly: key, and offset and content of its members by extension."""
    seen: set[str] = set()
    current = ""
    members: dict[str, tuple[int, bytes]] = {}
    for name, offset, content in tar.members(file, location):
        if _META.match(name):
            continue
        folder, _, base = name.rpartition("/")
        if base.startswith("._"):
            raise DataError(
                f"{location}: member {name!r} is one of those that macOS's tar adds; make the archive again with "
                "COPYFILE_DISABLE=1"
            )
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if not stem or not extension:
            raise DataError(f"{location}: member {name!r} has no key or no extension; WebDataset names are KEY.EXT")
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if key in seen:
                raise DataError(
                    f"{location}: the members of sample {key!r} do not follow each other, or it is repeated"
                )
            if members:
                yield current, members
            seen.add(key)
            current, members = key, {}
        if extension in members:
            raise DataError(f"{location}: sample {key!r} has two members {extension!r}")
        members[extension] = (offset, content)
    if members:
        yield current, members


@contextmanager
def open_shard(location: str, version: storage.Stat, stopped: Event | None = None) -> Iterator[BinaryIO]:
    """A shard to be read from its start to its end; DataError if it changes meanwhile."""
    try:
        with storage.naming(location), storage.open_read(location, version, stopped) as file:
            yield file
        changed = version.is_local and storage.stat(location) != version  # S3 is asked for this version alone
    except s3.ChangedError:
        changed = True
    except FileNotFoundError as error:
        raise DataError(f"{location}: vanished") from error
    if changed:
        raise DataError(f"{location}: changed while it was read; run the same command again")
