"""A run's folder: its config, its family built from that, and opened with the weights of a checkpoint."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
import yaml

from gmdist import s3, storage
from gmdist.config import Config, from_yaml, s3_of
from gmdist.data.latents import FirstStage, check_latents, flat
from gmdist.errors import CheckpointError, ConfigError
from gmdist.families import CATALOGUE
from gmdist.families.family import Family, Surroundings
from gmdist.rng import derive
from gmdist.train import checkpoint
from gmdist.train.blocks import lay_out
from gmdist.train.checkpoint import BUFFER, EMA_PARAM, FROZEN, PARAM, Reader
from gmdist.train.optim import trained_children
from gmdist.train.state import load_tensor, shapes_of

CONFIG_NAME = "config.yaml"
FIRST_STAGE_NAME = "first_stage.yaml"  # the config of the run that the family opens: its weights are in checkpoints

# What gives a batch what a family needs.
_SECOND_DOMAIN = {"image_b": "data.unpaired", "label_b": "data.unpaired and data.num_classes"}
_ONE_DOMAIN = "data.image, data.num_classes, data.caption or data.arrays"

_OPEN_ATTEMPTS = 3
# Settings of a family that say how to draw or measure, and where files are: they may be others than in training.
_AFTERWARDS = re.compile(r"(.*\.)?(sampler\..+|truncation|iwae_samples|first_stage|init_from|path)")

_SHAPING = ("image_size", "channels", "num_classes")  # settings of data that a family is built by

_log = logging.getLogger(__name__)


def keep_fp32() -> None:
    """Let GPUs compute in fp32 what is in fp32: as torch has it in products, and not in convolutions."""
    torch.backends.cudnn.allow_tf32 = False


def device() -> torch.device:
    """Where a command computes that is not a job of several workers."""
    keep_fp32()
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
    with torch.random.fork_rng(devices=[]):  # a family that opens another goes on with its own numbers
        torch.manual_seed(derive(config.train.seed, "weights", 0))
        family = kind(config.family, surroundings)
    keys = config.data.batch_keys
    for name in family.inputs:
        if name not in keys and not (name == "image" and set(keys).intersection(family.cached)):
            remedy = f"set {_SECOND_DOMAIN.get(name, _ONE_DOMAIN)}"
            if config.data.arrays and getattr(config.family, "first_stage", "") is None:
                remedy = "set family.first_stage to the run that made them"
            elif config.data.arrays and family.cached:
                remedy = f"set data.image, or data.arrays=[{', '.join(f'{one}.npy' for one in family.cached)}]"
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
    """The resolved config of a run, with `key=value` overrides; ConfigError if there is no run.

    Where they say how object storage is reached, so is the run itself.
    """
    run_dir, _ = split_run(run)
    location = storage.join(run_dir, CONFIG_NAME)
    if (reached := s3_of(overrides)) is not None:
        s3.configure(reached)
    try:
        return from_yaml(storage.read(location).decode(), location, overrides)
    except FileNotFoundError as error:
        names = storage.list_names(run_dir)
        hint = "; a sweep's best.yaml names the folder of its best trial" if "best.yaml" in names else ""
        raise ConfigError(f"{run}: not a run: it has no {CONFIG_NAME}{hint}") from error


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
    trained = read_config(run_dir)
    if config is not None:  # otherwise another run opens it, which has said how storage is reached
        use_storage(config)
    config = config or trained
    for key, own, theirs in differences(config, trained):
        if not _AFTERWARDS.fullmatch(key):
            _log.warning("family.%s: %r; the run was trained with %r", key, own, theirs)
    if location is not None:
        if not storage.list_names(location):
            raise ConfigError(f"{run}: no such checkpoint; those of {run_dir} are in its folder checkpoints")
        meta = checkpoint.read_meta(location)
        checkpoint.verify(location, meta)
        return meta, _load_family(config, trained, location, meta, reads)
    for attempt in range(_OPEN_ATTEMPTS):
        found, warnings = checkpoint.find_newest(run_dir)
        if found is None:
            raise CheckpointError(f"{run}: has no complete checkpoint yet")
        for warning in warnings:
            _log.warning("%s", warning)
        try:
            return found.meta, _load_family(config, trained, found.location, found.meta, reads)
        except CheckpointError:  # a run that is still training deletes its oldest checkpoint now and then
            if attempt + 1 == _OPEN_ATTEMPTS or storage.exists(storage.join(found.location, checkpoint.META_NAME)):
                raise
    raise AssertionError("the last attempt returns or raises")


def _load_family(
    config: Config, as_trained: Config, location: str, meta: dict[str, Any], reads: Sequence[tuple[str, str]]
) -> Family:
    """The family of a config, which may differ from the run's own, with the weights of a checkpoint."""
    opened: list[Opened] = []
    family = build_family(config, opened.append, first_stage_of(split_run(location)[0]))
    checkpoint.check_shapes(location, meta["shapes"], shapes_of(family), _remedy(config, as_trained))
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


def _remedy(config: Config, own: Config) -> str:
    """What helps where a run's tensors are not those of a config: to leave out what that changes of the run's own."""
    changed = {f"family.{key}": now for key, now, _ in differences(config, own) if not _AFTERWARDS.fullmatch(key)}
    for key in _SHAPING:
        if (now := getattr(config.data, key)) != getattr(own.data, key):
            changed[f"data.{key}"] = now
    if not changed:
        return "use the run's own config"
    given = [f"{key}={now if isinstance(now, str) else json.dumps(now)}" for key, now in changed.items()]
    are, them = ("is", "it") if len(given) == 1 else ("are", "them")
    return f"{' and '.join(given)} {are} not what the run was trained with: leave {them} out"


def _frozen(family: Family, config: Config) -> Family:
    """A family that computes as in its run, in eval mode."""
    lay_out(family, trained_children(family, config.optim), config.train)
    return family.eval().requires_grad_(False)


def first_stage_of(run_dir: str) -> Config | None:
    """The config of the run that a run was begun on; None where it was begun on none, or did not keep it."""
    location = storage.join(run_dir, FIRST_STAGE_NAME)
    return from_yaml(storage.read(location).decode(), location) if storage.exists(location) else None


def shapes(config: Config) -> dict[str, list[int]]:
    """The shapes of the parameters and buffers of a run's family, which checkpoints hold."""
    with torch.device("meta"):
        return shapes_of(build_family(config))


def differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
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
