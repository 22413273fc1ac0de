"""Latents as they are stored: how finely, in which range, and what a shard says of what it lacks."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist import storage
from gmdist.data.index import index_folder
from gmdist.data.latent_shards import ShardEncoder, as_stored, open_source
from gmdist.data.latents import FirstStage, Record, Transform
from gmdist.data.manifest import PACK_NAME, Manifest, ShardTable
from gmdist.errors import DataError
from tests.data.numbered import CLASSES, COUNT, NO_IMAGE, SIZE, pixels, settings, write
from tests.data.packing import samples


def test_floats_are_stored_finer_than_bf16_and_integers_exactly() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.cat(
        [30 * torch.randn(1000, generator=random), torch.linspace(-30, 20, 1000)]
    )  # means, log-variances
    stored = as_stored("moments.npy", values, "x")
    assert stored.dtype == np.float16
    error = np.abs(stored.astype(np.float64) - values.double().numpy())
    assert (error <= np.maximum(np.abs(values.numpy()) * 2.0**-11, 2.0**-25)).all()
    bf16_error = (values.bfloat16().double() - values.double()).abs().numpy()
    assert error.mean() < bf16_error.mean() / 6
    tokens = torch.tensor([0, 2**31 - 1])
    assert as_stored("tokens.npy", tokens, "x").tolist() == tokens.tolist()
    assert as_stored("tokens.npy", tokens, "x").dtype == np.int32
    assert as_stored("mask.npy", tokens > 0, "x").dtype == np.bool_


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 65_520.0, 2**31])
def test_values_that_would_be_lost_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="shard.tar: the first stage's moments are not finite, or beyond the range of"):
        as_stored("moments.npy", torch.tensor([0, value]), "shard.tar")


def array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def encoder_of_sums(folder: Path, **changes) -> ShardEncoder:
    """Encodes an image as the number of its batch's samples, and its first column's sum."""

    def encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
        sums = images[:, :, 0].flatten(1).sum(1, dtype=torch.int64)
        return {"sums": torch.stack([torch.full_like(sums, len(images)), sums], dim=1)}

    return ShardEncoder(settings(None), encode, str(folder), **({"flip": True, "batch_size": 4} | changes))


def test_batches_depend_on_the_shard_alone(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "in", {2: NO_IMAGE}))
    assert source.num_samples == COUNT
    encoder = encoder_of_sums(tmp_path / "out")
    done = [encoder.shard(shard) for shard in source.shards]
    assert [shard.entry.samples for shard in done] == [7, 9, 5]
    assert [shard.entry.labels for shard in done] == [CLASSES] * 3
    assert [len(shard.unreadable) for shard in done] == [1, 0, 0]
    Manifest(ShardTable.of(shard.entry for shard in done)).save(str(tmp_path / "out"))
    found = samples(tmp_path / "out")
    assert list(found) == [f"k{i}" for i in range(COUNT)]
    assert found["k2"].keys() == {"cls", "unreadable"}
    del found["k2"]
    # The batch of a damaged image is one smaller; no sample moves into another.
    sizes = [array(members["sums.npy"])[0] for members in found.values()]
    assert sizes == [3] * 6 + [4] * 8 + [1] + [4] * 4 + [1]
    for key, members in found.items():
        image = pixels(int(key[1:])).astype(np.int64)
        assert array(members["sums.npy"])[1] == image[:, 0].sum()
        assert array(members["sums_flip.npy"])[1] == image[:, SIZE - 1].sum()


def test_a_source_that_is_not_its_index_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in")
    shard = tmp_path / "in/shard-1.tar"
    content = shard.read_bytes()
    encoder = encoder_of_sums(tmp_path / "out")
    listing = open_source(source)
    shard.write_bytes((tmp_path / "in/shard-0.tar").read_bytes())
    with pytest.raises(DataError, match="shard-1.tar: sample 'k0' is not what was indexed"):
        encoder.shard(listing.shards[1])
    shard.write_bytes(content[:3000])
    with pytest.raises(DataError, match="shard-1.tar: .*it was cut"):
        encoder.shard(listing.shards[1])
    assert not list((tmp_path / "out").glob("*"))


def test_a_shard_that_is_gone_and_a_member_in_the_way_are_named(tmp_path: Path) -> None:
    listing = open_source(write(tmp_path / "in", {8: {"sums_flip.npy": b""}}))
    encoder = encoder_of_sums(tmp_path / "out")
    with pytest.raises(DataError, match="shard-1.tar: k8: has a member sums_flip.npy already; rename it"):
        encoder.shard(listing.shards[1])
    (tmp_path / "in/shard-2.tar").unlink()
    with pytest.raises(DataError, match="shard-2.tar: missing; put it back, or run"):
        encoder.shard(listing.shards[2])


def record() -> Record:
    stage = FirstStage("runs/first", 3, {"name": "autoencoder_kl", "autoencoder": {"multipliers": [1, 2]}}, "00ff")
    return Record(stage, Transform(8, 3, "none", "center"), "fp32", True, "source", {"moments": ([4, 2, 2], "float16")})


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    written = record()
    written.unreadable = {"b.tar": ["b.tar: 1: damaged"], "a.tar": ["a.tar: 2: damaged"]}
    written.save(str(tmp_path))
    assert Record.load(str(tmp_path)) == written
    assert written.lines() == ["a.tar: 2: damaged", "b.tar: 1: damaged"]
    assert Record.load(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize("version", [2, 4])
def test_a_record_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    record().save(str(tmp_path))
    file = str(tmp_path / "encoded.json")
    storage.write_json(file, storage.read_json(file) | {"format": version})
    with pytest.raises(DataError, match=rf"damaged or of another version \(format {version}\); delete .* and encode"):
        Record.load(str(tmp_path))


def test_an_unfinished_cache_is_not_indexed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    record().save(str(tmp_path))
    with pytest.raises(DataError, match="its encoding was not finished; run the same `gmdist data encode` again"):
        index_folder(str(tmp_path))


def test_an_unfinished_pack_is_not_encoded(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert len(open_source(str(tmp_path)).shards) == 3
    (tmp_path / PACK_NAME).write_text("{}")
    with pytest.raises(DataError, match="its packing was not finished"):
        open_source(str(tmp_path))
