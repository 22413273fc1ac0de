"""A tokenizer of a few numbers: each patch of an image by the nearest of some learned levels of grey."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.families.family import Batch, Metrics, Phase, Surroundings
from gmdist.families.tokenizer import Tokenizer


@dataclass
class PatchMeansConfig:
    """Its sizes."""

    codebook_size: int = 16
    patch_size: int = 4

    def problem(self, image_size: int) -> str | None:
        """None: all can be."""
        return None


class PatchMeans(Tokenizer):
    """Levels from -1 to 1, which training moves."""

    averaged = ("levels",)

    def __init__(self, config: PatchMeansConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.image_size, self.image_channels = surroundings.image_size, surroundings.image_channels
        self.codebook_size, self.patch_size = config.codebook_size, config.patch_size
        self.token_shape = (self.image_size // config.patch_size, self.image_size // config.patch_size)
        self.levels = nn.Embedding(config.codebook_size, 1)
        with torch.no_grad():
            self.levels.weight.copy_(torch.linspace(-1, 1, config.codebook_size)[:, None])

    def phases(self) -> list[Phase]:
        return [Phase("levels", "levels", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        loss = (self.reconstruct(batch) - batch["image"]).square().mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys, condition=None):
        return self.decode(torch.remainder(keys, self.codebook_size)[:, None, None].expand(-1, *self.token_shape))

    def tokens(self, image: Tensor) -> Tensor:
        means = F.avg_pool2d(image, self.patch_size).mean(dim=1)  # [N, h, w]
        return (means[..., None] - self.levels.weight[:, 0]).abs().argmin(dim=3)

    def decode(self, tokens: Tensor) -> Tensor:
        patches = self.levels(tokens).permute(0, 3, 1, 2).expand(-1, self.image_channels, -1, -1)
        return F.interpolate(patches, scale_factor=self.patch_size)
