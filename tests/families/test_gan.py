"""What GANs share: their phases, penalties in and beside the main loss, monitors, and a first sign of learning."""

import math
from pathlib import Path

import pytest
import torch

from gmdist.errors import ConfigError
from gmdist.families.augmentation import AugmentConfig
from gmdist.families.conditional_gan import ConditionalGAN, ConditionalGANConfig
from gmdist.families.family import Batch, Surroundings
from gmdist.families.gan import GAN, ObjectiveConfig
from gmdist.families.vanilla_gan import VanillaGANConfig
from tests.support import SIZE, MemorySource, make_trainer, small_family


def made(name: str, **changes: object) -> GAN:
    family = small_family(name, **changes)
    assert isinstance(family, GAN)
    return family


def batch() -> Batch:
    return MemorySource(48, 8).first(8).batch


def test_a_lazy_penalty_is_a_phase_of_its_own() -> None:
    lazy = made("gan", objective=ObjectiveConfig(r1_gamma=1.0, penalty_every=16))
    at_once = made("gan", objective=ObjectiveConfig(r1_gamma=1.0))
    phases = {phase.name: phase for phase in lazy.phases()}
    assert list(phases) == ["d", "d_penalty", "g"]
    assert (phases["d_penalty"].every, phases["d_penalty"].higher_order) == (16, True)
    assert not phases["d"].higher_order
    assert [(phase.name, phase.higher_order) for phase in at_once.phases()] == [("d", True), ("g", False)]
    both = lazy.d_loss(batch(), 0)[0] + lazy.d_penalty(batch(), 0)[0]
    torch.testing.assert_close(at_once.d_loss(batch(), 0)[0], both)


def test_r1_and_r2_are_of_real_and_of_generated_images() -> None:
    family = made("gan", objective=ObjectiveConfig(r1_gamma=2.0, r2_gamma=6.0, penalty_every=2))
    loss, metrics = family.d_penalty(batch(), 0)
    torch.testing.assert_close(loss, metrics["r1"] + 3.0 * metrics["r2"])
    real = batch()["image"].requires_grad_()
    (gradient,) = torch.autograd.grad(family.discriminator(real, None).sum(), real)
    torch.testing.assert_close(metrics["r1"], gradient.square().sum(dim=(1, 2, 3)).mean())


def test_a_game_goes_on_with_other_samples_in_each_phase() -> None:
    family, keys = made("gan"), torch.arange(4)
    one, other = family.generate(keys, None, "d"), family.generate(keys, None, "g")
    assert not torch.allclose(one, other)
    assert torch.equal(family.generate(keys, None, "g"), other)


def test_a_conditional_gan_needs_labels() -> None:
    surroundings = Surroundings(SIZE, 1, 0, 0, lambda run: made("gan"))
    with pytest.raises(ConfigError, match=r"family\.name: 'conditional_gan'; needs data with labels: set data\.num_c"):
        ConditionalGAN(ConditionalGANConfig(), surroundings)


def test_a_discriminator_learns_to_tell_and_a_generator_to_be_taken(tmp_path: Path) -> None:
    trainer = make_trainer(made("dcgan"), tmp_path, num_steps=60, checkpoint_every=1000)
    family = trainer.family
    assert isinstance(family, GAN)

    def error() -> float:
        """Of how far pixels are from grey, beside those of the data."""
        real = trainer.data.first(48).batch_on(trainer.device)["image"]
        with torch.no_grad():
            return float((family.sample(torch.arange(64)).square().mean() - real.square().mean()).abs())

    try:
        before = error()
        trainer.fit()
        with torch.no_grad():
            assert error() < 0.6 * before
    finally:
        trainer.close()


def test_what_is_measured_of_held_out_images() -> None:
    family = made("gan").eval()
    means = family.evaluate(batch())
    found = family.summarize(means)
    assert set(found) == {"real_sign", "fake_sign", "spread", "repeated"}
    assert all(-1.0 <= found[name] <= 1.0 for name in ("real_sign", "fake_sign"))
    image, generated = batch()["image"], family.sample(batch()["key"]).detach()
    distances = [torch.cdist(of.flatten(1), of.flatten(1)).square().mean() for of in (generated, image)]
    assert found["spread"] == pytest.approx(float(distances[0] / distances[1]), rel=1e-4)
    halves = [family.evaluate({key: t[i : i + 4] for key, t in batch().items()}) for i in (0, 4)]
    apart = {name: (halves[0][name] + halves[1][name]) / 2 for name in means}
    assert family.summarize(apart)["spread"] == pytest.approx(found["spread"], rel=1e-6)
    alone = family.summarize(family.evaluate({name: value[:1] for name, value in batch().items()}))
    assert alone.keys() == found.keys()  # by which train.best_metric is looked for
    assert math.isnan(alone["spread"])


def test_few_images_again_and_again_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    family, data = made("gan").eval(), MemorySource(48, 32).first(32).batch
    image = data["image"]
    for count, warned in ((32, False), (8, True), (2, True)):
        noisy = image[torch.arange(32) % count] + 0.01 * torch.randn(image.shape)
        monkeypatch.setattr(family, "sample", lambda keys, condition=None, noisy=noisy: noisy)
        found = family.summarize(family.evaluate(data))
        assert found["repeated"] == (1.0 if warned else 0.0)
        assert any("come more than once" in concern for concern in family.concerns(found)) == warned


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"real_sign": 0.3, "fake_sign": -0.2, "spread": 0.9, "class_coverage": 1.0}, []),
        (
            {"real_sign": 0.95, "fake_sign": -0.97},
            ["the discriminator tells nearly all held-out images from generated"],
        ),
        ({"real_sign": 0.95, "fake_sign": 0.2}, []),
        (
            {"real_sign": -0.95, "fake_sign": -0.95},
            ["the discriminator takes nearly all held-out images for generated"],
        ),
        ({"spread": 0.1}, ["generated images are 0.10 times as far apart as real ones"]),
        ({"class_coverage": 0.7}, ["generated images show 70% of the classes"]),
        ({"class_coverage": 0.999}, []),
    ],
)
def test_warnings(found: dict[str, float], expected: list[str]) -> None:
    concerns = made("gan").concerns(found)
    assert len(concerns) == len(expected)
    assert all(concern.startswith(start) for concern, start in zip(concerns, expected, strict=True))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (VanillaGANConfig(ObjectiveConfig("wgan")), "objective.loss: 'wgan'; must be one of minimax, non_saturating"),
        (VanillaGANConfig(ObjectiveConfig(r1_gamma=-1.0)), "objective.r1_gamma: -1.0"),
        (VanillaGANConfig(ObjectiveConfig(penalty_every=0)), "objective.penalty_every: 0; must be at least 1"),
        (VanillaGANConfig(hidden_channels=0), "hidden_channels: 0"),
        (
            VanillaGANConfig(ObjectiveConfig("wasserstein"), AugmentConfig("ada")),
            "augmentation.p: null; with objective.loss 'wasserstein'",
        ),
    ],
)
def test_settings_that_cannot_be(config: VanillaGANConfig, problem: str) -> None:
    assert (config.problem(32) or "").startswith(problem)
    assert VanillaGANConfig().problem(32) is None
    of_a_pixel = VanillaGANConfig(augmentation=AugmentConfig("ada", p=0.5)).problem(1)
    assert of_a_pixel == "augmentation.kind: 'ada'; moves images of 2 pixels and more, and data.image_size is 1"
