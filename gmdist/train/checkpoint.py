"""Checkpoints: one safetensors shard a worker, and meta.json written last.

A shard holds flat fp32 fragments under names that say where they belong ("param|denoiser.conv_in.weight|0"), so a
checkpoint can be loaded by any number of workers at any ZeRO stage. It is complete when meta.json lists every shard
with its size and crc32. Nothing in it depends on the time or the place of writing: equal runs write equal bytes.
"""

import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from gmdist import storage
from gmdist.errors import CheckpointError, GmdistError, StorageError

FORMAT_VERSION = 1
META_NAME = "meta.json"

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


def find_newest(run_dir: str) -> tuple[Found | None, list[str]]:
    """The newest complete and sound checkpoint of a run.

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
            verify(location, meta)
            return Found(location, meta, warnings), warnings
        except CheckpointError as error:
            warnings.append(f"skipped an unusable checkpoint: {error}")
    if any(storage.exists(storage.join(folder, folder_name(step), META_NAME)) for step in steps):
        # Something else than an interrupted save did this; starting at step 0 would throw the run away.
        raise CheckpointError(
            f"{folder}: none of the checkpoints can be used ({warnings[0].partition(': ')[2]}); restore one, "
            "or set run.overwrite=true to start anew"
        )
    return None, warnings


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
    for shard in meta["shards"]:
        path = storage.join(location, shard["name"])
        try:
            num_bytes, crc32 = storage.checksum(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: missing") from error
        if num_bytes != shard["bytes"]:
            raise CheckpointError(f"{path}: {num_bytes} bytes instead of {shard['bytes']}")
        if crc32 != shard["crc32"]:
            raise CheckpointError(f"{path}: damaged (its crc32 differs)")


class Reader:
    """An open checkpoint: any range of any tensor, whichever shard it lies in. A context manager."""

    def __init__(self, location: str, meta: dict[str, Any]) -> None:
        self.location, self.meta = location, meta
        self._stack = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}

    def __enter__(self) -> "Reader":
        folder = self.location
        try:
            if storage.is_s3(folder):
                folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gmdist-checkpoint-"))
                for shard in self.meta["shards"]:
                    content = storage.read(storage.join(self.location, shard["name"]))
                    Path(folder, shard["name"]).write_bytes(content)
            for shard in self.meta["shards"]:
                file = self._stack.enter_context(safe_open(f"{folder}/{shard['name']}", "pt"))
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kind, _, place = key.partition("|")
                    name, _, start = place.rpartition("|")
                    count = file.get_slice(key).get_shape()[0]
                    self._pieces.setdefault((kind, name), []).append((int(start), count, file, key))
        except FileNotFoundError as error:  # the run goes on, and this one was the oldest
            self._stack.close()
            raise CheckpointError(f"{self.location}: deleted while it was being read") from error
        except (SafetensorError, ValueError) as error:
            self._stack.close()
            raise CheckpointError(f"{self.location}: damaged ({error})") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self, kind: str) -> list[str]:
        """The names of the tensors of one kind."""
        return [name for stored, name in self._pieces if stored == kind]

    def read(self, kind: str, name: str, start: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Elements [start, start + count) of a flattened tensor, [count]; CheckpointError if any is not there."""
        result = torch.empty(count, dtype=dtype)
        filled = 0
        for first, size, file, key in self._pieces.get((kind, name), []):
            low, high = max(first, start), min(first + size, start + count)
            if low < high:
                part = file.get_slice(key)[low - first : high - first]
                if part.dtype != dtype:
                    raise CheckpointError(f"{self.location}: {name} is {part.dtype}; the model has {dtype}")
                result[low - start : high - start] = part
                filled += high - low
        if filled != count:
            raise CheckpointError(f"{self.location}: has {filled} of {count} elements of {name} ({kind})")
        return result


def check_shapes(location: str, meta: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """CheckpointError if the checkpoint's tensors are not those of the model."""
    saved = meta["shapes"]
    for name in sorted(set(saved) | set(shapes)):
        if saved.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{location}: does not fit this config: {name} is {saved.get(name, 'absent')} in the checkpoint and "
                f"{shapes.get(name, 'absent')} in the model; use the run's own config, or another run.dir"
            )


class Saver:
    """Writes checkpoints in the background; every worker calls it at the same steps."""

    def __init__(self, run_dir: str, keep: int | None) -> None:
        """Prepare to save.

        Args:
            run_dir: the run's folder.
            keep: how many of the newest checkpoints stay; None keeps all.
        """
        self._folder = storage.join(run_dir, "checkpoints")
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None
        # The thread needs its own group: collectives of the step go on while it writes.
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if distributed else None
        self._rank = dist.get_rank() if distributed else 0
        self._world_size = dist.get_world_size() if distributed else 1

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the tensors to host memory and write them in the background.

        Args:
            step: names the checkpoint.
            tensors: this worker's, 1-D, by `tensor_key`.
            meta: what meta.json says beside the shards; rank 0's counts.

        Raises:
            CheckpointError: the previous save failed.
        """
        self.wait()
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        self._pending = self._thread.submit(self._write, step, copies, meta)

    def failed(self) -> bool:
        """Whether the save that is under way is known to have failed."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save that is under way; CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        location = storage.join(self._folder, folder_name(step))
        name = f"shard-{self._rank:05d}-of-{self._world_size:05d}.safetensors"

        def write_shard() -> dict[str, Any]:
            content = save_safetensors(tensors)
            storage.write(storage.join(location, name), content)
            return {"name": name, "bytes": len(content), "crc32": zlib.crc32(content)}

        def complete(shards: list[dict[str, Any]]) -> None:
            content = {"format": FORMAT_VERSION, "step": step, **meta, "shards": shards}
            storage.write_json(storage.join(location, META_NAME), content)

        # What is left of an earlier, interrupted save of this step goes first.
        self._agree(lambda: storage.delete_tree(location) if self._rank == 0 else None, location)
        shards = self._agree(write_shard, location)
        self._agree(lambda: complete(shards) if self._rank == 0 else None, location)
        if self._rank == 0 and self._keep is not None:
            self._prune(step)

    def _agree(self, action: Callable[[], Any], location: str) -> list[Any]:
        """Do something on every worker and gather the results; where one fails, all raise, and no part stays."""
        outcome: tuple[Any, str | None]
        try:
            outcome = action(), None
        except (OSError, GmdistError, SafetensorError) as error:
            outcome = None, str(error)
        outcomes = [outcome]
        if self._group is not None:
            outcomes = [outcome] * self._world_size
            dist.all_gather_object(outcomes, outcome, group=self._group)
        problems = [problem for _, problem in outcomes if problem is not None]
        if problems:
            if self._rank == 0:
                self._discard(location)
            raise CheckpointError(f"cannot save a checkpoint: {problems[0]}; earlier checkpoints are as they were")
        return [result for result, _ in outcomes]

    def _discard(self, location: str) -> None:
        with suppress(StorageError):  # the storage is what failed; an incomplete checkpoint is recognised and skipped
            storage.delete_tree(location)

    def _prune(self, newest: int) -> None:
        steps = [step_of(name) for name in storage.list_names(self._folder)]
        old = sorted(step for step in steps if step is not None and step <= newest)
        assert self._keep is not None
        for step in old[: -self._keep]:
            storage.delete_tree(storage.join(self._folder, folder_name(step)))
