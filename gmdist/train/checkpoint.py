"""Checkpoints: one safetensors shard a worker, and meta.json written last.

A shard holds flat fp32 fragments under names that say where they belong ("param|denoiser.conv_in.weight|0"), so a
checkpoint can be loaded by any number of workers at any ZeRO stage. It is complete when meta.json lists every shard
with its size and crc32. Nothing in it depends on the time or the place of writing: equal runs write equal bytes.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmdist import storage
from gmdist.errors import CheckpointError
from gmdist.train.workers import rank, world_size

FORMAT_VERSION = 2
META_NAME = "meta.json"

_THREADS = 8  # shards that are read at once
_MOST_HEAD_BYTES = 100_000_000  # safetensors' own limit

# Kinds of tensors in a shard.
PARAM, EMA_PARAM, STATE, BUFFER, FROZEN, WORKER = "param", "ema", "state.", "buffer", "frozen", "worker"


def folder_name(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for another name."""
    digits = name.removeprefix("step-")
    return int(digits) if name.startswith("step-") and digits.isdigit() else None


def tensor_key(kind: str, name: str, start: int) -> str:
    """A tensor's name in a shard: its kind, what it belongs to, and the place of its first element."""
    return f"{kind}|{name}|{start}"


@dataclass(frozen=True)
class Found:
    """A sound checkpoint, and what was wrong with newer ones."""

    location: str
    meta: dict[str, Any]
    warnings: list[str]


def find_newest(
    run_dir: str, is_good: Callable[[dict[str, Any]], bool] = lambda meta: True
) -> tuple[Found | None, list[str]]:
    """The newest complete and sound checkpoint of a run.

    Args:
        run_dir: the run's folder.
        is_good: whether one with such a meta.json will do.

    Returns:
        It, or None where there is none; and a line for every newer one that cannot be used.

    Raises:
        CheckpointError: there are complete checkpoints, and all are damaged.
    """
    folder = storage.join(run_dir, "checkpoints")
    steps = sorted((step for name in storage.list_names(folder) if (step := step_of(name)) is not None), reverse=True)
    warnings: list[str] = []
    for step in steps:
        location = storage.join(folder, folder_name(step))
        try:
            meta = read_meta(location)
            if not is_good(meta):
                continue
            verify(location, meta)
            return Found(location, meta, warnings), warnings
        except CheckpointError as error:
            warnings.append(f"skipped an unusable checkpoint: {error}")
    if warnings and any(storage.exists(storage.join(folder, folder_name(step), META_NAME)) for step in steps):
        # Something else than an interrupted save did this; starting at step 0 would throw the run away.
        raise CheckpointError(
            f"{folder}: none of the checkpoints can be used ({warnings[0].partition(': ')[2]}); restore one, "
            "or set run.overwrite=true to start anew"
        )
    return None, warnings


def find_together(
    run_dir: str, on_warning: Callable[[str], None], is_good: Callable[[dict[str, Any]], bool] = lambda meta: True
) -> Found | None:
    """`find_newest` by rank 0 for all workers, which all call it; `on_warning` is called with each line."""
    choice: list[Any] = [None]
    if rank() == 0:
        found, warnings = find_newest(run_dir, is_good)
        for warning in warnings:
            on_warning(warning)
        choice = [found]
    if world_size() > 1:
        dist.broadcast_object_list(choice, src=0)
    return choice[0]


def read_meta(location: str) -> dict[str, Any]:
    """A checkpoint's meta.json; CheckpointError if there is none or it is not one."""
    path = storage.join(location, META_NAME)
    try:
        meta = storage.read_json(path)
        if meta["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {meta['format']}; this version of gmdist reads {FORMAT_VERSION}")
        return meta
    except FileNotFoundError as error:
        raise CheckpointError(f"{location}: incomplete, it has no {META_NAME}") from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def verify(location: str, meta: dict[str, Any]) -> None:
    """Read every shard and compare size and crc32; CheckpointError names the first that differs."""

    def problem_of(shard: dict[str, Any]) -> str | None:
        path = storage.join(location, shard["name"])
        # What comes from object storage can be damaged on its way.
        for _ in range(storage.READ_ATTEMPTS if storage.is_s3(path) else 1):
            try:
                num_bytes, value = storage.checksum(path)
            except FileNotFoundError:
                return f"{path}: missing"
            if num_bytes != shard["bytes"]:
                return f"{path}: {num_bytes} bytes instead of {shard['bytes']}"
            if value == shard["crc32"]:
                return None
        return f"{path}: damaged (its crc32 differs)"

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as threads:
        problems = list(threads.map(problem_of, meta["shards"]))
    for problem in filter(None, problems):
        raise CheckpointError(problem)


class Reader:
    """An open checkpoint: any range of any tensor, whichever shard it lies in. A context manager.

    Of a checkpoint in object storage, the shards that are needed are copied to a temporary folder.
    """

    def __init__(self, location: str, meta: dict[str, Any]) -> None:
        self.location, self.meta = location, meta
        self._shards = {shard["name"]: shard for shard in meta["shards"]}
        self._stack = ExitStack()
        self._folder = location
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}  # first, count, shard, key

    def __enter__(self) -> "Reader":
        if storage.is_s3(self.location):
            self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gmdist-checkpoint-"))
        with self._naming():
            for name in self._shards:
                for key, description in self._head(name).items():
                    kind, _, place = key.partition("|")
                    tensor, _, first = place.rpartition("|")
                    piece = int(first), int(description["shape"][0]), name, key
                    self._pieces.setdefault((kind, tensor), []).append(piece)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn what goes wrong with a shard into a CheckpointError."""
        try:
            yield
        except FileNotFoundError as error:  # the run goes on, and this one was the oldest
            self._stack.close()
            raise CheckpointError(f"{self.location}: deleted while it was being read") from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._stack.close()
            raise CheckpointError(f"{self.location}: damaged ({error})") from error

    def _head(self, name: str) -> dict[str, Any]:
        """What a shard holds: the description of each tensor."""
        path = storage.join(self.location, name)
        for attempt in range(storage.READ_ATTEMPTS):
            try:
                version = storage.stat(path)
                size = int.from_bytes(storage.read_range(path, 0, 8, version), "little")
                if size > _MOST_HEAD_BYTES:
                    raise ValueError(f"{name} is no safetensors file")
                head = json.loads(storage.read_range(path, 8, size, version))
                return {key: value for key, value in head.items() if key != "__metadata__"}
            except ValueError:
                if attempt + 1 == storage.READ_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _file(self, name: str) -> Any:
        """An open shard."""
        if name not in self._files:
            path = f"{self._folder}/{name}"
            if storage.is_s3(self.location):
                shard = self._shards[name]
                content = storage.read_checked(storage.join(self.location, name), shard["bytes"], shard["crc32"])
                with storage.naming(path):
                    Path(path).write_bytes(content)
            self._files[name] = self._stack.enter_context(safe_open(path, "pt"))
        return self._files[name]

    def has(self, kind: str, name: str) -> bool:
        """Whether there is anything of a tensor."""
        return (kind, name) in self._pieces

    def read(self, kind: str, name: str, start: int, values: Tensor) -> None:
        """Fill `values`, [count], with elements [start, start + count) of a flattened tensor.

        Raises:
            CheckpointError: any of them is not there, or they are of another type.
        """
        count, filled = values.numel(), 0
        with self._naming():
            for first, size, shard, key in self._pieces.get((kind, name), []):
                low, high = max(first, start), min(first + size, start + count)
                if low < high:
                    part = self._file(shard).get_slice(key)[low - first : high - first]
                    if part.dtype != values.dtype:
                        raise CheckpointError(f"{self.location}: {name} is {part.dtype}; the model has {values.dtype}")
                    values[low - start : high - start] = part
                    filled += high - low
        if filled != count:
            raise CheckpointError(f"{self.location}: has {filled} of {count} elements of {name} ({kind})")


def check_shapes(location: str, meta: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """CheckpointError if the checkpoint's tensors are not those of the model."""
    saved = meta["shapes"]
    for name in sorted(set(saved) | set(shapes)):
        if saved.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{location}: does not fit this config: {name} is {saved.get(name, 'absent')} in the checkpoint and "
                f"{shapes.get(name, 'absent')} in the model; use the run's own config, or another run.dir"
            )
