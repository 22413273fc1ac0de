"""The evaluator of a config: its features, and the real images that generated ones are compared with."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gmdist import storage
from gmdist.config import Config
from gmdist.data.config import MixedConfig
from gmdist.data.latents import Record
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.unpaired import Unpaired
from gmdist.errors import ConfigError
from gmdist.evaluation.features import Features, beside, load_features
from gmdist.evaluation.measure import Captions, Evaluator, Images
from gmdist.families.family import Batch, Condition, captions


def references(config: Config) -> list[str]:
    """Where the real images are: the config's, else data.test, else all training data."""
    named = _reference(config)
    return [named] if isinstance(named, str) else [one.train for one in named]


def _reference(config: Config) -> str | list[MixedConfig]:
    named = config.evaluation.reference or config.data.test
    return config.data.trained_on if named is None else named


def check_reference(config: Config) -> None:
    """Refuse real images that are not there, or are not images, before hours have gone into the run.

    Raises:
        ConfigError: they are latents.
        DataError: there are none, or none with captions where the run reads captions.
    """
    for folder in references(config):
        if Record.load(storage.absolute(folder)) is not None:
            raise ConfigError(
                f"evaluation.reference: {config.evaluation.reference or 'null'}; {folder} holds latents: name shards "
                "of images to compare with"
            )
        Manifest.load(storage.absolute(folder))
    if config.data.caption is not None:
        Loader(replace(config.data, image=False, num_classes=None, arrays=()), _reference(config)).first(1)


def open_features(config: Config) -> Features:
    """The features that a config compares by: those that it names, or the classifier beside the data set.

    Raises:
        ConfigError: there are none, or they describe images of another size.
    """
    given = config.evaluation.features
    features = load_features(given or beside(references(config)[0]), is_given=given is not None)
    features.check(config.data.image_size, config.data.channels)
    return features


def open_evaluator(
    config: Config, held_out: Loader | Unpaired | None, device: torch.device, rank: int = 0, world_size: int = 1
) -> Evaluator:
    """What measures a run's family, as one of some workers.

    Args:
        config: of the run.
        held_out: reads data.test, of one domain or two, for reconstructions; None: there is none.
        device: that images are made on.
        rank, world_size: of this worker.

    Raises:
        ConfigError, DataError: no features or no real images.
    """
    check_reference(config)
    features = open_features(config)
    # Images alone are read of them.
    data = replace(config.data, image=True, num_classes=None, caption=None, arrays=(), cache_dir=None)
    reference = Loader(data, _reference(config), rank, world_size)
    most = config.evaluation.num_reference_images
    return Evaluator(
        config.evaluation,
        features,
        _images(reference, min(most, reference.num_samples), device),
        None if held_out is None else _images(held_out, min(most, held_out.num_samples), device),
        config.data.num_classes or 0,
        device,
        open_captions(config, device),
    )


def _images(loader: Loader | Unpaired, count: int, device: torch.device) -> Images:
    def batches(batch_size: int) -> Iterator[Batch]:
        return (loaded.batch_on(device) for loaded in loader.sweep(batch_size, count))

    return Images(count, batches, lambda: loader.first(1).batch_on(device))


def open_captions(config: Config, device: torch.device) -> Captions | None:
    """What generated images are to show: captions of the real images, spread evenly, then once more.

    And their labels, where all have one of the run's classes. None of a run without captions.
    """
    if config.data.caption is None:
        return None
    classes = config.data.num_classes
    if not all(
        0 < Manifest.load(storage.absolute(folder)).num_labels <= (classes or 0) for folder in references(config)
    ):
        classes = None
    data = replace(config.data, image=False, num_classes=classes, arrays=(), cache_dir=None)
    loader = Loader(data, _reference(config))
    count = min(config.evaluation.num_images, loader.num_samples)

    def conditions(numbers: list[Tensor]) -> Iterator[Condition]:
        parts = [number.cpu().numpy() % count * loader.num_samples // count for number in numbers]
        for loaded in loader.at(parts):
            batch = loaded.batch_on(device)
            yield Condition(batch.get("label"), tuple(captions(batch)))

    return conditions
