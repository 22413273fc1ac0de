"""Diffusion in the latent space of a frozen autoencoder (Rombach 2022)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist import rng
from gmdist.diffusion.process import Diffusion, DiffusionConfig, SamplerConfig
from gmdist.errors import ConfigError
from gmdist.families.autoencoder_kl import AutoencoderKL
from gmdist.families.denoising import (
    denoiser_problem,
    denoising_loss,
    drop_labels,
    label_predictors,
    noise_level_losses,
    sample_denoiser,
)
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings, conditioned_labels
from gmdist.nets.blocks import ResBlock, SelfAttention2d
from gmdist.nets.unet import UNet, UNetConfig

_ENCODED_AT_ONCE = 16


@dataclass
class LatentDiffusionConfig:
    """A UNet on the latents of another run; class-conditional where the data has classes."""

    first_stage: str = field(metadata={"location": True})  # run folder, or checkpoint, of an autoencoder_kl
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(
        default_factory=lambda: DiffusionConfig(schedule="scaled_linear", sampler=SamplerConfig(guidance=2.0))
    )
    label_dropout: float = 0.1  # share of samples trained without their label, for guidance

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        return denoiser_problem(self.unet, self.diffusion, self.label_dropout)


class LatentDiffusion(Family):
    """A denoiser of latents, and the frozen first stage that makes and shows them."""

    averaged = ("denoiser",)
    blocks = (ResBlock, SelfAttention2d)
    cached = ("moments",)
    latent_scale: Tensor

    def __init__(self, config: LatentDiffusionConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        self.num_classes = surroundings.num_classes
        first_stage = surroundings.open_run(config.first_stage)
        if not isinstance(first_stage, AutoencoderKL):
            raise ConfigError(f"family.first_stage: {config.first_stage} is not a run of autoencoder_kl")
        if (first_stage.image_size, first_stage.image_channels) != (
            surroundings.image_size,
            surroundings.image_channels,
        ):
            raise ConfigError(
                f"family.first_stage: {config.first_stage} was trained on {first_stage.image_channels} channels of "
                f"{first_stage.image_size} pixels; data.channels and data.image_size are "
                f"{surroundings.image_channels} and {surroundings.image_size}"
            )
        self.shape = first_stage.latent_shape
        if self.shape[1] % config.unet.downsampling:
            raise ConfigError(
                f"family.unet.multipliers: the UNet needs sides divisible by {config.unet.downsampling}; "
                f"the latents of {config.first_stage} have {self.shape[1]}"
            )
        self.first_stage = first_stage.autoencoder
        self.diffusion = Diffusion(config.diffusion)
        self.denoiser = UNet(config.unet, self.shape[0], self.num_classes)
        self.register_buffer("latent_scale", torch.ones(()))

    def initialize(self, batch: Batch) -> None:
        """Measure the scale that gives latents unit variance (Rombach 2022, App. G)."""
        parts: list[Batch] = [
            {name: batch[name][i : i + _ENCODED_AT_ONCE] for name in ("image", "moments", "key") if name in batch}
            for i in range(0, len(batch["key"]), _ENCODED_AT_ONCE)
        ]
        latents = torch.cat([self._latents(part) for part in parts])
        self.latent_scale.copy_(1.0 / latents.double().std())

    def phases(self) -> list[Phase]:
        """One network, one loss; the first stage stays frozen."""
        return [Phase("denoiser", "denoiser", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The weighted squared error of the prediction on scaled latents."""
        label = None
        if self.num_classes:
            label = drop_labels(batch["label"], batch["key"], self.num_classes, self.config.label_dropout, self.seed)
        predict, _ = label_predictors(self.denoiser, label, self.num_classes)
        x0 = self._latents(batch) * self.latent_scale
        loss = denoising_loss(predict, self.diffusion, x0, batch["key"], self.seed).mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] for keys [N]."""
        label = conditioned_labels(keys, condition, self.num_classes)
        predictors = label_predictors(self.denoiser, label, self.num_classes)
        latents = sample_denoiser(*predictors, self.diffusion, keys, self.shape, self.seed)
        return self.first_stage.decode(latents / self.latent_scale).float().clamp(-1.0, 1.0)

    def evaluate(self, batch: Batch) -> Metrics:
        """The training loss with every label given, and the unweighted loss by noise level."""
        label = batch["label"] if self.num_classes else None
        predict, _ = label_predictors(self.denoiser, label, self.num_classes)
        x0 = self._latents(batch) * self.latent_scale
        return noise_level_losses(predict, self.diffusion, x0, batch["key"], self.seed)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        """A sample of each image's posterior, unscaled [N, Z, h, w]; the batch may have its moments [N, 2 Z, h, w]."""
        if "moments" in batch:
            channels, *sides = self.shape
            if batch["moments"].shape[1:] != (2 * channels, *sides):
                raise ConfigError(
                    f"data.arrays: 'moments.npy'; they are {list(batch['moments'].shape[1:])}, and those of "
                    f"{self.config.first_stage} are {[2 * channels, *sides]}: encode the data set with it"
                )
            mean, logvar = batch["moments"].float().chunk(2, dim=1)
        else:
            mean, logvar = self.first_stage.encode(batch["image"])
        return mean + torch.exp(0.5 * logvar) * rng.normal(self.seed, "posterior", batch["key"], self.shape)
