"""The discrete-time Gaussian diffusion process: noising, what a network predicts, and its sampler.

One class composes a schedule, a prediction and a sampler; pixels and latents use the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist.diffusion import samplers, schedules

SCHEDULES = {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear, "cosine": schedules.cosine}
SAMPLERS = {"ddim": samplers.ddim, "ddpm": samplers.ddpm}
PREDICTIONS = ("eps", "v")
_MAX_TIMESTEPS = 1_000_000


@dataclass
class SamplerConfig:
    """How images are drawn from a trained denoiser."""

    name: str = "ddim"  # ddim or ddpm
    num_steps: int = 50
    guidance: float = 1.0  # 1: none; above, classes are followed more closely (Ho 2022, Eq. 6 with w = guidance - 1)


@dataclass
class DiffusionConfig:
    """The noise that the denoiser learns to remove."""

    schedule: str = "linear"  # linear, scaled_linear or cosine
    num_timesteps: int = 1000
    prediction: str = "eps"  # eps or v
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if self.schedule not in SCHEDULES:
            return f"schedule: '{self.schedule}'; must be one of {', '.join(SCHEDULES)}"
        if self.prediction not in PREDICTIONS:
            return f"prediction: '{self.prediction}'; must be one of {', '.join(PREDICTIONS)}"
        if self.sampler.name not in SAMPLERS:
            return f"sampler.name: '{self.sampler.name}'; must be one of {', '.join(SAMPLERS)}"
        if not 1 <= self.num_timesteps <= _MAX_TIMESTEPS:
            return f"num_timesteps: {self.num_timesteps}; must be between 1 and {_MAX_TIMESTEPS}"
        if not math.isfinite(self.sampler.guidance):
            return f"sampler.guidance: {self.sampler.guidance}; must be a number"
        if not 1 <= self.sampler.num_steps <= self.num_timesteps:
            return f"sampler.num_steps: {self.sampler.num_steps}; must be between 1 and {self.num_timesteps}"
        return None


class Diffusion:
    """Noising and denoising with one schedule, in float64 where it matters."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self.abar = SCHEDULES[config.schedule](config.num_timesteps)  # [T], float64

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of x_t = alpha x_0 + sigma eps at timesteps [N]: each [N, 1, 1, 1], float32."""
        kept = self.abar.to(timesteps.device)[timesteps][:, None, None, None]
        return kept.sqrt().float(), (1.0 - kept).sqrt().float()

    def noised(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input x_t and its target, each [N, C, H, W], for clean x0 and noise eps of that shape."""
        alpha, sigma = self.levels(timesteps)
        x = alpha * x0 + sigma * eps
        if self.config.prediction == "v":
            return x, alpha * eps - sigma * x0  # v (Salimans 2022, Sec. 4)
        return x, eps

    def x0_of(self, output: Tensor, x: Tensor, level: samplers.Level) -> Tensor:
        """The clean data that a network's output [N, C, H, W] at x [N, C, H, W] stands for."""
        alpha, sigma = level
        if self.config.prediction == "v":
            return alpha * x - sigma * output
        return (x - sigma * output) / alpha

    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        noise: samplers.Noise,
        clip: float | None = None,
    ) -> Tensor:
        """Draw data from noise with the configured sampler.

        Args:
            predict: the network, (x [N, C, H, W], timesteps int64 [N]) -> output [N, C, H, W].
            x: standard normal [N, C, H, W].
            noise: fresh noise for each step, by its index.
            clip: bound of the clean data's absolute values, applied at every step; None for data without bounds.

        Returns:
            [N, C, H, W].
        """
        steps = samplers.trailing_timesteps(self.num_timesteps, self.config.sampler.num_steps)
        path = samplers.path_of(self.abar, steps)

        def denoise(x: Tensor, i: int) -> Tensor:
            timesteps = torch.full((len(x),), steps[i], device=x.device)
            x0 = self.x0_of(predict(x, timesteps), x, path[i])
            return x0 if clip is None else x0.clamp(-clip, clip)

        return SAMPLERS[self.config.sampler.name](denoise, x, path, noise)
