"""The variational autoencoder: a decoder with a prior, trained on a bound of the likelihood (Kingma 2014)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist import rng
from gmdist.checks import at_least
from gmdist.families.betas import BetaConfig, beta, capacity_nats, kl_loss
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings, between_gaussians
from gmdist.families.likelihoods import LikelihoodConfig, bits_per_dim, expected_image, log_likelihood
from gmdist.families.posterior import active_units, moments, mutual_information
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.convolutional import BLOCKS, ConvolutionalConfig
from gmdist.nets.finite import all_finite
from gmdist.nets.gaussian import LOGVAR_RANGE, kl_of_dimensions, reparameterized
from gmdist.nets.image_quality import quality
from gmdist.nets.vector_autoencoder import VectorAutoencoder, latent_dim_problem

_COLLAPSED = 0.1  # of the latent dimensions: fewer than that are active
_NOTHING_TOLD = 0.02  # nats a dimension, below which none can be active that is worth the name


@dataclass
class VAEConfig:
    """Sizes, likelihood, and the weight of the KL term."""

    autoencoder: ConvolutionalConfig = field(default_factory=ConvolutionalConfig)
    latent_dim: int = 64  # numbers that an image is encoded in
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    beta: BetaConfig = field(default_factory=BetaConfig)
    iwae_samples: int = 64  # latents of an image in evaluations and scores, each of which is decoded

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.autoencoder.problem(image_size):
            return f"autoencoder.{problem}"
        if problem := latent_dim_problem(self.latent_dim):
            return problem
        if problem := self.likelihood.problem():
            return f"likelihood.{problem}"
        if problem := self.beta.problem():
            return f"beta.{problem}"
        return at_least(1, iwae_samples=self.iwae_samples)


class VAE(Family):
    """A Gaussian posterior q(z|x), a likelihood p(x|z), and the standard normal prior p(z).

    The loss of a sample is, with one z drawn from its posterior (Kingma 2014, Eq. 7; Higgins 2017, Eq. 4),

        -log p(x|z) + beta KL(q(z|x) || p(z))

    in nats, all constants included: with beta 1 it is the negative ELBO. `gmdist.families.betas` has what else may
    stand for the second term.
    """

    averaged = ("autoencoder",)
    blocks = BLOCKS

    def __init__(self, config: VAEConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        self.num_values = surroundings.image_channels * surroundings.image_size**2
        self.autoencoder = VectorAutoencoder(
            config.autoencoder,
            surroundings.image_size,
            surroundings.image_channels,
            encoded_dim=2 * config.latent_dim,
            latent_dim=config.latent_dim,
            log_scale=config.likelihood.learned_log_scale,
        )

    def phases(self) -> list[Phase]:
        """One update of both halves."""
        return [Phase("autoencoder", "autoencoder", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The negative ELBO with its weighted KL term, by one latent of each posterior."""
        mean, logvar = self.posterior(batch["image"])
        noise = rng.normal(self.seed, "posterior", batch["key"], (self.config.latent_dim,))
        nll = -self.log_likelihood(batch["image"], reparameterized(mean, logvar, noise))
        kl = kl_of_dimensions(mean, logvar)
        loss = (nll + kl_loss(self.config.beta, kl, seen)).mean()
        metrics = {"loss": loss, "nll_nats": nll.mean(), "kl_nats": kl.sum(dim=1).mean()}
        metrics["beta"] = torch.full_like(loss, beta(self.config.beta, seen))
        if self.config.beta.schedule == "capacity":
            metrics["capacity_nats"] = torch.full_like(loss, capacity_nats(self.config.beta, seen))
        if self.autoencoder.log_scale is not None:
            metrics["scale"] = self._log_scale().exp()
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and log-variance of q(z|x), each [N, Z], of images [N, C, H, W]."""
        mean, logvar = self.autoencoder.encode(image).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def checked_posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """`posterior`; DivergedError names the first layer that gives what is not finite."""
        with all_finite(self.autoencoder, "posterior"):
            return self.posterior(image)

    def log_likelihood(self, image: Tensor, latent: Tensor) -> Tensor:
        """The log-likelihood log p(x|z) in nats [N] of images [N, C, H, W] and latents [N, Z]."""
        return log_likelihood(self.config.likelihood.name, image, self.autoencoder.decode(latent), self._log_scale())

    def bounds(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The ELBO and the importance weighted estimate of log p(x) in nats, each [N], by `iwae_samples` latents.

        The KL term of the ELBO is exact, its expectation of log p(x|z) a mean over the latents. The estimate is a
        bound in the mean as well, and nears log p(x) with more latents (Burda 2015, Eq. 8). Latents are drawn by the
        sample's number: both are the same in any batch.
        """
        return self._bounds(batch, *self.checked_posterior(batch["image"]))

    def _bounds(self, batch: Batch, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        likelihoods, weights = [], []
        for number in range(self.config.iwae_samples):
            noise = rng.normal(self.seed, f"importance {number}", batch["key"], (self.config.latent_dim,))
            latent = reparameterized(mean, logvar, noise)
            likelihood = self.log_likelihood(batch["image"], latent)
            # log p(x|z) + log p(z) - log q(z|x), whose constants cancel
            ratio = 0.5 * (noise.square() + logvar - latent.square()).sum(dim=1)
            likelihoods.append(likelihood)
            weights.append(likelihood + ratio)
        elbo = torch.stack(likelihoods).mean(dim=0) - kl_of_dimensions(mean, logvar).sum(dim=1)
        return elbo, torch.stack(weights).logsumexp(dim=0) - math.log(self.config.iwae_samples)

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """What the decoder expects for latents drawn from the prior, without the likelihood's noise."""
        return self.from_latents(self.drawn_latents(keys))

    def drawn_latents(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        return rng.normal(self.seed, "sample", keys, (self.config.latent_dim,))

    def between(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        return between_gaussians(one, other, share)

    def preview(self, batch: Batch) -> Tensor:
        """Originals, their reconstructions, and samples of the prior [N, C, H, 3 W]."""
        return torch.cat([batch["image"], self.reconstruct(batch), self.sample(batch["key"])], dim=3)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Each image decoded from the mean of its posterior [N, C, H, W] in [-1, 1]."""
        return self.from_latents(self.latents(batch))

    def latents(self, batch: Batch) -> Tensor:
        """Means of the posteriors [N, Z]."""
        return self.checked_posterior(batch["image"])[0]

    def from_latents(self, latents: Tensor) -> Tensor:
        return expected_image(self.config.likelihood.name, self.autoencoder.decode(latents))

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """The posterior: means, then log-variances [N, 2 Z]."""
        return {"moments": torch.cat(self.checked_posterior(image), dim=1)}

    def evaluate(self, batch: Batch) -> Metrics:
        """Both bounds, the KL term of each dimension, reconstructions; means over images, whatever the batch."""
        image = batch["image"]
        mean, logvar = self.checked_posterior(image)
        elbo, iwae = self._bounds(batch, mean, logvar)
        reconstruction = self.from_latents(mean)
        return {
            "elbo_nats": elbo.mean(),
            "iwae_nats": iwae.mean(),
            **quality(reconstruction, image),
            "kl": kl_of_dimensions(mean, logvar).mean(dim=0),
            **moments(mean, logvar),
        }

    def summarize(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Bounds in nats and bits a dimension, reconstructions, and what the posterior tells of images.

        kl_nats_0 and so on are those of each latent dimension.
        """
        found = {name: mean.item() for name, mean in means.items() if mean.ndim == 0 and name != "posterior_logvar"}
        for bound in ("elbo", "iwae"):
            nats = found[f"{bound}_nats"]
            found[f"{bound}_bits_per_dim"] = bits_per_dim(self.config.likelihood.name, nats, self.num_values)
        found["kl_nats"] = means["kl"].sum().item()
        found["mutual_information_nats"] = mutual_information(means).item()
        found["active_units"] = float(active_units(means))
        return found | {f"kl_nats_{number}": kl.item() for number, kl in enumerate(means["kl"])}

    def concerns(self, found: Mapping[str, float]) -> list[str]:
        """A posterior that is the prior, whatever the image; but where a capacity holds the KL term, from 0 on."""
        dim, kl_nats = self.config.latent_dim, found.get("kl_nats", found.get("autoencoder/kl_nats", math.inf))
        active = found.get("active_units", dim if kl_nats >= _NOTHING_TOLD * dim else 0.0)
        # A KL term of so much tells much of the images: they are few, or all alike.
        is_told = active >= _COLLAPSED * dim or kl_nats >= dim
        if is_told or not math.isfinite(kl_nats) or self.config.beta.schedule == "capacity":
            return []
        of_them = f" of {dim} latent dimensions"
        told = (
            f"{active:.0f}{of_them} are active, and the KL term" if "active_units" in found else f"the KL term{of_them}"
        )
        return [
            f"the posterior has collapsed: {told} is {kl_nats:.3g} nats; a rise of family.beta (schedule: linear), a "
            "smaller family.beta.value or family.beta.free_nats above 0 may prevent it"
        ]

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """The ELBO and the importance weighted estimate of the log-likelihood."""
        elbo, iwae = self.bounds(batch)
        return {"elbo": elbo, "iwae": iwae}

    def _log_scale(self) -> Tensor:
        """The logarithm of the likelihood's scale, learned or not."""
        if self.autoencoder.log_scale is not None:
            return at_least_fp32(self.autoencoder.log_scale).squeeze(0)
        return torch.tensor(math.log(self.config.likelihood.scale), dtype=torch.float64)  # promotes no image
