"""Two domains: each in its own exact order, whatever the number of workers, and no sample bound to one of the other."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gmdist.data.config import DataConfig, MixedConfig, UnpairedConfig
from gmdist.data.latents import FirstStage, Record, Transform, check_latents
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.pack import write_shards
from gmdist.data.unpaired import Loaded, Unpaired, open_held_out, open_training
from gmdist.errors import ConfigError, DataError
from tests.data.numbered import (
    BATCH,
    CLASSES,
    COUNT,
    NO_IMAGE,
    as_loaded,
    pixels,
    png,
    settings,
    write,
)

CPU = torch.device("cpu")
SECOND_COUNT = 8
Found = dict[int, tuple[bytes, int, bytes, int]]  # by number: image, label, image_b, label_b


def second_pixels(number: int) -> np.ndarray:
    return pixels(1000 + number)


def write_second(folder: Path, changed: dict[int, dict[str, bytes]] | None = None) -> str:
    """A smaller data set: number i has second_pixels(i), the key s<i> and the label (i + 1) % CLASSES."""
    samples = (
        (f"s{i}", {"png": png(second_pixels(i)), "cls": b"%d" % ((i + 1) % CLASSES)} | (changed or {}).get(i, {}))
        for i in range(SECOND_COUNT)
    )
    write_shards(samples, str(folder), num_shards=2)
    return str(folder)


def second_number(image: bytes) -> int:
    """Which of its images a loaded one is."""
    seen = np.frombuffer(image, np.float32)
    distances = [np.abs(seen - as_loaded(second_pixels(i)).ravel()).max() for i in range(SECOND_COUNT)]
    (which,) = np.flatnonzero(np.array(distances) < 1e-6)
    return int(which)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_second(tmp_path_factory.mktemp("second"))


def both(first: str | None, second: str, **changes) -> DataConfig:
    return settings(first, unpaired=UnpairedConfig(second), **changes)


def load(config: DataConfig, steps: int, start: int = 0, world_size: int = 1) -> list[list[Loaded]]:
    """The parts of some batches: [worker][step]."""
    parts = []
    for rank in range(world_size):
        batches = open_training(config, rank, world_size).batches(start)
        parts.append(list(islice(batches, steps)))
        batches.close()
    return parts


def merged(parts: list[list[Loaded]]) -> tuple[Found, int, list[str]]:
    """What was read by number, the digest, and the quarantine lines, of all workers together."""
    found: Found = {}
    total, lines = 0, []
    for part in (part for worker in parts for part in worker):
        batch = part.batch_on(CPU)
        assert list(batch) == ["key", "label", "image", "label_b", "image_b"]
        for i, key in enumerate(batch["key"].tolist()):
            assert key not in found
            images = (batch[name][i].numpy().tobytes() for name in ("image", "image_b"))
            labels = (int(batch[name][i]) for name in ("label", "label_b"))
            image, image_b = images
            label, label_b = labels
            found[key] = image, label, image_b, label_b
        total = (total + part.digest) % 2**64
        lines += [json.dumps(line, sort_keys=True) for line in part.quarantined]
    return found, total, sorted(lines)


def test_both_domains_come_each_in_its_own_epochs(plain: str, second: str) -> None:
    config = both(plain, second)
    found, _, lines = merged(load(config, 14))  # 8 epochs of the first, 21 of the second
    assert lines == []
    assert set(config.batch_keys) == {"key", "label", "image", "label_b", "image_b"}
    alone = Loader(settings(plain), plain).first(14 * BATCH).batch
    order = []
    for number, (image, label, image_b, label_b) in sorted(found.items()):
        assert image == alone["image"][number].numpy().tobytes()  # as without a second domain
        assert label == int(alone["label"][number])
        order.append(second_number(image_b))
        assert label_b == (order[-1] + 1) % CLASSES
    for epoch in range(21):
        assert sorted(order[epoch * SECOND_COUNT : (epoch + 1) * SECOND_COUNT]) == list(range(SECOND_COUNT))


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_workers_sees_the_same_pairs(plain: str, second: str, world_size: int) -> None:
    config = both(plain, second)
    assert merged(load(config, 5, world_size=world_size)) == merged(load(config, 5))
    threads = both(plain, second, num_threads=5, prefetch_batches=1)
    assert merged(load(threads, 5)) == merged(load(config, 5))


@pytest.mark.parametrize("start", [1, SECOND_COUNT, COUNT, 4 * COUNT + 3])
def test_starting_anywhere_is_skipping(plain: str, second: str, start: int) -> None:
    config = both(plain, second)
    everything, _, _ = merged(load(config, start // BATCH + 3))
    there, digest, _ = merged(load(config, 2, start))
    assert there == {number: everything[number] for number in range(start, start + 2 * BATCH)}
    assert merged(load(config, 2, start, world_size=4)) == (there, digest, [])


def test_the_digest_covers_both(plain: str, second: str, tmp_path: Path) -> None:
    other = write_second(tmp_path / "other", {3: {"png": png(pixels(5))}})
    digests = [merged(load(both(*pair), 3))[1] for pair in ((plain, second), (plain, other), (second, plain))]
    digests += [sum(part.digest for part in islice(Loader(settings(plain), plain).batches(0), 3)) % 2**64]
    assert len(set(digests)) == 4


def many(folder: Path, count: int, num_shards: int) -> str:
    write_shards(((f"{i:04d}", {"png": b"", "cls": b"0"}) for i in range(count)), str(folder), num_shards=num_shards)
    return str(folder)


def located(data: Unpaired, epochs: int) -> np.ndarray:
    """Which sample of each domain has each number of some epochs [epochs, 2, N]; both have N, in shards of one size."""
    numbers, found = np.arange(epochs * data.num_samples), []
    for domain in (data.first_domain, data.second_domain):
        (dataset,) = domain.datasets
        shards, indices = dataset.tape.locate(numbers)
        found.append((shards * dataset.shards.manifest.shards[0].samples + indices).reshape(epochs, -1))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_orders_of_one_size_have_nothing_to_do_with_each_other(tmp_path: Path, seed: int) -> None:
    count, epochs = 512, 100
    folder = many(tmp_path / "data", count, 8)
    data = Unpaired(both(folder, folder, seed=seed), folder, folder)
    orders = located(data, epochs)
    # A sample meets itself as often as by chance: each of 51,200 times with probability 1 / 512. The blocks are small,
    # so that half of all that meet by chance do so in one epoch of ten.
    assert 20 <= np.count_nonzero(orders[:, 0] == orders[:, 1]) <= 250
    partners = np.empty((epochs, count), np.int64)  # of each sample of the first, by epoch
    for epoch, (first, second) in enumerate(orders):
        assert sorted(first) == sorted(second) == list(range(count))
        partners[epoch, first] = second
    assert 20 <= np.count_nonzero(partners[1:] == partners[:-1]) <= 250
    correlations = [np.corrcoef(first, second)[0, 1] for first, second in orders]
    assert abs(np.mean(correlations)) < 0.15
    # The seed alone says it.
    again = Unpaired(both(folder, folder, seed=seed), folder, folder, 1, 2)
    assert (located(again, 2) == orders[:2]).all()
    other = Unpaired(both(folder, folder, seed=seed + 1), folder, folder)
    assert np.count_nonzero(located(other, 2) != orders[:2]) > 1800  # of 2,048


def test_mirror_images_are_drawn_for_each_domain(plain: str) -> None:
    count = 20 * BATCH
    straight = open_training(both(plain, plain)).first(count).batch_on(CPU)
    found = [part.batch_on(CPU) for part in load(both(plain, plain, flip=True), 20)[0]]
    flipped = []
    for name in ("image", "image_b"):
        images = torch.cat([batch[name] for batch in found])
        is_straight = (images == straight[name]).flatten(1).all(dim=1)
        assert torch.equal(images[~is_straight], straight[name][~is_straight].flip(3))
        flipped.append(~is_straight)
        assert 90 <= int(flipped[-1].sum()) <= 150
    assert 90 <= int((flipped[0] == flipped[1]).sum()) <= 150


def test_a_bad_sample_is_replaced_and_said_to_be_of_its_domain(plain: str, tmp_path: Path) -> None:
    broken = write_second(tmp_path / "second", {3: NO_IMAGE})
    first = write(tmp_path, {10: NO_IMAGE})
    config = both(first, broken, max_bad_fraction=0.2)
    found, digest, lines = alone = merged(load(config, 4))
    assert {second_number(one[2]) for one in found.values()} == set(range(SECOND_COUNT)) - {3}
    listed = [json.loads(line) for line in lines]
    places = {(line["domain"], line["sample"], line["shard"].rpartition("/")[0]) for line in listed}
    assert places == {("a", "k10", first), ("b", "s3", broken)}
    assert len({line["number"] for line in listed if line["domain"] == "b"}) == 6  # of 48, one in 8
    assert all("damaged" in line["reason"] for line in listed)
    for world_size in (2, 4):
        assert merged(load(config, 4, world_size=world_size)) == alone
    assert digest != merged(load(both(plain, broken, max_bad_fraction=0.2), 4))[1]
    with pytest.raises(DataError, match=rf"allows \(0 of 8\); the last one: {broken}/shard-000001.tar: s3: damaged"):
        load(both(plain, broken, max_bad_fraction=0.0), 1)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_sweep_goes_once_over_the_larger_domain(plain: str, second: str, world_size: int, is_swapped: bool) -> None:
    folders = (second, plain) if is_swapped else (plain, second)
    config = settings("train", test=folders[0], unpaired=UnpairedConfig("train", folders[1]))
    parts = [list(open_held_out(config, rank, world_size).sweep(4)) for rank in range(world_size)]
    found, _, _ = merged(parts)
    assert sorted(found) == list(range(COUNT))
    assert all(len(part.batch_on(CPU)["key"]) <= 4 for worker in parts for part in worker)
    counts = [np.unique([one[place] for one in found.values()], return_counts=True)[1] for place in (0, 2)]
    small, large = counts if is_swapped else counts[::-1]
    assert large.tolist() == [1] * COUNT
    assert sorted(small.tolist()) == [2] * 3 + [3] * 5
    some = [list(open_held_out(config, rank, world_size).sweep(4, 7)) for rank in range(world_size)]
    assert merged(some)[0] == {number: found[number] for number in range(0, COUNT, 3)}


def test_domains_of_one_size_are_swept_once_each(plain: str) -> None:
    config = settings("train", test=plain, unpaired=UnpairedConfig("train", plain))
    found, _, _ = merged([list(open_held_out(config).sweep(4))])
    assert len({one[0] for one in found.values()}) == len({one[2] for one in found.values()}) == COUNT


def test_the_first_samples_are_the_same_on_every_worker(plain: str, second: str) -> None:
    config = both(plain, second)
    first = [open_training(config, rank, 2).first(10).batch_on(CPU) for rank in range(2)]
    assert first[0]["key"].tolist() == list(range(10))
    assert first[0].keys() == first[1].keys()
    assert all(torch.equal(tensor, first[1][name]) for name, tensor in first[0].items())
    whole, _, _ = merged(load(config, 1))
    assert [image.numpy().tobytes() for image in first[0]["image_b"]] == [whole[t][2] for t in range(10)]


def test_labels_come_where_classes_are_set(plain: str, second: str) -> None:
    config = both(plain, second, num_classes=None)
    batch = open_training(config).first(2).batch_on(CPU)
    assert set(batch) == set(config.batch_keys) == {"key", "image", "image_b"}
    assert batch["image_b"].shape == (2, 1, 6, 6)
    with pytest.raises(DataError, match=r"shard-0000\d\d\.tar: class label 3 is out of range: data\.num_classes is 3"):
        open_training(both(second, second, num_classes=3))


def test_the_first_domain_may_be_a_mix(plain: str, second: str) -> None:
    mix = {"one": MixedConfig(plain, 3), "two": MixedConfig(second, 1)}
    config = both(None, second, mix=mix)
    found, digest, _ = merged(load(config, 4))
    alone = next(iter(Loader(settings(None, batch_size=4 * BATCH), list(mix.values())).batches(0))).batch
    assert [found[t][0] for t in range(4 * BATCH)] == [image.numpy().tobytes() for image in alone["image"]]
    assert merged(load(config, 4, world_size=4))[:2] == (found, digest)


def test_a_resume_asks_for_the_same_second_domain(plain: str, second: str, tmp_path: Path) -> None:
    ours = open_training(both(plain, second)).fingerprint
    saved = json.loads(json.dumps(ours.to_dict()))
    ours.check(saved)
    other = open_training(both(plain, plain)).fingerprint
    with pytest.raises(DataError, match=r"^data\.unpaired\.train: cannot resume: the data set was .* and is"):
        other.check(saved)
    with pytest.raises(DataError, match=r"^cannot resume: the data\.seed was 0 when the run was started and is 1 now"):
        open_training(both(plain, second, seed=1)).fingerprint.check(saved)
    with pytest.raises(DataError, match=r"^cannot resume: the data set was"):
        open_training(both(second, second)).fingerprint.check(saved)
    alone = open_training(settings(plain)).fingerprint
    with pytest.raises(DataError, match=r"data\.unpaired named a second data set when the run was started"):
        alone.check(saved)
    with pytest.raises(DataError, match=r"data\.unpaired was null when the run was started"):
        ours.check(alone.to_dict())
    with pytest.raises(DataError, match="written by another version"):
        ours.check(saved | {"unpaired": {}})
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in Path(second).iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    open_training(both(plain, str(copied))).fingerprint.check(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption": "txt"}, r"data\.caption: 'txt'; must be left out beside data\.unpaired"),
        ({"arrays": ("latent.npy",)}, r"data\.arrays: \('latent\.npy',\); must be left out beside data\.unpaired"),
        ({"image": False, "arrays": ("latent.npy",)}, r"data\.image: False; must be true beside data\.unpaired"),
        ({"test": "x"}, r"data\.unpaired\.test: missing; data\.test is set, and evaluations need both domains"),
        ({"unpaired": UnpairedConfig("x", "y")}, r"data\.test: missing; data\.unpaired\.test is set"),
        ({"unpaired": UnpairedConfig("")}, r"data\.unpaired\.train: ''; must be a folder or an s3:// prefix"),
        ({"unpaired": UnpairedConfig("gs://x")}, "gs://x: not a location that gmdist reads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words: str) -> None:
    settings("x", test="z", unpaired=UnpairedConfig("y", "w"), flip=True).validate()
    with pytest.raises(ConfigError, match=words):
        settings("x", **({"unpaired": UnpairedConfig("y")} | changes)).validate()


def test_paths_become_absolute() -> None:
    config = settings("x", test="z", unpaired=UnpairedConfig("y", "w"))
    config.validate()
    config.make_absolute()
    assert (config.unpaired.train, config.unpaired.test) == (str(Path("y").absolute()), str(Path("w").absolute()))


def test_latents_are_no_second_domain(plain: str, tmp_path: Path) -> None:
    config = both(plain, str(tmp_path))
    stage = FirstStage("run", 1, {}, "weights")
    Record(stage, Transform.of(config), "fp32", False, "source", {"latent": ([1], "float16")}).save(str(tmp_path))
    with pytest.raises(ConfigError, match=f"data.image: True; {tmp_path} holds latents"):
        check_latents(config, config.folders, [])


def test_domains_in_object_storage_share_one_cache(bucket, plain: str, second: str, tmp_path: Path) -> None:
    for name, folder in (("first", plain), ("second", second)):
        for path in Path(folder).iterdir():
            if path.is_file():
                bucket.upload_file(str(path), "pictures", f"{name}/{path.name}")
    there = "s3://pictures/first", "s3://pictures/second"
    expected = merged(load(both(plain, second), 6))
    cached = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 0.001}
    assert merged(load(both(*there), 6, world_size=2)) == expected
    assert merged(load(both(plain, there[1], **cached), 6)) == expected
    data = open_training(both(*there, **cached))
    batches = data.batches(0)
    assert merged([list(islice(batches, 6))]) == expected
    batches.close()
    names = {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert names == {Manifest.load(folder).hash for folder in (plain, second)}
    assert data.counters()["requests"] > 0
    assert data.notes() == []
    assert data.first_domain._cache is data.second_domain._cache
    data.first_domain._cache.problem = "No space left on device"
    (note,) = data.notes()
    assert "No space left on device; nothing more is kept there" in note
    assert data.notes() == []
    notes = open_training(both(*there), 0, 6).notes()
    assert len(notes) == 2
    assert all("is fetched by" in note for note in notes)


def test_what_is_held_out_takes_no_room_of_what_trains(bucket, plain: str, tmp_path: Path) -> None:
    for path in Path(plain).iterdir():
        if path.is_file():
            bucket.upload_file(str(path), "pictures", f"first/{path.name}")
    config = settings("s3://pictures/first", test="s3://pictures/first")
    config.cache_dir, config.cache_gib = str(tmp_path / "cache"), 0.001
    held_out = open_held_out(config)
    assert held_out is not None
    assert list(held_out.sweep(4))
    assert not (tmp_path / "cache").exists()
    batches = open_training(config).batches(0)
    assert list(islice(batches, 6))
    batches.close()
    assert list((tmp_path / "cache").iterdir())
