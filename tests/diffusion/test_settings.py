"""Settings that cannot be, or do not go together, are refused with the key and the reason."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from gmdist.config import from_yaml, load
from gmdist.diffusion.config import DISCRETE, SAMPLERS, DiffusionConfig, SamplerConfig
from gmdist.diffusion.noising import EDMNoise, FlowNoise
from gmdist.diffusion.process import Diffusion
from gmdist.errors import ConfigError


def sampled(schedule: str = "linear", prediction: str = "eps", **sampler) -> DiffusionConfig:
    return DiffusionConfig(schedule, prediction=prediction, sampler=SamplerConfig(**sampler))


def steep(prediction: str, name: str = "ddim", zero_terminal_snr: bool = False) -> DiffusionConfig:
    """Betas whose abar is 0, in float64, from timestep 303 on; its alpha is below 1e-30 from 59 on."""
    sampler = SamplerConfig(name)
    return DiffusionConfig("linear", 1000, prediction, sampler, (0.9, 0.99), zero_terminal_snr=zero_terminal_snr)


def terminal(prediction: str = "v", **sampler) -> DiffusionConfig:
    sampler = SamplerConfig(**sampler)
    return DiffusionConfig("cosine", prediction=prediction, sampler=sampler, zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (DiffusionConfig("quadratic"), "schedule: 'quadratic'; must be one of linear, scaled_linear, cosine, sigmoid"),
        (DiffusionConfig(num_timesteps=0), "num_timesteps: 0; must be between 1 and"),
        (DiffusionConfig("flow", 500, "flow"), "num_timesteps: 500; schedule 'flow' has none"),
        (DiffusionConfig("cosine", betas=(0.1, 0.2)), "betas: [0.1, 0.2]; belong to schedules linear, scaled_linear"),
        (DiffusionConfig(betas=(0.2, 0.1)), "betas: [0.2, 0.1]; must be [first, last] with 1e-08 <= first <= last < 1"),
        (DiffusionConfig(betas=(1e-17, 1e-17)), "betas: [1e-17, 1e-17]; must be"),
        (DiffusionConfig(betas=(0.0, math.nan)), "betas: "),
        (DiffusionConfig(prediction="x"), "prediction: 'x'; must be one of eps, x0, v, flow, edm"),
        (
            DiffusionConfig(prediction="flow"),
            "prediction: 'flow'; is the direction of a straight path; with schedule 'linear' use eps or x0 or v",
        ),
        (DiffusionConfig(prediction="edm"), "prediction: 'edm'; needs alpha = 1; with schedule 'linear' use eps or"),
        (
            DiffusionConfig("flow", prediction="eps"),
            "prediction: 'eps'; is for discrete schedules; with schedule 'flow' use flow",
        ),
        (
            DiffusionConfig("edm", prediction="v"),
            "prediction: 'v'; needs alpha^2 + sigma^2 = 1; with schedule 'edm' use edm",
        ),
        (terminal("eps"), "prediction: 'eps'; with zero_terminal_snr must be x0 or v"),
        (
            DiffusionConfig("flow", prediction="flow", zero_terminal_snr=True),
            "zero_terminal_snr: true; is for discrete schedules",
        ),
        (
            DiffusionConfig("linear", 1, "v", SamplerConfig(num_steps=1), zero_terminal_snr=True),
            "zero_terminal_snr: true; is for discrete schedules of at least 2",
        ),
        (DiffusionConfig(weight="snr"), "weight: 'snr'; must be one of uniform, min_snr, p2, edm"),
        (DiffusionConfig(weight="edm"), "weight: 'edm'; is for prediction edm"),
        (
            DiffusionConfig("flow", prediction="flow", weight="min_snr"),
            "weight: 'min_snr'; is for predictions eps, x0 and v",
        ),
        (DiffusionConfig("edm", prediction="edm", weight="p2"), "weight: 'p2'; is for predictions eps, x0 and v"),
        (DiffusionConfig(weight_gamma=5.0), "weight_gamma: 5.0; belongs to weights min_snr and p2"),
        (DiffusionConfig(weight="p2", weight_gamma=0.0), "weight_gamma: 0.0; must be a number above 0"),
        (DiffusionConfig(flow=FlowNoise(shift=3.0)), "flow: FlowNoise("),
        (DiffusionConfig("flow", prediction="flow", flow=FlowNoise("normal")), "flow.times: 'normal'; must be one of"),
        (
            DiffusionConfig("flow", prediction="flow", flow=FlowNoise(shift=0.0)),
            "flow.shift: 0.0; must be from 0.001",
        ),
        (
            DiffusionConfig("edm", prediction="edm", edm=EDMNoise(p_mean=math.nan)),
            "edm.p_mean: nan; must be from -10",
        ),
        (DiffusionConfig("edm", prediction="edm", edm=EDMNoise(rho=1e-3)), "edm.rho: 0.001; must be from 0.1 to 100"),
        (DiffusionConfig("edm", prediction="edm", edm=EDMNoise(sigma_data=-1.0)), "edm.sigma_data: -1.0; must be"),
        (DiffusionConfig("edm", prediction="edm", edm=EDMNoise(sigma_min=90.0)), "edm.sigma_min: 90.0; must be below"),
        (sampled(name="plms"), "sampler.name: 'plms'; must be one of ddim, ddpm, euler, euler_ancestral, heun"),
        (sampled(name="flow_euler"), "sampler.name: 'flow_euler'; needs the straight path of schedule 'flow'"),
        (terminal(name="heun"), "sampler.name: 'heun'; cannot start where alpha is 0; use ddim or ddpm or dpm"),
        (steep("eps"), "prediction: 'eps'; must be x0 or v, as alpha is 0 at the last 941 timesteps"),
        (
            DiffusionConfig("linear", 100, betas=(0.9, 0.99)),
            "prediction: 'eps'; must be x0 or v, as alpha is 0 at the last",
        ),
        (
            steep("v", "euler"),
            "sampler.name: 'euler'; cannot start where alpha is 0, as at the last 941 timesteps; use ddim",
        ),
        (steep("x0", "heun"), "sampler.name: 'heun'; cannot start where alpha is 0"),
        (steep("v", "euler_ancestral"), "sampler.name: 'euler_ancestral'; cannot start where alpha is 0"),
        (steep("v", "ddpm"), "sampler.name: 'ddpm'; cannot start where alpha is 0"),
        (steep("v", "dpmpp_2m", zero_terminal_snr=True), "sampler.name: 'dpmpp_2m'; cannot start where alpha is 0"),
        (sampled("cosine", name="heun"), "sampler.name: 'heun'; with schedule 'cosine' needs spacing 'leading'"),
        (sampled("flow", "flow", name="euler"), "sampler.name: 'euler'; cannot start where alpha is 0"),
        (sampled(num_steps=1001), "sampler.num_steps: 1001; must be between 1 and 1000"),
        (sampled(num_steps=0), "sampler.num_steps: 0; must be between 1 and 1000"),
        (sampled(guidance=-0.5), "sampler.guidance: -0.5; must be from 0 to 1000"),
        (sampled(guidance=1e39), "sampler.guidance: 1e+39; must be from 0 to 1000"),
        (sampled(guidance=math.nan), "sampler.guidance: nan; must be from 0"),
        (sampled(guidance_interval=(2.0, 1.0)), "sampler.guidance_interval: [2.0, 1.0]; must be [low, high]"),
        (sampled(guidance_interval=(-1.0, 1.0)), "sampler.guidance_interval: [-1.0, 1.0]; must be [low, high]"),
        (sampled(guidance_interval=(0.0, math.nan)), "sampler.guidance_interval: [0.0, nan]; must be [low, high]"),
        (sampled(spacing="karras"), "sampler.spacing: 'karras'; with schedule 'linear' use trailing or leading"),
        (sampled("edm", "edm", spacing="leading"), "sampler.spacing: 'leading'; with schedule 'edm' use karras"),
        (terminal(spacing="leading"), "sampler.spacing: 'leading'; with zero_terminal_snr sampling must begin at the"),
        (sampled("edm", "edm", ends_clean=False), "sampler.ends_clean: false; is for discrete schedules"),
        (
            sampled(ends_clean=False, spacing="linspace"),
            "sampler.ends_clean: false; the last of these steps is at timestep 0 already",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(config: DiffusionConfig, problem: str) -> None:
    found = config.problem()
    assert found is not None
    assert found.startswith(problem)
    assert "\n" not in found


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_schedules(name: str) -> None:
    pairs = [*[(schedule, "v") for schedule in DISCRETE], ("flow", "flow"), ("edm", "edm")]
    fit = set()
    for (schedule, prediction), spacing in itertools.product(pairs, (None, "leading")):
        if sampled(schedule, prediction, name=name, spacing=spacing).problem() is None:
            fit.add(schedule)
    assert (
        fit
        == {
            "flow_euler": {"flow"},
            **{key: {*DISCRETE, "edm"} for key in ("euler", "euler_ancestral", "heun")},
            **{key: {*DISCRETE, "flow", "edm"} for key in ("ddim", "ddpm", "dpmpp_2m")},
        }[name]
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "schedule=flow",
            "prediction=flow",
            "flow.shift=3",
            "flow.times=uniform",
            "sampler.guidance_interval=[0,.inf]",
        ],
        ["schedule=edm", "prediction=edm", "edm.p_mean=-0.4", "edm.p_std=1", "sampler.guidance_interval=[0.28,5.42]"],
        [
            "schedule=scaled_linear",
            "betas=[0.0015,0.0195]",
            "weight=min_snr",
            "weight_gamma=2",
            "sampler.name=dpmpp_2m",
        ],
        ["zero_terminal_snr=true", "sampler.spacing=linspace", "weight=p2"],
        ["sampler.spacing=leading", "sampler.ends_clean=false"],
    ],
)
def test_settings_from_a_config_file(overrides: list[str]) -> None:
    path = Path(__file__).parents[2] / "configs/digits/ddpm.yaml"
    config = load(str(path), [f"family.diffusion.{override}" for override in overrides])
    assert from_yaml(config.to_yaml(), "again") == config
    assert config.family.diffusion != load(str(path)).family.diffusion


def test_a_config_file_is_refused_with_the_whole_key() -> None:
    path = Path(__file__).parents[2] / "configs/digits/ddpm.yaml"
    with pytest.raises(ConfigError, match=r"^family\.diffusion\.sampler\.guidance: -1\.0; must be"):
        load(str(path), ["family.diffusion.sampler.guidance=-1"])


@pytest.mark.parametrize(
    "config",
    [
        steep("v"),
        steep("x0", zero_terminal_snr=True),
        terminal(name="ddpm"),
        terminal(name="dpmpp_2m"),
        DiffusionConfig("linear", 11_000, "eps", SamplerConfig("euler")),  # alpha is 7e-25 at the end
        DiffusionConfig("linear", 11_000, "eps", SamplerConfig("dpmpp_2m")),
    ],
)
def test_settings_with_little_data_left_draw_numbers(config: DiffusionConfig) -> None:
    assert config.problem() is None
    start = torch.linspace(-2.0, 2.0, 8)
    end = Diffusion(config).sample(lambda x, t: 0.5 * x, start, lambda i: start.flip(0))
    assert end.dtype == torch.float32
    assert end.isfinite().all()


def test_continuous_times_allow_any_number_of_steps() -> None:
    assert sampled("flow", "flow", num_steps=5000).problem() is None
    assert sampled("edm", "edm", num_steps=5000).problem() is None
    assert DiffusionConfig().problem() is None
