"""Configs: load, compose, override, check. Every error names the key, the value, and what would be valid."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gmdist import storage
from gmdist.data.config import MAX_IMAGE_SIZE, DataConfig
from gmdist.errors import ConfigError
from gmdist.evaluation.config import MEASURED, EvaluationConfig
from gmdist.families import CATALOGUE
from gmdist.s3 import S3Config
from gmdist.structured import plain, refuse_unknown, structured
from gmdist.train.config import TrainConfig
from gmdist.train.optim import OptimConfig

_YEAR_S = 31_536_000
# Plain numbers that YAML 1.1 takes for octal ones, or for minutes and seconds.
_READ_AS_ANOTHER = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")


@dataclass
class ClusterConfig:
    """The Ray cluster and what the run takes of it."""

    address: str = "local"  # "local" starts one; "auto" finds the one this machine belongs to; or host:port of its head
    num_workers: Any = 1  # or [least, most]: as many as the cluster has room for and as divide data.batch_size
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    autoscale: bool = False  # ask the cluster's autoscaler for machines for all workers, and wait until they are there
    max_failures: int = 3  # restarts in a row, without a step beyond the last failure, before the run fails
    backoff_s: float = 1.0  # before the first of them; doubles with each, up to a minute
    timeout_s: float = 1800.0  # that a worker may take for a step, or wait for others, before all are started again

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        is_range = isinstance(self.num_workers, tuple) and len(self.num_workers) == 2
        counts = self.num_workers if is_range else (self.num_workers, self.num_workers)
        if not all(type(count) is int and count >= 1 for count in counts) or counts[0] > counts[1]:
            shown = list(self.num_workers) if isinstance(self.num_workers, tuple) else self.num_workers
            raise ConfigError(f"cluster.num_workers: {shown}; must be a number of at least 1, or [least, most]")
        if self.cpus_per_worker < 1:
            raise ConfigError(f"cluster.cpus_per_worker: {self.cpus_per_worker}; must be at least 1")
        if self.gpus_per_worker not in (0, 1):
            raise ConfigError(
                f"cluster.gpus_per_worker: {self.gpus_per_worker}; must be 0 or 1: a worker drives one GPU"
            )
        if "://" in self.address:  # ray:// among them: Ray's clients cannot ask for nodes
            raise ConfigError(
                f"cluster.address: '{self.address}'; use host:port of the head, from a machine of the cluster, or "
                "`gmdist submit`"
            )
        if not 1.0 <= self.timeout_s <= _YEAR_S:
            raise ConfigError(f"cluster.timeout_s: {self.timeout_s}; must be from 1 to {_YEAR_S}, a year")
        if not 0.0 <= self.backoff_s < math.inf:
            raise ConfigError(f"cluster.backoff_s: {self.backoff_s}; must be a number of at least 0")
        if self.autoscale and self.address == "local":
            raise ConfigError("cluster.autoscale: true with cluster.address 'local', which is this machine and no more")
        if self.max_failures < 0:
            raise ConfigError(f"cluster.max_failures: {self.max_failures}; must be at least 0")

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    def sizes(self, batch_size: int) -> list[int]:
        """The numbers of workers that the run may have, from the smallest; ConfigError if none divides the batch."""
        least, most = self.worker_range
        sizes = [count for count in range(least, min(most, batch_size) + 1) if batch_size % count == 0]
        if not sizes:
            workers = f"{least} workers do not divide it"
            if least < most:
                workers = f"no number of workers from {least} to {most} divides it"
            raise ConfigError(
                f"data.batch_size: {batch_size}; {workers}; use a multiple of {least}, or another cluster.num_workers"
            )
        return sizes


@dataclass
class RunConfig:
    """Where the run's folder is."""

    dir: str  # local folder, shared folder or s3:// prefix
    overwrite: bool = False  # delete the run that is there; false: go on with it


@dataclass
class Config:
    """A whole run. `family` is the dataclass of the family that `family.name` names."""

    name: str
    family_name: str
    family: Any
    data: DataConfig
    optim: dict[str, OptimConfig]
    train: TrainConfig
    cluster: ClusterConfig
    run: RunConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_yaml(self) -> str:
        """The config file that repeats this run."""
        tree = {
            "name": self.name,
            "family": {"name": self.family_name, **plain(self.family)},
            "data": plain(self.data),
            "optim": {child: plain(optim) for child, optim in self.optim.items()},
            "train": plain(self.train),
            "evaluation": plain(self.evaluation),
            "cluster": plain(self.cluster),
            "run": {"dir": self.run.dir},
        }
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that OmegaConf reads as numbers, and YAML 1.1 does not: 1e-4."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?|\.\d)[\d_]*([eE][-+]?\d+)?$"), list("-+.0123456789")
)


_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "cluster": ClusterConfig,
    "run": RunConfig,
}
_TOP_KEYS = ("base", "name", "family", "optim", *_SECTIONS)


def load(path: str, overrides: Sequence[str] | None = None) -> Config:
    """Read a config file with the files that its `base:` names, apply `key=value` overrides, and check the whole.

    Raises:
        ConfigError: a file that is missing or no YAML, an unknown or mistyped key, a value that cannot be.
    """
    return from_tree(compose(path, overrides))


def compose(path: str, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """The plain values of a config file with the files that its `base:` names and `key=value` overrides; unchecked."""
    tree = _compose(path)
    for override in overrides or []:
        _apply(tree, override)
    return tree


def files_of(path: str) -> list[str]:
    """A config file that can be read, and the files that its `base:` names, one after the other."""
    files = [path]
    while (base := _parse(Path(files[-1]).read_text(encoding="utf-8"), files[-1]).get("base")) is not None:
        files.append(os.path.join(os.path.dirname(files[-1]), base))
    return files


def from_yaml(text: str, location: str, overrides: Sequence[str] = ()) -> Config:
    """A config from the text of a resolved config.yaml, with `key=value` overrides; `location` is for errors.

    Its workers need not divide its batch: what reads a run, such as `gmdist sample`, has batches of its own.
    """
    tree = _parse(text, location)
    if not tree:
        raise ConfigError(f"{location}: empty; it should hold a run's settings")
    for override in overrides:
        _apply(tree, override)
    return _built(tree)


def s3_of(overrides: Sequence[str]) -> S3Config | None:
    """How `key=value` overrides say that object storage is reached; None where none does."""
    tree: dict[str, Any] = {}
    for override in overrides:
        if override.startswith(("data.s3.", "data.s3=")):
            _apply(tree, override)
    return structured(S3Config, tree["data"]["s3"], "data.s3") if tree else None


def from_tree(tree: dict[str, Any]) -> Config:
    """A config of a run that is to be trained, from a tree of plain values; checked."""
    config = _built(tree)
    config.cluster.sizes(config.data.batch_size)
    return config


def _built(tree: dict[str, Any]) -> Config:
    """Check a tree of plain values against the dataclasses."""
    tree = {key: value for key, value in tree.items() if key != "base"}
    if "sweep" in tree:
        raise ConfigError("sweep: no key of a run; `gmdist sweep CONFIG` takes it")
    refuse_unknown(tree, list(_TOP_KEYS), "")
    for key in ("family", "optim", *_SECTIONS):
        if tree.get(key) is not None and not isinstance(tree[key], dict):
            raise ConfigError(f"{key}: {tree[key]!r}; must be a mapping of keys to values")
    if tree.get("family") is None:
        raise ConfigError("family: missing; a run's config needs it, its own or from the file that `base` names")
    family_name = tree["family"].get("name")
    if not isinstance(family_name, str) or family_name not in CATALOGUE:
        raise ConfigError(f"family.name: '{family_name}'; must be one of {', '.join(CATALOGUE)}")
    kind = CATALOGUE[family_name][1]
    tree = _with_preset(kind, tree)
    for key in ("name", "data", "optim", "train", "run"):
        if tree.get(key) is None:
            raise ConfigError(f"{key}: missing; a run's config needs it, its own or from the file that `base` names")

    family = {key: value for key, value in tree["family"].items() if key != "name"}
    config = Config(
        name=_name(tree["name"]),
        family_name=family_name,
        family=structured(kind, family, "family"),
        data=structured(DataConfig, tree["data"], "data"),
        optim={
            str(child): structured(OptimConfig, values, f"optim.{child}") for child, values in tree["optim"].items()
        },
        train=structured(TrainConfig, tree["train"], "train"),
        cluster=structured(ClusterConfig, tree.get("cluster", {}), "cluster"),
        run=structured(RunConfig, tree["run"], "run"),
        evaluation=structured(EvaluationConfig, tree.get("evaluation", {}), "evaluation"),
    )
    _check(config)
    _make_absolute(config)
    return config


def _with_preset(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree on top of what its family's preset sets, where it names one."""
    name = tree["family"].get("preset")
    if name is None or not hasattr(kind, "preset_settings"):
        return tree
    image_size = (tree.get("data") or {}).get("image_size")
    if type(image_size) is not int or not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ConfigError(f"data.image_size: {image_size}; must be from 1 to {MAX_IMAGE_SIZE}, for family.preset")
    cluster = structured(ClusterConfig, tree.get("cluster") or {}, "cluster")
    cluster.validate()
    settings: dict[str, Any] = kind.preset_settings(str(name), image_size, cluster.worker_range[1])
    return merged(settings, tree)


def _check(config: Config) -> None:
    config.data.validate()
    config.train.validate()
    config.cluster.validate()
    config.evaluation.validate()
    for child, optim in config.optim.items():
        optim.validate(f"optim.{child}")
    problem = config.family.problem(config.data.image_size)
    if problem:
        raise ConfigError(f"family.{problem}")
    best, metrics = config.train.best_metric, config.evaluation.metrics
    if best is not None and config.data.test is None and not metrics:
        raise ConfigError("data.test: missing; train.best_metric needs it")
    for metric, names in MEASURED.items():
        if best in [f"test/{name}" for name in names] and metric not in metrics:
            raise ConfigError(
                f"evaluation.metrics: {list(metrics)}; train.best_metric '{best}' needs {metric} among them"
            )
    if not config.run.dir:
        raise ConfigError("run.dir: ''; must be a folder or an s3:// prefix")
    storage.is_s3(config.run.dir)


def _make_absolute(config: Config) -> None:
    """Let every process, in whatever folder it runs, find what the user meant from theirs."""
    config.run.dir = storage.absolute(config.run.dir)
    config.data.make_absolute()
    config.evaluation.make_absolute()
    _make_locations_absolute(config.family)


def _make_locations_absolute(settings: Any) -> None:
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            _make_locations_absolute(value)
        elif value is not None and (
            f.metadata.get("location")
            or (f.metadata.get("folder_or_name") and os.path.isdir(os.path.expanduser(value)))
        ):
            setattr(settings, f.name, storage.absolute(value))


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"name: {value!r}; must be a text")
    return value


def _compose(path: str, including: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's tree on top of its base's. A base is named relative to the file that names it."""
    if os.path.abspath(path) in including:
        raise ConfigError(f"{path}: base: includes itself")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    tree = _parse(text, path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base!r}; must be the path of a config file")
    below = _compose(os.path.join(os.path.dirname(path), base), (*including, os.path.abspath(path)))
    return merged(below, tree)


def _parse(text: str, location: str) -> dict[str, Any]:
    try:
        # OmegaConf's loader refuses duplicate keys and reads 1e-4 as a number, which YAML 1.1 does not.
        node = OmegaConf.create(text)
        tree = OmegaConf.to_container(node, resolve=False)
        tokens = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError, ValueError, RecursionError) as error:
        raise ConfigError(f"{location}: not a valid YAML config: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig) or not isinstance(tree, dict):
        raise ConfigError(f"{location}: not a valid YAML config: must be a mapping of keys to values")
    if "${" in str(tree):
        raise ConfigError(f"{location}: '${{' has no meaning here: values are written out")  # oc.env would read secrets
    for token in tokens:
        if token.plain and _READ_AS_ANOTHER.fullmatch(token.value):
            raise ConfigError(
                f"{location}: {token.value}: YAML reads it as another number; write a number without leading zeros and "
                "colons, and a text in quotes"
            )
        if token.value == "???":
            raise ConfigError(f"{location}: '???': stands for a value that is missing: write the value")
    return {str(key): value for key, value in tree.items()}


def merged(below: Any, above: Any) -> Any:
    """Plain values on top of others: mappings key by key, all else as a whole."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: merged(below[key], value) if key in below else value for key, value in above.items()}
    return above


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{override}': not an override; write key=value, for example train.num_steps=100")
    if key == "base":
        raise ConfigError(f"base: '{text}'; is for config files: name one that has this base")
    value = _parse(f"value: {text}", override).get("value")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # or not there
            node[parent] = {}
        child = node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: no such key; '{parent}' has no keys below it")
        node = child
    node[last] = value
