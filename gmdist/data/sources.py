"""What is packed: images in folders, with the texts beside them, or the samples of shards."""

import hashlib
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from gmdist import storage
from gmdist.data import tar
from gmdist.data.decode import UndecodableError
from gmdist.data.index import known_classes
from gmdist.data.manifest import MANIFEST_NAME, PACK_NAME
from gmdist.data.shard import IMAGE_EXTENSIONS, walk
from gmdist.data.sound import open_sound
from gmdist.errors import DataError

TEXT_EXTENSIONS = ("txt", "json", "cls")
OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "jfif", "jp2", "jxl", "tif", "tiff")  # listed as unreadable
_MAX_KEY_BYTES = 80  # USTAR names end at 100, with the extension
_NUMBERED = re.compile(r"\d{5,}")  # how img2dataset names its folders


@dataclass(frozen=True)
class Raw:
    """One sample of a source, not read yet."""

    shard: int  # of the task's shards; never less than that of the sample before
    key: str
    name: str  # for messages
    read: Callable[[], dict[str, bytes]]  # its members by extension; raises OSError


@dataclass(frozen=True)
class Probe:
    """What encoding some samples of a source has shown, to foretell the size of shards."""

    samples: int
    source_bytes: int
    written_bytes: int

    @property
    def growth(self) -> float:
        """Bytes written for each byte of the source."""
        return self.written_bytes / self.source_bytes if self.written_bytes else 1.0


@dataclass(frozen=True)
class File:
    """An image file and the texts beside it."""

    name: str  # below the source's folder
    key: str
    label: int | None
    versions: tuple[tuple[str, storage.Stat], ...]  # extension and version: the image, then its texts

    def read(self, root: str) -> dict[str, bytes]:
        """Its members by extension; UndecodableError for an image of another kind."""
        if self.versions[0][0].lower() in OTHER_IMAGES:
            raise UndecodableError(f"an image that is not read; convert it to one of {', '.join(IMAGE_EXTENSIONS)}")
        members = {}
        stem = posixpath.splitext(self.name)[0]
        for number, (extension, _) in enumerate(self.versions):
            with open(os.path.join(root, f"{stem}.{extension}" if number else self.name), "rb") as file:
                members[extension.lower()] = file.read()
        if self.label is not None:
            members["cls"] = str(self.label).encode()
        return members


@dataclass(frozen=True)
class FileTask:
    """Files that make one shard."""

    root: str
    files: Sequence[File]
    num_shards = 1

    @property
    def source_bytes(self) -> int:
        """Of the files."""
        return sum(_file_bytes(file) for file in self.files)

    def samples(self) -> Iterator[Raw]:
        """A sample each."""
        return (Raw(0, file.key, file.name, partial(file.read, self.root)) for file in self.files)


@dataclass(frozen=True)
class ImageFolder:
    """A local folder of images, one class a subfolder or without classes."""

    root: str
    classes: tuple[str, ...]
    files: list[File]  # in the order in which they are packed

    @property
    def num_samples(self) -> int:
        """Samples in it."""
        return len(self.files)

    def versions(self) -> Iterator[tuple[str, storage.Stat]]:
        """Every file and its version."""
        return ((f"{file.name} {extension}", version) for file in self.files for extension, version in file.versions)

    def tasks(self, shard_bytes: float, probe: Probe, resized: bool) -> list[FileTask]:
        """The files of each shard: those that fill it, by the sizes that the probe foretells.

        Resized images are taken to be as large as the probe's are on average, others to grow by the probe's factor.
        """
        same_bytes = probe.written_bytes / probe.samples if resized and probe.samples else None
        tasks, first, filled = [], 0, 0.0
        for number, file in enumerate(self.files):
            if filled >= shard_bytes:
                tasks.append(FileTask(self.root, self.files[first:number]))
                first, filled = number, 0.0
            filled += same_bytes or _file_bytes(file) * probe.growth
        return [*tasks, FileTask(self.root, self.files[first:])]

    def by_name(self) -> Iterator[Raw]:
        """All samples, in the order of their names."""
        return FileTask(self.root, sorted(self.files, key=lambda file: file.name)).samples()

    def first(self, count: int) -> Iterator[tuple[int, Raw]]:
        """Some samples, with the bytes that each takes in a shard."""
        files = self.files[:count]
        return zip(map(_file_bytes, files), FileTask(self.root, files).samples(), strict=True)


@dataclass(frozen=True)
class ShardTask:
    """Shards that are packed into others: each of those takes an equal part of their bytes."""

    shards: Sequence[tuple[str, storage.Stat]]  # locations and versions
    num_shards: int

    @property
    def source_bytes(self) -> int:
        """Of the shards."""
        return sum(version.num_bytes for _, version in self.shards)

    def samples(self) -> Iterator[Raw]:
        """Their samples in order. A key that is there twice in a shard gets a "_"."""
        before, total, last, taken = 0, self.source_bytes, -1, set[str]()
        for location, version in self.shards:
            with open_sound(location, version) as file:
                for key, members in walk(file, location):
                    start = before + min(offset for offset, _ in members.values())
                    shard = start * self.num_shards // total
                    if shard != last:
                        last, taken = shard, set()
                    contents = {extension: content for extension, (_, content) in members.items()}
                    unique = key
                    while unique in taken:
                        unique += "_"
                    taken.add(unique)
                    yield Raw(shard, unique, f"{location}: {key}", partial(dict, contents))
            before += version.num_bytes


@dataclass(frozen=True)
class ShardFolder:
    """A folder or prefix of shards, whoever has written them."""

    folder: str
    classes: tuple[str, ...]
    shards: list[tuple[str, storage.Stat]]  # locations and versions
    num_samples: None = None  # it would have to be read

    def versions(self) -> Iterator[tuple[str, storage.Stat]]:
        """Every shard and its version, wherever they lie."""
        return ((posixpath.basename(location), version) for location, version in self.shards)

    def tasks(self, shard_bytes: float, probe: Probe, resized: bool) -> list[ShardTask]:
        """Shards that follow each other, as many as fill at least one, and how many they will fill."""
        tasks, first, filled = [], 0, 0.0
        for number, (_, version) in enumerate(self.shards):
            filled += version.num_bytes * probe.growth
            if filled >= shard_bytes or number == len(self.shards) - 1:
                tasks.append(ShardTask(self.shards[first : number + 1], max(1, round(filled / shard_bytes))))
                first, filled = number + 1, 0.0
        return tasks

    def by_name(self) -> Iterator[Raw]:
        """All samples, shard by shard."""
        return ShardTask(self.shards, 1).samples()

    def first(self, count: int) -> Iterator[tuple[int, Raw]]:
        """Some samples, with the bytes that each takes in its shard."""
        for raw in islice(self.by_name(), count):
            yield tar_bytes(raw.read()), raw


def open_source(source: str) -> ImageFolder | ShardFolder:
    """List what is in a source; DataError if that cannot be packed."""
    if not storage.is_s3(source) and not os.path.isdir(source):
        raise DataError(f"{source}: {'not a' if os.path.exists(source) else 'no such'} folder")
    stats = storage.list_stats(source)
    shards = [(storage.join(source, name), v) for name, v in stats.items() if _is_visible(name, ("tar",))]
    images = [name for name in stats if _is_visible(name, IMAGE_EXTENSIONS)]
    if shards and images:
        raise DataError(f"{source}: has both shards ({shards[0][0]}, ...) and images ({images[0]}, ...); part them")
    if shards:
        if PACK_NAME in stats and MANIFEST_NAME not in stats:
            raise DataError(f"{source}: its own packing was not finished; run that `gmdist data pack` again first")
        return ShardFolder(source, known_classes(source), shards)
    if storage.is_s3(source):
        raise DataError(f"{source}: no .tar shards here; images are packed from a local folder, so copy them first")
    return _open_images(source)


def _open_images(source: str) -> ImageFolder:
    found = sorted(_images_in(source, ""), key=lambda image: shuffle_key(image[0]))
    if not found:
        raise DataError(f"{source}: no images ({', '.join(IMAGE_EXTENSIONS)}) in it")
    entries = [entry for entry in os.scandir(source) if entry.is_dir() and not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries)
    flat = sorted(name for name, _ in found if "/" not in name)
    if folders and flat:
        raise DataError(
            f"{source}: has both images ({flat[0]}, ...) and subfolders ({folders[0]}, ...); "
            "use one folder of images, or one subfolder for each class"
        )
    has_texts = any(len(versions) > 1 for _, versions in found)
    is_numbered = has_texts and all(_NUMBERED.fullmatch(name) for name in folders)  # parts of a list, no classes
    classes = () if is_numbered else tuple(folders)
    for name in sorted(set(classes) - {name.split("/")[0] for name, _ in found}):
        raise DataError(
            f"{os.path.join(source, name)}: no images in this class folder; it would take a label: delete it"
        )
    labels = {name: label for label, name in enumerate(classes)}
    labelled = (name for name, versions in found if any(text.lower() == "cls" for text, _ in versions[1:]))
    if classes and (one := next(labelled, None)) is not None:
        raise DataError(
            f"{source}: has both subfolders, which would be classes, and .cls files (beside {one}); keep one of the two"
        )
    files, taken = [], set[str]()
    for name, versions in found:
        key = key_of(name)
        while key in taken:  # a.b.png and a_b.png
            key += "_"
        taken.add(key)
        files.append(File(name, key, labels.get(name.split("/")[0]), versions))
    return ImageFolder(source, classes, files)


def _images_in(
    root: str, folder: str, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, tuple[tuple[str, storage.Stat], ...]]]:
    """The images in a folder and those below it, linked folders included, hidden ones not: name, and the versions."""
    path = os.path.join(root, folder)
    with storage.naming(path):
        status = os.stat(path)
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
        inside = [name for name in names if os.path.isdir(os.path.join(path, name))]
    if (status.st_dev, status.st_ino) in above:  # a link that leads back to where it came from
        return
    for name in inside:
        yield from _images_in(root, posixpath.join(folder, name), (*above, (status.st_dev, status.st_ino)))
    stats = storage.list_stats(path) | _broken_links(path)
    written = defaultdict(list)  # extensions by stem, in lower or upper case
    for name in stats:
        stem, _, extension = name.rpartition(".")
        written[stem].append(extension)
    for name, version in stats.items():
        if _is_visible(name, (*IMAGE_EXTENSIONS, *OTHER_IMAGES)):
            stem, _, extension = name.rpartition(".")
            texts = [other for other in written[stem] if other.lower() in TEXT_EXTENSIONS]
            texts.sort(key=lambda other: (TEXT_EXTENSIONS.index(other.lower()), other.swapcase()))  # lower case first
            versions = tuple((text, stats[f"{stem}.{text}"]) for text in texts)
            yield posixpath.join(folder, name), ((extension, version), *versions)


def _broken_links(path: str) -> dict[str, storage.Stat]:
    """Links that lead nowhere: to images, which cannot be read, or to texts; DataError for others, perhaps folders."""
    found = {}
    with storage.naming(path):
        entries = [entry for entry in os.scandir(path) if entry.is_symlink() and not os.path.exists(entry.path)]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if _is_visible(entry.name, (*IMAGE_EXTENSIONS, *OTHER_IMAGES, *TEXT_EXTENSIONS)):
            found[entry.name] = storage.Stat(0, "")
        elif not entry.name.startswith("."):
            raise DataError(f"{entry.path}: leads to {os.readlink(entry.path)}, which is missing; restore or delete it")
    return found


def _is_visible(name: str, extensions: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in extensions


def shuffle_key(name: str) -> bytes:
    """Puts names into an order that has nothing to do with them."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()


def key_of(name: str) -> str:
    """A sample's key from its path: a name that tar, S3 and other readers take as it is."""
    key = posixpath.splitext(name)[0].replace(".", "_").replace("/", "-").replace("\\", "_")
    key = "".join("_" if ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 else c for c in key)
    if len(key.encode()) > _MAX_KEY_BYTES:
        key = key.encode()[: _MAX_KEY_BYTES - 17].decode(errors="ignore") + "-" + shuffle_key(name).hex()
    return key


def tar_bytes(members: Mapping[str, bytes]) -> int:
    """What members take in a shard, with their headers."""
    return sum(_padded_bytes(len(content)) for content in members.values())


def _padded_bytes(num_bytes: int) -> int:
    return tar.BLOCK + -(-num_bytes // tar.BLOCK) * tar.BLOCK


def _file_bytes(file: File) -> int:
    label_bytes = 0 if file.label is None else _padded_bytes(1)
    return label_bytes + sum(_padded_bytes(version.num_bytes) for _, version in file.versions)
