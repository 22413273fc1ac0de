"""What families that reconstruct share: a perceptual distance, and a discriminator of their images."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist.checks import at_least, nonnegative, one_of
from gmdist.families.family import Batch, Family, Metrics, Phase, Surroundings
from gmdist.families.gan_losses import discriminator_loss
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.discriminator import PatchDiscriminator, sizes_problem
from gmdist.nets.perceptual import LPIPS, PerceptualConfig, make_perceptual
from gmdist.nets.stylegan2_discriminator import StyleGAN2Discriminator, StyleGAN2DiscriminatorConfig
from gmdist.workers import all_mean

NAMES = ("patch", "stylegan2")
LOSSES = {"hinge": "hinge", "vanilla": "non_saturating"}  # what VQGAN calls them: what GANs do
_MAX_WEIGHT = 1e4


@dataclass
class DiscriminatorConfig:
    """A discriminator and its part in the loss; the defaults are those of Rombach 2022."""

    channels: int = 64  # of patch: width after the first layer
    num_layers: int = 3  # of patch: that halve the image; each adds to what a logit judges: 16, 34, 70, 142 pixels
    loss: str = "hinge"  # hinge or vanilla: what the discriminator minimises
    weight: float = 0.5  # of the adversarial loss; 0.8 with VQGAN
    adaptive: bool = True  # scale it by the ratio of both losses' gradients; false: weight alone
    start_images: int = 600_000  # seen before it takes part, so that reconstructions are fair by then
    warmup_images: int = 0  # from then on, over which the weight grows to its value
    name: str = "patch"  # patch: a logit for each patch; stylegan2: one for the image
    stylegan2: StyleGAN2DiscriminatorConfig = field(default_factory=StyleGAN2DiscriminatorConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        return (
            one_of(NAMES, name=self.name)
            or self._sizes_problem(image_size)
            or one_of(LOSSES, loss=self.loss)
            or nonnegative(weight=self.weight)
            or at_least(0, start_images=self.start_images, warmup_images=self.warmup_images)
        )

    def build(self, image_size: int, image_channels: int) -> nn.Module:
        """The network: images [N, C, H, W] -> logits [N, ...]."""
        if self.name == "stylegan2":
            return StyleGAN2Discriminator(self.stylegan2, image_size, image_channels)
        return PatchDiscriminator(image_channels, self.channels, self.num_layers)

    def weight_at(self, seen: int) -> float:
        """The weight after so many images, which is 0 before the start."""
        grown = (seen - self.start_images) / self.warmup_images if self.warmup_images else 1.0
        return self.weight * min(grown, 1.0) if seen >= self.start_images else 0.0

    def _sizes_problem(self, image_size: int) -> str | None:
        if self.name == "stylegan2":
            problem = self.stylegan2.problem(image_size)
            return problem and f"stylegan2.{problem}"
        return sizes_problem(self.channels, self.num_layers, image_size)


class ReconstructionFamily(Family):
    """A family that reconstructs by its child `autoencoder`, with or without a discriminator: one optimizer, or two."""

    averaged = ("autoencoder",)

    def __init__(
        self,
        autoencoder: nn.Module,
        perceptual: PerceptualConfig,
        adversary: DiscriminatorConfig | None,
        surroundings: Surroundings,
    ) -> None:
        super().__init__()
        self.seed = surroundings.seed
        self.image_size, self.image_channels = surroundings.image_size, surroundings.image_channels
        self._perceptual, self._adversary = perceptual, adversary
        if adversary is not None and adversary.name == "stylegan2":
            self.compared = max(adversary.stylegan2.minibatch_std_group, 1)
        self.autoencoder = autoencoder
        self.perceptual = make_perceptual(perceptual)
        self.discriminator = None if adversary is None else adversary.build(self.image_size, self.image_channels)

    def initialize(self, batch: Batch) -> None:
        """Read the perceptual network. From then on it is in the checkpoints, and a run opens without the files."""
        if isinstance(self.perceptual, LPIPS):
            assert self._perceptual.path is not None
            self.perceptual.load(self._perceptual.path)

    def check_files(self) -> None:
        """Read the perceptual network, on the meta device: what is missing is refused before any worker starts."""
        ReconstructionFamily.initialize(self, {})

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last layer, whose gradients the adaptive weight compares."""
        raise NotImplementedError

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The autoencoder's loss of a micro-batch: its own terms, and the adversarial one."""
        raise NotImplementedError

    def reconstruction(self, batch: Batch) -> Tensor:
        """The batch's images as the discriminator sees them in training [N, C, H, W]."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        """The autoencoder, then the discriminator where there is one."""
        if self._adversary is None:
            return [Phase("autoencoder", "autoencoder", self.loss)]
        start = self._adversary.start_images
        return [
            Phase("autoencoder", "autoencoder", self.loss, revisits=self._adversary.adaptive, changes_at=start),
            Phase("discriminator", "discriminator", self.discriminator_loss, begins_at=start),
        ]

    def discriminator_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """Images against reconstructions, through which no gradient goes."""
        assert self.discriminator is not None
        assert self._adversary is not None
        image = batch["image"]
        with torch.no_grad():
            reconstruction = self.reconstruction(batch)
        # Apart: where it compares samples with each other, neither may be told from the other by its company.
        real, fake = (at_least_fp32(self.discriminator(shown)) for shown in (image, reconstruction))
        loss = 0.5 * discriminator_loss(LOSSES[self._adversary.loss], real, fake)  # as in VQGAN (Esser 2021)
        metrics = {"loss": loss.detach(), "real": real.detach().mean(), "fake": fake.detach().mean()}
        return loss, metrics

    def adversarial_loss(self, reconstruction: Tensor, error: Tensor, seen: int) -> tuple[Tensor, Metrics] | None:
        """The loss that asks the discriminator to take reconstructions for images; None where it does not take part.

        Args:
            reconstruction: [N, C, H, W].
            error: the rest of the loss that reaches `last_layer`, which the adaptive weight compares with.
            seen: images.

        Returns:
            The weighted loss, a scalar, and what to log of it.
        """
        if self._adversary is None or seen < self._adversary.start_images:
            return None
        assert self.discriminator is not None
        adversarial = -at_least_fp32(self.discriminator(reconstruction)).mean()
        weight = torch.full_like(error, self._adversary.weight_at(seen)).detach()
        if self._adversary.adaptive:
            weight = weight * adaptive_weight(error, adversarial, self.last_layer)
        return weight * adversarial, {"adversarial": adversarial.detach(), "adversarial_weight": weight}


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
