"""What the workers of a run agree on between steps, and the time that steps take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


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

    def seconds_a_step(self, step: int) -> float:
        """The mean since the start, pauses included: what the time left is estimated from."""
        return (time.perf_counter() - self._start) / max(step - self._first_step, 1)


class Control:
    """Agreement of all workers, once a step, on whether to stop and whether a save has failed.

    The answer comes a step late: a reduction on the host runs while the step computes, and no device is waited for.
    """

    def __init__(self) -> None:
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if distributed else None
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._work: Any = None

    def exchange(self, stop: bool, failed: bool) -> tuple[bool, bool]:
        """Put in this worker's flags, and get whether any worker had them set at the step before."""
        mine = torch.tensor([stop, failed], dtype=torch.int32)
        if self._group is None:
            return stop, failed
        if self._work is not None:
            self._work.wait()
        answer = self._flags.tolist()
        self._flags = mine
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return bool(answer[0]), bool(answer[1])

    def close(self) -> None:
        """Finish the reduction under way."""
        if self._work is not None:
            self._work.wait()
