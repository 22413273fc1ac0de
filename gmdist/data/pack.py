"""Writing shards: from folders of images, and from any stream of samples."""

import hashlib
import io
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from gmdist import storage
from gmdist.data.decode import MAX_PIXELS, NO_IMAGE, UndecodableError, center_crop_resize, decode_image, to_array
from gmdist.data.loader import IMAGE_EXTENSIONS
from gmdist.data.shard import MANIFEST_NAME, Manifest, ShardEntry, ShardWriter
from gmdist.errors import DataError

_WINDOW = 512  # images that are in memory at once
_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_KEY_BYTES = 80  # USTAR names end at 100, with the extension


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    manifest: Manifest
    unreadable: list[str]  # "path: reason"


def pack(
    source: str,
    destination: str,
    image_size: int | None = None,
    shard_mib: float = 64.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Pack a folder of images into shards.

    A folder with subfolders is one class a subfolder, labelled in the order of their names; a flat folder has no
    labels. Samples are shuffled by a hash of their path, so the same folder makes the same bytes.

    Args:
        source: a local folder.
        destination: where the shards go, local or s3://; it must not hold a data set already.
        image_size: cut the largest centred square and resize it to so many pixels a side; None keeps the files' bytes.
        shard_mib: size of a shard.
        on_progress: called with (images done, images in all).

    Raises:
        DataError: no images, or a destination that is in use.
    """
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"{source}: no such folder")
    if any(name == MANIFEST_NAME or name.endswith(".tar") for name in storage.list_names(destination)):
        raise DataError(f"{destination}: holds a data set already; choose another folder or delete it")
    classes = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    paths = list(_images_in(root))
    flat = [path for path in paths if path.parent == root]
    if not paths:
        raise DataError(f"{source}: no images ({', '.join(IMAGE_EXTENSIONS)}) in it")
    if classes and flat:
        raise DataError(
            f"{source}: has both images ({flat[0].name}, ...) and subfolders ({classes[0]}, ...); "
            "use one folder of images, or one subfolder for each class"
        )
    for name in sorted(set(classes) - {path.relative_to(root).parts[0] for path in paths}):
        raise DataError(f"{root / name}: no images in this class folder; it would take a label: delete it")
    relative = sorted((path.relative_to(root).as_posix() for path in paths), key=_shuffle_key)
    unreadable: list[str] = []

    def load(name: str) -> tuple[str, dict[str, bytes]] | str:
        try:
            members = _image_member(root / name, image_size)
        except UnidentifiedImageError:
            return f"{name}: {NO_IMAGE}"
        except (UndecodableError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{name}: {error}"
        if classes:
            members["cls"] = str(classes.index(name.split("/")[0])).encode()
        return _key(name), members

    def samples() -> Iterable[tuple[str, dict[str, bytes]]]:
        taken: set[str] = set()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # A window at a time: the pool would hold all images in memory if the writer were slower.
            windows = (relative[i : i + _WINDOW] for i in range(0, len(relative), _WINDOW))
            for done, result in enumerate(chain.from_iterable(pool.map(load, window) for window in windows)):
                on_progress(done + 1, len(relative))
                if isinstance(result, str):
                    unreadable.append(result)
                    continue
                key, members = result
                while key in taken:  # a.b.png and a_b.png
                    key += "_"
                taken.add(key)
                yield key, members

    try:
        manifest = write_shards(samples(), destination, classes, shard_mib=shard_mib)
    except DataError as error:
        raise DataError(f"{error}; {unreadable[0]}" if unreadable else str(error)) from error
    return Packed(manifest, unreadable)


def _images_in(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """The image files in a folder and those below it, linked folders included, hidden ones not."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in above:  # a link that leads back to where it came from
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _images_in(path, (*above, (status.st_dev, status.st_ino)))
        elif path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file():
            yield path


def _shuffle_key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()


def _key(name: str) -> str:
    """A sample's key from its path: a name that tar, S3 and other readers take as it is."""
    key = posixpath.splitext(name)[0].replace(".", "_").replace("/", "-").replace("\\", "_")
    key = "".join("_" if ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 else c for c in key)
    if len(key.encode()) > _MAX_KEY_BYTES:
        key = key.encode()[: _MAX_KEY_BYTES - 17].decode(errors="ignore") + "-" + _shuffle_key(name).hex()
    return key


def _image_member(path: Path, image_size: int | None) -> dict[str, bytes]:
    content = path.read_bytes()
    if image_size is None:
        decode_image(content, 3)
        return {path.suffix[1:].lower(): content}
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UndecodableError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are accepted")
        upright = ImageOps.exif_transpose(image)  # cameras store how they were held
        grey = upright.mode in ("L", "LA", "1")
        array = to_array(upright, 1 if grey else 3)
    resized = center_crop_resize(Image.fromarray(array[:, :, 0] if grey else array), image_size)
    png = io.BytesIO()
    resized.save(png, "PNG")
    return {"png": png.getvalue()}


def write_shards(
    samples: Iterable[tuple[str, dict[str, bytes]]],
    destination: str,
    classes: tuple[str, ...] = (),
    *,
    num_shards: int | None = None,
    shard_mib: float = 64.0,
) -> Manifest:
    """Write samples to shards, and their manifest last.

    Args:
        samples: keys without dots, and members by extension.
        destination: a folder or s3:// prefix.
        classes: names of the labels.
        num_shards: deal the samples out to so many shards; None fills one after another.
        shard_mib: size at which a shard is full, without num_shards.
    """
    entries: list[ShardEntry] = []

    def save(writer: ShardWriter) -> None:
        entries.append(writer.save(destination, f"shard-{len(entries):06d}.tar"))

    if num_shards is not None:
        writers = [ShardWriter() for _ in range(num_shards)]
        for number, (key, members) in enumerate(samples):
            writers[number % num_shards].add(key, members)
        for writer in writers:
            save(writer)
    else:
        writer, count = ShardWriter(), 0
        for key, members in samples:
            if count and writer.num_bytes >= shard_mib * 2**20:
                save(writer)
                writer, count = ShardWriter(), 0
            writer.add(key, members)
            count += 1
        if count:
            save(writer)
    manifest = Manifest(tuple(entries), classes)
    if manifest.num_samples == 0:
        raise DataError(f"{destination}: none of the images can be read")
    manifest.save(destination)
    return manifest
