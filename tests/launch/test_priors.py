"""Priors from end to end: tokens by `data encode`, a run on them, its images, and images that it completes."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist.cli import main
from gmdist.config import Config, from_tree, load
from gmdist.data.index import check_folder
from gmdist.data.pack import write_shards
from gmdist.errors import ConfigError, DataError
from gmdist.evaluation.features import save_classifier
from gmdist.families import CATALOGUE
from gmdist.families.family import Surroundings
from gmdist.images import png
from gmdist.launch.encode import encode
from gmdist.launch.sample import SampleRequest, with_sampler
from gmdist.nets.classifier import Classifier, ClassifierSizes
from gmdist.runs import build_family, open_run
from gmdist.start import check_start, train_worker
from tests.launch.latents import ALONE, CLASSES, CONFIGS, COUNT, CPU, DATA, SIZE, SOME_BAD, TRAIN, picture
from tests.patch_means import PatchMeans, PatchMeansConfig
from tests.support import tree_bytes
from tests.test_cli import refused

CACHED = ["data.image=false", "data.arrays=[tokens.npy]"]


class Judged(PatchMeans):
    """With a network that neither encodes nor decodes."""

    def __init__(self, config: PatchMeansConfig, surroundings: Surroundings) -> None:
        super().__init__(config, surroundings)
        self.judge = torch.nn.Linear(2, 1)


def train_tokenizer(run: Path, images: str, num_steps: int, name: str = "patch_means") -> str:
    tree = {
        "name": name,
        "family": {"name": name},
        "data": {"train": images, "image_size": SIZE, "channels": 1, "batch_size": 8, "max_bad_fraction": 0.1},
        "optim": {"levels": {"lr": 0.02}},
        "train": {"num_steps": num_steps, "checkpoint_every": 1, "keep_checkpoints": None, "sample_every": None},
        "run": {"dir": str(run)},
    }
    train_worker(from_tree(tree), CPU)
    return str(run)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, images: str) -> Iterator[str]:
    """A run of a tokenizer, in the catalogue while these tests run. Read only."""
    kinds = {"patch_means": (PatchMeans, PatchMeansConfig), "judged": (Judged, PatchMeansConfig)}
    with mock.patch.dict(CATALOGUE, kinds):
        yield train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "run", images, 3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: str, images: str) -> str:
    """What it makes of the images, without their mirror images. Read only."""
    folder = str(tmp_path_factory.mktemp("tokens") / "data")
    encode(tokenizer, images, folder, ALONE, flip=False)
    return folder


def prior(name: str, tokenizer: str, data: str, run: Path, *more: str) -> Config:
    sizes = {
        "transformer_prior": "family.transformer={channels: 16, depth: 1, num_heads: 2}",
        "pixelcnn": "family.network={channels: 8, depth: 1}",
    }
    settings = [sizes[name], f"family.first_stage={tokenizer}", *TRAIN, *DATA, f"data.train={data}", f"run.dir={run}"]
    return load(str(CONFIGS / f"{name}.yaml"), [*settings, "train.num_steps=2", "data.block=4", *SOME_BAD, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: str, images: str, tokens: str) -> Path:
    """A prior that was trained on tokens alone, and whose tokenizer has trained on since. Read only."""
    folder = tmp_path_factory.mktemp("prior")
    first = str(shutil.copytree(tokenizer, folder / "tokenizer"))
    config = prior("transformer_prior", first, tokens, folder / "run", *CACHED)
    check_start(config)
    assert train_worker(config, CPU).finished
    train_tokenizer(folder / "tokenizer", images, 5)
    return folder / "run"


@pytest.mark.parametrize("name", ["transformer_prior", "pixelcnn"])
def test_a_run_on_tokens_is_one_on_their_images(name: str, tokenizer: str, images: str, tokens: str, tmp_path) -> None:
    assert check_folder(tokens) == []
    for folder, data, more in (("online", images, []), ("cached", tokens, CACHED)):
        config = prior(name, tokenizer, data, tmp_path / folder, *more)
        check_start(config)
        assert train_worker(config, CPU).finished
    states = [open_run(str(tmp_path / folder))[1].state_dict() for folder in ("online", "cached")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_tokens_of_another_tokenizer_are_refused(tokenizer: str, images: str, tokens: str, tmp_path: Path) -> None:
    earlier = f"{tokenizer}/checkpoints/step-00000001"
    with pytest.raises(DataError, match="was encoded by step 3 of .*; the run's first stage is step 1 of"):
        check_start(prior("transformer_prior", earlier, tokens, tmp_path / "run", *CACHED))
    with pytest.raises(ConfigError, match="data.flip: True; .* was encoded without mirror images"):
        check_start(prior("transformer_prior", tokenizer, tokens, tmp_path / "run", *CACHED, "data.flip=true"))
    mirrored = str(tmp_path / "mirrored")
    encode(tokenizer, images, mirrored, ALONE)
    check_start(prior("transformer_prior", tokenizer, mirrored, tmp_path / "run", *CACHED, "data.flip=true"))
    of_pixels = ["family.first_stage=null", *CACHED]
    with pytest.raises(ConfigError, match="it needs 'image' of each sample.*: set family.first_stage to the run"):
        check_start(prior("pixelcnn", tokenizer, tokens, tmp_path / "run", *of_pixels))


@pytest.mark.parametrize("name", ["transformer_prior", "pixelcnn"])
def test_tokens_of_a_tokenizer_with_other_networks_are_its_own(
    name: str, tokenizer: str, images: str, tmp_path: Path
) -> None:
    judged = train_tokenizer(tmp_path / "judged", images, 2, "judged")
    encode(judged, images, str(tmp_path / "tokens"), ALONE, flip=False)
    config = prior(name, judged, str(tmp_path / "tokens"), tmp_path / "run", *CACHED, "train.num_steps=1")
    check_start(config)
    assert train_worker(config, CPU).finished
    config.train.num_steps = 2
    check_start(config)
    assert train_worker(config, CPU).finished
    train_tokenizer(tmp_path / "judged", images, 3, "judged")
    open_run(config.run.dir, config, [("data.test", str(tmp_path / "tokens"))])
    encode(judged, images, str(tmp_path / "later"), ALONE, flip=False)
    with pytest.raises(
        DataError, match=r"^data.test: .*later was encoded by step 3 of .*judged .*; the run's first st"
    ):
        open_run(config.run.dir, config, [("data.test", str(tmp_path / "later"))])


@pytest.mark.parametrize("name", ["transformer_prior", "pixelcnn"])
def test_a_tokenizer_that_is_not_there_is_named_by_its_key(name: str, images: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^family.first_stage: {tmp_path}: not a run"):
        check_start(prior(name, str(tmp_path), images, tmp_path / "run"))


def test_a_run_is_sampled_from_with_the_tokenizer_that_it_was_trained_with(
    run: Path, tokenizer, tmp_path: Path
) -> None:
    own, now = open_run(str(run))[1].coding.tokenizer.levels, open_run(str(run.parent / "tokenizer"))[1].levels
    assert torch.equal(own.weight, open_run(tokenizer)[1].levels.weight)
    assert not torch.equal(own.weight, now.weight)
    sample = ["sample", str(run), "--num-images", "3", "--out"]
    assert main([*sample, str(tmp_path / "plain")]) == 0
    assert main([*sample, str(tmp_path / "again"), "family.sampler.guidance=1.5"]) == 0
    assert tree_bytes(tmp_path / "again") == tree_bytes(tmp_path / "plain")
    for more in (["--guidance", "1000"], ["--seed", "1"], ["family.sampler.top_k=1"]):
        assert main([*sample, str(tmp_path / more[-1]), *more]) == 0
        assert tree_bytes(tmp_path / more[-1]) != tree_bytes(tmp_path / "plain")


def test_an_image_is_completed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun, out = tmp_path / "begun.png", tmp_path / "out"
    begun.write_bytes(png(picture(3)[:9]))
    assert main(["sample", str(run), "--complete", str(begun), "--num-images", "3", "--out", str(out)]) == 0
    _, family = open_run(str(run))
    made = np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())])
    whole = torch.from_numpy(picture(3)).permute(2, 0, 1)[None] / 127.5 - 1.0
    shown = family.coding.shown(family.coding.of_images(whole))
    assert np.array_equal(made[:, :8], ((shown[:, 0, :8] + 1.0) * 127.5).round().byte().numpy().repeat(3, axis=0))
    assert not np.array_equal(made[0, 8:], made[1, 8:])


def test_what_cannot_be_completed_is_refused(run: Path, stage: str, tmp_path: Path, capsys) -> None:
    def refused(content: bytes | None, run: str) -> str:
        begun = tmp_path / "begun.png"
        begun.unlink(missing_ok=True)
        if content is not None:
            begun.write_bytes(content)
        assert main(["sample", run, "--complete", str(begun), "--out", str(tmp_path / "x.png")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"gmdist: --complete: {begun}; ")
        return line

    patch = "16x3 pixels; must be 16 wide, and from 4 to 15 high: of each 4 rows of pixels a row of codes is kept"
    assert patch in refused(png(picture(0)[:3]), str(run))
    assert "16x16 pixels; must be" in refused(png(picture(0)), str(run))
    assert "there is no such file" in refused(None, str(run))
    assert main(["sample", str(run), "--complete", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert f"--complete: {tmp_path}: Is a directory" in capsys.readouterr().err
    assert "not a JPEG, PNG or WebP image" in refused(b"GIF89a", str(run))
    assert "damaged" in refused(png(picture(0)[:8])[:60], str(run))
    assert "draws images as a whole, and completes none" in refused(png(picture(0)[:8]), stage)
    steps = ["sample", str(run), "--out", str(tmp_path / "x.png"), "--steps", "3"]
    assert main(steps) == 2
    assert "--steps: family 'transformer_prior' has no sampler with steps to set" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_top_p_that_leaves_nothing_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["sample", str(run), "--out", str(tmp_path / "x.png"), "family.sampler.top_p=0"]) == 2
    assert "family.sampler.top_p: 0.0; must be above 0, where no code would be left" in capsys.readouterr().err


def test_guidance_of_a_run_that_was_always_told_the_class_is_refused(tokenizer: str, tokens: str, tmp_path) -> None:
    always_told = ["family.conditioning.dropout=0", "family.sampler.guidance=1"]
    config = prior("transformer_prior", tokenizer, tokens, tmp_path / "run", *CACHED, *always_told)
    assert with_sampler(config, SampleRequest(1, guidance=1.0)) is config
    with pytest.raises(ConfigError, match=r"^family.sampler.guidance: 3.0; must be 1, or family.conditioning.dropout"):
        build_family(with_sampler(config, SampleRequest(1, guidance=3.0)))


# Scores


def scores(out: Path) -> np.ndarray:
    with out.open() as file:
        return np.array([float(line["log_likelihood"]) for line in csv.DictReader(file)])


def test_tokens_are_scored_and_those_of_another_tokenizer_are_refused(
    run: Path, images: str, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "scores.csv", str(tmp_path / "other")
    evaluate = ["evaluate", str(run), "--scores", str(out)]
    for given in ("evaluation.reference", "data.test"):  # though the tokenizer's run has newer weights by now
        out.unlink(missing_ok=True)
        assert main([*evaluate, f"{given}={tokens}"]) == 0
        assert len(scores(out)) == COUNT - 1  # one image is damaged
    encode(str(run.parent / "tokenizer"), images, other, ALONE, flip=False)
    capsys.readouterr()
    out.unlink()
    for given in ("evaluation.reference", "data.test"):
        line = refused(capsys, 1, *evaluate, f"{given}={other}")
        assert f"{given}: {other} was encoded by step 5 of {run.parent}/tokenizer (weights" in line
        assert f"; the run's first stage is a checkpoint of {run.parent}/tokenizer (weights" in line
    line = refused(capsys, 1, *evaluate, f"data.test={images}")
    assert f"data.test: {images} was not made by `gmdist data encode`" in line
    assert not out.exists()
    features = str(tmp_path / "classifier.safetensors")
    save_classifier(features, Classifier(ClassifierSizes(SIZE, 1, CLASSES)).eval(), {})
    compared = ["--metrics", "fid", "--num-images", "4", "--features", features, f"evaluation.reference={images}"]
    assert "was encoded by step 5" in refused(capsys, 1, "evaluate", str(run), *compared, f"data.test={other}")
    assert main(["evaluate", str(run), *compared, f"data.test={tokens}"]) == 0


def test_labels_that_a_prior_has_no_classes_for(run: Path, tokenizer: str, tmp_path: Path, capsys) -> None:
    def encoded(name: str, samples: list[tuple[str, dict[str, bytes]]]) -> str:
        write_shards(samples, str(tmp_path / "images" / name))
        encode(tokenizer, str(tmp_path / "images" / name), str(tmp_path / name), ALONE, flip=False)
        return f"evaluation.reference={tmp_path / name}"

    bare = [(f"k{i}", {"png": png(picture(i))}) for i in range(4)]
    out = tmp_path / "scores.csv"
    evaluate = ["evaluate", str(run), "--scores", str(out)]
    assert main([*evaluate, encoded("bare", bare)]) == 0
    _, family = open_run(str(run))
    image = torch.from_numpy(np.stack([picture(i) for i in range(4)])).permute(0, 3, 1, 2) / 127.5 - 1.0
    free = {"image": image, "key": torch.arange(4), "label": torch.full((4,), CLASSES)}
    np.testing.assert_allclose(scores(out), family.scores(free)["log_likelihood"].numpy(), rtol=1e-5)
    out.unlink()
    capsys.readouterr()
    for label in (CLASSES, CLASSES + 3):
        labelled = [(key, members | {"cls": b"%d" % label}) for key, members in bare]
        line = refused(capsys, 1, *evaluate, encoded(f"of_{label}", labelled))
        assert line.startswith(f"gmdist: evaluation.reference: {tmp_path}/of_{label}/")
        assert f"class label {label} is out of range: data.num_classes is 4, so labels are 0 to 3" in line
    assert not out.exists()
