"""Runs on latents: each sample has the loss that its image has, and latents of something else are refused."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist.config import Config
from gmdist.data import tape
from gmdist.data.loader import Loader
from gmdist.data.transform import flips
from gmdist.errors import CheckpointError, ConfigError, DataError
from gmdist.evaluation.features import save_classifier
from gmdist.launch.encode import encode
from gmdist.launch.sample import SampleRequest, draw
from gmdist.nets.classifier import Classifier, ClassifierSizes
from gmdist.report.page import write as write_report
from gmdist.runs import build_family, identify, open_run, read_config
from gmdist.start import check_start, train_worker
from tests.launch.latents import (
    ALONE,
    CACHED,
    CLASSES,
    COUNT,
    CPU,
    SHARDS,
    SIZE,
    SOME_BAD,
    second_stage,
    train_first_stage,
)


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


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ([], ConfigError, r"evaluation\.reference: null; .* holds latents: name shards of images"),
        (["evaluation.reference={cache}"], ConfigError, r"evaluation\.reference: .*cache.* holds latents"),
        (["evaluation.reference={cache}/none"], DataError, "none"),
    ],
)
def test_images_to_compare_with_are_asked_for_before_the_start(
    stage: str, images: str, cache: str, tmp_path: Path, settings: list[str], error: type[Exception], words: str
) -> None:
    torch.manual_seed(0)
    features = str(tmp_path / "classifier.safetensors")
    save_classifier(features, Classifier(ClassifierSizes(SIZE, 1, CLASSES)).eval(), {})
    asked = ["evaluation.metrics=[fid]", f"evaluation.features={features}", "train.evaluate_every=2"]
    settings = [setting.format(cache=cache) for setting in settings]
    with pytest.raises(error, match=words):
        check_start(second_stage(stage, cache, tmp_path / "run", *CACHED, *asked, *settings))
    check_start(second_stage(stage, cache, tmp_path / "run", *CACHED, *asked, f"evaluation.reference={images}"))


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
    assert [image.shape for image in draw(cached.run.dir, SampleRequest(2))] == [(SIZE, SIZE, 1)] * 2
    assert "<svg" in Path(write_report([cached.run.dir], torch.zeros(0))).read_text()


# What is refused


def test_a_first_stage_is_told_by_what_encodes(images: str, tmp_path: Path) -> None:
    judged = ["family.discriminator={channels: 8, num_layers: 1, start_images: 0}", "optim.discriminator={lr: 1.0e-3}"]
    stage = train_first_stage(tmp_path / "stage", images, *SOME_BAD, *judged, "train.num_steps=1")
    cache = str(tmp_path / "cache")
    encode(stage, images, cache, ALONE)
    config = second_stage(stage, cache, tmp_path / "run", *CACHED, "train.num_steps=1")
    check_start(config)
    assert train_worker(config, CPU).finished
    train_first_stage(tmp_path / "stage", images, *SOME_BAD, *judged, "train.num_steps=2")
    # The run's checkpoint has what encodes, without the discriminator.
    open_run(config.run.dir, config, [("data.test", cache)])
    encode(stage, images, str(tmp_path / "later"), ALONE)
    words = rf"data.test: .*later was encoded by step 2 of {stage}.*; the run's first stage is a checkpoint of {stage}"
    with pytest.raises(DataError, match=words):
        open_run(config.run.dir, config, [("data.test", str(tmp_path / "later"))])
    meta, family = open_run(stage)
    before = identify(stage, family, meta["step"])
    with torch.no_grad():
        next(family.discriminator.parameters()).add_(1.0)
        assert identify(stage, family, meta["step"]) == before
        next(family.autoencoder.parameters()).add_(1.0)
        assert identify(stage, family, meta["step"]) != before


def test_a_first_stage_that_is_not_there_is_named_by_its_key(stage: str, images: str, tmp_path: Path) -> None:
    for place, words in (
        (tmp_path, f"{tmp_path}: not a run: it has no config.yaml"),
        (f"{stage}/checkpoints/step-00000099", f"{stage}/checkpoints/step-00000099: no such checkpoint"),
    ):
        with pytest.raises(ConfigError, match=f"^family.first_stage: {words}"):
            check_start(second_stage(str(place), images, tmp_path / "run"))
    shutil.copy(f"{stage}/config.yaml", tmp_path)
    with pytest.raises(CheckpointError, match="^family.first_stage: .*: has no complete checkpoint yet"):
        check_start(second_stage(str(tmp_path), images, tmp_path / "run"))


def test_a_first_stage_of_other_weights_is_refused(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    earlier = f"{stage}/checkpoints/step-00000002"
    words = rf"data.train: {cache} was encoded by step 3 of {stage} .weights \w+.; the run's first stage is step 2 of"
    with pytest.raises(DataError, match=words):
        check_start(second_stage(earlier, cache, tmp_path / "run", *CACHED))
    other = train_first_stage(tmp_path / "other", images, *SOME_BAD, "train.seed=1")
    with pytest.raises(DataError, match=f"the run's first stage is step 3 of {other}.*data encode RUN SRC DEST"):
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


def test_a_first_stage_that_saves_while_workers_start_is_seen(images: str, tmp_path: Path) -> None:
    stage = train_first_stage(tmp_path / "stage", images, *SOME_BAD)
    encode(stage, images, str(tmp_path / "cache"), ALONE)
    config = second_stage(stage, str(tmp_path / "cache"), tmp_path / "run", *CACHED, "train.num_steps=2")
    check_start(config)
    train_first_stage(tmp_path / "stage", images, *SOME_BAD, "train.num_steps=4")
    with pytest.raises(DataError, match="was encoded by step 3 of .*; the run's first stage is step 4"):
        train_worker(config, CPU)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_run_draws_the_same_whatever_becomes_of_its_first_stage(images: str, tmp_path: Path) -> None:
    stage = train_first_stage(tmp_path / "stage", images, *SOME_BAD)
    config = second_stage(stage, images, tmp_path / "run", "train.num_steps=2")
    check_start(config)
    train_worker(config, CPU)
    before = torch.stack(list(draw(config.run.dir, SampleRequest(3))))
    shutil.rmtree(stage)
    assert torch.equal(torch.stack(list(draw(config.run.dir, SampleRequest(3)))), before)
    # Weights of the same shapes, which compute otherwise.
    train_first_stage(tmp_path / "stage", images, *SOME_BAD, "family.autoencoder.norm_groups=2")
    assert torch.equal(torch.stack(list(draw(config.run.dir, SampleRequest(3)))), before)
    config.train.num_steps = 3
    words = (
        r"family.first_stage: .*stage; its family.autoencoder.norm_groups is 2 now, and was None when .*run was begun"
    )
    with pytest.raises(ConfigError, match=words):
        check_start(config)


def test_a_run_does_not_take_the_folder_of_its_first_stage(images: str, tmp_path: Path) -> None:
    stage = train_first_stage(tmp_path / "stage", images, *SOME_BAD)
    for overwrite in ("false", "true"):
        config = second_stage(f"{stage}/", images, tmp_path / "stage", f"run.overwrite={overwrite}")
        with pytest.raises(ConfigError, match=r"^run\.dir: .*; is the folder of family\.first_stage: choose another"):
            check_start(config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("family.diffusion={schedule: edm, prediction: edm}", r"edm\.sigma_data: 0\.5; must be 1, the standard"),
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


def test_held_out_latents_need_no_mirror_images(stage: str, images: str, cache: str, tmp_path: Path) -> None:
    encode(stage, images, str(tmp_path / "test"), ALONE, flip=False)
    more = ["data.flip=true", f"data.test={tmp_path}/test", "train.num_steps=2", "train.evaluate_every=2"]
    config = second_stage(stage, cache, tmp_path, *CACHED, *more)
    check_start(config)
    train_worker(config, torch.device("cpu"))


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


def test_settings_that_a_later_version_adds_are_no_other_first_stage(stage: str) -> None:
    meta, family = open_run(stage)
    now = identify(stage, family, meta["step"])
    then = identify(stage, family, meta["step"])
    del then.family["kl_weight"]
    assert then.is_same(now)
    assert now.is_same(then)
    then.family["autoencoder"]["channels"] = 9
    assert not then.is_same(now)
    assert read_config(stage).family.autoencoder.channels == 8
