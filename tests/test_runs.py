"""Runs: the workers of one read the same data, and a family gets what it needs of it."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from gmdist import runs, s3
from gmdist.cli import main
from gmdist.config import load
from gmdist.data.pack import write_shards
from gmdist.errors import ConfigError, DataError
from gmdist.families import CATALOGUE
from gmdist.images import png
from gmdist.runs import build_family, read_config
from gmdist.start import check_start, train_worker
from tests import two_domains
from tests.support import run_workers, tree_bytes
from tests.two_domains import Recolour, RecolourConfig

CONFIG = str(Path(__file__).parent.parent / "configs/digits/autoencoder_kl.yaml")


def write(folder: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    images = (png(random.integers(0, 256, (32, 32, 1), np.uint8)) for _ in range(8))
    write_shards(((f"{i}", {"png": image, "cls": b"1"}) for i, image in enumerate(images)), str(folder))
    return str(folder)


def test_commands_compute_convolutions_in_fp32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    runs.device()
    assert not torch.backends.cudnn.allow_tf32


def test_evaluations_that_are_hardly_meant_are_warned_of(tmp_path: Path) -> None:
    assert main(["data", "make", "digits", str(tmp_path / "data")]) == 0
    settings = [f"data.train={tmp_path}/data/train", "data.test=null", f"run.dir={tmp_path}/run"]
    _, warnings = check_start(load(str(Path(CONFIG).parent / "vae.yaml"), [*settings, "train.evaluate_every=20"]))
    assert warnings == ["train.evaluate_every: 20; nothing is evaluated without data.test or evaluation.metrics"]
    assert check_start(load(str(Path(CONFIG).parent / "vae.yaml"), [*settings, "train.evaluate_every=null"]))[1] == []
    best = ["train.evaluate_every=20", "train.checkpoint_every=20", "train.best_metric=test/elbo_nats"]
    for order, words in (
        ("min", ["train.best_order: min; keeps the checkpoint of the least test/elbo_nats"]),
        ("max", []),
    ):
        more = [f"data.test={tmp_path}/data/test", f"train.best_order={order}"]
        _, warnings = check_start(load(str(Path(CONFIG).parent / "vae.yaml"), [*settings, *best, *more]))
        assert [warning.removesuffix(": set it to max") for warning in warnings] == words


def test_micro_batches_that_come_out_small_are_warned_of(tmp_path: Path) -> None:
    data = [f"data.train={write(tmp_path / 'data', 0)}", "data.test=null", "data.image_size=32", "data.channels=1"]
    settings = [*data, f"run.dir={tmp_path}/run", "evaluation.metrics=[]", "train.evaluate_every=null"]
    settings += ["train.best_metric=null", "cluster.num_workers=2"]
    small = ["train.micro_batch_size: 32; 2 workers pass 1 samples through at once"]
    for batch, micro, words in ((74, 32, small), (74, "null", []), (74, 64, []), (60, 16, []), (62, 2, [])):
        more = [f"data.batch_size={batch}", f"train.micro_batch_size={micro}"]
        warnings = check_start(load(CONFIG, [*settings, *more]))[1]
        assert [warning.partition(": take a divisor of the 37 ")[0] for warning in warnings] == words


def test_samples_that_a_loss_compares_are_passed_through_together(tmp_path: Path) -> None:
    settings = [f"data.train={write(tmp_path / 'data', 0)}", "data.test=null", f"run.dir={tmp_path}/run"]
    settings += ["cluster.num_workers=1", "family.discriminator.minibatch_std_group=4", "evaluation.metrics=[]"]
    settings += ["family.path_length.batch_shrink=1", "train.evaluate_every=null", "train.best_metric=null"]
    for batch, micro, wrong in (
        (12, 8, None),  # fours, though six would be more
        (12, 3, "train.micro_batch_size: 3; 1 workers pass 3 samples through at once, and the loss takes 4 of them"),
        (10, 8, "data.batch_size: 10; 1 workers pass 5 samples through at once, and the loss takes 4 of them"),
    ):
        sizes = [f"data.batch_size={batch}", f"train.micro_batch_size={micro}"]
        config = load(str(Path(CONFIG).parent / "stylegan2.yaml"), [*settings, *sizes])
        with nullcontext() if wrong is None else pytest.raises(ConfigError, match=wrong):
            check_start(config)


def test_a_schedule_that_ends_short_of_noise_is_warned_of(tmp_path: Path) -> None:
    data = [f"data.train={write(tmp_path / 'data', 0)}", "data.test=null", "data.image_size=32", "data.channels=1"]
    config = str(Path(CONFIG).parent / "ddpm.yaml")
    settings = [*data, f"run.dir={tmp_path}/run", "family.diffusion.schedule=linear"]
    settings += ["evaluation.metrics=[]", "train.evaluate_every=null", "train.best_metric=null"]
    for more, words in (
        (["family.diffusion.num_timesteps=100"], ["family.diffusion.num_timesteps: 100; the last one has 60% of"]),
        (["family.diffusion.num_timesteps=100", "family.diffusion.betas=[0.001,0.2]"], []),
        (
            ["family.diffusion.sampler={num_steps: 501, spacing: leading}"],
            ["family.diffusion.sampler.num_steps: 501; the first is at timestep 500 of 1000, which has 28% of the"],
        ),
        ([], []),
    ):
        _, warnings = check_start(load(config, [*settings, *more]))
        assert [warning[: len(word)] for warning, word in zip(warnings, words, strict=True)] == words


def test_classes_of_other_names_are_warned_of(tmp_path: Path) -> None:
    image = png(np.zeros((32, 32, 1), np.uint8))
    for split, names in (("train", ("cat", "dog")), ("test", ("dog",))):
        write_shards([(f"{i}", {"png": image, "cls": b"0"}) for i in range(4)], str(tmp_path / split), names)
    settings = [f"data.train={tmp_path}/train", f"data.test={tmp_path}/test", f"run.dir={tmp_path}/run"]
    settings += ["evaluation.metrics=[]", "train.best_metric=null"]
    _, warnings = check_start(load(CONFIG, [*settings, "data.num_classes=2"]))
    words = "its class 0 is 'dog', and 'cat' in data.train; labels are taken as numbers, whatever their names"
    assert warnings == [f"data.test: {words}"]
    assert check_start(load(CONFIG, [*settings, "data.num_classes=null"]))[1] == []


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


def test_the_seed_decides_a_second_stages_first_weights_and_its_first_stages_does_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 0)
    settings = [f"data.train={folder}", "data.test=null", "train.sample_every=null"]
    for seed in (0, 1):
        first = [*settings, "train.num_steps=1", "data.batch_size=2", "train.zero_stage=0", f"train.seed={seed}"]
        train_worker(load(CONFIG, [*first, f"run.dir={tmp_path}/{seed}"]), torch.device("cpu"))
    diffusion = str(Path(CONFIG).parent / "latent_diffusion.yaml")
    weights = {}
    for seed, first_stage in ((0, 0), (0, 1), (1, 0)):
        config = load(diffusion, [f"family.first_stage={tmp_path}/{first_stage}", f"train.seed={seed}"])
        weights[seed, first_stage] = next(build_family(config).denoiser.parameters())
    assert torch.equal(weights[0, 0], weights[0, 1])
    assert not torch.equal(weights[0, 0], weights[1, 0])


def test_arrays_that_would_take_the_place_of_the_images_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 0)
    settings = [f"data.train={folder}", "data.test=null", f"run.dir={tmp_path}/run", "train.num_steps=1"]
    config = load(CONFIG, [*settings, "data.batch_size=2", "train.zero_stage=0", "train.sample_every=null"])
    train_worker(config, torch.device("cpu"))
    second = [*settings[:2], f"run.dir={tmp_path}/second", f"family.first_stage={tmp_path}/run"]
    config = load(str(Path(CONFIG).parent / "latent_diffusion.yaml"), [*second, "data.arrays=[moments.npy]"])
    with pytest.raises(ConfigError, match=r"data.arrays: \['moments.npy'\]; moments would take the place of the"):
        check_start(config)


def test_storage_is_reached_as_the_run_says_and_not_as_its_first_stage_does(tmp_path: Path) -> None:
    folder, kept = write(tmp_path / "data", 0), s3.config()
    settings = [f"data.train={folder}", "data.test=null", "data.batch_size=2", "train.zero_stage=0"]
    first = ["train.num_steps=1", "train.sample_every=null", "data.s3.endpoint_url=http://first:1"]
    train_worker(load(CONFIG, [*settings, *first, f"run.dir={tmp_path}/run"]), torch.device("cpu"))
    second = [
        f"run.dir={tmp_path}/second",
        f"family.first_stage={tmp_path}/run",
        "data.s3.endpoint_url=http://second:2",
    ]
    second += ["evaluation.metrics=[]", "train.evaluate_every=null", "train.best_metric=null"]
    check_start(load(str(Path(CONFIG).parent / "latent_diffusion.yaml"), [*settings, *second]))
    assert s3.config().endpoint_url == "http://second:2"
    read_config(f"{tmp_path}/run", ["data.s3.endpoint_url=http://third:3"])
    assert s3.config().endpoint_url == "http://third:3"
    s3.configure(kept)


# Two domains.


@pytest.fixture
def domains(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two data sets, and a family that needs both."""
    with mock.patch.dict(CATALOGUE, {"recolour": (Recolour, RecolourConfig)}):
        yield two_domains.write(tmp_path / "a", 0), two_domains.write(tmp_path / "b", 100, 9)


def test_a_family_of_two_domains_needs_the_second(domains: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'recolour'; it needs 'image_b' of each sample, .*: set data\.unpaired$"):
        check_start(two_domains.config(tmp_path / "run", domains[0], None))
    with mock.patch.object(Recolour, "inputs", ("image", "label_b")):
        with pytest.raises(ConfigError, match=r"'label_b' .*: set data\.unpaired and data\.num_classes$"):
            check_start(two_domains.config(tmp_path / "run", *domains))
        assert check_start(two_domains.config(tmp_path / "run", *domains, num_classes=1)) == (None, [])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_second_domain_that_is_not_there_is_named(domains: tuple[str, str], tmp_path: Path, split: str) -> None:
    second = {"train": domains[1], "test": domains[1]}
    config = two_domains.config(tmp_path / "run", *domains, test=domains[0], unpaired=second)
    assert check_start(config) == (None, [])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        setattr(config.data.unpaired, split, str(folder))
        with pytest.raises(DataError, match=rf"^data\.unpaired\.{split}: {folder}: no such data set, or it is empty"):
            check_start(config)
    setattr(config.data.unpaired, split, domains[1])
    config.data.num_classes = 3
    assert check_start(config) == (None, [])
    write_shards([("k", {"png": b"", "cls": b"7"})], str(tmp_path / "empty"))
    setattr(config.data.unpaired, split, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=rf"^data\.unpaired\.{split}: .*: class label 7 is out of range"):
        check_start(config)


def test_a_run_of_two_domains_goes_on_and_with_no_other(domains: tuple[str, str], tmp_path: Path) -> None:
    def trained(name: str, num_steps: int) -> dict[str, bytes]:
        config = two_domains.config(tmp_path / name, *domains, test=domains[0], unpaired=second)
        config.train.num_steps = num_steps
        config.train.evaluate_every = num_steps
        train_worker(config, torch.device("cpu"))
        return tree_bytes(tmp_path / name / "checkpoints/step-00000004") if num_steps == 4 else {}

    second = {"train": domains[1], "test": domains[1]}
    trained("parts", 2)
    assert trained("parts", 4) == trained("whole", 4)
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["test/colour"] > 0
    other = two_domains.write(tmp_path / "c", 200, 9)
    config = two_domains.config(tmp_path / "parts", domains[0], other)
    with pytest.raises(DataError, match=r"^data\.unpaired\.train: cannot resume: the data set was"):
        check_start(config)
    with pytest.raises(DataError, match=r"^data\.unpaired\.train: cannot resume: the data set was"):
        train_worker(config, torch.device("cpu"))


def train_beside_own_folder(rank: int, world_size: int, folder: str) -> None:
    with mock.patch.dict(CATALOGUE, {"recolour": (Recolour, RecolourConfig)}):
        config = two_domains.config(Path(folder) / "run", f"{folder}/a", f"{folder}/{rank}")
        with pytest.raises(DataError, match=r"data\.unpaired\.train: worker 1 reads another data set than worker 0"):
            train_worker(config, torch.device("cpu"))


def test_workers_that_read_different_second_domains_are_refused(tmp_path: Path) -> None:
    two_domains.write(tmp_path / "a", 0)
    for rank in range(2):
        two_domains.write(tmp_path / str(rank), rank)
    run_workers(train_beside_own_folder, 2, str(tmp_path))
    assert not (tmp_path / "run").exists()
