"""Batches: the same samples for any number of workers and threads, from any start, of one data set or several."""

import dataclasses
import gc
import io
import json
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist.data import fetch
from gmdist.data.cache import Cache
from gmdist.data.config import MixedConfig
from gmdist.data.loader import Loader
from gmdist.data.pack import write_shards
from gmdist.data.shard import load_index
from gmdist.errors import ConfigError, DataError
from tests.data.numbered import (
    BATCH,
    CLASSES,
    COUNT,
    NO_IMAGE,
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


def test_however_many_lanes_there_are_an_index_is_read_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = ((f"{i}", {"png": png(pixels(i, 3))}) for i in range(1600))
    folder = str(tmp_path)
    write_shards(samples, folder, num_shards=400)
    read: list[str] = []
    monkeypatch.setattr(fetch, "load_index", lambda folder, entry: read.append(entry.name) or load_index(folder, entry))
    config = dataclasses.replace(settings(folder), lanes=400, num_classes=None)
    dataset = Loader(config, folder).datasets[0]
    for number in range(1600):
        shard, index = dataset.tape.locate(np.array([number]))
        dataset.shards.read(int(shard[0]), int(index[0]))
    assert len(read) < 1.2 * 400


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


def test_labels_out_of_range_are_refused_up_front(plain: str) -> None:
    with pytest.raises(DataError, match=r"shard-0\.tar: class label 3 is out of range: data\.num_classes is 3"):
        Loader(settings(plain, num_classes=3), plain)
    Loader(settings(plain, num_classes=10), plain)


def test_no_data_set_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere: no such data set"):
        Loader(settings("nowhere"), f"{tmp_path}/nowhere")


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


def test_a_sweep_of_some_samples_is_spread_over_all(plain: str, other: str) -> None:
    mix = [MixedConfig(plain, 3), MixedConfig(other, 1)]
    whole, _, _ = merged([list(Loader(settings(None), mix).sweep(8))])
    for world_size in (1, 3):
        parts = [list(Loader(settings(None), mix, rank, world_size).sweep(8, 10)) for rank in range(world_size)]
        found, _, _ = merged(parts)
        assert sorted(found) == [i * 2 * COUNT // 10 for i in range(10)]
        assert found == {number: whole[number] for number in found}
    assert merged([list(Loader(settings(None), mix).sweep(8, 10**9))])[0] == whole


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


def test_data_sets_share_the_files_that_a_process_may_open(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = fetch._OpenFiles(2)
    monkeypatch.setattr(fetch, "_FILES", few)
    loaders = [Loader(settings(plain), plain) for _ in range(3)]
    found = [[part.digest for part in loader.sweep(8)] for loader in loaders]
    assert found[0] == found[1] == found[2]
    assert len(few.files) == 2
    del loaders
    gc.collect()
    assert not few.files
