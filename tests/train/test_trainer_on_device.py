"""That the trainer keeps to its device, and workers to what NCCL takes: found here on any machine."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.standin import DEVICE, standing_in
from tests.support import fit, run_workers, small_family

STEPS = 4


def train(rank: int, world_size: int, name: str, folder: Path) -> None:
    settings = {"num_steps": STEPS, "checkpoint_every": 2, "evaluate_every": 2, "sample_every": 2}
    place = {"rank": rank, "world_size": world_size}
    fit(small_family(name), folder / "host", **settings, **place)
    with standing_in():
        for num_steps in (2, STEPS):
            fit(small_family(name), folder / "device", device=DEVICE, **(settings | {"num_steps": num_steps}), **place)


@pytest.mark.parametrize("name", ["vq_vae", "stylegan2/ada", "dcgan/ada"])
def test_two_workers_train_there_as_on_the_host(name: str, tmp_path: Path) -> None:
    run_workers(train, 2, name, tmp_path)
    checkpoints = {where: saved(tmp_path / where / f"checkpoints/step-{STEPS:08d}") for where in ("host", "device")}
    assert checkpoints["device"].keys() == checkpoints["host"].keys()
    torch.testing.assert_close(checkpoints["device"], checkpoints["host"], rtol=1e-4, atol=1e-6)
    assert {path.name for path in (tmp_path / "device/samples").iterdir()} == {
        path.name for path in (tmp_path / "host/samples").iterdir()
    }


def saved(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    return {f"{shard.name}/{key}": tensor for shard in shards for key, tensor in load_file(shard).items()}
