"""The autoencoder: an image through a vector and back, by the squared error (Hinton 2006)."""

from dataclasses import dataclass, field

from torch import Tensor

from gmdist import rng
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings
from gmdist.nets.convolutional import BLOCKS, ConvolutionalConfig
from gmdist.nets.finite import all_finite
from gmdist.nets.image_quality import quality
from gmdist.nets.vector_autoencoder import VectorAutoencoder, latent_dim_problem


@dataclass
class PlainAutoencoderConfig:
    """Sizes of the autoencoder."""

    autoencoder: ConvolutionalConfig = field(default_factory=ConvolutionalConfig)
    latent_dim: int = 64  # numbers that an image goes through

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.autoencoder.problem(image_size):
            return f"autoencoder.{problem}"
        return latent_dim_problem(self.latent_dim)


class PlainAutoencoder(Family):
    """Encoder and decoder with a vector between them, trained on the mean squared error alone."""

    averaged = ("autoencoder",)
    blocks = BLOCKS

    def __init__(self, config: PlainAutoencoderConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.latent_dim, self.seed = config.latent_dim, surroundings.seed
        self.autoencoder = VectorAutoencoder(
            config.autoencoder,
            surroundings.image_size,
            surroundings.image_channels,
            encoded_dim=config.latent_dim,
            latent_dim=config.latent_dim,
        )

    def phases(self) -> list[Phase]:
        """One update of both halves."""
        return [Phase("autoencoder", "autoencoder", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The squared error, a mean over pixels and channels."""
        image = batch["image"]
        loss = (self.autoencoder.decode(self.autoencoder.encode(image)) - image).square().mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode standard normal vectors, for want of better: nothing told the latents how to be distributed.

        These are not samples of a model of the data; for those there is the `vae`.
        """
        return self.from_latents(rng.normal(self.seed, "sample", keys, (self.latent_dim,)))

    def reconstruct(self, batch: Batch) -> Tensor:
        """Each image by way of its vector [N, C, H, W] in [-1, 1]."""
        return self.from_latents(self.latents(batch))

    def latents(self, batch: Batch) -> Tensor:
        return self.encode(batch["image"])["latent"]

    def from_latents(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).clamp(-1.0, 1.0)

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """The vectors [N, Z]; DivergedError names the first layer that gives what is not finite."""
        with all_finite(self.autoencoder, "vectors"):
            return {"latent": self.autoencoder.encode(image)}

    def evaluate(self, batch: Batch) -> Metrics:
        """Reconstructions against images, means over images."""
        return quality(self.reconstruct(batch), batch["image"])
