"""Latent caches: a first stage encodes a data set once, whatever happens to the command or its workers."""

import io
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist import storage
from gmdist.data.index import check_folder
from gmdist.data.manifest import Manifest
from gmdist.data.shard import walk
from gmdist.errors import ConfigError, DataError, RunFailedError
from gmdist.images import png
from gmdist.launch import encoders, shard_workers
from gmdist.launch.encode import encode
from gmdist.runs import open_run
from gmdist.start import check_start, train_worker
from tests.launch.latents import ALONE, CACHED, CPU, SHARDS, picture, second_stage, write
from tests.support import tree_bytes


def samples(folder: Path) -> dict[str, list[tuple[str, dict[str, bytes]]]]:
    """Key and members of the samples of each shard, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            found[path.name] = [
                (key, {name: content for name, (_, content) in members.items()})
                for key, members in walk(file, str(path))
            ]
    return found


def array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def test_a_cache_is_the_data_set_with_latents_for_images(stage: str, images: str, cache: str) -> None:
    assert check_folder(cache) == []
    found, expected = samples(Path(cache)), samples(Path(images))
    _, family = open_run(stage)
    assert found.keys() == expected.keys()
    for shard, originals in expected.items():
        assert [key for key, _ in found[shard]] == [key for key, _ in originals]
        for (key, members), (_, original) in zip(found[shard], originals, strict=True):
            assert {members[name] for name in ("cls", "txt")} == {original[name] for name in ("cls", "txt")}
            if key == "k7":
                assert set(members) == {"cls", "txt", "unreadable"}
                continue
            assert set(members) == {"cls", "txt", "moments.npy", "moments_flip.npy"}
            image = torch.from_numpy(picture(int(key[1:]))).permute(2, 0, 1)[None] / 127.5 - 1
            for name, seen in (("moments.npy", image), ("moments_flip.npy", image.flip(3))):
                moments = array(members[name])
                assert moments.dtype == np.float16
                mean, logvar = family.autoencoder.encode(seen)
                expected_moments = torch.cat([mean, logvar], dim=1)[0].numpy()
                np.testing.assert_allclose(moments, expected_moments, rtol=2**-10, atol=1e-6)


def test_an_image_that_cannot_be_read_is_told_and_counted(stage: str, images: str, tmp_path: Path) -> None:
    told: list[str] = []
    encoded = encode(stage, images, str(tmp_path / "out"), ALONE, on_unreadable=told.append)
    (line,) = told
    assert "k7: damaged" in line
    assert encoded.record.lines() == told
    with pytest.raises(DataError, match="1 images cannot be read, more than data.max_bad_fraction allows .0 of 26.*k7"):
        encode(stage, images, str(tmp_path / "strict"), [*ALONE, "data.max_bad_fraction=0"])
    # Told what is too many, the same command goes on, and still counts what it counted before.
    again = encode(stage, images, str(tmp_path / "strict"), ALONE, on_unreadable=told.append)
    assert told == [line, line]
    assert again.record.lines() == [line]
    assert tree_bytes(tmp_path / "strict") == tree_bytes(tmp_path / "out")


def kill_after_one_shard(stage: str, images: str, destination: str) -> None:
    torch.set_num_threads(1)
    encode(stage, images, destination, ALONE, on_progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))


def test_killed_and_run_again_it_makes_the_same_bytes(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["tests.preload"])
    destination = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(
        target=kill_after_one_shard, args=(stage, images, str(destination))
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert 1 <= len(list(destination.glob("*.index.safetensors"))) <= SHARDS
    with pytest.raises(DataError, match="its encoding was not finished; run the same `gmdist data encode` again"):
        Manifest.load(str(destination))
    assert not encode(stage, images, str(destination), ALONE).was_there
    assert tree_bytes(destination) == tree_bytes(Path(cache))


def test_an_interrupt_keeps_what_is_done(stage: str, images: str, cache: str, tmp_path: Path, monkeypatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(stage, images, str(tmp_path), ALONE, on_progress=interrupt)
    encoded = []
    original = encoders.ShardEncoder.shard
    monkeypatch.setattr(
        encoders.ShardEncoder, "shard", lambda self, shard: encoded.append(shard.name) or original(self, shard)
    )
    encode(stage, images, str(tmp_path), ALONE)
    assert 1 <= len(encoded) < SHARDS
    assert tree_bytes(tmp_path) == tree_bytes(Path(cache))
    assert encode(stage, images, str(tmp_path), ALONE).was_there
    assert len(encoded) < SHARDS


@pytest.mark.ray
def test_two_workers_make_the_same_bytes(ray_cluster, stage: str, images: str, cache: str, tmp_path: Path) -> None:
    encode(stage, images, str(tmp_path / "out"), ["cluster.num_workers=2"])
    assert tree_bytes(tmp_path / "out") == tree_bytes(Path(cache))
    shutil.copytree(images, tmp_path / "images")
    shard = tmp_path / "images/shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="shard-000001.tar: sample 'k1' is not what was indexed"):
        encode(stage, str(tmp_path / "images"), str(tmp_path / "bad"), ["cluster.num_workers=2"])


class Mortal(shard_workers.Worker):
    """Is killed once."""

    def shard(self, task, stored):
        import ray

        grave = Path(ray.get(stored[0]).destination).parent / "grave"
        if not grave.exists():
            grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().shard(task, stored)


@pytest.mark.ray
def test_a_lost_worker_starts_again(ray_cluster, stage: str, images: str, cache: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shard_workers, "Worker", Mortal)
    command = [stage, images, str(tmp_path / "out")]
    with pytest.raises(RunFailedError, match="a worker was lost more than 0 times"):
        encode(*command, ["cluster.num_workers=2", "cluster.max_failures=0"])
    (tmp_path / "grave").unlink()
    encode(*command, ["cluster.num_workers=2", "cluster.max_failures=1"])
    assert tree_bytes(tmp_path / "out") == tree_bytes(Path(cache))


def test_plain_shards_in_a_bucket(bucket, stage: str, images: str, cache: str) -> None:
    for path in Path(images).glob("*.tar"):
        bucket.upload_file(str(path), "pictures", f"plain/{path.name}")
    encode(stage, "s3://pictures/plain", "s3://pictures/latents", ALONE)
    for path in Path(cache).glob("shard-*"):
        assert storage.read(f"s3://pictures/latents/{path.name}") == path.read_bytes()
    assert check_folder("s3://pictures/latents") == []
    assert encode(stage, "s3://pictures/plain", "s3://pictures/latents", ALONE).was_there


def test_what_cannot_be_encoded_is_refused(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    before = tree_bytes(Path(cache))
    new = str(tmp_path / "new")
    with pytest.raises(ConfigError, match="DEST: .* is SRC"):
        encode(stage, images, f"{images}/", ALONE)
    with pytest.raises(DataError, match="holds latents itself"):
        encode(stage, cache, new, ALONE)
    with pytest.raises(DataError, match=f"holds latents of step 3 of {stage} .*, and this is step 2 of {stage} "):
        encode(f"{stage}/checkpoints/step-00000002", images, cache, ALONE)
    with pytest.raises(DataError, match="holds latents with .*flip True, .* and this is with .*flip False"):
        encode(stage, images, cache, ALONE, flip=False)
    with pytest.raises(DataError, match="holds latents with .*precision fp32, .* and this is with .*precision bf16"):
        encode(stage, images, cache, [*ALONE, "train.precision=bf16"])
    other = write(tmp_path / "other")
    with pytest.raises(DataError, match="holds latents of another data set"):
        encode(stage, other, cache, ALONE)
    with pytest.raises(DataError, match="other: holds something else .manifest.json"):
        encode(stage, images, other, ALONE)
    with pytest.raises(DataError, match=r"no \.tar shards here"):
        encode(stage, str(tmp_path / "missing"), new, ALONE)
    for override in ("family.kl_weight=0", "data.image_size=32"):
        with pytest.raises(
            ConfigError, match=f"'{override}'; cannot be set here, as the model is the run's: keys of cluster, da"
        ):
            encode(stage, images, new, [override])
    with pytest.raises(ConfigError, match=r"data.imagesize: no such key"):
        encode(stage, images, new, ["data.imagesize=8"])
    with pytest.raises(ConfigError, match="cluster.gpus_per_worker: 1; there is no GPU here"):
        encode(stage, images, str(tmp_path / "gpu"), [*ALONE, "cluster.gpus_per_worker=1"])
    assert tree_bytes(Path(cache)) == before
    assert not Path(new).exists()


def test_a_run_that_encodes_nothing_is_refused(stage: str, images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_worker(second_stage(stage, images, run, "train.num_steps=1"), CPU).finished
    with pytest.raises(ConfigError, match="RUN: .*; family 'latent_diffusion' encodes nothing"):
        encode(str(run), images, str(tmp_path / "out"), ALONE)
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_are_named(stage: str, tmp_path: Path) -> None:
    large = {3: {"png": png(np.zeros((32, 32, 1), np.uint8))}}
    source = write(tmp_path / "data", large)
    with pytest.raises(DataError, match="shard-000000.tar: k3: the image is 32x32, but data.image_size is 16"):
        encode(stage, source, str(tmp_path / "out"), ALONE)
    encode(stage, source, str(tmp_path / "resized"), [*ALONE, "data.resize=area"])
    config = second_stage(stage, str(tmp_path / "resized"), tmp_path / "run", *CACHED)
    with pytest.raises(ConfigError, match="data.resize: 'none'; .* was encoded with 'area'"):
        check_start(config)
    config.data.resize = "area"
    check_start(config)
