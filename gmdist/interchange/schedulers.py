"""The scheduler_config.json that lets diffusers draw as one of our samplers does; and what process another one has."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmdist.diffusion.config import DISCRETE, DiffusionConfig
from gmdist.diffusion.schedules import LINEAR_BETAS, SCALED_LINEAR_BETAS
from gmdist.diffusion.spacings import leading_timesteps, trailing_timesteps
from gmdist.errors import ConfigError

_BETAS = ("beta_start", "beta_end")
_COSINE = "squaredcos_cap_v2"
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "sigmoid": "sigmoid", _COSINE: "cosine"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
_OF_SIGMAS = ("euler", "euler_ancestral", "heun")  # they sample x / alpha
# Those that draw the same there. Theirs of linspace are fractions, or the next step is not at the next timestep;
# DPM-Solver++ counts those of leading otherwise, too. From trailing, what samples x / alpha starts with noise of
# sigma / alpha, where we, and theirs of leading, have 1 / alpha.
_SPACINGS = {"dpmpp_2m": ("trailing",)} | dict.fromkeys(_OF_SIGMAS, ("leading",))
_ENDS_AT_TIMESTEP_0 = ("ddim", "dpmpp_2m")


def scheduler_config(config: DiffusionConfig, scales_start: bool = True, clip: float | None = None) -> dict[str, Any]:
    """The scheduler of a process and its sampler.

    Args:
        config: without a problem of its own.
        scales_start: whether the pipeline multiplies the noise that it starts from by what the scheduler asks for.
        clip: bound of the clean data's absolute values, which DDIM and DDPM have; None for data without bounds.

    Raises:
        ConfigError: diffusers draws otherwise; names the key below `family.diffusion` and what could be exported.
    """
    sampler = config.sampler
    if not config.is_discrete:
        raise _refusal(
            f"schedule: '{config.schedule}'; diffusers' pipelines of these networks start from the noise of discrete "
            f"timesteps: {', '.join(DISCRETE)} can be exported"
        )
    if sampler.guidance_interval is not None:
        raise _refusal("sampler.guidance_interval: diffusers' pipelines guide at every step; null can be exported")
    if sampler.name in _OF_SIGMAS and not scales_start:
        raise _refusal(f"sampler.name: '{sampler.name}'; this pipeline starts from unit noise: use ddim or dpmpp_2m")
    if sampler.name in _OF_SIGMAS and config.prediction == "x0":
        raise _refusal(f"prediction: 'x0'; diffusers' {_CLASSES[sampler.name]} lacks it: use sampler ddim or dpmpp_2m")
    if sampler.name == "dpmpp_2m" and config.zero_terminal_snr:
        # Theirs has 2^-24 for an abar of 0: the first step has a length, and the second is one of order two.
        raise _refusal(
            f"sampler.name: 'dpmpp_2m'; with zero_terminal_snr diffusers' {_CLASSES[sampler.name]} does not begin at "
            "pure noise: use ddim or ddpm"
        )
    if not sampler.ends_clean and sampler.name not in _ENDS_AT_TIMESTEP_0:
        kind = _CLASSES[sampler.name]
        raise _refusal(f"sampler.ends_clean: false; diffusers' {kind} does not end at the noise of timestep 0")
    clips = {} if clip is None else {"clip_sample": True, "clip_sample_range": clip}
    return _scheduler(config) | _schedule(config) | clips


def _refusal(message: str) -> ConfigError:
    return ConfigError(f"family.diffusion.{message}")


def _scheduler(config: DiffusionConfig) -> dict[str, Any]:
    """What belongs to the sampler."""
    sampler = config.sampler
    spacing = sampler.spacing_for(config.schedule)
    kind = _CLASSES[sampler.name]
    valid = _SPACINGS.get(sampler.name, ("trailing", "leading"))
    if spacing not in valid:
        other = "another start" if spacing == "trailing" else "other timesteps"
        raise _refusal(f"sampler.spacing: '{spacing}'; diffusers' {kind} has {other}: use {' or '.join(valid)}")
    if sampler.name == "ddim" and spacing == "trailing" and config.num_timesteps % sampler.num_steps:
        length = config.num_timesteps // sampler.num_steps
        divisor = next(n for n in range(sampler.num_steps, 0, -1) if config.num_timesteps % n == 0)
        raise _refusal(
            f"sampler.num_steps: {sampler.num_steps}; diffusers' {kind} steps by {length} timesteps, not to the next "
            f"of these: use a divisor of {config.num_timesteps}, such as {divisor}"
        )
    if spacing == "trailing" and not _counts_alike(config.num_timesteps, sampler.num_steps):
        near = next(n for n in range(sampler.num_steps, 0, -1) if _counts_alike(config.num_timesteps, n))
        raise _refusal(
            f"sampler.num_steps: {sampler.num_steps}; diffusers' {kind} rounds these to other timesteps of "
            f"{config.num_timesteps}: use another number, such as {near}"
        )
    # Of leading alone it has an effect; all pipelines take 1.
    offset = leading_timesteps(config.num_timesteps, sampler.num_steps)[-1] if spacing == "leading" else 1
    written: dict[str, Any] = {"_class_name": kind, "timestep_spacing": spacing, "steps_offset": offset}
    if sampler.name == "ddim":
        written |= {"clip_sample": False, "set_alpha_to_one": sampler.ends_clean}
    elif sampler.name == "ddpm":
        written |= {"clip_sample": False, "variance_type": "fixed_small"}
    elif sampler.name == "dpmpp_2m":
        written |= {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "solver_order": 2}
        written["final_sigmas_type"] = "zero" if sampler.ends_clean else "sigma_min"
    return written


def _counts_alike(num_timesteps: int, num_steps: int) -> bool:
    """Whether diffusers has our trailing timesteps: it adds up their distance, and may end with one too many, -1."""
    theirs = np.arange(num_timesteps, 0, -num_timesteps / num_steps).round().astype(int) - 1
    return bool(theirs.tolist() == trailing_timesteps(num_timesteps, num_steps))


def _schedule(config: DiffusionConfig) -> dict[str, Any]:
    """What belongs to the process."""
    written: dict[str, Any] = {
        "num_train_timesteps": config.num_timesteps,
        "prediction_type": PREDICTIONS[config.prediction],
    }
    if config.zero_terminal_snr:
        written["rescale_betas_zero_snr"] = True
    if config.schedule == "cosine":
        return written | {"beta_schedule": _COSINE}
    betas = _betas(config)
    kept = (1.0 - betas.float()).cumprod(dim=0)
    least = torch.finfo(kept.dtype).tiny  # below it, numbers lose their bits
    if not (kept[0] < 1.0 and kept[-1] >= least):
        end = "no noise at the first timestep" if kept[0] == 1.0 else "no image left at the last one"
        shown = None if config.betas is None else list(config.betas)
        raise _refusal(f"betas: {shown}; in fp32, as diffusers has them, there is {end}")
    if config.schedule == "sigmoid":  # most of theirs lack it, and all take betas one by one
        return written | {"trained_betas": betas.tolist()}
    first, last = config.betas or (LINEAR_BETAS if config.schedule == "linear" else SCALED_LINEAR_BETAS)
    return written | {"beta_schedule": config.schedule, "beta_start": first, "beta_end": last}


def schedule_of(written: Mapping[str, Any]) -> Tensor:
    """What is left of the data at each timestep of a scheduler_config.json, before `rescale_betas_zero_snr`.

    Args:
        written: its values; where keys are missing, the defaults of most of diffusers' schedulers.

    Returns:
        abar, float64 [T].

    Raises:
        ConfigError: it has another kind of schedule, or values that are no betas.
    """
    kind, betas = written.get("beta_schedule", "linear"), written.get("trained_betas")
    try:
        if betas is not None:
            abar = (1.0 - torch.tensor(betas, dtype=torch.float64).flatten()).cumprod(dim=0)
        else:
            schedule, count = DISCRETE[_SCHEDULES[kind]], int(written.get("num_train_timesteps", 1000))
            ends = [float(written.get(key, end)) for key, end in zip(_BETAS, LINEAR_BETAS, strict=True)]
            abar = schedule(count) if kind == _COSINE else schedule(count, *ends)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"a scheduler whose {', '.join(_schedule_keys(written))} cannot be read") from error
    if not bool(((abar > 0.0) & (abar <= 1.0)).all()):  # of NaN neither
        raise ConfigError(f"a scheduler whose {', '.join(_schedule_keys(written))} are no betas from 0 to 1")
    return abar


def _schedule_keys(written: Mapping[str, Any]) -> list[str]:
    return [key for key in ("trained_betas", "beta_schedule", *_BETAS) if key in written] or ["beta_schedule"]


def _betas(config: DiffusionConfig) -> Tensor:
    """The variance of the noise that each timestep adds, float64 [T]."""
    abar = DISCRETE[config.schedule](config.num_timesteps, *(config.betas or ()))
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
