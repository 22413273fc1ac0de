"""Start a run, or go on with it: what is refused before any worker starts, and one worker's share of the training.

This is where config, data, families and trainer meet; Ray is not needed for any of it.
"""

import gc
from typing import Any

import torch

from gmdist import storage
from gmdist.config import Config
from gmdist.data.dataset import check_labels, other_classes
from gmdist.data.latents import check_latents
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.mix import UNPAIRED
from gmdist.data.unpaired import Unpaired, open_held_out, open_training
from gmdist.errors import ConfigError, DataError
from gmdist.evaluator import check_reference, open_evaluator, open_features
from gmdist.families.denoiser import DenoiserConfig
from gmdist.families.family import Family
from gmdist.runs import (
    CONFIG_NAME,
    FIRST_STAGE_NAME,
    Opened,
    build_family,
    differences,
    first_stage_of,
    identify,
    keep_fp32,
    read_config,
    split_run,
    use_storage,
)
from gmdist.train import checkpoint
from gmdist.train.blocks import check_precision
from gmdist.train.config import LARGER_IS_BETTER, micro_batch_size
from gmdist.train.hooks import Hooks, Outcome
from gmdist.train.optim import trained_children
from gmdist.train.state import RunIdentity, check_identity, shapes_of, worker_shapes_of
from gmdist.train.trainer import Trainer
from gmdist.workers import all_gathered_objects, rank, world_size

# All that a run writes into its folder.
_WRITTEN = frozenset(
    {"checkpoints", "samples", CONFIG_NAME, "metrics.jsonl", "quarantine.jsonl", "evaluation.json"}
    | {FIRST_STAGE_NAME, "report.html", "error.txt", "trace.json"}
)


def check_start(config: Config) -> tuple[Outcome | None, list[str]]:
    """Refuse what can be refused before any worker starts.

    Returns:
        How the run ended, if it is finished already; and warnings. Those of a finished run are that it is, and of
        checkpoints that cannot be used (one that goes on gives these itself). Others are of settings that differ from
        what the run was begun with, and of settings without effect.

    Raises:
        DataError, ConfigError, CheckpointError: no data, labels out of range, a first stage that is not there, or a
            run folder that holds another run.
    """
    use_storage(config)
    manifests = _manifests(config)
    opened: list[Opened] = []
    with torch.device("meta"):
        family = build_family(config, opened.append)
    run_dir = storage.absolute(config.run.dir)
    for one in opened:
        if storage.absolute(split_run(one.run)[0]) == run_dir:
            raise ConfigError(f"run.dir: {config.run.dir}; is the folder of family.first_stage: choose another")
    _check_family(config, family)
    found, warnings = None, list[str]()
    if not config.run.overwrite:
        found, warnings = checkpoint.find_newest(run_dir)
    if found is None:
        family.check_files()
        _check_cached(config, family, opened)
        return None, _doubts(config, family, manifests) + _initial_doubts(config)
    _check_cached(config, family, [])  # its first stage is in its own checkpoints
    data = open_training(config.data)
    check_identity(found, _identity(config, data), config.train.seed)
    checkpoint.check_shapes(found.location, found.meta["shapes"], shapes_of(family))
    checkpoint.check_shapes(found.location, found.meta["worker_shapes"], worker_shapes_of(family))
    if (step := found.meta["step"]) >= config.train.num_steps:
        warnings.append(
            f"run.dir: {config.run.dir}; finished, at step {step}: nothing is trained. To go on set train.num_steps, "
            "to begin anew run.overwrite=true or another run.dir"
        )
        return Outcome(step, found.meta["images"], found.meta["order_digest"], True), warnings
    for one in opened:
        _check_unchanged(one, run_dir)
    return None, _changes(config) + _doubts(config, family, manifests)


def _manifests(config: Config) -> dict[str, Manifest]:
    """Those of all data sets by their keys; DataError names the key of one that is not there, or has other labels."""
    manifests = {}
    for key, folder in config.data.folders:
        try:
            manifests[key] = Manifest.load(storage.absolute(folder))
            check_labels(config.data, manifests[key], folder)
        except DataError as error:
            is_missing = key == "data.test" and not storage.list_names(storage.absolute(folder))
            hint = "; without held-out images set data.test=null" if is_missing else ""
            raise DataError(f"{key}: {error}{hint}") from error
    return manifests


def _check_family(config: Config, family: Family) -> None:
    """Whether a family can be trained as the config says: in that precision, in such parts of a batch, and measured."""
    check_precision(family, trained_children(family, config.optim), config.train.precision)
    for num_workers in config.cluster.sizes(config.data.batch_size):
        size = micro_batch_size(config.train, config.data.batch_size, num_workers, family.compared)
        if size % family.compared:
            wrong = f"data.batch_size: {config.data.batch_size}"
            if config.data.batch_size // num_workers % family.compared == 0:  # a larger part of it would do
                wrong = f"train.micro_batch_size: {config.train.micro_batch_size}"
            raise ConfigError(
                f"{wrong}; {num_workers} workers pass {size} samples through at once,"
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


def _check_cached(config: Config, family: Family, opened: list[Opened]) -> None:
    """Whether latents may stand for images: made by a first stage that is opened, if any is, and not beside images."""
    first_stages = [] if config.data.image else [identify(one.run, one.family, one.step, one.config) for one in opened]
    check_latents(config.data, config.data.folders, first_stages)
    if config.data.image and (twice := set(config.data.batch_keys).intersection(family.cached)):
        raise ConfigError(
            f"data.arrays: {list(config.data.arrays)}; {', '.join(twice)} would take the place of the images beside "
            "them, and nobody knows what made them: leave them out, or set data.image=false"
        )


def _doubts(config: Config, family: Family, manifests: dict[str, Manifest]) -> list[str]:
    """Settings that are hardly meant so, and data sets, by their keys, that hardly go together."""
    found, train = [], config.train
    if config.data.num_classes is not None:
        (first_key, first), *others = manifests.items()
        for key, manifest in others:
            if (difference := other_classes(manifest, first)) is not None:
                found.append(f"{key}: {difference} in {first_key}; labels are taken as numbers, whatever their names")
    if train.evaluate_every is not None and config.data.test is None and not config.evaluation.metrics:
        found.append(
            f"train.evaluate_every: {train.evaluate_every}; nothing is evaluated without data.test or "
            "evaluation.metrics"
        )
    for num_workers in config.cluster.sizes(config.data.batch_size):
        part = config.data.batch_size // num_workers
        size = micro_batch_size(train, config.data.batch_size, num_workers, family.compared)
        if 2 * size < min(train.micro_batch_size or part, part):
            found.append(
                f"train.micro_batch_size: {train.micro_batch_size}; {num_workers} workers pass {size} samples through "
                f"at once: take a divisor of the {part} that each has of the batch, or another data.batch_size"
            )
            break
    if train.best_order == "min" and (train.best_metric or "").removeprefix("test/") in LARGER_IS_BETTER:
        found.append(f"train.best_order: min; keeps the checkpoint of the least {train.best_metric}: set it to max")
    if isinstance(config.family, DenoiserConfig) and (doubt := config.family.diffusion.doubt()):
        found.append(f"family.diffusion.{doubt}")
    return found


def _initial_doubts(config: Config) -> list[str]:
    """How the pipeline that gives a denoiser its first weights was trained otherwise."""
    if isinstance(config.family, DenoiserConfig) and (doubt := config.family.initial_doubt()):
        return [f"family.{doubt}"]
    return []


def _changes(config: Config) -> list[str]:
    """What the config says of the model and the run was not begun with: of losses and samplers that may be meant."""
    return [
        f"family.{key}: {own!r}; the run was begun with {theirs!r}"
        for key, own, theirs in differences(config, read_config(config.run.dir))
    ]


def _check_unchanged(first: Opened, run_dir: str) -> None:
    """ConfigError if a run's first stage has other settings than when the run was begun."""
    kept = first_stage_of(run_dir)
    for key, own, theirs in [] if kept is None else differences(first.config, kept):
        raise ConfigError(
            f"family.first_stage: {first.run}; its family.{key} is {own!r} now, and was {theirs!r} when {run_dir} was "
            "begun: put the old one back, or begin anew in another run.dir"
        )


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
    return RunIdentity(config.family_name, config.data.batch_size, data.fingerprint)


def _check_agreement(split: str, data: Loader | Unpaired) -> None:
    """DataError if the workers do not read the same data: a folder of the same name on each machine may differ."""
    first = data.fingerprint.to_dict()
    second = first.pop(UNPAIRED, None)
    own: dict[str, Any] = {f"data.{split}": first, f"data.unpaired.{split}": second}
    found = all_gathered_objects(own)
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
    keep_fp32()
    gc.freeze()  # what was imported stays: looking through it for garbage would take a twentieth of the loader's time
    run_dir = storage.absolute(config.run.dir)
    data = open_training(config.data, rank(), world_size())
    test = open_held_out(config.data, rank(), world_size())
    for split, read in (("train", data), ("test", test)):
        if read is not None:
            _check_agreement(split, read)
    measure = open_evaluator(config, test, device, rank(), world_size()) if _measures(config) else None
    opened: list[Opened] = []
    trainer = Trainer(
        build_family(config, opened.append),
        config.train,
        config.optim,
        _identity(config, data),
        run_dir,
        data,
        test,
        device,
        hooks,
        measure,
    )
    try:
        if trainer.step == 0 and not config.data.image:  # it may have saved since `check_start` looked at it
            first_stages = [identify(one.run, one.family, one.step, one.config) for one in opened]
            check_latents(config.data, config.data.folders, first_stages)
        if rank() == 0:
            storage.write(storage.join(run_dir, CONFIG_NAME), config.to_yaml().encode())
            for one in opened:
                storage.write(storage.join(run_dir, FIRST_STAGE_NAME), one.config.to_yaml().encode())
        opened.clear()  # of their networks the run keeps those that it needs
        return trainer.fit()
    finally:
        trainer.close()
