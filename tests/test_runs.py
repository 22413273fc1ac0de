"""Runs: the workers of one read the same data, and a family gets what it needs of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist.config import load
from gmdist.data.pack import write_shards
from gmdist.errors import ConfigError, DataError
from gmdist.images import png
from gmdist.runs import check_start, train_worker
from tests.support import run_workers

CONFIG = str(Path(__file__).parent.parent / "configs/digits/autoencoder_kl.yaml")


def write(folder: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    images = (png(random.integers(0, 256, (32, 32, 1), np.uint8)) for _ in range(8))
    write_shards(((f"{i}", {"png": image, "cls": b"1"}) for i, image in enumerate(images)), str(folder))
    return str(folder)


def train_on_own_folder(rank: int, world_size: int, folder: str) -> None:
    settings = [f"data.train={folder}/{rank}", "data.test=null", f"run.dir={folder}/run", "train.zero_stage=0"]
    config = load(CONFIG, [*settings, f"cluster.num_workers={world_size}", "data.batch_size=2"])
    with pytest.raises(DataError, match="data.train: worker 1 reads another data set than worker 0"):
        train_worker(config, torch.device("cpu"))


def test_workers_that_read_different_data_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path / str(rank), rank)
    run_workers(train_on_own_folder, 2, str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_family_of_images_needs_images(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 0)
    settings = [f"data.train={folder}", "data.test=null", f"run.dir={tmp_path}/run"]
    with pytest.raises(ConfigError, match="family.name: 'autoencoder_kl'; it needs 'image' of each sample"):
        check_start(load(CONFIG, [*settings, "data.image=false", "data.arrays=[latent.npy]"]))
