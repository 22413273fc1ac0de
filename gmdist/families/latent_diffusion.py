"""Diffusion in the latent space of a frozen autoencoder (Rombach 2022)."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gmdist import rng
from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.errors import ConfigError, DivergedError
from gmdist.families.autoencoder_kl import AutoencoderKL
from gmdist.families.denoiser import DenoiserConfig, DenoiserFamily
from gmdist.families.family import Batch, Surroundings
from gmdist.families.first_stage import open_first_stage
from gmdist.interchange.initial import latent_scale_of
from gmdist.interchange.pipelines import Network, Pipeline, dit_pipeline, stable_diffusion
from gmdist.nets.gaussian import reparameterized

_PIXELS_AT_ONCE = 1 << 20  # through the first stage, whose memory they decide: some 6 GiB in fp32 at its usual widths
_MOST_DEVIATION = 2.0  # from a standard deviation of 1, of latents at the scale of the pipeline that they are of
_MOST_GAIN = 100.0  # of errors in a sampler's first step; what is left of them has the size of the latents


@dataclass(kw_only=True)
class LatentDiffusionConfig(DenoiserConfig):
    """A denoiser of the latents of another run."""

    first_stage: str = field(metadata={"location": True})  # run folder, or checkpoint, of an autoencoder_kl
    diffusion: DiffusionConfig = field(
        default_factory=lambda: DiffusionConfig(schedule="scaled_linear", sampler=SamplerConfig(guidance=2.0))
    )

    def problem(self, image_size: int) -> str | None:
        if self.diffusion.schedule == "edm" and self.diffusion.edm.sigma_data != 1.0:
            return (
                f"diffusion.edm.sigma_data: {self.diffusion.edm.sigma_data}; must be 1, the standard deviation that "
                "latents are scaled to, and with it p_mean + ln 2, 2 sigma_min and 2 sigma_max of what goes with 0.5"
            )
        if problem := super().problem(image_size):
            return problem
        if self.diffusion.prediction == "eps" and (gain := self.diffusion.first_gain()) > _MOST_GAIN:
            return (
                f"diffusion.prediction: 'eps'; the sampler's first step makes its errors {gain:,.0f} times as large, "
                "and latents have no bounds: take v or x0, or sampler.spacing 'leading', or more steps"
            )
        return None


class LatentDiffusion(DenoiserFamily):
    """A denoiser of latents, and the frozen first stage that makes and shows them."""

    cached = ("moments",)
    latent_scale: Tensor

    def __init__(self, config: LatentDiffusionConfig, surroundings: Surroundings) -> None:
        first_stage = open_first_stage(config.first_stage, AutoencoderKL, "autoencoder_kl", surroundings)
        source = f"the latents of {config.first_stage} have"
        super().__init__(config, surroundings, first_stage.latent_shape, source)
        self.first_stage, self._first_spec = first_stage.autoencoder, first_stage.spec
        self._first_stage_run = config.first_stage
        self._at_once = max(1, _PIXELS_AT_ONCE // surroundings.image_size**2)
        self.register_buffer("latent_scale", torch.ones(()))

    def initialize(self, batch: Batch) -> None:
        """Measure the scale that gives latents unit variance (Rombach 2022, App. G), and read first weights.

        A pipeline's network learned from latents at the pipeline's scale. It stays where it is one of these latents: of
        those of another first stage the standard deviation would be far from 1.
        """
        super().initialize(batch)
        parts: list[Batch] = [
            {name: batch[name][i : i + self._at_once] for name in ("image", "moments", "key") if name in batch}
            for i in range(0, len(batch["key"]), self._at_once)
        ]
        latents = torch.cat([self._latents(part) for part in parts])
        deviation = latents.double().std()
        if not (deviation.isfinite() and deviation > 0.0):
            raise DivergedError(
                f"family.first_stage: '{self._first_stage_run}'; the standard deviation of its latents is "
                f"{deviation:.3g}; it must be finite and above 0: check its reconstructions, and train it again"
            )
        measured = 1.0 / deviation
        known = None if self.config.init_from is None else latent_scale_of(self.config.init_from)
        is_theirs = known is not None and bool((known / measured).log().abs() < math.log(_MOST_DEVIATION))
        self.latent_scale.copy_(torch.as_tensor(known) if is_theirs else measured)

    def check_files(self) -> None:
        """Read the pipeline's scale, too."""
        super().check_files()
        if self.config.init_from is not None:
            latent_scale_of(self.config.init_from)

    def for_diffusers(self) -> Pipeline:
        """StableDiffusionPipeline of a UNet under CLIP's captions, DiTPipeline of a transformer with classes."""
        network = Network(self.spec, self.denoiser.network.state_dict())
        first_stage = Network(
            replace(self._first_spec, latent_scale=float(self.latent_scale)), self.first_stage.state_dict()
        )
        if self.config.network == "dit":
            return dit_pipeline(network, first_stage, self.config.diffusion)
        if self.conditioner.clip is None:
            told = {"none": "nothing", "class": "classes", "text": "words"}[self.conditioner.kind]
            raise ConfigError(
                f"family.conditioning: a UNet of latents that is told {told}; diffusers has pipelines of UNets with "
                "CLIP's captions (StableDiffusionPipeline) and of transformers with classes (DiTPipeline)"
            )
        return stable_diffusion(network, first_stage, self.conditioner.clip.for_transformers(), self.config.diffusion)

    def clean(self, batch: Batch) -> Tensor:
        return self._latents(batch) * self.latent_scale

    def shown(self, x: Tensor) -> Tensor:
        parts = (x / self.latent_scale).split(self._at_once)
        return torch.cat([self.first_stage.decode(part).float() for part in parts]).clamp(-1.0, 1.0)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        """A sample of each image's posterior, unscaled [N, Z, h, w]; the batch may have its moments [N, 2 Z, h, w]."""
        if "moments" in batch:
            channels, *sides = self.shape
            if batch["moments"].shape[1:] != (2 * channels, *sides):
                raise ConfigError(
                    f"data.arrays: 'moments.npy'; they are {list(batch['moments'].shape[1:])}, and those of "
                    f"{self._first_stage_run} are {[2 * channels, *sides]}: encode the data set with it"
                )
            mean, logvar = batch["moments"].float().chunk(2, dim=1)
        else:
            mean, logvar = self.first_stage.encode(batch["image"])
        return reparameterized(mean, logvar, rng.normal(self.seed, "posterior", batch["key"], self.shape))
