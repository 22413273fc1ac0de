"""Parameterizations and loss weights: round trips, golden numbers, and one loss in several forms."""

import pytest
import torch

from gmdist.diffusion import weights
from gmdist.diffusion.config import DiffusionConfig
from gmdist.diffusion.noising import EDMNoise
from gmdist.diffusion.process import Diffusion

PAIRS = [
    *[DiffusionConfig("cosine", prediction=prediction) for prediction in ("eps", "x0", "v")],
    *[DiffusionConfig("scaled_linear", prediction=prediction, zero_terminal_snr=True) for prediction in ("x0", "v")],
    DiffusionConfig("flow", prediction="flow"),
    DiffusionConfig("edm", prediction="edm", edm=EDMNoise(sigma_data=0.7)),
]


@pytest.mark.parametrize("config", PAIRS, ids=lambda config: f"{config.schedule}-{config.prediction}")
def test_a_perfect_prediction_gives_back_the_data(config: DiffusionConfig) -> None:
    assert config.problem() is None
    diffusion = Diffusion(config)
    x0, eps = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 2, 3, 3).double()
    times = diffusion.times_at(torch.tensor([1e-6, 0.01, 0.5, 0.9, 1 - 1e-6]).double())
    seen, _, target = diffusion.noised(x0, eps, times)
    alpha, sigma = diffusion.noising.levels(times)
    for i, level in enumerate(zip(alpha.tolist(), sigma.tolist(), strict=True)):
        x = level[0] * x0[i] + level[1] * eps[i]
        torch.testing.assert_close(diffusion.x0_of(target[i], x, level), x0[i], rtol=1e-8, atol=1e-8)
        if config.prediction != "edm":  # which scales what it sees
            torch.testing.assert_close(seen[i], x, rtol=1e-12, atol=1e-12)


def test_v_is_the_rotation_of_salimans() -> None:
    diffusion = Diffusion(DiffusionConfig("cosine", 1000, "v"))
    x0, eps = torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]]]])
    kept = diffusion.noising.levels(torch.tensor([400]))[0].item() ** 2
    v = diffusion.noised(x0, eps, torch.tensor([400])).target
    assert v.item() == pytest.approx(kept**0.5 * 3.0 - (1 - kept) ** 0.5 * 2.0, rel=1e-6)


def test_a_flow_learns_the_direction_from_data_to_noise() -> None:
    diffusion = Diffusion(DiffusionConfig("flow", prediction="flow"))
    x0, eps, times = torch.tensor([[2.0]]), torch.tensor([[3.5]]), torch.tensor([0.25]).double()
    seen, told, target = diffusion.noised(x0, eps, times)
    assert (seen.item(), target.item()) == (0.75 * 2.0 + 0.25 * 3.5, 1.5)
    assert told.item() == 250.0


def test_the_preconditioning_of_edm() -> None:
    # Karras 2022, Table 1, as it is printed: c_skip, c_out, c_in, c_noise and the weight.
    sigma_data, sigma = 0.5, torch.tensor([0.002, 0.3, 80.0]).double()
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    diffusion = Diffusion(DiffusionConfig("edm", prediction="edm", weight="edm"))
    x0, eps = torch.tensor([0.4, -0.5, 0.1]).double(), torch.tensor([1.5, 0.2, -0.8]).double()
    x = x0 + sigma * eps
    seen, told, target = diffusion.noised(x0, eps, sigma)
    torch.testing.assert_close(target, (x0 - c_skip * x) / c_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen, c_in * x)
    torch.testing.assert_close(told, (sigma.log() / 4).float())
    # The weight of the denoised image's error, carried over to the output's, is 1.
    torch.testing.assert_close(weights.edm(sigma, sigma_data) * c_out**2, torch.ones(3).double())
    torch.testing.assert_close(diffusion.weights(sigma), torch.ones(3))


def test_what_an_edm_network_sees_and_learns_has_unit_variance() -> None:
    diffusion = Diffusion(DiffusionConfig("edm", prediction="edm"))
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 50_000, dtype=torch.float64, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.01, 0.2, 1.0, 50.0]).double()
    noised = diffusion.noised(0.5 * x0, eps, sigma)
    for values in (noised.seen, noised.target):
        torch.testing.assert_close(values.std(dim=1), torch.ones(4).double(), rtol=0.02, atol=0.0)


def test_min_snr_of_stable_diffusion() -> None:
    # Gamma 5, computed in float64; the v weight is min(SNR, gamma) / (SNR + 1).
    for prediction, at_100, at_500 in (("eps", 0.591443, 1.0), ("v", 0.528882, 0.276333)):
        diffusion = Diffusion(DiffusionConfig("scaled_linear", prediction=prediction, weight="min_snr"))
        assert diffusion.weights(torch.tensor([100, 500])).tolist() == pytest.approx([at_100, at_500], rel=2e-6)
    diffusion = Diffusion(DiffusionConfig("scaled_linear", prediction="x0", weight="min_snr", weight_gamma=2.0))
    kept = diffusion.noising.levels(torch.tensor([100, 500]))[0] ** 2
    assert diffusion.weights(torch.tensor([100, 500])).tolist() == pytest.approx(
        [2.0, (kept[1] / (1 - kept[1])).item()], rel=1e-6
    )


def test_p2_on_the_noise_is_choi_2022() -> None:
    diffusion = Diffusion(DiffusionConfig("linear", prediction="eps", weight="p2", weight_gamma=0.5))
    times = torch.tensor([0, 300, 999])
    alpha, sigma = diffusion.noising.levels(times)
    torch.testing.assert_close(diffusion.weights(times), (1 / (1 + alpha**2 / sigma**2) ** 0.5).float())


@pytest.mark.parametrize("weight", ["min_snr", "p2"])
def test_a_weighted_loss_does_not_depend_on_the_prediction(weight: str) -> None:
    # The same estimate of the clean data costs the same, whether the network gives it as eps, x0 or v.
    x0, eps, wrong = (torch.randn(6, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    times = torch.tensor([0, 50, 300, 600, 900, 999])
    losses = []
    for prediction in ("eps", "x0", "v"):
        diffusion = Diffusion(DiffusionConfig("scaled_linear", prediction=prediction, weight=weight))
        target = diffusion.noised(x0, eps, times).target
        alpha, sigma = (level[:, None] for level in diffusion.noising.levels(times))
        x = alpha * x0 + sigma * eps
        guess = x0 + 0.1 * wrong
        output = {"eps": (x - alpha * guess) / sigma, "x0": guess, "v": (alpha * x - guess) / sigma}[prediction]
        losses.append(diffusion.weights(times) * (output - target).square().mean(dim=1))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("weight", ["min_snr", "p2"])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_pure_noise_is_learned_from(weight: str, prediction: str) -> None:
    config = DiffusionConfig("scaled_linear", prediction=prediction, weight=weight, zero_terminal_snr=True)
    before, pure = Diffusion(config).weights(torch.tensor([998, 999])).tolist()
    assert 0.0 < before < 1e-6
    assert pure == 1.0
