"""Images on their way into a shard: kept, turned, resized, encoded anew, or listed as unreadable."""

import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmdist import storage
from gmdist.data.config import DataConfig
from gmdist.data.encode import Encoding
from gmdist.data.loader import Loader
from gmdist.data.pack import pack
from gmdist.errors import ConfigError, DataError
from tests.data.packing import fill, image, opened, samples, stream, theirs


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# A PNG of one pixel with 16 bits a channel, which Pillow cuts to 8.
DEEP_RGB = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(b"\0" + bytes(range(6))))
    + _chunk(b"IEND", b"")
)


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


def test_a_photo_whose_camera_writes_what_nobody_can_read_is_packed(tmp_path: Path) -> None:
    # A description that is a ratio, and the orientation.
    entries = struct.pack("<HHHIIHHIHHI", 2, 270, 5, 1, 38, 274, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<II", 3, 2)
    odd = Image.Exif()
    odd[0x0112] = 60000
    (tmp_path / "photos").mkdir()
    for name, said in (("a", exif), ("b", odd)):
        Image.new("RGB", (16, 8), "blue").save(tmp_path / f"photos/{name}.jpg", exif=said)
    packed = pack(str(tmp_path / "photos"), str(tmp_path / "packed"), Encoding(format="png"))
    assert packed.unreadable == []
    found = samples(tmp_path / "packed")
    assert [opened(found[key]["png"]).size for key in ("a", "b")] == [(8, 16), (16, 8)]


@pytest.mark.parametrize("encoding", [Encoding(64), Encoding(format="jpeg")])
def test_a_damaged_png_is_left_out_however_it_is_encoded(tmp_path: Path, encoding: Encoding) -> None:
    source = fill(tmp_path / "in", ["b.png"])
    image(0, 100, 100, 3).save(source / "a.png")
    content = bytearray((source / "a.png").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "a.png").write_bytes(content)
    packed = pack(str(source), str(tmp_path / "out"), encoding, max_unreadable=0.5)
    assert [line.partition(": ")[0] for line in packed.unreadable] == ["a.png"]


def test_an_image_is_of_the_format_of_its_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.jpg"])
    (source / "a.png").rename(source / "a.jpg")
    pack(str(source), str(tmp_path / "out"), Encoding(format="jpeg"))
    found = samples(tmp_path / "out")
    assert opened(found["a"]["jpg"]).format == "JPEG"
    assert found["b"]["jpg"] == (source / "b.jpg").read_bytes()
    pack(str(source), str(tmp_path / "png"), Encoding(format="png"))
    assert samples(tmp_path / "png")["a"]["png"] == (source / "a.jpg").read_bytes()


def test_the_reason_is_told_when_no_image_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the images can be read; a\.png: not a JPEG, PNG or WebP image"):
        pack(str(tmp_path / "photos"), str(tmp_path / "packed"), Encoding(16))


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
        (Encoding(0), "--image-size: 0; must be from 1 to 16384"),
        (Encoding(format="gif"), "--format: 'gif'; must be one of png, jpeg, webp"),
        (Encoding(8, quality=50), "--quality: 50; goes with --format jpeg or webp"),
        (Encoding(8, "jpeg", 0), "--quality: 0; must be from 1 to 100"),
    ],
)
def test_encodings_that_cannot_be_are_refused(encoding: Encoding, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoding.validate()


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
