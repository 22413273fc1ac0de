"""Batches in memory, and a run of the trainer on them."""

import dataclasses
import gc
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmdist.families.family import Family
from gmdist.train.config import TrainConfig
from gmdist.train.optim import OptimConfig
from gmdist.train.state import RunIdentity
from gmdist.train.trainer import Trainer


@dataclasses.dataclass
class Part:
    """A part of a batch, as the trainer takes it."""

    batch: dict[str, Tensor]
    digest: int = 0
    quarantined: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        """The samples."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.batch.items()}


class Synthetic:
    """A data set of a few batches, again and again."""

    num_samples = 1 << 30
    max_bad = 0

    def __init__(self, batch_size: int, make: Callable[[int], dict[str, Tensor]]) -> None:
        """`make` draws so many samples."""
        self.batch_size, self.make = batch_size, make
        self.parts = [self.first(batch_size) for _ in range(4)]

    def first(self, count: int) -> Part:
        """Some samples."""
        return Part(self.make(count) | {"key": torch.arange(count)})

    def batches(self, start: int) -> Iterator[Part]:
        """Batches without end."""
        return itertools.cycle(self.parts)

    def counters(self) -> dict[str, float]:
        """Nothing is read."""
        return {}

    def notes(self) -> list[str]:
        """Nothing is to be said."""
        return []


def train(
    family: Family, config: TrainConfig, source: Synthetic, device: torch.device, optim: dict[str, OptimConfig]
) -> list[dict[str, Any]]:
    """The lines of metrics of a run with an optimizer for each trained child.

    The device's memory is free and uncounted before.
    """
    if device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="gmdist-gpu-") as run:
        identity = RunIdentity("in_memory", source.batch_size)
        trainer = Trainer(family, config, optim, identity, run, source, device=device)
        try:
            trainer.fit()
        finally:
            trainer.close()
        return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def free_memory() -> None:
    """Give back what no tensor has."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """What an error says first, for a column of a table."""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0].replace('|', '/')}"
