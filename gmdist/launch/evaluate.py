"""A run's generated images and reconstructions beside real ones, in one process: RUN/evaluation.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gmdist import runs, storage
from gmdist.config import Config
from gmdist.data.unpaired import open_held_out
from gmdist.errors import ConfigError
from gmdist.evaluation.config import METRICS
from gmdist.evaluator import open_evaluator, references
from gmdist.families import CATALOGUE
from gmdist.families.family import Family
from gmdist.train.checkpoint import folder_name
from gmdist.train.config import micro_batch_size
from gmdist.train.held_out import held_out_means

_FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure; None: as the run's config says."""

    metrics: tuple[str, ...] | None = None  # None, and none in the config: all
    num_images: int | None = None
    batch_size: int | None = None
    features: str | None = None  # a classifier or Inception file


def evaluate(run: str, request: EvaluationRequest, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a checkpoint's averaged weights as training does, and write RUN/evaluation.json.

    Args:
        run: a run's folder (its newest sound checkpoint is used), or one of its checkpoints.
        request: what to measure.
        overrides: `key=value` of the run's config, such as another sampler.

    Returns:
        What is written: checkpoint, step, overrides, metrics by name; and where images were drawn, num_images,
        reference, features and their fingerprint.

    Raises:
        ConfigError: no such run, no features, a metric or a number that cannot be.
        DataError, CheckpointError: no real images, latents of another first stage, no sound checkpoint.
    """
    config = _asked(runs.read_config(run, overrides), request)
    runs.use_storage(config)
    device = runs.device()
    test = open_held_out(config.data)
    draws = CATALOGUE[config.family_name][0].sample is not Family.sample
    if not draws:
        _check_held_out(config, request)
    evaluator = open_evaluator(config, test, device) if draws else None
    meta, family = runs.open_run(run, config, [] if config.data.test is None else [("data.test", config.data.test)])
    family = family.to(device)
    found = {}
    if test is not None:
        # As many at once as a worker of the run takes.
        size = micro_batch_size(config.train, config.data.batch_size, meta["world_size"], family.compared)
        found = held_out_means(family, test, size, device)
    if evaluator is not None:
        found |= evaluator(family)
    run_dir, _ = runs.split_run(run)
    report = {
        "checkpoint": storage.join(run_dir, "checkpoints", folder_name(meta["step"])),
        "step": meta["step"],
        "overrides": list(overrides),
        "metrics": {name: value if math.isfinite(value) else None for name, value in found.items()},
    }
    if evaluator is not None:
        report |= {
            "num_images": config.evaluation.num_images,
            "reference": ", ".join(references(config)),
            "features": evaluator.features.location,
            "features_fingerprint": evaluator.features.fingerprint,
        }
    storage.write(storage.join(run_dir, _FILE_NAME), (json.dumps(report, indent=1) + "\n").encode())
    return report


def _check_held_out(config: Config, request: EvaluationRequest) -> None:
    """ConfigError where a family that draws no images is asked for them, or has no held-out ones to be measured on."""
    family = f"family '{config.family_name}' draws no images"
    for option, value in vars(request).items():
        if value is not None:
            raise ConfigError(f"--{option.replace('_', '-')}: {family} to compare with real ones: leave it out")
    if config.data.test is None:
        raise ConfigError(f"data.test: null; {family}, and is measured on held-out ones alone")


def _asked(config: Config, request: EvaluationRequest) -> Config:
    """The config with what is asked for in place of its own."""
    evaluation = config.evaluation
    evaluation.metrics = request.metrics if request.metrics is not None else evaluation.metrics or METRICS
    evaluation.num_images = request.num_images if request.num_images is not None else evaluation.num_images
    evaluation.batch_size = request.batch_size if request.batch_size is not None else evaluation.batch_size
    evaluation.features = request.features or evaluation.features
    try:
        evaluation.validate()
    except ConfigError as error:
        raise ConfigError(_as_option(str(error))) from error
    evaluation.make_absolute()
    return config


def _as_option(message: str) -> str:
    """A message about a key of the config, as one about the option of the command that stands for it."""
    key, colon, rest = message.removeprefix("evaluation.").partition(":")
    return f"--{key.replace('_', '-')}{colon}{rest}"


def table(report: dict[str, Any]) -> str:
    """A report for a terminal."""
    names = list(report["metrics"])
    width = max(map(len, names), default=0)
    values = ["-" if value is None else f"{value:.6g}" for value in report["metrics"].values()]
    if "features" in report:
        lines = [f"{report['checkpoint']}: {report['num_images']} generated images"]
        lines += [f"compared with {report['reference']} by {report['features']}"]
    else:
        lines = [f"{report['checkpoint']}: held-out images"]
    lines += [f"  {name:<{width}}  {value}" for name, value in zip(names, values, strict=True)]
    return "\n".join(lines)
