"""What a node of a cluster finds of itself before a run starts. Imports no torch: it has to answer within seconds."""

import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass

from gmdist import s3, storage
from gmdist.data.manifest import Manifest
from gmdist.errors import GmdistError

_COMPARED = ("torch", "numpy", "deepspeed", "safetensors")  # Ray compares its own version, and Python's
_LEAST_FREE_BYTES = 1 << 30
_SHM = "/dev/shm"  # noqa: S108 - where Ray keeps objects


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one node."""

    node: str
    what: str
    found: str
    remedy: str | None = None  # None: it is as it should be

    def __str__(self) -> str:
        return f"{self.node}: {self.what}: {self.found}" + ("" if self.remedy is None else f"; {self.remedy}")


@dataclass(frozen=True)
class Expected:
    """What the driver has, which each node is compared with."""

    folder: str  # where the command runs
    run_dir: str
    mark: str  # a file that the driver has written into the run's folder
    data: Sequence[tuple[str, str, str]]  # key, location and the manifest's hash of each data set
    s3: s3.S3Config
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Those of the packages that have to be the same on all nodes."""
    found = {}
    for name in _COMPARED:
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            found[name] = version.partition("+")[0]  # "+cu130" beside "+cpu" is as it should be
    return found


def probe(node: str, expected: Expected) -> list[Finding]:
    """What this node finds of itself."""
    s3.configure(expected.s3)
    disks = [] if storage.is_s3(expected.run_dir) else [expected.run_dir]
    # Relative paths mean what they mean to the user.
    with chdir(expected.folder if os.path.isdir(expected.folder) else os.curdir):
        return [
            _versions(node, expected.versions),
            *(_data(node, *one) for one in expected.data),
            _run_folder(node, expected),
            *(_free(node, folder) for folder in (*disks, _SHM) if os.path.isdir(folder)),
        ]


def _versions(node: str, expected: dict[str, str]) -> Finding:
    own = versions()
    found = ", ".join(f"{name} {version}" for name, version in own.items())
    if own == expected:
        return Finding(node, "versions", found)
    others = ", ".join(f"{name} {expected[name]}" for name in expected if own.get(name) != expected[name])
    return Finding(node, "versions", found, f"install {others} there, as where the command runs")


def _data(node: str, key: str, location: str, expected: str) -> Finding:
    try:
        manifest = Manifest.load(location)
    except GmdistError as error:
        return Finding(node, key, str(error), "use a folder that all nodes share, or s3://, with the right to read it")
    if manifest.hash != expected:
        remedy = "copy it again with its manifest, or use a folder that all nodes share, or s3://"
        return Finding(node, key, f"{location}: another data set than where the command runs", remedy)
    return Finding(node, key, f"{location}: {manifest.num_samples} samples")


def _run_folder(node: str, expected: Expected) -> Finding:
    """Whether the driver's file is there, and a file can be written, read, replaced and deleted beside it."""
    remedy = "use a folder that all nodes share, or s3://, with the right to write to it"
    what, own = "run.dir", f"{expected.mark}-{os.urandom(4).hex()}"
    try:
        if not storage.exists(expected.mark):
            return Finding(node, what, f"{expected.run_dir}: does not hold what the command wrote", remedy)
        for content in (b"first", b"second"):  # the second replaces the first, by a rename on a disk
            storage.write(own, content)
            if storage.read(own) != content:
                return Finding(node, what, f"{expected.run_dir}: what is written is not what is read", remedy)
        storage.delete(own)
    except (GmdistError, FileNotFoundError) as error:
        return Finding(node, what, str(error), remedy)
    return Finding(node, what, f"{expected.run_dir}: written, read and replaced")


def _free(node: str, folder: str) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / 2**30:.1f} GiB free"
    if free >= _LEAST_FREE_BYTES:
        return Finding(node, "disk", found)
    return Finding(node, "disk", found, f"make room: it takes {_LEAST_FREE_BYTES / 2**30:.0f} GiB at least")
