"""The KL-regularised autoencoder: the first stage of latent diffusion (Rombach 2022, Sec. 3.1)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist import rng
from gmdist.families.adversarial import DiscriminatorConfig, adaptive_weight, discriminator_loss
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings
from gmdist.interchange.initial import check_initial, initial_problem, initial_state
from gmdist.interchange.pipelines import Network
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import Autoencoder, AutoencoderConfig, gaussian_kl
from gmdist.nets.blocks import ResBlock, SelfAttention2d, at_least_fp32
from gmdist.nets.discriminator import PatchDiscriminator
from gmdist.nets.image_quality import psnr, ssim
from gmdist.nets.perceptual import LPIPS, PerceptualConfig, make_perceptual


@dataclass
class AutoencoderKLConfig:
    """Sizes and loss of the autoencoder."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    kl_weight: float = 1e-6  # of the KL term in nats a sample, against errors that are summed over pixels and channels
    # Of the errors' log-scale s, which weighs them against the rest by exp(-s). false: s stays 0, as in the published
    # models, whose optimizers left it out by mistake.
    learned_logvar: bool = True
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig | None = None  # None: no adversarial loss
    # A folder of diffusers, on every worker's machine: the autoencoder's, or that of a pipeline with it. Read when the
    # run starts; from then on the weights are in its checkpoints.
    init_from: str | None = field(default=None, metadata={"location": True})

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.autoencoder.problem():
            return f"autoencoder.{problem}"
        if not 0.0 <= self.kl_weight < math.inf:
            return f"kl_weight: {self.kl_weight}; must be a number of at least 0"
        factor = self.autoencoder.downsampling
        if image_size % factor:
            return f"autoencoder.multipliers: image sides must be divisible by {factor}, not {image_size}"
        if problem := self.perceptual.problem(image_size):
            return f"perceptual.{problem}"
        if self.discriminator is not None and (problem := self.discriminator.problem(image_size)):
            return f"discriminator.{problem}"
        return initial_problem(self.init_from)


class AutoencoderKL(Family):
    """Encoder, decoder, and a Gaussian posterior held near the standard normal.

    The loss of a sample is that of latent diffusion's first stages (Rombach 2022, App. G; Esser 2021, Eq. 7):

        D (|x - x'| + w d(x, x')) / exp(s) + D s  +  kl_weight KL(q(z|x) || N(0, 1))  -  lambda judged(x')

    where D is the number of pixels times channels, |x - x'| their mean absolute error, d the perceptual distance with
    its weight w, and s = logvar a learned scalar: without d and apart from a constant, the first part is the negative
    log likelihood of a Laplace distribution of scale exp(s). Error and KL are sums over a sample and means over the
    batch, so published weights have their published meaning. lambda is 0 until `discriminator.start_images`.
    """

    averaged = ("autoencoder",)
    blocks = (ResBlock, SelfAttention2d)

    def __init__(self, config: AutoencoderKLConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        self.image_size, self.image_channels = surroundings.image_size, surroundings.image_channels
        side = surroundings.image_size // config.autoencoder.downsampling
        self.latent_shape = (config.autoencoder.latent_channels, side, side)
        self.spec = NetworkSpec(config.autoencoder, surroundings.image_channels, size=surroundings.image_size)
        self.autoencoder = Autoencoder(config.autoencoder, surroundings.image_channels, config.learned_logvar)
        self.perceptual = make_perceptual(config.perceptual)
        self.discriminator = None
        if config.discriminator is not None:
            sizes = config.discriminator.channels, config.discriminator.num_layers
            self.discriminator = PatchDiscriminator(surroundings.image_channels, *sizes)

    def initialize(self, batch: Batch) -> None:
        """Read the perceptual network, and first weights where they are another's.

        From then on they are in the checkpoints, and a run opens without the files.
        """
        if self.config.init_from is not None:
            # Of ours, the loss's scale is not there.
            self.autoencoder.load_state_dict(initial_state(self.config.init_from, "vae", self.spec), strict=False)
        if isinstance(self.perceptual, LPIPS):
            assert self.config.perceptual.path is not None
            self.perceptual.load(self.config.perceptual.path)

    def check_files(self) -> None:
        """Compare first weights with the run's autoencoder."""
        if self.config.init_from is not None:
            check_initial(self.config.init_from, "vae", self.spec)

    def for_diffusers(self) -> Network:
        """Its AutoencoderKL. The latents' scale is measured by the second stage: here it is 1."""
        return Network(self.spec, self.autoencoder.state_dict())

    def phases(self) -> list[Phase]:
        """The autoencoder, then the discriminator where there is one."""
        discriminator = self.config.discriminator
        if discriminator is None:
            return [Phase("autoencoder", "autoencoder", self.loss)]
        return [
            Phase("autoencoder", "autoencoder", self.loss, higher_order=discriminator.adaptive),
            Phase("discriminator", "discriminator", self.discriminator_loss),
        ]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The reconstruction from the sampled posterior, the weighted KL term, and the discriminator's judgement."""
        image = batch["image"]
        mean, logvar = self.autoencoder.encode(image)
        reconstruction = self._decode_sampled(batch, mean, logvar)
        l1 = (reconstruction - image).abs().mean()
        error, metrics = l1, {"l1": l1.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(reconstruction, image).mean()
            error = error + self.config.perceptual.weight * distance
            metrics["perceptual"] = distance.detach()
        num_values = image[0].numel()
        nll = num_values * error
        if self.autoencoder.logvar is not None:
            scale = at_least_fp32(self.autoencoder.logvar).squeeze(0)
            nll = nll * torch.exp(-scale) + num_values * scale
            metrics["logvar"] = scale.detach()
        kl = gaussian_kl(mean, logvar).mean()
        loss = nll + self.config.kl_weight * kl
        metrics["kl_nats"] = kl.detach()
        if self._judges(seen):
            adversarial, weight = self._adversarial(reconstruction, nll)
            loss = loss + weight * adversarial
            metrics |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        return loss, metrics | {"loss": loss.detach()}

    def discriminator_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """Images against reconstructions, through which no gradient goes."""
        assert self.discriminator is not None
        assert self.config.discriminator is not None
        image = batch["image"]
        if not self._judges(seen):
            # It learns nothing yet. One image takes it to gradients of zero, which every ZeRO stage expects.
            loss = 0.0 * at_least_fp32(self.discriminator(image[:1])).mean()
            return loss, {"loss": loss.detach()}
        with torch.no_grad():
            reconstruction = self._decode_sampled(batch, *self.autoencoder.encode(image))
        real, fake = at_least_fp32(self.discriminator(torch.cat([image, reconstruction]))).chunk(2)
        loss = discriminator_loss(real, fake, self.config.discriminator.loss)
        metrics = {"loss": loss.detach(), "real": real.detach().mean(), "fake": fake.detach().mean()}
        return loss, metrics

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode standard normal latents. A first stage is not made for this: its prior comes with the second."""
        latents = rng.normal(self.seed, "sample", keys, self.latent_shape)
        return self.autoencoder.decode(latents).clamp(-1.0, 1.0)

    def preview(self, batch: Batch) -> Tensor:
        """Originals beside their reconstructions [N, C, H, 2 W]."""
        return torch.cat([batch["image"], self.reconstruct(batch)], dim=3)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Each image decoded from the mean of its posterior [N, C, H, W] in [-1, 1]."""
        mean, _ = self.autoencoder.encode(batch["image"])
        return self.autoencoder.decode(mean).clamp(-1.0, 1.0)

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """The posterior: means, then log-variances [N, 2 Z, h, w]."""
        return {"moments": torch.cat(self.autoencoder.encode(image), dim=1)}

    def evaluate(self, batch: Batch) -> Metrics:
        """Reconstructions from the posterior's mean against images: means over images; the KL term in nats a sample."""
        image = batch["image"]
        mean, logvar = self.autoencoder.encode(image)
        reconstruction = self.autoencoder.decode(mean).clamp(-1.0, 1.0)
        metrics = {
            "psnr_db": psnr(reconstruction, image).mean(),
            "ssim": ssim(reconstruction, image).mean(),
            "l1": (reconstruction - image).abs().mean(),
            "kl_nats": gaussian_kl(mean, logvar).mean(),
        }
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, image).mean()
        return metrics

    def _judges(self, seen: int) -> bool:
        """Whether the discriminator takes part."""
        return self.config.discriminator is not None and seen >= self.config.discriminator.start_images

    def _adversarial(self, reconstruction: Tensor, nll: Tensor) -> tuple[Tensor, Tensor]:
        """The loss that asks the discriminator to take reconstructions [N, C, H, W] for images, and its weight."""
        assert self.discriminator is not None
        assert self.config.discriminator is not None
        adversarial = -at_least_fp32(self.discriminator(reconstruction)).mean()
        weight = torch.full_like(nll, self.config.discriminator.weight).detach()
        if self.config.discriminator.adaptive:
            weight = weight * adaptive_weight(nll, adversarial, self.autoencoder.decoder.conv_out.weight)
        return adversarial, weight

    def _decode_sampled(self, batch: Batch, mean: Tensor, logvar: Tensor) -> Tensor:
        """A sample of each posterior, decoded [N, C, H, W], unbounded; mean and logvar [N, Z, h, w]."""
        noise = rng.normal(self.seed, "posterior", batch["key"], self.latent_shape)
        return self.autoencoder.decode(mean + torch.exp(0.5 * logvar) * noise)
