"""Likelihoods beside torch.distributions and beside the differences that they stand for, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from gmdist.families.likelihoods import LikelihoodConfig, bits_per_dim, expected_image, log_likelihood

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
SHAPE = (3, 2, 4, 4)


def image_and_output() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = LEVELS[torch.randint(256, SHAPE, generator=generator)]
    return image, torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def of_levels(location: float, scale: float) -> Tensor:
    """The discretized logistic's log-probabilities of all levels [256]."""
    image = LEVELS.view(256, 1, 1, 1)
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
    return log_likelihood("discretized_logistic", image, torch.full_like(image, location), log_scale)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 50.0])
@pytest.mark.parametrize("location", [-3.0, -1.0, 0.1234, 1.0, 2.0])
def test_probabilities_of_all_levels_add_up_to_one(location: float, scale: float) -> None:
    found = of_levels(location, scale)
    assert torch.isfinite(found).all()
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_a_level_has_the_mass_between_its_edges() -> None:
    edges = (torch.arange(1, 256, dtype=torch.float64) - 0.5) / 127.5 - 1.0
    below = torch.cat([torch.zeros(1), torch.sigmoid((edges - 0.2) / 0.1), torch.ones(1)])
    torch.testing.assert_close(of_levels(0.2, 0.1).exp(), below.diff(), rtol=1e-9, atol=1e-15)


def test_levels_far_away_keep_their_logarithm_and_their_gradient() -> None:
    # The difference of two sigmoids would be 0 there, in fp32 from 20 scales on.
    image = torch.zeros(1, 1, 1, 1)
    location = torch.full_like(image, 0.9, requires_grad=True)
    found = log_likelihood("discretized_logistic", image, location, torch.tensor(math.log(0.01)))
    assert found.item() == pytest.approx(of_levels(0.9 + LEVELS[127].item(), 0.01)[127].item(), rel=1e-4)
    found.sum().backward()
    assert location.grad.item() == pytest.approx(-100.0, rel=1e-4)


def test_gaussian_and_bernoulli_beside_torch() -> None:
    image, output = image_and_output()
    log_scale = torch.tensor(-0.7, dtype=torch.float64)
    expected = Normal(output, log_scale.exp()).log_prob(image).sum(dim=(1, 2, 3))
    torch.testing.assert_close(log_likelihood("gaussian", image, output, log_scale), expected)
    ones = (image > 0).double()
    expected = Bernoulli(logits=output).log_prob(ones).sum(dim=(1, 2, 3))
    torch.testing.assert_close(log_likelihood("bernoulli", 2 * ones - 1, output, log_scale), expected)


def test_what_is_shown_is_in_range() -> None:
    _, output = image_and_output()
    torch.testing.assert_close(expected_image("bernoulli", output), 2 * Bernoulli(logits=output).mean - 1)
    assert torch.equal(expected_image("gaussian", 3 * output), (3 * output).clamp(-1, 1))


def test_bits_of_a_density_are_those_of_levels() -> None:
    # A wide Gaussian says of a level what a uniform choice from 256 does where it is 1 / 2 over [-1, 1].
    assert bits_per_dim("discretized_logistic", -10 * math.log(256), 10) == pytest.approx(8.0)
    assert bits_per_dim("gaussian", -10 * math.log(2.0), 10) == pytest.approx(math.log2(255))
    image, output = image_and_output()
    log_scale = torch.tensor(math.log(0.5), dtype=torch.float64)
    density = log_likelihood("gaussian", image, output, log_scale).sum().item()
    edges = [Normal(output, 0.5).cdf(image + side / 255) for side in (1, -1)]
    mass = (edges[0] - edges[1]).log().sum().item()
    assert bits_per_dim("gaussian", density, image.numel()) == pytest.approx(
        bits_per_dim("bernoulli", mass, image.numel()), abs=1e-4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LikelihoodConfig("laplace"), "name: 'laplace'; must be one of gaussian, bernoulli, discretized_logistic"),
        (LikelihoodConfig(scale=0.0), "scale: 0.0; must be from 1e-6 to 1e6"),
        (LikelihoodConfig(scale=math.nan), "scale: nan; must be from 1e-6 to 1e6"),
    ],
)
def test_likelihoods_that_cannot_be(config: LikelihoodConfig, message: str) -> None:
    assert config.problem() == message
    assert LikelihoodConfig().problem() is None
