"""What a first stage whose latents are codes is to those that train on them."""

import torch
from torch import Tensor

from gmdist.families.family import Batch, Family


class Tokenizer(Family):
    """A family that turns an image into a grid of codes, and a grid of codes into an image.

    `tokens` and `decode` need its averaged children and its own buffers, and no other child.
    """

    image_size: int
    image_channels: int
    codebook_size: int
    token_shape: tuple[int, int]  # codes of an image: rows, columns

    def tokens(self, image: Tensor) -> Tensor:
        """The codes of images [N, C, H, W] in [-1, 1]: int64 [N, h, w], each below `codebook_size`.

        For a loss, too: it does not wait for the device.
        """
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] of codes int64 [N, h, w]."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """The codes, in fp32 at least: in autocast features are rounded, and some are then nearest to other codes."""
        with torch.autocast(image.device.type, enabled=False):
            return {"tokens": self.tokens(image)}

    def reconstruct(self, batch: Batch) -> Tensor:
        """Each image by way of its codes [N, C, H, W] in [-1, 1]."""
        return self.decode(self.tokens(batch["image"]))
