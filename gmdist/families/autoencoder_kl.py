"""The KL-regularised autoencoder: the first stage of latent diffusion (Rombach 2022, Sec. 3.1)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist import rng
from gmdist.checks import nonnegative
from gmdist.families.adversarial import DiscriminatorConfig, ReconstructionFamily
from gmdist.families.family import Batch, Condition, Metrics, Surroundings
from gmdist.interchange.initial import check_initial, initial_problem, initial_state
from gmdist.interchange.pipelines import Network
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets import stylegan2_discriminator
from gmdist.nets.autoencoder import Autoencoder, AutoencoderConfig
from gmdist.nets.blocks import ResBlock, SelfAttention2d, at_least_fp32
from gmdist.nets.finite import all_finite
from gmdist.nets.gaussian import kl_of_dimensions, reparameterized
from gmdist.nets.image_quality import quality
from gmdist.nets.perceptual import PerceptualConfig


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
        if problem := nonnegative(kl_weight=self.kl_weight):
            return problem
        factor = self.autoencoder.downsampling
        if image_size % factor:
            return f"autoencoder.multipliers: image sides must be divisible by {factor}, not {image_size}"
        if problem := self.perceptual.problem(image_size):
            return f"perceptual.{problem}"
        if self.discriminator is not None and (problem := self.discriminator.problem(image_size)):
            return f"discriminator.{problem}"
        return initial_problem(self.init_from)


class AutoencoderKL(ReconstructionFamily):
    """Encoder, decoder, and a Gaussian posterior held near the standard normal.

    The loss of a sample is that of latent diffusion's first stages (Rombach 2022, App. G; Esser 2021, Eq. 7):

        D (|x - x'| + w d(x, x')) / exp(s) + D s  +  kl_weight KL(q(z|x) || N(0, 1))  -  lambda logit(x')

    where D is the number of pixels times channels, |x - x'| their mean absolute error, d the perceptual distance with
    its weight w, and s = logvar a learned scalar: without d and apart from a constant, the first part is the negative
    log likelihood of a Laplace distribution of scale exp(s). Error and KL are sums over a sample and means over the
    batch, so published weights have their published meaning. The discriminator's logit counts from
    `discriminator.start_images` on.
    """

    blocks = (ResBlock, SelfAttention2d, *stylegan2_discriminator.BLOCKS)
    autoencoder: Autoencoder

    def __init__(self, config: AutoencoderKLConfig, surroundings: Surroundings) -> None:
        autoencoder = Autoencoder(config.autoencoder, surroundings.image_channels, config.learned_logvar)
        super().__init__(autoencoder, config.perceptual, config.discriminator, surroundings)
        self.config = config
        side = surroundings.image_size // config.autoencoder.downsampling
        self.latent_shape = (config.autoencoder.latent_channels, side, side)
        self.spec = NetworkSpec(config.autoencoder, surroundings.image_channels, size=surroundings.image_size)

    def initialize(self, batch: Batch) -> None:
        """Read first weights, where they are another's."""
        super().initialize(batch)
        if self.config.init_from is not None:
            # Of ours, the loss's scale is not there.
            self.autoencoder.load_state_dict(initial_state(self.config.init_from, "vae", self.spec), strict=False)

    def check_files(self) -> None:
        """Compare first weights with the run's autoencoder."""
        super().check_files()
        if self.config.init_from is not None:
            check_initial(self.config.init_from, "vae", self.spec)

    def for_diffusers(self) -> Network:
        """Its AutoencoderKL. The latents' scale is measured by the second stage: here it is 1."""
        return Network(self.spec, self.autoencoder.state_dict())

    @property
    def last_layer(self) -> Tensor:
        return self.autoencoder.decoder.conv_out.weight

    def reconstruction(self, batch: Batch) -> Tensor:
        """From a sample of the posterior."""
        return self._decode_sampled(batch, *self.autoencoder.encode(batch["image"]))

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The reconstruction from the sampled posterior, the weighted KL term, and the adversarial term."""
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
        kl = kl_of_dimensions(mean, logvar).flatten(1).sum(dim=1).mean()
        loss = nll + self.config.kl_weight * kl
        metrics["kl_nats"] = kl.detach()
        if term := self.adversarial_loss(reconstruction, nll, seen):
            adversarial, logged = term
            loss, metrics = loss + adversarial, metrics | logged
        return loss, metrics | {"loss": loss.detach()}

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and log-variance of q(z|x), each [N, Z, h, w]; DivergedError names a layer that is not finite."""
        with all_finite(self.autoencoder, "posterior"):
            return self.autoencoder.encode(image)

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode standard normal latents. A first stage is not made for this: its prior comes with the second."""
        latents = rng.normal(self.seed, "sample", keys, self.latent_shape)
        return self.autoencoder.decode(latents).clamp(-1.0, 1.0)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Each image decoded from the mean of its posterior [N, C, H, W] in [-1, 1]."""
        mean, _ = self.posterior(batch["image"])
        return self.autoencoder.decode(mean).clamp(-1.0, 1.0)

    def latents(self, batch: Batch) -> Tensor:
        """Means of the posteriors [N, Z h w]."""
        return self.posterior(batch["image"])[0].flatten(1)

    def from_latents(self, latents: Tensor) -> Tensor:
        """Decoded [N, C, H, W]."""
        return self.autoencoder.decode(latents.unflatten(1, self.latent_shape)).clamp(-1.0, 1.0)

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """The posterior: means, then log-variances [N, 2 Z, h, w]."""
        return {"moments": torch.cat(self.posterior(image), dim=1)}

    def evaluate(self, batch: Batch) -> Metrics:
        """Reconstructions from the posterior's mean against images: means over images; the KL term in nats a sample."""
        image = batch["image"]
        mean, logvar = self.posterior(image)
        reconstruction = self.autoencoder.decode(mean).clamp(-1.0, 1.0)
        metrics = {
            **quality(reconstruction, image),
            "l1": (reconstruction - image).abs().mean(),
            "kl_nats": kl_of_dimensions(mean, logvar).flatten(1).sum(dim=1).mean(),
        }
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, image).mean()
        return metrics

    def _decode_sampled(self, batch: Batch, mean: Tensor, logvar: Tensor) -> Tensor:
        """A sample of each posterior, decoded [N, C, H, W], unbounded; mean and logvar [N, Z, h, w]."""
        noise = rng.normal(self.seed, "posterior", batch["key"], self.latent_shape)
        return self.autoencoder.decode(reparameterized(mean, logvar, noise))
