"""A sweep from its config file: the search, and the config of each trial."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from gmdist import storage
from gmdist.config import Config, compose, from_tree, load, merged
from gmdist.errors import ConfigError
from gmdist.structured import structured
from gmdist.sweep.config import SweepConfig
from gmdist.sweep.space import keyed
from gmdist.sweep.trials import Plan

_COMBINATIONS = 32  # with which a value is tried before it is refused
_SHARED = ("num_steps", "seed", "evaluate_every")  # of `train`: without them trials cannot be compared
RUNS = "trials"  # the folder of the trials' runs, in that of the sweep


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked."""

    tree: dict[str, Any]  # the config's plain values
    bases: tuple[Config, ...]  # of possible trials, each listed value in one; name, cluster, folder are the sweep's
    plan: Plan

    @property
    def base(self) -> Config:
        """The config of one possible trial."""
        return self.bases[0]

    @property
    def folder(self) -> str:
        """Where the sweep's record and its runs are."""
        return self.base.run.dir

    def run_dir(self, run: str) -> str:
        """The folder of a run."""
        return storage.join(self.folder, RUNS, run)

    def config_of(self, settings: dict[str, Any], run_dir: str) -> Config:
        """The config of a run with these values; ConfigError where they cannot be."""
        return _with(self.tree, settings | {"run.dir": run_dir, "run.overwrite": False})


def load_sweep(path: str, overrides: Sequence[str] | None = None) -> Sweep:
    """Read a config file with a `sweep:` section, apply overrides, and check the whole and every listed value.

    Raises:
        ConfigError: as for a run; and for a space, a search or a scheduler that cannot be.
    """
    tree = compose(path, overrides)
    values = tree.pop("sweep", None)
    if values is None:
        raise ConfigError(f"{path}: sweep: missing; `gmdist train` takes the config of a single run")
    sweep: SweepConfig = structured(SweepConfig, values, "sweep")
    domains = sweep.domains
    first = {key: domain.values[0] for key, domain in domains.items()}
    for key in first:
        section = key.partition(".")[0]
        if section not in ("family", "data", "optim", "train", "evaluation"):
            raise ConfigError(
                f"sweep.space.{key}: cannot be searched over; keys of family, data, optim, train and evaluation can"
            )
        if section == "data" and sweep.scheduler.name == "pbt":
            raise ConfigError(
                f"sweep.space.{key}: does not go with scheduler 'pbt', under which a trial goes on from another's "
                "checkpoint, with its samples"
            )
    drawn = [{key: domain.draw(keyed(i, key)) for key, domain in domains.items()} for i in range(_COMBINATIONS)]
    bases = [_combined(tree, key, value, (first, *drawn)) for key, domain in domains.items() for value in domain.values]
    base = bases[0]
    for name in _SHARED:
        found = {getattr(config.train, name) for config in bases}
        if len(found) > 1:
            raise ConfigError(f"sweep.space: has {len(found)} values of train.{name}, which all trials share")
    if base.data.test is None and not base.evaluation.metrics:
        raise ConfigError(f"sweep.metric: '{sweep.metric}'; nothing is evaluated: set data.test or evaluation.metrics")
    least, most = base.cluster.worker_range
    if least != most:
        raise ConfigError(f"cluster.num_workers: [{least}, {most}]; must be one number, the same for all trials")
    sweep.validate(base.train.num_steps, base.train.evaluate_every)
    return Sweep(tree, tuple(bases), Plan.of(sweep, base.train.num_steps))


def load_run(path: str, overrides: Sequence[str] | None = None) -> Config:
    """The config of a run, or of one possible trial where the file has a `sweep:` section. ConfigError as either."""
    return load_sweep(path, overrides).base if "sweep" in compose(path, overrides) else load(path, overrides)


def _combined(tree: dict[str, Any], key: str, value: Any, combinations: Sequence[dict[str, Any]]) -> Config:
    """The config of the first of these combinations that can be with this value of a key.

    ConfigError if none can: about the value, unless without it the first fails as well.
    """
    errors = []
    for settings in combinations:
        try:
            return _with(tree, settings | {key: value})
        except ConfigError as error:
            errors.append(error)
    try:
        _with(tree, {name: other for name, other in combinations[0].items() if name != key})
    except ConfigError as error:
        if str(error) == str(errors[0]):
            raise
    raise ConfigError(f"sweep.space.{key}: {value!r}; {errors[0]}") from errors[0]


def _with(tree: dict[str, Any], settings: Mapping[str, Any]) -> Config:
    """The config of a run with these values. Of a value that is a mapping, the keys that it has count."""
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return from_tree(deepcopy(tree))
