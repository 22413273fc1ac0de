"""Packing: folders of images become shards, the same folder the same bytes, and what cannot be packed is named."""

import io
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmdist.data.fetch import Shards
from gmdist.data.loader import DataConfig, Loader
from gmdist.data.pack import pack, write_shards
from gmdist.data.shard import Manifest, check_folder, index_folder
from gmdist.errors import DataError


def image(number: int, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape or (6, 9, 3), dtype=np.uint8))


def fill(folder: Path, names: list[str]) -> Path:
    """A folder with an image of noise under each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image(number).save(folder / name)
    return folder


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a data set by key."""
    shards = Shards(str(folder), Manifest.load(str(folder)))
    read = [shards.read(s, i) for s, shard in enumerate(shards.manifest.shards) for i in range(shard.samples)]
    found = {sample.key: members for sample, members in read}
    assert len(found) == len(read)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["dog/b.png", "cat/a.jpg", "cat/deep/er/c.webp", "dog/d.JPEG"])
    (source / "notes.txt").write_text("no image")
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.unreadable == []
    assert packed.manifest == Manifest.load(str(tmp_path / "out"))
    assert (packed.manifest.classes, packed.manifest.num_labels) == (("cat", "dog"), 2)
    assert samples(tmp_path / "out") == {
        "cat-a": {"jpg": (source / "cat/a.jpg").read_bytes(), "cls": b"0"},
        "cat-deep-er-c": {"webp": (source / "cat/deep/er/c.webp").read_bytes(), "cls": b"0"},
        "dog-b": {"png": (source / "dog/b.png").read_bytes(), "cls": b"1"},
        "dog-d": {"jpeg": (source / "dog/d.JPEG").read_bytes(), "cls": b"1"},
    }


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.png"])
    manifest = pack(str(source), str(tmp_path / "out")).manifest
    assert (manifest.classes, manifest.num_labels) == ((), 0)
    assert {key: sorted(members) for key, members in samples(tmp_path / "out").items()} == {"a": ["png"], "b": ["png"]}


def test_sources_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    def refusal(source: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            pack(str(source), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    refusal(tmp_path / "missing", "missing: no such folder")
    refusal(fill(tmp_path / "mixed", ["a.png", "cat/b.png"]), r"mixed: has both images \(a\.png.*subfolders \(cat")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", r"empty: no images \(jpg, jpeg, png, webp\)")
    (tmp_path / "empty" / "cat").mkdir()
    (tmp_path / "empty" / "cat" / "a.gif").write_bytes(b"GIF89a")
    refusal(tmp_path / "empty", "empty: no images")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"damaged")
    refusal(tmp_path / "damaged", "none of the images can be read")


def test_linked_folders_are_folders(tmp_path: Path) -> None:
    fill(tmp_path / "store", ["cats/a.png", "cats/deep/b.png"])
    source = fill(tmp_path / "in", ["dogs/c.png"])
    (source / "cats").symlink_to(tmp_path / "store" / "cats")
    (source / "dogs" / "again").symlink_to(source / "dogs")  # a circle ends
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.manifest.classes == ("cats", "dogs")
    labels = {key: members["cls"] for key, members in samples(tmp_path / "out").items()}
    assert labels == {"cats-a": b"0", "cats-deep-b": b"0", "dogs-c": b"1"}


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["cats/a.png", "dogs/b.png"])
    (source / "birds" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="in/birds: no images in this class folder; .*delete it"):
        pack(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    hidden = [".thumbnails/a.png", "cat/.a.png", "cat/.cache/a.png", "cat/._a.png"]
    source = fill(tmp_path / "in", ["cat/a.png", *hidden])
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.manifest.classes == ("cat",)
    assert sorted(samples(tmp_path / "out")) == ["cat-a"]


def test_a_destination_in_use_is_kept(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["a.png"])
    pack(str(source), str(tmp_path / "out"))
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match="out: holds a data set already; choose another folder or delete it"):
        pack(str(fill(source, ["b.png"])), str(tmp_path / "out"))
    # Shards that were never indexed are somebody's data set too.
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="out: holds a data set already"):
        pack(str(source), str(tmp_path / "out"))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("image_size", [None, 4])
def test_unreadable_files_are_listed_and_left_out(tmp_path: Path, image_size: int | None) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.png"])
    (source / "empty.png").write_bytes(b"")
    (source / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0 damaged")
    image(0).save(source / "anim.gif")
    (source / "anim.gif").rename(source / "anim.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(source / "deep.png")
    packed = pack(str(source), str(tmp_path / "out"), image_size)
    names, reasons = zip(*(line.split(": ", 1) for line in packed.unreadable), strict=True)
    assert sorted(names) == ["anim.png", "deep.png", "empty.png", "half.jpg"]
    assert all(reasons)
    assert not any("0x" in reason for reason in reasons)
    assert sorted(samples(tmp_path / "out")) == ["a", "b"]


def test_image_size_makes_squares_of_any_image(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    image(0, 30, 50, 3).save(source / "wide.jpg")
    image(1, 9, 5).save(source / "grey.png")
    image(2, 4, 4, 4).save(source / "alpha.webp")
    image(3, 8, 8, 3).quantize(4).save(source / "palette.png")
    packed = pack(str(source), str(tmp_path / "out"), image_size=8)
    assert packed.unreadable == []
    read = {key: opened(members["png"]) for key, members in samples(tmp_path / "out").items()}
    assert {key: (png.size, png.mode) for key, png in read.items()} == {
        "wide": ((8, 8), "RGB"),
        "grey": ((8, 8), "L"),
        "alpha": ((8, 8), "RGB"),
        "palette": ((8, 8), "RGB"),
    }
    config = DataConfig(train="", batch_size=1, image_size=8)
    assert Loader(config, str(tmp_path / "out")).first(4).batch["image"].shape == (4, 3, 8, 8)


def test_the_same_folder_makes_the_same_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", [f"{c}/{i}.png" for c in "xyz" for i in range(7)])
    first = pack(str(source), str(tmp_path / "one"), 5, shard_mib=0.01)
    shutil.copytree(source, tmp_path / "moved")
    again = pack(str(tmp_path / "moved"), str(tmp_path / "two"), 5, shard_mib=0.01)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert first.manifest.hash == again.manifest.hash
    # Neighbours in a shard are not of one class: a lane reads them one after another.
    labels = [members["cls"] for members in samples(tmp_path / "one").values()]
    assert sum(a == b for a, b in pairwise(labels)) < 14


def test_shard_mib_splits(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", [f"{i}.png" for i in range(20)])
    manifest = pack(str(source), str(tmp_path / "out"), shard_mib=0.005).manifest
    assert len(manifest.shards) > 3
    assert [shard.name for shard in manifest.shards] == [f"shard-{i:06d}.tar" for i in range(len(manifest.shards))]
    assert all(shard.num_bytes < 0.005 * 2**20 + 12_000 for shard in manifest.shards)
    assert sorted(samples(tmp_path / "out")) == sorted(str(i) for i in range(20))


def test_any_file_name_makes_a_sound_data_set(tmp_path: Path) -> None:
    names = [
        "a.b.c.png",
        "a_b_c.png",
        "a b.png",
        "a.jpg",
        "a.png",
        "Žluťoučký kůň.png",
        "图像.png",
        "new\nline.png",
        "back\\slash.png",
        "n" * 200 + ".png",
        "n" * 199 + "m.png",
        "é" * 90 + ".png",
        "not utf-8 \udcff.png",
    ]
    source = fill(tmp_path / "in", [f"class 1.x/{name}" for name in names])
    manifest = pack(str(source), str(tmp_path / "out")).manifest
    assert manifest.classes == ("class 1.x",)
    assert check_folder(str(tmp_path / "out")) == []
    again, problems = index_folder(str(tmp_path / "out"))
    assert problems == []
    assert again.hash == manifest.hash
    read = samples(tmp_path / "out")
    assert {"class 1_x-图像", "class 1_x-a b", "class 1_x-a_b_c", "class 1_x-a_b_c_"} < set(read)
    images = {content for members in read.values() for name, content in members.items() if name != "cls"}
    assert images == {path.read_bytes() for path in (source / "class 1.x").iterdir()}


def test_progress_counts_every_file(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.png"])
    (source / "c.png").write_bytes(b"damaged")
    told = []
    pack(str(source), str(tmp_path / "out"), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_samples_are_dealt_out_to_a_number_of_shards(tmp_path: Path) -> None:
    stream = [(f"k{i}", {"cls": b"0"}) for i in range(10)]
    manifest = write_shards(stream, str(tmp_path), num_shards=4)
    assert [shard.samples for shard in manifest.shards] == [3, 3, 2, 2]
    assert sorted(samples(tmp_path)) == [f"k{i}" for i in range(10)]
    assert write_shards(stream[:2], str(tmp_path / "few"), num_shards=4).num_samples == 2
    assert check_folder(str(tmp_path / "few")) == []
    with pytest.raises(DataError):
        write_shards([], str(tmp_path / "none"))


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    # A camera held on its side: red above blue as stored, red to the right of blue as seen.
    stored = Image.new("RGB", (16, 16), "blue")
    stored.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    (tmp_path / "photos").mkdir()
    stored.save(tmp_path / "photos/a.png", exif=exif)
    pack(str(tmp_path / "photos"), str(tmp_path / "packed"), image_size=16)
    config = DataConfig(str(tmp_path / "packed"), 1, 16)
    image = Loader(config, config.train).first(1).batch["image"][0]
    assert image[0, :, -1].min() > 0.9  # red on the right
    assert image[2, :, 0].min() > 0.9  # blue on the left


def test_the_reason_is_told_when_no_image_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the images can be read; a\.png: not a JPEG, PNG or WebP image"):
        pack(str(tmp_path / "photos"), str(tmp_path / "packed"), image_size=16)
