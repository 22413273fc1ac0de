"""Precisions, offloading, optimizers and averages: the same on every stage, as near to float64 as they can be."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gmdist.families.family import Family
from gmdist.train.ema import decay
from gmdist.train.optim import OptimConfig
from gmdist.train.trainer import Trainer
from tests.support import run_workers
from tests.train import parity
from tests.train.parity import SGD, WORLD
from tests.train.patterns import BATCH, AdaptiveWeight, Cycle, Parts, PathLength, Poisoned, TwoNetworks

STAGES = (0, 1, 2, 3)
HALFLIFE_KIMG = 0.05
IN_BF16 = [
    (family, precision, stage)
    for family in (PathLength, AdaptiveWeight)
    for precision in ("bf16", "autocast")
    for stage in STAGES
]
# As large as Adam's own steps, eps keeps a gradient's rounding from becoming a sign.
KINDS = {
    "adam": OptimConfig("adam", lr=1e-2, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    "adamw": OptimConfig("adamw", lr=1e-2, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    "adamax": OptimConfig("adamax", lr=1e-2, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    "sgd": OptimConfig("sgd", lr=0.05, momentum=0.5, weight_decay=0.1),
}
OPTIMIZED = [(name, stage) for name in KINDS for stage in STAGES]
# In the first two, steps do not reach all parameters; in the third, one step's gradients are not finite.
OFFLOADED = [
    (family, precision, name)
    for family, precision in ((TwoNetworks, "fp32"), (Parts, "bf16"), (Poisoned, "fp32"), (Poisoned, "bf16"))
    for name in ("sgd", "adamw")
]
SLOW = OptimConfig("sgd", lr=1e-5, momentum=0.0)  # its steps are below what bf16 resolves
MANY = 12


def check_masters(trainer: Trainer) -> None:
    fragments = [fragment for unit in trainer.units.values() for fragment in unit.held()]
    assert all(tensor.dtype == torch.float32 for f in fragments for tensor in (f.values, *f.state.values()))


def train_all(rank: int, world: int, folder: str) -> None:
    def train(name: str, family: Callable[[], Family], **settings: object) -> None:
        parity.train(rank, folder, name, family, micro_batch_size=2, prepare=check_masters, **settings)

    for family, precision, stage in IN_BF16:
        train(f"{family.__name__}-{precision}-{stage}", family, precision=precision, zero_stage=stage)
    for stage in STAGES:
        train(f"slow-{stage}", Cycle, precision="bf16", zero_stage=stage, optim=SLOW, steps=MANY)
        train(f"ema-{stage}", Cycle, zero_stage=stage, ema_halflife_kimg=HALFLIFE_KIMG, ema_ramp=0.5)
    for name, stage in OPTIMIZED:
        train(f"{name}-{stage}", Cycle, zero_stage=stage, optim=KINDS[name])
    for stage in STAGES[1:]:
        for family, precision, name in OFFLOADED:
            settings = {"zero_stage": stage, "optim": KINDS[name], "precision": precision}
            for is_offloaded in (False, True):
                case = f"{family.__name__}-{precision}-{name}-{stage}-{is_offloaded}"
                train(case, family, offload_optimizer=is_offloaded, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("precision")
    run_workers(train_all, WORLD, str(folder))
    return folder


def together(tensors: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"all": torch.cat([tensors[name].double().flatten() for name in names])}


@pytest.mark.parametrize(("family", "precision", "stage"), IN_BF16, ids=lambda value: getattr(value, "__name__", value))
def test_bf16_stays_near(trained: Path, family: type[Family], precision: str, stage: int) -> None:
    *_, expected = parity.reference(family, SGD, 2)
    found, start = parity.load(trained, f"{family.__name__}-{precision}-{stage}"), family().state_dict()
    names = {name: value for name, value in expected.items() if name in found}
    distance = parity.worst(together(found, names), together(expected, names), together(start, names))
    assert 1e-4 < distance < 0.02  # of the way of all weights; it did compute in bf16
    # Of that of any tensor: the critic's last bias, one number whose gradients nearly cancel, is 8% off, all others 4%.
    assert parity.worst(found, expected, start) < 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_masters_hold_what_bf16_cannot(trained: Path, stage: int) -> None:
    *_, expected = parity.reference(Cycle, SLOW, 2, MANY)
    found, start = parity.load(trained, f"slow-{stage}"), Cycle().state_dict()
    for name in ("generators.there.0.weight", "critics.back.0.weight"):
        first, way = start[name].double(), expected[name] - start[name].double()
        assert way.abs().mean() / MANY < 2.0**-10 * first.abs().mean()  # bf16 would round such a step away
        assert (found[name].double() - expected[name]).norm() < 0.02 * way.norm()


@pytest.mark.parametrize(("name", "stage"), OPTIMIZED)
def test_optimizers(trained: Path, name: str, stage: int) -> None:
    *_, expected = parity.reference(Cycle, KINDS[name], 2)
    assert parity.worst(parity.load(trained, f"{name}-{stage}"), expected, Cycle().state_dict()) < 5e-6


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize(("family", "precision", "name"), OFFLOADED)
def test_offloading_changes_nothing(trained: Path, family: type[Family], precision: str, name: str, stage: int) -> None:
    case = f"{family.__name__}-{precision}-{name}-{stage}"
    offloaded, expected = parity.load(trained, f"{case}-True"), parity.load(trained, f"{case}-False")
    for key, value in expected.items():
        torch.testing.assert_close(offloaded[key], value, rtol=1e-6, atol=1e-7, msg=key)


def averaged(steps: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    averages = {name: value.double() for name, value in Cycle().state_dict().items()}
    for step, weights in enumerate(steps):
        beta = decay(BATCH, step * BATCH, HALFLIFE_KIMG, 0.5)
        averages = {name: beta * average + (1 - beta) * weights[name] for name, average in averages.items()}
    return averages


@pytest.mark.parametrize("stage", STAGES)
def test_averages(trained: Path, stage: int) -> None:
    found = parity.load(trained, f"ema-{stage}")
    averages = averaged(parity.reference(Cycle, SGD, 2))
    names = [name for name in averages if name.startswith("generators.")]
    for name in names:
        torch.testing.assert_close(found[f"ema/{name}"].double(), averages[name], rtol=1e-6, atol=1e-6)
    assert {name for name in found if name.startswith("ema/")} == {f"ema/{name}" for name in names}
