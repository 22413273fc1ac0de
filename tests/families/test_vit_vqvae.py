"""ViT-VQGAN: its loss by hand, published sizes, its discriminator's entrance, and what cannot be."""

import dataclasses

import pytest
import torch
from torch.distributions import Laplace

from gmdist.families.adversarial import DiscriminatorConfig
from gmdist.families.family import Surroundings
from gmdist.families.vit_vqvae import ViTVQVAE, ViTVQVAEConfig, logit_laplace, pixels
from gmdist.nets.perceptual import PerceptualConfig
from gmdist.nets.quantizer import QuantizerConfig
from gmdist.nets.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from gmdist.nets.vit import ViTConfig
from tests.support import SIZE, SMALL, MemorySource, small_family

JUDGE = DiscriminatorConfig(
    name="stylegan2",
    stylegan2=StyleGAN2DiscriminatorConfig(128, 16, minibatch_std_group=0),
    weight=0.8,
    start_images=100,
    warmup_images=50,
)


def made(**changes: object) -> ViTVQVAE:
    family = small_family("vit_vqvae", **changes)
    assert isinstance(family, ViTVQVAE)
    return family


def test_logit_laplace_is_a_density_of_pixels() -> None:
    y = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    image = (y - 0.5) / 0.4
    for mu in (-1.0, 0.3):
        nats = logit_laplace(torch.tensor(mu, dtype=torch.float64), image)
        assert torch.exp(-nats).mean().item() == pytest.approx(1.0, abs=2e-3)  # over y from 0 to 1
        expected = -(Laplace(mu, 1.0).log_prob(torch.logit(y)) - torch.log(y * (1 - y)))
        torch.testing.assert_close(nats, expected, rtol=1e-6, atol=1e-6)


def test_pixels_are_where_the_logits_are() -> None:
    image = torch.linspace(-1, 1, 9, dtype=torch.float64)
    logits = torch.logit(0.5 + 0.4 * image)
    torch.testing.assert_close(pixels(logits), image)
    assert pixels(torch.tensor(50.0)) == pytest.approx(1.25)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    family = made(logit_laplace_weight=0.3, l2_weight=2.0, perceptual=PerceptualConfig(weight=0.7)).eval()
    batch = MemorySource(48, 8).first(8).batch
    image = batch["image"]
    loss, metrics = family.loss(batch, 0)
    found = family.quantizer.quantize(family.autoencoder["encoder"](image))
    logits = family.autoencoder["decoder"](found.features)
    x = pixels(logits)
    assert family.perceptual is not None
    expected = 2.0 * (x - image).square().mean() + 0.3 * logit_laplace(logits, image).mean()
    expected = expected + 0.7 * family.perceptual(x, image).mean() + found.loss
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == {"l2", "logit_laplace", "perceptual", "commitment", "loss"}


def test_codes_stand_for_their_patches() -> None:
    family, image = made().eval(), MemorySource(48, 8).first(4).batch["image"]
    with torch.inference_mode():
        tokens = family.tokens(image)
        assert tokens.shape == (4, 4, 4)
        assert 0 <= tokens.min() <= tokens.max() < 32
        torch.testing.assert_close(family.decode(tokens), family.reconstruct({"image": image}))
        other = tokens.clone()
        other[:, 1, 2] = (other[:, 1, 2] + 1) % 32
        change = (family.decode(other) - family.decode(tokens)).abs().mean(dim=(0, 1))
    assert change.unfold(0, 4, 4).unfold(1, 4, 4).mean(dim=(2, 3)).flatten().argmax() == 1 * 4 + 2


@pytest.mark.parametrize(("seen", "weight"), [(99, None), (100, 0.0), (125, 0.4), (150, 0.8), (10**6, 0.8)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_judgement_comes_in_slowly(seen: int, weight: float | None, adaptive: bool) -> None:
    family, batch = (
        made(discriminator=dataclasses.replace(JUDGE, adaptive=adaptive)),
        MemorySource(48, 8).first(8).batch,
    )
    loss, metrics = family.loss(batch, seen)
    assert torch.isfinite(loss)
    if weight is None:
        assert "adversarial" not in metrics
        assert [phase.is_due(0, seen) for phase in family.phases()] == [True, False]
        return
    assert family.discriminator_loss(batch, seen)[0] > 0.0
    if not adaptive:
        assert metrics["adversarial_weight"].item() == pytest.approx(weight)
        return
    parts = torch.stack([metrics["l2"], 0.1 * metrics["logit_laplace"], 0.1 * metrics["perceptual"]])
    assert torch.isfinite(parts).all()
    assert (metrics["adversarial_weight"] > 0.0) == (weight > 0.0)


def test_an_adaptive_weight_makes_both_gradients_as_long() -> None:
    family, batch = made(discriminator=dataclasses.replace(JUDGE, weight=1.0)), MemorySource(48, 8).first(8).batch
    _, metrics = family.loss(batch, 150)
    reconstruction = family.reconstruction(batch)
    assert family.discriminator is not None
    adversarial = -family.discriminator(reconstruction).mean()
    (of_judge,) = torch.autograd.grad(adversarial, family.last_layer)
    free = made().eval()
    free.autoencoder.load_state_dict(family.autoencoder.state_dict())
    loss, _ = free.loss(batch, 150)  # codes do not reach the last layer
    (of_error,) = torch.autograd.grad(loss, free.last_layer)
    expected = of_error.norm() / (of_judge.norm() + 1e-4)
    assert metrics["adversarial_weight"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("encoder", "decoder", "count"),
    [
        (ViTConfig(), ViTConfig(), 50_908_195),
        (ViTConfig(768, 12, 12, 3072), ViTConfig(768, 12, 12, 3072), 170_664_483),
        (ViTConfig(), ViTConfig(1280, 32, 16, 5120), 613_487_907),
    ],
)
def test_published_sizes(encoder: ViTConfig, decoder: ViTConfig, count: int) -> None:
    with torch.device("meta"):
        surroundings = Surroundings(256, 3, 0, 0, lambda run: pytest.fail(run))
        family = ViTVQVAE(ViTVQVAEConfig(encoder=encoder, decoder=decoder), surroundings)
    assert sum(parameter.numel() for parameter in family.autoencoder.parameters()) == count


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"patch_size": 3}, f"patch_size: 3; must divide data.image_size, {SIZE}"),
        ({"patch_size": 0}, "patch_size: 0"),
        ({"encoder": ViTConfig(depth=0)}, "encoder.depth: 0"),
        ({"quantizer": QuantizerConfig(1)}, "quantizer.codebook_size: 1"),
        ({"quantizer": QuantizerConfig(4097)}, "quantizer.codebook_size: 4097; must be at most 4096, as k-means"),
        (
            {"l2_weight": 0.0, "logit_laplace_weight": 0.0, "perceptual": PerceptualConfig("none")},
            "l2_weight: 0.0; must be above 0, or logit_laplace_weight or that of a perceptual distance",
        ),
        ({"l2_weight": -1.0}, "l2_weight: -1.0; must be a number of at least 0"),
        ({"perceptual": PerceptualConfig("vgg")}, "perceptual.name: 'vgg'"),
        ({"discriminator": dataclasses.replace(JUDGE, warmup_images=-1)}, "discriminator.warmup_images: -1"),
        (
            {"discriminator": dataclasses.replace(JUDGE, name="dino")},
            "discriminator.name: 'dino'; must be one of patch",
        ),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, object], problem: str) -> None:
    config = dataclasses.replace(SMALL["vit_vqvae"], **changes)
    assert (config.problem(SIZE) or "").startswith(problem)


def test_a_judge_that_compares_samples_sees_images_and_reconstructions_apart() -> None:
    judge = dataclasses.replace(
        JUDGE, start_images=0, stylegan2=StyleGAN2DiscriminatorConfig(128, 16, minibatch_std_group=4)
    )
    family = made(discriminator=judge)
    assert family.discriminator is not None
    batch = MemorySource(48, 8).first(8).batch
    with torch.no_grad():
        real = family.discriminator(batch["image"])
        fake = family.discriminator(family.reconstruction(batch))
        loss, metrics = family.discriminator_loss(batch, 0)
    torch.testing.assert_close(metrics["real"], real.mean())
    torch.testing.assert_close(loss, 0.5 * ((1.0 - real).relu().mean() + (1.0 + fake).relu().mean()))


@pytest.mark.parametrize("image_size", [12, 16, 24])
def test_stylegan2_judges_every_size_that_patches_divide(image_size: int) -> None:
    config = dataclasses.replace(SMALL["vit_vqvae"], discriminator=JUDGE)
    assert isinstance(config, ViTVQVAEConfig)
    assert config.problem(image_size) is None
    family = ViTVQVAE(config, Surroundings(image_size, 3, 0, 0, small_family))
    image = torch.rand(2, 3, image_size, image_size) * 2.0 - 1.0
    batch = {"image": image, "label": torch.zeros(2, dtype=torch.int64), "key": torch.arange(2)}
    loss, metrics = family.loss(batch, 150)
    loss.backward()
    assert metrics["adversarial"].isfinite()
    assert all(parameter.grad is not None for parameter in family.autoencoder.parameters())


def test_stylegan2_judges_no_image_that_it_would_not_halve() -> None:
    config = dataclasses.replace(SMALL["vit_vqvae"], discriminator=JUDGE)
    assert "discriminator.stylegan2.channel_base: judges images whose sides are at least 8" in (config.problem(4) or "")
