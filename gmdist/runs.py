"""A run's folder: build its family from its config, open it with its weights, and train one worker's share of it.

This is where config, data, families and trainer meet; Ray is not needed for any of it.
"""

import gc
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import yaml

from gmdist import s3, storage
from gmdist.config import Config, from_yaml
from gmdist.data.dataset import check_labels
from gmdist.data.latents import FirstStage, check_latents, flat
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.mix import UNPAIRED
from gmdist.data.unpaired import Unpaired, open_held_out, open_training
from gmdist.errors import CheckpointError, ConfigError, DataError
from gmdist.evaluator import check_reference, open_evaluator, open_features
from gmdist.families import CATALOGUE
from gmdist.families.family import Family, Surroundings
from gmdist.rng import derive
from gmdist.train import checkpoint
from gmdist.train.blocks import check_precision, lay_out
from gmdist.train.checkpoint import BUFFER, EMA_PARAM, FROZEN, PARAM, Reader
from gmdist.train.config import LARGER_IS_BETTER, micro_batch_size
from gmdist.train.hooks import Hooks, Outcome
from gmdist.train.optim import trained_children
from gmdist.train.state import RunIdentity, check_identity, load_tensor, shapes_of
from gmdist.train.trainer import Trainer
from gmdist.workers import rank, world_size

CONFIG_NAME = "config.yaml"
_FIRST_STAGE_NAME = "first_stage.yaml"  # the config of the run that the family opens: its weights are in checkpoints
# All that a run writes into its folder.
_WRITTEN = frozenset(
    {"checkpoints", "samples", CONFIG_NAME, "metrics.jsonl", "quarantine.jsonl", "evaluation.json"}
    | {_FIRST_STAGE_NAME, "report.html", "error.txt", "trace.json"}
)

# What gives a batch what a family needs.
_SECOND_DOMAIN = {"image_b": "data.unpaired", "label_b": "data.unpaired and data.num_classes"}
_ONE_DOMAIN = "data.image, data.num_classes, data.caption or data.arrays"

_OPEN_ATTEMPTS = 3

_log = logging.getLogger(__name__)


def device() -> torch.device:
    """Where a command computes that is not a job of several workers."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_storage(config: Config) -> None:
    """Let this process reach object storage as the config says."""
    s3.configure(config.data.s3)


@dataclass(frozen=True)
class Opened:
    """A run that another's family is built on."""

    run: str  # as that family's config names it
    config: Config
    family: Family
    step: int | None  # None: only its config was read


def build_family(
    config: Config, on_open: Callable[[Opened], None] | None = None, first_stage: Config | None = None
) -> Family:
    """The family of a config with freshly drawn weights: the same on every worker.

    Args:
        config: of its run.
        on_open: called with each run that the family opens.
        first_stage: the config of the run that the family opens, where its weights will come from elsewhere; None: both
            are read where that run is.
    """
    kind, _ = CATALOGUE[config.family_name]

    def open_first(run: str) -> Family:
        with torch.device("cpu"):  # `check_start` builds on the meta device, which holds no weights
            if first_stage is not None:
                opened = Opened(run, first_stage, _frozen(build_family(first_stage), first_stage), None)
            else:
                meta, first = open_run(run)
                opened = Opened(run, read_config(split_run(run)[0]), first, meta["step"])
        if on_open is not None:
            on_open(opened)
        return opened.family

    surroundings = Surroundings(
        image_size=config.data.image_size,
        image_channels=config.data.channels,
        num_classes=config.data.num_classes or 0,
        seed=config.train.seed,
        open_run=open_first,
    )
    torch.manual_seed(derive(config.train.seed, "weights", 0))
    family = kind(config.family, surroundings)
    keys = config.data.batch_keys
    for name in family.inputs:
        if name not in keys and not (name == "image" and set(keys).intersection(family.cached)):
            remedy = f"set {_SECOND_DOMAIN.get(name, _ONE_DOMAIN)}"
            if config.data.arrays and getattr(config.family, "first_stage", "") is None:
                remedy = "set family.first_stage to the run that made them"
            raise ConfigError(
                f"family.name: '{config.family_name}'; it needs '{name}' of each sample, and data reads "
                f"{', '.join(keys)}: {remedy}"
            )
    trained_children(family, config.optim)
    return family


def split_run(location: str) -> tuple[str, str | None]:
    """A run's folder and, where a checkpoint of it is named, that checkpoint's location."""
    location = storage.absolute(location)
    path = PurePosixPath(location.removeprefix("s3://"))
    if checkpoint.step_of(path.name) is not None and path.parent.name == "checkpoints":
        return location.rsplit("/", 2)[0], location
    return location, None


def read_config(run: str, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run, with `key=value` overrides; ConfigError if there is no run."""
    run_dir, _ = split_run(run)
    location = storage.join(run_dir, CONFIG_NAME)
    try:
        return from_yaml(storage.read(location).decode(), location, overrides)
    except FileNotFoundError as error:
        raise ConfigError(f"{run}: not a run: it has no {CONFIG_NAME}") from error


def open_run(
    run: str, config: Config | None = None, reads: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, Any], Family]:
    """A run's family with its averaged weights, in eval mode, and the checkpoint's meta.

    Args:
        run: a run's folder (its newest sound checkpoint is used), or one of its checkpoints.
        config: in place of the run's own, where a setting of the sampler is changed.
        reads: data sets that it will be given as they are, never mirrored, each after its key; where they are latents,
            they must be of its own first stage.

    Raises:
        ConfigError: there is no such run, or no such checkpoint; or latents, and the config reads others.
        CheckpointError: it has no sound checkpoint.
        DataError: latents of another first stage.
    """
    run_dir, location = split_run(run)
    config = config or read_config(run_dir)
    use_storage(config)
    if location is not None:
        if not storage.list_names(location):
            raise ConfigError(f"{run}: no such checkpoint; those of {run_dir} are in its folder checkpoints")
        meta = checkpoint.read_meta(location)
        checkpoint.verify(location, meta)
        return meta, _load_family(config, location, meta, reads)
    for attempt in range(_OPEN_ATTEMPTS):
        found, warnings = checkpoint.find_newest(run_dir)
        if found is None:
            raise CheckpointError(f"{run}: has no complete checkpoint yet")
        for warning in warnings:
            _log.warning("%s", warning)
        try:
            return found.meta, _load_family(config, found.location, found.meta, reads)
        except CheckpointError:  # a run that is still training deletes its oldest checkpoint now and then
            if attempt + 1 == _OPEN_ATTEMPTS or storage.exists(storage.join(found.location, checkpoint.META_NAME)):
                raise
    raise AssertionError("the last attempt returns or raises")


def _load_family(config: Config, location: str, meta: dict[str, Any], reads: Sequence[tuple[str, str]]) -> Family:
    opened: list[Opened] = []
    family = build_family(config, opened.append, _first_stage_of(split_run(location)[0]))
    checkpoint.check_shapes(location, meta, shapes_of(family))
    trained = trained_children(family, config.optim)
    with Reader(location, meta) as reader, torch.no_grad():
        for name, parameter in family.named_parameters():
            child = name.partition(".")[0]
            kind = EMA_PARAM if child in family.averaged else PARAM if child in trained else FROZEN
            load_tensor(reader, kind, name, parameter.data)
        for name, buffer in family.named_buffers():
            load_tensor(reader, BUFFER, name, buffer)
    if reads:  # by now, what encodes in the opened ones has the weights that the checkpoint holds
        own = [] if config.data.image else [identify(one.run, one.family, None, one.config) for one in opened]
        check_latents(replace(config.data, flip=False), reads, own)
    return _frozen(family, config)


def _frozen(family: Family, config: Config) -> Family:
    """A family that computes as in its run, in eval mode."""
    lay_out(family, trained_children(family, config.optim), config.train)
    return family.eval().requires_grad_(False)


def _first_stage_of(run_dir: str) -> Config | None:
    """The config of the run that a run was begun on; None where it was begun on none, or did not keep it."""
    location = storage.join(run_dir, _FIRST_STAGE_NAME)
    return from_yaml(storage.read(location).decode(), location) if storage.exists(location) else None


def check_start(config: Config) -> tuple[Outcome | None, list[str]]:
    """Refuse what can be refused before any worker starts.

    Returns:
        How the run ended, if it is finished already; and warnings: of a finished run about checkpoints that cannot be
        used, of one that goes on about what its model was begun with. It gives the former itself. And of settings
        without effect.

    Raises:
        DataError, ConfigError, CheckpointError: no data, labels out of range, a first stage that is not there, or a
            run folder that holds another run.
    """
    use_storage(config)
    for key, folder in config.data.folders:
        try:
            check_labels(config.data, Manifest.load(storage.absolute(folder)), folder)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
    opened: list[Opened] = []
    with torch.device("meta"):
        family = build_family(config, opened.append)
    run_dir = storage.absolute(config.run.dir)
    for one in opened:
        if storage.absolute(split_run(one.run)[0]) == run_dir:
            raise ConfigError(f"run.dir: {config.run.dir}; is the folder of family.first_stage: choose another")
    check_precision(family, trained_children(family, config.optim), config.train.precision)
    for num_workers in config.cluster.sizes(config.data.batch_size):
        size = micro_batch_size(config.train, config.data.batch_size, num_workers)
        if size % family.compared:
            raise ConfigError(
                f"data.batch_size: {config.data.batch_size}; {num_workers} workers pass {size} samples through at once,"
                f" and the loss takes {family.compared} of them together (minibatch_std_group,"
                " path_length.batch_shrink), which must divide them"
            )
    if _measures(config):
        if type(family).sample is Family.sample:
            raise ConfigError(
                f"evaluation.metrics: {list(config.evaluation.metrics)}; must be [] with family '{config.family_name}',"
                " which draws no images"
            )
        check_reference(config)
        open_features(config)
    found, warnings = None, list[str]()
    if not config.run.overwrite:
        found, warnings = checkpoint.find_newest(run_dir)
    if found is None:
        family.check_files()
    first_stages = []
    if found is None and not config.data.image:
        first_stages = [identify(one.run, one.family, one.step, one.config) for one in opened]
    check_latents(config.data, config.data.folders, first_stages)
    if found is not None:
        data = open_training(config.data)
        check_identity(found, _identity(config, data), config.train.seed, data.fingerprint)
        checkpoint.check_shapes(found.location, found.meta, shapes_of(family))
        if found.meta["step"] >= config.train.num_steps:
            return Outcome(found.meta["step"], found.meta["images"], found.meta["order_digest"], True), warnings
        for one in opened:
            _check_unchanged(one, run_dir)
        return None, _changes(config) + _doubts(config)
    return None, _doubts(config)


def shapes(config: Config) -> dict[str, list[int]]:
    """The shapes of the parameters and buffers of a run's family, which checkpoints hold."""
    with torch.device("meta"):
        return shapes_of(build_family(config))


def _doubts(config: Config) -> list[str]:
    """Settings that are hardly meant so."""
    found, train = [], config.train
    if train.evaluate_every is not None and config.data.test is None and not config.evaluation.metrics:
        found.append(
            f"train.evaluate_every: {train.evaluate_every}; nothing is evaluated without data.test or "
            "evaluation.metrics"
        )
    if train.best_order == "min" and (train.best_metric or "").removeprefix("test/") in LARGER_IS_BETTER:
        found.append(f"train.best_order: min; keeps the checkpoint of the least {train.best_metric}: set it to max")
    return found


def _changes(config: Config) -> list[str]:
    """What the config says of the model and the run was not begun with: of losses and samplers that may be meant."""
    return [
        f"family.{key}: {own!r}; the run was begun with {theirs!r}"
        for key, own, theirs in _differences(config, read_config(config.run.dir))
    ]


def _check_unchanged(first: Opened, run_dir: str) -> None:
    """ConfigError if a run's first stage has other settings than when the run was begun."""
    kept = _first_stage_of(run_dir)
    for key, own, theirs in [] if kept is None else _differences(first.config, kept):
        raise ConfigError(
            f"family.first_stage: {first.run}; its family.{key} is {own!r} now, and was {theirs!r} when {run_dir} was "
            "begun: put the old one back, or begin anew in another run.dir"
        )


def _differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
    """The keys of the family's settings that two configs do not agree on, with both values."""
    ones, others = flat(family_tree(one)), flat(family_tree(other))
    return [(key, ones[key], others[key]) for key in sorted(ones.keys() & others.keys()) if ones[key] != others[key]]


def family_tree(config: Config) -> dict[str, Any]:
    """The settings of a config's family, as plain values."""
    return yaml.safe_load(config.to_yaml())["family"]


def identify(run: str, family: Family, step: int | None, config: Config | None = None) -> FirstStage:
    """What tells an opened run's family, at a step, from any other that would encode otherwise.

    Other networks than `Family.encode` needs do not count: a second stage does without them. Its `config` is read where
    it is not given.
    """
    run_dir, _ = split_run(run)
    state = hashlib.sha256()
    for name, tensor in sorted(family.state_dict().items()):
        child, _, inner = name.partition(".")
        if inner and child not in family.averaged:
            continue
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return FirstStage(run_dir, step, family_tree(config or read_config(run_dir)), state.hexdigest())


def _measures(config: Config) -> bool:
    """Whether generated images are measured during training."""
    return config.train.evaluate_every is not None and bool(config.evaluation.metrics)


def clear(run_dir: str) -> None:
    """Delete what an earlier run wrote into its folder, and nothing else that may be there."""
    for name in storage.list_names(run_dir):
        location = storage.join(run_dir, name)
        if name in ("checkpoints", "samples"):
            storage.delete_tree(location)
        elif name in _WRITTEN or name.startswith("events.out.tfevents"):
            storage.delete(location)


def _identity(config: Config, data: Loader | Unpaired) -> RunIdentity:
    return RunIdentity(config.family_name, config.data.batch_size, data.fingerprint.to_dict())


def _check_agreement(split: str, data: Loader | Unpaired) -> None:
    """DataError if the workers do not read the same data: a folder of the same name on each machine may differ."""
    first = data.fingerprint.to_dict()
    second = first.pop(UNPAIRED, None)
    own: dict[str, Any] = {f"data.{split}": first, f"data.unpaired.{split}": second}
    found: list[dict[str, Any]] = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, own)
    for key in own:
        for other, theirs in enumerate(found[1:], 1):
            if theirs[key] != found[0][key]:
                raise DataError(
                    f"{key}: worker {other} reads another data set than worker 0, or another version of it; all "
                    "workers need the same, in a shared folder or on s3://, or copied with its manifest"
                )


def train_worker(config: Config, device: torch.device, hooks: Hooks | None = None) -> Outcome:
    """Train one worker's share of a run, to its end or until a stop is requested.

    Where there are several workers, torch.distributed is initialised before, and each calls this.
    """
    use_storage(config)
    gc.freeze()  # what was imported stays: looking through it for garbage would take a twentieth of the loader's time
    run_dir = storage.absolute(config.run.dir)
    data = open_training(config.data, rank(), world_size())
    test = open_held_out(config.data, rank(), world_size())
    for split, read in (("train", data), ("test", test)):
        if read is not None:
            _check_agreement(split, read)
    measure = open_evaluator(config, test, device, rank(), world_size()) if _measures(config) else None
    first_stages: list[Config] = []
    trainer = Trainer(
        build_family(config, lambda opened: first_stages.append(opened.config)),
        config.train,
        config.optim,
        _identity(config, data),
        data.fingerprint,
        run_dir,
        data,
        test,
        device,
        hooks,
        measure,
    )
    try:
        if rank() == 0:
            storage.write(storage.join(run_dir, CONFIG_NAME), config.to_yaml().encode())
            for first_stage in first_stages:
                storage.write(storage.join(run_dir, _FIRST_STAGE_NAME), first_stage.to_yaml().encode())
        return trainer.fit()
    finally:
        trainer.close()
