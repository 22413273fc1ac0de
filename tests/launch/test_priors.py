"""Priors from end to end: tokens by `data encode`, a run on them, its images, and images that it completes."""

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
from gmdist.errors import ConfigError, DataError
from gmdist.families import CATALOGUE
from gmdist.images import png
from gmdist.launch.encode import encode
from gmdist.runs import check_start, open_run, train_worker
from tests.launch.latents import ALONE, CONFIGS, CPU, DATA, SIZE, SOME_BAD, TRAIN, picture
from tests.patch_means import PatchMeans, PatchMeansConfig
from tests.support import tree_bytes

CACHED = ["data.image=false", "data.arrays=[tokens.npy]"]


def train_tokenizer(run: Path, images: str, num_steps: int) -> str:
    tree = {
        "name": "patch_means",
        "family": {"name": "patch_means"},
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
    with mock.patch.dict(CATALOGUE, {"patch_means": (PatchMeans, PatchMeansConfig)}):
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
    with pytest.raises(ConfigError, match="it needs 'image' of each sample"):
        check_start(prior("pixelcnn", tokenizer, tokens, tmp_path / "run", *of_pixels))


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
