"""What the KL term counts for: the ends of each schedule, its shape between them, and schedules that cannot be."""

import math
from pathlib import Path

import pytest
import torch

from gmdist.config import load
from gmdist.errors import ConfigError
from gmdist.families.betas import BetaConfig, beta, capacity_nats, kl_loss

CONFIG = str(Path(__file__).parents[2] / "configs/digits/vae.yaml")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "cyclical"])
def test_a_rise_begins_and_ends_where_it_should(schedule: str) -> None:
    config = BetaConfig(schedule, value=4.0, start=0.5, num_images=1000)
    assert beta(config, 0) == pytest.approx(0.5, abs=1e-12)
    assert beta(config, 1000) == beta(config, 10**9) == pytest.approx(4.0)
    found = [beta(config, seen) for seen in range(0, 125 if schedule == "cyclical" else 1000)]
    assert found == sorted(found)
    assert beta(BetaConfig(schedule, value=4.0, num_images=0), 0) == 4.0


def test_shapes_between_the_ends() -> None:
    assert beta(BetaConfig(value=0.3), 0) == beta(BetaConfig(value=0.3), 10**9) == 0.3
    assert beta(BetaConfig("linear", num_images=1000), 250) == 0.25
    assert beta(BetaConfig("cosine", num_images=1000), 250) == pytest.approx(0.5 - 0.25 * math.sqrt(2))
    sigmoid = BetaConfig("sigmoid", num_images=1000)
    assert beta(sigmoid, 500) == 0.5
    assert beta(sigmoid, 250) == pytest.approx(1 / (1 + math.exp(3)), abs=0.003)
    assert beta(sigmoid, 250) + beta(sigmoid, 750) == pytest.approx(1.0)


def test_cycles() -> None:
    config = BetaConfig("cyclical", num_images=400, num_cycles=4, rise=0.5)
    assert [beta(config, seen) for seen in (0, 25, 50, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert [beta(config, 100 * cycle) for cycle in range(5)] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert beta(config, 325) == 0.5


@pytest.mark.parametrize("num_cycles", range(2, 60))
def test_every_cycle_begins_at_the_start(num_cycles: int) -> None:
    config = BetaConfig("cyclical", num_images=7 * num_cycles, num_cycles=num_cycles)
    assert {beta(config, 7 * cycle) for cycle in range(num_cycles)} == {0.0}


def test_capacity_holds_the_kl_term_itself() -> None:
    config = BetaConfig("capacity", value=10.0, capacity_nats=6.0, num_images=100)
    assert [capacity_nats(config, seen) for seen in (0, 50, 100, 200)] == [0.0, 3.0, 6.0, 6.0]
    kl = torch.tensor([[1.0, 1.0], [4.0, 1.0]], requires_grad=True)
    loss = kl_loss(config, kl, 50)
    assert loss.tolist() == [10.0, 20.0]
    loss.sum().backward()
    assert kl.grad.tolist() == [[-10.0, -10.0], [10.0, 10.0]]


def test_free_bits_cost_what_a_dimension_carries_beyond() -> None:
    kl = torch.tensor([[0.1, 2.0], [0.5, 0.2]], requires_grad=True)
    loss = kl_loss(BetaConfig(value=3.0, free_nats=0.3), kl, 0)
    torch.testing.assert_close(loss, 3.0 * torch.tensor([2.3, 0.8]))
    loss.sum().backward()
    assert kl.grad.tolist() == [[0.0, 3.0], [3.0, 0.0]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_images=-1", "num_images: -1; must be at least 0: a schedule cannot end before its first image"),
        ("schedule=step", "schedule: 'step'; must be one of constant, linear, cosine, sigmoid, cyclical, capacity"),
        ("value=-1.0", "value: -1.0; must be a number of at least 0"),
        ("start=.nan", "start: nan; must be a number of at least 0"),
        ("capacity_nats=.inf", "capacity_nats: inf; must be a number of at least 0"),
        ("free_nats=-0.5", "free_nats: -0.5; must be a number of at least 0"),
        ("num_cycles=0", "num_cycles: 0; must be at least 1"),
        ("rise=0.0", "rise: 0.0; must be above 0 and at most 1"),
        ("{schedule: capacity, free_nats: 1.0}", "free_nats: 1.0; must be 0 with the schedule capacity"),
    ],
)
def test_schedules_that_cannot_be(setting: str, message: str) -> None:
    key = "family.beta=" if setting.startswith("{") else "family.beta."
    with pytest.raises(ConfigError) as refused:
        load(CONFIG, [key + setting])
    assert f"family.beta.{message}" in str(refused.value)
