"""What is packed: folders of images, with labels and captions, and shards; what cannot be meant is refused."""

import io
import random
import tarfile
from pathlib import Path

import pytest
import webdataset
from boto3.s3.transfer import TransferConfig

from gmdist import storage
from gmdist.data.decode import decode_caption
from gmdist.data.encode import Encoding
from gmdist.data.index import check_folder, index_folder
from gmdist.data.manifest import Manifest
from gmdist.data.pack import pack
from gmdist.data.sources import File
from gmdist.errors import DataError
from tests.data.packing import files, fill, image, samples, stream, theirs


def opened_png() -> bytes:
    png = io.BytesIO()
    image(0).save(png, "PNG")
    return png.getvalue()


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


def test_labels_beside_images_go_with_them_where_folders_give_none(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["a.png", "b.png"])
    for name, label in (("a", 3), ("b", 0)):
        (source / f"{name}.cls").write_text(f"{label}\n")
    manifest = pack(str(source), str(tmp_path / "out")).manifest
    assert manifest.num_labels == 4
    assert {key: int(members["cls"]) for key, members in samples(tmp_path / "out").items()} == {"a": 3, "b": 0}
    (source / "d").mkdir()
    for path in list(source.glob("?.*")):
        path.rename(source / "d" / path.name)
    with pytest.raises(DataError, match=r"subfolders, which would be classes, and \.cls files \(beside d/[ab]\.png\)"):
        pack(str(source), str(tmp_path / "again"))


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    hidden = [".thumbnails/a.png", "cat/.a.png", "cat/.cache/a.png", "cat/._a.png"]
    source = fill(tmp_path / "in", ["cat/a.png", *hidden])
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.manifest.classes == ("cat",)
    assert sorted(samples(tmp_path / "out")) == ["cat-a"]


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
def test_a_large_shard_is_gone_on_with_in_its_middle(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.chdir(tmp_path)  # from another place, under another name
    finished = pack(f"./{source.name}", "out", shard_mib=0.02, processes=processes)
    assert finished.manifest.hash == wanted.hash
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert any(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())


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


def test_extensions_are_of_any_case(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["0.JPG", "1.png", "2.PnG"])
    (source / "0.TXT").write_text("a caption")
    (source / "1.json").write_text("{}")
    (source / "2.Txt").write_text("another")
    pack(str(source), str(tmp_path / "out"))
    found = samples(tmp_path / "out")
    assert found["0"]["txt"] == b"a caption"
    assert sorted(found["1"]) == ["json", "png"]
    assert found["2"]["txt"] == b"another"


def test_links_that_lead_nowhere_are_not_passed_over(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", [f"cats/{i}.png" for i in range(9)])
    (source / "cats/gone.png").symlink_to("nowhere.png")
    (source / "cats/3.txt").symlink_to("nowhere.txt")
    (source / "cats/loop.png").symlink_to("loop.png")
    packed = pack(str(source), str(tmp_path / "out"), max_unreadable=0.5)
    assert sorted(packed.unreadable) == [
        *(f"cats/{name}: No such file or directory" for name in ("3.png", "gone.png")),
        "cats/loop.png: Too many levels of symbolic links",
    ]
    (source / "dogs").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"in/dogs: leads to nowhere, which is missing; restore or delete it"):
        pack(str(source), str(tmp_path / "other"))


def test_a_mark_before_utf8_is_no_part_of_a_text(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", ["0.png", "1.png", "2.png"])
    (source / "0.txt").write_bytes(b"\xef\xbb\xbfcaption")
    (source / "1.json").write_bytes(b'\xef\xbb\xbf{"text": "caption"}')
    (source / "2.json").write_bytes('{"text": "caption"}'.encode("utf-16"))
    packed = pack(str(source), str(tmp_path / "out"))
    assert packed.unreadable == ["2.png: its .json is no JSON"]
    for key, caption in (("0", "txt"), ("1", "json:text")):
        members = {name: memoryview(content) for name, content in samples(tmp_path / "out")[key].items()}
        assert decode_caption(members, caption) == b"caption"


@pytest.mark.parametrize("part_mib", [8, 5])  # the ETag is the hash of the parts, or of others
def test_bits_that_flip_on_their_way_from_a_bucket_are_read_again(
    bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_mib: int
) -> None:
    content = random.Random(0).randbytes(9 << 20)
    folder = theirs(tmp_path / "in", [("a", {"png": opened_png(), "npy": content})], 1, tarfile.USTAR_FORMAT)
    config = TransferConfig(multipart_threshold=part_mib << 20, multipart_chunksize=part_mib << 20)
    bucket.upload_file(str(folder / "00000.tar"), "pictures", "in/a.tar", Config=config)
    read, flips = storage.read_range, []

    def flip(location, offset, *arguments):
        found = read(location, offset, *arguments)
        if found and len(flips) < 3:
            flips.append(offset)
            found[len(found) // 2] ^= 1
        return found

    monkeypatch.setattr(storage, "read_range", flip)
    pack("s3://pictures/in", str(tmp_path / "out"), max_unreadable=0.0)
    assert len(flips) == 3
    monkeypatch.undo()
    assert samples(tmp_path / "out")["a"]["npy"] == content
