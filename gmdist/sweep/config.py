"""What a sweep searches, how, and which of its settings go together."""

import math
from dataclasses import dataclass, field
from typing import Any

from gmdist.checks import one_of
from gmdist.errors import ConfigError, check_int64
from gmdist.sweep.space import Domain, parse_space

SEARCHES = ("random", "grid", "tpe")
SCHEDULERS = ("none", "asha", "pbt")
_MAX_TRIALS = 10_000


@dataclass
class SchedulerConfig:
    """How far each trial trains."""

    name: str = "none"  # none: to its end; asha: the better ones further; pbt: the worse ones go on from better ones
    first_step: int | None = None  # of asha: where trials are first compared
    reduction: int = 3  # of asha: one in so many goes on, and so many times as far as it has come
    interval_steps: int | None = None  # of pbt: between comparisons
    quantile: float = 0.25  # of pbt: this share of the trials goes on from the best such share
    resample: float = 0.25  # of pbt: how often a value is drawn anew, and not a fifth off


@dataclass
class SweepConfig:
    """A search over keys of a config."""

    metric: str  # of the evaluation, as "test/fid"
    space: dict[str, Any]  # dotted key: {uniform, log_uniform or integer: [low, high]}, or {choice or grid: [...]}
    mode: str = "min"  # min or max: which metric is best
    search: str = "random"  # random; grid: every combination of lists; tpe: by Optuna, from what trials before it found
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_trials: int | None = None  # None: as many as a grid has
    concurrency: int | None = None  # trials at once; None: as many as the cluster has room for at the first start
    seed: int = 0  # of what is drawn from the space

    @property
    def domains(self) -> dict[str, Domain]:
        """The domains of the space, by key."""
        return parse_space(self.space)

    @property
    def grid_size(self) -> int:
        """The combinations of those keys whose values are gone through."""
        kinds = ("choice", "grid") if self.search == "grid" else ("grid",)
        return math.prod(len(domain.values) for domain in self.domains.values() if domain.kind in kinds)

    @property
    def trials(self) -> int:
        """How many trials there are."""
        return self.grid_size if self.num_trials is None else self.num_trials

    def stops(self, num_steps: int) -> list[int]:
        """The steps at which a trial of so many steps is compared with others, its end the last."""
        scheduler = self.scheduler
        if scheduler.name == "asha":
            assert scheduler.first_step is not None
            stops = []
            step = scheduler.first_step
            while step < num_steps:
                stops.append(step)
                step *= scheduler.reduction
            return [*stops, num_steps]
        if scheduler.name == "pbt":
            assert scheduler.interval_steps is not None
            return [*range(scheduler.interval_steps, num_steps, scheduler.interval_steps), num_steps]
        return [num_steps]

    def validate(self, num_steps: int, evaluate_every: int | None) -> None:
        """ConfigError for settings that cannot be, with trials of so many steps that are evaluated so often."""
        if problem := one_of(("min", "max"), mode=self.mode) or one_of(SEARCHES, search=self.search):
            raise ConfigError(f"sweep.{problem}")
        if problem := one_of(SCHEDULERS, name=self.scheduler.name):
            raise ConfigError(f"sweep.scheduler.{problem}")
        if not self.metric.startswith("test/"):
            raise ConfigError(f"sweep.metric: '{self.metric}'; must be one of the evaluation, as test/fid")
        check_int64("sweep.seed", self.seed)
        self._validate_search()
        self._validate_scheduler(num_steps)
        for step in self.stops(num_steps):
            if evaluate_every is None or (step % evaluate_every and step != num_steps):
                raise ConfigError(
                    f"train.evaluate_every: {evaluate_every}; trials are compared at step {step}: "
                    "set it to a divisor of that"
                )

    def _validate_search(self) -> None:
        domains = self.domains
        ranges = [key for key, domain in domains.items() if not domain.is_list]
        if self.search == "grid" and ranges:
            raise ConfigError(
                f"sweep.search: 'grid'; '{ranges[0]}' is not a list of values: give it a choice or a grid"
            )
        if self.search == "tpe":
            grids = [key for key, domain in domains.items() if domain.kind == "grid"]
            if grids:
                raise ConfigError(
                    f"sweep.search: 'tpe'; '{grids[0]}' is a grid, which is gone through: make it a choice"
                )
        has_grid = self.search == "grid" or any(domain.kind == "grid" for domain in domains.values())
        if self.num_trials is None and (self.search == "tpe" or ranges or not has_grid):
            raise ConfigError("sweep.num_trials: missing; only a grid has an end of its own")
        if not 1 <= self.trials <= _MAX_TRIALS:
            raise ConfigError(f"sweep.num_trials: {self.trials}; must be from 1 to {_MAX_TRIALS}")
        if self.search == "grid" and self.trials > self.grid_size:
            raise ConfigError(f"sweep.num_trials: {self.trials}; the grid has {self.grid_size}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(
                f"sweep.concurrency: {self.concurrency}; must be at least 1, or null for all there is room for"
            )

    def _validate_scheduler(self, num_steps: int) -> None:
        scheduler = self.scheduler
        for name, key in (("asha", "first_step"), ("pbt", "interval_steps")):
            value = getattr(scheduler, key)
            if scheduler.name != name and value is not None:
                raise ConfigError(f"sweep.scheduler.{key}: {value}; is for scheduler '{name}', not '{scheduler.name}'")
            if scheduler.name == name and (value is None or not 1 <= value < num_steps):
                raise ConfigError(
                    f"sweep.scheduler.{key}: {value}; must be from 1 to below train.num_steps, {num_steps}"
                )
        if scheduler.reduction < 2:
            raise ConfigError(f"sweep.scheduler.reduction: {scheduler.reduction}; must be at least 2")
        if not 0.0 < scheduler.quantile <= 0.5:
            raise ConfigError(f"sweep.scheduler.quantile: {scheduler.quantile}; must be above 0 and at most 0.5")
        if not 0.0 <= scheduler.resample <= 1.0:
            raise ConfigError(f"sweep.scheduler.resample: {scheduler.resample}; must be from 0 to 1")
        if scheduler.name == "pbt" and self.search != "random":
            raise ConfigError(
                f"sweep.search: '{self.search}' with scheduler 'pbt', which changes values itself; use random"
            )
        if scheduler.name == "pbt" and self.trials < 2:
            raise ConfigError(f"sweep.num_trials: {self.trials}; scheduler 'pbt' needs at least 2")
