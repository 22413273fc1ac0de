"""Checked reads of samples: the bytes of a sample's members, or an error, never wrong bytes."""

import threading
import zlib
from collections import OrderedDict

from gmdist import storage
from gmdist.data.shard import Manifest, Sample, ShardIndex, load_index
from gmdist.errors import DataError

_CACHED_INDEXES = 512  # about 300 kB each at 10,000 samples of 2 members


class Shards:
    """The samples of a data set by (shard, index), for any number of threads."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    def location(self, shard: int, index: int) -> str:
        """A sample's name for messages: its shard's location and its key."""
        return f"{storage.join(self.folder, self.manifest.shards[shard].name)}: {self._index(shard).keys[index]}"

    def read(self, shard: int, index: int) -> tuple[Sample, dict[str, bytes]]:
        """A sample and its members' bytes by extension.

        Raises:
            DataError: the shard is gone, was cut, or holds other bytes than when it was indexed.
            StorageError: the storage did not answer.
        """
        sample = self._index(shard)[index]
        location = storage.join(self.folder, self.manifest.shards[shard].name)
        start = min(member.offset for member in sample.members.values())
        stop = max(member.offset + member.num_bytes for member in sample.members.values())
        for _ in range(2):  # bytes can be damaged on their way: ask once more before blaming the shard
            try:
                span = storage.read_range(location, start, stop - start)
            except FileNotFoundError as error:
                raise DataError(f"{location}: missing, but the manifest lists it") from error
            members = {
                extension: span[member.offset - start : member.offset - start + member.num_bytes]
                for extension, member in sample.members.items()
            }
            if all(zlib.crc32(members[extension]) == member.crc32 for extension, member in sample.members.items()):
                return sample, members
        raise DataError(
            f"{location}: sample {sample.key!r} is not what was indexed (crc32 differs); "
            f"`gmdist data check {self.folder}` lists what else is unsound"
        )

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = load_index(self.folder, self.manifest.shards[shard])
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) > _CACHED_INDEXES:
                self._indexes.popitem(last=False)
        return index
