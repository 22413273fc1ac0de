"""What describes an image by a vector: a classifier that came with a data set, or Inception-v3."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from gmdist import storage
from gmdist.errors import ConfigError
from gmdist.nets.classifier import Classifier, ClassifierSizes
from gmdist.nets.inception import WIDTH, Inception

CLASSIFIER_NAME = "classifier.safetensors"
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
_SAFETENSORS_BRACE_AT = 8  # after the length of its header
_UNUSED = ("fc.", "AuxLogits.")  # Inception's classes, which are no features


@dataclass(frozen=True)
class Features:
    """A frozen network and the file that it came from."""

    network: Classifier | Inception
    location: str
    fingerprint: str  # of the file's bytes: numbers of other features cannot be compared

    def to(self, device: torch.device) -> "Features":
        """The same on a device."""
        self.network.to(device)
        return self

    @property
    def width(self) -> int:
        """Numbers that describe an image."""
        return self.network.sizes.width if isinstance(self.network, Classifier) else WIDTH

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1], as a file of 8 bits a channel would hold them -> float32 [N, D].

        NaN is black: a model that diverges gets bad numbers, and its run goes on.
        """
        levels = ((images.float() + 1.0) * 127.5).nan_to_num(0.0).round().clamp(0.0, 255.0)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(levels / 127.5 - 1.0)

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor | None:
        """The class of each image by its features [N, D], int64 [N]; None: the network has none to offer."""
        return self.network.logits(features).argmax(dim=1) if isinstance(self.network, Classifier) else None

    def check(self, image_size: int, channels: int) -> None:
        """ConfigError if the network does not take such images."""
        if isinstance(self.network, Classifier):
            sizes = self.network.sizes
            if (sizes.image_size, sizes.channels) != (image_size, channels):
                raise ConfigError(
                    f"evaluation.features: '{self.location}'; it describes images of {sizes.image_size} pixels and "
                    f"{sizes.channels} channels, the run makes {image_size} pixels and {channels} channels: "
                    f"{_advice()}"
                )


def _advice() -> str:
    return f"name a classifier that `gmdist data make` wrote, or Inception-v3's weights from {INCEPTION_URL}"


def beside(data: str) -> str:
    """Where the classifier of a split, DEST/train or DEST/test, is: beside it."""
    return storage.join(data.rstrip("/").rpartition("/")[0], CLASSIFIER_NAME)


def load_features(location: str, *, is_given: bool = True) -> Features:
    """Read a classifier or Inception's weights.

    Args:
        location: local or s3://.
        is_given: whether the config names it, for the error.

    Raises:
        ConfigError: there is nothing, or something else.
    """
    try:
        content = storage.read(location)
    except FileNotFoundError as error:
        missing = f"'{location}'; no such file" if is_given else f"null, and there is no {location}"
        raise ConfigError(f"evaluation.features: {missing}: {_advice()}") from error
    try:
        return Features(_network(content).eval().requires_grad_(False), location, _hash(content))
    except Exception as error:  # torch.load and the network raise many kinds for a file that is something else
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"evaluation.features: '{location}'; neither a classifier nor Inception's weights ({reason}): {_advice()}"
        ) from error


def _network(content: bytes) -> Classifier | Inception:
    if content[_SAFETENSORS_BRACE_AT : _SAFETENSORS_BRACE_AT + 1] != b"{":
        return _inception(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    weights = load_safetensors(content)
    description = describe(content)
    if description is None:
        return _inception(weights)
    classifier = Classifier(ClassifierSizes(**description["sizes"]))
    classifier.load_state_dict(weights)
    return classifier


def _inception(weights: dict[str, Tensor]) -> Inception:
    network = Inception()
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith(_UNUSED)})
    return network


def save_classifier(location: str, classifier: Classifier, description: dict[str, Any]) -> None:
    """Write a classifier, with its sizes and a description of plain values. Equal classifiers make equal bytes."""
    text = json.dumps(description | {"sizes": asdict(classifier.sizes)}, sort_keys=True)
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    # One entry only: safetensors writes several in a random order.
    storage.write(location, save_safetensors(weights, {"classifier": text}))


def describe(content: bytes) -> dict[str, Any] | None:
    """The description that a classifier's file holds; None for another file."""
    try:
        num_bytes = int.from_bytes(content[:_SAFETENSORS_BRACE_AT], "little")
        header = json.loads(content[_SAFETENSORS_BRACE_AT : _SAFETENSORS_BRACE_AT + num_bytes])
        return json.loads(header["__metadata__"]["classifier"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
