"""The KL-regularised autoencoder: the first stage of latent diffusion (Rombach 2022, Sec. 3.1)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist import rng
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings
from gmdist.nets.autoencoder import Autoencoder, AutoencoderConfig, gaussian_kl
from gmdist.nets.blocks import ResBlock, SelfAttention2d


@dataclass
class AutoencoderKLConfig:
    """Sizes and loss of the autoencoder."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    kl_weight: float = 1e-6  # of the KL term in nats a sample, against the mean absolute error of a pixel

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.autoencoder.problem():
            return f"autoencoder.{problem}"
        if not 0.0 <= self.kl_weight < math.inf:
            return f"kl_weight: {self.kl_weight}; must be a number of at least 0"
        factor = self.autoencoder.downsampling
        if image_size % factor:
            return f"autoencoder.multipliers: image sides must be divisible by {factor}, not {image_size}"
        return None


class AutoencoderKL(Family):
    """Encoder, decoder, and a Gaussian posterior held near the standard normal."""

    averaged = ("autoencoder",)
    blocks = (ResBlock, SelfAttention2d)

    def __init__(self, config: AutoencoderKLConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        self.image_size, self.image_channels = surroundings.image_size, surroundings.image_channels
        side = surroundings.image_size // config.autoencoder.downsampling
        self.latent_shape = (config.autoencoder.latent_channels, side, side)
        self.autoencoder = Autoencoder(config.autoencoder, surroundings.image_channels)

    def phases(self) -> list[Phase]:
        """One network, one loss."""
        return [Phase("autoencoder", "autoencoder", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """Mean absolute error of a reconstruction from the sampled posterior, and the weighted KL term."""
        mean, logvar = self.autoencoder.encode(batch["image"])
        noise = rng.normal(self.seed, "posterior", batch["key"], self.latent_shape)
        image = self.autoencoder.decode(mean + torch.exp(0.5 * logvar) * noise).float()
        error = (image - batch["image"]).abs().mean()
        kl = gaussian_kl(mean, logvar).mean()
        loss = error + self.config.kl_weight * kl
        return loss, {"loss": loss.detach(), "l1": error.detach(), "kl_nats": kl.detach()}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode standard normal latents. A first stage is not made for this: its prior comes with the second."""
        latents = rng.normal(self.seed, "sample", keys, self.latent_shape)
        return self.autoencoder.decode(latents).float().clamp(-1.0, 1.0)

    def preview(self, batch: Batch) -> Tensor:
        """Originals beside their reconstructions [N, C, H, 2 W]."""
        return torch.cat([batch["image"], self.reconstruct(batch)], dim=3)

    def evaluate(self, batch: Batch) -> Metrics:
        """Peak signal-to-noise ratio in dB, a mean over images, and mean absolute error."""
        image = self.reconstruct(batch)
        mse = (image - batch["image"]).square().mean(dim=(1, 2, 3))
        psnr = 10.0 * (math.log10(4.0) - torch.log10(mse.clamp_min(1e-10)))  # pixels span 2
        return {"psnr_db": psnr.mean(), "l1": (image - batch["image"]).abs().mean()}

    def reconstruct(self, batch: Batch) -> Tensor:
        """Each image decoded from the mean of its posterior [N, C, H, W] in [-1, 1]."""
        mean, _ = self.autoencoder.encode(batch["image"])
        return self.autoencoder.decode(mean).float().clamp(-1.0, 1.0)
