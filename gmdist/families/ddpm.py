"""Denoising diffusion in pixel space (Ho 2020)."""

from dataclasses import dataclass

from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.families.denoiser import DenoiserConfig, DenoiserFamily
from gmdist.families.family import Batch, Surroundings
from gmdist.interchange.pipelines import Pipeline


@dataclass(kw_only=True)
class DDPMConfig(DenoiserConfig):
    """A denoiser of images."""

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        problem = super().problem(image_size)
        if problem is None and image_size % self.granularity:
            key = "dit.patch_size" if self.network == "dit" else "unet.multipliers"
            return f"{key}: the network needs image sides divisible by {self.granularity}, not {image_size}"
        return problem


class DDPM(DenoiserFamily):
    """A denoiser of pixels."""

    clip = 1.0

    def __init__(self, config: DDPMConfig, surroundings: Surroundings) -> None:
        side = surroundings.image_size
        super().__init__(config, surroundings, (surroundings.image_channels, side, side), "images have")

    def for_diffusers(self) -> Pipeline:
        """Nothing."""
        raise ConfigError(
            "family.name: 'ddpm'; diffusers' pipelines of pixels take no classes and no captions, and their DDIM clips "
            "the image without the noise that belongs to it"
        )

    def clean(self, batch: Batch) -> Tensor:
        return batch["image"]

    def shown(self, x: Tensor) -> Tensor:
        return x.clamp(-1.0, 1.0)
