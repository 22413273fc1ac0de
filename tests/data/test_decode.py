"""Decoding: the pixels that Pillow sees, and one kind of error for whatever is not a sound image."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gmdist.data.decode import (
    MAX_PIXELS,
    UndecodableError,
    center_crop_resize,
    check_size,
    decode_image,
    decode_reduced,
    open_image,
)
from gmdist.errors import DataError


def encode(image: Image.Image | np.ndarray, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 5)], axis=-1).astype(np.uint8)


def as_pillow_sees_it(content: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        image.draft(mode, image.size)  # grey is a JPEG's own luma, and not made from its rounded colours
        return np.asarray(image.convert(mode)).astype(int).reshape(image.height, image.width, -1)


def png_header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of a few bytes that announces any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("settings", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_jpeg_is_what_pillow_sees(settings, channels: int, mode: str) -> None:
    for content in (encode(smooth(19, 33), "JPEG", **settings), encode(smooth(16, 16)[:, :, 0], "JPEG")):
        image = decode_image(content, channels)
        assert image.dtype == np.uint8
        assert np.abs(image - as_pillow_sees_it(content, mode)).max() <= 1


@pytest.mark.parametrize(("form", "settings"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_images_are_exact(form: str, settings) -> None:
    rgb = noise(5, 7, 3)
    assert np.array_equal(decode_image(encode(rgb, form, **settings), 3), rgb)
    grey = noise(5, 7)
    assert np.array_equal(decode_image(encode(np.stack([grey] * 3, -1), form, **settings), 1)[:, :, 0], grey)


def test_lossy_webp_is_close() -> None:
    image = smooth(32, 32)
    assert np.abs(decode_image(encode(image, "WEBP", quality=95), 3).astype(int) - image).mean() < 4


def test_grey_and_colour_become_each_other() -> None:
    grey = noise(4, 6)
    assert np.array_equal(decode_image(encode(grey, "PNG"), 1), grey[:, :, None])
    assert np.array_equal(decode_image(encode(grey, "PNG"), 3), np.stack([grey] * 3, -1))
    colour = noise(4, 6, 3)
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(decode_image(encode(colour, "PNG"), 1)[:, :, 0] - luma).max() <= 1


def test_palettes_and_bits_become_pixels() -> None:
    colours = Image.fromarray(noise(6, 6, 3)).quantize(8)
    assert np.array_equal(decode_image(encode(colours, "PNG"), 3), np.asarray(colours.convert("RGB")))
    bits = noise(6, 6) > 127
    assert np.array_equal(decode_image(encode(Image.fromarray(bits), "PNG"), 1)[:, :, 0], bits * np.uint8(255))


@pytest.mark.parametrize("min_side", [None, 16])
@pytest.mark.parametrize("ends_in_ff", [False, True])
def test_zeros_before_the_end_of_a_jpeg_are_no_damage(ends_in_ff: bool, min_side: int | None) -> None:
    for seed in range(2000):  # one image in 256 or so ends in that byte
        content = encode(noise(40, 48, 3, seed=seed), "JPEG")
        if content.endswith(b"\xff\x00\xff\xd9") == ends_in_ff:
            break
    padded = content[:-2] + bytes(12) + content[-2:]
    assert np.array_equal(decode_reduced(padded, 3, min_side).image, decode_reduced(content, 3, min_side).image)
    out = np.empty((40, 48, 3), np.uint8)
    assert np.array_equal(decode_image(padded, 3, out), decode_image(content, 3))
    for cut in (content[:-30] + bytes(12) + content[-2:], content[:-2] + b"\1" * 12 + content[-2:]):
        with pytest.raises(UndecodableError):
            decode_image(cut, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_parts_become_white(form: str) -> None:
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[:, :, 0] = 200
    rgba[:, :, 3] = np.array([0, 128, 255])
    image = decode_image(encode(rgba, form, **({"lossless": True, "exact": True} if form == "WEBP" else {})), 3)
    assert image[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert decode_image(encode(rgba, form), 1)[0, 0, 0] == 255


def test_other_kinds_of_transparency_become_white() -> None:
    grey_alpha = Image.fromarray(noise(2, 2)).convert("LA")
    grey_alpha.putalpha(0)
    assert (decode_image(encode(grey_alpha, "PNG"), 1) == 255).all()
    assert (decode_image(encode(np.full((2, 2), 7, np.uint8), "PNG", transparency=7), 1) == 255).all()
    palette = Image.fromarray(np.zeros((2, 2), np.uint8)).convert("P")
    assert (decode_image(encode(palette, "PNG", transparency=0), 3) == 255).all()


def with_transform(content: bytes, transform: int) -> bytes:
    """A JPEG of four components that says how they are meant: 0 CMYK, 2 YCCK."""
    at = content.index(b"Adobe") + 11
    return content[:at] + bytes([transform]) + content[at + 1 :]


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_print_colours_are_converted_as_pillow_does(transform: int, channels: int, mode: str) -> None:
    inks = np.concatenate([smooth(24, 32), smooth(24, 32)[::-1, :, :1] // 2], axis=2)
    content = with_transform(encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=95), transform)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "CMYK"
        seen = np.asarray(image.convert(mode)).astype(int).reshape(24, 32, -1)
    assert np.abs(decode_image(content, channels) - seen).max() <= 2


@pytest.mark.parametrize(("form", "settings"), [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_pixel_is_an_image(form: str, settings, channels: int) -> None:
    image = decode_image(encode(np.full((1, 1, 3), 200, np.uint8), form, **settings), channels)
    assert image.tolist() == [[[200] * channels]]


@pytest.mark.parametrize(
    ("height", "width", "min_side", "factor"),
    [
        (64, 96, 8, 8),
        (64, 96, 9, 4),
        (65, 99, 9, 8),
        (99, 65, 33, 2),
        (65, 99, 34, 1),
        (5, 9, 64, 1),
        (64, 96, None, 1),
    ],
)
def test_a_large_jpeg_is_decoded_at_a_fraction(height: int, width: int, min_side: int | None, factor: int) -> None:
    reduced = decode_reduced(encode(smooth(height, width), "JPEG"), 3, min_side)
    assert reduced[1:] == (height, width, factor)
    assert reduced.image.shape == (-(-height // factor), -(-width // factor), 3)
    assert decode_reduced(encode(smooth(height, width), "PNG"), 3, min_side).image.shape == (height, width, 3)


def test_fractions_of_a_truncated_jpeg_are_refused_too() -> None:
    content = encode(noise(64, 64, 3), "JPEG")
    for cut in (content[:-2], content[:-50], content[: len(content) // 2], content[:4]):
        with pytest.raises(UndecodableError):
            decode_reduced(cut, 3, 8)


def animation(form: str) -> bytes:
    frames = [Image.fromarray(noise(6, 6, 3, seed=i)) for i in range(3)]
    return encode(frames[0], form, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animations_are_refused(form: str) -> None:
    with pytest.raises(UndecodableError, match=r"^an animation of 3 frames; images have one$"):
        decode_image(animation(form), 3)


def test_sixteen_bits_are_refused_and_not_cut_to_eight() -> None:
    grey = encode(Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096), "PNG")
    colour = png_header(4, 4, depth=16, colour=2)
    for content in (grey, colour):
        with pytest.raises(UndecodableError, match=r"^16 bits a channel; images have 8 bits a channel$"):
            decode_image(content, 3)


JPEG, PNG, WEBP = (encode(noise(40, 40, 3), form) for form in ("JPEG", "PNG", "WEBP"))


NO_IMAGES = {
    "nothing": b"",
    "text": b"not an image",
    "a JPEG's first bytes": JPEG[:2],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "a JPEG without its last part": JPEG[:-200],
    "half a PNG": PNG[: len(PNG) // 2],
    "a PNG with a flipped byte": PNG[:-100] + bytes([PNG[-100] ^ 1]) + PNG[-99:],
    "half a WebP": WEBP[: len(WEBP) // 2],
    "16 bits": encode(Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096), "PNG"),
    "GIF": encode(noise(4, 4), "GIF"),
    "an animated GIF": animation("GIF"),
    "TIFF": encode(noise(4, 4), "TIFF"),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", NO_IMAGES)
def test_whatever_is_no_sound_image_is_undecodable(case: str, channels: int) -> None:
    with pytest.raises(UndecodableError):
        decode_image(NO_IMAGES[case], channels)


def test_the_reason_is_for_people() -> None:
    for case in ("nothing", "text", "GIF", "an animated GIF"):
        with pytest.raises(UndecodableError, match=r"^not a JPEG, PNG or WebP image$"):
            decode_image(NO_IMAGES[case], 3)


@pytest.mark.parametrize("side", [8193, 12_000, 100_000])
def test_pixel_bombs_are_refused_before_they_unfold(side: int) -> None:
    assert side**2 > MAX_PIXELS
    with pytest.raises(UndecodableError, match="pixels"):
        decode_image(png_header(side, side), 1)
    jpeg = bytearray(encode(noise(8, 8), "JPEG"))
    size_at = jpeg.index(b"\xff\xc0") + 5
    jpeg[size_at : size_at + 4] = struct.pack(">HH", min(side, 65_500), min(side, 65_500))
    with pytest.raises(UndecodableError, match="pixels"):
        decode_image(bytes(jpeg), 1)


@pytest.mark.parametrize("size", [(8191, 8193), (16_383, 16_383)])
def test_a_webp_bomb_is_refused_before_it_unfolds(size: tuple[int, int]) -> None:
    content = bytearray(encode(noise(8, 8, 4), "WEBP", exif=b"Exif\0\0"))  # such a file says its size twice
    at = content.index(b"VP8X") + 12
    content[at : at + 6] = b"".join((side - 1).to_bytes(3, "little") for side in size)
    with pytest.raises(UndecodableError):
        decode_image(bytes(content), 3)


ANIMATED, YCCK = animation("WEBP"), with_transform(encode(Image.new("CMYK", (9, 9)), "JPEG"), 2)


PALETTE = encode(Image.fromarray(noise(9, 9, 3)).quantize(8), "PNG", transparency=0)


SOUND = st.sampled_from([JPEG, PNG, WEBP, ANIMATED, YCCK, PALETTE, animation("PNG")])


def repaired(png: bytes) -> bytes:
    """A damaged PNG with checksums that fit, so that what reads the chunks sees the damage."""
    repaired, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        repaired += png[at:end] + struct.pack(">I", zlib.crc32(png[at + 4 : end]))
        at = end + 4
    return bytes(repaired)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    SOUND,
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, 5000) | st.integers(0, 60), st.integers(0, 255)), max_size=4),
    st.sampled_from([None, 4, 32]),
)
@example(b"", 1.0, [], None)
@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_damage_gives_an_image_or_one_kind_of_error(
    sound: bytes, kept: float, flips: list[tuple[int, int]], min_side: int | None
) -> None:
    content = bytearray(sound[: round(kept * len(sound))])
    for place, value in flips:
        if content:
            content[place % len(content)] ^= value
    for damaged in (bytes(content), repaired(bytes(content))):
        with contextlib.suppress(UndecodableError):
            image = decode_reduced(memoryview(damaged), 3, min_side).image
            assert (image.dtype, image.shape[2]) == (np.uint8, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_of_many_scans_is_refused(channels: int) -> None:
    content = encode(noise(16, 16), "JPEG", progressive=True)
    assert decode_image(content, channels).shape == (16, 16, channels)
    scan = content.rindex(b"\xff\xda")
    bomb = content[:scan] + content[scan:-2] * 101 + content[-2:]
    with pytest.raises(UndecodableError, match="more than 100 scans"):
        decode_image(bomb, channels, np.empty((16, 16, channels), np.uint8))
    with pytest.raises(UndecodableError, match="more than 100 scans"), open_image(bomb):
        pass


def test_the_centre_square_is_kept() -> None:
    wide = smooth(8, 20)
    half = np.asarray(Image.fromarray(wide).resize((10, 4), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(center_crop_resize(Image.fromarray(wide), 4)) - half[:, 3:7]).max() <= 1
    tall = Image.fromarray(wide.transpose(1, 0, 2).copy())
    assert np.abs(np.asarray(center_crop_resize(tall, 4)) - half[:, 3:7].transpose(1, 0, 2)).max() <= 1
    square = noise(9, 9, 3)
    assert np.array_equal(np.asarray(center_crop_resize(Image.fromarray(square), 9)), square)
    assert center_crop_resize(Image.fromarray(noise(7, 8)), 3).size == (3, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_decoded_where_it_fits(channels: int) -> None:
    content = encode(smooth(16, 24), "JPEG")
    alone = decode_image(content, channels)
    exact = np.zeros((16, 24, channels), np.uint8)
    assert decode_image(content, channels, exact) is exact
    assert np.array_equal(exact, alone)
    for height, width in ((16, 23), (2, 2), (20, 30), (24, 16)):
        assert np.array_equal(decode_image(content, channels, np.zeros((height, width, channels), np.uint8)), alone)
    with pytest.raises(UndecodableError):
        decode_image(content[:60], channels, exact)


def test_a_wrong_size_names_both_ways_out() -> None:
    check_size(np.zeros((8, 8, 3), np.uint8), 8)
    with pytest.raises(DataError, match=r"^the image is 9x8, but data\.image_size is 8") as caught:
        check_size(np.zeros((8, 9, 3), np.uint8), 8)
    assert "--image-size 8" in str(caught.value)
