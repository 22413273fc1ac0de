"""Losses and gradients of autoencoders and VAEs beside pythae's, with the same networks, inputs and noise."""

import math

import pytest
import torch
from pythae.models import (
    AE,
    VAE,
    AEConfig,
    BetaVAE,
    BetaVAEConfig,
    DisentangledBetaVAE,
    DisentangledBetaVAEConfig,
    VAEConfig,
)
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn

from gmdist import rng
from gmdist.families.betas import BetaConfig
from gmdist.families.family import Batch, Family
from gmdist.families.likelihoods import LikelihoodConfig
from tests.support import CHANNELS, SIZE, MemorySource, small_family

pytestmark = pytest.mark.parity

COUNT, DIM = 8, 8
PIXELS = CHANNELS * SIZE**2
SIZES = {"input_dim": (CHANNELS, SIZE, SIZE), "latent_dim": DIM}


class Encoder(BaseEncoder):
    """Our encoder in pythae's terms. Images in [0, 1] are brought to [-1, 1]."""

    def __init__(self, network: nn.Module, in_unit_range: bool = False) -> None:
        super().__init__()
        self.network, self.in_unit_range = network, in_unit_range

    def forward(self, x: Tensor) -> ModelOutput:
        encoded = self.network(2.0 * x - 1.0 if self.in_unit_range else x)
        return ModelOutput(embedding=encoded[:, :DIM], log_covariance=encoded[:, DIM:])


class Decoder(BaseDecoder):
    """Our decoder in pythae's terms, whose Bernoulli takes probabilities."""

    def __init__(self, network: nn.Module, in_unit_range: bool = False) -> None:
        super().__init__()
        self.network, self.in_unit_range = network, in_unit_range

    def forward(self, z: Tensor) -> ModelOutput:
        output = self.network(z)
        return ModelOutput(reconstruction=output.sigmoid() if self.in_unit_range else output)


def batch_of() -> Batch:
    batch = MemorySource(48, 8).first(COUNT).batch
    return batch | {"image": batch["image"].double()}


def gradients(loss: Tensor, family: Family) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(family.autoencoder.parameters())))


def assert_same(ours: Tensor, theirs: Tensor, family: Family) -> None:
    """Of two losses, and their gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for found, expected in zip(gradients(ours, family), gradients(theirs, family), strict=True):
        assert expected.norm() > 0.0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def vae(beta: BetaConfig, name: str = "gaussian", num_samples: int = 1) -> Family:
    """Ours; its Gaussian has variance 1, as theirs."""
    likelihood = LikelihoodConfig(name, learned_scale=False)
    settings = {"latent_dim": DIM, "likelihood": likelihood, "beta": beta, "iwae_samples": num_samples}
    return small_family("vae", **settings).double()


def test_autoencoder() -> None:
    family, batch = small_family("autoencoder", latent_dim=DIM).double(), batch_of()
    peer = AE(AEConfig(**SIZES), Encoder(family.autoencoder.encoder), Decoder(family.autoencoder.decoder))
    loss, _ = family.loss(batch, 0)
    assert_same(PIXELS * loss, peer({"data": batch["image"]}).loss, family)  # theirs is a sum over pixels


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("kind", ["vae", "beta", "capacity"])
def test_vae(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, is_bernoulli = batch_of(), name == "bernoulli"
    settings = SIZES | {"reconstruction_loss": "bce" if is_bernoulli else "mse"}
    if kind == "vae":
        family, model, config, epoch = vae(BetaConfig(), name), VAE, VAEConfig(**settings), {}
    elif kind == "beta":
        family, model, epoch = vae(BetaConfig(value=3.5), name), BetaVAE, {}
        config = BetaVAEConfig(**settings, beta=3.5)
    else:
        # Their capacity rises with epochs, to its end after warmup_epoch + 1.
        family = vae(BetaConfig("capacity", 7.0, capacity_nats=9.0, num_images=400), name)
        model, epoch = DisentangledBetaVAE, {"epoch": 1}
        config = DisentangledBetaVAEConfig(**settings, beta=7.0, C=9.0, warmup_epoch=3)
    networks = family.autoencoder
    peer = model(config, Encoder(networks.encoder, is_bernoulli), Decoder(networks.decoder, is_bernoulli))
    noise = rng.normal(family.seed, "posterior", batch["key"], (DIM,)).double()
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    image = (batch["image"] + 1.0) / 2.0 if is_bernoulli else batch["image"]
    expected = peer({"data": image}, **epoch)
    loss, metrics = family.loss(batch, 100)
    constant = 0.0 if is_bernoulli else 0.5 * PIXELS * math.log(2.0 * math.pi)  # theirs leaves it out
    assert_same(loss - constant, expected.loss, family)
    torch.testing.assert_close(metrics["nll_nats"] - constant, expected.recon_loss.detach(), rtol=1e-6, atol=0)


def test_importance_weighted_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    family, batch, count = vae(BetaConfig(), num_samples=5), batch_of(), 5
    networks = family.autoencoder
    peer = VAE(VAEConfig(**SIZES), Encoder(networks.encoder), Decoder(networks.decoder))
    draws = [rng.normal(family.seed, f"importance {number}", batch["key"], (DIM,)) for number in range(count)]
    noise = iter(torch.stack(draws, dim=1).double())  # [N, 5, Z], an image at a time
    monkeypatch.setattr(torch, "randn_like", lambda _: next(noise))
    with torch.no_grad():
        found = family.scores(batch)["iwae"].mean().item()
        assert found == pytest.approx(peer.get_nll(batch["image"], count, count), rel=1e-6)
