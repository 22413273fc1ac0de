"""The embedded data sets: all of them, in two splits that share nothing, and still what they were made from."""

import string
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gmdist.cli import main
from gmdist.data import glyphs
from gmdist.data.config import DataConfig
from gmdist.data.decode import decode_image
from gmdist.data.fetch import Shards
from gmdist.data.index import check_folder
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.samples import DIGITS_SIZE, IMAGE_SHAPES, make
from gmdist.data.samples import digits as embedded
from gmdist.errors import ConfigError, DataError
from gmdist.images import to_uint8

COUNTS = {"train": 1501, "test": 296}


@pytest.mark.parametrize("split", COUNTS)
def test_the_splits_are_whole_and_sound(digits: Path, split: str) -> None:
    folder = digits / split
    assert check_folder(str(folder)) == []
    manifest = Manifest.load(str(folder))
    assert manifest.num_samples == COUNTS[split]
    assert manifest.classes == tuple("0123456789")
    assert len(manifest.shards) > 2  # or there are no lanes to shuffle with
    config = DataConfig(train="", batch_size=1, image_size=DIGITS_SIZE, channels=1, num_classes=10)
    batch = Loader(config, str(folder)).first(COUNTS[split]).batch
    assert batch["image"].shape == (COUNTS[split], 1, 32, 32)
    assert torch.bincount(batch["label"]).min() >= COUNTS[split] // 10 - 5
    # The ink is there: neither an empty image nor one of another range.
    assert (batch["image"].amin(dim=(1, 2, 3)) < -0.9).all()
    assert (batch["image"].amax(dim=(1, 2, 3)) > 0.5).all()


def test_no_image_is_in_both_splits() -> None:
    train, test = ({key: members["png"] for key, members in embedded(split)} for split in COUNTS)
    assert (len(train), len(test)) == (1501, 296)
    assert not train.keys() & test.keys()
    assert sorted(train | test) == [f"{i:04d}" for i in range(1797)]
    assert not set(train.values()) & set(test.values())


def test_they_are_the_digits_of_scikit_learn(digits: Path) -> None:
    folder = str(digits / "test")
    config = DataConfig(train="", batch_size=1, image_size=DIGITS_SIZE, channels=1, num_classes=10)
    loader = Loader(config, folder)
    batch = loader.first(loader.num_samples).batch
    large = to_uint8(batch["image"])[:, :, :, 0].numpy().astype(float)
    small = large.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    source = load_digits()
    read = loader.datasets[0]
    shards, indices = read.tape.locate(batch["key"].numpy())
    for image, label, shard, index in zip(small, batch["label"].tolist(), shards, indices, strict=True):
        number = int(read.shards.index(int(shard)).keys[int(index)])
        assert source.target[number] == label
        # Bicubic enlargement overshoots at edges and is cut at black and white; other digits are 50 levels away.
        assert np.abs(image - source.images[number] * 255 / 16).mean() < 16


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    names = "digits, digits-color, glyphs, glyphs-color, glyphs-serif, glyphs-sans"
    with pytest.raises(ConfigError, match=rf"no embedded data set 'mnist'; there are: {names}$"):
        make("mnist", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "make", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert f"NAME {', '.join(IMAGE_SHAPES)} ".replace(", glyphs-sans", " or glyphs-sans") in words


def test_making_the_digits_again_changes_nothing_and_never_overwrites(tmp_path: Path) -> None:
    first = make("digits", str(tmp_path / "digits"))
    shard = tmp_path / "digits/train/shard-000000.tar"
    before = shard.stat().st_mtime_ns
    again = make("digits", str(tmp_path / "digits"))
    assert {split: manifest.hash for split, manifest in again.items()} == {s: m.hash for s, m in first.items()}
    assert shard.stat().st_mtime_ns == before
    (tmp_path / "digits/test").rename(tmp_path / "digits/other")
    (tmp_path / "digits/train").rename(tmp_path / "digits/test")
    with pytest.raises(DataError, match="test: holds another data set"):
        make("digits", str(tmp_path / "digits"))


def test_an_interrupted_make_is_finished(tmp_path: Path) -> None:
    wanted = make("digits", str(tmp_path / "digits"))["train"].hash
    folder = tmp_path / "digits/train"
    (folder / "manifest.json").unlink()
    (folder / "shard-000015.tar").unlink()
    assert make("digits", str(tmp_path / "digits"))["train"].hash == wanted
    assert Manifest.load(str(folder)).classes == tuple("0123456789")
    (folder / "manifest.json").unlink()
    (folder / "shard-000003.tar").write_bytes(b"somebody's own")
    with pytest.raises(DataError, match="train: holds another data set"):
        make("digits", str(tmp_path / "digits"))
    assert (folder / "shard-000003.tar").read_bytes() == b"somebody's own"


def test_coloured_digits_are_dark_strokes_on_light(tmp_path: Path) -> None:
    grey, coloured = (dict(embedded("test", colour=colour)) for colour in (False, True))
    assert grey.keys() == coloured.keys()
    grounds = set()
    for key, members in coloured.items():
        assert members["cls"] == grey[key]["cls"]
        ink = decode_image(grey[key]["png"], 1)[:, :, 0] / 255.0
        seen = decode_image(members["png"], 3) / 255.0
        below = seen[ink == 0.0]
        above = seen[ink == ink.max()]
        assert (below == below[0]).all()
        grounds.add(tuple(below[0]))
        # By the luma of ITU-R BT.709, of which strokes have less.
        assert below[0] @ (0.2126, 0.7152, 0.0722) > above[0] @ (0.2126, 0.7152, 0.0722) + 0.2
        np.testing.assert_allclose(seen - below[0], (ink / ink.max())[:, :, None] * (above[0] - below[0]), atol=0.01)
    assert len(grounds) == 5  # white, and what is as light
    made = make("digits-color", str(tmp_path / "data"))
    assert {split: manifest.num_samples for split, manifest in made.items()} == COUNTS
    assert made["train"].classes == tuple("0123456789")


def test_grey_digits_are_read_as_rgb_beside_coloured_ones(digits: Path) -> None:
    grey, rgb = (DataConfig(1, DIGITS_SIZE, channels=channels) for channels in (1, 3))
    one, other = (Loader(config, str(digits / "test")).first(20).batch["image"] for config in (grey, rgb))
    assert torch.equal(other, one.expand(-1, 3, -1, -1))


# Glyphs.


@pytest.fixture(scope="module")
def all_glyphs() -> list[glyphs.Glyph]:
    return glyphs.glyphs()


def test_there_are_some_20000_glyphs(all_glyphs: list[glyphs.Glyph]) -> None:
    assert 18_000 < len(all_glyphs) < 25_000
    characters = {glyph.character for glyph in all_glyphs}
    assert 1_000 < len(characters) < 2_000
    assert set(string.ascii_letters + string.digits + string.punctuation + "äñжΩ") < characters
    assert {glyph.face for glyph in all_glyphs} == set(glyphs._FACES)
    assert not any(unicodedata.category(c)[0] in "CZM" for c in characters)
    assert len({glyph.ink.tobytes() for glyph in all_glyphs}) == len(all_glyphs)
    assert len({glyph.key for glyph in all_glyphs}) == len(all_glyphs)


def test_glyphs_are_centred_in_a_margin(all_glyphs: list[glyphs.Glyph]) -> None:
    for glyph in all_glyphs[::7]:
        left, top, right, bottom = glyph.ink.getbbox()
        assert glyph.ink.size == (64, 64)
        assert abs(left + right - 64) <= 1
        assert abs(top + bottom - 64) <= 1
        assert min(left, top) >= 3
    # An o is smaller than an O: scaled to the frame, nobody could tell them apart.
    ink = {glyph.character: glyph.ink.getbbox() for glyph in all_glyphs if glyph.face == "DejaVuSans"}
    assert ink["o"][3] - ink["o"][1] < 0.8 * (ink["O"][3] - ink["O"][1])


def test_tex_fonts_have_the_characters_that_they_say(all_glyphs: list[glyphs.Glyph]) -> None:
    # Their "<" is an inverted exclamation mark, and much else is not what Unicode says.
    characters = {glyph.character for glyph in all_glyphs if glyph.face == "cmr10"}
    assert characters == set(string.ascii_letters + string.digits)


def test_every_character_is_in_both_splits_and_no_image(all_glyphs: list[glyphs.Glyph]) -> None:
    parts = glyphs.split(all_glyphs)
    train, test = ({glyph.key for glyph in parts[name]} for name in ("train", "test"))
    assert not train & test
    assert len(train | test) == len(all_glyphs)
    assert 0.12 < len(test) / len(all_glyphs) < 0.18
    for part in parts.values():
        assert {glyph.character for glyph in part} == {glyph.character for glyph in all_glyphs}
    assert {glyph.face for glyph in parts["test"]} == set(glyphs._FACES)


def test_captions_say_what_is_seen(all_glyphs: list[glyphs.Glyph]) -> None:
    def caption(key: str, colour: bool) -> str:
        (glyph,) = (glyph for glyph in all_glyphs if glyph.key == key)
        return glyphs.sample(glyph, 0, colour)[1]["txt"].decode()

    assert caption("0061-DejaVuSerif-Bold", False) == "latin small letter a, serif, bold"
    assert caption("0416-STIXGeneralItalic", False) == "cyrillic capital letter zhe, times, italic"
    for glyph in all_glyphs[::501]:
        members = glyphs.sample(glyph, 0, True)[1]
        above, below = members["txt"].decode().rpartition(", ")[2].split(" on ")
        seen = decode_image(members["png"], 3)
        assert tuple(seen[0, 0]) == glyphs._PALETTE[below]
        ink = np.asarray(glyph.ink)
        assert (seen[ink == 255] == glyphs._PALETTE[above]).all()
        grey = decode_image(glyphs.sample(glyph, 0, False)[1]["png"], 1)
        assert np.array_equal(grey[:, :, 0], ink)


def test_colours_stand_out() -> None:
    assert glyphs._contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    pairs = glyphs.colour_pairs()
    assert ("red", "white") in pairs
    assert ("grey", "blue") not in pairs
    assert {name for pair in pairs for name in pair} == set(glyphs._PALETTE)


def test_serif_and_sans_are_the_two_parts_of_the_glyphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_glyphs: list[glyphs.Glyph]
) -> None:
    serifs = {glyph.face for glyph in all_glyphs if glyph.has_serifs}
    told = {face: glyphs._FACES[face] for face in {glyph.face for glyph in all_glyphs} - serifs}
    assert all("sans-serif" in name or "monospace" in name for name in told.values())
    assert {glyphs._FACES[face].split(",")[0] for face in serifs} == {"serif", "times", "computer modern"}
    monkeypatch.setattr(glyphs, "glyphs", lambda: all_glyphs[:600])
    found = {}
    for name in ("glyphs", "glyphs-serif", "glyphs-sans"):
        for split, manifest in make(name, str(tmp_path / name)).items():
            shards = Shards(str(tmp_path / name / split), manifest)
            for number, shard in enumerate(manifest.shards):
                for index in range(shard.samples):
                    key = shards.index(number).keys[index]
                    members = {extension: bytes(part) for extension, part in shards.read(number, index).items()}
                    found.setdefault((name, split), {})[key] = members
            found[name, "classes"] = manifest.classes
    assert found["glyphs-serif", "classes"] == found["glyphs-sans", "classes"] == found["glyphs", "classes"]
    for split in COUNTS:
        serif, sans = found["glyphs-serif", split], found["glyphs-sans", split]
        assert serif.keys() == {key for key in found["glyphs", split] if key.partition("-")[2] in serifs}
        assert serif | sans == found["glyphs", split]
        assert not serif.keys() & sans.keys()


@pytest.mark.parametrize(("name", "channels"), [("glyphs", 1), ("glyphs-color", 3)])
def test_glyphs_are_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_glyphs: list[glyphs.Glyph], name: str, channels: int
) -> None:
    monkeypatch.setattr(glyphs, "glyphs", lambda: all_glyphs[:600])
    made = make(name, str(tmp_path / "one"))
    assert made["train"].num_samples + made["test"].num_samples == 600
    assert made["train"].classes == made["test"].classes
    assert made["train"].classes[:2] == ("exclamation mark", "quotation mark")
    assert made["train"].num_labels == len(made["train"].classes)
    config = DataConfig(train="", batch_size=1, image_size=64, channels=channels, num_classes=len(made["test"].classes))
    loader = Loader(config, str(tmp_path / "one/test"))
    batch = loader.first(loader.num_samples).batch
    assert batch["image"].shape == (made["test"].num_samples, channels, 64, 64)
    assert batch["image"].std() > 0.3
    assert check_folder(str(tmp_path / "one/train")) == []
    again = make(name, str(tmp_path / "one"))
    assert {split: m.hash for split, m in again.items()} == {split: m.hash for split, m in made.items()}
    with pytest.raises(DataError, match="train: holds another data set"):
        make("glyphs" if name != "glyphs" else "glyphs-color", str(tmp_path / "one"))


def test_glyphs_are_drawn_alike_everywhere(all_glyphs: list[glyphs.Glyph]) -> None:
    code = "from gmdist.data import glyphs; import zlib\n"
    code += "print(zlib.crc32(b''.join(ink.tobytes() for _, ink in glyphs._drawn('cmtt10'))))"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    here = b"".join(glyph.tobytes() for _, glyph in glyphs._drawn("cmtt10"))
    assert int(other) == zlib.crc32(here)
