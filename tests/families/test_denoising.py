"""The loss of a denoiser and its sampling: keyed by sample, weighted, by noise level, guided."""

import dataclasses

import pytest
import torch
from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.diffusion.process import Diffusion
from gmdist.families.denoising import NOISE_BINS, denoising_loss, noise_level_losses, sample_denoiser
from tests.support import MemorySource, small_family

CONFIGS = [
    DiffusionConfig("cosine", prediction="eps"),
    DiffusionConfig("scaled_linear", prediction="v", weight="min_snr", zero_terminal_snr=True),
    DiffusionConfig("linear", prediction="x0", weight="p2"),
    DiffusionConfig("flow", prediction="flow"),
    DiffusionConfig("edm", prediction="edm", weight="edm"),
]
KEYS = torch.arange(32)


def data(keys: Tensor = KEYS) -> Tensor:
    return torch.sin(keys[:, None, None, None] + torch.arange(16.0).view(1, 1, 4, 4))


def shrinking(x: Tensor, conditioning: Tensor) -> Tensor:
    """A network that depends on its input and on the time."""
    return 0.5 * x + 0.001 * conditioning.float().view(-1, 1, 1, 1)


def test_the_loss_of_a_zero_network_is_the_size_of_the_target() -> None:
    diffusion = Diffusion(DiffusionConfig("flow", prediction="flow"))
    keys = torch.arange(4000)
    x0 = 2.0 * torch.ones(4000, 1, 4, 4)
    loss = denoising_loss(lambda x, t: torch.zeros_like(x), diffusion, x0, keys, 0)
    assert loss.shape == (4000,)
    assert loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(5.0, rel=0.02)  # of eps - 2: 1 + 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.schedule}-{config.prediction}")
def test_the_loss_of_a_sample_depends_on_its_key_alone(config: DiffusionConfig) -> None:
    assert config.problem() is None
    diffusion = Diffusion(config)
    whole = denoising_loss(shrinking, diffusion, data(), KEYS, 0)
    assert torch.isfinite(whole).all()
    order = torch.tensor([5, 30, 2])
    torch.testing.assert_close(denoising_loss(shrinking, diffusion, data(order), order, 0), whole[order])
    assert not torch.allclose(denoising_loss(shrinking, diffusion, data(), KEYS, 1), whole)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.schedule}-{config.prediction}")
def test_means_of_batches_are_means_of_samples_at_every_noise_level(config: DiffusionConfig) -> None:
    # As the trainer averages: weighted by the size of each batch.
    diffusion = Diffusion(config)
    whole = noise_level_losses(shrinking, diffusion, data(), KEYS, 0)
    assert list(whole) == ["loss", *[f"loss_noise_{part}" for part in range(8)]]
    parts = [(20, KEYS[:20]), (11, KEYS[20:31]), (1, KEYS[31:])]
    metrics = [(count, noise_level_losses(shrinking, diffusion, data(keys), keys, 0)) for count, keys in parts]
    for name, value in whole.items():
        mean = sum(count * each[name] for count, each in metrics) / len(KEYS)
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-7)
        assert not value.requires_grad


def test_each_part_holds_its_eighth_of_the_noise_levels() -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor, conditioning: Tensor) -> Tensor:
        seen.append(conditioning)
        return torch.zeros_like(x)

    noise_level_losses(predict, Diffusion(DiffusionConfig("linear")), data(), KEYS, 0)
    assert len(seen) == NOISE_BINS
    for part, timesteps in enumerate(seen):
        assert ((timesteps >= 125 * part) & (timesteps < 125 * (part + 1))).all()
        assert len(timesteps.unique()) > 16


def test_each_part_has_noise_of_its_own() -> None:
    noise: list[Tensor] = []

    def predict(x: Tensor, conditioning: Tensor) -> Tensor:
        noise.append(x / (conditioning / 1000.0).view(-1, 1, 1, 1))
        return x

    noise_level_losses(predict, Diffusion(DiffusionConfig("flow", prediction="flow")), 0.0 * data(), KEYS, 0)
    together = torch.corrcoef(torch.stack(noise).flatten(1))
    assert (together - torch.eye(NOISE_BINS)).abs().max() < 0.2


def test_the_validation_loss_estimates_the_training_loss() -> None:
    diffusion = Diffusion(DiffusionConfig("cosine", prediction="v", weight="min_snr"))
    keys = torch.arange(4000)
    training = denoising_loss(shrinking, diffusion, data(keys), keys, 0).mean()
    validation = noise_level_losses(shrinking, diffusion, data(keys), keys, 0)
    torch.testing.assert_close(validation["loss"], training, rtol=0.05, atol=0.0)
    # The parts are not weighted; where all weights are 1 their mean is the loss.
    plain = noise_level_losses(shrinking, Diffusion(DiffusionConfig("cosine", prediction="v")), data(), KEYS, 0)
    mean = torch.stack([plain[f"loss_noise_{part}"] for part in range(8)]).mean()
    torch.testing.assert_close(plain["loss"], mean)
    assert validation["loss"] < 0.9 * torch.stack([validation[f"loss_noise_{part}"] for part in range(8)]).mean()


def test_guidance_goes_from_the_free_prediction_through_the_conditional_one() -> None:
    settings = SamplerConfig("ddim", 1, guidance=2.0)
    diffusion = Diffusion(DiffusionConfig("cosine", prediction="x0", sampler=settings))
    asked = torch.tensor([0.1, 0.2, 0.3])

    def predict(x: Tensor, conditioning: Tensor) -> Tensor:
        return torch.zeros_like(x) + asked.view(-1, 1, 1, 1)

    def predict_both(x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        return predict(x, conditioning), torch.full_like(x, 0.4)

    keys = torch.arange(3)
    x = sample_denoiser(predict, predict_both, diffusion, keys, (1, 2, 2), 0)
    torch.testing.assert_close(x[:, 0, 0, 0], 0.4 + 2.0 * (asked - 0.4))
    clipped = sample_denoiser(predict, predict_both, diffusion, keys, (1, 2, 2), 0, clip=0.1)
    assert clipped.abs().max().item() == pytest.approx(0.1)
    free = sample_denoiser(predict, None, diffusion, keys, (1, 2, 2), 0)
    torch.testing.assert_close(free[:, 0, 0, 0], asked)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_depends_on_its_key_alone(sampler: str) -> None:
    diffusion = Diffusion(DiffusionConfig("cosine", prediction="v", sampler=SamplerConfig(sampler, 5)))
    whole = sample_denoiser(shrinking, None, diffusion, KEYS, (1, 4, 4), 0)
    torch.testing.assert_close(sample_denoiser(shrinking, None, diffusion, KEYS[7:9], (1, 4, 4), 0), whole[7:9])
    assert not torch.allclose(whole[0], whole[1])
    assert not torch.allclose(sample_denoiser(shrinking, None, diffusion, KEYS, (1, 4, 4), 1), whole)


@pytest.mark.parametrize("name", ["ddpm", "latent_diffusion"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.schedule}-{config.prediction}")
def test_families_train_and_sample_with_every_kind_of_noise(name: str, config: DiffusionConfig) -> None:
    config = dataclasses.replace(config, sampler=SamplerConfig(num_steps=3))
    family = small_family(name, diffusion=config).eval()
    batch = MemorySource(48, 8).first(8).batch
    family.initialize(batch)
    loss, _ = family.phases()[0].loss(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    with torch.inference_mode():
        metrics = family.evaluate(batch)
        images = family.sample(torch.arange(2))
    assert set(metrics) == {"loss", *[f"loss_noise_{part}" for part in range(8)]}
    assert torch.isfinite(images).all()
