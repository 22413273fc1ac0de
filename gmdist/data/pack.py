"""Writing shards: from folders of images, from other shards, and from any stream of samples."""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from itertools import islice

from gmdist import storage
from gmdist.data.decode import UndecodableError
from gmdist.data.encode import Encoding, encode
from gmdist.data.ledger import Ledger, timeless
from gmdist.data.manifest import MANIFEST_NAME, PACK_NAME, PACKED_NAMES, Manifest, ShardEntry, ShardTable
from gmdist.data.parallel import spread
from gmdist.data.shard import ShardWriter
from gmdist.data.sources import FileTask, ImageFolder, Probe, Raw, ShardFolder, ShardTask, open_source, tar_bytes
from gmdist.errors import DataError, StorageError

_FORMAT_VERSION = 2  # of the plan too: a pack that another plan began is not gone on with
_WINDOW = 32  # images that a thread has in memory at once
_PROBED = 32  # images that are encoded to foretell the size of the others


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    manifest: Manifest
    unreadable: list[str]  # "path: reason"
    was_there: bool = False  # and finished; nothing was done


@dataclass
class _Record:
    """What a data set is packed from: its file pack.json."""

    fingerprint: str  # of the source and the settings
    probe: Probe
    unreadable: dict[str, list[str]] = field(default_factory=dict)  # by shard

    def save(self, folder: str) -> None:
        """Write it."""
        content = {"format": _FORMAT_VERSION, "fingerprint": self.fingerprint, "probe": astuple(self.probe)}
        storage.write_json(storage.join(folder, PACK_NAME), content | {"unreadable": self.unreadable})

    @classmethod
    def load(cls, folder: str) -> "_Record | None":
        """None: there is none. DataError: it is damaged or of another version; a plan misread loses samples."""
        location = storage.join(folder, PACK_NAME)
        try:
            content = storage.read_json(location)
            if content["format"] != _FORMAT_VERSION:
                raise ValueError(f"of format {content['format']}")
            return cls(content["fingerprint"], Probe(*content["probe"]), content["unreadable"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{location}: damaged or of another version ({error}); delete {folder} and pack anew, or choose "
                "another folder"
            ) from error

    def lines(self) -> list[str]:
        """What could not be read, in the order of the shards."""
        return [line for name in sorted(self.unreadable) for line in self.unreadable[name]]


def pack(
    source: str,
    destination: str,
    encoding: Encoding = Encoding(),  # noqa: B008 - it is frozen
    *,
    shard_mib: float = 64.0,
    processes: int = 1,
    max_unreadable: float = 0.01,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_unreadable: Callable[[str], None] = lambda line: None,
) -> Packed:
    """Pack images into shards; what an interrupted pack has finished is kept.

    A local folder with subfolders is one class a subfolder, labelled in the order of their names; a flat folder has no
    labels, and neither have the numbered folders of captioned images that img2dataset writes. Texts beside an image
    (`.txt`, `.json` of the same stem) go with it. Samples are shuffled by a hash of their path. A folder or prefix of
    shards is packed in its order, with its keys and members.

    Which samples a shard holds is planned from the sizes in the source, and from those that its first images take once
    encoded, before anything is written. So the same source makes the same bytes, whatever the number of processes and
    wherever they were interrupted.

    Args:
        source: a local folder, or for shards an s3:// prefix too.
        destination: where the shards go, local or s3://; it must not hold another data set.
        encoding: of the images.
        shard_mib: size of a shard, roughly; each process holds one in memory.
        processes: that encode and write.
        max_unreadable: fraction of the samples that may be unreadable, which are left out; above 0, one always may.
        on_progress: called with (bytes of the source done, bytes in all).
        on_unreadable: called with "path: reason" for each sample that is left out.

    Raises:
        DataError: no images, too many that cannot be read, or a destination that is in use.
    """
    listing = open_source(source)
    is_inside = f"{storage.absolute(destination)}/".startswith(f"{storage.absolute(source)}/")
    if is_inside and isinstance(listing, ImageFolder):  # the next time, it would be one of its classes
        raise DataError(f"{destination}: lies in the source, {source}; choose a folder outside of it")
    there = storage.list_stats(destination)
    fingerprint = _fingerprint(listing, encoding, shard_mib)
    record = _Record.load(destination)
    if record is not None and record.fingerprint == fingerprint:
        if MANIFEST_NAME in there:
            return Packed(Manifest.load(destination), record.lines(), was_there=True)
        with suppress(StorageError):  # unfinished uploads are seen by the bucket's owner alone, perhaps
            storage.delete_leftovers(destination, PACKED_NAMES)
    else:
        _check_free(destination, there)
        record = _Record(fingerprint, _probe(listing, encoding, processes))
        record.save(destination)
    ledger = Ledger(destination, partial(record.save, destination))
    ledger.forget_changed(there)
    record.unreadable = {name: lines for name, lines in record.unreadable.items() if name in ledger.entries}
    for line in record.lines():
        on_unreadable(line)
    tasks = listing.tasks(shard_mib * 2**20, record.probe, encoding.image_size is not None)
    jobs = [job for job in _jobs(tasks, ledger.entries) if job.todo]
    total = sum(task.source_bytes for task in tasks)
    done = total - sum(job.share * len(job.todo) for job in jobs)
    count = min(processes, len(jobs))
    run = partial(_run, destination, encoding, processes // count if count else 1)
    with ledger, closing(spread(run, jobs, processes=count)) as results:
        for entry, lines, num_bytes in results:
            if lines:
                record.unreadable[entry.name] = lines
            for line in lines:
                on_unreadable(line)
            if ledger.add(entry):
                ledger.save()
            done += num_bytes
            on_progress(round(done), total)
            if listing.num_samples is not None:
                _check_budget(source, record, listing.num_samples, max_unreadable)
    ledger.save()
    unreadable = record.lines()
    samples = sum(entry.samples for entry in ledger.entries.values())
    if samples == 0:
        raise DataError("; ".join([f"{destination}: none of the images can be read", *unreadable[:1]]))
    _check_budget(source, record, samples + len(unreadable), max_unreadable)
    return Packed(ledger.finish(listing.classes, made_here=True), unreadable)


def _fingerprint(listing: ImageFolder | ShardFolder, encoding: Encoding, shard_mib: float) -> str:
    """Of all that decides what is written."""
    state = hashlib.blake2b(repr((astuple(encoding), shard_mib, listing.classes)).encode(), digest_size=16)
    for name, version in listing.versions():
        state.update(repr((name, version.num_bytes, version.etag)).encode())
    return state.hexdigest()


def _check_free(destination: str, there: Iterable[str]) -> None:
    """DataError if the destination holds shards of something else."""
    if not any(name == MANIFEST_NAME or name.endswith(".tar") for name in there):
        return
    if PACK_NAME in there and MANIFEST_NAME not in there:
        raise DataError(
            f"{destination}: holds a part of another pack: the source or the settings are not those that it was begun "
            "with; choose another folder or delete it"
        )
    raise DataError(f"{destination}: holds a data set already; choose another folder or delete it")


def _check_budget(source: str, record: _Record, num_samples: int, max_unreadable: float) -> None:
    count = sum(map(len, record.unreadable.values()))
    allowed = max(1, int(max_unreadable * num_samples)) if max_unreadable > 0 else 0
    if count > allowed:
        raise DataError(
            f"{source}: {count} of {num_samples} images cannot be read, and --max-unreadable {max_unreadable:g} allows "
            f"{allowed}; raise it to go on without them; the first: {record.lines()[0]}"
        )


def _probe(listing: ImageFolder | ShardFolder, encoding: Encoding, threads: int) -> Probe:
    """Encode the first images to foretell the size of the others."""
    if encoding.keeps_files:
        return Probe(0, 0, 0)
    first = list(listing.first(_PROBED))
    encoded = _encoded(iter([raw for _, raw in first]), encoding, threads)
    sizes = [
        (size, tar_bytes(members))
        for (size, _), (_, members) in zip(first, encoded, strict=True)
        if not isinstance(members, str)
    ]
    return Probe(len(sizes), sum(size for size, _ in sizes), sum(written for _, written in sizes))


@dataclass(frozen=True)
class _Job:
    """A task and its shards."""

    task: FileTask | ShardTask
    names: tuple[str, ...]
    todo: frozenset[str]  # of the names: those that are not there yet

    @property
    def share(self) -> float:
        """Bytes of the source that each shard takes."""
        return self.task.source_bytes / len(self.names)


def _jobs(tasks: Iterable[FileTask | ShardTask], done: Container[str]) -> Iterator[_Job]:
    first = 0
    for task in tasks:
        names = tuple(f"shard-{first + number:06d}.tar" for number in range(task.num_shards))
        first += task.num_shards
        yield _Job(task, names, frozenset(name for name in names if name not in done))


def _run(
    destination: str, encoding: Encoding, threads: int, job: _Job
) -> Iterator[tuple[ShardEntry, list[str], float]]:
    """Write the shards of a job: each with what could not be read, and its share of the source's bytes."""
    raws = (raw for raw in job.task.samples() if job.names[raw.shard] in job.todo)
    encoded = _encoded(raws, encoding, threads)
    share = job.share
    raw, result = next(encoded, _END)
    for number, name in enumerate(job.names):
        if name not in job.todo:
            continue
        writer, unreadable = ShardWriter(), []
        while raw is not None and raw.shard == number:
            if isinstance(result, str):
                unreadable.append(f"{raw.name}: {result}")
            else:
                writer.add(raw.key, result)
            raw, result = next(encoded, _END)
        yield writer.save(destination, name), unreadable, share


_END = (None, "")


def _encoded(
    raws: Iterator[Raw], encoding: Encoding, threads: int
) -> Iterator[tuple[Raw | None, dict[str, bytes] | str]]:
    """Samples in order, each with its members as they are stored or why there are none."""
    if threads <= 1:
        yield from ((raw, _load(encoding, raw)) for raw in raws)
        return
    with ThreadPoolExecutor(threads) as pool:
        # A window at a time: the pool would hold all images in memory if the writer were slower.
        while window := list(islice(raws, _WINDOW * threads)):
            yield from zip(window, pool.map(partial(_load, encoding), window), strict=True)


def _load(encoding: Encoding, raw: Raw) -> dict[str, bytes] | str:
    try:
        return encode(raw.read(), encoding)
    except UndecodableError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def write_shards(
    samples: Iterable[tuple[str, dict[str, bytes]]],
    destination: str,
    classes: tuple[str, ...] = (),
    num_shards: int = 1,
) -> Manifest:
    """Write samples to shards, and their manifest last.

    Args:
        samples: keys without dots, and members by extension.
        destination: a folder or s3:// prefix.
        classes: names of the labels.
        num_shards: that the samples are dealt out to.
    """
    writers = [ShardWriter() for _ in range(num_shards)]
    for number, (key, members) in enumerate(samples):
        writers[number % num_shards].add(key, members)
    entries = [timeless(writer.save(destination, f"shard-{i:06d}.tar")) for i, writer in enumerate(writers)]
    manifest = Manifest(ShardTable.of(entries), classes)
    if manifest.num_samples == 0:
        raise DataError(f"{destination}: none of the images can be read")
    manifest.save(destination)
    return manifest
