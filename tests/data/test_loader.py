"""Batches: the same samples for any number of workers and threads, from any start; bad samples replaced or refused."""

import io
import json
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist.data import batch
from gmdist.data.batch import Loaded
from gmdist.data.cache import Cache
from gmdist.data.config import DataConfig, MixedConfig
from gmdist.data.fetch import Shards
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest, ShardTable
from gmdist.data.pack import write_shards
from gmdist.errors import ConfigError, DataError, StorageError

SHARD_SIZES, CLASSES, SIZE, BATCH = (7, 9, 5), 4, 6, 12
COUNT = sum(SHARD_SIZES)
NO_IMAGE = {"png": b"\x89PNG\r\n\x1a\n damaged"}


def pixels(number: int, channels: int = 1, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, channels), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, changed: dict[int, dict[str, bytes]] | None = None, channels: int = 1) -> str:
    """A data set of COUNT images: number i has pixels(i), the key k<i> and the label i % CLASSES."""
    entries, first = [], 0
    for size in SHARD_SIZES:
        samples = []
        for i in range(first, first + size):
            members = {"png": png(pixels(i, channels)), "cls": str(i % CLASSES).encode()} | (changed or {}).get(i, {})
            samples.append((f"k{i}", {name: content for name, content in members.items() if content is not None}))
        part = folder / f"part-{first}"
        (entry,) = write_shards(samples, str(part)).shards
        name = f"shard-{len(entries)}"
        (part / "shard-000000.tar").rename(folder / f"{name}.tar")
        (part / "shard-000000.index.safetensors").rename(folder / f"{name}.index.safetensors")
        entries.append(replace(entry, name=f"{name}.tar"))
        first += size
    Manifest(ShardTable.of(entries)).save(str(folder))
    return str(folder)


def settings(folder: str | None, **changes) -> DataConfig:
    values = {"batch_size": BATCH, "image_size": SIZE, "channels": 1, "num_classes": CLASSES, "block": 4}
    return DataConfig(train=folder, **(values | changes))


def load(folder: str, steps: int, start: int = 0, world_size: int = 1, **changes) -> list[list[Loaded]]:
    """The parts of some batches: [worker][step]."""
    parts = []
    for rank in range(world_size):
        batches = Loader(settings(folder, **changes), folder, rank, world_size).batches(start)
        parts.append(list(islice(batches, steps)))
        batches.close()
    return parts


def merged(parts: list[list[Loaded]]) -> tuple[dict[int, tuple[bytes, int]], int, list[str]]:
    """(image, label) by number, the digest, and the quarantine lines, of all workers together."""
    found, total, lines = {}, 0, []
    for part in (part for worker in parts for part in worker):
        labels = part.batch.get("label", torch.full_like(part.batch["key"], -1))
        for image, label, key in zip(part.batch["image"], labels, part.batch["key"], strict=True):
            assert int(key) not in found
            found[int(key)] = (image.numpy().tobytes(), int(label))
        total = (total + part.digest) % 2**64
        lines += [json.dumps(line, sort_keys=True) for line in part.quarantined]
    return found, total, sorted(lines)


def origin(loader: Loader, number: int) -> int:
    """Which image of the data set has this number."""
    shard, index = (int(x[0]) for x in loader.datasets[0].tape.locate([number]))
    return sum(SHARD_SIZES[:shard]) + index


def as_loaded(image: np.ndarray) -> np.ndarray:
    return (image.astype(np.float64) / 127.5 - 1).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_the_images_in_the_order_of_the_tape(tmp_path: Path, channels: int) -> None:
    folder = write(tmp_path, channels=channels)
    loader = Loader(settings(folder, channels=channels), folder)
    batches = loader.batches(0)
    for step, part in enumerate(islice(batches, 4)):  # into the third epoch
        image, label, key = (part.batch[name] for name in ("image", "label", "key"))
        assert (image.dtype, label.dtype, key.dtype) == (torch.float32, torch.int64, torch.int64)
        assert key.tolist() == list(range(step * BATCH, (step + 1) * BATCH))
        origins = [origin(loader, number) for number in key.tolist()]
        assert label.tolist() == [i % CLASSES for i in origins]
        expected = np.stack([as_loaded(pixels(i, channels)) for i in origins])
        assert image.shape == expected.shape
        assert np.abs(image.numpy() - expected).max() < 1e-6
        assert part.quarantined == []
    batches.close()


def test_black_is_minus_one_and_white_is_one(tmp_path: Path) -> None:
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    image[0] = 255
    folder = write(tmp_path, {i: {"png": png(image)} for i in range(COUNT)})
    loaded = Loader(settings(folder), folder).first(1).batch["image"][0, 0]
    assert loaded[0].tolist() == [1.0] * SIZE
    assert (loaded[1:] == -1.0).all()


def test_large_samples_are_read_one_at_a_time(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a batch of them would fill the memory: what was read and is not decoded yet is counted nowhere."""
    waiting, most = 0, 0
    read, decode = Shards.read, batch.BatchMaker.decode

    def count_read(*arguments):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return read(*arguments)

    def count_decode(*arguments):
        nonlocal waiting
        waiting -= 1
        return decode(*arguments)

    monkeypatch.setattr(Shards, "read", count_read)
    monkeypatch.setattr(batch.BatchMaker, "decode", count_decode)
    for limit_bytes, expected in ((1, 1), (1 << 20, BATCH)):
        monkeypatch.setattr(batch, "_READ_BYTES", limit_bytes)
        waiting = most = 0
        assert merged(load(plain, 2, num_threads=1, prefetch_batches=1))[2] == []
        assert most == expected


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_workers_sees_the_same_samples(plain: str, world_size: int) -> None:
    alone, shared = load(plain, 4), load(plain, 4, world_size=world_size)
    assert merged(shared) == merged(alone)
    for rank, parts in enumerate(shared):
        for step, part in enumerate(parts):
            numbers = range(step * BATCH, (step + 1) * BATCH)
            assert part.batch["key"].tolist() == [t for t in numbers if t % world_size == rank]


@pytest.mark.parametrize("start", [1, BATCH, COUNT - 1, COUNT, 5 * COUNT + 3])
def test_starting_anywhere_is_skipping(plain: str, start: int) -> None:
    everything, _, _ = merged(load(plain, start // BATCH + 3))
    there, _, _ = merged(load(plain, 2, start))
    assert sorted(there) == list(range(start, start + 2 * BATCH))
    assert all(everything[number] == sample for number, sample in there.items())
    _, digest, _ = merged(load(plain, 2, start))
    assert digest == merged(load(plain, 2, start, world_size=3))[1]


@pytest.mark.parametrize(
    "changes", [{"num_threads": 1}, {"num_threads": 7}, {"prefetch_batches": 1}, {"batch_size": 6}]
)
def test_threads_prefetch_and_batch_size_change_nothing(plain: str, changes) -> None:
    steps = 6 * BATCH // changes.get("batch_size", BATCH)
    assert merged(load(plain, steps, **changes)) == merged(load(plain, 6))


def test_the_seed_changes_the_order(plain: str) -> None:
    assert merged(load(plain, 2, seed=1)) != merged(load(plain, 2))


def test_without_classes_labels_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {i: {"cls": None} for i in range(COUNT)})
    part = Loader(settings(folder, num_classes=None), folder).first(5)
    assert sorted(part.batch) == ["image", "key"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, COUNT + 1])
def test_a_sweep_gives_each_sample_once(plain: str, world_size: int) -> None:
    parts = [list(Loader(settings(plain), plain, rank, world_size).sweep(4)) for rank in range(world_size)]
    found, digest, _ = merged(parts)
    assert sorted(found) == list(range(COUNT))
    assert len({image for image, _ in found.values()}) == COUNT
    assert digest == merged([[Loader(settings(plain), plain).first(COUNT)]])[1]
    assert all(len(part.batch["key"]) <= 4 for worker in parts for part in worker)


def test_the_first_samples_are_the_same_on_every_worker(plain: str) -> None:
    first = [Loader(settings(plain), plain, rank, 3).first(10).batch for rank in range(3)]
    assert first[0]["key"].tolist() == list(range(10))
    for other in first[1:]:
        assert all(torch.equal(other[name], first[0][name]) for name in other)
    whole, _, _ = merged(load(plain, 1))
    assert [image.numpy().tobytes() for image in first[0]["image"]] == [whole[t][0] for t in range(10)]


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


def test_labels_out_of_range_are_refused_up_front(plain: str) -> None:
    with pytest.raises(DataError, match=r"shard-0\.tar: class label 3 is out of range: data\.num_classes is 3"):
        Loader(settings(plain, num_classes=3), plain)
    Loader(settings(plain, num_classes=10), plain)


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


def test_no_data_set_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere: no such data set"):
        Loader(settings("nowhere"), f"{tmp_path}/nowhere")


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


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second data set: images of 0 alone, with the label 3; its first image is damaged."""
    zeros = png(np.zeros((SIZE, SIZE, 1), np.uint8))
    changed = {i: {"png": zeros, "cls": b"3"} for i in range(1, COUNT)}
    return write(tmp_path_factory.mktemp("other"), changed | {0: NO_IMAGE | {"cls": b"3"}})


def mixed_batches(parts: list[MixedConfig], steps: int, start: int = 0, world_size: int = 1, **changes):
    found = []
    for rank in range(world_size):
        loader = Loader(settings(None, **changes), parts, rank, world_size)
        batches = loader.batches(start)
        found.append(list(islice(batches, steps)))
        batches.close()
    return found


def test_a_mix_has_its_shares_in_every_batch(plain: str, other: str) -> None:
    mix = [MixedConfig(plain, 3), MixedConfig(other, 1)]
    found, digest, lines = merged(mixed_batches(mix, 9))
    assert sorted(found) == list(range(9 * BATCH))
    for first in range(0, 9 * BATCH, 4):
        images = [np.frombuffer(found[number][0], np.float32) for number in range(first, first + 4)]
        assert sum((image == -1.0).all() for image in images) == 1
    # All of the first data set came before anything of it came again; and what is damaged is replaced by its like.
    assert len({image for image, _ in found.values()}) == COUNT + 1
    assert {json.loads(line)["shard"] for line in lines} == {f"{other}/shard-0.tar"}
    for changes in ({"world_size": 3}, {"world_size": 2, "num_threads": 1}):
        assert merged(mixed_batches(mix, 9, **changes)) == (found, digest, lines)
    late = merged(mixed_batches(mix, 4, start=5 * BATCH, world_size=2))[0]
    assert late == {number: found[number] for number in range(5 * BATCH, 9 * BATCH)}


def test_a_sweep_over_a_mix_takes_each_sample_once(plain: str, other: str) -> None:
    mix = [MixedConfig(plain, 3), MixedConfig(other, 1)]
    parts = [list(Loader(settings(None), mix, rank, 2).sweep(8)) for rank in range(2)]
    found, _, _ = merged(parts)
    assert sorted(found) == list(range(2 * COUNT))
    alone, _, _ = merged([list(Loader(settings(plain), plain).sweep(8))])
    assert {number: found[number] for number in range(COUNT)} == alone


def test_arrays_of_a_mix_have_one_layout(plain: str, tmp_path: Path) -> None:
    def array(shape: tuple[int, ...]) -> bytes:
        content = io.BytesIO()
        np.save(content, np.zeros(shape, np.float32))
        return content.getvalue()

    folders = []
    for name, shape in (("one", (2, 3)), ("two", (2, 4))):
        write_shards([("k", {"latent.npy": array(shape)})], str(tmp_path / name))
        folders.append(MixedConfig(str(tmp_path / name)))
    latents = settings(None, image=False, num_classes=None, arrays=("latent.npy",))
    assert Loader(latents, folders[:1]).first(1).batch["latent"].shape == (1, 2, 3)
    with pytest.raises(DataError, match=r"two: latent\.npy is float32 \[2, 4\], but that of .*one is float32 \[2, 3\]"):
        Loader(latents, folders)


def test_workers_that_fetch_the_same_are_told(bucket, plain: str, tmp_path: Path) -> None:
    for path in Path(plain).iterdir():
        if path.is_file():
            bucket.upload_file(str(path), "pictures", f"data/{path.name}")  # of three shards, and so three lanes
    folder = "s3://pictures/data"

    def notes(world_size: int, **changes) -> list[str]:
        return Loader(settings(folder, **changes), folder, 0, world_size).notes()

    assert notes(1) == notes(3) == notes(2, cache_dir=str(tmp_path / "cache"), cache_gib=0.001) == []
    (note,) = notes(2)
    assert "is fetched by 2 of the 2 workers" in note
    (note,) = notes(6)
    assert "is fetched by 2 of the 6 workers" in note
    assert Loader(settings(plain), plain, 0, 2).notes() == []


def test_a_full_disk_of_the_cache_is_told_once(plain: str, tmp_path: Path) -> None:
    loader = Loader(settings(plain), plain)
    assert loader.notes() == []
    loader.config.cache_dir = str(tmp_path / "cache")
    loader._cache = Cache(loader.config.cache_dir, 1000, {})
    assert loader.notes() == []
    loader._cache.problem = "No space left on device"
    (note,) = loader.notes()
    assert f"data.cache_dir: {tmp_path}/cache: No space left on device; nothing more is kept there" in note
    assert loader.notes() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("cache_dir", "s3://bucket/cache"),
        ("cache_gib", 0.0),
        ("prefetch_mib", 0),
        ("image_size", -1),
        ("lanes", 0),
        ("block", 0),
        ("num_threads", 0),
        ("prefetch_batches", 0),
        ("channels", 2),
        ("num_classes", 0),
        ("resize", "bicubic"),
        ("crop", "random"),
        ("crop", "left"),
        ("image", False),
        ("caption", "text"),
        ("caption", "json:"),
        ("max_bad_fraction", 1.5),
        ("max_bad_fraction", -0.1),
        ("max_bad_fraction", float("nan")),
    ],
)
def test_impossible_settings_name_the_key(key: str, value) -> None:
    settings("x").validate()
    with pytest.raises(ConfigError, match=rf"^data\.{key}: '?{value}'?; must be"):
        settings("x", **{key: value}).validate()


def test_closing_leaves_no_threads(plain: str) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]

    loader = Loader(settings(plain, num_threads=4), plain)
    batches = loader.batches(0)
    next(batches)
    assert threads()
    batches.close()
    loader.first(3)
    deadline = time.monotonic() + 10  # they finish the sample at hand
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []
