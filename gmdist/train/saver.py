"""Writing checkpoints in the background: a step waits for the copy to host memory, and for nothing else."""

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist import storage
from gmdist.checksum import crc32
from gmdist.errors import CheckpointError, GmdistError, SaveError, StorageError
from gmdist.train.checkpoint import DTYPES, META_NAME, folder_name, read_meta, step_of
from gmdist.train.meta import FORMAT_VERSION, shard_name
from gmdist.workers import all_gathered_objects, rank, world_size

# The names of safetensors (its format is described at https://huggingface.co/docs/safetensors).
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED_BYTES = 8


class Staging:
    """Host memory that is laid out as a safetensors file, so that tensors are copied once, to where they are written.

    It is used again for each save: fresh memory costs as much time as the copy.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.layout = layout(tensors)
        head: dict[str, Any] = {}
        size = 0
        # Those of large elements first, so that all are aligned.
        for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
            tensor = tensors[key]
            stop = size + tensor.numel() * tensor.element_size()
            head[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [size, stop]}
            size = stop
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED_BYTES)
        start = 8 + len(text)
        on_device = any(tensor.is_cuda for tensor in tensors.values())
        self._memory = torch.zeros(start + size, dtype=torch.uint8, pin_memory=on_device)
        self._memory[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._places = {
            key: self._memory[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            .view(tensors[key].dtype)
            .view(tensors[key].shape)
            for key, entry in head.items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of the same layout."""
        for key, place in self._places.items():
            place.copy_(tensors[key], non_blocking=True)
        if self._memory.is_pinned():
            torch.cuda.synchronize()

    def content(self) -> memoryview:
        """The file."""
        return self._memory.numpy().data


def layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """What the places of tensors in a file depend on."""
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


class Saver:
    """Writes checkpoints; every worker calls it at the same steps."""

    def __init__(
        self,
        run_dir: str,
        keep: int | None,
        is_sound: Callable[[dict[str, Any]], bool] = lambda meta: True,
        best_metric: str | None = None,
        begun_at: int = 0,
        *,
        largest: bool = False,
    ) -> None:
        """Prepare to save.

        Args:
            run_dir: the run's folder.
            keep: how many of the newest checkpoints stay; None keeps all.
            is_sound: whether a run could go back to one with such a meta.json; the newest such one stays too.
            best_metric: of the evaluation; the checkpoint with its best value stays too.
            begun_at: the step that the run goes on from. Later checkpoints that are there cannot be used, or it would
                go on from them: they do not count among those that stay.
            largest: whether the best value is the largest.
        """
        self._folder = storage.join(run_dir, "checkpoints")
        self._keep, self._is_sound, self._best_metric, self._largest = keep, is_sound, best_metric, largest
        self._begun_at = begun_at
        self._complete: dict[int, tuple[bool, float]] = {}  # by step: whether it is sound, and the metric's value
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._staging: Future[Staging] | None = None
        self._pending: Future[None] | None = None
        # The thread needs its own group: collectives of the step go on while it writes.
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Get the memory for such tensors in the background, before the first save."""
        self._staging = self._thread.submit(Staging, dict(tensors))

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the tensors to host memory and write them in the background.

        Args:
            step: names the checkpoint.
            tensors: this worker's, 1-D, by `tensor_key`.
            meta: what meta.json says beside the shards; rank 0's counts.

        Raises:
            SaveError: the previous save failed.
        """
        self.wait()
        if self._staging is None or self._staging.result().layout != layout(tensors):
            self.prepare(tensors)
        assert self._staging is not None
        staging = self._staging.result()
        staging.fill(tensors)
        self._pending = self._thread.submit(self._write, step, staging.content(), meta)

    def failed(self) -> bool:
        """Whether the save that is under way is known to have failed."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save that is under way.

        Raises:
            SaveError: it failed.
            StorageError: it is complete, but an older checkpoint cannot be deleted.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, content: memoryview, meta: dict[str, Any]) -> None:
        location = storage.join(self._folder, folder_name(step))
        name = shard_name(rank(), world_size())

        def write_shard() -> dict[str, Any]:
            storage.write(storage.join(location, name), content)
            return {"name": name, "bytes": len(content), "crc32": crc32(content)}

        def complete(shards: list[dict[str, Any]]) -> None:
            whole = {"format": FORMAT_VERSION, "step": step, **meta, "shards": shards}
            storage.write_json(storage.join(location, META_NAME), whole)

        # What is left of an earlier, interrupted save of this step goes first.
        self._agree(lambda: self._delete(step) if rank() == 0 else None, step)
        shards = self._agree(write_shard, step)
        self._agree(lambda: complete(shards) if rank() == 0 else None, step)
        if rank() == 0 and self._keep is not None:
            self._prune(step, self._keep)

    def _agree(self, action: Callable[[], Any], step: int) -> list[Any]:
        """Do something on every worker and gather the results; where one fails, all raise, and no part stays."""
        outcome: tuple[Any, str | None]
        try:
            outcome = action(), None
        except (OSError, GmdistError) as error:
            outcome = None, str(error)
        outcomes = all_gathered_objects(outcome, self._group)
        problems = [problem for _, problem in outcomes if problem is not None]
        if problems:
            if rank() == 0:
                with suppress(StorageError):  # the storage is what failed; an incomplete checkpoint is skipped
                    self._delete(step)
            raise SaveError(f"cannot save a checkpoint: {problems[0]}; earlier checkpoints are as they were")
        return [result for result, _ in outcomes]

    def _delete(self, step: int) -> None:
        """Delete a checkpoint; one that is deleted in part is incomplete, not damaged."""
        storage.delete_tree(storage.join(self._folder, folder_name(step)), first=META_NAME)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps; while nothing is being saved."""
        assert self._pending is None
        if rank() == 0:
            for later in self._steps():
                if later > step:
                    self._complete.pop(later, None)
                    self._delete(later)

    def _steps(self) -> list[int]:
        steps = [step_of(name) for name in storage.list_names(self._folder)]
        return sorted(step for step in steps if step is not None)

    def _prune(self, newest: int, keep: int) -> None:
        complete: dict[int, tuple[bool, float]] = {}
        for step in [step for step in self._steps() if step <= newest]:
            found = self._complete.get(step)
            if found is None and (step == newest or step <= self._begun_at):
                found = self._look_at(step)
            if found is None:
                self._delete(step)  # left by a save that was interrupted, or damaged
            else:
                complete[step] = found
        kept = set(sorted(complete)[-keep:])
        kept |= set([step for step, (sound, _) in sorted(complete.items()) if sound][-1:])
        sign = 1.0 if self._largest else -1.0
        judged = [(sign * value, step) for step, (_, value) in complete.items() if math.isfinite(value)]
        kept |= {max(judged)[1]} if judged else set()
        for step in complete.keys() - kept:
            self._delete(step)
        self._complete = {step: complete[step] for step in kept}

    def _look_at(self, step: int) -> tuple[bool, float] | None:
        """What is to be known of a checkpoint; None if it is incomplete."""
        try:
            meta = read_meta(storage.join(self._folder, folder_name(step)))
        except CheckpointError:
            return None
        value = math.nan if self._best_metric is None else meta["evaluation"].get(self._best_metric, math.nan)
        return self._is_sound(meta), value
