"""Checkpoints: one safetensors shard a worker, and meta.json written last.

A shard holds flat fp32 fragments under names that say where they belong ("param|denoiser.conv_in.weight|0"), so a
checkpoint can be loaded by any number of workers at any ZeRO stage. It is complete when meta.json lists every shard
with its size and crc32. Nothing in it depends on the time or the place of writing: equal runs write equal bytes.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist import storage
from gmdist.errors import CheckpointError
from gmdist.train.meta import problem_with
from gmdist.workers import rank, world_size

META_NAME = "meta.json"

_THREADS = 8  # shards that are read at once
_MOST_HEAD_BYTES = 100_000_000  # safetensors' own limit
_KEY = re.compile(r"([^|]+)\|(.+)\|(0|[1-9][0-9]*)", re.DOTALL)  # of `tensor_key`
# What reading a shard that is none comes to.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DTYPES = {  # by safetensors' names for them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Kinds of tensors in a shard.
PARAM, EMA_PARAM, STATE, BUFFER, FROZEN, WORKER = "param", "ema", "state.", "buffer", "frozen", "worker"


def folder_name(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for another name."""
    if not re.fullmatch("step-[0-9]{8,}", name):
        return None
    step = int(name.removeprefix("step-"))
    return step if folder_name(step) == name else None


def tensor_key(kind: str, name: str, start: int) -> str:
    """A tensor's name in a shard: its kind, what it belongs to, and the place of its first element."""
    return f"{kind}|{name}|{start}"


@dataclass(frozen=True)
class Found:
    """A sound checkpoint."""

    location: str
    meta: dict[str, Any]


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
    steps = _steps_in(folder)
    warnings: list[str] = []
    for step in steps:
        location = storage.join(folder, folder_name(step))
        try:
            meta = read_meta(location)
            if not is_good(meta):
                continue
            verify(location, meta)
            return Found(location, meta), warnings
        except CheckpointError as error:
            warnings.append(f"skipped an unusable checkpoint: {error}")
    # What has the name counts, whatever it is: an interrupted save leaves nothing of it.
    if warnings and any(META_NAME in storage.list_names(storage.join(folder, folder_name(step))) for step in steps):
        # Something else than an interrupted save did this; starting at step 0 would throw the run away.
        raise CheckpointError(
            f"{folder}: none of the checkpoints can be used ({warnings[0].partition(': ')[2]}); restore one, "
            "or set run.overwrite=true to start anew"
        )
    return None, warnings


def newest_step(run_dir: str) -> int:
    """The step of a run's newest complete checkpoint, 0 without one, as its meta.json says: no shard is read.

    It tells how far a run has come, and not where it can go on: `find_newest` skips a checkpoint whose shards are
    damaged.
    """
    folder = storage.join(run_dir, "checkpoints")
    for step in _steps_in(folder):
        with suppress(CheckpointError):
            read_meta(storage.join(folder, folder_name(step)))
            return step
    return 0


def _steps_in(folder: str) -> list[int]:
    """The steps of what has a checkpoint's name in a folder, the newest first."""
    return sorted((step for name in storage.list_names(folder) if (step := step_of(name)) is not None), reverse=True)


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
    """A checkpoint's meta.json; CheckpointError if there is none, or it is not one of this step."""
    path = storage.join(location, META_NAME)
    try:
        meta = storage.read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{location}: incomplete, it has no {META_NAME}") from error
    except storage.NotAFileError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    problem = problem_with(meta, step_of(location.rpartition("/")[2]))
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    return meta


def verify(location: str, meta: dict[str, Any]) -> None:
    """Read every shard, compare size and crc32, look at what it holds; CheckpointError names the first unsound one."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as threads:
        problems = list(
            threads.map(lambda shard: _problem_of(storage.join(location, shard["name"]), shard), meta["shards"])
        )
    for problem in filter(None, problems):
        raise CheckpointError(problem)


def _problem_of(path: str, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard, by what meta.json says of it."""
    try:
        # What comes from object storage can be damaged on its way.
        for _ in range(storage.READ_ATTEMPTS if storage.is_s3(path) else 1):
            num_bytes, value = storage.checksum(path)
            if num_bytes != shard["bytes"]:
                return f"{path}: {num_bytes} bytes instead of {shard['bytes']}"
            if value == shard["crc32"]:
                _pieces(path)
                return None
        return f"{path}: damaged (its crc32 differs)"
    except FileNotFoundError:
        return f"{path}: missing"
    except storage.NotAFileError as error:
        return str(error)
    except _MALFORMED as error:
        return f"{path}: damaged ({error})"


@dataclass(frozen=True)
class _Piece:
    """Consecutive elements of one flattened tensor in a shard."""

    shard: str  # its name
    kind: str
    tensor: str  # the name of what it belongs to
    first: int  # the place of the first element in the tensor
    count: int
    dtype: torch.dtype
    offset: int  # of its first byte in the shard

    @property
    def stop(self) -> int:
        """The place after the last element in the tensor."""
        return self.first + self.count


def _pieces(path: str) -> list[_Piece]:
    """What a shard holds; _MALFORMED if it is none."""
    for attempt in range(storage.READ_ATTEMPTS):
        try:
            version = storage.stat(path)
            most = min(version.num_bytes - 8, _MOST_HEAD_BYTES)
            size = int.from_bytes(storage.read_range(path, 0, 8, version), "little") if most >= 0 else 0
            if size > most:
                raise ValueError("it is no safetensors file")
            head = json.loads(storage.read_range(path, 8, size, version))
            body = 8 + size, version.num_bytes
            name = path.rpartition("/")[2]
            return [_piece(name, key, value, *body) for key, value in head.items() if key != "__metadata__"]
        except ValueError:
            if attempt + 1 == storage.READ_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _piece(shard: str, key: str, description: dict[str, Any], start: int, stop: int) -> _Piece:
    """A piece by its entry in the head of a shard whose tensors are in bytes [start, stop)."""
    place, (count,) = _KEY.fullmatch(key), description["shape"]
    if place is None or type(count) is not int or count < 0:
        raise ValueError(f"'{key}' {description['shape']} is not a piece of a tensor")
    dtype, (low, high) = DTYPES[description["dtype"]], description["data_offsets"]
    if not 0 <= low <= high <= stop - start or high - low != count * dtype.itemsize:
        raise ValueError(f"'{key}' {description['shape']} is not in bytes {low} to {high}")
    return _Piece(shard, place[1], place[2], int(place[3]), count, dtype, start + low)


class Reader:
    """An open checkpoint: any range of any tensor, whichever shard it lies in. A context manager.

    Of a checkpoint in object storage, the shards that are needed are copied to a temporary folder.
    """

    def __init__(self, location: str, meta: dict[str, Any]) -> None:
        self.location, self.meta = location, meta
        self._shards = {shard["name"]: shard for shard in meta["shards"]}
        self._stack = ExitStack()
        self._folder = location
        self._files: dict[str, int] = {}  # descriptors
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}  # of a kind and a tensor, sorted

    def __enter__(self) -> "Reader":
        if storage.is_s3(self.location):
            self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gmdist-checkpoint-"))
        with self._naming():
            for name in self._shards:
                for piece in _pieces(storage.join(self.location, name)):
                    self._pieces.setdefault((piece.kind, piece.tensor), []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: (piece.first, piece.count))
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
        except _MALFORMED as error:
            self._stack.close()
            raise CheckpointError(f"{self.location}: damaged ({error})") from error

    def _file(self, name: str) -> int:
        """The descriptor of an open shard."""
        if name not in self._files:
            path = f"{self._folder}/{name}"
            if storage.is_s3(self.location):
                shard = self._shards[name]
                content = storage.read_checked(storage.join(self.location, name), shard["bytes"], shard["crc32"])
                with storage.naming(path):
                    Path(path).write_bytes(content)
            self._files[name] = self._stack.enter_context(open(path, "rb", buffering=0)).fileno()
        return self._files[name]

    def has(self, kind: str, name: str) -> bool:
        """Whether there is anything of a tensor."""
        return (kind, name) in self._pieces

    def read(self, kind: str, name: str, start: int, values: Tensor) -> None:
        """Fill `values`, [count], with elements [start, start + count) of a flattened tensor.

        Raises:
            CheckpointError: any of them is not there or is there twice, or they are of another type.
        """
        count, filled, position = values.numel(), 0, start
        with self._naming():
            for piece in self._pieces.get((kind, name), []):
                low, high = max(piece.first, start), min(piece.stop, start + count)
                if low >= high:
                    continue
                if low < position:  # or it could make up for a hole in `filled`
                    raise CheckpointError(f"{self.location}: damaged (has elements of {name} ({kind}) twice)")
                if piece.dtype != values.dtype:
                    raise CheckpointError(f"{self.location}: {name} is {piece.dtype}; the model has {values.dtype}")
                part = values.detach()[low - start : high - start]
                _fill(part, self._file(piece.shard), piece.offset + (low - piece.first) * piece.dtype.itemsize)
                filled, position = filled + high - low, high
        if filled != count:
            raise CheckpointError(f"{self.location}: has {filled} of {count} elements of {name} ({kind})")


def _fill(values: Tensor, file: int, offset: int) -> None:
    """Fill a tensor [n] with the bytes of a file from an offset on; on the host they go straight where they belong."""
    on_host = (
        values if values.device.type == "cpu" and values.is_contiguous() else torch.empty_like(values, device="cpu")
    )
    rest = on_host.view(torch.uint8).numpy().data
    while rest:
        count = os.preadv(file, [rest], offset)
        if count == 0:
            raise ValueError("a shard was cut while it was being read")
        rest, offset = rest[count:], offset + count
    if on_host is not values:
        values.copy_(on_host)


def check_shapes(
    location: str,
    saved: dict[str, list[int]],
    shapes: dict[str, list[int]],
    remedy: str = "use the run's own config, or another run.dir",
) -> None:
    """CheckpointError, which ends with a remedy, if tensors that are saved there are not those of the model."""
    for name in sorted(set(saved) | set(shapes)):
        if saved.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{location}: does not fit this config: {name} is {saved.get(name, 'absent')} in the checkpoint and "
                f"{shapes.get(name, 'absent')} in the model; {remedy}"
            )
