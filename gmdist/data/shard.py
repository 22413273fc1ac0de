"""Tar shards in the WebDataset convention, their indexes, and the manifest of a data set.

A shard is a plain tar file: members that follow each other and share a key (the name up to the first dot of its last
component) make one sample, the rest of the name says what a member holds. The index of a shard holds offset, size and
crc32 of every member, the manifest lists the shards. Reading is strict: a shard that another reader would cut short or
misread is an error here.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from gmdist import storage
from gmdist.data import tar
from gmdist.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Member:
    """One file of a sample: where its bytes are in the shard."""

    offset: int  # bytes from the start of the shard
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Sample:
    """One sample of a shard."""

    key: str
    members: dict[str, Member]  # by extension: "png", "cls"

    @property
    def crc32(self) -> int:
        """One checksum for the sample: that of its members' checksums, in the order of their extensions."""
        words = np.array([self.members[extension].crc32 for extension in sorted(self.members)], np.uint32)
        return zlib.crc32(words.astype("<u4").tobytes())


class ShardIndex:
    """Where each member of each sample of one shard is."""

    def __init__(
        self,
        keys: list[str],
        extensions: list[str],
        offset: npt.NDArray[np.int64],
        num_bytes: npt.NDArray[np.int64],
        crc32: npt.NDArray[np.int64],
    ) -> None:
        """Arrays are [samples, extensions]; a member that a sample lacks has num_bytes -1."""
        self.keys, self.extensions = keys, extensions
        self.offset, self.num_bytes, self.crc32 = offset, num_bytes, crc32

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        members = {
            extension: Member(int(self.offset[index, e]), int(self.num_bytes[index, e]), int(self.crc32[index, e]))
            for e, extension in enumerate(self.extensions)
            if self.num_bytes[index, e] >= 0
        }
        return Sample(self.keys[index], members)

    @classmethod
    def of(cls, samples: list[Sample]) -> "ShardIndex":
        """The index of a shard with these samples."""
        extensions = sorted({extension for sample in samples for extension in sample.members})
        shape = (len(samples), len(extensions))
        offset, num_bytes, crc32 = np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        for s, sample in enumerate(samples):
            for e, extension in enumerate(extensions):
                if member := sample.members.get(extension):
                    offset[s, e], num_bytes[s, e], crc32[s, e] = member.offset, member.num_bytes, member.crc32
        return cls([sample.key for sample in samples], extensions, offset, num_bytes, crc32)

    def to_bytes(self) -> bytes:
        """The index as a safetensors file."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "offset": self.offset,
            "num_bytes": self.num_bytes,
            "crc32": self.crc32,
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
            return cls(keys, extensions, arrays["offset"], arrays["num_bytes"], arrays["crc32"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{location}: not a shard index ({error}); run `gmdist data index` again") from error


def _json_array(names: list[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest."""

    name: str
    samples: int
    num_bytes: int
    etag: str
    index_crc32: int  # of the index file, and so of every member's checksum
    labels: int  # largest class label + 1; 0 without labels


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in the order of their names."""

    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()  # names of the class labels, where they are known

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_labels(self) -> int:
        """Largest class label + 1; 0 without labels."""
        return max((shard.labels for shard in self.shards), default=0)

    @property
    def hash(self) -> str:
        """Identifies the data by content: names, counts, sizes, checksums. Copying a data set keeps it."""
        content = [[s.name, s.samples, s.num_bytes, s.index_crc32] for s in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def save(self, folder: str) -> None:
        """Write the manifest: the last step of making a data set."""
        content = {"format": FORMAT_VERSION, "samples": self.num_samples, "classes": self.classes}
        content["shards"] = [asdict(shard) for shard in self.shards]
        storage.write(storage.join(folder, MANIFEST_NAME), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: str) -> "Manifest":
        """Read a data set's manifest. DataError says what is missing and which command makes it."""
        location = storage.join(folder, MANIFEST_NAME)
        try:
            content = json.loads(storage.read(location))
            if content["format"] != FORMAT_VERSION:
                raise DataError(f"{location}: format {content['format']}; run `gmdist data index {folder}` again")
            shards = tuple(ShardEntry(**shard) for shard in content["shards"])
            manifest = cls(shards, tuple(content["classes"]))
            empty = manifest.num_samples == 0
        except FileNotFoundError as error:
            names = storage.list_names(folder)
            if any(name.endswith(".tar") for name in names):
                remedy = f"its shards have no manifest; run `gmdist data index {folder}`"
            elif names:
                remedy = "there are no .tar shards in it; make them with `gmdist data pack SRC DEST`"
            else:
                remedy = "no such data set, or it is empty; make one with `gmdist data make` or `gmdist data pack`"
            raise DataError(f"{folder}: {remedy}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{location}: not a manifest ({error}); run `gmdist data index {folder}` again") from error
        if empty:
            raise DataError(f"{folder}: the data set has no samples")
        return manifest


def index_name(shard_name: str) -> str:
    """The name of a shard's index file."""
    return shard_name.removesuffix(".tar") + ".index.safetensors"


def load_index(folder: str, entry: ShardEntry) -> ShardIndex:
    """Read a shard's index and check it against the manifest."""
    location = storage.join(folder, index_name(entry.name))
    try:
        content = storage.read(location)
    except FileNotFoundError as error:
        raise DataError(f"{location}: missing; run `gmdist data index {folder}`") from error
    if zlib.crc32(content) != entry.index_crc32:
        raise DataError(f"{location}: differs from the manifest's checksum; run `gmdist data index {folder}`")
    index = ShardIndex.from_bytes(content, location)
    if len(index) != entry.samples:
        raise DataError(f"{location}: {len(index)} samples, but the manifest says {entry.samples}")
    return index


def parse_label(content: bytes, name: str) -> int:
    """A `.cls` member: a non-negative decimal integer."""
    text = content.strip()
    if not text.isdigit() or len(text) > 9:
        raise DataError(f"{name}: the class label is {text[:20]!r}; it must be a non-negative integer")
    return int(text)


class ShardWriter:
    """Writes one shard as USTAR, and its index. The same samples make the same bytes."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)
        self._samples: list[Sample] = []
        self._labels = 0

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._buffer.tell()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: its key without dots, and its members by extension."""
        assert "." not in key, key
        located = {}
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(content), 0o644
            self._tar.addfile(info, io.BytesIO(content))
            padded = -(-len(content) // tar.BLOCK) * tar.BLOCK
            located[extension] = Member(self._buffer.tell() - padded, len(content), zlib.crc32(content))
            if extension == "cls":
                self._labels = max(self._labels, parse_label(content, info.name) + 1)
        self._samples.append(Sample(key, located))

    def save(self, folder: str, name: str) -> ShardEntry:
        """Write the shard and its index, and return its line of the manifest."""
        self._tar.close()
        location = storage.join(folder, name)
        storage.write(location, self._buffer.getvalue())
        index = ShardIndex.of(self._samples).to_bytes()
        storage.write(storage.join(folder, index_name(name)), index)
        status = storage.stat(location)
        return ShardEntry(name, len(self._samples), status.num_bytes, status.etag, zlib.crc32(index), self._labels)


def scan(file: BinaryIO, location: str) -> tuple[ShardIndex, int]:
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
    seen: set[str] = set()
    labels = 0
    for name, offset, content in tar.members(file, location):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if not stem or not extension:
            raise DataError(f"{location}: member {name!r} has no key or no extension; WebDataset names are KEY.EXT")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1].key != key:
            if key in seen:
                raise DataError(
                    f"{location}: the members of sample {key!r} do not follow each other, or it is repeated"
                )
            seen.add(key)
            samples.append(Sample(key, {}))
        if extension in samples[-1].members:
            raise DataError(f"{location}: sample {key!r} has two members {extension!r}")
        samples[-1].members[extension] = Member(offset, len(content), zlib.crc32(content))
        if extension == "cls":
            labels = max(labels, parse_label(content, f"{location}: {name}") + 1)
    return ShardIndex.of(samples), labels


def index_shard(folder: str, name: str) -> ShardEntry:
    """Read one shard, write its index, and return its line of the manifest."""
    index, labels, status = _scan_at(folder, name)
    content = index.to_bytes()
    storage.write(storage.join(folder, index_name(name)), content)
    return ShardEntry(name, len(index), status.num_bytes, status.etag, zlib.crc32(content), labels)


def check_shard(folder: str, entry: ShardEntry) -> None:
    """Read one shard and compare every member with its index; DataError names the first difference."""
    location = storage.join(folder, entry.name)
    saved = load_index(folder, entry)
    try:
        found, _, _ = _scan_at(folder, entry.name)
    except FileNotFoundError as error:
        raise DataError(f"{location}: missing, but the manifest lists it") from error
    if len(found) != len(saved):
        raise DataError(f"{location}: {len(found)} samples, but its index says {len(saved)}")
    for position in range(len(saved)):
        if found[position] != saved[position]:
            raise DataError(f"{location}: sample {saved.keys[position]!r} differs from its index")


def _scan_at(folder: str, name: str) -> tuple[ShardIndex, int, storage.Stat]:
    location = storage.join(folder, name)
    status = storage.stat(location)
    if storage.is_s3(location):
        index, labels = scan(io.BytesIO(storage.read(location)), location)
    else:
        try:
            with open(location, "rb") as file:
                index, labels = scan(file, location)
        except (IsADirectoryError, PermissionError) as error:
            raise DataError(f"{location}: cannot be read ({error.strerror})") from error
    return index, labels, status


def index_folder(folder: str) -> tuple[Manifest, list[str]]:
    """Index every shard of a folder or prefix and write the manifest.

    Returns:
        The manifest, and one line for each unsound shard; where there is one, no manifest is written.
    """
    names = [name for name in storage.list_names(folder) if name.endswith(".tar")]
    if not names:
        raise DataError(f"{folder}: no .tar shards here")
    entries, problems = [], []
    for name in names:
        try:
            entries.append(index_shard(folder, name))
        except DataError as error:
            problems.append(str(error))
    manifest = Manifest(tuple(entries), _known_classes(folder))
    if not problems:
        if manifest.num_samples == 0:
            raise DataError(f"{folder}: the shards hold no samples")
        manifest.save(folder)
    return manifest, problems


def _known_classes(folder: str) -> tuple[str, ...]:
    """The class names of the manifest that is there already: indexing again keeps them."""
    try:
        content: Any = json.loads(storage.read(storage.join(folder, MANIFEST_NAME)))
        return tuple(content["classes"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ()


def check_folder(folder: str) -> list[str]:
    """Check every shard of the manifest; one line for each that is unsound."""
    problems = []
    for entry in Manifest.load(folder).shards:
        try:
            check_shard(folder, entry)
        except DataError as error:
            problems.append(str(error))
    return problems
