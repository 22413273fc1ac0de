"""A family of two domains in a few numbers: each colour of an image becomes a mixture of its colours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gmdist.config import Config, from_tree
from gmdist.data.pack import write_shards
from gmdist.families.family import DIRECTIONS, Batch, Family, Metrics, Phase, Surroundings
from gmdist.images import png

SIZE = 8


@dataclass
class RecolourConfig:
    """It has no settings."""

    def problem(self, image_size: int) -> str | None:
        """None: all can be."""
        return None


class Recolour(Family):
    """One matrix for each direction, which training moves towards the colours of the other domain."""

    averaged = ("colours",)
    inputs = ("image", "image_b")

    def __init__(self, config: RecolourConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.channels, self.image_size = surroundings.image_channels, surroundings.image_size
        self.colours = nn.ModuleDict({name: nn.Conv2d(self.channels, self.channels, 1) for name in DIRECTIONS})

    def phases(self) -> list[Phase]:
        return [Phase("colours", "colours", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        loss = self.evaluate(batch)["colour"]
        return loss, {"loss": loss.detach()}

    def evaluate(self, batch: Batch) -> Metrics:
        ways = zip(DIRECTIONS, (batch["image"], batch["image_b"]), (batch["image_b"], batch["image"]), strict=True)
        errors = [(self.colours[way](real).mean((2, 3)) - other.mean((2, 3))).square() for way, real, other in ways]
        return {"colour": torch.stack(errors).mean()}

    def sample(self, keys: Tensor, condition: Any = None) -> Tensor:
        return torch.zeros(len(keys), self.channels, self.image_size, self.image_size, device=keys.device)

    def translate(self, image: Tensor, direction: str) -> Tensor:
        return self.colours[direction](image)


def picture(number: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, channels), np.uint8)


def write(folder: Path, first: int, count: int = 12, num_shards: int = 2) -> str:
    """A data set of pictures of its own, from a number on."""
    samples = ((f"{i}", {"png": png(picture(i)), "cls": b"0"}) for i in range(first, first + count))
    write_shards(samples, str(folder), num_shards=num_shards)
    return str(folder)


def config(run: Path, train: str, second: str | None, **data: Any) -> Config:
    """Of a run of a few steps; the family has to be in the catalogue as "recolour"."""
    unpaired = None if second is None else {"train": second}
    settings = {"train": train, "unpaired": unpaired, "image_size": SIZE, "batch_size": 4}
    tree = {
        "name": "recolour",
        "family": {"name": "recolour"},
        "data": settings | data,
        "optim": {"colours": {"lr": 0.02}},
        "train": {"num_steps": 4, "checkpoint_every": 2, "log_every": 1, "sample_every": None},
        "run": {"dir": str(run)},
    }
    return from_tree(tree)
