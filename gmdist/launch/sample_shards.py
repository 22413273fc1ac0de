"""Generated images as a data set: shards that the workers of a cluster draw, and that are gone on with."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Any

from gmdist import images, runs, storage
from gmdist.checksum import crc32
from gmdist.config import Config
from gmdist.data.ledger import LEDGER_NAME, Ledger
from gmdist.data.manifest import MANIFEST_NAME, PACKED_NAMES, SAMPLED_NAME, Manifest, ShardEntry
from gmdist.data.shard import ShardWriter
from gmdist.errors import DataError, StorageError
from gmdist.launch.lease import LEASE_NAME, Lease, held
from gmdist.launch.sample import Drawer, SampleRequest
from gmdist.launch.shard_workers import device_of, make_shards, not_shared

_FORMAT = 1
_SHARD_BYTES = 64 << 20  # of pixels in a shard at most
_SHARD_IMAGES = 1000  # in a shard at most


@dataclass(frozen=True)
class Task:
    """A shard that is to be drawn: the images of some numbers."""

    name: str
    first: int
    stop: int


class ShardDrawer:
    """Draws shards; several threads may, and take turns. A shard's batches depend on the shard alone."""

    def __init__(self, drawer: Drawer, destination: str) -> None:
        self._drawer, self._destination = drawer, destination
        self._turn = threading.Lock()
        self.stopped = threading.Event()  # ends the work early, with a StorageError

    def shard(self, task: Task) -> ShardEntry:
        """Draw one shard: of each image its PNG, and its class or prompt where it has one."""
        writer = ShardWriter()
        for numbers in self._drawer.parts(task.first, task.stop):
            if self.stopped.is_set():
                raise StorageError(f"{storage.join(self._destination, task.name)}: stopped")
            condition = self._drawer.condition(numbers)
            with self._turn:
                pixels = self._drawer.pixels(numbers, condition)
            for i, (number, picture) in enumerate(zip(numbers.tolist(), pixels, strict=True)):
                members = {"png": images.png(picture)}
                if condition.label is not None:
                    members["cls"] = str(int(condition.label[i])).encode()
                if condition.prompts is not None:
                    members["txt"] = condition.prompts[i].encode(errors="replace")  # lone surrogates have no UTF-8
                writer.add(f"{number:08d}", members)
        return writer.save(self._destination, task.name)


@dataclass(frozen=True)
class DrawingWork:
    """What a worker has to know."""

    drawer: Drawer  # on the CPU
    destination: str

    @property
    def config(self) -> Config:
        """The run's."""
        return self.drawer.config

    def maker(self) -> ShardDrawer:
        """Set this process up to draw: its storage and its device."""
        runs.use_storage(self.config)
        if not storage.exists(storage.join(self.destination, SAMPLED_NAME)):
            raise not_shared("--out", self.destination)
        return ShardDrawer(self.drawer.to(device_of(self.config)), self.destination)


def sample_shards(
    run: str,
    request: SampleRequest,
    out: str,
    overrides: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_message: Callable[[str], None] = lambda line: None,
) -> tuple[Manifest, bool]:
    """Draw images into shards over all workers of the run's cluster; what an interrupted command has drawn is kept.

    The same request makes the same bytes, whatever the number of workers.

    Args:
        run: a run's folder, or one of its checkpoints.
        request: what to draw.
        out: folder or s3:// prefix; it must not hold anything else.
        overrides: `key=value` of the run's config, such as cluster.num_workers=8.
        on_progress: called with (images drawn, images in all).
        on_message: called with a line that the user should read.

    Returns:
        The manifest, and whether all was there before.

    Raises:
        ConfigError: a request that cannot be, or a folder that another command draws into.
        DataError: the folder holds something else, or not all that was drawn.
        CheckpointError: the run has no sound checkpoint.
        RunFailedError: a worker was lost more often than cluster.max_failures allows.
        FolderLostError: another command has taken the folder.
    """
    out = storage.absolute(out)
    drawer = Drawer(run, request, overrides)
    asked = {
        "format": _FORMAT,
        "model": asdict(runs.identify(run, drawer.family, drawer.step)),
        "family": runs.family_tree(drawer.config),
        "request": asdict(request),
        "first rows": None if drawer.rows is None else crc32(drawer.rows.numpy().tobytes()),
    }
    with held(out, on_message) as lease:
        lease.confirm()
        there = storage.list_stats(out)
        _begin(out, list(there), asked)
        if MANIFEST_NAME in there:
            return _whole(out, there), True
        return _draw(drawer, request, out, there, on_progress, lease), False


def _draw(
    drawer: Drawer,
    request: SampleRequest,
    out: str,
    there: dict[str, storage.Stat],
    on_progress: Callable[[int, int], None],
    lease: Lease,
) -> Manifest:
    """Draw what is not there yet."""
    data = drawer.config.data
    each = max(1, min(_SHARD_IMAGES, _SHARD_BYTES // (data.image_size**2 * data.channels)))
    starts = range(0, request.num_images, each)
    tasks = [Task(f"shard-{i:06d}.tar", start, min(start + each, request.num_images)) for i, start in enumerate(starts)]
    ledger = Ledger(out)
    ledger.forget_changed(there)
    todo = [task for task in tasks if task.name not in ledger.entries]
    done = request.num_images - sum(task.stop - task.first for task in todo)
    with ledger, closing(make_shards(DrawingWork(drawer, out), todo)) as entries:
        for entry in entries:
            lease.check()
            if ledger.add(entry):
                ledger.save()
            done += entry.samples
            on_progress(done, request.num_images)
    return ledger.finish((), made_here=True)


def _whole(out: str, there: dict[str, storage.Stat]) -> Manifest:
    """What was drawn; DataError if a shard of it is not there, or of another size."""
    manifest = Manifest.load(out)
    for entry in manifest.shards:
        if entry.name not in there or there[entry.name].num_bytes != entry.num_bytes:
            raise DataError(f"{storage.join(out, entry.name)}: is not what was drawn; delete {out}, or choose another")
    return manifest


def _begin(out: str, there: list[str], asked: dict[str, Any]) -> None:
    """Make the folder ours; DataError if it holds anything else."""
    location = storage.join(out, SAMPLED_NAME)
    others = [name for name in there if name not in (SAMPLED_NAME, LEDGER_NAME, LEASE_NAME)]
    if not others:
        storage.write_json(location, asked)
        return
    if SAMPLED_NAME not in there:
        raise DataError(f"{out}: holds something else ({others[0]}, ...); choose another folder or delete it")
    try:
        found = storage.read_json(location)
    except ValueError as error:
        raise DataError(f"{location}: is damaged ({error}); choose another folder or delete it") from error
    if found != asked:
        keys = [key for key in asked if found.get(key) != asked[key]]
        raise DataError(f"{out}: holds images of another {keys[0]}; choose another folder or delete it")
    with suppress(StorageError):  # unfinished uploads are seen by the bucket's owner alone, perhaps
        storage.delete_leftovers(out, PACKED_NAMES)
