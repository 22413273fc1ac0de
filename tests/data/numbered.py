"""A data set whose images, keys and labels tell their numbers, and batches of it."""

import io
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gmdist.data.batch import Loaded
from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest, ShardTable
from gmdist.data.pack import write_shards

SHARD_SIZES, CLASSES, SIZE, BATCH = (7, 9, 5), 4, 6, 12
COUNT = sum(SHARD_SIZES)
NO_IMAGE = {"png": b"\x89PNG\r\n\x1a\n damaged"}


def pixels(number: int, channels: int = 1, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, channels), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, changed: dict[int, dict[str, bytes]] | None = None, channels: int = 1) -> str:
    """A data set of COUNT images: number i has pixels(i), the key k<i> and the label i % CLASSES."""
    entries, first = [], 0
    for size in SHARD_SIZES:
        samples = []
        for i in range(first, first + size):
            members = {"png": png(pixels(i, channels)), "cls": str(i % CLASSES).encode()} | (changed or {}).get(i, {})
            samples.append((f"k{i}", {name: content for name, content in members.items() if content is not None}))
        part = folder / f"part-{first}"
        (entry,) = write_shards(samples, str(part)).shards
        name = f"shard-{len(entries)}"
        (part / "shard-000000.tar").rename(folder / f"{name}.tar")
        (part / "shard-000000.index.safetensors").rename(folder / f"{name}.index.safetensors")
        entries.append(replace(entry, name=f"{name}.tar"))
        first += size
    Manifest(ShardTable.of(entries)).save(str(folder))
    return str(folder)


def settings(folder: str | None, **changes) -> DataConfig:
    values = {"batch_size": BATCH, "image_size": SIZE, "channels": 1, "num_classes": CLASSES, "block": 4}
    return DataConfig(train=folder, **(values | changes))


def load(folder: str, steps: int, start: int = 0, world_size: int = 1, **changes) -> list[list[Loaded]]:
    """The parts of some batches: [worker][step]."""
    parts = []
    for rank in range(world_size):
        batches = Loader(settings(folder, **changes), folder, rank, world_size).batches(start)
        parts.append(list(islice(batches, steps)))
        batches.close()
    return parts


def merged(parts: list[list[Loaded]]) -> tuple[dict[int, tuple[bytes, int]], int, list[str]]:
    """(image, label) by number, the digest, and the quarantine lines, of all workers together."""
    found, total, lines = {}, 0, []
    for part in (part for worker in parts for part in worker):
        labels = part.batch.get("label", torch.full_like(part.batch["key"], -1))
        for image, label, key in zip(part.batch["image"], labels, part.batch["key"], strict=True):
            assert int(key) not in found
            found[int(key)] = (image.numpy().tobytes(), int(label))
        total = (total + part.digest) % 2**64
        lines += [json.dumps(line, sort_keys=True) for line in part.quarantined]
    return found, total, sorted(lines)


def origin(loader: Loader, number: int) -> int:
    """Which image of the data set has this number."""
    shard, index = (int(x[0]) for x in loader.datasets[0].tape.locate([number]))
    return sum(SHARD_SIZES[:shard]) + index


def as_loaded(image: np.ndarray) -> np.ndarray:
    return (image.astype(np.float64) / 127.5 - 1).transpose(2, 0, 1)
