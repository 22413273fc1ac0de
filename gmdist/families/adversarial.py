"""What families that reconstruct share of the adversarial loss: its settings, both sides of it, its adaptive weight."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist.families.family import all_mean
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.discriminator import smallest_side

LOSSES = ("hinge", "vanilla")
_MAX_CHANNELS = 1 << 12
_MAX_WEIGHT = 1e4


@dataclass
class DiscriminatorConfig:
    """A discriminator of patches and its part in the loss; the defaults are those of Rombach 2022."""

    channels: int = 64  # width after the first layer
    num_layers: int = 3  # that halve the image; each adds to the patch that a logit judges: 16, 34, 70, 142 pixels
    loss: str = "hinge"  # hinge or vanilla: what the discriminator minimises
    weight: float = 0.5  # of the adversarial loss; 0.8 with VQGAN
    adaptive: bool = True  # scale it by the ratio of both losses' gradients; false: weight alone
    start_images: int = 600_000  # seen before it takes part, so that reconstructions are fair by then

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if not 1 <= self.channels <= _MAX_CHANNELS:
            return f"channels: {self.channels}; must be from 1 to {_MAX_CHANNELS}"
        if not 1 <= self.num_layers <= 16 or image_size < smallest_side(self.num_layers):
            return (
                f"num_layers: {self.num_layers}; must be at least 1, and image sides at least 3 * 2^num_layers pixels: "
                f"data.image_size is {image_size}"
            )
        if self.loss not in LOSSES:
            return f"loss: '{self.loss}'; must be one of {', '.join(LOSSES)}"
        if not 0.0 <= self.weight < math.inf:
            return f"weight: {self.weight}; must be a number of at least 0"
        if self.start_images < 0:
            return f"start_images: {self.start_images}; must be at least 0"
        return None


def discriminator_loss(real: Tensor, fake: Tensor, name: str) -> Tensor:
    """What the discriminator minimises: a mean over samples and patches, a scalar.

    Args:
        real, fake: logits [N, 1, h, w] of images and of reconstructions.
        name: hinge (Lim 2017, Eq. 4) or vanilla (Goodfellow 2014, Eq. 1).
    """
    if name == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    assert name == "vanilla", name
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The factor that makes the adversarial loss's gradient as long as the other's (Esser 2021, Eq. 7).

    The gradients are means over all workers: where a worker's part passes at once, the factor is that of the whole
    batch, whatever the number of workers; otherwise it is that of the micro-batches, and depends on their size.

    Args:
        nll, adversarial: losses, scalars, whose graphs stay.
        last_layer: weight of the decoder's last layer, which both reach.

    Returns:
        A scalar without gradient.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll, adversarial)]
    of_nll, of_adversarial = all_mean(at_least_fp32(torch.stack(gradients))).flatten(1).norm(dim=1)
    return (of_nll / (of_adversarial + 1e-4)).clamp(max=_MAX_WEIGHT).detach()
