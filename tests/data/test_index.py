"""Indexing and checking: every shard once, in parallel, from where it stopped; what changed or is unsound is named."""

import os
import shutil
from pathlib import Path

import pytest

from gmdist import storage
from gmdist.data import index
from gmdist.data.index import check_folder, index_folder
from gmdist.data.ledger import LEDGER_NAME
from gmdist.data.manifest import MANIFEST_NAME, PACK_NAME, Manifest
from gmdist.data.pack import write_shards
from gmdist.data.shard import index_name, load_index
from gmdist.errors import DataError


def shards(folder: str | Path, count: int = 4, per_shard: int = 3) -> Manifest:
    """A data set of small shards."""
    stream = [(f"k{i:03d}", {"png": b"%d" % i * 400, "cls": b"%d" % (i % 7)}) for i in range(count * per_shard)]
    return write_shards(stream, str(folder), num_shards=count)


def plain(folder: str | Path) -> str:
    """The manifest's hash of a data set, which is then as others would have made it: shards alone."""
    manifest = shards(folder)
    for name in storage.list_names(str(folder)):
        if not name.endswith(".tar"):
            storage.delete(storage.join(str(folder), name))
    return manifest.hash


def rewrite(shard: Path, old: bytes, new: bytes) -> None:
    content = shard.read_bytes()
    assert content.count(old) == 1
    shard.write_bytes(content.replace(old, new))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were read."""
    names: list[str] = []
    scan = index.scan
    monkeypatch.setattr(index, "scan", lambda file, at: (names.append(at.rpartition("/")[2]), scan(file, at))[1])
    return names


def test_processes_index_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plain(tmp_path)
    monkeypatch.setattr(index, "_PROCESSES_FROM_BYTES", 0)
    monkeypatch.setattr(index, "num_cores", lambda: 2)
    told: list[tuple[int, int]] = []
    manifest, problems = index_folder(str(tmp_path), lambda done, total: told.append((done, total)))
    assert (manifest.hash, problems) == (wanted, [])
    total = sum(shard.num_bytes for shard in manifest.shards)
    assert [done for done, _ in told] == [total // 4 * i for i in range(1, 5)]
    assert {of for _, of in told} == {total}
    assert check_folder(str(tmp_path)) == []
    shard = tmp_path / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "shard-000002.tar" in index_folder(str(tmp_path))[1][0]


def test_a_shard_is_read_once_whatever_happens(tmp_path: Path, scanned: list[str]) -> None:
    wanted = plain(tmp_path)
    third = tmp_path / "shard-000002.tar"
    sound = third.read_bytes()
    third.write_bytes(sound[:-3000])
    _, (problem,) = index_folder(str(tmp_path))
    assert "shard-000002.tar: ends at byte" in problem
    assert not (tmp_path / MANIFEST_NAME).exists()
    assert len(scanned) == 4
    third.write_bytes(sound)
    scanned.clear()
    assert index_folder(str(tmp_path))[0].hash == wanted
    assert scanned == ["shard-000002.tar"]
    assert not (tmp_path / LEDGER_NAME).exists()
    scanned.clear()
    index_folder(str(tmp_path))
    assert scanned == []


def test_an_interrupted_index_goes_on(tmp_path: Path, scanned: list[str]) -> None:
    wanted = plain(tmp_path)

    def stop(done: int, total: int) -> None:
        if len(scanned) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(str(tmp_path), stop)
    assert not (tmp_path / MANIFEST_NAME).exists()
    assert index_folder(str(tmp_path))[0].hash == wanted
    assert sorted(scanned)[0] == "shard-000000.tar"
    assert len(scanned) < 6  # the first was noted; a ledger that is not saved each time may lack the second


def test_what_a_killed_index_left_is_deleted(tmp_path: Path) -> None:
    shards(tmp_path)
    left = tmp_path / f".manifest.partial.json.{'0' * 32}.tmp"
    left.write_bytes(b"half")
    index_folder(str(tmp_path))
    assert not left.exists()


def test_what_has_changed_is_read_again(tmp_path: Path, scanned: list[str]) -> None:
    shards(tmp_path)
    before, _ = index_folder(str(tmp_path))  # notes the times of the files
    scanned.clear()
    second = tmp_path / "shard-000001.tar"
    rewrite(second, b"1" * 400, b"8" * 400)  # the same size
    (tmp_path / index_name("shard-000003.tar")).write_bytes(b"damaged")
    (tmp_path / "shard-000000.tar").unlink()
    manifest, problems = index_folder(str(tmp_path))
    assert problems == []
    assert scanned == ["shard-000001.tar", "shard-000003.tar"]
    assert [shard.name for shard in manifest.shards] == [f"shard-{i:06d}.tar" for i in (1, 2, 3)]
    assert manifest.shards[2] == before.shards[3]
    assert manifest.shards[0].index_crc32 != before.shards[1].index_crc32
    assert check_folder(str(tmp_path)) == []


def test_indexing_again_keeps_the_classes_and_mends_the_manifest(tmp_path: Path) -> None:
    manifest = Manifest(shards(tmp_path).shards, ("cat", "dog"))
    manifest.save(str(tmp_path))
    again, problems = index_folder(str(tmp_path))
    assert (again.hash, again.classes, problems) == (manifest.hash, ("cat", "dog"), [])
    (tmp_path / MANIFEST_NAME).write_text("garbage")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest .*; restore it, or delete it and run"):
        index_folder(str(tmp_path))  # or the names of the classes would be lost
    (tmp_path / MANIFEST_NAME).unlink()
    assert index_folder(str(tmp_path))[0].hash == manifest.hash


def test_a_name_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "shard-000000.tar").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar"))
    with pytest.raises(DataError, match=r"'\\udcff\.tar': a shard's name .* printable UTF-8 without .*; rename it"):
        index_folder(str(tmp_path))


def test_files_that_are_no_shards_are_passed_over_or_named(tmp_path: Path) -> None:
    wanted = plain(tmp_path)
    shard = (tmp_path / "shard-000000.tar").read_bytes()
    (tmp_path / "._shard-000000.tar").write_bytes(b"what macOS leaves")
    (tmp_path / ".old.tar").write_bytes(shard)
    manifest, problems = index_folder(str(tmp_path))
    assert (manifest.hash, problems) == (wanted, [])
    assert check_folder(str(tmp_path)) == []
    for name, words in (("b.TAR", "has to end in .tar"), ("a\\b.tar", "has to be printable UTF-8 without")):
        (tmp_path / name).write_bytes(shard)
        assert any("does not list it" in line for line in check_folder(str(tmp_path)))
        with pytest.raises(DataError, match=words):
            index_folder(str(tmp_path))
        (tmp_path / name).unlink()


def test_a_shard_that_was_replaced_under_its_old_time_can_be_indexed(tmp_path: Path) -> None:
    shards(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    times = shard.stat()
    rewrite(shard, b"1" * 400, b"7" * 400)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    (line,) = check_folder(str(tmp_path))
    assert "differs from its index; restore the shard, or delete shard-000001.index.safetensors beside it and" in line
    (tmp_path / "shard-000001.index.safetensors").unlink()
    index_folder(str(tmp_path))
    assert check_folder(str(tmp_path)) == []


def test_uploads_of_others_go_on_while_a_bucket_is_indexed(bucket, tmp_path: Path) -> None:
    shards(tmp_path, 1)
    storage.copy_from_local(str(tmp_path / "shard-000000.tar"), "s3://pictures/in/a.tar")
    bucket.create_multipart_upload(Bucket="pictures", Key="in/b.tar")
    index_folder("s3://pictures/in")
    assert [upload["Key"] for upload in bucket.list_multipart_uploads(Bucket="pictures")["Uploads"]] == ["in/b.tar"]


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(tmp_path)
    scan = index.scan

    def meddle(file, location):
        found = scan(file, location)
        if location.endswith("1.tar"):
            rewrite(Path(location), b"1" * 400, b"8" * 400)
        return found

    monkeypatch.setattr(index, "scan", meddle)
    assert index_folder(str(tmp_path))[1] == [
        f"{tmp_path}/shard-000001.tar: changed while it was read; run the same command again"
    ]


def test_shards_in_a_bucket_are_read_in_pieces(bucket, monkeypatch: pytest.MonkeyPatch, scanned: list[str]) -> None:
    folder = "s3://pictures/plain"
    wanted = plain(folder)
    monkeypatch.setattr(storage, "_PIECE_BYTES", 1500)
    manifest, problems = index_folder(folder)
    assert (manifest.hash, problems, len(scanned)) == (wanted, [], 4)
    assert check_folder(folder) == []
    scanned.clear()
    content = storage.read(f"{folder}/shard-000001.tar")
    storage.write(f"{folder}/shard-000001.tar", content.replace(b"1" * 400, b"8" * 400))
    assert check_folder(folder) == [
        f"{folder}/shard-000001.tar: not the shard that was indexed (its ETag differs)",
        f"{folder}: the manifest is older than its shards: run `gmdist data index {folder}`, or restore them",
    ]
    scanned.clear()
    assert index_folder(folder)[1] == []
    assert scanned == ["shard-000001.tar"]
    assert check_folder(folder) == []


def test_an_object_that_is_overwritten_while_it_is_read_is_refused(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "s3://pictures/plain"
    plain(folder)
    scan = index.scan

    def meddle(file, location):
        if location.endswith("1.tar"):
            storage.write(location, storage.read(f"{folder}/shard-000002.tar"))
        return scan(file, location)

    monkeypatch.setattr(index, "scan", meddle)
    assert index_folder(folder)[1] == [
        f"{folder}/shard-000001.tar: changed while it was read; run the same command again"
    ]


def test_checking_finds_what_changed(tmp_path: Path) -> None:
    manifest = shards(tmp_path, 1)
    shard = tmp_path / manifest.shards[0].name
    sound = shard.read_bytes()
    assert check_folder(str(tmp_path)) == []

    rewrite(shard, b"2" * 400, b"2" * 399 + b"3")
    (line,) = check_folder(str(tmp_path))
    assert line.startswith(f"{shard}: sample 'k002' differs from its index; restore the shard, or delete ")

    shard.write_bytes(sound + bytes(10240))
    assert check_folder(str(tmp_path)) == [
        f"{shard}: not the shard that was indexed (20480 bytes instead of 10240)",
        f"{tmp_path}: the manifest is older than its shards: run `gmdist data index {tmp_path}`, or restore them",
    ]

    shard.unlink()
    assert check_folder(str(tmp_path)) == [
        f"{shard}: missing, but the manifest lists it; put it back, or run `gmdist data index {tmp_path}`"
    ]

    shard.write_bytes(sound)
    saved = tmp_path / index_name(shard.name)
    content = saved.read_bytes()
    saved.write_bytes(content[:-1] + b"x")
    (problem,) = check_folder(str(tmp_path))
    assert problem.startswith(f"{saved}: differs from the manifest's checksum; run `gmdist data index")
    saved.unlink()
    (problem,) = check_folder(str(tmp_path))
    assert problem.startswith(f"{saved}: missing; run `gmdist data index")


def test_a_copy_is_as_good(tmp_path: Path) -> None:
    shards(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)  # at another time
    assert check_folder(str(tmp_path / "there")) == []


def test_checking_lists_every_unsound_shard(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()
    rewrite(tmp_path / "shard-000002.tar", b"2" * 400, b"3" * 400)
    shutil.copy(tmp_path / "shard-000001.tar", tmp_path / "more.tar")
    assert check_folder(str(tmp_path)) == [
        f"{tmp_path}/more.tar: the manifest does not list it",
        f"{tmp_path}/shard-000000.tar: missing, but the manifest lists it; put it back, or run `gmdist data index "
        f"{tmp_path}`",
        f"{tmp_path}/shard-000002.tar: sample 'k002' differs from its index; restore the shard, or delete "
        f"shard-000002.index.safetensors beside it and run `gmdist data index {tmp_path}`",
        f"{tmp_path}: the manifest is older than its shards: run `gmdist data index {tmp_path}`, or restore them",
    ]


def test_a_fraction_is_read_and_always_the_same(tmp_path: Path, scanned: list[str]) -> None:
    shards(tmp_path, 8)
    assert check_folder(str(tmp_path), 0.25) == []
    first = list(scanned)
    assert len(first) == 2
    check_folder(str(tmp_path), 0.25)
    assert scanned == first * 2
    scanned.clear()
    check_folder(str(tmp_path), 0.001)
    assert len(scanned) == 1


def test_an_unfinished_pack_is_not_indexed(tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / PACK_NAME).write_text("{}")
    with pytest.raises(DataError, match="packing was not finished; run the same `gmdist data pack` again"):
        index_folder(str(tmp_path))
    with pytest.raises(DataError, match="packing was not finished"):
        Manifest.load(str(tmp_path))
    (tmp_path / PACK_NAME).unlink()
    assert index_folder(str(tmp_path))[1] == []
    load_index(str(tmp_path), Manifest.load(str(tmp_path)).shards[0])
