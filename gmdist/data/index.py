"""Indexing the shards of a data set, and checking them against their indexes: all in parallel, each read once."""

import math
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from functools import partial
from threading import Event
from typing import TypeVar

from gmdist import storage
from gmdist.checksum import crc32
from gmdist.data.ledger import Ledger, is_unchanged
from gmdist.data.manifest import MANIFEST_NAME, PACK_NAME, Manifest, ShardEntry, unfinished
from gmdist.data.parallel import num_cores, spread
from gmdist.data.shard import index_name, load_index, scan, shards_among
from gmdist.data.sound import read_sound
from gmdist.errors import DataError, StorageError

_S3_THREADS = 16
_PROCESSES_FROM_BYTES = 256 << 20

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def index_folder(
    folder: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Manifest, list[str]]:
    """Index every shard of a folder or prefix and write the manifest.

    A shard that was indexed before, by this command or an interrupted one, and is still of the same size and ETag (or
    time of change) is not read again.

    Args:
        folder: of the shards.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        The manifest, and one line for each unsound shard; where there is one, no manifest is written.
    """
    stats = storage.list_stats(folder)
    shards = shards_among(folder, stats)
    classes = known_classes(folder)
    if problem := unfinished(stats):
        otherwise = f", or delete its {PACK_NAME} to index what there is" if PACK_NAME in stats else ""
        raise DataError(f"{folder}: {problem}{otherwise}")
    storage.delete_leftovers(folder)
    ledger = Ledger(folder)
    with suppress(DataError):  # there is none, or it is why the folder is indexed again
        ledger.entries = {entry.name: entry for entry in Manifest.load(folder).shards} | ledger.entries
    ledger.entries = {name: entry for name, entry in ledger.entries.items() if name in shards}
    tasks = [(name, ledger.entries.get(name)) for name in shards]
    problems = {}
    done, total = 0, sum(version.num_bytes for version in shards.values())
    with ledger, closing(_spread(partial(_index, folder), folder, tasks, total)) as results:
        for name, found in results:
            if isinstance(found, str):
                problems[name] = found
                ledger.entries.pop(name, None)
            elif ledger.add(found):
                ledger.save()
            done += shards[name].num_bytes
            on_progress(done, total)
    if problems:
        ledger.save()
        return ledger.manifest(()), [problems[name] for name in sorted(problems)]
    return ledger.finish(classes, made_here=False), []


def check_folder(
    folder: str, fraction: float = 1.0, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Compare the list of a data set's shards with its manifest, and the shards' bytes with their indexes.

    Args:
        folder: of the data set.
        fraction: of the shards that are read; the same ones each time.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        One line for each shard that is unsound, and one if the manifest is older than its shards.
    """
    shards = Manifest.load(folder).shards
    stats = storage.list_stats(folder)
    problems, changed = {}, set()
    chosen = set(random.Random(0).sample(range(len(shards)), math.ceil(fraction * len(shards))))  # noqa: S311
    entries: list[ShardEntry] = []
    for number, entry in enumerate(shards):
        location = storage.join(folder, entry.name)
        if entry.name not in stats:
            problems[entry.name] = (
                f"{location}: missing, but the manifest lists it; put it back, or run `gmdist data index {folder}`"
            )
        elif _is_another(folder, entry, stats[entry.name]):
            changed.add(entry.name)
            found = stats[entry.name].num_bytes
            how = "its ETag differs" if found == entry.num_bytes else f"{found} bytes instead of {entry.num_bytes}"
            problems[entry.name] = f"{location}: not the shard that was indexed ({how})"
        elif number in chosen:
            entries.append(entry)
    known = set(shards.columns["name"].tolist())
    for name in stats:
        if name.lower().endswith(".tar") and not name.startswith(".") and name.encode() not in known:
            changed.add(name)
            problems[name] = f"{storage.join(folder, name)}: the manifest does not list it"
    done, total = 0, sum(entry.num_bytes for entry in entries)
    for entry, problem in _spread(partial(_check, folder), folder, entries, total):
        if problem:
            problems[entry.name] = problem
        done += entry.num_bytes
        on_progress(done, total)
    lines = [problems[name] for name in sorted(problems)]
    if changed:
        lines.append(
            f"{folder}: the manifest is older than its shards: run `gmdist data index {folder}`, or restore them"
        )
    return lines


def _is_another(folder: str, entry: ShardEntry, listed: storage.Stat) -> bool:
    """Whether a shard is not the one that was indexed. A copy has another time of change, and is none the worse."""
    if listed.is_local or storage.Stat(0, entry.etag).is_local:
        return listed.num_bytes != entry.num_bytes
    return not is_unchanged(folder, entry, listed)


def _spread(call: Callable[..., _Result], folder: str, tasks: Sequence[_Task], num_bytes: int) -> Generator[_Result]:
    """The results of reading shards; on S3 by threads, since reading waits and the checksums leave the GIL.

    What is called there takes `stopped` too: set when the command is interrupted.
    """
    if storage.is_s3(folder):
        stopped = Event()
        call = partial(call, stopped=stopped)
        return spread(partial(_once, call), tasks, threads=min(_S3_THREADS, len(tasks)), stopped=stopped)
    # Fewer bytes are read before processes have started.
    processes = min(num_cores(), len(tasks)) if num_bytes >= _PROCESSES_FROM_BYTES else 1
    return spread(partial(_once, call), tasks, processes=processes)


def _once(call: Callable[[_Task], _Result], task: _Task) -> list[_Result]:
    return [call(task)]


def _index(
    folder: str, task: tuple[str, ShardEntry | None], stopped: Event | None = None
) -> tuple[str, ShardEntry | str]:
    """Index one shard, unless that was done: its name, and its line of the manifest or why there is none."""
    name, known = task
    location = storage.join(folder, name)
    try:
        version = storage.stat(location)
        if known is not None and storage.Stat(known.num_bytes, known.etag) == version and _has_index(folder, known):
            return name, known
        index, labels = read_sound(location, version, scan, stopped)
    except (DataError, FileNotFoundError, StorageError) as error:
        return name, _problem(location, error)
    content = index.to_bytes()
    storage.write(storage.join(folder, index_name(name)), content)
    return name, ShardEntry(name, version.etag, len(index), version.num_bytes, crc32(content), labels)


def _has_index(folder: str, entry: ShardEntry) -> bool:
    try:
        load_index(folder, entry)
    except DataError:
        return False
    return True


def _check(folder: str, entry: ShardEntry, stopped: Event | None = None) -> tuple[ShardEntry, str | None]:
    """Compare one shard with its index: its entry, and the first difference."""
    location = storage.join(folder, entry.name)
    try:
        saved = load_index(folder, entry)
        found, _ = read_sound(location, storage.stat(location), scan, stopped)
    except (DataError, FileNotFoundError, StorageError) as error:
        return entry, _problem(location, error)
    if len(found) != len(saved):
        return entry, f"{location}: {len(found)} samples, but its index says {len(saved)}"
    for position in range(len(saved)):
        if found[position] != saved[position]:
            return entry, (
                f"{location}: sample {saved.keys[position]!r} differs from its index; restore the shard, or delete "
                f"{index_name(entry.name)} beside it and run `gmdist data index {folder}`"
            )
    return entry, None


def _problem(location: str, error: Exception) -> str:
    """Why a shard is unsound. What the network does is no fault of the shard and ends the command."""
    if isinstance(error, StorageError) and storage.is_s3(location):
        raise error
    return str(error) if not isinstance(error, FileNotFoundError) else f"{location}: vanished"


def known_classes(folder: str) -> tuple[str, ...]:
    """The class names of the manifest that is there already: indexing again keeps them.

    Raises:
        DataError: there is a manifest, and it cannot be read: to go on would lose the names.
    """
    if not storage.exists(storage.join(folder, MANIFEST_NAME)):
        return ()
    return Manifest.load(folder).classes
