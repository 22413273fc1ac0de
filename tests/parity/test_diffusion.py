"""Schedules and trajectories beside those of diffusers, with a nonlinear function in place of a network."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from gmdist.diffusion import schedules
from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.diffusion.noising import FlowNoise
from gmdist.diffusion.process import Diffusion
from gmdist.diffusion.spacings import karras_sigmas

pytestmark = pytest.mark.parity

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
THEIR_NAME = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
START = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).view(2, 2, 4, 4)


def toy(x: Tensor, t: Tensor) -> Tensor:
    """What stands for the network: x [N, C, H, W], t [N] or a number -> [N, C, H, W]."""
    t = torch.as_tensor(t).double().view(-1, 1, 1, 1)
    return 0.4 * x + 0.5 * torch.sin(2.0 * x + t / 200.0)


def theirs(scheduler, start: Tensor) -> Tensor:
    x = start
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(toy(seen, t), t, x, return_dict=False)[0]
    return x


def ours(prediction: str, start: Tensor = START, zero_terminal_snr: bool = False, **sampler) -> Tensor:
    settings = SamplerConfig(**sampler)
    config = DiffusionConfig("scaled_linear", 1000, prediction, settings, zero_terminal_snr=zero_terminal_snr)
    assert config.problem() is None
    return Diffusion(config).sample(toy, start, lambda i: pytest.fail("draws no noise"))


def close(first: Tensor, second: Tensor) -> None:
    """To 1e-5 of the size of what is compared."""
    assert first.abs().max() > 0.1
    torch.testing.assert_close(first.double(), second.double(), rtol=1e-5, atol=1e-5 * second.abs().mean().item())


@pytest.mark.parametrize(
    ("abar", "theirs"),
    [
        (schedules.linear(), {"beta_schedule": "linear"}),
        (schedules.scaled_linear(), STABLE_DIFFUSION),
        (schedules.scaled_linear(1000, 0.0015, 0.0195), {**STABLE_DIFFUSION, "beta_start": 0.0015, "beta_end": 0.0195}),
        (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (schedules.sigmoid(), {"beta_schedule": "sigmoid"}),
    ],
)
def test_schedules(abar: Tensor, theirs: dict) -> None:
    scheduler = DDPMScheduler(1000, **theirs)
    betas = 1.0 - abar / torch.cat([torch.ones(1).double(), abar[:-1]])
    torch.testing.assert_close(betas, scheduler.betas.double(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(abar[:999], scheduler.alphas_cumprod[:999].double(), rtol=1e-5, atol=0.0)
    rescaled = DDPMScheduler(1000, **theirs, rescale_betas_zero_snr=True)
    found, wanted = schedules.zero_terminal_snr(abar), rescaled.alphas_cumprod.double()
    # Theirs takes small differences of roots in fp32, which leaves 4e-5 of the last.
    torch.testing.assert_close(found[:999], wanted[:999], rtol=1e-4, atol=0.0)
    assert found[999] == 0.0


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_of_stable_diffusion_1(prediction: str, steps: int) -> None:
    scheduler = DDIMScheduler(
        1000, **STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
        prediction_type=THEIR_NAME[prediction],
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    result = ours(prediction, name="ddim", num_steps=steps, spacing="leading", ends_clean=False)
    close(result, theirs(scheduler, START))
    assert (result - ours(prediction, name="ddim", num_steps=steps, spacing="leading")).abs().max() > 1e-4


def test_ddim_from_pure_noise() -> None:
    scheduler = DDIMScheduler(
        1000, **STABLE_DIFFUSION, clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    scheduler.set_timesteps(25)
    close(ours("v", name="ddim", num_steps=25, zero_terminal_snr=True), theirs(scheduler, START))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_dpm_solver(prediction: str, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        1000, **STABLE_DIFFUSION, timestep_spacing="trailing", prediction_type=THEIR_NAME[prediction]
    )
    assert (scheduler.config.algorithm_type, scheduler.config.solver_type) == ("dpmsolver++", "midpoint")
    assert (scheduler.config.solver_order, scheduler.config.lower_order_final) == (2, True)
    scheduler.set_timesteps(steps)
    close(ours(prediction, name="dpmpp_2m", num_steps=steps), theirs(scheduler, START))


@pytest.mark.parametrize("steps", [10, 25])
def test_dpm_solver_that_leaves_the_least_noise(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(1000, **STABLE_DIFFUSION, final_sigmas_type="sigma_min")
    settings = SamplerConfig("dpmpp_2m", steps, spacing="leading", ends_clean=False)
    diffusion = Diffusion(DiffusionConfig("scaled_linear", sampler=settings))
    scheduler.set_timesteps(timesteps=diffusion.sampling_times().tolist())
    result = diffusion.sample(toy, START, lambda i: pytest.fail("draws no noise"))
    close(result, theirs(scheduler, START))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_euler_and_heun(kind: type) -> None:
    # They sample x / alpha.
    name = "euler" if kind is EulerDiscreteScheduler else "heun"
    scheduler = kind(1000, **STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    start = START * scheduler.init_noise_sigma
    close(ours("eps", name=name, num_steps=20, spacing="leading"), theirs(scheduler, start))

    # With trailing the steps are the same, and the start is not: with alpha they scale down what has variance 1.
    scheduler = kind(1000, **STABLE_DIFFUSION, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    first = scheduler.sigmas[0].item()
    assert scheduler.init_noise_sigma == pytest.approx(first)
    close(ours("eps", name=name, num_steps=20), theirs(scheduler, START * (first**2 + 1) ** 0.5))


def test_sigmas_of_edm() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(18)
    torch.testing.assert_close(karras_sigmas(18), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_of_a_flow(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20))
    settings = SamplerConfig("flow_euler", 20)
    config = DiffusionConfig("flow", prediction="flow", sampler=settings, flow=FlowNoise(shift=shift))
    result = Diffusion(config).sample(toy, START, lambda i: pytest.fail("draws no noise"))
    close(result, theirs(scheduler, START))
