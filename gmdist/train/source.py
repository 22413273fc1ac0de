"""What the trainer knows of data: batches, in an order, from any place of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gmdist.families.family import Batch


class Loaded(Protocol):
    """A part of a batch, as the loader gives it."""

    def batch_on(self, device: torch.device) -> Batch:
        """The samples."""

    @property
    def digest(self) -> int:
        """Their order digest."""

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """The samples that were replaced because they could not be decoded."""


class Source(Protocol):
    """A data set as one worker reads it."""

    num_samples: int
    max_bad: int  # samples that cannot be decoded and may be replaced, in the whole run

    def batches(self, start: int) -> Iterator[Loaded]:
        """This worker's part of one global batch after another, from a sample number on."""

    def sweep(self, batch_size: int) -> Iterator[Loaded]:
        """Every sample once, over all workers."""

    def first(self, count: int) -> Loaded:
        """The first samples of the order, the same on every worker."""

    def counters(self) -> dict[str, float]:
        """What reading has cost this worker since the process began: bytes, requests, retries, stalls."""

    def notes(self) -> list[str]:
        """Lines that the user should read; each is given once."""


@dataclass(frozen=True)
class _Moved:
    """A part of a batch on its way to a GPU."""

    loaded: Loaded
    batch: Batch
    arrival: torch.cuda.Event

    def batch_on(self, device: torch.device) -> Batch:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.arrival)
        for tensor in self.batch.values():
            if tensor.is_cuda:
                tensor.record_stream(stream)  # or its memory would be given away before the step is done with it
        return self.batch

    @property
    def digest(self) -> int:
        return self.loaded.digest

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        return self.loaded.quarantined


def moved_ahead(parts: Iterator[Loaded], device: torch.device) -> Iterator[Loaded]:
    """Parts, which never end, each on its way to the GPU while the step before it computes."""
    if device.type != "cuda":
        yield from parts
        return
    stream = torch.cuda.Stream(device)
    before: _Moved | None = None
    for loaded in parts:
        with torch.cuda.stream(stream):
            moved = _Moved(loaded, loaded.batch_on(device), stream.record_event())
        if before is not None:
            yield before
        before = moved


def split(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into micro-batches of `size` samples, which divides it: every so many-th sample is of the same one.

    So workers share a batch, too. Losses that compare samples compare the same ones however a batch is cut.
    """
    count = len(batch["key"]) // size
    return [{name: tensor[i::count].contiguous() for name, tensor in batch.items()} for i in range(count)]
