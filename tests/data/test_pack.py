"""Packing: folders of images become shards, the same folder the same bytes, and what cannot be packed is named."""

import io
import multiprocessing
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from gmdist import storage
from gmdist.data.config import DataConfig
from gmdist.data.encode import Encoding
from gmdist.data.fetch import Shards
from gmdist.data.index import check_folder, index_folder
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.pack import pack, write_shards
from gmdist.data.sources import File
from gmdist.errors import ConfigError, DataError


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# A PNG of one pixel with 16 bits a channel, which Pillow cuts to 8.
DEEP_RGB = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(b"\0" + bytes(range(6))))
    + _chunk(b"IEND", b"")
)


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
    places = [(s, i) for s, shard in enumerate(shards.manifest.shards) for i in range(shard.samples)]
    found = {
        shards.index(s).keys[i]: {name: bytes(content) for name, content in shards.read(s, i).items()}
        for s, i in places
    }
    assert len(found) == len(places)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    (tmp_path / "empty" / "cat" / "a.pdf").write_bytes(b"%PDF")
    refusal(tmp_path / "empty", "empty: no images")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"damaged")
    fill(tmp_path / "flat", ["a.png"])
    for inside in ("flat", "flat/packed"):
        with pytest.raises(DataError, match="lies in the source, .*flat; choose a folder outside of it"):
            pack(str(tmp_path / "flat"), str(tmp_path / inside))
    with pytest.raises(DataError, match="none of the images can be read"):
        pack(str(tmp_path / "damaged"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


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
    (tmp_path / "out" / "pack.json").unlink()
    del before["pack.json"], before["manifest.json"]
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
    (source / "deep_rgb.png").write_bytes(DEEP_RGB)
    image(0).save(source / "moving.webp", save_all=True, append_images=[image(1), image(2)])
    image(0).save(source / "moving_png.png", save_all=True, append_images=[image(1), image(2)])
    for other in ("still.gif", "scan.TIFF", "old.bmp"):
        (source / other).write_bytes(b"whatever")
    packed = pack(str(source), str(tmp_path / "out"), Encoding(image_size), max_unreadable=1.0)
    names, reasons = zip(*(line.split(": ", 1) for line in packed.unreadable), strict=True)
    bad = ["anim.png", "deep.png", "deep_rgb.png", "empty.png", "half.jpg", "moving.webp", "moving_png.png"]
    assert sorted(names) == sorted([*bad, "old.bmp", "scan.TIFF", "still.gif"])
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
    packed = pack(str(source), str(tmp_path / "out"), Encoding(8))
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
    first = pack(str(source), str(tmp_path / "one"), Encoding(5), shard_mib=0.01)
    shutil.copytree(source, tmp_path / "moved")
    again = pack(str(tmp_path / "moved"), str(tmp_path / "two"), Encoding(5), shard_mib=0.01)
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


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", [f"{i}.png" for i in range(9)])
    (source / "c.png").write_bytes(b"damaged")
    told: list[tuple[int, int]] = []
    pack(
        str(source),
        str(tmp_path / "out"),
        shard_mib=0.003,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert len(told) > 2
    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]}


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
    pack(str(tmp_path / "photos"), str(tmp_path / "packed"), Encoding(16))
    config = DataConfig(train=str(tmp_path / "packed"), batch_size=1, image_size=16)
    image = Loader(config, config.train).first(1).batch["image"][0]
    assert image[0, :, -1].min() > 0.9  # red on the right
    assert image[2, :, 0].min() > 0.9  # blue on the left


def test_the_reason_is_told_when_no_image_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the images can be read; a\.png: not a JPEG, PNG or WebP image"):
        pack(str(tmp_path / "photos"), str(tmp_path / "packed"), Encoding(16))


# Resuming.


def run(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "gmdist.cli", "data", "pack", *arguments], stderr=subprocess.PIPE)


def below(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images, two of which are damaged."""
    source = fill(tmp_path_factory.mktemp("photos"), [f"{'cat' if i % 3 else 'dog'}/{i}.png" for i in range(240)])
    for name in ("cat/bad.png", "dog/bad.png"):
        (source / name).write_bytes(b"damaged")
    return source


SETTINGS = {"encoding": Encoding(96, "webp"), "shard_mib": 0.025}


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them without interruption."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    manifest = pack(str(photos), str(folder), **SETTINGS).manifest
    assert manifest.num_samples == 240
    assert len(manifest.shards) > 20
    return folder


def test_any_number_of_processes_makes_the_same_bytes(photos: Path, packed: Path, tmp_path: Path) -> None:
    three = pack(str(photos), str(tmp_path / "out"), **SETTINGS, processes=3)
    assert files(tmp_path / "out") == files(packed)
    assert three.manifest.hash == Manifest.load(str(packed)).hash
    assert three.unreadable == pack(str(photos), str(packed), **SETTINGS).unreadable
    assert [line.partition(":")[0] for line in sorted(three.unreadable)] == ["cat/bad.png", "dog/bad.png"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_pack_leaves_nothing_and_goes_on_to_the_same_bytes(photos: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--image-size", "96", "--format", "webp", "--shard-mib", "0.025", "--processes", "2"]
    for num_shards in (0, 2, 9):
        process = run(str(photos), str(out), *options)
        wait_until(lambda: len(list(out.glob("*.tar"))) > num_shards)  # noqa: B023
        children = below(process.pid)
        assert len(children) >= 2
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_running, children)))  # noqa: B023
        assert not (out / "manifest.json").exists()
    (out / f".shard-000001.tar.{'0' * 32}.tmp").write_bytes(b"a part")
    finished = run(str(photos), str(out), *options)
    assert b"left out cat/bad.png: not a JPEG" in finished.communicate()[1]
    assert finished.returncode == 0
    assert files(out) == files(packed)


def test_finished_shards_are_kept(photos: Path, packed: Path, tmp_path: Path) -> None:
    written = []

    def stop(done: int, total: int) -> None:
        written.append(done)
        if len(written) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(photos), str(tmp_path / "out"), **SETTINGS, on_progress=stop)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(times) == 8
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"something else")
    (tmp_path / "out" / "shard-000001.index.safetensors").unlink()
    pack(str(photos), str(tmp_path / "out"), **SETTINGS)
    assert files(tmp_path / "out") == files(packed)
    kept = {name for name, time_ns in times.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time_ns}
    assert {"shard-000002.tar", "shard-000003.tar"} <= kept <= {f"shard-{i:06d}.tar" for i in range(2, 8)}


def test_a_part_of_another_pack_is_refused(photos: Path, tmp_path: Path) -> None:
    source = shutil.copytree(photos, tmp_path / "in")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), str(tmp_path / "out"), **SETTINGS, on_progress=stop)
    message = "out: holds a part of another pack: the source or the settings are not those that it was begun with"
    with pytest.raises(DataError, match=message):
        pack(str(source), str(tmp_path / "out"), Encoding(64, "webp"), shard_mib=0.025)
    image(5).save(source / "dog/0.png")
    with pytest.raises(DataError, match=message):
        pack(str(source), str(tmp_path / "out"), **SETTINGS)


def test_a_finished_pack_is_left_as_it_is(photos: Path, packed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    again = pack(str(photos), str(packed), **SETTINGS)
    assert again.was_there
    assert again.manifest == Manifest.load(str(packed))
    with pytest.raises(DataError, match="holds a data set already"):
        pack(str(photos), str(packed), Encoding(64))
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_a_killed_process_ends_the_pack(photos: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DataError, match="a process was killed.*goes on where it stopped"):
        pack(str(photos), str(tmp_path / "out"), **SETTINGS, processes=2, on_progress=kill)
    assert multiprocessing.active_children() == []


def test_packing_into_a_bucket(photos: Path, packed: Path, bucket) -> None:
    folder = "s3://pictures/packed"

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(photos), folder, **SETTINGS, on_progress=stop)
    bucket.create_multipart_upload(Bucket="pictures", Key="packed/shard-000000.tar")
    pack(str(photos), folder, **SETTINGS)
    there = {name: storage.read(f"{folder}/{name}") for name in storage.list_names(folder)}
    del there["manifest.json"]  # it holds the objects' ETags
    assert there == {name: content for name, content in files(packed).items() if name != "manifest.json"}
    assert "Uploads" not in bucket.list_multipart_uploads(Bucket="pictures")
    assert check_folder(folder) == []


# What is left out.


def test_unreadable_images_have_a_budget(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", [f"{i}.png" for i in range(18)])
    (source / "bad.png").write_bytes(b"damaged")
    told: list[str] = []
    assert len(pack(str(source), str(tmp_path / "one"), on_unreadable=told.append).unreadable) == 1  # one always may
    assert told == ["bad.png: not a JPEG, PNG or WebP image"]
    with pytest.raises(DataError, match=r"in: 1 of 19 .* --max-unreadable 0 allows 0; raise it .*: bad\.png: not"):
        pack(str(source), str(tmp_path / "none"), max_unreadable=0.0)
    assert not (tmp_path / "none" / "manifest.json").exists()
    assert pack(str(source), str(tmp_path / "none"), max_unreadable=0.1).manifest.num_samples == 18
    (source / "worse.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="2 of 20 images cannot be read, and --max-unreadable 0.01 allows 1"):
        pack(str(source), str(tmp_path / "two"))
    assert pack(str(source), str(tmp_path / "three"), max_unreadable=0.1).manifest.num_samples == 18


def test_files_that_vanish_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "in", [f"{i}.png" for i in range(5)])
    read = File.read

    def vanish(file: File, root: str) -> dict[str, bytes]:
        (source / "3.png").unlink(missing_ok=True)
        return read(file, root)

    monkeypatch.setattr(File, "read", vanish)
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.unreadable == ["3.png: No such file or directory"]
    assert sorted(samples(tmp_path / "out")) == ["0", "1", "2", "4"]


# Texts.


def test_texts_beside_images_go_with_them(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.JPG", "c.png", "c.jpg", "d.png", "e.png"])
    (source / "a.txt").write_text("a cat, žluťoučký")
    (source / "a.json").write_text('{"url": "x"}')
    (source / "b.txt").write_text("a dog")
    (source / "c.txt").write_text("two")
    (source / "d.txt").write_bytes(b"caf\xe9")
    (source / "e.json").write_text("{")
    (source / "alone.txt").write_text("no image")
    packed = pack(str(source), str(tmp_path / "out"), max_unreadable=0.5)
    assert sorted(packed.unreadable) == ["d.png: its .txt is no UTF-8", "e.png: its .json is no JSON"]
    read = {
        key: {e: m for e, m in members.items() if e in ("txt", "json")}
        for key, members in samples(tmp_path / "out").items()
    }
    assert read == {
        "a": {"txt": "a cat, žluťoučký".encode(), "json": b'{"url": "x"}'},
        "b": {"txt": b"a dog"},
        "c": {"txt": b"two"},
        "c_": {"txt": b"two"},
    }


def test_folders_of_img2dataset_are_no_classes(tmp_path: Path) -> None:
    names = [f"{part:05d}/{part:05d}{i:04d}.jpg" for part in range(2) for i in range(3)]
    source = fill(tmp_path / "in", names)
    assert pack(str(source), str(tmp_path / "classes")).manifest.classes == ("00000", "00001")
    for name in names:
        (source / name).with_suffix(".txt").write_text(name)
    (source / "00000_stats.json").write_text("{}")
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.manifest.classes == ()
    read = samples(tmp_path / "out")
    assert {members["txt"].decode() for members in read.values()} == set(names)
    assert all(sorted(members) == ["jpg", "txt"] for members in read.values())


def test_captioned_class_folders_have_both(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["cat/a.png", "dog/b.png"])
    (source / "dog/b.txt").write_text("a dog")
    assert pack(str(source), str(tmp_path / "out")).manifest.classes == ("cat", "dog")
    read = samples(tmp_path / "out")
    assert (read["dog-b"]["cls"], read["dog-b"]["txt"], sorted(read["cat-a"])) == (b"1", b"a dog", ["cls", "png"])


# Formats.


@pytest.mark.parametrize(("form", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_images_are_encoded_as_asked(tmp_path: Path, form: str, extension: str) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.jpg", "c.webp"])
    image(9, 8, 8).save(source / "grey.png")
    pack(str(source), str(tmp_path / "out"), Encoding(format=form))
    read = samples(tmp_path / "out")
    assert {name for members in read.values() for name in members} == {extension}
    for members in read.values():
        assert opened(members[extension]).format == form.upper()
    same = {"png": "a.png", "jpeg": "b.jpg", "webp": "c.webp"}[form]
    assert read[same[0]][extension] == (source / same).read_bytes()  # already so: not lossy twice
    assert opened(read["b"][extension]).size == (9, 6)


def test_quality_is_that_of_the_encoder(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    image(0, 64, 64, 3).save(source / "a.jpg", quality=100)
    sizes = []
    for quality in (20, None, 100):
        out = tmp_path / f"out{quality}"
        pack(str(source), str(out), Encoding(32, "jpeg", quality))
        sizes.append(len(samples(out)["a"]["jpg"]))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]
    pack(str(source), str(tmp_path / "low"), Encoding(format="jpeg", quality=20))  # asked: encoded anew
    assert len(samples(tmp_path / "low")["a"]["jpg"]) < (source / "a.jpg").stat().st_size


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding(0), "--image-size: 0; must be at least 1"),
        (Encoding(format="gif"), "--format: 'gif'; must be one of png, jpeg, webp"),
        (Encoding(8, quality=50), "--quality: 50; goes with --format jpeg or webp"),
        (Encoding(8, "jpeg", 0), "--quality: 0; must be from 1 to 100"),
    ],
)
def test_encodings_that_cannot_be_are_refused(encoding: Encoding, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoding.validate()


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(24), Encoding(format="jpeg", quality=80)])
def test_shards_are_about_as_large_as_asked(tmp_path: Path, encoding: Encoding) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(300):
        image(i, 20 + i % 40, 60, 3).save(source / f"{i}.png")
    manifest = pack(str(source), str(tmp_path / "out"), encoding, shard_mib=0.1).manifest
    sizes = [shard.num_bytes / 2**20 for shard in manifest.shards]
    assert len(sizes) > 3
    assert all(0.075 < size < 0.14 for size in sizes[:-1])
    assert sizes[-1] < 0.14


# Shards from shards.


def theirs(folder: Path, stream: list[tuple[str, dict[str, bytes]]], num_shards: int, form: int) -> Path:
    """Shards of another writer."""
    folder.mkdir()
    per_shard = len(stream) // num_shards
    for number in range(num_shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=form) as tar:
            for key, members in stream[number * per_shard : (number + 1) * per_shard]:
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def stream(count: int, name: str = "{:05d}") -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for number in range(count):
        png = io.BytesIO()
        image(number, 24, 24, 3).save(png, "PNG")
        members = {"png": png.getvalue(), "txt": f"number {number}".encode(), "seg.npy": bytes(number)}
        found.append((name.format(number), members))
    return found


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("shard_mib", [0.02, 0.5])  # splits, merges
def test_shards_are_packed_anew_sample_for_sample(tmp_path: Path, form: int, shard_mib: float) -> None:
    names = "v1.0/{:05d}" if form == tarfile.USTAR_FORMAT else "ž" * 70 + "/" + "n" * 90 + "{:05d}"
    wanted = stream(60, names)
    source = theirs(tmp_path / "in", wanted, 6, form)
    manifest = pack(str(source), str(tmp_path / "out"), shard_mib=shard_mib).manifest
    assert len(manifest.shards) == (1 if shard_mib > 0.1 else 24 if form != tarfile.USTAR_FORMAT else 12)
    assert check_folder(str(tmp_path / "out")) == []
    locations = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    stock = webdataset.WebDataset(locations, shardshuffle=False)
    assert [(s["__key__"], {e: s[e] for e in s if not e.startswith("__")}) for s in stock] == wanted
    again = pack(str(source), str(tmp_path / "two"), shard_mib=shard_mib, processes=2)
    assert again.manifest.hash == manifest.hash


@pytest.mark.parametrize("processes", [1, 2])
def test_a_large_shard_is_gone_on_with_in_its_middle(tmp_path: Path, processes: int) -> None:
    source = theirs(tmp_path / "in", stream(120), 2, tarfile.USTAR_FORMAT)
    wanted = pack(str(source), str(tmp_path / "whole"), shard_mib=0.02).manifest
    told: list[int] = []

    def stop(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), str(tmp_path / "out"), shard_mib=0.02, processes=processes, on_progress=stop)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(wanted.shards) == 28
    finished = pack(str(source), str(tmp_path / "out"), shard_mib=0.02, processes=processes)
    assert finished.manifest.hash == wanted.hash
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert any(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())


def test_repacked_images_are_encoded_as_asked(tmp_path: Path, bucket) -> None:
    wanted = stream(20)
    wanted[3][1]["png"] = b"damaged"
    theirs(tmp_path / "in", wanted, 2, tarfile.GNU_FORMAT)
    for path in (tmp_path / "in").iterdir():
        storage.copy_from_local(str(path), f"s3://pictures/in/{path.name}")
    packed = pack("s3://pictures/in", str(tmp_path / "out"), Encoding(8, "jpeg"), max_unreadable=0.05)
    assert packed.unreadable == ["s3://pictures/in/00000.tar: 00003: not a JPEG, PNG or WebP image"]
    read = samples(tmp_path / "out")
    assert len(read) == 19
    for key, members in wanted[:3] + wanted[4:]:
        assert opened(read[key].pop("jpg")).size == (8, 8)
        assert read[key] == {e: m for e, m in members.items() if e != "png"}


def test_repacked_labels_keep_their_names(tmp_path: Path) -> None:
    pack(str(fill(tmp_path / "in", ["cat/a.png", "dog/b.png"])), str(tmp_path / "one"))
    manifest = pack(str(tmp_path / "one"), str(tmp_path / "two"), Encoding(4)).manifest
    assert (manifest.classes, manifest.num_labels) == (("cat", "dog"), 2)


def test_keys_that_meet_in_a_shard_are_told_apart(tmp_path: Path) -> None:
    theirs(tmp_path / "in", stream(4) + stream(4), 2, tarfile.USTAR_FORMAT)
    pack(str(tmp_path / "in"), str(tmp_path / "out"))
    assert sorted(samples(tmp_path / "out")) == sorted(f"{i:05d}{s}" for i in range(4) for s in ("", "_"))
    assert check_folder(str(tmp_path / "out")) == []


def test_unsound_shards_are_not_packed(tmp_path: Path, bucket) -> None:
    source = theirs(tmp_path / "in", stream(8), 2, tarfile.USTAR_FORMAT)
    shard = source / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"in/00001\.tar: ends at byte 4000.*it was cut"):
        pack(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    image(0).save(source / "a.png")
    with pytest.raises(DataError, match=r"has both shards .* and images \(a\.png"):
        pack(str(source), str(tmp_path / "out2"))
    with pytest.raises(DataError, match="s3://pictures/none: no .tar shards here; images are packed from a local"):
        pack("s3://pictures/none", str(tmp_path / "out2"))
