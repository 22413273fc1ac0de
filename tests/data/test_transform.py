"""Squares of one size: what Pillow makes of the whole image; crops and flips drawn by number alone."""

import io

import numpy as np
import pytest
from PIL import Image

from gmdist.data.decode import Reduced, UndecodableError, center_crop_resize
from gmdist.data.transform import decode_square, flips, places, square

PILLOW = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


def encode(image: np.ndarray, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **settings)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def scene(height: int, width: int) -> np.ndarray:
    """Waves of all lengths and a disk with a hard edge: what photographs are made of."""
    y, x = np.mgrid[:height, :width] / min(height, width)
    waves = sum(np.sin(2 * np.pi * f * (x + 0.7 * y)) / f for f in (1, 2, 4, 8, 16, 32))
    disk = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1) * 60.0
    return np.stack([110 + 40 * waves + disk, 110 - 40 * waves, 60 + 100 * y + disk], -1).clip(0, 255).astype(np.uint8)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


@pytest.mark.parametrize("method", PILLOW)
@pytest.mark.parametrize(("height", "width"), [(24, 36), (36, 24), (24, 24), (6, 10), (12, 13)])
def test_a_square_is_cut_from_what_pillow_resizes(method: str, height: int, width: int) -> None:
    image, size = noise(height, width, 3), 12
    scaled = (width * size // min(height, width), height * size // min(height, width))
    whole = np.asarray(Image.fromarray(image).resize(scaled, PILLOW[method]))
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    cut = decode_square(encode(image, "PNG"), 3, size, method, None)
    assert np.array_equal(cut, whole[top : top + size, left : left + size])


@pytest.mark.parametrize(("height", "width"), [(31, 50), (50, 31), (7, 8), (40, 40), (1, 9), (1, 1)])
def test_the_centre_is_the_one_that_pack_cuts(height: int, width: int) -> None:
    image = noise(height, width, 3)
    packed = np.asarray(center_crop_resize(Image.fromarray(image), 16))
    assert np.array_equal(decode_square(encode(image, "PNG"), 3, 16, "lanczos", None), packed)
    grey = np.asarray(center_crop_resize(Image.fromarray(image[:, :, 0]), 16))
    assert np.array_equal(decode_square(encode(image[:, :, 0], "PNG"), 1, 16, "lanczos", None)[:, :, 0], grey)


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = noise(16, 20, 3)
    for method in PILLOW:
        assert np.array_equal(decode_square(encode(image, "PNG"), 3, 16, method, None), image[:, 2:18])
        assert np.array_equal(decode_square(encode(image, "PNG"), 3, 16, method, 0.999), image[:, 4:])


@pytest.mark.parametrize("method", PILLOW)
@pytest.mark.parametrize("place", [None, 0.0, 0.3, 0.99])
@pytest.mark.parametrize(("height", "width", "size"), [(427, 640, 50), (641, 429, 100), (130, 255, 16), (640, 480, 32)])
def test_a_jpeg_decoded_at_a_fraction_is_close_to_the_whole(
    method: str, place: float | None, height: int, width: int, size: int
) -> None:
    content = encode(scene(height, width), "JPEG", quality=90)
    with Image.open(io.BytesIO(content)) as image:
        whole = Reduced(np.asarray(image), height, width, 1)
    exact = square(whole, size, method, place)
    assert psnr_db(decode_square(content, 3, size, method, place), exact) > {"area": 34, "lanczos": 44}[method]


@pytest.mark.parametrize("channels", [1, 3])
def test_pillows_shortcut_is_not_seen(channels: int) -> None:
    image = scene(480, 640)
    exact = Image.fromarray(image).convert("L" if channels == 1 else "RGB").resize((64, 48), Image.Resampling.LANCZOS)
    cut = decode_square(encode(image, "PNG"), channels, 48, "lanczos", 0.0)
    assert psnr_db(cut, np.asarray(exact).reshape(48, 64, channels)[:, :48]) > 48


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_thread_of_pixels_becomes_no_wall(form: str) -> None:
    assert decode_square(encode(noise(1, 60_000, 3), form), 3, 256, "area", 0.5).shape == (256, 256, 3)


def test_places_reach_both_ends_and_keep_inside() -> None:
    image = np.arange(7, dtype=np.uint8)[None, :, None].repeat(4, 0)
    lefts = [int(square(Reduced(image, 4, 7, 1), 4, "area", place)[0, 0, 0]) for place in np.linspace(0, 0.9999, 400)]
    assert sorted(set(lefts)) == [0, 1, 2, 3]
    assert [lefts.count(left) for left in range(4)] == [100] * 4
    tall = square(Reduced(image.transpose(1, 0, 2), 7, 4, 1), 4, "area", 0.9999)
    assert tall[:, 0, 0].tolist() == [3, 4, 5, 6]


def test_damage_is_undecodable_at_any_size() -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        content = encode(noise(64, 64, 3), form)
        for size in (4, 64, 100):
            with pytest.raises(UndecodableError):
                decode_square(content[:-100], 3, size, "area", None)


def test_draws_depend_on_seed_and_number_alone() -> None:
    numbers = np.arange(1000, dtype=np.int64) + 10**12
    for draw in (flips, places):
        together = draw(3, numbers)
        order = np.random.default_rng(0).permutation(1000)
        assert np.array_equal(draw(3, numbers[order]), together[order])
        assert [draw(3, numbers[i : i + 1])[0] for i in range(9)] == together[:9].tolist()
        assert not np.array_equal(draw(4, numbers), together)


def test_draws_are_fair_and_independent() -> None:
    numbers = np.arange(100_000, dtype=np.int64)
    flipped, place = flips(0, numbers), places(0, numbers)
    assert abs(flipped.mean() - 0.5) < 0.008  # five standard deviations
    assert abs((flipped[1:] == flipped[:-1]).mean() - 0.5) < 0.008
    assert ((place >= 0) & (place < 1)).all()
    counts = np.histogram(place, 10, (0, 1))[0]
    assert np.abs(counts - 10_000).max() < 500
    assert abs(np.corrcoef(flipped, place)[0, 1]) < 0.016
    assert abs(np.corrcoef(flips(1, numbers), flipped)[0, 1]) < 0.016
