"""The embedded digits: all of them, in two splits that share nothing, and still the digits of scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gmdist.data.loader import DataConfig, Loader
from gmdist.data.samples import DIGITS_SIZE, make
from gmdist.data.samples import digits as embedded
from gmdist.data.shard import Manifest, check_folder
from gmdist.errors import ConfigError, DataError
from gmdist.images import to_uint8

COUNTS = {"train": 1501, "test": 296}


@pytest.mark.parametrize("split", COUNTS)
def test_the_splits_are_whole_and_sound(digits: Path, split: str) -> None:
    folder = digits / split
    assert check_folder(str(folder)) == []
    manifest = Manifest.load(str(folder))
    assert manifest.num_samples == COUNTS[split]
    assert manifest.classes == tuple("0123456789")
    assert len(manifest.shards) > 2  # or there are no lanes to shuffle with
    config = DataConfig(train="", batch_size=1, image_size=DIGITS_SIZE, channels=1, num_classes=10)
    batch = Loader(config, str(folder)).first(COUNTS[split]).batch
    assert batch["image"].shape == (COUNTS[split], 1, 32, 32)
    assert torch.bincount(batch["label"]).min() >= COUNTS[split] // 10 - 5
    # The ink is there: neither an empty image nor one of another range.
    assert (batch["image"].amin(dim=(1, 2, 3)) < -0.9).all()
    assert (batch["image"].amax(dim=(1, 2, 3)) > 0.5).all()


def test_no_image_is_in_both_splits() -> None:
    train, test = ({key: members["png"] for key, members in embedded(split)} for split in COUNTS)
    assert (len(train), len(test)) == (1501, 296)
    assert not train.keys() & test.keys()
    assert sorted(train | test) == [f"{i:04d}" for i in range(1797)]
    assert not set(train.values()) & set(test.values())


def test_they_are_the_digits_of_scikit_learn(digits: Path) -> None:
    folder = str(digits / "test")
    config = DataConfig(train="", batch_size=1, image_size=DIGITS_SIZE, channels=1, num_classes=10)
    loader = Loader(config, folder)
    batch = loader.first(loader.num_samples).batch
    large = to_uint8(batch["image"])[:, :, :, 0].numpy().astype(float)
    small = large.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    source = load_digits()
    shards, indices = loader.tape.locate(batch["key"].numpy())
    for image, label, shard, index in zip(small, batch["label"].tolist(), shards, indices, strict=True):
        number = int(loader._shards.read(int(shard), int(index))[0].key)
        assert source.target[number] == label
        # Bicubic enlargement overshoots at edges and is cut at black and white; other digits are 50 levels away.
        assert np.abs(image - source.images[number] * 255 / 16).mean() < 16


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no embedded data set 'mnist'; there is: digits"):
        make("mnist", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_making_the_digits_again_changes_nothing_and_never_overwrites(tmp_path: Path) -> None:
    first = make("digits", str(tmp_path / "digits"))
    shard = tmp_path / "digits/train/shard-000000.tar"
    before = shard.stat().st_mtime_ns
    again = make("digits", str(tmp_path / "digits"))
    assert {split: manifest.hash for split, manifest in again.items()} == {s: m.hash for s, m in first.items()}
    assert shard.stat().st_mtime_ns == before
    (tmp_path / "digits/test").rename(tmp_path / "digits/other")
    (tmp_path / "digits/train").rename(tmp_path / "digits/test")
    with pytest.raises(DataError, match="test: holds another data set"):
        make("digits", str(tmp_path / "digits"))


def test_an_interrupted_make_is_finished(tmp_path: Path) -> None:
    wanted = make("digits", str(tmp_path / "digits"))["train"].hash
    folder = tmp_path / "digits/train"
    (folder / "manifest.json").unlink()
    (folder / "shard-000015.tar").unlink()
    assert make("digits", str(tmp_path / "digits"))["train"].hash == wanted
    assert Manifest.load(str(folder)).classes == tuple("0123456789")
    (folder / "manifest.json").unlink()
    (folder / "shard-000003.tar").write_bytes(b"somebody's own")
    with pytest.raises(DataError, match="train: holds another data set"):
        make("digits", str(tmp_path / "digits"))
    assert (folder / "shard-000003.tar").read_bytes() == b"somebody's own"
