"""Networks of the field on one GPU: Stable Diffusion 1's UNet and DiT-XL/2 on cached latents, by attention kernel.

`python benchmarks/gpu.py` prints its table. A batch has a first stage's moments, and contexts as CLIP-L gives them. The
UNet is channels last.
"""

import dataclasses

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.diffusion.config import DiffusionConfig
from gmdist.diffusion.process import Diffusion
from gmdist.families.denoising import denoising_loss
from gmdist.families.family import Batch, Family, Metrics, Phase
from gmdist.nets import dit, unet
from gmdist.nets.dit import DiT, DiTConfig, dit_xl
from gmdist.nets.unet import UNet, UNetConfig, stable_diffusion_1

CHANNELS, CLASSES, LENGTH, SEED, LATENT_SCALE = 4, 1000, 77, 0, 0.18215


@dataclasses.dataclass(frozen=True)
class Case:
    """A network at a size of image, and what is asked of it on an H200."""

    name: str
    config: UNetConfig | DiTConfig
    image_side: int  # pixels; of the latent an eighth
    batch_size: int  # at most
    mfu: float  # asked for, with the best of what can be switched on
    trains: str = "denoiser"
    is_causal: bool = False

    @property
    def latent_side(self) -> int:
        """Side of what the network sees."""
        return self.image_side // 8

    @property
    def channels_last(self) -> bool:
        """Whether it has convolutions."""
        return isinstance(self.config, UNetConfig)

    def family(self) -> Family:
        """What is trained."""
        return OnLatents(self)

    def network(self) -> nn.Module:
        """With weights as they are drawn."""
        torch.manual_seed(SEED)
        if isinstance(self.config, DiTConfig):
            return DiT(self.config, CHANNELS, CLASSES, self.latent_side)
        return UNet(self.config, CHANNELS)

    def samples(self, count: int) -> dict[str, Tensor]:
        """Moments [N, 8, h, w], and a label [N] or a context [N, 77, D] for each."""
        side = self.latent_side
        mean = torch.randn(count, CHANNELS, side, side)
        moments = torch.cat([mean, torch.full_like(mean, -8.0)], dim=1)
        if isinstance(self.config, DiTConfig):
            return {"moments": moments, "label": torch.arange(count) % CLASSES}
        assert self.config.context_channels is not None
        return {"moments": moments, "context": torch.randn(count, LENGTH, self.config.context_channels)}

    def head_widths(self) -> list[int]:
        """Of every attention."""
        if isinstance(self.config, DiTConfig):
            return [self.config.channels // self.config.num_heads]
        widths = {self.config.channels * self.config.multipliers[level] for level in self.config.attention_levels}
        return sorted(width // self.config.heads(width) for width in widths)


CASES = [
    Case("SD 1 UNet", stable_diffusion_1(), 256, 128, 0.40),
    Case("SD 1 UNet", stable_diffusion_1(), 512, 32, 0.40),
    Case("DiT-XL/2", dit_xl(), 256, 128, 0.45),
    Case("DiT-XL/2", dit_xl(), 512, 32, 0.45),
]
SMALL_CASES = [
    Case("small UNet", UNetConfig(32, (1, 2), 1, (0,), num_heads=2, context_channels=16), 64, 2, 0.40),
    Case("small DiT", DiTConfig(32, 2, 2), 64, 2, 0.45),
]


class OnLatents(Family):
    """A denoiser of cached latents under contexts or labels that are given."""

    averaged = ("denoiser",)
    blocks = (*unet.BLOCKS, *dit.BLOCKS)
    inputs = ()

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.denoiser = case.network()
        self.shape = (CHANNELS, case.latent_side, case.latent_side)
        self.diffusion = Diffusion(DiffusionConfig("scaled_linear"))

    def phases(self) -> list[Phase]:
        """One network, one loss."""
        return [Phase("denoiser", "denoiser", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The squared error of the predicted noise of a sample of the posterior."""
        mean, logvar = batch["moments"].chunk(2, dim=1)
        noise = rng.normal(SEED, "posterior", batch["key"], self.shape)
        clean = LATENT_SCALE * (mean + torch.exp(0.5 * logvar) * noise)
        told = {name: batch[name] for name in ("label", "context") if name in batch}
        loss = denoising_loss(
            lambda x, times: self.denoiser(x, times, **told), self.diffusion, clean, batch["key"], SEED
        ).mean()
        return loss, {"loss": loss.detach()}
