"""Samplers against the exact denoiser of a Gaussian mixture, and against each other."""

import itertools

import pytest
import torch

from gmdist.diffusion import samplers, schedules
from gmdist.diffusion.config import SAMPLERS
from gmdist.diffusion.samplers import Level
from gmdist.diffusion.spacings import karras_sigmas, trailing_timesteps
from tests.diffusion import mixture


def discrete_path(abar: torch.Tensor, timesteps: list[int]) -> list[Level]:
    kept = abar[timesteps]
    return [*zip(kept.sqrt().tolist(), (1.0 - kept).sqrt().tolist(), strict=True), (1.0, 0.0)]


def flow_path(num_steps: int) -> list[Level]:
    return [(1 - t, t) for t in (1 - i / num_steps for i in range(num_steps + 1))]


# Levels with the same ratio of noise to signal, in the coordinates of each kind of noise.
COORDINATES = {
    "edm": lambda ratio: (1.0, ratio),
    "discrete": lambda ratio: ((1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5),
    "flow": lambda ratio: (1 / (1 + ratio), ratio / (1 + ratio)),
}


# The lower bound of the posterior's variance is only right for small steps: ancestral sampling takes them all.
@pytest.mark.parametrize(
    ("name", "steps"),
    [("ddim", 250), ("ddpm", 1000), ("euler", 250), ("euler_ancestral", 1000), ("heun", 80), ("dpmpp_2m", 80)],
)
def test_samplers_reach_the_right_distribution(name: str, steps: int) -> None:
    path = discrete_path(schedules.cosine(), trailing_timesteps(1000, steps))
    check_sampler(name, path)


@pytest.mark.parametrize(("name", "steps"), [("flow_euler", 250), ("ddim", 250), ("ddpm", 1000), ("dpmpp_2m", 80)])
def test_samplers_that_begin_at_pure_noise(name: str, steps: int) -> None:
    path = flow_path(steps)
    assert path[0] == (0.0, 1.0)
    check_sampler(name, path)


def check_sampler(name: str, path: list[Level]) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 6000
    start = torch.special.ndtri(
        (torch.arange(count, dtype=torch.float64) + 0.5) / count
    )  # a normal distribution, evenly

    def noise(i: int) -> torch.Tensor:
        return torch.randn(count, dtype=torch.float64, generator=generator)

    mixture.check_distribution(SAMPLERS[name](mixture.denoiser(path, 0.1), start, path, noise), 0.1)


@pytest.mark.parametrize(
    ("name", "coordinates", "order"),
    [
        *[(name, coordinates, 1) for name in ("ddim", "euler") for coordinates in COORDINATES],
        *[(name, coordinates, 2) for name in ("heun", "dpmpp_2m") for coordinates in COORDINATES],
        ("flow_euler", "flow", 1),
    ],
)
def test_solvers_converge_with_their_order(name: str, coordinates: str, order: int) -> None:
    # Halving the steps divides the distance to the exact solution of the ODE by 2 or by 4.
    std = 0.4

    def error(steps: int) -> float:
        path = [COORDINATES[coordinates](ratio) for ratio in karras_sigmas(steps + 1, 0.05, 5.0, 3.0).tolist()]
        alpha, sigma = path[0]
        start = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64) * (alpha**2 + sigma**2) ** 0.5
        exact = mixture.transported(start, path[0], path[-1], std)
        end = SAMPLERS[name](mixture.denoiser(path, std), start, path, lambda i: pytest.fail("draws no noise"))
        return (end - exact).abs().mean().item()

    errors = [error(steps) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.2 < torch.tensor(coarse / fine).log2().item() < order + 0.35, errors
    assert errors[-1] < 0.01


def test_ddpm_on_every_step_has_the_posterior_of_ho() -> None:
    # Ho 2020, Eq. 7, written out for one step of the linear schedule in another way than the code does.
    abar = schedules.linear()
    t = 500
    beta = 1 - abar[t] / abar[t - 1]
    mean0 = abar[t - 1].sqrt() * beta / (1 - abar[t])
    mean_t = (1 - beta).sqrt() * (1 - abar[t - 1]) / (1 - abar[t])
    variance = (1 - abar[t - 1]) / (1 - abar[t]) * beta
    path = discrete_path(abar, [t, t - 1])[:2]
    x, x0, z = (torch.tensor([value], dtype=torch.float64) for value in (0.7, -0.3, 1.3))
    result = samplers.ddpm(lambda x, i: x0, x, path, lambda i: z)
    assert result.item() == pytest.approx((mean0 * x0 + mean_t * x + variance.sqrt() * z).item(), rel=1e-12)


@pytest.mark.parametrize("names", [("ddim", "euler"), ("ddpm", "euler_ancestral")])
def test_samplers_that_are_one_in_exact_numbers(names: tuple[str, str]) -> None:
    path = discrete_path(schedules.scaled_linear(), trailing_timesteps(1000, 30))
    start = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
    first, second = (
        SAMPLERS[name](mixture.denoiser(path, 0.1), start, path, lambda i: torch.sin(start * (i + 1))) for name in names
    )
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


def test_flow_euler_is_ddim_on_a_straight_path() -> None:
    path = flow_path(20)
    start = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
    first, second = (
        SAMPLERS[n](mixture.denoiser(path, 0.1), start, path, lambda i: start) for n in ("flow_euler", "ddim")
    )
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_to_clean_data_is_the_prediction(name: str) -> None:
    path = [(0.6, 0.8), (1.0, 0.0)] if name != "flow_euler" else [(0.4, 0.6), (1.0, 0.0)]
    x, x0 = torch.tensor([0.3, -2.0]).double(), torch.tensor([0.9, 0.1]).double()
    calls = []

    def denoise(x: torch.Tensor, i: int) -> torch.Tensor:
        calls.append(i)
        return x0

    torch.testing.assert_close(SAMPLERS[name](denoise, x, path, lambda i: pytest.fail("draws no noise")), x0)
    assert calls == [0]


@pytest.mark.parametrize("steps", [14, 15])
def test_dpm_solver_ends_with_a_step_of_order_one_where_steps_are_few(steps: int) -> None:
    # As in Lu 2022's own code: below 15 steps, even where noise is left. A step of order one is DDIM's.
    path = [COORDINATES["discrete"](ratio) for ratio in karras_sigmas(steps + 1, 0.05, 5.0).tolist()]
    before: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, i: int) -> torch.Tensor:
        before[:] = [x]
        return mixture.expectation(x, path[i], 0.3)

    end = samplers.dpmpp_2m(denoise, torch.linspace(-2.0, 2.0, 9).double(), path, lambda i: before[0])
    ddim = samplers.ddim(lambda x, i: mixture.expectation(x, path[-2], 0.3), before[0], path[-2:], lambda i: before[0])
    assert torch.allclose(end, ddim, rtol=1e-9, atol=1e-12) == (steps < 15)


def test_evaluations_of_the_denoiser() -> None:
    path = discrete_path(schedules.cosine(), trailing_timesteps(1000, 20))
    for name, sampler in SAMPLERS.items():
        calls: list[int] = []

        def denoise(x: torch.Tensor, i: int, calls: list[int] = calls) -> torch.Tensor:
            calls.append(i)
            return 0.1 * x

        sampler(denoise, torch.ones(2).double(), path, lambda i: torch.zeros(2).double())
        assert max(calls) == 19, name  # never at the last level, which has no prediction
        assert len(calls) == (39 if name == "heun" else 20), name
