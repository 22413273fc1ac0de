"""Checked reads of samples: the bytes of a sample's members, or an error, never wrong bytes."""

import functools
import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

from gmdist import s3, storage
from gmdist.checksum import crc32
from gmdist.data.cache import PART_BYTES, Cache, PartName
from gmdist.data.decode import Buffer
from gmdist.data.manifest import MANIFEST_NAME, Manifest
from gmdist.data.shard import ShardIndex, load_index
from gmdist.errors import DataError, StorageError

_OPEN_FILES = 320  # local shards, of all data sets of a process, which may have 1024
_OPENINGS = itertools.count()


class _OpenFiles:
    """Local shards of every data set that is open: those that were asked for last. Any number of threads may ask."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.files: OrderedDict[tuple[int, str], FileIO] = OrderedDict()
        self._lock = threading.RLock()  # the garbage collector may call `forget` from within

    def get(self, opening: int, location: str) -> FileIO:
        """A shard, as one opening of its data set found it; closed when nobody has it any more."""
        with self._lock:
            file = self.files.pop((opening, location), None)
        if file is None:
            with storage.naming(location):
                file = FileIO(location)
        with self._lock:
            self.files[opening, location] = file
            if len(self.files) > self._most:
                self.files.popitem(last=False)
        return file

    def forget(self, opening: int) -> None:
        """A data set is gone."""
        with self._lock:
            for key in [key for key in self.files if key[0] == opening]:
                del self.files[key]


_FILES = _OpenFiles(_OPEN_FILES)


class Shards:
    """The samples of a data set by (shard, index), for any number of threads."""

    def __init__(self, folder: str, manifest: Manifest, num_indexes: int = 1) -> None:
        """Open a data set; its shards' indexes are read when they are needed.

        Args:
            folder: local or s3://.
            manifest: its shards.
            num_indexes: how many of them are kept; each takes 300 kB at 10,000 samples of 2 members.
        """
        self.folder, self.manifest = folder, manifest
        self.cache: Cache | None = None  # where parts of shards from object storage are kept
        self.position = 0  # about the number of the last sample that was used: where the cache's future begins
        self._is_s3 = storage.is_s3(folder)
        self.index = functools.lru_cache(num_indexes)(self._load)
        self._opening = next(_OPENINGS)
        weakref.finalize(self, _FILES.forget, self._opening)
        self._versions: dict[int, storage.Stat] = {}

    def location(self, shard: int) -> str:
        """A shard's location."""
        return storage.join(self.folder, self.manifest.shards[shard].name)

    def name(self, shard: int, index: int) -> str:
        """A sample's name for messages: its shard's location and its key."""
        return f"{self.location(shard)}: {self.index(shard).keys[index]}"

    def _load(self, shard: int) -> ShardIndex:
        return load_index(self.folder, self.manifest.shards[shard])

    @contextmanager
    def _explaining(self, shard: int) -> Iterator[None]:
        """Turn a shard that is gone or replaced into a DataError."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(
                f"{self.location(shard)}: missing, but {storage.join(self.folder, MANIFEST_NAME)} lists it "
                f"(shard {shard}); put it back, or run `gmdist data index {self.folder}`"
            ) from error
        except s3.ChangedError as error:
            raise DataError(
                f"{self.location(shard)}: the data set changed under the run: this is not the object that was indexed; "
                f"put the old one back, or run `gmdist data index {self.folder}` and train anew"
            ) from error

    def fetch(self, shard: int, start: int, stop: int, stopped: threading.Event | None = None) -> bytes | bytearray:
        """The bytes [start, stop) of a shard as it was when it was indexed.

        Raises:
            DataError: the shard is gone, or is another object.
            StorageError: it was cut, the storage does not answer, or `stopped` was set.
        """
        if self._is_s3:
            location = self.location(shard)
            with self._explaining(shard):
                version = self._version(shard)
                try:
                    found = storage.read_range(location, start, stop - start, version, stopped)
                except s3.ChangedError:
                    if shard in self._versions:
                        raise
                    # Copied from another bucket, the same bytes may be another version; their checksums are compared.
                    version = self._found(shard)
                    found = storage.read_range(location, start, stop - start, version, stopped)
                self._versions[shard] = version
                return found
        with self._explaining(shard):
            file = _FILES.get(self._opening, self.location(shard))  # which another thread may let go meanwhile
        try:
            content = os.pread(file.fileno(), stop - start, start)
        except OSError:
            with storage.naming(self.location(shard)):
                raise
        if len(content) != stop - start:
            raise StorageError(
                f"{self.location(shard)}: asked for {stop - start} bytes at {start}, got {len(content)}: it was cut or "
                f"replaced after it was indexed; put it back, or run `gmdist data index {self.folder}` and train anew"
            )
        return content

    def _version(self, shard: int) -> storage.Stat:
        """Of a shard in a bucket: as it was indexed, or, where it is a copy, as it was when it was first read."""
        entry = self.manifest.shards[shard]
        version = storage.Stat(entry.num_bytes, entry.etag)
        if shard not in self._versions and version.is_local:
            self._versions[shard] = self._found(shard)
        return self._versions.get(shard, version)

    def _found(self, shard: int) -> storage.Stat:
        """The version that is there; DataError if it is another shard."""
        entry, found = self.manifest.shards[shard], storage.stat(self.location(shard))
        if found.num_bytes != entry.num_bytes:
            raise DataError(
                f"{self.location(shard)}: {found.num_bytes} bytes, but its manifest says {entry.num_bytes}; copy the "
                f"data set again, or run `gmdist data index {self.folder}`"
            )
        return found

    def fetch_cached(
        self, shard: int, start: int, stop: int, stopped: threading.Event, *, keep: bool
    ) -> bytes | bytearray:
        """`fetch`, from the cache if it is there; with `keep`, the parts that hold it are fetched whole and kept."""
        if self.cache is None:
            return self.fetch(shard, start, stop, stopped)
        num_bytes = self.manifest.shards[shard].num_bytes
        content = bytearray()
        for place in range(start // PART_BYTES, -(-stop // PART_BYTES)):
            base = place * PART_BYTES
            low, high = max(start, base) - base, min(stop, base + PART_BYTES) - base
            name = PartName(self.manifest.hash, shard, place)
            piece: Buffer | None = self.cache.find(name, low, high)
            if piece is None and keep:
                end = min(base + PART_BYTES, num_bytes)
                fetch = functools.partial(self.fetch, shard, base, end, stopped)
                piece = memoryview(self.cache.keep(name, end - base, fetch))[low:high]
            content += self.fetch(shard, base + low, base + high, stopped) if piece is None else piece
        return content

    def num_bytes(self, shard: int, index: int) -> int:
        """Bytes of a sample's span."""
        start, stop = self.index(shard).spans[index].tolist()
        return stop - start

    def hash(self, shard: int, index: int) -> int:
        """The hash of a sample's bytes."""
        return int(self.index(shard).hashes[index])

    def read(self, shard: int, index: int, content: Buffer | None = None) -> dict[str, memoryview]:
        """A sample's members' bytes by extension.

        Args:
            shard, index: the sample.
            content: the bytes of the sample's span, where they were fetched before.

        Raises:
            DataError: the shard is gone, or holds other bytes than when it was indexed.
            StorageError: it was cut, or the storage did not answer.
        """
        shard_index = self.index(shard)
        start, stop = shard_index.spans[index].tolist()
        rows = shard_index.rows(index)
        for _ in range(storage.READ_ATTEMPTS):
            span = memoryview(self.fetch(shard, start, stop) if content is None else content)
            found = {}
            for extension, (offset, num_bytes, checksum) in zip(shard_index.extensions, rows, strict=True):
                if num_bytes < 0:
                    continue
                found[extension] = span[offset - start : offset - start + num_bytes]
                if crc32(found[extension]) != checksum:
                    break
            else:
                return found
            if content is not None and self.cache is not None:
                for place in range(start // PART_BYTES, -(-stop // PART_BYTES)):
                    self.cache.drop(PartName(self.manifest.hash, shard, place))
            content = None
        raise DataError(
            f"{self.location(shard)}: sample {shard_index.keys[index]!r} is not what was indexed (crc32 differs); "
            f"`gmdist data check {self.folder}` lists what else is unsound"
        )
