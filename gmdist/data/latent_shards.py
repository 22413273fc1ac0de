"""From shards of images to shards of latents: sample by sample, with the other members as they are."""

import hashlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmdist import storage
from gmdist.checksum import crc32
from gmdist.data.config import DataConfig
from gmdist.data.decode import UInt8Array, UndecodableError
from gmdist.data.latents import Record
from gmdist.data.manifest import MANIFEST_NAME, PACK_NAME, Manifest, ShardEntry
from gmdist.data.members import image_of, mirror_name
from gmdist.data.shard import IMAGE_EXTENSIONS, Member, Sample, ShardWriter, load_index, shards_among, walk
from gmdist.data.sound import open_sound
from gmdist.errors import DataError, StorageError

_AHEAD = 2  # batches whose images are decoded while one is encoded
UNREADABLE = "unreadable"  # the member of a sample whose image cannot be read: why

Encode = Callable[[Tensor], dict[str, Tensor]]  # pixels uint8 [N, H, W, C] -> arrays [N, ...] on the CPU, by name


@dataclass(frozen=True)
class SourceShard:
    """A shard that is to be encoded."""

    folder: str
    name: str
    num_bytes: int
    entry: ShardEntry | None  # of the manifest; None: there is no manifest, and no index to compare with


@dataclass(frozen=True)
class Source:
    """A data set that is to be encoded."""

    shards: list[SourceShard]  # in the order of the manifest, or of their names
    classes: tuple[str, ...]
    hash: str  # identifies it
    num_samples: int | None  # None: not known without a manifest


def open_source(folder: str) -> Source:
    """List the shards of a data set, or of a folder that others have written.

    Raises:
        DataError: there are none, they are latents already, or the data set is not finished.
    """
    stats = storage.list_stats(folder)
    if Record.load(folder) is not None:
        raise DataError(f"{folder}: holds latents itself; encode the images that they were made of")
    if MANIFEST_NAME in stats or PACK_NAME in stats:
        manifest = Manifest.load(folder)
        shards = [SourceShard(folder, entry.name, entry.num_bytes, entry) for entry in manifest.shards]
        return Source(shards, manifest.classes, manifest.hash, manifest.num_samples)
    found = shards_among(folder, stats)
    listing = repr([(name, version.num_bytes, version.etag) for name, version in found.items()])
    shards = [SourceShard(folder, name, version.num_bytes, None) for name, version in found.items()]
    return Source(shards, (), hashlib.sha256(listing.encode()).hexdigest()[:16], None)


@dataclass(frozen=True)
class EncodedShard:
    """A shard that is done."""

    entry: ShardEntry
    source_bytes: int
    unreadable: list[str]  # "shard: key: reason"


class ShardEncoder:
    """Encodes shards; several threads may, and take turns in the encoder.

    A shard's batches depend on the shard alone, so its bytes do not depend on who encodes it, or when.
    """

    def __init__(self, config: DataConfig, encode: Encode, destination: str, *, flip: bool, batch_size: int) -> None:
        """Set up.

        Args:
            config: how images are read: image_size, channels, resize, num_threads. Crops are centred.
            encode: the first stage.
            destination: folder or s3:// prefix of the shards that are written.
            flip: whether mirror images are encoded too.
            batch_size: images that pass through the encoder at once.
        """
        self._config, self._encode, self._destination = config, encode, destination
        self._flip, self._batch_size = flip, batch_size
        self._turn = threading.Lock()
        self.stopped = threading.Event()  # ends the work early, with a StorageError

    def shard(self, shard: SourceShard) -> EncodedShard:
        """Encode one shard under its name.

        Raises:
            DataError: it is unsound, an image is not of data.image_size, or the encoder makes no numbers of it.
        """
        location = storage.join(shard.folder, shard.name)
        writer, unreadable = ShardWriter(), list[str]()
        with ThreadPoolExecutor(self._config.num_threads, thread_name_prefix="decode") as pool:
            for batch in self._decoded(pool, self._samples(shard, location), location):
                if self.stopped.is_set():
                    raise StorageError(f"{location}: stopped")
                arrays = iter(self._arrays([image for _, _, image in batch if not isinstance(image, str)], location))
                for key, members, image in batch:
                    if isinstance(image, str):
                        unreadable.append(f"{location}: {key}: {image}")
                    made = {UNREADABLE: image.encode()} if isinstance(image, str) else next(arrays)
                    for name in members.keys() & made.keys():
                        raise DataError(f"{location}: {key}: has a member {name} already; rename it")
                    writer.add(key, members | made)
        return EncodedShard(writer.save(self._destination, shard.name), shard.num_bytes, unreadable)

    def _samples(self, shard: SourceShard, location: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys and members, compared with the index where there is one."""
        try:
            version = storage.stat(location)
        except FileNotFoundError as error:
            raise DataError(f"{location}: missing; put it back, or run `gmdist data index {shard.folder}`") from error
        index = None if shard.entry is None else load_index(shard.folder, shard.entry)
        with open_sound(location, version) as file:
            count = 0
            for key, found in walk(file, location):
                if index is not None:
                    members = {name: Member(at, len(content), crc32(content)) for name, (at, content) in found.items()}
                    if count >= len(index) or index[count] != Sample(key, members):
                        raise DataError(f"{location}: sample {key!r} is not what was indexed; run `gmdist data check`")
                yield key, {name: content for name, (_, content) in found.items()}
                count += 1
        if index is not None and count != len(index):
            raise DataError(f"{location}: {count} samples, but its index says {len(index)}; run `gmdist data check`")

    def _decoded(
        self, pool: ThreadPoolExecutor, samples: Iterator[tuple[str, dict[str, bytes]]], location: str
    ) -> Iterator[list[tuple[str, dict[str, bytes], UInt8Array | str]]]:
        """Batches of keys, members other than images, and pixels or why there are none; threads are at work ahead."""
        underway: deque[list[tuple[str, dict[str, bytes], Future[UInt8Array | str]]]] = deque()

        def finish() -> list[tuple[str, dict[str, bytes], UInt8Array | str]]:
            return [(key, kept, image.result()) for key, kept, image in underway.popleft()]

        while part := list(islice(samples, self._batch_size)):
            batch = []
            for key, members in part:
                kept = {name: content for name, content in members.items() if name not in IMAGE_EXTENSIONS}
                batch.append((key, kept, pool.submit(self._image, f"{location}: {key}", members)))
            underway.append(batch)
            if len(underway) > _AHEAD:
                yield finish()
        while underway:
            yield finish()

    def _image(self, name: str, members: Mapping[str, bytes]) -> UInt8Array | str:
        try:
            views = {extension: memoryview(content) for extension, content in members.items()}
            return image_of(self._config, views, None, None)
        except UndecodableError as error:
            return str(error)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _arrays(self, images: list[UInt8Array], location: str) -> list[dict[str, bytes]]:
        """The members that a batch of images [H, W, C] is stored as, a sample each."""
        if not images:
            return []
        pixels = torch.from_numpy(np.stack(images))  # [N, H, W, C]
        with self._turn:
            made = {f"{name}.npy": array for name, array in self._encode(pixels).items()}
            if self._flip:
                mirror = self._encode(pixels.flip(2)).items()
                made |= {mirror_name(f"{name}.npy"): array for name, array in mirror}
        stored = {name: as_stored(name, array, location) for name, array in made.items()}
        return [{name: _npy(array[i]) for name, array in stored.items()} for i in range(len(images))]


def as_stored(name: str, array: Tensor, location: str) -> np.ndarray[Any, Any]:
    """Encoded values [N, ...] as they are stored: floats as fp16, integers as int32.

    fp16 takes half of the space of fp32, and rounds to 11 bits where bf16 has 8: what comes back differs from what was
    encoded by less than from what a run in bf16 would have encoded. Its range, 65,504, is what is checked: means of
    latents are of the order of 1 to 100, log-variances lie within [-30, 20] and become variances in fp32.

    Raises:
        DataError: values that are not finite, or beyond that range.
    """
    if array.dtype == torch.bool:
        return array.numpy()
    stored = array.to(torch.float16 if array.is_floating_point() else torch.int32)
    is_kept = torch.isfinite(stored) if array.is_floating_point() else stored == array
    if not bool(is_kept.all()):
        raise DataError(
            f"{location}: the first stage's {name.removesuffix('.npy')} are not finite, or beyond the range of "
            f"{str(stored.dtype).removeprefix('torch.')}: {array[~is_kept][0].item()}"
        )
    return stored.numpy()


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
