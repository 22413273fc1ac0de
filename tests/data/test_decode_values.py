"""Arrays and captions: what was saved, or one kind of error."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmdist.data.decode import (
    MAX_CAPTION_BYTES,
    UndecodableError,
    decode_array,
    decode_caption,
)


def npy(array: np.ndarray, **settings) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **settings)
    return buffer.getvalue()


def array_of(content: bytes) -> np.ndarray:
    return decode_array({"latent.npy": memoryview(content)}, "latent.npy")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8", "u1", "<u2", ">i8", "?"])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3, 2)])
def test_arrays_are_what_was_saved(version, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    for saved in (array, np.array(array, order="F")):
        read = array_of(npy(saved, version=version))
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert np.array_equal(read, array)


SAVED = npy(np.arange(24, dtype=np.uint8).reshape(4, 6))


def with_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a .npy file"),
        (b"\x80\x04\x95pickle", "not a .npy file"),
        (npy(np.zeros(3), version=(3, 0)), "not a .npy file of version 1 or 2"),
        (SAVED[:9], "damaged header"),
        (SAVED[:40], "damaged header"),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 6)"), "damaged header"),
        (with_header("(" * 3000), "damaged header"),
        (with_header("{'descr': '|u1', 'fortran_order': __import__('os').abort(), 'shape': (4, 6)}"), "damaged header"),
        (with_header(" " * 9000), "a header of 9010 bytes"),
        (SAVED[:-1], r"23 bytes of values, but uint8 \[4, 6\] take 24"),
        (SAVED + b"x", "25 bytes of values"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"), ".* take 8000000000000$"),
        (
            with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -6)}"),
            r"uint8 \[-4, -6\]; no axis may be shorter than 1",
        ),
        (npy(np.zeros((0, 4))), r"float64 \[0, 4\]; no axis may be shorter than 1"),
        (npy(np.array([{"a": 1}, None], object)), "values of type object"),
        (npy(np.array(["a", "b"])), "values of type <U1"),
        (npy(np.zeros(3, [("x", "f4")])), "values of type"),
        (npy(np.zeros(3, "c8")), "values of type complex64"),
        (npy(np.zeros(3, "M8[s]")), "values of type datetime64"),
    ],
)
def test_other_arrays_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=rf"^latent\.npy: {reason}"):
        array_of(content)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 151), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 152))
def test_a_damaged_array_is_an_array_or_undecodable(flips: list[tuple[int, int]], kept: int) -> None:
    content = bytearray(SAVED)
    for place, value in flips:
        content[place] = value
    with contextlib.suppress(UndecodableError):
        assert array_of(bytes(content[:kept])).nbytes <= len(SAVED)


def caption_of(content: bytes | None, source: str = "txt") -> str:
    members = {} if content is None else {source.split(":")[0]: memoryview(content)}
    return decode_caption({"png": memoryview(b""), **members}, source).decode()


@pytest.mark.parametrize("text", ["", "a cat", "eine süße Katze, 猫 🐈", "two\nlines"])
def test_captions_are_text(text: str) -> None:
    assert caption_of(text.encode()) == text
    assert caption_of(f" {text}\r\n".encode()) == text
    for escaped in (True, False):
        tree = {"width": 3, "caption": text, "alt": "x"}
        assert caption_of(json.dumps(tree, ensure_ascii=escaped).encode(), "json:caption") == text


@pytest.mark.parametrize(
    ("content", "source", "reason"),
    [
        (None, "txt", r"^no \.txt among its members \['png'\]$"),
        (None, "json:a", r"^no \.json among its members"),
        (
            "süß".encode("latin-1"),
            "txt",
            r"^txt: the caption is not UTF-8 \(.*0xfc in position 1.*\); convert it to UTF-8$",
        ),
        (b'{"a": "\xfc"}', "json:a", "^json: the caption is not UTF-8"),
        (b'{"a": "\\ud800"}', "json:a", "^json: the caption is not UTF-8"),
        (b'{"b": "x"}', "json:a", "^json: no text under the key 'a'$"),
        (b'{"a": null}', "json:a", "^json: no text under the key 'a'$"),
        (b'["a"]', "json:a", "^json: no text under the key 'a'$"),
        (b'{"a": "x"', "json:a", "^json: not JSON: "),
        (b"", "json:a", "^json: not JSON: "),
        (b"[" * 100_000, "json:a", "^json: not JSON: "),
        (b"x" * (MAX_CAPTION_BYTES + 1), "txt", "^txt: a caption of 65537 bytes; at most 65536"),
    ],
)
def test_other_captions_are_refused(content: bytes | None, source: str, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        caption_of(content, source)
