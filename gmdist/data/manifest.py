"""The manifest of a data set: which shards it has, in columns, so that a million of them open in a second."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from gmdist import storage
from gmdist.checksum import crc32
from gmdist.errors import DataError

MANIFEST_NAME = "manifest.json"
PACK_NAME = "pack.json"  # what a data set was packed from, there from the first shard on
ENCODED_NAME = "encoded.json"  # the same of a latent cache
SAMPLED_NAME = "sampled.json"  # the same of generated images
_MAKINGS = (  # what is there while a data set is made, and what makes it
    (PACK_NAME, "packing", "gmdist data pack"),
    (ENCODED_NAME, "encoding", "gmdist data encode"),
    (SAMPLED_NAME, "sampling", "gmdist sample"),
)
FORMAT_VERSION = 2
PACKED_NAMES = re.compile(r"shard-\d{6,}\.(tar|index\.safetensors)")  # what is written here, not by others
_UNSAFE = bytes(range(32)) + b"\\"  # in the name of a shard
_ROWS_A_LINE = 4096
_END = '], "crc32": '  # of all that comes before: begins the last line
_READ_BYTES = 1 << 23


@dataclass(frozen=True)
class ShardEntry:
    """One shard of the manifest."""

    name: str
    etag: str
    samples: int
    num_bytes: int
    index_crc32: int  # of the index file, and so of every member's checksum
    labels: int  # largest class label + 1; 0 without labels


_TEXTS, _NUMBERS = ("name", "etag"), ("samples", "num_bytes", "index_crc32", "labels")


class ShardTable(Sequence[ShardEntry]):
    """Shards by number, held in columns: about 100 bytes each."""

    def __init__(self, columns: dict[str, npt.NDArray[Any]]) -> None:
        """Columns by the names of ShardEntry's fields: texts as UTF-8 (dtype S), numbers as int64; [shards] each."""
        self.columns = columns

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> "ShardTable":
        """A table of some entries."""
        rows = list(entries)
        return cls(_columns({field: [getattr(row, field) for row in rows] for field in (*_TEXTS, *_NUMBERS)}))

    def __len__(self) -> int:
        return len(self.columns["name"])

    @overload
    def __getitem__(self, place: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardTable": ...
    def __getitem__(self, place: int | slice) -> "ShardEntry | ShardTable":
        if isinstance(place, slice):
            return ShardTable({field: column[place] for field, column in self.columns.items()})
        texts = [self.columns[field][place].decode() for field in _TEXTS]
        numbers = [int(self.columns[field][place]) for field in _NUMBERS]
        return ShardEntry(*texts, *numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and all(
            np.array_equal(column, other.columns[field]) for field, column in self.columns.items()
        )

    __hash__ = None  # type: ignore[assignment]


def _columns(lists: dict[str, list[Any]]) -> dict[str, npt.NDArray[Any]]:
    columns: dict[str, npt.NDArray[Any]] = {
        field: np.array([text.encode() for text in lists[field]], "S") for field in _TEXTS
    }
    return columns | {field: np.array(lists[field], np.int64) for field in _NUMBERS}


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in the order of their names."""

    shards: ShardTable
    classes: tuple[str, ...] = ()  # names of the class labels, where they are known

    @functools.cached_property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.shards.columns["samples"].sum())

    @property
    def num_labels(self) -> int:
        """Largest class label + 1; 0 without labels."""
        return int(self.shards.columns["labels"].max(initial=0))

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the data by content: names, counts, sizes, checksums. Copying a data set keeps it."""
        state = hashlib.sha256()
        for field in ("name", "samples", "num_bytes", "index_crc32"):
            column = self.shards.columns[field]
            state.update(f"{field} {column.dtype.str} {len(column)}\n".encode())
            state.update(column.tobytes())
        return state.hexdigest()[:16]

    def save(self, folder: str, name: str = MANIFEST_NAME) -> None:
        """Write the manifest: the last step of making a data set."""
        head = {"format": FORMAT_VERSION, "samples": self.num_samples, "classes": self.classes}
        lines = [json.dumps(head)[:-1] + ', "shards": [']
        for first in range(0, len(self.shards), _ROWS_A_LINE):
            part = self.shards[first : first + _ROWS_A_LINE].columns
            texts = {field: [text.decode() for text in part[field].tolist()] for field in _TEXTS}
            row = json.dumps(texts | {field: part[field].tolist() for field in _NUMBERS})
            lines.append(row + ("," if first + _ROWS_A_LINE < len(self.shards) else ""))
        content = "".join(f"{line}\n" for line in lines).encode()
        end = f"{_END}{crc32(content)}}}\n".encode()
        storage.write(storage.join(folder, name), content + end)

    @classmethod
    def load(cls, folder: str, name: str = MANIFEST_NAME) -> "Manifest":
        """Read a data set's manifest. DataError says what is missing and which command makes it."""
        location = storage.join(folder, name)
        try:
            head, parts = _read(location)
            if head["format"] != FORMAT_VERSION:
                raise DataError(f"{location}: format {head['format']}; delete it and run `gmdist data index {folder}`")
            classes = head["classes"]
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise ValueError("its classes are no list of names")
            manifest = cls(_joined(parts), tuple(classes))
            if manifest.num_samples != head["samples"]:
                raise ValueError(f"{manifest.num_samples} samples instead of {head['samples']}")
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {_remedy(folder)}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{location}: not a manifest ({error}); restore it, or delete it and run `gmdist data index {folder}`"
            ) from error
        if manifest.num_samples == 0:
            raise DataError(f"{folder}: the data set has no samples")
        return manifest


def _joined(parts: list[dict[str, npt.NDArray[Any]]]) -> ShardTable:
    fields = (*_TEXTS, *_NUMBERS)
    parts = parts or [_columns({field: [] for field in fields})]
    columns = {field: np.concatenate([part[field] for part in parts]) for field in fields}
    if len({len(column) for column in columns.values()}) > 1 or (columns["samples"] < 0).any():
        raise ValueError("its columns do not go together")
    names = columns["name"]
    if not (names[1:] > names[:-1]).all() and len(np.unique(names)) < len(names):
        raise ValueError("it names a shard twice")
    # Shards lie in the data set's folder, under names that no other file has. Joined, a million are looked at quickly.
    for first in range(0, len(names), _ROWS_A_LINE):
        part = names[first : first + _ROWS_A_LINE].tolist()
        joined = b"/".join([b"", *part, b""])
        is_flat = joined.count(b"/") == len(part) + 1 and joined.count(b".tar/") == len(part)
        if not is_flat or b"/." in joined or len(joined.translate(None, _UNSAFE)) < len(joined):
            raise ValueError("it names a shard that is no file of its folder")
    return ShardTable(columns)


def _read(location: str) -> tuple[dict[str, Any], list[dict[str, npt.NDArray[Any]]]]:
    """The head of a manifest and its shards' columns, a few thousand shards at a time."""
    for attempt in range(storage.READ_ATTEMPTS):
        try:
            return _read_lines(_lines(location))
        except _DamagedError:
            if attempt + 1 == storage.READ_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


class _DamagedError(ValueError):
    pass


def _read_lines(lines: Iterator[bytes]) -> tuple[dict[str, Any], list[dict[str, npt.NDArray[Any]]]]:
    head = next(lines, b"")
    if not head.endswith(b'"shards": ['):  # written by another hand: any valid JSON of the same content will do
        whole = json.loads(b"\n".join([head, *lines]))
        return whole, whole["shards"] if whole["format"] != FORMAT_VERSION else [_columns(p) for p in whole["shards"]]
    checksum = crc32(head + b"\n")
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for line in lines:
        if line.startswith(_END.encode()):
            if line != f"{_END}{checksum}}}".encode():
                break
            return json.loads(head + b"]}"), parts
        checksum = crc32(line + b"\n", checksum)
        try:
            parts.append(_columns(json.loads(line.rstrip(b","))))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:  # a bit may flip anywhere
            raise _DamagedError(str(error)) from error
    raise _DamagedError("its crc32 differs, or its end is missing")


def _lines(location: str) -> Iterator[bytes]:
    """The lines of a file, which is read in pieces."""
    version = storage.stat(location)
    rest = b""
    for offset in range(0, version.num_bytes, _READ_BYTES):
        piece = storage.read_range(location, offset, min(_READ_BYTES, version.num_bytes - offset), version)
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def unfinished(names: Iterable[str]) -> str | None:
    """Why there is no manifest among the files of a folder, where its making was broken off, and what to do."""
    if MANIFEST_NAME in names:
        return None
    for name, making, command in _MAKINGS:
        if name in names:
            return f"its {making} was not finished; run the same `{command}` again"
    return None


def _remedy(folder: str) -> str:
    names = storage.list_names(folder)
    if problem := unfinished(names):
        return problem
    if any(name.endswith(".tar") for name in names):
        return f"its shards have no manifest; run `gmdist data index {folder}`"
    splits = [storage.join(folder, name) for name in ("train", "test") if name in names]
    if splits and all(storage.exists(storage.join(split, MANIFEST_NAME)) for split in splits):
        return f"its data sets are {' and '.join(splits)}"
    if names:
        return "there are no .tar shards in it; make them with `gmdist data pack SRC DEST`"
    return "no such data set, or it is empty; make one with `gmdist data make` or `gmdist data pack`"
