"""Sweeps for tests, and results for them without any training."""

from collections.abc import Callable
from typing import Any

from gmdist.sweep.config import SchedulerConfig, SweepConfig
from gmdist.sweep.trials import Plan, Result, Stretch

RANGES = {"optim.net.lr": {"log_uniform": [1e-4, 1e-1]}, "family.width": {"choice": [8, 16, 32]}}


def plan_of(num_steps: int = 90, space: dict[str, Any] | None = None, **settings: Any) -> Plan:
    """A plan of a sweep; keys of its scheduler are given as scheduler_KEY."""
    scheduler = {key.removeprefix("scheduler_"): settings.pop(key) for key in list(settings) if "scheduler_" in key}
    sweep = SweepConfig("test/fid", space or RANGES, scheduler=SchedulerConfig(**scheduler), **settings)
    sweep.validate(num_steps, 1)
    return Plan.of(sweep, num_steps)


def found(stretch: Stretch) -> Result:
    """A metric that falls with training, the faster the nearer the learning rate is to 0.01."""
    lr = stretch.settings["optim.net.lr"]
    return Result(abs(lr - 0.01) + 1.0 / stretch.last_step + 1e-3 * stretch.trial)


def at_once(measure: Callable[[Stretch], Result] = found) -> Callable[[Stretch], Callable[[], Result]]:
    """What begins stretches that have ended already."""
    return lambda stretch: lambda: measure(stretch)
