"""`gmdist sample --translate`: images of a folder or of shards in the other domain, and one clear line for what not."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist.cli import main
from gmdist.data.pack import write_shards
from gmdist.families import CATALOGUE
from gmdist.images import png
from gmdist.runs import open_run
from gmdist.start import train_worker
from tests import two_domains
from tests.test_cli import refused
from tests.two_domains import SIZE, Recolour, RecolourConfig, picture

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run of a family of two domains, in the catalogue while these tests run. Read only."""
    folder = tmp_path_factory.mktemp("two")
    domains = two_domains.write(folder / "a", 0), two_domains.write(folder / "b", 100)
    with mock.patch.dict(CATALOGUE, {"recolour": (Recolour, RecolourConfig)}):
        train_worker(two_domains.config(folder / "run", *domains), CPU)
        yield str(folder / "run")


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """A folder of images, numbered against the order in which they are written."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in reversed(range(5)):
        (folder / f"{i}.png").write_bytes(png(picture(i)))
    return str(folder)


def translated(run: str, direction: str, image: np.ndarray) -> np.ndarray:
    """What the run's averaged weights make of an image uint8 [H, W, C], in float64."""
    layer = open_run(run)[1].colours[direction]
    weight, bias = layer.weight.double().numpy()[:, :, 0, 0], layer.bias.double().numpy()
    levels = (image / 127.5 - 1.0) @ weight.T + bias
    return ((levels + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def assert_near(image: np.ndarray, expected: np.ndarray) -> None:
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 1  # of levels that lie between two


@pytest.mark.parametrize("direction", ["a2b", "b2a"])
def test_a_folder_of_images_becomes_one_in_the_order_of_names(
    run: str, photos: str, tmp_path: Path, capsys, direction: str
) -> None:
    out = tmp_path / "out"
    command = ["sample", run, "--translate", direction, "--images", photos, "--out", str(out)]
    assert main(command) == 0
    assert f"{out}/: 5 images" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [f"{i:05d}.png" for i in range(5)]
    for i in range(5):
        assert_near(pixels(out / f"{i:05d}.png"), translated(run, direction, picture(i)))
    assert not (pixels(out / "00000.png") == picture(0)).all()
    assert main([*command[:-1], str(tmp_path / "few"), "--num-images", "2"]) == 0
    assert len(list((tmp_path / "few").iterdir())) == 2
    # Of fewer images, none of before may stay among them.
    assert "holds other files already (00002.png, ...)" in refused(capsys, 2, *command, "--num-images", "2")


def test_a_grid_shows_each_source_beside_its_translation(run: str, photos: str, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    command = ["sample", run, "--translate", "a2b", "--images", photos, "--num-images", "1", "--out", str(out)]
    assert main(command) == 0
    assert_near(pixels(out), np.concatenate([picture(0), translated(run, "a2b", picture(0))], axis=1))


def test_shards_come_in_their_order_wherever_they_are(run: str, tmp_path: Path, bucket) -> None:
    folder = two_domains.write(tmp_path / "shards", 30, count=5, num_shards=1)
    for path in Path(folder).iterdir():
        bucket.upload_file(str(path), "pictures", f"some/{path.name}")
    for name, source in (("here", folder), ("there", "s3://pictures/some")):
        out = tmp_path / name
        assert main(["sample", run, "--translate", "b2a", "--images", source, "--out", str(out)]) == 0
        assert len(list(out.iterdir())) == 5
        for i in range(5):
            assert_near(pixels(out / f"{i:05d}.png"), translated(run, "b2a", picture(30 + i)))


def test_images_are_cut_and_resized_as_the_run_says(run: str, tmp_path: Path, capsys) -> None:
    large = np.zeros((2 * SIZE, 4 * SIZE), np.uint8)
    large[:, 2 * SIZE :] = 200  # grey, and twice as wide as it is high
    source = tmp_path / "large"
    source.mkdir()
    Image.fromarray(large).save(source / "wide.png")
    out = tmp_path / "out"
    command = ["sample", run, "--translate", "a2b", "--images", str(source), "--out", str(out)]
    line = refused(capsys, 1, *command)
    assert line.startswith("gmdist: --images: wide.png: the image is 32x16, but data.image_size is 8")
    assert "set data.resize" in line
    assert not out.exists()
    assert main([*command, "data.resize=area"]) == 0
    expected = np.zeros((SIZE, SIZE, 3), np.uint8)
    expected[:, SIZE // 2 :] = 200
    assert_near(pixels(out / "00000.png"), translated(run, "a2b", expected))


def test_what_cannot_be_decoded_is_left_out_and_named(run: str, photos: str, tmp_path: Path, capsys) -> None:
    (Path(photos) / "1.png").write_bytes(b"no image")
    command = ["sample", run, "--translate", "a2b", "--images", photos, "--num-images", "3", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "3 images, 1 that cannot be decoded left out (1.png: not a JPEG" in capsys.readouterr().out
    for place, i in enumerate((0, 2, 3)):
        assert_near(pixels(tmp_path / f"out/{place:05d}.png"), translated(run, "a2b", picture(i)))
    for i in range(5):
        (Path(photos) / f"{i}.png").write_bytes(b"no image")
    line = refused(capsys, 1, *command, str(tmp_path / "none"))
    assert f"--images: {photos}: none of its images can be decoded (0.png: not a JPEG" in line


def test_what_cannot_be_is_one_line(run: str, photos: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    sample = ["sample", run, "--out", str(out)]
    a2b = [*sample, "--translate", "a2b"]
    assert "--images: missing; --translate a2b needs it" in refused(capsys, 2, *a2b)
    assert f"--translate: missing; --images {photos} needs it" in refused(capsys, 2, *sample, "--images", photos)
    a2b += ["--images", photos]
    words = "--translate: 'a2c'; must be one of a2b, b2a"
    assert words in refused(capsys, 2, *sample, "--translate", "a2c", "--images", photos)
    assert "--num-images: 0; must be at least 1" in refused(capsys, 2, *a2b, "--num-images", "0")
    for other in (("--label", "1"), ("--steps", "3"), ("--show", "reconstructions")):
        assert f"{other[0]}: does not go with --translate" in refused(capsys, 2, *a2b, *other)
    (tmp_path / "empty").mkdir()
    assert "--images: " in (line := refused(capsys, 1, *a2b[:-1], str(tmp_path / "empty")))
    assert f"{tmp_path}/empty: no images (" in line
    assert f"--images: {tmp_path}/no: no such folder" in refused(capsys, 1, *a2b[:-1], str(tmp_path / "no"))
    write_shards([("k", {"txt": b"words alone"})], str(tmp_path / "texts"))
    line = refused(capsys, 1, *a2b[:-1], str(tmp_path / "texts"))
    assert "none of its images can be decoded" in line
    assert "no image among its members ['txt']" in line
    with mock.patch.object(Recolour, "translate", Recolour.__mro__[1].translate):
        # Said before the run is opened: it has no checkpoint.
        (tmp_path / "config").mkdir()
        (tmp_path / "config/config.yaml").write_bytes((Path(run) / "config.yaml").read_bytes())
        words = "--translate: family 'recolour' translates no images; those that do: "
        assert words in refused(capsys, 2, "sample", str(tmp_path / "config"), *a2b[2:])
    assert not out.exists()


def test_a_model_that_gives_no_numbers_is_said(run: str, photos: str, tmp_path: Path, capsys) -> None:
    def translate(family, image, direction):
        return torch.full_like(image, torch.nan)

    command = ["sample", run, "--translate", "a2b", "--images", photos, "--out", str(tmp_path / "out")]
    with mock.patch.object(Recolour, "translate", translate):
        assert "the model's images are not finite" in refused(capsys, 1, *command)
    assert not (tmp_path / "out").exists()
