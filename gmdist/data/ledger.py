"""Which shards of a data set are done while it is written or indexed: a manifest of those, until there is the whole."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from gmdist import storage
from gmdist.data.manifest import Manifest, ShardEntry, ShardTable
from gmdist.data.shard import index_name
from gmdist.errors import DataError, StorageError

LEDGER_NAME = "manifest.partial.json"
_SAVING_MOST = 0.05  # of the time: with a million shards, saving takes seconds


def is_unchanged(folder: str, entry: ShardEntry, listed: storage.Stat | None) -> bool:
    """Whether a shard is the version that its entry is of.

    Args:
        folder: of the shard.
        entry: its line of the manifest.
        listed: its version in the folder's list; None: it is not there.
    """
    version = storage.Stat(entry.num_bytes, entry.etag)
    if listed is None or listed.num_bytes != version.num_bytes:
        return False
    # Some gateways list other ETags than those that they answer with.
    return listed == version or storage.stat(storage.join(folder, entry.name)) == version


def timeless(entry: ShardEntry) -> ShardEntry:
    """A shard's line of the manifest without a file's time."""
    return replace(entry, etag="") if storage.Stat(0, entry.etag).is_local else entry


class Ledger:
    """The shards that are done, by name. Saved now and then; a shard that was done since is done again, no harm.

    A context manager: what is done is saved too where an error or a Ctrl-C ends the work.
    """

    def __init__(self, folder: str, save_before: Callable[[], None] = lambda: None) -> None:
        """Those that an interrupted command has left there.

        Args:
            folder: of the data set.
            save_before: saves what else is known of the shards, each time before the ledger.
        """
        self.folder, self._save_before = folder, save_before
        self.entries: dict[str, ShardEntry] = {}
        with suppress(DataError):  # there is none, or it was damaged
            self.entries = {entry.name: entry for entry in Manifest.load(folder, LEDGER_NAME).shards}
        self._next_save_s = time.monotonic()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(StorageError):  # perhaps the storage is what failed
                self.save()

    def forget_changed(self, there: Mapping[str, storage.Stat]) -> None:
        """Keep only shards that are there as they were noted, with an index: `there` is a list of the folder."""
        self.entries = {
            name: entry
            for name, entry in self.entries.items()
            if index_name(name) in there and is_unchanged(self.folder, entry, there.get(name))
        }

    def add(self, entry: ShardEntry) -> bool:
        """Note a shard that is done; whether it is time to save."""
        self.entries[entry.name] = entry
        return time.monotonic() >= self._next_save_s

    def save(self) -> None:
        """Write what is done."""
        began_s = time.monotonic()
        self._save_before()
        if self.entries:
            self.manifest(()).save(self.folder, LEDGER_NAME)
        now_s = time.monotonic()
        self._next_save_s = now_s + (now_s - began_s) / _SAVING_MOST

    def finish(self, classes: tuple[str, ...], *, made_here: bool) -> Manifest:
        """Write the manifest and delete the ledger; DataError, and no manifest, if there is no sample.

        Args:
            classes: names of the labels.
            made_here: whether the shards are of this command's making: the same source makes the same bytes.
        """
        if made_here:
            self.entries = {name: timeless(entry) for name, entry in self.entries.items()}
        manifest = self.manifest(classes)
        if manifest.num_samples == 0:
            raise DataError(f"{self.folder}: the shards hold no samples")
        manifest.save(self.folder)
        storage.delete(storage.join(self.folder, LEDGER_NAME))
        return manifest

    def manifest(self, classes: tuple[str, ...]) -> Manifest:
        """The manifest of the shards that are done."""
        return Manifest(ShardTable.of(self.entries[name] for name in sorted(self.entries)), classes)
