"""The augmentation of a GAN: its kinds, p by a simulation by hand, its state, workers, and what cannot be."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from gmdist import rng
from gmdist.families import ada, diffaugment
from gmdist.families.augmentation import Augmentation, AugmentConfig, adapted
from gmdist.families.family import Family, Phase
from tests.support import CHANNELS, SIZE, fit, run_workers, tree_bytes

ADAPTIVE = AugmentConfig("ada", target=0.25, speed_kimg=0.2, interval=3)
STEPS, BATCH = 40, 8


def logits(step: int, patches: tuple[int, ...] = ()) -> torch.Tensor:
    """Of a step's batch [BATCH, *patches]: the discriminator overfits, and then no more."""
    numbers = torch.randn(BATCH, *patches, generator=torch.Generator().manual_seed(step))
    return numbers + (2.0 if step < STEPS // 2 else -0.5)


def run(augmentation: Augmentation, steps: range, micro: int = BATCH, part: slice = slice(None)) -> list[float]:
    """p after each step."""
    found = []
    for step in steps:
        for some in logits(step, (2,))[part].split(micro):
            augmentation.observe(some)
        found.append(augmentation.update()["augment/p"].item())
    return found


def test_p_follows_the_signs_as_by_hand() -> None:
    p, images, signs, wanted = 0.0, 0, [], []
    for step in range(STEPS):
        signs += logits(step, (2,)).sign().flatten().tolist()
        images += BATCH
        if step % 3 == 2:
            r = sum(signs) / len(signs)
            p = min(max(p + math.copysign(images / 200.0, r - 0.25), 0.0), 1.0)
            images, signs = 0, []
        wanted.append(p)
    found = run(Augmentation(ADAPTIVE, 0), range(STEPS))
    assert found == pytest.approx(wanted, abs=1e-6)
    assert max(found) > 0.5 > found[-1]


def test_p_goes_from_0_to_1_in_the_images_asked_for_and_no_further() -> None:
    augmentation = Augmentation(AugmentConfig("ada", speed_kimg=1.0, interval=4), 0)
    for step in range(1, 141):
        augmentation.observe(torch.ones(10, 1))
        augmentation.update()
        assert augmentation.p.item() == pytest.approx(min(step // 4 * 4 / 100, 1.0), abs=1e-5)
    augmentation.observe(-torch.ones(400, 1))
    for _ in range(4):
        augmentation.update()
    assert augmentation.p.item() == pytest.approx(0.6, abs=1e-5)  # at once: 1 was the most


@pytest.mark.parametrize(
    ("signs", "p"),
    [(7, 0.6), (6, 0.5), (5, 0.4), (-10, 0.4)],
)
def test_the_change_is_by_the_sign_alone(signs: int, p: float) -> None:
    config = AugmentConfig("ada", target=0.5, speed_kimg=0.1)
    found = adapted(torch.tensor(0.5), torch.tensor([signs, 12, 10]), config)
    assert found.item() == pytest.approx(p)
    assert adapted(torch.tensor(0.5), torch.tensor([0, 0, 0]), config) == 0.5  # nothing was observed


def test_logits_that_are_0_or_not_a_number_have_no_sign() -> None:
    augmentation = Augmentation(ADAPTIVE, 0)
    augmentation.observe(torch.tensor([[1.0, 2.0], [0.0, math.nan], [-math.inf, 3.0]]))
    assert augmentation.observed.tolist() == [2, 6, 3]
    assert augmentation.update()["augment/real_sign"].item() == pytest.approx(2 / 6)


def test_micro_batches_make_no_difference() -> None:
    assert run(Augmentation(ADAPTIVE, 0), range(STEPS), micro=3) == run(Augmentation(ADAPTIVE, 0), range(STEPS))


@pytest.mark.parametrize("stop", [1, 10, 23])
def test_a_run_that_goes_on_from_its_buffers_is_the_same(stop: int) -> None:
    whole, first, second = (Augmentation(ADAPTIVE, 0) for _ in range(3))
    run(whole, range(STEPS))
    run(first, range(stop))
    second.load_state_dict({name: buffer.clone() for name, buffer in first.named_buffers()})
    run(second, range(stop, STEPS))
    for name, buffer in whole.named_buffers():
        assert torch.equal(second.get_buffer(name), buffer), name


def alone_and_together(rank: int, world_size: int) -> None:
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    together, alone = Augmentation(ADAPTIVE, 0), Augmentation(ADAPTIVE, 0)
    found = run(together, range(STEPS), part=part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmdist.families.augmentation.all_sum", lambda value: value)
        assert run(alone, range(STEPS)) == found
    for name, buffer in alone.named_buffers():
        assert torch.equal(together.get_buffer(name), buffer), name


def test_two_workers_are_one() -> None:
    run_workers(alone_and_together, 2)


class Judged(Family):
    """A small GAN that trains through the augmentation as a real one does."""

    averaged = ("generator",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Linear(4, CHANNELS * SIZE * SIZE)
        self.critic = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3, stride=4), nn.Softplus(), nn.Flatten(), nn.LazyLinear(1))
        self.critic(torch.zeros(1, CHANNELS, SIZE, SIZE))
        self.augmentation = Augmentation(AugmentConfig("ada", target=-0.9, speed_kimg=0.05, interval=2), 7)

    def phases(self) -> list[Phase]:
        return [
            Phase("d", "critic", self.d_loss),
            Phase("r1", "critic", self.r1, every=2, higher_order=True),
            Phase("g", "generator", self.g_loss),
        ]

    def judged(self, image, batch, purpose):
        return self.critic(self.augmentation(image, batch["key"], f"augment/{purpose}"))

    def sample(self, keys, condition=None):
        image = self.generator(rng.normal(0, "latent", keys, (4,)))
        return image.view(len(keys), CHANNELS, SIZE, SIZE).float().tanh()

    def d_loss(self, batch, seen):
        real = self.judged(batch["image"], batch, "real")
        self.augmentation.observe(real)
        loss = softplus(-real).mean() + softplus(self.judged(self.sample(batch["key"]).detach(), batch, "d")).mean()
        return loss, {"loss": loss.detach()}

    def r1(self, batch, seen):
        image = batch["image"].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.judged(image, batch, "r1").sum(), image, create_graph=True)
        loss = gradient.square().sum(dim=(1, 2, 3)).mean()
        return loss, {"loss": loss.detach()}

    def g_loss(self, batch, seen):
        loss = softplus(-self.judged(self.sample(batch["key"]), batch, "g")).mean()
        return loss, {"loss": loss.detach()}

    def after_step(self, seen):
        return self.augmentation.update()


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_a_gan_trains_and_resumes_with_it(precision: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"micro_batch_size": 4, "precision": precision}
    family = Judged()
    fit(family, tmp_path / "whole", **settings)
    assert family.augmentation.p.item() == pytest.approx(48 / 50)
    fit(Judged(), tmp_path / "parts", num_steps=3, **settings)
    fit(Judged(), tmp_path / "parts", **settings)
    last = "checkpoints/step-00000006"
    assert tree_bytes(tmp_path / "parts" / last) == tree_bytes(tmp_path / "whole" / last)


def test_each_kind_does_what_it_says() -> None:
    image, keys = torch.rand(4, 3, 8, 8), torch.arange(4)
    assert Augmentation(AugmentConfig(), 5)(image, keys, "augment/real") is image
    found = Augmentation(AugmentConfig("diffaugment", ("cutout",)), 5)(image, keys, "augment/real")
    assert torch.equal(found, diffaugment.augmented(image, keys, ("cutout",), 5, "augment/real"))
    fixed = Augmentation(AugmentConfig("ada", p=0.7), 5)
    strong = ada.augmented(image, keys, torch.tensor(0.7), 5, "augment/real")
    assert torch.equal(fixed(image, keys, "augment/real"), strong)
    adapting = Augmentation(ADAPTIVE, 5)
    assert torch.equal(adapting(image, keys, "augment/real"), image)
    adapting.p.fill_(0.7)
    assert torch.equal(adapting(image, keys, "augment/real"), strong)


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig("diffaugment"), AugmentConfig("ada", p=0.2)])
def test_what_does_not_adapt_keeps_nothing(config: AugmentConfig) -> None:
    augmentation = Augmentation(config, 0)
    augmentation.observe(torch.ones(4))
    assert augmentation.update() == {}
    assert not list(augmentation.buffers())
    assert not list(augmentation.parameters())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "ADA"}, "kind: 'ADA'; must be one of none, diffaugment, ada"),
        ({"policies": ()}, "policies: []; must be one or more of color, translation, cutout, each once"),
        ({"policies": ("color", "flip")}, "policies: ['color', 'flip']; must be"),
        ({"policies": ("color", "color")}, "policies: ['color', 'color']; must be"),
        ({"kind": "ada", "p": 1.1}, "p: 1.1; must be from 0 to 1, or null to adapt"),
        ({"p": math.nan}, "p: nan; must be"),
        ({"target": 1.0}, "target: 1.0; must be above -1 and below 1"),
        ({"speed_kimg": 0.0}, "speed_kimg: 0.0; must be a number above 0"),
        ({"speed_kimg": math.inf}, "speed_kimg: inf; must be"),
        ({"interval": 0}, "interval: 0; must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], problem: str) -> None:
    assert (AugmentConfig(**settings).problem() or "").startswith(problem)
    for kind in ("none", "diffaugment", "ada"):
        assert AugmentConfig(kind).problem() is None
