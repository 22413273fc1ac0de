"""What the workers of a run agree on between steps, and the time that steps take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist.workers import world_size


class Clock:
    """The time that steps take, without the pauses between them."""

    def __init__(self, step: int) -> None:
        self._first_step = self._lap_step = step
        self._start = self._lap_start = time.perf_counter()
        self._paused_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out of the laps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap."""
        now = time.perf_counter()
        steps, seconds = step - self._lap_step, now - self._lap_start - self._paused_s
        self._lap_step, self._lap_start, self._paused_s = step, now, 0.0
        return steps, seconds

    def rewind(self, steps: int) -> None:
        """Go back by so many steps, which will be made again: they took their time all the same."""
        self._first_step -= steps
        self._lap_step -= steps

    def seconds_a_step(self, step: int) -> float:
        """The mean since the start, pauses included: what the time left is estimated from."""
        return (time.perf_counter() - self._start) / max(step - self._first_step, 1)


class Control:
    """Agreement of all workers, once a step: on whether to stop, to save, and whether a save has failed.

    The answer comes a step late: a reduction on the host runs while the step computes, and no device is waited for.
    """

    _FLAGS = 3

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._flags = torch.zeros(self._FLAGS, dtype=torch.int32)
        self._work: Any = None

    def exchange(self, stop: bool, failed: bool, save: bool) -> tuple[bool, bool, bool]:
        """Put in this worker's flags, and get whether any worker had them set at the step before."""
        if self._group is None:
            return stop, failed, save
        if self._work is not None:
            self._work.wait()
        answer = self._flags.tolist()
        self._flags = torch.tensor([stop, failed, save], dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return bool(answer[0]), bool(answer[1]), bool(answer[2])

    def close(self) -> None:
        """Finish the reduction under way."""
        if self._work is not None:
            self._work.wait()


def is_sound(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint was not made in the middle of updates that were left out: one to go back to."""
    return meta["skips"]["in_a_row"] == 0


class Skips:
    """Updates that were left out because a gradient was not finite: how many in a row, and since which sample.

    All workers have the same gradients, so all come to the same count. A step is looked at when the next one has been
    started, so that no device is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.load({"total": 0, "in_a_row": 0, "since": 0})

    def state(self) -> dict[str, int]:
        """What a run that goes on has to know."""
        self.look()
        return {"total": self.total, "in_a_row": self.in_a_row, "since": self.since}

    def load(self, state: dict[str, int]) -> None:
        """Go on from a state."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        self.since = state["since"]  # number of the first sample of the first step in the row
        self._noted: int | None = None  # the first sample of the step that was not looked at yet

    def note(self, norms: list[Tensor], first: int) -> Tensor:
        """Take in a step's gradient norms, and the number of its first sample.

        Returns:
            Whether any norm is not finite: a bool on the device.
        """
        self.look()
        is_bad = torch.zeros((), dtype=torch.bool, device=self._device)
        if norms:
            is_bad = ~torch.stack([norm.to(self._device) for norm in norms]).isfinite().all()
            self._flag.copy_(is_bad, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._noted = first
        return is_bad

    def look(self) -> int:
        """How many in a row, up to the last step."""
        if self._noted is None:
            return self.in_a_row
        if self._copied is not None:
            self._copied.synchronize()
        if self._flag.item():
            self.since = self.since if self.in_a_row else self._noted
            self.in_a_row += 1
            self.total += 1
        else:
            self.in_a_row = 0
        self._noted = None
        return self.in_a_row
