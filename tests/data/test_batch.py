"""What batches hold; samples that cannot be decoded or are not what was indexed, replaced or refused."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gmdist.data import batch
from gmdist.data.batch import Loaded
from gmdist.data.fetch import Shards
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest, ShardTable
from gmdist.errors import DataError, StorageError
from tests.data.numbered import (
    BATCH,
    CLASSES,
    COUNT,
    NO_IMAGE,
    SHARD_SIZES,
    SIZE,
    as_loaded,
    load,
    merged,
    origin,
    pixels,
    png,
    settings,
    write,
)


def test_black_is_minus_one_and_white_is_one(tmp_path: Path) -> None:
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    image[0] = 255
    folder = write(tmp_path, {i: {"png": png(image)} for i in range(COUNT)})
    loaded = Loader(settings(folder), folder).first(1).batch["image"][0, 0]
    assert loaded[0].tolist() == [1.0] * SIZE
    assert (loaded[1:] == -1.0).all()


def test_large_samples_are_read_one_at_a_time(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a batch of them would fill the memory: what was read and is not decoded yet is counted nowhere."""
    own = threading.local()  # a thread reads and decodes its samples; others may still be at a batch that nobody takes
    waiting: list[int] = []
    read, decode = Shards.read, batch.BatchMaker.decode

    def count_read(*arguments):
        own.waiting = getattr(own, "waiting", 0) + 1
        waiting.append(own.waiting)
        return read(*arguments)

    def count_decode(*arguments, **options):
        own.waiting = getattr(own, "waiting", 0) - 1
        return decode(*arguments, **options)

    monkeypatch.setattr(Shards, "read", count_read)
    monkeypatch.setattr(batch.BatchMaker, "decode", count_decode)
    for limit_bytes, expected in ((1, 1), (1 << 20, BATCH)):
        monkeypatch.setattr(batch, "_READ_BYTES", limit_bytes)
        waiting.clear()
        assert merged(load(plain, 2, num_threads=1, prefetch_batches=1))[2] == []
        assert max(waiting) == expected


def test_without_classes_labels_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {i: {"cls": None} for i in range(COUNT)})
    part = Loader(settings(folder, num_classes=None), folder).first(5)
    assert sorted(part.batch) == ["image", "key"]


BAD = {2: NO_IMAGE, 11: {"png": b""}, 19: {"png": None}}


def test_bad_samples_are_replaced_alike_on_every_world_size(tmp_path: Path) -> None:
    folder = write(tmp_path, BAD)
    alone = merged(load(folder, 4, max_bad_fraction=1.0))
    found, _, lines = alone
    loader = Loader(settings(folder), folder)
    expected = []
    for number in range(4 * BATCH):
        i, attempt = origin(loader, number), 0
        while i in BAD:
            expected.append((number, f"k{i}"))
            shard, index = loader.datasets[0].tape.replacement(number, attempt)
            i, attempt = sum(SHARD_SIZES[:shard]) + index, attempt + 1
        image, label = found[number]
        assert label == i % CLASSES
        assert np.abs(np.frombuffer(image, np.float32) - as_loaded(pixels(i)).ravel()).max() < 1e-6
    assert expected
    listed = [json.loads(line) for line in lines]
    assert sorted((line["number"], line["sample"]) for line in listed) == sorted(expected)
    for line in listed:
        i = int(line["sample"][1:])
        assert line["shard"] == f"{folder}/shard-{sum(i >= end for end in np.cumsum(SHARD_SIZES))}.tar"
        assert line["reason"]
    for world_size in (2, 3):
        assert merged(load(folder, 4, world_size=world_size, max_bad_fraction=1.0)) == alone


def test_a_sample_without_an_image_says_what_it_has(tmp_path: Path) -> None:
    folder = write(tmp_path, {4: {"png": None, "txt": b"a cat"}})
    lines = [line for part in Loader(settings(folder), folder).sweep(8) for line in part.quarantined]
    assert [line["sample"] for line in lines] == ["k4"]
    assert "['cls', 'txt']" in lines[0]["reason"]


def test_too_many_bad_samples_fail_and_name_one(tmp_path: Path) -> None:
    def sweep(**changes) -> list[Loaded]:
        return list(Loader(settings(folder, **changes), folder).sweep(8))

    folder = write(tmp_path / "two", {3: NO_IMAGE, 9: NO_IMAGE})
    with pytest.raises(DataError, match=r"max_bad_fraction.*shard-[01]\.tar: k[39]: "):
        sweep()
    assert len(sweep(max_bad_fraction=2 / COUNT)) == 3
    folder = write(tmp_path / "one", {3: NO_IMAGE})
    sweep()  # a single one is within any budget but none
    with pytest.raises(DataError, match=r"1 samples.*max_bad_fraction allows \(0 of 21\).*shard-0\.tar: k3: "):
        sweep(max_bad_fraction=0.0)


def test_a_sample_that_is_met_again_counts_once(tmp_path: Path) -> None:
    folder = write(tmp_path, {3: NO_IMAGE})
    (parts,) = load(folder, 4 * COUNT // BATCH)
    assert {line["sample"] for part in parts for line in part.quarantined} == {"k3"}
    assert sum(len(part.quarantined) for part in parts) >= 4


def test_a_data_set_of_nothing_but_damage_ends(tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(range(COUNT), NO_IMAGE))
    with pytest.raises(DataError, match=r"shard-\d\.tar: k\d+: 16 samples in a row cannot be decoded"):
        Loader(settings(folder, max_bad_fraction=1.0), folder).first(1)


def test_labels_out_of_range_are_refused_where_they_are(tmp_path: Path) -> None:
    # The manifest's own count may be wrong: it is not covered by a checksum.
    folder = write(tmp_path, {8: {"cls": b"7"}})
    manifest = Manifest.load(folder)
    Manifest(ShardTable.of(replace(shard, labels=CLASSES) for shard in manifest.shards)).save(folder)
    with pytest.raises(DataError, match=r"shard-1\.tar: k8: class label 7 is out of range.*0 to 3"):
        list(Loader(settings(folder), folder).sweep(8))


def test_missing_labels_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "none", {i: {"cls": None} for i in range(COUNT)})
    with pytest.raises(DataError, match=rf"{folder}: no class labels.*data\.num_classes is 4"):
        Loader(settings(folder), folder)
    folder = write(tmp_path / "some", {5: {"cls": None}})
    with pytest.raises(DataError, match=r"shard-0\.tar: k5: no class label"):
        list(Loader(settings(folder, max_bad_fraction=0.0), folder).sweep(8))
    lines = [line for part in Loader(settings(folder), folder).sweep(8) for line in part.quarantined]
    assert [(line["sample"], line["reason"].split(",")[0]) for line in lines] == [("k5", "no class label (.cls)")]


def test_mixed_image_sizes_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {5: {"png": png(pixels(5, size=8))}})
    with pytest.raises(DataError, match=r"shard-0\.tar: k5: the image is 8x8, but data\.image_size is 6"):
        list(Loader(settings(folder), folder).sweep(8))


def test_other_bytes_than_were_indexed_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    shard = tmp_path / "shard-1.tar"
    sound = shard.read_bytes()

    position = sound.index(png(pixels(9))) + 40
    shard.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
    with pytest.raises(
        DataError, match=rf"shard-1\.tar: sample 'k9' is not what was indexed.*gmdist data check {folder}"
    ):
        list(Loader(settings(folder), folder).sweep(8))

    shard.write_bytes(sound[: len(sound) // 4])
    with pytest.raises(StorageError, match=r"shard-1\.tar: .*cut"):
        list(Loader(settings(folder), folder).sweep(8))

    shard.unlink()
    with pytest.raises(DataError, match=r"shard-1\.tar: missing, but .*manifest\.json lists it \(shard 1\)"):
        list(Loader(settings(folder), folder).sweep(8))

    shard.write_bytes(sound)
    index = tmp_path / "shard-1.index.safetensors"
    index.write_bytes((tmp_path / "shard-0.index.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"shard-1\.index\.safetensors: differs from the manifest"):
        list(Loader(settings(folder), folder).sweep(8))


def test_bytes_that_were_damaged_on_their_way_are_asked_for_again(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merged(load(plain, 2))
    fetch, lock, damaged = Shards.fetch, threading.Lock(), set()

    def unreliable(shards: Shards, shard: int, start: int, *arguments: object) -> bytes:
        content = fetch(shards, shard, start, *arguments)
        with lock:
            first = (shard, start) not in damaged
            damaged.add((shard, start))
        return bytes([content[0] ^ 1]) + content[1:] if first else content

    monkeypatch.setattr(Shards, "fetch", unreliable)
    assert merged(load(plain, 2)) == expected
    assert damaged
