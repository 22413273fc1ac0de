"""What a batch holds beside images: captions and arrays; crops and flips in the loader; bad members replaced."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist.data.batch import Loaded
from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
from gmdist.data.pack import write_shards
from gmdist.data.transform import flips
from gmdist.errors import ConfigError, DataError
from gmdist.families.family import captions

COUNT, SIZE, BATCH = 20, 6, 8


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (2 * SIZE, 5 * SIZE, 3), dtype=np.uint8)


def latent(i: int) -> np.ndarray:
    return np.full((2, 3), i, np.float16)


def tokens(i: int) -> np.ndarray:
    return np.arange(i, i + 5, dtype=np.uint16)


def caption(i: int) -> str:
    return "ü" * i


def write(folder: Path, changed: dict[int, dict[str, bytes | None]] | None = None, image: bool = True) -> str:
    """A data set of COUNT samples in two shards; members of number i that are changed to None are missing."""
    samples = []
    for i in range(COUNT):
        members = {"cls": b"0", "txt": caption(i).encode(), "json": json.dumps({"alt": f"alt {i}"}).encode()}
        members |= {"latent.npy": npy(latent(i)), "tokens.npy": npy(tokens(i))}
        members |= ({"png": png(pixels(i))} if image else {}) | (changed or {}).get(i, {})
        samples.append((f"k{i}", {name: content for name, content in members.items() if content is not None}))
    write_shards(samples, str(folder), num_shards=2)
    return str(folder)


def settings(folder: str, **changes) -> DataConfig:
    values = {"batch_size": BATCH, "image_size": SIZE, "resize": "area", "block": 4}
    return DataConfig(train=folder, **(values | changes))


def load(folder: str, steps: int = 3, world_size: int = 1, **changes) -> list[Loaded]:
    parts = []
    for rank in range(world_size):
        batches = Loader(settings(folder, **changes), folder, rank, world_size).batches(0)
        parts += [next(batches) for _ in range(steps)]
        batches.close()
    return parts


def by_number(parts: list[Loaded], name: str) -> dict[int, object]:
    found = {}
    for part in parts:
        values = captions(part.batch) if name == "caption" else part.batch[name].tolist()
        found |= dict(zip(part.batch["key"].tolist(), values, strict=True))
    return found


def origins(folder: str, count: int, **changes) -> list[int]:
    """Which sample of the data set has each number: shards were dealt out in turn."""
    shards, indices = Loader(settings(folder, **changes), folder).datasets[0].tape.locate(np.arange(count))
    return (indices * 2 + shards).tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plain"))


EVERYTHING = {"num_classes": 2, "caption": "txt", "arrays": ("latent.npy", "tokens.npy")}


def test_batches_hold_captions_and_arrays(plain: str) -> None:
    parts = load(plain, **EVERYTHING)
    batch = parts[0].batch
    assert sorted(batch) == ["caption", "image", "key", "label", "latent", "tokens"]
    assert (batch["caption"].dtype, batch["latent"].dtype) == (torch.uint8, torch.float16)
    assert (batch["tokens"].shape, batch["latent"].shape) == ((BATCH, 5), (BATCH, 2, 3))
    for number, i in enumerate(origins(plain, 3 * BATCH)):
        assert by_number(parts, "caption")[number] == caption(i)
        assert by_number(parts, "latent")[number] == latent(i).tolist()
        assert by_number(parts, "tokens")[number] == tokens(i).tolist()


def test_a_caption_may_be_a_key_of_the_json(plain: str) -> None:
    found = by_number(load(plain, caption="json:alt"), "caption")
    assert found == {number: f"alt {i}" for number, i in enumerate(origins(plain, 3 * BATCH))}


def test_captions_may_all_be_empty(tmp_path: Path) -> None:
    folder = write(tmp_path, {i: {"txt": b" \n"} for i in range(COUNT)})
    (part,) = load(folder, 1, caption="txt")
    assert captions(part.batch) == [""] * BATCH
    assert part.quarantined == []


def test_a_data_set_of_latents_needs_no_image(tmp_path: Path) -> None:
    folder = write(tmp_path, image=False)
    parts = load(folder, image=False, resize="none", arrays=("latent.npy",))
    assert sorted(parts[0].batch) == ["key", "latent"]
    assert by_number(parts, "latent")[0] == latent(origins(folder, 1)[0]).tolist()


def test_members_change_neither_order_nor_digest(plain: str) -> None:
    expected = [part.digest for part in load(plain)]
    for changes in (EVERYTHING, {"flip": True, "crop": "random"}, {"resize": "lanczos"}, {"image_size": 3}):
        assert [part.digest for part in load(plain, **changes)] == expected


AUGMENTED = {"flip": True, "crop": "random", **EVERYTHING}


@pytest.mark.parametrize("changes", [{"world_size": 2}, {"num_threads": 5}, {"batch_size": 4, "steps": 6}])
def test_crops_and_flips_depend_on_the_number_alone(plain: str, changes) -> None:
    alone, others = load(plain, **AUGMENTED), load(plain, **(AUGMENTED | changes))
    for name in ("image", "caption", "latent", "tokens"):
        assert by_number(alone, name) == by_number(others, name)


def test_flips_mirror_and_crops_move(plain: str) -> None:
    centre, flipped, moved = (load(plain, 5, **changes) for changes in ({}, {"flip": True}, {"crop": "random"}))
    mirrored = unmoved = 0
    for a, b, c in zip(centre, flipped, moved, strict=True):
        for image, other, cut in zip(*(part.batch["image"] for part in (a, b, c)), strict=True):
            assert torch.equal(other, image) or torch.equal(other, image.flip(2))
            mirrored += not torch.equal(other, image)
            unmoved += torch.equal(cut, image)
    assert 10 <= mirrored <= 30  # of 40
    assert unmoved < 10
    assert load(plain, 1, flip=True, seed=0)[0].batch["image"].tolist() == flipped[0].batch["image"].tolist()


def test_evaluation_sees_images_as_they_are(plain: str) -> None:
    loader, augmented = (Loader(settings(plain, **changes), plain) for changes in ({}, AUGMENTED))
    assert torch.equal(augmented.first(9).batch["image"], loader.first(9).batch["image"])
    for part, other in zip(loader.sweep(7), augmented.sweep(7), strict=True):
        assert torch.equal(other.batch["image"], part.batch["image"])


BAD = {
    "an empty label": ({"cls": b""}, "cls: the class label is b''"),
    "a label in words": ({"cls": b"cat"}, "cls: the class label is b'cat'; it must be a non-negative integer"),
    "a caption of another encoding": ({"txt": b"\xfc"}, "txt: the caption is not UTF-8"),
    "no caption": ({"txt": None}, "no .txt among its members"),
    "no array": ({"latent.npy": None}, "no .latent.npy among its members"),
    "an empty array": ({"tokens.npy": b""}, "tokens.npy: not a .npy file"),
    "half an array": ({"latent.npy": npy(latent(0))[:-2]}, "latent.npy: 10 bytes of values"),
    "pickled objects": ({"tokens.npy": npy(np.array([{}], object))}, "tokens.npy: values of type object"),
    "another shape": (
        {"latent.npy": npy(np.zeros((3, 2), "f2"))},
        "latent.npy: float16 [3, 2], but others of the data set are float16 [2, 3]",
    ),
    "another type": ({"latent.npy": npy(np.zeros((2, 3)))}, "latent.npy: float64 [2, 3], but others"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_members_are_replaced_and_listed(tmp_path: Path, case: str) -> None:
    members, reason = BAD[case]
    folder = write(tmp_path, {7: members})
    parts = list(Loader(settings(folder, **EVERYTHING), folder).sweep(BATCH))
    lines = [line for part in parts for line in part.quarantined]  # several, where it is drawn in its own place
    assert {line["sample"] for line in lines} == {"k7"}
    assert all(line["reason"].startswith(reason) for line in lines)
    names = by_number(parts, "latent")
    assert len(names) == COUNT
    assert latent(7).tolist() not in names.values()
    with pytest.raises(DataError, match=r"max_bad_fraction.*shard-000001\.tar: k7: "):
        list(Loader(settings(folder, max_bad_fraction=0.0, **EVERYTHING), folder).sweep(BATCH))


def test_other_byte_and_memory_orders_are_the_same_array(tmp_path: Path) -> None:
    changed = {3: {"latent.npy": npy(latent(3).astype(">f2"))}, 4: {"latent.npy": npy(np.asfortranarray(latent(4)))}}
    folder = write(tmp_path, changed)
    parts = list(Loader(settings(folder, arrays=("latent.npy",)), folder).sweep(BATCH))
    assert all(part.quarantined == [] for part in parts)
    assert sorted(str(x) for x in by_number(parts, "latent").values()) == sorted(
        str(latent(i).tolist()) for i in range(COUNT)
    )


def test_without_images_a_flip_takes_the_arrays_of_mirror_images(tmp_path: Path) -> None:
    mirrors = {i: {"latent_flip.npy": npy(-latent(i))} for i in range(COUNT)}
    folder = write(tmp_path, mirrors, image=False)
    latents = {"image": False, "resize": "none", "arrays": ("latent.npy",)}
    plain = by_number(load(folder, **latents), "latent")
    found = by_number(load(folder, flip=True, **latents), "latent")
    signs = np.where(flips(0, np.array(list(plain))), -1, 1)
    assert {-1, 1} == set(signs)
    for (number, values), sign in zip(plain.items(), signs, strict=True):
        assert np.array_equal(found[number], sign * np.array(values))
    # As with images, evaluations and first samples are not mirrored.
    first = Loader(settings(folder, flip=True, **latents), folder).first(COUNT).batch
    unmirrored = dict(zip(first["key"].tolist(), first["latent"].tolist(), strict=True))
    assert all(unmirrored[number] == values for number, values in plain.items() if number < COUNT)
    with pytest.raises(DataError, match=r"no \.latent_flip\.npy among its members"):
        load(write(tmp_path / "without", image=False), flip=True, max_bad_fraction=1.0, **latents)


def test_members_that_no_sample_has_are_refused_at_once(plain: str) -> None:
    with pytest.raises(DataError, match=r"k\d+: no \.clip\.npy among its members \[.*; data\.arrays is clip\.npy"):
        Loader(settings(plain, arrays=("clip.npy",)), plain)
    with pytest.raises(DataError, match=r"json: no text under the key 'prompt'"):
        Loader(settings(plain, caption="json:prompt"), plain).first(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": False}, "image: False; must be true, or data.arrays must name"),
        ({"arrays": ("latent",)}, "arrays: 'latent'; must be extensions such as latent.npy"),
        ({"arrays": ("a.npy", "a.npy")}, "arrays: 'a.npy'; must be extensions"),
        ({"arrays": ("image.npy",)}, "arrays: 'image.npy'; must be another name"),
        ({"resize": "none", "crop": "random"}, "crop: 'random'; must be center where data.resize is none"),
    ],
)
def test_members_that_cannot_be_are_refused(changes, message: str) -> None:
    settings("x", **AUGMENTED).validate()
    with pytest.raises(ConfigError, match=rf"^data\.{message}"):
        settings("x", **changes).validate()
