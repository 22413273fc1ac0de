"""The composed process: every legal pair samples what a perfect network knows; guidance; the ends of paths."""

import itertools

import pytest
import torch
from torch import Tensor

from gmdist.diffusion.config import DISCRETE, SAMPLERS, DiffusionConfig, SamplerConfig
from gmdist.diffusion.noising import EDMNoise, FlowNoise
from gmdist.diffusion.process import Diffusion, Predict
from tests.diffusion import mixture

SOLVED = [
    *itertools.product(DISCRETE, ("eps", "x0", "v"), ("ddim", "heun", "dpmpp_2m")),
    *itertools.product(["edm"], ["edm"], ("ddim", "heun", "dpmpp_2m")),
    *itertools.product(["flow"], ["flow"], ("ddim", "flow_euler", "dpmpp_2m")),
]
STD = 0.2


def perfect_network(diffusion: Diffusion) -> Predict:
    """What a network that has learned the mixture gives for its scaled input: the mean of its target."""
    levels = dict(
        zip(diffusion.noising.conditioning(diffusion.sampling_times()).tolist(), diffusion.path(), strict=False)
    )

    def predict(seen: Tensor, told: Tensor) -> Tensor:
        assert (told == told[0]).all()
        alpha, sigma = levels[told[0].item()]
        prediction = diffusion.config.prediction
        x = seen * (sigma**2 + 0.25) ** 0.5 if prediction == "edm" else seen
        x0 = mixture.expectation(x, (alpha, sigma), STD)
        if prediction == "edm":  # Karras 2022, Eq. 7 and Table 1, solved for the network
            return (x0 - 0.25 / (sigma**2 + 0.25) * x) / (0.5 * sigma / (sigma**2 + 0.25) ** 0.5)
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

    return predict


@pytest.mark.parametrize(("schedule", "prediction", "sampler"), SOLVED)
def test_every_pair_follows_the_exact_flow(schedule: str, prediction: str, sampler: str) -> None:
    spacing = "leading" if (schedule, sampler) == ("cosine", "heun") else None
    config = DiffusionConfig(schedule, prediction=prediction, sampler=SamplerConfig(sampler, 40, spacing=spacing))
    assert config.problem() is None
    diffusion = Diffusion(config)
    start = torch.linspace(-2.0, 2.0, 21, dtype=torch.float64)
    path = diffusion.path()
    scaled = start * (80.0 if schedule == "edm" else 1.0)
    # All end with one step from the last noise to its mean.
    exact = mixture.expectation(mixture.transported(scaled, path[0], path[-2], STD), path[-2], STD)
    end = diffusion.sample(perfect_network(diffusion), start, lambda i: pytest.fail("draws no noise"))
    assert end.dtype == torch.float64
    assert (end - exact).abs().mean().item() < (0.005 if sampler in ("heun", "dpmpp_2m") else 0.03)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 250), ("ddpm", 1000), ("dpmpp_2m", 100)])
def test_zero_terminal_snr_starts_at_pure_noise(sampler: str, steps: int) -> None:
    settings = SamplerConfig(sampler, steps, spacing="linspace")
    config = DiffusionConfig("scaled_linear", prediction="v", sampler=settings, zero_terminal_snr=True)
    diffusion = Diffusion(config)
    assert diffusion.path()[0] == (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    start = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)
    end = diffusion.sample(perfect_network(diffusion), start, lambda i: torch.randn(4000, generator=generator).double())
    mixture.check_distribution(end, STD, share=0.02)


def test_the_level_of_the_last_step() -> None:
    def path(**sampler) -> list[tuple[float, float]]:
        return Diffusion(DiffusionConfig("scaled_linear", sampler=SamplerConfig(num_steps=50, **sampler))).path()

    assert len(path()) == 51
    assert path()[-1] == (1.0, 0.0)
    first = path(spacing="leading", ends_clean=False)
    assert len(first) == 51
    assert first[-1][0] ** 2 == pytest.approx(0.99915, rel=1e-9)  # abar_0 of Stable Diffusion 1
    assert first[-2][0] < first[-1][0]


def test_paths_of_continuous_times() -> None:
    edm = Diffusion(DiffusionConfig("edm", prediction="edm", sampler=SamplerConfig(num_steps=18)))
    assert [sigma for _, sigma in edm.path()][::17] == pytest.approx([80.0, 0.002])
    assert edm.path()[-1] == (1.0, 0.0)
    flow = Diffusion(DiffusionConfig("flow", prediction="flow", sampler=SamplerConfig(num_steps=4)))
    assert flow.path() == [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]
    shifted = DiffusionConfig("flow", prediction="flow", sampler=SamplerConfig(num_steps=2), flow=FlowNoise(shift=3.0))
    assert Diffusion(shifted).path() == [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)]


def test_betas_reach_latent_diffusion_on_imagenet() -> None:
    diffusion = Diffusion(DiffusionConfig("scaled_linear", betas=(0.0015, 0.0195)))
    alpha, _ = diffusion.noising.levels(torch.tensor([999]))
    assert alpha.item() ** 2 == pytest.approx(1.42304e-4, rel=1e-5)


def guided_run(guidance: float, interval: tuple[float, float] | None) -> tuple[Tensor, list[float], list[float]]:
    """The result, and the sigmas at which one network and both are asked."""
    sampler = SamplerConfig("heun", 18, guidance, interval)
    diffusion = Diffusion(DiffusionConfig("edm", prediction="edm", sampler=sampler))
    alone, both = [], []

    def predict(seen: Tensor, told: Tensor) -> Tensor:
        alone.append(torch.exp(4 * told[0]).item())
        return 0.3 * seen

    def predict_both(seen: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        both.append(torch.exp(4 * told[0]).item())
        return 0.3 * seen, 0.1 * seen

    start = torch.tensor([[1.0, -0.5]]).double()
    return diffusion.sample(predict, start, lambda i: start, predict_both), alone, both


def test_guidance_is_used_within_its_interval_alone() -> None:
    low, high = 0.28, 5.42
    _, alone, both = guided_run(3.0, (low, high))
    assert both
    assert all(low <= sigma <= high for sigma in both)
    assert alone
    assert not any(low <= sigma <= high for sigma in alone)
    assert not guided_run(3.0, None)[1]
    everywhere, nowhere = guided_run(3.0, (0.0, float("inf"))), guided_run(3.0, (100.0, 200.0))
    torch.testing.assert_close(everywhere[0], guided_run(3.0, None)[0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(nowhere[0], guided_run(1.0, None)[0], rtol=0.0, atol=0.0)
    assert not nowhere[2]
    assert not guided_run(1.0, None)[2]  # nothing to guide: half the work


def test_pure_noise_is_above_every_interval() -> None:
    both = []

    def predict_both(seen: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        both.append(told[0].item())
        return 0.3 * seen, 0.1 * seen

    settings = SamplerConfig("flow_euler", 10, guidance=3.0, guidance_interval=(0.0, 4.1))
    diffusion = Diffusion(DiffusionConfig("flow", prediction="flow", sampler=settings))
    diffusion.sample(lambda seen, told: seen, torch.ones(1, 2), lambda i: pytest.fail("draws no noise"), predict_both)
    assert both == pytest.approx([800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0])  # 0.9 / 0.1 is too much too


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    # Ho 2022, Eq. 6: at one step to clean data the result is the extrapolated x_0.
    sampler = SamplerConfig("ddim", 1, guidance=3.0)
    diffusion = Diffusion(DiffusionConfig("cosine", prediction="x0", sampler=sampler))
    x = torch.zeros(1, 2)
    end = diffusion.sample(lambda x, t: x, x, lambda i: x, lambda x, t: (x + 0.5, x + 0.2))
    torch.testing.assert_close(end, torch.full((1, 2), 0.2 + 3.0 * 0.3))
    clipped = diffusion.sample(lambda x, t: x, x, lambda i: x, lambda x, t: (x + 0.5, x + 0.2), clip=1.0)
    torch.testing.assert_close(clipped, torch.ones(1, 2))


def test_families_on_the_meta_device_have_real_schedules() -> None:
    with torch.device("meta"):
        diffusion = Diffusion(DiffusionConfig("cosine", zero_terminal_snr=True, prediction="v"))
    assert diffusion.path()[0] == (0.0, 1.0)


def test_edm_training_scale_is_the_configs() -> None:
    diffusion = Diffusion(DiffusionConfig("edm", prediction="edm", edm=EDMNoise(sigma_data=2.0)))
    noised = diffusion.noised(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([1.5]).double())
    assert noised.seen.item() == pytest.approx(1 / 2.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_keep_the_precision_of_their_start(name: str) -> None:
    schedule = "flow" if name == "flow_euler" else "edm"
    config = DiffusionConfig(schedule, prediction=schedule, sampler=SamplerConfig(name, 4))
    start = torch.ones(2, 3)
    assert Diffusion(config).sample(lambda x, t: 0.1 * x, start, lambda i: start).dtype == torch.float32
