"""Four kinds of images that are easy to tell apart, and a family that makes them."""

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.families.family import Condition, Family

SIZE, CLASSES = 16, 4


def drawn(keys: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Images float32 [N, 1, 16, 16] in [-1, 1]: a bright quarter, and noise."""
    images = rng.normal(seed, "patterns", keys, (1, SIZE, SIZE)) * 0.15 - 0.6
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, label // 2 * 8 : label // 2 * 8 + 8, label % 2 * 8 : label % 2 * 8 + 8] += 0.9
    return images.clamp(-1.0, 1.0)


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 16, 16] and their labels, in turn."""
    keys = torch.arange(count)
    labels = keys % CLASSES
    return ((drawn(keys, labels, seed) + 1.0) * 127.5).round().to(torch.uint8), labels


def captioned(labels: Tensor) -> Condition:
    """Captions, "pattern 0" to "pattern 3", and their labels."""
    return Condition(labels, tuple(f"pattern {label}" for label in labels.tolist()))


class Reader(Family):
    """Makes what its prompts say, and black images without any."""

    conditions = ("prompt",)

    def sample(self, keys, condition=None):
        if condition is None or condition.prompts is None:
            return torch.full((len(keys), 1, SIZE, SIZE), -1.0)
        return drawn(keys, torch.tensor([int(prompt[-1]) for prompt in condition.prompts]), seed=3)


class Painter(Family):
    """Makes them by their labels, except where it is told to make some mistakes."""

    conditions = ("label",)

    def __init__(self, seed: int, wrong: int = 0, reconstructs: bool = False) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.seed, self.wrong, self.reconstructs = seed, wrong, reconstructs

    def sample(self, keys, condition=None):
        labels = condition.label if condition is not None and condition.label is not None else keys * 0
        return drawn(keys, torch.where(keys < self.wrong, 3 - labels, labels), self.seed)

    def reconstruct(self, batch):
        return batch["image"] * 0.9 if self.reconstructs else None
