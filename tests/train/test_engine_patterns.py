"""Every pattern that goes wrong with DeepSpeed as it comes, on every stage, against single-process torch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmdist.errors import ConfigError
from gmdist.families.family import Family, Phase
from gmdist.train.blocks import check_precision
from gmdist.train.engine import make_unit
from gmdist.train.trainer import Trainer
from tests.support import run_workers
from tests.train import parity
from tests.train.parity import SGD, WORLD
from tests.train.patterns import FAMILIES, AdaptiveWeight, Branching, Cycle, Energy, Normed, PathLength, Scalar

STAGES = (0, 1, 2, 3)
FAILING = [PathLength, AdaptiveWeight, Cycle, Energy]
PATTERNS = [(family, stage, micro) for family in FAMILIES for stage in STAGES for micro in (4, 2)]
PATTERNS = [(family, stage, micro) for family, stage, micro in PATTERNS if (family, stage) != (Scalar, 3)]
# At 4, each worker has samples of one kind only.
BRANCHES = [(Branching, stage, micro) for stage in (0, 1, 2) for micro in (4, 2)]
FAILURES = [(family, stage, 2) for family in FAILING for stage in STAGES]


class BrokenError(Exception):
    """Of a loss."""


def break_down(*_: Any) -> None:
    raise BrokenError


def fail_before_each_loss(trainer: Trainer) -> None:
    """Let each micro-batch's loss fail twice before it is taken: midway through the network, and when it is done."""
    for name, unit in trainer.units.items():
        layers = [part for part in getattr(trainer.family, name).modules() if not list(part.children())]
        unit.accumulate = failing(unit.accumulate, layers[-1])


def failing(accumulate: Callable[..., Any], layer: torch.nn.Module) -> Callable[..., Any]:
    def fail_twice(phase: Phase, *rest: Any) -> Any:
        hook = layer.register_forward_pre_hook(break_down)
        with pytest.raises(BrokenError):
            accumulate(phase, *rest)
        hook.remove()
        late = lambda batch, seen: break_down(phase.loss(batch, seen))
        with pytest.raises(BrokenError):
            accumulate(dataclasses.replace(phase, loss=late), *rest)
        return accumulate(phase, *rest)

    return fail_twice


def case_name(family: type[Family], stage: int, micro: int, suffix: str = "") -> str:
    return f"{family.__name__}-{stage}-{micro}{suffix}"


def train_all(rank: int, world: int, folder: str) -> None:
    for family, stage, micro in PATTERNS + BRANCHES:
        name = case_name(family, stage, micro)
        parity.train(rank, folder, name, family, zero_stage=stage, micro_batch_size=micro)
    for family, stage, micro in FAILURES:
        name = case_name(family, stage, micro, "-failing")
        settings = {"zero_stage": stage, "micro_batch_size": micro}
        parity.train(rank, folder, name, family, prepare=fail_before_each_loss, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("patterns")
    run_workers(train_all, WORLD, str(folder))
    return folder


@pytest.mark.parametrize(
    ("family", "stage", "micro"), PATTERNS + BRANCHES, ids=lambda value: getattr(value, "__name__", value)
)
def test_parity_with_torch(trained: Path, family: type[Family], stage: int, micro: int) -> None:
    *_, expected = parity.reference(family, SGD, micro)
    found = parity.load(trained, case_name(family, stage, micro))
    assert parity.worst(found, expected, family().state_dict()) < 2e-6


@pytest.mark.parametrize(("family", "stage", "micro"), FAILURES, ids=lambda value: getattr(value, "__name__", value))
def test_a_loss_that_raises_leaves_no_trace(trained: Path, family: type[Family], stage: int, micro: int) -> None:
    *_, expected = parity.reference(family, SGD, micro)
    found = parity.load(trained, case_name(family, stage, micro, "-failing"))
    assert parity.worst(found, expected, family().state_dict()) < 2e-6


def refused(rank: int, world: int, folder: str) -> None:
    with pytest.raises(RuntimeError, match="phase 'net'.*other weights on other workers.*zero_stage=3"):
        parity.train(rank, folder, "refused", Branching, zero_stage=3, micro_batch_size=4)


def test_stage_3_refuses_a_graph_that_differs_between_workers(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_workers(refused, WORLD, str(tmp_path))


def test_what_a_stage_or_a_precision_cannot_take_is_named() -> None:
    settings = {"precision": "fp32", "device": torch.device("cpu")}
    with pytest.raises(ConfigError, match=r"train\.zero_stage: 3; it cannot .* scalar parameter network\.scale; take"):
        make_unit(Scalar(), "network", SGD, stage=3, **settings)
    with pytest.raises(ConfigError, match=r"train\.precision: bf16; the statistics of network\.1 .* take autocast"):
        check_precision(Normed(), ["network"], "bf16")
    empty = Scalar()
    empty.network.bias = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ConfigError, match=r"its parameter network\.bias has no elements"):
        make_unit(empty, "network", SGD, stage=0, **settings)
