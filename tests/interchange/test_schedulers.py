"""Schedulers for diffusers: what is written, and what is refused because it would draw otherwise."""

import pytest

from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.diffusion.noising import EDMNoise
from gmdist.diffusion.schedules import sigmoid
from gmdist.errors import ConfigError
from gmdist.interchange.schedulers import scheduler_config


def test_stable_diffusion_1() -> None:
    sampler = SamplerConfig("ddim", 50, spacing="leading", ends_clean=False)
    assert scheduler_config(DiffusionConfig("scaled_linear", sampler=sampler)) == {
        # Of the published scheduler_config.json, and the spacing that was its only one.
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    }


@pytest.mark.parametrize(("steps", "offset"), [(10, 1), (50, 1), (51, 0), (100, 0)])
def test_the_first_of_leading_timesteps(steps: int, offset: int) -> None:
    written = scheduler_config(DiffusionConfig("linear", 100, sampler=SamplerConfig("ddim", steps, spacing="leading")))
    assert written["steps_offset"] == offset


def test_a_schedule_that_theirs_lack_is_written_beta_by_beta() -> None:
    betas = scheduler_config(DiffusionConfig("sigmoid", 100))["trained_betas"]
    kept = 1.0
    for beta, abar in zip(betas, sigmoid(100).tolist(), strict=True):
        kept *= 1.0 - beta
        assert kept == pytest.approx(abar, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DiffusionConfig("flow", prediction="flow", sampler=SamplerConfig("flow_euler")), "schedule: 'flow'; .*cosine"),
        (DiffusionConfig("edm", prediction="edm", edm=EDMNoise()), "schedule: 'edm'"),
        (DiffusionConfig(sampler=SamplerConfig(guidance_interval=(0.1, 5.0))), "sampler.guidance_interval"),
        (DiffusionConfig(sampler=SamplerConfig("ddim", 30)), "sampler.num_steps: 30; .*a divisor of 1000, such as 25"),
        (DiffusionConfig(sampler=SamplerConfig("ddpm", 61)), "sampler.num_steps: 61; .*of 1000: .*, such as 60"),
        (DiffusionConfig(sampler=SamplerConfig("dpmpp_2m", 48)), "sampler.num_steps: 48; .*of 1000: .*, such as 47"),
        (DiffusionConfig("linear", betas=(1e-8, 0.02)), "betas: .1e-08, 0.02.; .*no noise at the first timestep"),
        (DiffusionConfig("linear", betas=(0.001, 0.2)), "betas: .0.001, 0.2.; .*no image left at the last"),
        # Here abar underflows in float64 as well, or is a number of few bits in fp32.
        (DiffusionConfig("linear", 4000, prediction="v", betas=(0.001, 0.73)), "betas: .*no image left at the last"),
        (DiffusionConfig("sigmoid", prediction="v", betas=(0.004, 0.99)), "betas: .*no image left at the last"),
        (DiffusionConfig("linear", prediction="v", betas=(0.001, 0.18)), "betas: .*no image left at the last"),
        (DiffusionConfig(sampler=SamplerConfig(spacing="linspace")), "sampler.spacing: 'linspace'; .*trailing or lead"),
        (
            DiffusionConfig(sampler=SamplerConfig("dpmpp_2m", spacing="leading")),
            "sampler.spacing: .*other timesteps: use trailing",
        ),
        (DiffusionConfig(sampler=SamplerConfig("euler")), "sampler.spacing: 'trailing'; .*another start: use leading"),
        (DiffusionConfig(sampler=SamplerConfig("euler_ancestral")), "sampler.spacing: 'trailing'; .*: use leading"),
        (DiffusionConfig(sampler=SamplerConfig("heun")), "sampler.spacing: 'trailing'; .*another start: use leading"),
        (
            DiffusionConfig(prediction="v", sampler=SamplerConfig("dpmpp_2m"), zero_terminal_snr=True),
            "sampler.name: 'dpmpp_2m'; with zero_terminal_snr .*pure noise: use ddim or ddpm",
        ),
        (DiffusionConfig(prediction="x0", sampler=SamplerConfig("heun")), "prediction: 'x0'; .*use sampler ddim"),
        (DiffusionConfig(sampler=SamplerConfig("ddpm", ends_clean=False)), "sampler.ends_clean: false"),
        (DiffusionConfig(sampler=SamplerConfig("euler", ends_clean=False)), "sampler.ends_clean: false"),
    ],
)
def test_what_would_be_drawn_otherwise_is_refused(config: DiffusionConfig, reason: str) -> None:
    assert config.problem() is None
    with pytest.raises(ConfigError, match=rf"family\.diffusion\.{reason}"):
        scheduler_config(config)
