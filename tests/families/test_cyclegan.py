"""CycleGAN: its loss by hand, the pool of older translations, and what it keeps over a resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gmdist.errors import CheckpointError
from gmdist.families.cyclegan import CycleGAN, CycleGANConfig
from gmdist.families.family import Batch
from gmdist.nets.cyclegan import Translator, TranslatorConfig
from tests.support import CHANNELS, SIZE, MemorySource, fit, small_family, tree_bytes


def made(**changes: object) -> CycleGAN:
    family = small_family("cyclegan", **changes)
    assert isinstance(family, CycleGAN)
    return family


def batch() -> Batch:
    return MemorySource(48, 8).first(8).batch


def test_as_many_parameters_as_published() -> None:
    # github.com/junyanz/pytorch-CycleGAN-and-pix2pix prints 11.378 M for the generator with 9 blocks
    with torch.device("meta"):
        network = Translator(TranslatorConfig(), 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_378_179


def test_the_generators_loss_by_hand() -> None:
    family = made().double()
    a, b = (batch()[name].double() for name in ("image", "image_b"))
    there, back = family.generators["a2b"], family.generators["b2a"]
    judges = family.discriminators
    wanted = (judges["b"](there(a)) - 1.0).square().mean() + (judges["a"](back(b)) - 1.0).square().mean()
    wanted = wanted + 10.0 * ((back(there(a)) - a).abs().mean() + (there(back(b)) - b).abs().mean())
    wanted = wanted + 5.0 * ((there(b) - b).abs().mean() + (back(a) - a).abs().mean())
    loss, _ = family.g_loss({"image": a, "image_b": b, "key": batch()["key"]}, 0)
    torch.testing.assert_close(loss, wanted)


def test_the_discriminators_loss_by_hand_where_nothing_is_kept() -> None:
    family = made().double()
    a, b = (batch()[name].double() for name in ("image", "image_b"))
    wanted = torch.zeros((), dtype=torch.float64)
    for direction, image, target in (("a2b", a, b), ("b2a", b, a)):
        judge = family.discriminators[direction[-1]]
        fake = judge(family.generators[direction](image).detach())
        wanted = wanted + 0.5 * ((judge(target) - 1.0).square().mean() + fake.square().mean())
    loss, _ = family.d_loss({"image": a, "image_b": b, "key": batch()["key"]}, 0)
    torch.testing.assert_close(loss, wanted)


def numbered(first: int, count: int = 4) -> Tensor:
    return torch.arange(float(first), float(first + count)).view(-1, 1, 1, 1).expand(-1, CHANNELS, SIZE, SIZE)


def test_half_of_what_is_judged_is_of_before() -> None:
    family = made(pool_size=50)
    values: list[tuple[int, int]] = []
    for step in range(100):
        now = numbered(4 * step)
        given = family._pooled("pool_a", now, torch.arange(4 * step, 4 * step + 4))
        values += zip(now[:, 0, 0, 0].int().tolist(), given[:, 0, 0, 0].int().tolist(), strict=True)
    later = values[60:]
    older = [(now, given) for now, given in later if given != now]
    assert 0.4 < len(older) / len(later) < 0.6
    assert all(0 < now - given <= 53 for now, given in older)  # of the latest 50 before its step
    assert values[:4] == [(i, i) for i in range(4)]  # nothing was there


def test_what_a_bad_step_leaves_is_not_judged() -> None:
    family = made(pool_size=4)
    family._pooled("pool_b", numbered(0) * torch.nan, torch.arange(4))
    now = numbered(10)
    assert torch.equal(family._pooled("pool_b", now, torch.arange(4, 8)), now)


def test_the_pool_is_in_checkpoints(tmp_path: Path) -> None:
    whole, parts = made(pool_size=4), made(pool_size=4)
    fit(whole, tmp_path / "whole")
    fit(made(pool_size=4), tmp_path / "parts", num_steps=3)
    fit(parts, tmp_path / "parts")
    assert whole.worker_state()["pool_a"].isfinite().all()
    assert all(torch.equal(value, parts.worker_state()[name]) for name, value in whole.worker_state().items())
    last = "checkpoints/step-00000006"
    assert tree_bytes(tmp_path / "whole" / last) == tree_bytes(tmp_path / "parts" / last)
    with pytest.raises(
        CheckpointError, match=r"pool_a is \[4, .* in the checkpoint and \[6, .*use the run's own config"
    ):
        fit(made(pool_size=6), tmp_path / "parts", num_steps=8)


@pytest.mark.parametrize(
    ("config", "image_size", "problem"),
    [
        (CycleGANConfig(), 66, "translator.channels: image sides must be multiples of 4 from 8 on, not 66"),
        (
            CycleGANConfig(),
            16,
            "discriminator_layers: 3; must be at least 1, and image sides at least 3 * 2^layers pixels: "
            "data.image_size is 16",
        ),
        (CycleGANConfig(discriminator_channels=0), 64, "discriminator_channels: 0; must be from 1 to 4096"),
        (CycleGANConfig(discriminator_channels=10**6), 64, "discriminator_channels: 1000000; must be from 1 to 4096"),
        (CycleGANConfig(discriminator_layers=17), 64, "discriminator_layers: 17"),
        (CycleGANConfig(loss="l2"), 64, "loss: 'l2'; must be one of minimax"),
        (CycleGANConfig(pool_size=-1), 64, "pool_size: -1"),
        (CycleGANConfig(cycle_weight=-1.0), 64, "cycle_weight: -1.0"),
    ],
)
def test_settings_that_cannot_be(config: CycleGANConfig, image_size: int, problem: str) -> None:
    assert (config.problem(image_size) or "").startswith(problem)
    assert CycleGANConfig().problem(256) is None
