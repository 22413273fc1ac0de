"""A diffusion process: one schedule, one parameterization, one loss weight and one sampler, composed.

Pixels, latents and anything else use the same. Noise levels are computed in float64 and used in the data's precision.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gmdist.diffusion import predictions, samplers, weights
from gmdist.diffusion.config import (
    PREDICTIONS,
    SAMPLERS,
    TIMESTEP_SPACINGS,
    DiffusionConfig,
)
from gmdist.diffusion.noising import DiscreteNoise, Noising
from gmdist.diffusion.predictions import Prediction, Scalar

# A network on its scaled input [N, ...] and what it is told of the time [N]: the output [N, ...].
Predict = Callable[[Tensor, Tensor], Tensor]
PredictBoth = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the outputs with and without the condition


class Noised(NamedTuple):
    """What noise that is added to data makes of the network's task."""

    seen: Tensor  # the network's input, x_t scaled [N, ...]
    told: Tensor  # what the network is told of the time [N]
    target: Tensor  # what the network learns to give [N, ...]


class Diffusion:
    """What training and sampling need of a process. It holds no parameters, and nothing that changes."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        with torch.device("cpu"):  # families are also built on the meta device
            self.noising = _noising(config)
        self._prediction: Callable[[Scalar, Scalar], Prediction] = PREDICTIONS[config.prediction]
        if config.prediction == "edm":
            self._prediction = functools.partial(predictions.edm, sigma_data=config.edm.sigma_data)

    # Training

    def times_at(self, quantiles: Tensor) -> Tensor:
        """Times [N] at float64 quantiles [N], in (0, 1), of the training distribution; the noise grows with them."""
        return self.noising.times_at(quantiles)

    def noised(self, x0: Tensor, eps: Tensor, times: Tensor) -> Noised:
        """Add noise eps [N, ...] to clean x0 of that shape, as much as belongs to times [N]."""
        alpha, sigma = self.noising.levels(times)
        prediction = self._prediction(alpha, sigma)
        of_x0, of_eps = prediction.target
        x = _each(alpha, x0) * x0 + _each(sigma, x0) * eps
        return Noised(
            seen=_each(prediction.scale, x0) * x,
            told=self.noising.conditioning(times),
            target=_each(of_x0, x0) * x0 + _each(of_eps, x0) * eps,
        )

    def weights(self, times: Tensor) -> Tensor:
        """The loss weight of the output's squared error at times [N]: [N], float32."""
        name, gamma = self.config.weight, self.config.weight_gamma
        if name == "uniform":
            return torch.ones_like(times, dtype=torch.float32)
        alpha, sigma = self.noising.levels(times)
        if name == "edm":
            of_x0 = weights.edm(sigma, self.config.edm.sigma_data)
        else:
            weight = {"min_snr": weights.min_snr, "p2": weights.p2}[name]
            of_x0 = weight((alpha / sigma) ** 2, **({} if gamma is None else {"gamma": gamma}))
        # An error of the output is one of the clean data, times what the output counts for there.
        found = (of_x0 * self._prediction(alpha, sigma).x0[1] ** 2).float()
        # Of pure noise, where sampling starts, nothing would be learned with the 0 that an SNR of 0 gives.
        return torch.where(alpha > 0.0, found, 1.0)

    def x0_of(self, output: Tensor, x: Tensor, level: samplers.Level) -> Tensor:
        """The clean data that a network's output [N, ...] at x_t [N, ...] of one noise level stands for."""
        of_x, of_output = self._prediction(*level).x0
        return of_x * x + of_output * output

    # Sampling

    def sampling_times(self) -> Tensor:
        """The times that the configured sampler stops at, noisiest first. [S]."""
        sampler = self.config.sampler
        if self.config.is_discrete:
            spacing = TIMESTEP_SPACINGS[sampler.spacing_for(self.config.schedule)]
            return torch.tensor(spacing(self.config.num_timesteps, sampler.num_steps))
        settings = self.config.flow if self.config.schedule == "flow" else self.config.edm
        return settings.sampling_times(sampler.num_steps)

    def path(self) -> list[samplers.Level]:
        """The S + 1 noise levels of the configured sampler."""
        times = self.sampling_times()
        if not self.config.sampler.ends_clean:
            times = torch.cat([times, torch.zeros_like(times[:1])])
        alpha, sigma = self.noising.levels(times)
        levels = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
        return [*levels, (1.0, 0.0)] if self.config.sampler.ends_clean else levels

    def sample(
        self,
        predict: Predict,
        x: Tensor,
        noise: samplers.Noise,
        predict_both: PredictBoth | None = None,
        clip: float | None = None,
    ) -> Tensor:
        """Draw data from noise with the configured sampler, guided where `predict_both` is given.

        Args:
            predict: the network, with its condition if it has one.
            x: standard normal [N, ...].
            noise: fresh noise [N, ...] for each step, by its index.
            predict_both: the network with and without its condition, for guidance (Ho 2022).
            clip: bound of the clean data's absolute values, applied at every step; None for data without bounds.

        Returns:
            [N, ...].
        """
        path = self.path()
        conditioning = self.noising.conditioning(self.sampling_times()).tolist()
        guided = [predict_both is not None and self._is_guided(level) for level in path]

        def denoise(x: Tensor, i: int) -> Tensor:
            seen = self._prediction(*path[i]).scale * x
            told = torch.full((len(x),), conditioning[i], device=x.device)
            if guided[i]:
                assert predict_both is not None
                conditional, free = predict_both(seen, told)
                output = free + self.config.sampler.guidance * (conditional - free)  # Ho 2022, Eq. 6
            else:
                output = predict(seen, told)
            x0 = self.x0_of(output, x, path[i])
            return x0 if clip is None else x0.clamp(-clip, clip)

        return SAMPLERS[self.config.sampler.name](denoise, x * self.noising.start_std(), path, noise)

    def _is_guided(self, level: samplers.Level) -> bool:
        """Whether guidance changes anything at a noise level (Kynkaanniemi 2024)."""
        alpha, sigma = level
        low, high = self.config.sampler.guidance_interval or (0.0, math.inf)
        ratio = sigma / alpha if alpha else math.inf
        return self.config.sampler.guidance != 1.0 and low <= ratio <= high


def _noising(config: DiffusionConfig) -> Noising:
    if not config.is_discrete:
        return config.flow if config.schedule == "flow" else config.edm
    return DiscreteNoise(config.abar())


def _each(values: Scalar, x: Tensor) -> Scalar:
    """Values [N] in the precision of x [N, ...], to be multiplied with it; a number stays one."""
    if not isinstance(values, Tensor):
        return values
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
