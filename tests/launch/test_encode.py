"""Latent caches: a first stage encodes a data set once, and a run on the latents trains as it would on the images."""

import io
import json
import multiprocessing
import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist import storage
from gmdist.config import Config, load
from gmdist.data import tape
from gmdist.data.index import check_folder
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.pack import write_shards
from gmdist.data.shard import walk
from gmdist.data.transform import flips
from gmdist.errors import ConfigError, DataError, RunFailedError
from gmdist.images import png
from gmdist.launch import encoders
from gmdist.launch.encode import encode
from gmdist.launch.sample import SampleRequest, draw
from gmdist.report.page import write as write_report
from gmdist.runs import build_family, check_start, open_run, read_config, train_worker
from tests.support import tree_bytes

CONFIGS = Path(__file__).parent.parent.parent / "configs/digits"
SIZE, COUNT, SHARDS, CLASSES = 16, 26, 3, 4
ALONE = ["cluster.num_workers=1"]
TRAIN = ["train.zero_stage=0", "train.sample_every=null", "train.evaluate_every=null", "train.log_every=1", *ALONE]
DATA = [f"data.image_size={SIZE}", f"data.num_classes={CLASSES}", "data.test=null", "data.batch_size=8"]
CACHED = ["data.image=false", "data.arrays=[moments.npy]"]


def picture(i: int) -> np.ndarray:
    """Number i of the images: smooth, and far from its mirror image."""
    x, y = np.meshgrid(np.linspace(0, 1, SIZE), np.linspace(0, 1, SIZE))
    return (255 * (0.5 + 0.5 * np.sin(3 * x + 5 * y * (i % 5) + i))).astype(np.uint8)[:, :, None]


def write(folder: Path, changed: dict[int, dict[str, bytes]] | None = None) -> str:
    samples = []
    for i in range(COUNT):
        members = {"png": png(picture(i)), "cls": b"%d" % (i % CLASSES), "txt": f"wave {i}".encode()}
        samples.append((f"k{i}", members | (changed or {}).get(i, {})))
    write_shards(samples, str(folder), num_shards=SHARDS)
    return str(folder)


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


def train_first_stage(folder: Path, data: str, *more: str) -> str:
    shape = "family.autoencoder={channels: 8, multipliers: [1, 2], num_res_blocks: 1, latent_channels: 2}"
    # After three steps latents must already depend on the image.
    loss = ["family.kl_weight=1.0e-3", "family.perceptual.name=none", "optim.autoencoder.lr=1.0e-3"]
    settings = [shape, *loss, *TRAIN, *DATA, f"data.train={data}", f"run.dir={folder}", "train.num_steps=3"]
    train_worker(load(str(CONFIGS / "autoencoder_kl.yaml"), [*settings, "train.checkpoint_every=1", *more]), CPU)
    return str(folder)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data set; the image of k7 is damaged."""
    return write(tmp_path_factory.mktemp("images") / "data", {7: {"png": b"\x89PNG\r\n\x1a\n damaged"}})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, images: str) -> str:
    """A first stage after three steps."""
    return train_first_stage(tmp_path_factory.mktemp("stage") / "run", images, *SOME_BAD)


SOME_BAD = ["data.max_bad_fraction=0.1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, stage: str, images: str) -> str:
    """Its latents."""
    folder = tmp_path_factory.mktemp("cache") / "data"
    encode(stage, images, str(folder), ALONE)
    return str(folder)


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


class Mortal(encoders.Encoder):
    """Is killed once."""

    def shard(self, shard):
        grave = Path(self._work.destination).parent / "grave"
        if not grave.exists():
            grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().shard(shard)


@pytest.mark.ray
def test_a_lost_worker_starts_again(ray_cluster, stage: str, images: str, cache: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(encoders, "Encoder", Mortal)
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


# Training


def test_number_t_of_a_cache_is_number_t_of_its_source(
    stage: str, images: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape, "_SHUFFLED_BYTES", 40_000)  # so that the size of samples counts
    monkeypatch.setattr(tape, "_SMALLEST_BLOCK", 1)
    configs = [second_stage(stage, images, tmp_path), second_stage(stage, cache, tmp_path, *CACHED)]
    for config in configs:
        config.data.block = None
    online, cached = (Loader(config.data, config.data.trained_on).datasets[0].tape for config in configs)
    assert 1 < online.fingerprint.block == cached.fingerprint.block < COUNT // SHARDS
    for ours, theirs in zip(cached.locate(np.arange(2 * COUNT)), online.locate(np.arange(2 * COUNT)), strict=True):
        assert np.array_equal(ours, theirs)


def second_stage(stage: str, data: str, run: Path, *more: str) -> Config:
    unet = "family.unet={channels: 16, multipliers: [1, 2], num_res_blocks: 1, attention_levels: [], num_heads: 2}"
    settings = [unet, *TRAIN, *DATA, f"family.first_stage={stage}", f"data.train={data}", f"run.dir={run}"]
    return load(str(CONFIGS / "latent_diffusion.yaml"), [*settings, "data.block=4", *SOME_BAD, *more])


def losses(config: Config, num_batches: int) -> tuple[dict[int, float], float]:
    """Loss of each sample by its number, and the scale of the latents."""
    loader = Loader(config.data, config.data.trained_on)
    family = build_family(config).eval()
    family.initialize(loader.first(COUNT).batch)
    torch.manual_seed(3)
    with torch.no_grad():  # the last layer begins at zero
        for parameter in family.denoiser.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    found = {}
    for loaded in islice(loader.batches(0), num_batches):
        for i, key in enumerate(loaded.batch["key"].tolist()):
            found[key] = family.loss({name: value[i : i + 1] for name, value in loaded.batch.items()}, 0)[0].item()
    return found, family.latent_scale.item()


@pytest.mark.parametrize("flip", ["false", "true"])
def test_a_sample_has_the_loss_that_its_image_has(stage: str, images: str, cache: str, tmp_path: Path, flip) -> None:
    online, scale = losses(second_stage(stage, images, tmp_path, f"data.flip={flip}"), 5)
    config = second_stage(stage, cache, tmp_path, *CACHED, f"data.flip={flip}")
    check_start(config)
    cached, cached_scale = losses(config, 5)
    assert cached.keys() == online.keys() == set(range(40))  # into the second epoch, with the damaged image replaced
    assert cached_scale == pytest.approx(scale, rel=2**-10)
    for number, loss in online.items():  # fp16 rounds to 2^-11, of which a loss shows a part; bf16 rounds to 2^-8
        assert cached[number] == pytest.approx(loss, rel=2**-12), number
    # The mirror images are those of the same samples as online: of no others does a flip change the loss.
    other, _ = losses(second_stage(stage, images, tmp_path, f"data.flip={'false' if flip == 'true' else 'true'}"), 5)
    changed = [abs(other[number] - loss) > 2**-12 * loss for number, loss in online.items()]
    assert changed == flips(config.data.seed, np.array(list(online))).tolist()


def test_a_run_on_latents_trains_as_one_on_images(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    more = ["train.num_steps=4", "data.flip=true", "train.evaluate_every=4", "train.sample_every=4"]
    online = second_stage(stage, images, tmp_path / "online", *more, f"data.test={images}")
    cached = second_stage(stage, cache, tmp_path / "cached", *more, *CACHED, f"data.test={cache}")
    for config in (online, cached):
        assert train_worker(config, CPU).finished
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("cached", "online")
    )
    for key in ("denoiser/loss", "test/loss"):
        assert [line[key] for line in ours if key in line] == pytest.approx(
            [line[key] for line in theirs if key in line], rel=2**-8
        )
    assert (tmp_path / "cached/samples/step-00000004.png").exists()
    assert check_start(cached)[0].finished
    assert draw(cached.run.dir, SampleRequest(2)).shape == (2, SIZE, SIZE, 1)
    assert "<svg" in Path(write_report([cached.run.dir], torch.zeros(0))).read_text()


# What is refused


def test_a_first_stage_of_other_weights_is_refused(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    earlier = f"{stage}/checkpoints/step-00000002"
    words = rf"data.train: {cache} was encoded by step 3 of {stage} .weights \w+.; the run's first stage is step 2 of"
    with pytest.raises(DataError, match=words):
        check_start(second_stage(earlier, cache, tmp_path / "run", *CACHED))
    other = train_first_stage(tmp_path / "other", images, *SOME_BAD, "train.seed=1")
    with pytest.raises(DataError, match=f"the run's first stage is step 3 of {other}.*data encode {other} SRC DEST"):
        check_start(second_stage(other, cache, tmp_path / "run", *CACHED))
    test_of_other = tmp_path / "test"
    encode(earlier, images, str(test_of_other), ALONE)
    with pytest.raises(DataError, match="data.test: .*test was encoded by step 2"):
        check_start(second_stage(stage, cache, tmp_path / "run", *CACHED, f"data.test={test_of_other}"))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_when_its_first_stage_has_trained_on(images: str, tmp_path: Path) -> None:
    stage = train_first_stage(tmp_path / "stage", images, *SOME_BAD, "train.keep_checkpoints=1")
    encode(stage, images, str(tmp_path / "cache"), ALONE)
    config = second_stage(stage, str(tmp_path / "cache"), tmp_path / "run", *CACHED, "train.num_steps=2")
    check_start(config)
    train_worker(config, CPU)
    train_first_stage(tmp_path / "stage", images, *SOME_BAD, "train.keep_checkpoints=1", "train.num_steps=4")
    config.train.num_steps = 3  # its own first stage is in its checkpoints
    assert check_start(config) == (None, [])
    assert train_worker(config, CPU).finished


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resize=area", "data.resize: 'area'; .*cache.*, of data.train, was encoded with 'none'"),
        (
            "data.image=true",
            r"data.image: True; .* holds latents: set data.image=false and data.arrays=\[moments.npy\]",
        ),
        ("data.arrays=[moments.npy,tokens.npy]", "data.arrays: 'tokens.npy'; .* holds moments.npy"),
        ("data.channels=3", "was trained on 1 channels of 16 pixels"),
        ("data.arrays=[tokens.npy]", "it needs 'image' of each sample"),
    ],
)
def test_a_config_of_another_transform_is_refused(stage: str, cache: str, tmp_path: Path, override, words) -> None:
    with pytest.raises(ConfigError, match=words):
        check_start(second_stage(stage, cache, tmp_path, *CACHED, override))


def test_mirror_images_that_are_not_there_are_refused(stage: str, images: str, tmp_path: Path) -> None:
    encode(stage, images, str(tmp_path / "cache"), ALONE, flip=False)
    config = second_stage(stage, str(tmp_path / "cache"), tmp_path, *CACHED, "data.flip=true")
    with pytest.raises(ConfigError, match="data.flip: True; .*cache was encoded without mirror images"):
        check_start(config)
    config.data.flip = False
    check_start(config)


def test_latents_of_nobody_knows_what_are_refused(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache/encoded.json").unlink()
    with pytest.raises(DataError, match="cache was not made by `gmdist data encode`"):
        check_start(second_stage(stage, str(tmp_path / "cache"), tmp_path / "run", *CACHED))
    with pytest.raises(ConfigError, match="data.image: False; must be true with data.resize or data.flip, but"):
        check_start(second_stage(stage, str(tmp_path / "cache"), tmp_path / "run", *CACHED, "data.flip=true"))
    (tmp_path / "cache/encoded.json").write_text("{}")
    with pytest.raises(DataError, match="encoded.json: damaged or of another version"):
        check_start(second_stage(stage, str(tmp_path / "cache"), tmp_path / "run", *CACHED))


def test_latents_of_another_shape_are_refused(stage: str, cache: str, tmp_path: Path) -> None:
    family = build_family(second_stage(stage, cache, tmp_path, *CACHED))
    batch = {"moments": torch.zeros(2, 8, 8, 8), "key": torch.arange(2)}
    with pytest.raises(ConfigError, match=r"they are \[8, 8, 8\], and those of .* are \[4, 8, 8\]"):
        family.initialize(batch)


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
    other = write(tmp_path / "other")
    with pytest.raises(DataError, match="holds latents of another data set"):
        encode(stage, other, cache, ALONE)
    with pytest.raises(DataError, match="other: holds something else .manifest.json"):
        encode(stage, images, other, ALONE)
    with pytest.raises(DataError, match=r"no \.tar shards here"):
        encode(stage, str(tmp_path / "missing"), new, ALONE)
    for override in ("family.kl_weight=0", "data.image_size=32"):
        with pytest.raises(ConfigError, match=f"'{override}'; of cluster, data, train all can be set but data.image_s"):
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


def test_settings_that_a_later_version_adds_are_no_other_first_stage(stage: str) -> None:
    from gmdist.runs import identify

    meta, family = open_run(stage)
    now = identify(stage, family, meta["step"])
    then = identify(stage, family, meta["step"])
    del then.family["kl_weight"]
    assert then.is_same(now)
    assert now.is_same(then)
    then.family["autoencoder"]["channels"] = 9
    assert not then.is_same(now)
    assert read_config(stage).family.autoencoder.channels == 8
