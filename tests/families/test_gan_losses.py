"""Losses of GANs against their formulas in probabilities, and penalties against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.families.gan_losses import (
    COMPARING,
    LOSSES,
    discriminator_loss,
    generator_loss,
    interpolation_penalty,
    mean_signs,
    squared_gradients,
)
from gmdist.nets.equalized import whole_precision

REAL = torch.tensor([[0.7], [-1.3], [2.0]], dtype=torch.float64)
FAKE = torch.tensor([[-0.2], [0.4], [-3.0]], dtype=torch.float64)


def by_hand(name: str) -> tuple[float, float]:
    """What discriminator and generator minimise, sample by sample."""
    d = g = 0.0
    for real, fake in zip(REAL.flatten().tolist(), FAKE.flatten().tolist(), strict=True):
        p_real, p_fake = 1.0 / (1.0 + math.exp(-real)), 1.0 / (1.0 + math.exp(-fake))
        if name in ("minimax", "non_saturating"):
            d -= math.log(p_real) + math.log(1.0 - p_fake)
            g += math.log(1.0 - p_fake) if name == "minimax" else -math.log(p_fake)
        elif name == "hinge":
            d += max(0.0, 1.0 - real) + max(0.0, 1.0 + fake)
            g -= fake
        elif name == "least_squares":
            d += 0.5 * (real - 1.0) ** 2 + 0.5 * fake**2
            g += 0.5 * (fake - 1.0) ** 2
        elif name == "wasserstein":
            d += fake - real
            g -= fake
        else:
            d -= math.log(1.0 / (1.0 + math.exp(fake - real)))
            g -= math.log(1.0 / (1.0 + math.exp(real - fake)))
    return d / 3.0, g / 3.0


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name: str) -> None:
    d, g = by_hand(name)
    assert discriminator_loss(name, REAL, FAKE).item() == pytest.approx(d)
    assert generator_loss(name, FAKE, REAL).item() == pytest.approx(g)


@pytest.mark.parametrize("name", LOSSES)
def test_signs_are_those_of_a_discriminator_that_is_right_or_undecided(name: str) -> None:
    real, fake = torch.full((3, 1), 5.0, requires_grad=True), torch.full((3, 1), 4.0, requires_grad=True)
    for _ in range(1000):
        slopes = torch.autograd.grad(discriminator_loss(name, real, fake), [real, fake])
        for logits, slope in zip((real, fake), slopes, strict=True):
            logits.data -= 0.1 * slope
    assert [sign.item() for sign in mean_signs(name, real.detach(), fake.detach())] == [1.0, -1.0]
    same = torch.tensor([[0.1], [0.9], [0.5]])
    same = same if name in ("least_squares", *COMPARING) else same - 0.5
    assert [sign.item() for sign in mean_signs(name, same, same)] == [0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_far_logits_are_finite_with_their_gradients(name: str) -> None:
    real, fake = torch.tensor([[-1e3], [1e3]], requires_grad=True), torch.tensor([[1e3], [-1e3]], requires_grad=True)
    loss = discriminator_loss(name, real, fake) + generator_loss(name, fake, real)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, [real, fake]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def slopes(judge: nn.Module, image: Tensor, h: float = 1e-5) -> Tensor:
    """Squared gradients [N] by central differences."""
    squares = torch.zeros(len(image), dtype=torch.float64)
    for i in range(image[0].numel()):
        step = F.one_hot(torch.tensor(i), image[0].numel()).double().view_as(image[0]) * h
        squares += ((judge(image + step) - judge(image - step)).flatten() / (2.0 * h)).square().detach()
    return squares


def test_squared_gradients_against_finite_differences() -> None:
    judge, image = network(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    squares, logits = squared_gradients(judge, image)
    torch.testing.assert_close(squares, slopes(judge, image), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(logits, judge(image))
    # And what a weight of the network gets from them.
    weight = judge[1].weight  # type: ignore[index]
    (gradient,) = torch.autograd.grad(squares.sum(), weight)
    with torch.no_grad():
        weight[1, 2] += 1e-5
        above = slopes(judge, image).sum()
        weight[1, 2] -= 2e-5
        below = slopes(judge, image).sum()
    assert gradient[1, 2].item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-4)


def test_autocast_does_not_reach_the_derivatives_of_layers_in_fp32() -> None:
    layer, image = nn.Linear(32, 32), torch.randn(4, 32)

    def judge(x: Tensor) -> Tensor:
        with whole_precision(x, wanted=True):
            return layer(layer(x).tanh())

    with torch.autocast("cpu", torch.bfloat16):
        squares, _ = squared_gradients(judge, image)
    torch.testing.assert_close(squares, squared_gradients(judge, image)[0])


def test_the_interpolation_penalty_is_zero_at_slope_one() -> None:
    direction = torch.randn(12, dtype=torch.float64)
    direction /= direction.norm()
    real, fake = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    share = torch.rand(4, dtype=torch.float64)
    for factor, wanted in ((1.0, 0.0), (3.0, 4.0), (0.0, 1.0)):
        judge = lambda x, factor=factor: factor * (x.flatten(1) @ direction)
        found = interpolation_penalty(judge, real, fake, share)
        assert found.item() == pytest.approx(wanted, abs=1e-5)
        assert torch.isfinite(found)


def test_interpolation_is_between_the_two() -> None:
    at: list[Tensor] = []

    def judge(x: Tensor) -> Tensor:
        at.append(x.detach())
        return x.flatten(1).sum(dim=1)

    real, fake = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    interpolation_penalty(judge, real, fake, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(at[0][:, 0, 0, 0], torch.tensor([1.0, 0.75, 0.0]))
