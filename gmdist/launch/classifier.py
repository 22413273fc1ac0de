"""The classifier beside an embedded data set: trained once, after its shards are made."""

import torch
from torch import Tensor

from gmdist import storage
from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.samples import IMAGE_SHAPES
from gmdist.evaluation.classifier import VERSION, accuracy, train_classifier
from gmdist.evaluation.features import CLASSIFIER_NAME, describe, save_classifier

_READ_AT_ONCE = 256


def ensure_classifier(name: str, folder: str) -> str:
    """Train the classifier of an embedded data set that was made in a folder, if it is not there already.

    Returns:
        A line that says how good it is.
    """
    location = storage.join(folder, CLASSIFIER_NAME)
    splits = {split: storage.join(folder, split) for split in ("train", "test")}
    manifests = {split: Manifest.load(path) for split, path in splits.items()}
    made_for = {"version": VERSION} | {split: manifest.hash for split, manifest in manifests.items()}
    description = describe(storage.read(location)) if storage.exists(location) else None
    if description is None or description.get("made_for") != made_for:
        classes = manifests["train"].classes
        images, labels = _read(name, splits["train"], len(classes))
        classifier = train_classifier(images, labels, len(classes))
        found = accuracy(classifier, *_read(name, splits["test"], len(classes)))
        description = {"made_for": made_for, "classes": classes, "test_accuracy": found}
        save_classifier(location, classifier, description)
    return f"{location}: right about {description['test_accuracy']:.1%} of the test images"


def _read(name: str, folder: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """All images of a split, uint8 [N, C, H, W], and their labels, int64 [N]."""
    size, channels = IMAGE_SHAPES[name]
    config = DataConfig(_READ_AT_ONCE, size, folder, channels=channels, num_classes=num_classes)
    images, labels = [], []
    for loaded in Loader(config, folder).sweep(_READ_AT_ONCE):
        assert loaded.pixels is not None
        images.append(loaded.pixels.clone())  # its memory is used again
        labels.append(loaded.tensors["label"])
    return torch.cat(images).permute(0, 3, 1, 2).contiguous(), torch.cat(labels)
