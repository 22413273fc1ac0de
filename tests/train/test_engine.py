"""Gradients, updates and shards of every stage against single-process torch, with different data on each worker."""

from pathlib import Path

import pytest
import torch

from gmdist.families.family import Phase
from gmdist.train.engine import make_unit
from gmdist.train.optim import OptimConfig
from tests.support import MemorySource, make_trainer, run_workers
from tests.train import parity
from tests.train.parity import SGD, STEPS, WORLD
from tests.train.patterns import TwoNetworks

CLIPPED = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.05)
STAGES = (0, 1, 2, 3)


def train_all(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        parity.train(rank, folder, str(stage), TwoNetworks, optim=CLIPPED, zero_stage=stage, micro_batch_size=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("clipped")
    run_workers(train_all, WORLD, str(folder))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_and_decay_as_with_torch(trained: Path, stage: int) -> None:
    *_, expected = parity.reference(TwoNetworks, CLIPPED)
    assert parity.worst(parity.load(trained, str(stage)), expected, TwoNetworks().state_dict()) < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("micro", [8, 4])
def test_parity_with_torch_on_one_worker(micro: int, device: torch.device, tmp_path: Path) -> None:
    trainer = make_trainer(TwoNetworks(), tmp_path, optim=SGD, device=device, num_steps=STEPS, micro_batch_size=micro)
    trainer.fit()
    trainer.close()
    *_, weights = parity.reference(TwoNetworks, SGD)
    for name, expected in weights.items():
        torch.testing.assert_close(
            dict(trainer.family.named_parameters())[name].detach().cpu().double(), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.gpu
def test_autocast_computes_in_bf16_on_fp32_weights(device: torch.device) -> None:
    family = TwoNetworks().to(device)
    seen = {}

    def loss(batch, _):
        output = family.generator(batch["image"].flatten(1)[:, :4])
        seen["dtype"] = output.dtype
        return output.float().square().mean(), {}

    unit = make_unit(family, "generator", SGD, stage=0, precision="autocast", device=device)
    batch = {key: tensor.to(device) for key, tensor in MemorySource(48, 8).first(8).batch.items()}
    unit.accumulate(Phase("g", "generator", loss), batch, 0, 1.0)
    assert seen["dtype"] == torch.bfloat16
    unit.step(0.1)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in family.generator.parameters())
