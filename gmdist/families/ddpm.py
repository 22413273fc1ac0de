"""Denoising diffusion in pixel space (Ho 2020)."""

from dataclasses import dataclass, field

from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig
from gmdist.diffusion.process import Diffusion
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


@dataclass
class DDPMConfig:
    """A UNet on images; class-conditional where the data has classes."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    label_dropout: float = 0.1  # share of samples trained without their label, for guidance

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        problem = denoiser_problem(self.unet, self.diffusion, self.label_dropout)
        if problem is None and image_size % self.unet.downsampling:
            return (
                f"unet.multipliers: the UNet needs image sides divisible by {self.unet.downsampling}, not {image_size}"
            )
        return problem


class DDPM(Family):
    """A denoiser of pixels."""

    averaged = ("denoiser",)
    blocks = (ResBlock, SelfAttention2d)

    def __init__(self, config: DDPMConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        self.num_classes = surroundings.num_classes
        self.shape = (surroundings.image_channels, surroundings.image_size, surroundings.image_size)
        self.diffusion = Diffusion(config.diffusion)
        self.denoiser = UNet(config.unet, surroundings.image_channels, self.num_classes)

    def phases(self) -> list[Phase]:
        """One network, one loss."""
        return [Phase("denoiser", "denoiser", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The weighted squared error of the prediction."""
        label = None
        if self.num_classes:
            label = drop_labels(batch["label"], batch["key"], self.num_classes, self.config.label_dropout, self.seed)
        predict, _ = label_predictors(self.denoiser, label, self.num_classes)
        loss = denoising_loss(predict, self.diffusion, batch["image"], batch["key"], self.seed).mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] for keys [N]."""
        label = conditioned_labels(keys, condition, self.num_classes)
        predictors = label_predictors(self.denoiser, label, self.num_classes)
        return sample_denoiser(*predictors, self.diffusion, keys, self.shape, self.seed, clip=1.0).clamp(-1.0, 1.0)

    def evaluate(self, batch: Batch) -> Metrics:
        """The training loss with every label given, and the unweighted loss by noise level."""
        label = batch["label"] if self.num_classes else None
        predict, _ = label_predictors(self.denoiser, label, self.num_classes)
        return noise_level_losses(predict, self.diffusion, batch["image"], batch["key"], self.seed)
