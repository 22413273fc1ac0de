"""Samplers and the process on a case that is known exactly: the optimal denoiser of a Gaussian mixture."""

import pytest
import torch

from gmdist.diffusion import samplers, schedules
from gmdist.diffusion.process import Diffusion, DiffusionConfig, SamplerConfig

MEANS, STD = torch.tensor([-1.0, 0.5], dtype=torch.float64), 0.1


def exact_denoiser(path):
    """E[x_0 | x_i] for data from an even mixture of two normal distributions."""

    def denoise(x, i):
        alpha, sigma = path[i]
        variance = (alpha * STD) ** 2 + sigma**2
        logits = -((x[..., None] - alpha * MEANS) ** 2) / (2 * variance)
        each = MEANS + alpha * STD**2 / variance * (x[..., None] - alpha * MEANS)
        return (torch.softmax(logits, -1) * each).sum(-1)

    return denoise


# The lower bound of the posterior's variance is only right for small steps: DDPM takes them all.
@pytest.mark.parametrize(("name", "steps"), [("ddim", 250), ("ddpm", 1000)])
def test_samplers_reach_the_right_distribution(name: str, steps: int) -> None:
    abar = schedules.cosine()
    path = samplers.path_of(abar, samplers.trailing_timesteps(1000, steps))
    generator = torch.Generator().manual_seed(0)

    def noise(i=0):
        return torch.randn(20_000, dtype=torch.float64, generator=generator)

    x = getattr(samplers, name)(exact_denoiser(path), noise(), path, noise)
    left = x < -0.25
    assert left.double().mean().item() == pytest.approx(0.5, abs=0.02)
    for side, mean in ((x[left], -1.0), (x[~left], 0.5)):
        assert side.mean().item() == pytest.approx(mean, abs=0.01)
        assert side.std().item() == pytest.approx(STD, rel=0.06)


def test_ddim_converges_with_order_one() -> None:
    abar = schedules.cosine(4000)
    start = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)

    def end(steps):
        path = samplers.path_of(abar, samplers.trailing_timesteps(4000, steps))
        return samplers.ddim(exact_denoiser(path), start, path, lambda i: start)

    reference = end(4000)
    errors = [(end(steps) - reference).abs().mean().item() for steps in (50, 100, 200)]
    assert 1.6 < errors[0] / errors[1] < 2.6
    assert 1.6 < errors[1] / errors[2] < 2.6


def test_ddpm_on_every_step_has_the_posterior_of_ho() -> None:
    # Ho 2020, Eq. 7, written out for one step of the linear schedule in another way than the code does.
    abar = schedules.linear()
    t = 500
    beta = 1 - abar[t] / abar[t - 1]
    mean0 = abar[t - 1].sqrt() * beta / (1 - abar[t])
    mean_t = (1 - beta).sqrt() * (1 - abar[t - 1]) / (1 - abar[t])
    variance = (1 - abar[t - 1]) / (1 - abar[t]) * beta
    path = samplers.path_of(abar, [t, t - 1])[:2]
    x, x0, z = (torch.tensor([value], dtype=torch.float64) for value in (0.7, -0.3, 1.3))
    result = samplers.ddpm(lambda x, i: x0, x, path, lambda i: z)
    assert result.item() == pytest.approx((mean0 * x0 + mean_t * x + variance.sqrt() * z).item(), rel=1e-12)


def test_timesteps() -> None:
    assert samplers.leading_timesteps(1000, 50)[:2] == [981, 961]
    assert samplers.leading_timesteps(1000, 50)[-1] == 1
    assert samplers.trailing_timesteps(1000, 50)[:2] == [999, 979]
    assert samplers.trailing_timesteps(1000, 50)[-1] == 19
    for spacing in (samplers.leading_timesteps, samplers.trailing_timesteps):
        assert spacing(1000, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_perfect_prediction_gives_back_the_data(prediction: str) -> None:
    diffusion = Diffusion(DiffusionConfig("linear", 1000, prediction))
    x0, eps = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 2, 3, 3).double()
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    x, target = diffusion.noised(x0, eps, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        kept = diffusion.abar[t].item()
        level = (kept**0.5, (1 - kept) ** 0.5)
        torch.testing.assert_close(diffusion.x0_of(target[i], x[i], level), x0[i], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(x[i], level[0] * x0[i] + level[1] * eps[i], rtol=1e-6, atol=1e-6)


def test_v_is_the_rotation_of_salimans() -> None:
    diffusion = Diffusion(DiffusionConfig("cosine", 1000, "v"))
    x0, eps = torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]]]])
    kept = diffusion.abar[400].item()
    _, v = diffusion.noised(x0, eps, torch.tensor([400]))
    assert v.item() == pytest.approx(kept**0.5 * 3.0 - (1 - kept) ** 0.5 * 2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (DiffusionConfig("quadratic"), "schedule"),
        (DiffusionConfig(prediction="x"), "prediction"),
        (DiffusionConfig(sampler=SamplerConfig("euler")), "sampler.name"),
        (DiffusionConfig(sampler=SamplerConfig(num_steps=1001)), "sampler.num_steps"),
        (DiffusionConfig(num_timesteps=0), "num_timesteps"),
    ],
)
def test_settings_that_cannot_be_are_named(config: DiffusionConfig, key: str) -> None:
    problem = config.problem()
    assert problem is not None
    assert problem.startswith(f"{key}: ")
    assert DiffusionConfig().problem() is None
