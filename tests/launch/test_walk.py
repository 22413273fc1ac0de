"""`gmdist sample --interpolate`, `--mix-styles` and `--truncation`, of small runs of GANs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmdist.cli import main
from gmdist.config import load
from gmdist.start import train_worker
from tests.launch.latents import CONFIGS, CPU
from tests.test_cli import refused

SIZE = 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of each of two families. Read only."""
    folder = tmp_path_factory.mktemp("gans")
    assert main(["data", "make", "digits", str(folder / "data")]) == 0
    settings = {
        "stylegan2": [
            "family.generator={latent_channels: 8, style_channels: 8, channel_base: 256, channel_max: 8}",
            "train.num_steps=2",
        ],
        "conditional_gan": [
            "family.networks={latent_channels: 8, generator_channels: 8, discriminator_channels: 8}",
            "train.num_steps=20",  # until its batch statistics are some
            "optim.generator.lr=0.02",
        ],
    }
    found = {}
    for name, own in settings.items():
        where = [f"data.train={folder}/data/train", f"data.test={folder}/data/test", f"run.dir={folder}/{name}"]
        few = ["data.batch_size=8", "train.evaluate_every=null", "evaluation.metrics=[]", "train.sample_every=null"]
        train_worker(load(f"{CONFIGS}/{name}.yaml", [*own, *where, *few]), CPU)
        found[name] = f"{folder}/{name}"
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", ["stylegan2", "conditional_gan"])
def test_frames_go_from_each_image_to_the_next(name: str, runs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "frames"
    assert main(["sample", runs[name], "--num-images", "3", "--interpolate", "4", "--out", str(out)]) == 0
    frames = np.stack([pixels(path) for path in sorted(out.iterdir())]).astype(float)
    assert frames.shape == (12, SIZE, SIZE)
    assert main(["sample", runs[name], "--num-images", "3", "--interpolate", "4", "--out", str(out)]) == 0  # once more
    steps = np.abs(np.diff(frames, axis=0, append=frames[:1])).mean(axis=(1, 2))
    jumps = np.abs(frames[::4] - np.roll(frames[::4], -1, axis=0)).mean(axis=(1, 2))
    assert steps.max() < 0.6 * jumps.max()  # it comes back to where it began, and nowhere all at once
    grid = tmp_path / "grid.png"
    assert main(["sample", runs[name], "--num-images", "3", "--interpolate", "4", "--out", str(grid)]) == 0
    assert pixels(grid).shape == (3 * (SIZE + 2) - 2, 4 * (SIZE + 2) - 2)
    assert np.array_equal(pixels(grid)[:SIZE, :SIZE], frames[0])


def test_mixtures_of_a_style_with_itself_are_its_image(runs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "mixed.png"
    assert main(["sample", runs["stylegan2"], "--num-images", "2", "--mix-styles", "--out", str(out)]) == 0
    table = pixels(out)
    side = SIZE + 2
    assert table.shape == (3 * side - 2, 3 * side - 2)
    cells = [[table[r * side : r * side + SIZE, c * side : c * side + SIZE] for c in range(3)] for r in range(3)]
    assert (cells[0][0] == 255).all()
    assert all(
        (cells[r][c] != cells[r][0]).any() and (cells[r][c] != cells[0][c]).any() for r in (1, 2) for c in (1, 2)
    )


def test_with_no_truncation_left_all_images_have_one_style(runs: dict[str, str], tmp_path: Path) -> None:
    spreads = []
    for value in ("0", "1"):
        out = tmp_path / value
        sample = ["sample", runs["stylegan2"], "--num-images", "4", "--truncation", value, "--interpolate", "2"]
        assert main([*sample, "--out", str(out)]) == 0
        spreads.append(np.stack([pixels(path) for path in out.iterdir()]).astype(float).std(axis=0).max())
    assert spreads[0] == 0.0
    assert spreads[1] > 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stylegan2", ["--truncation", "1.5"], "family.truncation: 1.5; must be from 0 to 1"),
        ("conditional_gan", ["--truncation", "0.5"], "--truncation: family 'conditional_gan' has no truncation to set"),
        ("stylegan2", ["--interpolate", "1"], "--interpolate: 1; must be at least 2"),
        ("stylegan2", ["--interpolate", "4", "--num-images", "1"], "--num-images: 1; must be at least 2"),
        ("conditional_gan", ["--mix-styles"], "the run's family has no styles to mix"),
        ("stylegan2", ["--mix-styles", "--interpolate", "4"], "--mix-styles: does not go with --interpolate"),
        ("stylegan2", ["--mix-styles", "--show", "traversals"], "--mix-styles: does not go with --show"),
        ("stylegan2", ["--interpolate", "3", "--label", "11"], "--label: 11; labels are 0 to 9"),
    ],
)
def test_refusals(
    name: str,
    options: list[str],
    message: str,
    runs: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(capsys, 2, "sample", runs[name], *options, "--out", str(tmp_path / "out.png"))
