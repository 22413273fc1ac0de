"""Folders of images and shards to pack, and what was packed."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from gmdist.data.fetch import Shards
from gmdist.data.manifest import Manifest


def image(number: int, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape or (6, 9, 3), dtype=np.uint8))


def fill(folder: Path, names: list[str]) -> Path:
    """A folder with an image of noise under each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image(number).save(folder / name)
    return folder


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a data set by key."""
    shards = Shards(str(folder), Manifest.load(str(folder)))
    places = [(s, i) for s, shard in enumerate(shards.manifest.shards) for i in range(shard.samples)]
    found = {
        shards.index(s).keys[i]: {name: bytes(content) for name, content in shards.read(s, i).items()}
        for s, i in places
    }
    assert len(found) == len(places)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def theirs(folder: Path, stream: list[tuple[str, dict[str, bytes]]], num_shards: int, form: int) -> Path:
    """Shards of another writer."""
    folder.mkdir()
    per_shard = len(stream) // num_shards
    for number in range(num_shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=form) as tar:
            for key, members in stream[number * per_shard : (number + 1) * per_shard]:
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def stream(count: int, name: str = "{:05d}") -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for number in range(count):
        png = io.BytesIO()
        image(number, 24, 24, 3).save(png, "PNG")
        members = {"png": png.getvalue(), "txt": f"number {number}".encode(), "seg.npy": bytes(number)}
        found.append((name.format(number), members))
    return found
