"""Times of training by their quantiles, noise levels, and what the network is told."""

import math

import pytest
import torch

from gmdist.diffusion import schedules
from gmdist.diffusion.noising import DiscreteNoise, EDMNoise, FlowNoise

EVENLY = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
ALL = [
    DiscreteNoise(schedules.cosine()),
    FlowNoise(),
    FlowNoise("uniform", shift=3.0),
    FlowNoise(logit_mean=0.5, logit_std=0.7),
    EDMNoise(),
]


@pytest.mark.parametrize("noising", ALL, ids=lambda noising: type(noising).__name__)
def test_noise_grows_with_the_quantile(noising) -> None:
    ends = torch.tensor([0.5 * 2.0**-32, 1.0 - 0.5 * 2.0**-32], dtype=torch.float64)  # the least and most drawn
    quantiles = torch.cat([ends[:1], EVENLY[::100], ends[1:]])
    alpha, sigma = noising.levels(noising.times_at(quantiles))
    assert alpha.dtype == sigma.dtype == torch.float64
    assert (sigma > 0).all()
    assert ((sigma / alpha).diff() >= 0).all()
    assert torch.isfinite(sigma).all()
    assert noising.conditioning(noising.times_at(quantiles)).isfinite().all()


def test_every_timestep_is_drawn_equally_often() -> None:
    noising = DiscreteNoise(schedules.linear())
    counts = noising.times_at(EVENLY).bincount(minlength=1000)
    assert (counts == 100).all()
    assert noising.times_at(torch.tensor([1.0 - 0.5 * 2.0**-32], dtype=torch.float64)).item() == 999
    assert noising.conditioning(torch.tensor([7])).tolist() == [7]


def test_levels_of_each_kind() -> None:
    alpha, sigma = DiscreteNoise(schedules.scaled_linear()).levels(torch.tensor([0, 999]))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2).double())
    assert (alpha[1] ** 2).item() == pytest.approx(0.00466010, rel=2e-6)
    alpha, sigma = FlowNoise().levels(torch.tensor([0.25]).double())
    assert (alpha.item(), sigma.item()) == (0.75, 0.25)
    alpha, sigma = EDMNoise().levels(torch.tensor([7.0]).double())
    assert (alpha.item(), sigma.item()) == (1.0, 7.0)


def test_log_sigma_is_normal() -> None:
    logs = EDMNoise(p_mean=-0.4, p_std=1.0).times_at(EVENLY).log()
    assert logs.mean().item() == pytest.approx(-0.4, abs=1e-6)
    assert logs.std().item() == pytest.approx(1.0, abs=1e-3)
    assert (logs < -0.4 + 1.959964).double().mean().item() == pytest.approx(0.975, abs=1e-4)
    assert EDMNoise().conditioning(torch.tensor([math.e**2]).double()).item() == pytest.approx(0.5)


def test_the_logit_of_a_flows_time_is_normal() -> None:
    logits = torch.logit(FlowNoise(logit_mean=0.5, logit_std=0.7).times_at(EVENLY))
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert logits.std().item() == pytest.approx(0.7, abs=1e-3)
    torch.testing.assert_close(FlowNoise("uniform").times_at(EVENLY), EVENLY)
    assert FlowNoise().conditioning(torch.tensor([0.5]).double()).tolist() == [500.0]


def test_a_shift_multiplies_the_ratio_of_noise_to_signal() -> None:
    # Esser 2024, Sec. 5.3.2: t / (1 - t) grows by the shift, in training and in sampling.
    plain, shifted = FlowNoise(), FlowNoise(shift=3.0)
    for before, after in (
        (plain.times_at(EVENLY), shifted.times_at(EVENLY)),
        (plain.sampling_times(10)[1:], shifted.sampling_times(10)[1:]),
    ):
        torch.testing.assert_close(after / (1 - after), 3.0 * before / (1 - before))
    assert plain.sampling_times(4).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert shifted.sampling_times(4)[0].item() == 1.0


def test_a_flow_begins_with_noise_alone_by_any_shift() -> None:
    for hundredths in range(1, 1001):
        first = FlowNoise(shift=hundredths / 100).sampling_times(4)[0]
        assert first == 1.0, hundredths  # no rest of the signal, and none of it below 0


def test_settings_of_a_normal_logit_belong_to_it() -> None:
    assert FlowNoise("uniform", shift=3.0).problem() is None
    problem = FlowNoise("uniform", logit_std=2.0).problem()
    assert problem == "logit_std: 2.0; belongs to times logit_normal, not to 'uniform'"
    assert FlowNoise(logit_mean=-1.0, logit_std=2.0).problem() is None
