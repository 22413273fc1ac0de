"""Three kinds of noise over a time: discrete timesteps, the straight path of rectified flow, and the sigmas of EDM.

All make x_t = alpha x_0 + sigma eps, and the noise grows with the time. A time of training is asked for by its quantile
in (0, 1): uniform quantiles give times of the training distribution, and an eighth of the quantiles is an eighth of it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gmdist.diffusion.spacings import karras_sigmas

FLOW_TIMES = ("uniform", "logit_normal")


class Noising(Protocol):
    """What training and sampling ask of a kind of noise."""

    def times_at(self, quantiles: Tensor) -> Tensor:
        """Times [N] at float64 quantiles [N] of the training distribution."""
        ...

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at times [N]: each [N], float64."""
        ...

    def conditioning(self, times: Tensor) -> Tensor:
        """What the network is told of times [N]: [N]."""
        ...

    def start_std(self) -> float:
        """The standard deviation that sampling starts with."""
        ...


class DiscreteNoise:
    """The timesteps 0 to T - 1 of a schedule abar, all drawn equally often; the network is told the timestep."""

    def __init__(self, abar: Tensor) -> None:
        self.abar = abar  # [T], float64
        self._on_device = {abar.device: abar}

    def times_at(self, quantiles: Tensor) -> Tensor:
        """Timesteps, int64."""
        return (quantiles * len(self.abar)).long()

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha^2 + sigma^2 = 1 (Ho 2020, Eq. 4)."""
        if times.device not in self._on_device:
            self._on_device[times.device] = self.abar.to(times.device)
        kept = self._on_device[times.device][times]
        return kept.sqrt(), (1.0 - kept).sqrt()

    def conditioning(self, times: Tensor) -> Tensor:
        """The timesteps themselves."""
        return times

    def start_std(self) -> float:
        """Data of unit variance keep it."""
        return 1.0


# Wider than any use; within them levels of noise and their squares stay in fp32.
_FLOW_RANGES = {"logit_mean": (-10.0, 10.0), "logit_std": (1e-3, 10.0), "shift": (1e-3, 1e3)}
_EDM_RANGES = {
    "p_mean": (-10.0, 10.0),
    "p_std": (1e-3, 3.0),
    "sigma_data": (1e-3, 1e3),
    "sigma_min": (1e-6, 1e3),
    "sigma_max": (1e-3, 1e6),
    "rho": (0.1, 100.0),
}


@dataclass
class FlowNoise:
    """The straight path x_t = (1 - t) x_0 + t eps; the network is told 1000 t (Esser 2024, "SD3")."""

    times: str = "logit_normal"  # logit_normal (Esser 2024, Eq. 19) or uniform
    logit_mean: float = 0.0
    logit_std: float = 1.0  # of the normal distribution of a time's logit, whose mean is logit_mean
    shift: float = 1.0  # above 1, times move to more noise, in training and in sampling, as large images need it

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if self.times not in FLOW_TIMES:
            return f"times: '{self.times}'; must be one of {', '.join(FLOW_TIMES)}"
        if self.times == "uniform":
            for key, default in (("logit_mean", 0.0), ("logit_std", 1.0)):
                if (value := getattr(self, key)) != default:
                    return f"{key}: {value}; belongs to times logit_normal, not to 'uniform'"
        return _range_problem(self, _FLOW_RANGES)

    def times_at(self, quantiles: Tensor) -> Tensor:
        """T in (0, 1), float64."""
        if self.times == "uniform":
            return self._shifted(quantiles)
        return self._shifted(torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(quantiles)))

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha + sigma = 1 (Liu 2023)."""
        return 1.0 - times, times

    def conditioning(self, times: Tensor) -> Tensor:
        """1000 t, so that embeddings made for a thousand timesteps fit."""
        return (1000.0 * times).float()

    def start_std(self) -> float:
        """Pure noise, at t = 1."""
        return 1.0

    def sampling_times(self, num_steps: int) -> Tensor:
        """Evenly spaced times from 1 on, the last 1 / S, and then shifted. [S], float64."""
        return self._shifted(torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps)

    def _shifted(self, times: Tensor) -> Tensor:
        return self.shift * times / (self.shift * times + (1.0 - times))  # Esser 2024, Eq. 23: exactly 1 at 1


@dataclass
class EDMNoise:
    """x = x_0 + sigma eps with log-normal sigmas, for data of standard deviation sigma_data (Karras 2022, Table 1)."""

    # What is published goes with a sigma_data of 0.5, also EDM2's p_mean and p_std: -0.4 and 1.0 on latents, -0.8 and
    # 1.6 on pixels. Where it is 1, the same noise is p_mean + ln 2, and twice sigma_min and sigma_max.
    p_mean: float = -1.2  # of ln sigma in training
    p_std: float = 1.2
    sigma_data: float = 0.5  # of pixels in [-1, 1]; latents are scaled to 1
    sigma_min: float = 0.002  # of sampling
    sigma_max: float = 80.0
    rho: float = 7.0  # how closely sampling is spaced at low noise (Eq. 5)

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := _range_problem(self, _EDM_RANGES):
            return problem
        if self.sigma_min >= self.sigma_max:
            return f"sigma_min: {self.sigma_min}; must be below sigma_max, {self.sigma_max}"
        return None

    def times_at(self, quantiles: Tensor) -> Tensor:
        """Sigmas, float64."""
        return torch.exp(self.p_mean + self.p_std * torch.special.ndtri(quantiles))

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha is 1: the data are not scaled down."""
        return torch.ones_like(times), times

    def conditioning(self, times: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4."""
        return (times.log() / 4.0).float()

    def start_std(self) -> float:
        """The data's own variance is nothing beside sigma_max."""
        return self.sigma_max

    def sampling_times(self, num_steps: int) -> Tensor:
        """Sigmas [S], float64, largest first."""
        return karras_sigmas(num_steps, self.sigma_min, self.sigma_max, self.rho)


def _range_problem(settings: FlowNoise | EDMNoise, ranges: dict[str, tuple[float, float]]) -> str | None:
    for key, (low, high) in ranges.items():
        value = getattr(settings, key)
        if not low <= value <= high:
            return f"{key}: {value}; must be from {low:g} to {high:g}"
    return None
