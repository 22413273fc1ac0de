"""Metrics of a run: summed on the device, averaged over workers when they are logged, written as JSON lines."""

import json
import math
import os
import posixpath
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist import storage
from gmdist.errors import DataError
from gmdist.families.family import Metrics
from gmdist.workers import all_gathered_objects, rank, world_size

FILE_NAME = "metrics.jsonl"


class Averages:
    """Means of tensors over steps, samples and workers, without a host synchronisation until they are asked for."""

    def __init__(self, device: torch.device, *, finite_only: bool = True) -> None:
        """finite_only: what is NaN or infinite does not count, as one step must not hide all others."""
        self._device, self._finite_only = device, finite_only
        self._sums: dict[str, Tensor] = {}  # [2, ...]: of the values, of their weights

    def add(self, metrics: Metrics, weight: float = 1.0) -> None:
        """Add one observation of some metrics, that counts as much as its weight."""
        for name, value in metrics.items():
            value = value.detach().to(self._device, torch.float64)
            weights = torch.full_like(value, weight)
            if self._finite_only:
                weights = torch.where(value.isfinite(), weights, 0.0)
            sums = torch.stack([torch.where(weights > 0, value * weights, 0.0), weights])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def gather(self) -> list[dict[str, list[Any]]]:
        """What each worker has added, for a run that goes on from here: sum and weight by name. All workers call it."""
        return all_gathered_objects({name: sums.tolist() for name, sums in sorted(self._sums.items())})

    def restore(self, everyone: list[dict[str, list[Any]]]) -> None:
        """Begin with what was gathered, by as many workers or by others."""
        shares = [everyone[rank()]] if len(everyone) == world_size() else everyone if rank() == 0 else []
        self._sums = {}
        for name, sums in [item for share in shares for item in share.items()]:
            added = torch.tensor(sums, dtype=torch.float64, device=self._device)
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def reduce(self, *, begin_anew: bool = True) -> dict[str, float]:
        """The means of scalars, as `means` finds them."""
        return {name: mean.item() for name, mean in self.means(begin_anew=begin_anew).items()}

    def means(self, *, begin_anew: bool = True) -> dict[str, Tensor]:
        """The means over all workers that added something, on the host. Every worker calls it, with any names.

        NaN where nothing that was added is finite.
        """
        own = {name: list(sums.shape[1:]) for name, sums in self._sums.items()}
        shapes = {name: shape for others in all_gathered_objects(own) for name, shape in others.items()}
        if not shapes:
            return {}
        names = sorted(shapes)
        parts = [
            self._sums[name]
            if name in self._sums
            else torch.zeros(2, *shapes[name], dtype=torch.float64).to(self._device)
            for name in names
        ]
        both = torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], dim=1)
        if world_size() > 1:
            dist.all_reduce(both)
        if begin_anew:
            self._sums = {}
        sizes = [math.prod(shapes[name]) for name in names]
        means = (both[0] / both[1]).cpu().split(sizes)
        return {name: mean.view(shapes[name]) for name, mean in zip(names, means, strict=True)}


class MetricsLog:
    """A run's metrics.jsonl and TensorBoard events. Only rank 0 has one.

    In a local folder lines are appended as they come. Object storage cannot append: there both files are kept in a
    temporary folder and copied at every `flush`.
    """

    def __init__(self, run_dir: str, step: int) -> None:
        """Open a run's log, without the lines after `step`: those steps will be made again."""
        from torch.utils.tensorboard import SummaryWriter

        self._location = storage.join(run_dir, FILE_NAME)
        lines = [line for line in read_lines(run_dir) if line["step"] <= step]
        self._scratch = None
        folder = run_dir
        if storage.is_s3(run_dir):
            self._scratch = tempfile.TemporaryDirectory(prefix="gmdist-metrics-")
            folder = self._scratch.name
        self._run_dir, self._folder = run_dir, folder
        local = os.path.join(folder, FILE_NAME)
        storage.write(local, "".join(json.dumps(line) + "\n" for line in lines).encode())
        with storage.naming(local):
            self._file = open(local, "a", encoding="utf-8")
            self._events = SummaryWriter(folder, purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it has "step", numbers, and the order digest as text."""
        with storage.naming(self._location):
            # JSON has neither NaN nor infinity.
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in line.items()
            }
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Hand what was written to the disk, or to object storage."""
        with storage.naming(self._location):
            self._file.flush()
            if self._scratch is None:  # as checkpoints: after a power cut none is ahead of the metrics
                os.fsync(self._file.fileno())
            self._events.flush()
        if self._scratch is not None:
            for name in os.listdir(self._folder):
                storage.copy_from_local(os.path.join(self._folder, name), storage.join(self._run_dir, name))

    def close(self) -> None:
        """Flush and close both files."""
        self.flush()
        with storage.naming(self._location):
            self._file.close()
            self._events.close()
        if self._scratch is not None:
            self._scratch.cleanup()


class Quarantine:
    """The samples that were replaced because they could not be decoded, in a run's quarantine.jsonl."""

    def __init__(self, run_dir: str, most: int) -> None:
        """`most`: samples that may be replaced in the whole run, its earlier starts included."""
        self._location, self._most = storage.join(run_dir, "quarantine.jsonl"), most
        self._bad = {_sample(json.loads(line)) for line in self._written()}
        self.clear()

    def clear(self) -> None:
        """Forget what was not written yet."""
        self._lines: list[dict[str, Any]] = []

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Take in a worker's lines."""
        self._lines += lines

    def gather(self) -> list[dict[str, Any]]:
        """The lines of all workers since the last call, by sample number. Every worker calls it."""
        parts, self._lines = all_gathered_objects(self._lines), []
        lines = sorted((line for part in parts for line in part), key=lambda line: line["number"])
        self._bad.update(map(_sample, lines))
        return lines

    def check(self) -> None:
        """DataError on every worker if all have met too many: each for itself has seen its own share only."""
        if len(self._bad) > self._most:
            raise DataError(
                f"{len(self._bad)} samples cannot be decoded, more than the {self._most} that data.max_bad_fraction "
                f"allows; they are listed in {self._location}"
            )

    def write(self, lines: list[dict[str, Any]]) -> str:
        """Add lines to the file, and say so in one."""
        # Steps that are made again after a resume meet the same samples again.
        texts = dict.fromkeys([*self._written(), *(json.dumps(line) for line in lines)])
        storage.write(self._location, "".join(text + "\n" for text in texts).encode())
        first = lines[0]
        return (
            f"replaced {len(lines)} undecodable samples ({first['shard']}: {first['sample']}: {first['reason']}); "
            f"they are listed in {self._location}"
        )

    def _written(self) -> list[str]:
        return storage.read(self._location).decode().splitlines() if storage.exists(self._location) else []


def _sample(line: dict[str, Any]) -> tuple[Any, ...]:
    """Which sample a line of the quarantine is about, wherever its data set has moved since."""
    return line.get("domain"), line.get("data_set", 0), posixpath.basename(line["shard"]), line["sample"]


def read_lines(run_dir: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; [] where there is none. A line that a kill cut short is dropped."""
    try:
        content = storage.read(storage.join(run_dir, FILE_NAME)).decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
