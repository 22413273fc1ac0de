"""Activations that are computed again leave a run as it is, on every stage, where a discriminator judges it, too."""

import dataclasses
from pathlib import Path

import pytest

from gmdist.families.family import Family
from tests.support import SMALL, run_workers, small_family
from tests.train import parity
from tests.train.parity import WORLD

STAGES = (0, 1, 2, 3)


def judged() -> Family:
    judge = dataclasses.replace(SMALL["vit_vqvae/discriminator"].discriminator, adaptive=True)
    return small_family("vit_vqvae/discriminator", discriminator=judge)


def train_all(rank: int, world: int, folder: str) -> None:
    parity.train(rank, folder, "kept", judged, zero_stage=0)
    for stage in STAGES:
        parity.train(rank, folder, str(stage), judged, zero_stage=stage, activation_checkpointing=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("recomputed")
    run_workers(train_all, WORLD, str(folder))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_as_kept(trained: Path, stage: int) -> None:
    start = judged().state_dict()
    expected = {name: value for name, value in parity.load(trained, "kept").items() if name in start}
    assert parity.worst(parity.load(trained, str(stage)), expected, start) < 2e-5
