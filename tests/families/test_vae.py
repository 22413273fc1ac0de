"""Bounds beside a likelihood that is known, the loss beside its formula, and what is said of posteriors."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal, Normal, kl_divergence

from gmdist import rng
from gmdist.errors import DivergedError
from gmdist.families.autoencoder import PlainAutoencoderConfig
from gmdist.families.betas import BetaConfig
from gmdist.families.family import Batch
from gmdist.families.likelihoods import LikelihoodConfig
from gmdist.families.posterior import active_units, moments, mutual_information
from gmdist.families.vae import VAE, VAEConfig
from gmdist.train.held_out import held_out_means
from gmdist.train.hooks import Hooks
from tests.support import CHANNELS, SIZE, SMALL, MemorySource, fit, small_family

COUNT, DIM, SCALE = 32, 8, 0.4
PIXELS = CHANNELS * SIZE**2


class LinearGaussian(nn.Module):
    """p(x|z) = N(W z + b, SCALE^2), whose likelihood is known: N(b, W W' + SCALE^2).

    The posterior is the true one, whose covariance is diagonal as the columns of W are orthogonal, or one beside it.
    """

    def __init__(self, shift: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        orthogonal = torch.linalg.qr(torch.randn(PIXELS, DIM, generator=generator, dtype=torch.float64)).Q
        self.weight = orthogonal * torch.linspace(0.5, 3.0, DIM).double()
        self.bias = 0.1 * torch.randn(PIXELS, generator=generator, dtype=torch.float64)
        self.shift = shift
        self.log_scale = None

    def encode(self, image: Tensor) -> Tensor:
        precision = 1.0 + self.weight.square().sum(dim=0) / SCALE**2
        mean = (image.flatten(1) - self.bias) @ self.weight / SCALE**2 / precision
        logvar = -precision.log().expand_as(mean)
        return torch.cat([mean + self.shift * torch.exp(0.5 * logvar), logvar + self.shift], dim=1)

    def decode(self, latent: Tensor) -> Tensor:
        return (latent @ self.weight.T + self.bias).view(-1, CHANNELS, SIZE, SIZE)

    def log_likelihood(self, image: Tensor) -> Tensor:
        noise = torch.full((PIXELS,), SCALE**2, dtype=torch.float64)
        return LowRankMultivariateNormal(self.bias, self.weight, noise).log_prob(image.flatten(1))


def batch_of(count: int = COUNT) -> Batch:
    batch = MemorySource(48, 8).first(count).batch
    return batch | {"image": batch["image"].double()}


def linear_vae(shift: float, num_samples: int) -> VAE:
    likelihood = LikelihoodConfig(scale=SCALE, learned_scale=False)
    family = small_family("vae", likelihood=likelihood, latent_dim=DIM, iwae_samples=num_samples)
    family.autoencoder = LinearGaussian(shift)
    return family


def test_with_the_true_posterior_both_bounds_are_the_likelihood() -> None:
    batch, family = batch_of(), linear_vae(0.0, 3)
    expected = family.autoencoder.log_likelihood(batch["image"])
    assert expected.std() > 1.0
    elbo, iwae = family.bounds(batch)
    # One latent is enough: all importance weights are p(x). The ELBO is that in the mean over latents.
    torch.testing.assert_close(iwae, expected, rtol=1e-6, atol=1e-4)
    elbo = linear_vae(0.0, 400).bounds(batch)[0]
    assert (elbo - expected).abs().mean() < 0.2


def test_bounds_come_nearer_with_more_latents_and_stay_below() -> None:
    batch = batch_of()
    found = {count: linear_vae(0.6, count).bounds(batch) for count in (1, 4, 512)}
    expected = linear_vae(0.6, 1).autoencoder.log_likelihood(batch["image"])
    # KL(q || p(z|x)) of posteriors that are wider by exp(0.6) and beside the true ones: what the ELBO lacks.
    gap = DIM * 0.5 * (math.exp(0.6) + 0.36 - 1.0 - 0.6)
    assert (expected - found[512][0]).mean().item() == pytest.approx(gap, rel=0.1)
    one, few, many = ((expected - iwae).mean().item() for _, iwae in found.values())
    assert one == pytest.approx(gap, rel=0.3)
    assert 0.5 * one > few > 5.0 * abs(many)
    assert many == pytest.approx(0.0, abs=0.02 * gap)


@pytest.mark.parametrize("beta", [BetaConfig(value=0.7), BetaConfig("linear", value=2.0, num_images=200)])
@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
def test_loss_by_hand(name: str, beta: BetaConfig) -> None:
    family, batch = small_family("vae", likelihood=LikelihoodConfig(name, SCALE), beta=beta).double(), batch_of()
    loss, metrics = family.loss(batch, 100)
    image = batch["image"]
    mean, logvar = family.autoencoder.encoder(image).chunk(2, dim=1)
    posterior = Normal(mean, (logvar / 2).exp())
    output = family.autoencoder.decoder(mean + posterior.scale * rng.normal(0, "posterior", batch["key"], (DIM,)))
    if name == "gaussian":
        nll = -Normal(output, SCALE).log_prob(image).sum() / COUNT
    else:
        nll = F.binary_cross_entropy_with_logits(output, (image + 1) / 2, reduction="sum") / COUNT
    kl = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum() / COUNT
    weight = 0.7 if beta.schedule == "constant" else 1.0
    torch.testing.assert_close(loss, nll + weight * kl, rtol=1e-7, atol=0)
    assert metrics["beta"] == weight
    torch.testing.assert_close(metrics["kl_nats"], kl.detach())
    assert ("scale" in metrics) == (name == "gaussian")


def test_numbers_do_not_depend_on_the_batch() -> None:
    family, data = small_family("vae").eval(), MemorySource(48, 8)
    whole, parts = (held_out_means(family, data, size, torch.device("cpu")) for size in (48, 5))
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert {"elbo_nats", "iwae_nats", "elbo_bits_per_dim", "iwae_bits_per_dim", "psnr_db", "ssim", "mse"} < set(whole)
    kls = [whole[f"kl_nats_{number}"] for number in range(DIM)]
    assert sum(kls) == pytest.approx(whole["kl_nats"])
    batch = data.first(48).batch
    scores = family.scores(batch)
    assert scores["elbo"].mean().item() == pytest.approx(whole["elbo_nats"], rel=1e-5)
    alone = family.scores({name: tensor[3:4] for name, tensor in batch.items()})
    for name in ("elbo", "iwae"):
        torch.testing.assert_close(alone[name], scores[name][3:4], rtol=1e-4, atol=1e-4)


def gaussian_posteriors(spread: list[float], variance: float) -> tuple[Tensor, Tensor]:
    """Means whose dimensions have these standard deviations over images, and log-variances [4096, Z]."""
    mean = torch.randn(4096, len(spread), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = (mean - mean.mean(dim=0)) / mean.std(dim=0, correction=0) * torch.tensor(spread).double()
    return mean + 0.3, torch.full_like(mean, math.log(variance))


def test_units_are_active_where_the_posteriors_mean_varies() -> None:
    assert active_units(moments(*gaussian_posteriors([1.0, 0.11, 0.09, 0.0], 0.5))) == 2


def test_units_are_counted_far_from_the_prior() -> None:
    mean, logvar = (x.float() for x in gaussian_posteriors([0.5, 0.5, 0.05], 0.5))
    assert active_units(moments(mean + 1000.0, logvar)) == 2


def test_mutual_information_of_gaussians_and_its_place_below_the_kl_term() -> None:
    mean, logvar = gaussian_posteriors([2.0, 0.5], 0.1)
    found = mutual_information(moments(mean, logvar)).item()
    assert found == pytest.approx(0.5 * math.log(4.1 / 0.1) + 0.5 * math.log(0.35 / 0.1), abs=1e-3)
    kl = kl_divergence(Normal(mean, math.sqrt(0.1)), Normal(0.0, 1.0)).sum(dim=1).mean().item()
    assert found < kl
    # Two dimensions that say the same tell no more than one that says it twice.
    twice = mutual_information(moments(mean[:, :1].expand(-1, 2), logvar)).item()
    assert twice == pytest.approx(0.5 * math.log(8.1 / 0.1), abs=1e-6)
    nothing = mutual_information(moments(torch.zeros_like(mean), logvar)).item()
    assert nothing == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "call"),
    [("vae", call) for call in ("encode", "evaluate", "scores", "reconstruct")]
    + [("autoencoder", call) for call in ("encode", "evaluate", "reconstruct")],
)
def test_an_encoder_that_is_not_finite_is_named(name: str, call: str) -> None:
    family, batch = small_family(name), MemorySource(48, 8).first(8).batch
    with torch.no_grad():
        family.autoencoder.encoder[0][2].weight.view(-1)[0] = torch.nan
    with pytest.raises(DivergedError, match=r"the output of encoder\.0\.2 is not finite; check the images and the w"):
        getattr(family, call)(batch["image"] if call == "encode" else batch)


@pytest.mark.parametrize("evaluate_every", [40, None])
def test_a_posterior_that_collapses_is_warned_of(evaluate_every: int | None, tmp_path: Path) -> None:
    for value, expected in ((1000.0, 1), (0.0, 0)):
        told: list[str] = []
        settings = {
            "num_steps": 40,
            "evaluate_every": evaluate_every,
            "checkpoint_every": 40,
            "ema_halflife_kimg": 0.005,
        }
        family = small_family("vae", beta=BetaConfig(value=value))
        fit(family, tmp_path / str(value), hooks=Hooks(on_message=told.append), **settings)
        warnings = [line for line in told if "step 40: the posterior has collapsed" in line]
        assert len(warnings) == expected, told


def test_concerns_of_a_posterior() -> None:
    family = small_family("vae")
    assert "0 of 8 latent dimensions are active" in family.concerns({"active_units": 0.0, "kl_nats": 0.01})[0]
    assert "the KL term of 8 latent dimensions is 0.01 nats" in family.concerns({"autoencoder/kl_nats": 0.01})[0]
    assert family.concerns({"autoencoder/kl_nats": 1.0}) == []
    assert family.concerns({"active_units": 0.0, "kl_nats": 30.0}) == []  # of a single image
    assert family.concerns({"active_units": 1.0, "kl_nats": 1.0}) == family.concerns({}) == []


def test_sizes_that_cannot_be() -> None:
    family = small_family("vae")
    assert family.config.problem(SIZE) is None
    assert "latent_dim: 0; must be from 1" in VAEConfig(latent_dim=0).problem(SIZE)
    assert "iwae_samples: 0; must be at least 1" in VAEConfig(iwae_samples=0).problem(SIZE)
    assert "autoencoder.channels: image sides must be divisible by 4" in SMALL["vae"].problem(18)
    assert "latent_dim: -1; must be from 1" in PlainAutoencoderConfig(latent_dim=-1).problem(SIZE)
