"""What a sweep is made of: stretches of trials, and what came of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gmdist.sweep.config import SweepConfig
from gmdist.sweep.space import Domain, keyed


@dataclass(frozen=True)
class Plan:
    """A sweep over trials of so many steps."""

    sweep: SweepConfig
    domains: dict[str, Domain]  # of each key of the space
    stops: tuple[int, ...]  # steps at which trials are compared; the last is a trial's end

    @classmethod
    def of(cls, sweep: SweepConfig, num_steps: int) -> "Plan":
        """The plan of a sweep that is sound."""
        return cls(sweep, sweep.domains, tuple(sweep.stops(num_steps)))

    def source(self, *purpose: object) -> random.Random:
        """Random numbers for a purpose."""
        return keyed(self.sweep.seed, *purpose)


@dataclass(frozen=True)
class Stretch:
    """A part of a trial's training, from one comparison to the next."""

    trial: int
    number: int  # of the trial's stretches
    first_step: int
    last_step: int
    settings: dict[str, Any]  # value of each key of the space
    run: str  # name of the run's folder, among those of the sweep
    donor: str | None = None  # the run whose checkpoint of the first step it goes on from; None: its own

    @property
    def num_steps(self) -> int:
        """Steps that it takes."""
        return self.last_step - self.first_step


@dataclass(frozen=True)
class Result:
    """What came of a stretch."""

    metric: float | None  # at its last step; None: it failed
    error: str | None = None  # why it failed
    images_per_s: float | None = None
    seconds: float | None = None  # that it took, with the start of its workers


@dataclass(frozen=True)
class Finished:
    """A stretch that has ended."""

    stretch: Stretch
    result: Result


@dataclass(frozen=True)
class History:
    """What has been found out, in the order in which the sweep takes it in; and what is under way."""

    finished: Sequence[Finished] = ()
    running: Sequence[Stretch] = ()

    @property
    def begun(self) -> list[Stretch]:
        """All stretches."""
        return [*(finished.stretch for finished in self.finished), *self.running]

    def of(self, trial: int) -> list[Finished]:
        """What a trial has behind it."""
        return [finished for finished in self.finished if finished.stretch.trial == trial]


def best_first(plan: Plan, finished: Sequence[Finished]) -> list[Finished]:
    """Those that did not fail, the best first; the earlier trial where two are equal."""

    def rank(one: Finished) -> tuple[float, int]:
        assert one.result.metric is not None
        return (one.result.metric if plan.sweep.mode == "min" else -one.result.metric), one.stretch.trial

    return sorted((one for one in finished if one.result.metric is not None), key=rank)
