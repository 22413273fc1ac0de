"""Training the small classifier that comes with an embedded data set."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from gmdist import rng
from gmdist.nets.classifier import Classifier, ClassifierSizes

VERSION = 3  # of what follows: another makes another classifier
_BATCH_SIZE = 128
_LR = 6e-3
_WEIGHT_DECAY = 0.05
_SMOOTHING = 0.1  # of labels
_MOST_SHIFT = 1 / 32  # of an image's side
_WARMUP = 0.2  # of the steps
_NUM_PASSES = 12  # through the data: with half of them glyphs are told apart 6 points worse


def train_classifier(images: Tensor, labels: Tensor, num_classes: int) -> Classifier:
    """A classifier of these images, in eval mode. The same images give the same weights on one machine.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        num_classes: labels are 0 to num_classes - 1.
    """
    count, channels, side, _ = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(ClassifierSizes(side, channels, num_classes))
    convert_conv2d_weight_memory_format(classifier, torch.channels_last)  # faster on processors
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LR, total_steps=_NUM_PASSES * -(-(count - 1) // _BATCH_SIZE), pct_start=_WARMUP
    )
    for image, label in _batches(images, labels):
        logits = classifier.logits(classifier(image))
        loss = F.cross_entropy(logits, label, label_smoothing=_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled and shifted batches: float32 [N, C, H, W] in [-1, 1], and int64 [N]; of one image, there is none."""
    most = round(images.shape[2] * _MOST_SHIFT)
    step = 0
    for number in range(_NUM_PASSES):
        order = rng.bits(number, "classifier/order", torch.arange(len(images)), 1)[:, 0].argsort()
        for chosen in order.split(_BATCH_SIZE):
            if len(chosen) == 1:
                continue  # batch norm has no variance of it
            shift = rng.integers(0, "classifier/shift", torch.tensor([step]), 2 * most + 1, (2,))[0]
            step += 1
            image = images[chosen].float() / 127.5 - 1.0
            yield torch.roll(image, (shift - most).tolist(), (2, 3)), labels[chosen]


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images uint8 [N, C, H, W] whose label it finds."""
    found = [
        classifier.logits(classifier(part.float() / 127.5 - 1.0)).argmax(dim=1) for part in images.split(_BATCH_SIZE)
    ]
    return float((torch.cat(found) == labels).double().mean())
