"""Packing: the same sources make the same bytes, in any number of processes, through kills, locally and in a bucket."""

import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from gmdist import storage
from gmdist.data.encode import Encoding
from gmdist.data.index import check_folder
from gmdist.data.manifest import Manifest
from gmdist.data.pack import pack, write_shards
from gmdist.errors import DataError
from tests.data.packing import files, fill, image, samples


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


SETTINGS = {"encoding": Encoding(192, "webp"), "shard_mib": 0.05}


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
    options = ["--image-size", "192", "--format", "webp", "--shard-mib", "0.05", "--processes", "2"]
    for num_shards in (0, 2, 5):
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


def partly(photos: Path, folder: Path) -> None:
    """Begin to pack the photos, and stop."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(photos), str(folder), **SETTINGS, on_progress=stop)


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
    partly(source, tmp_path / "out")
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


def test_a_plan_that_was_damaged_on_its_way_is_read_again(
    photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partly(photos, tmp_path / "out")
    read, damaged = storage.read, []

    def damage(location: str) -> bytes:
        content = read(location)
        if location.endswith("pack.json") and len(damaged) < 3:
            damaged.append(location)
            digit = content.index(b'"probe"') + 20
            return (content.replace(b"32", b"22", 1), content[:digit], content.replace(b'"', b"'", 1))[len(damaged) - 1]
        return content

    monkeypatch.setattr(storage, "read", damage)
    pack(str(photos), str(tmp_path / "out"), **SETTINGS)
    assert len(damaged) == 3
    assert files(tmp_path / "out") == files(packed)


def test_a_damaged_plan_is_not_gone_on_with(photos: Path, tmp_path: Path) -> None:
    partly(photos, tmp_path / "out")
    plan = tmp_path / "out" / "pack.json"
    plan.write_text(plan.read_text().replace("32", "22", 1))
    with pytest.raises(DataError, match=r"pack\.json: damaged or of another version .*; delete .* and pack anew"):
        pack(str(photos), str(tmp_path / "out"), **SETTINGS)
