"""The embedded glyphs: characters of the fonts that Matplotlib carries, with captions from their Unicode names."""

import functools
import hashlib
import io
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GLYPH_SIZE = 64  # pixels a side
_INK_SIZE = 56  # pixels a side at most: the rest is margin
_EM = 44.0  # pixels: most characters keep their size, so that an o is smaller than an O
_MIN_FACES = 9  # that draw a character, each in its own way: all of ASCII has so many
_TEST_EVERY = 6  # of each class

_FACES = {  # file: how captions call it
    "DejaVuSans": "sans-serif",
    "DejaVuSans-Bold": "sans-serif, bold",
    "DejaVuSans-Oblique": "sans-serif, oblique",
    "DejaVuSans-BoldOblique": "sans-serif, bold, oblique",
    "DejaVuSansMono": "monospace",
    "DejaVuSansMono-Bold": "monospace, bold",
    "DejaVuSansMono-Oblique": "monospace, oblique",
    "DejaVuSansMono-BoldOblique": "monospace, bold, oblique",
    "DejaVuSerif": "serif",
    "DejaVuSerif-Bold": "serif, bold",
    "DejaVuSerif-Italic": "serif, italic",
    "DejaVuSerif-BoldItalic": "serif, bold, italic",
    "STIXGeneral": "times",
    "STIXGeneralBol": "times, bold",
    "STIXGeneralItalic": "times, italic",
    "STIXGeneralBolIta": "times, bold, italic",
    "cmr10": "computer modern",
    "cmb10": "computer modern, bold",
    "cmti10": "computer modern, italic",
    "cmss10": "computer modern, sans-serif",
    "cmtt10": "computer modern, typewriter",
}
# Faces whose strokes end in serifs, typewriters too; the others are sans-serif, monospaced or not.
_SERIF_FACES = {face for face in _FACES if face.startswith(("DejaVuSerif", "STIX", "cm")) and face != "cmss10"}
# Their other codes are not what Unicode says: TeX's fonts are older.
_TEX_CHARACTERS = {c for c in map(chr, range(128)) if c.isalnum()}

_PALETTE = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (215, 25, 30),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 60),
    "green": (20, 120, 50),
    "cyan": (100, 215, 225),
    "blue": (30, 60, 190),
    "purple": (105, 35, 130),
    "pink": (250, 165, 195),
    "brown": (110, 65, 30),
    "grey": (130, 130, 130),
}
_MIN_CONTRAST = 3.0  # what WCAG 2.2 asks of large text
_LIGHT = 0.3  # relative luminance of a light colour, at least


@dataclass(frozen=True)
class Glyph:
    """One character in one face."""

    character: str
    face: str  # a file of _FACES
    ink: Image.Image  # mode L, 64x64: how much of each pixel is covered

    @property
    def key(self) -> str:
        """Names it."""
        return f"{ord(self.character):04x}-{self.face}"

    @property
    def has_serifs(self) -> bool:
        """Whether its face is one with serifs."""
        return self.face in _SERIF_FACES


def name_of(character: str) -> str:
    """What captions and classes call a character: its Unicode name, small."""
    return unicodedata.name(character).lower()


def glyphs() -> list[Glyph]:
    """Every glyph of the classes, ordered by character and face.

    A class is a character that at least 9 faces draw, each in its own way: images that are there already (a Greek
    capital that looks like the Latin one, a sign that a face shares with its oblique) are left out.
    """
    drawn: set[bytes] = set()
    found: dict[str, list[Glyph]] = defaultdict(list)
    for face in _FACES:
        for character, ink in _drawn(face):
            if (content := ink.tobytes()) not in drawn:
                drawn.add(content)
                found[character].append(Glyph(character, face, ink))
    return [glyph for character in sorted(found) if len(found[character]) >= _MIN_FACES for glyph in found[character]]


def _drawn(face: str) -> Iterator[tuple[str, Image.Image]]:
    """The characters of a face."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    fonts: dict[float, ImageFont.FreeTypeFont] = {}

    def font(size: float) -> ImageFont.FreeTypeFont:
        # Raqm is not everywhere and shapes as it likes; single characters need no shaping.
        if size not in fonts:
            fonts[size] = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        return fonts[size]

    for code in sorted(FT2Font(path).get_charmap()):
        character = chr(code)
        if not _is_visible(character) or (face.startswith("cm") and character not in _TEX_CHARACTERS):
            continue
        ink = _ink(character, font(_EM))
        if ink is not None and max(ink.size) > _INK_SIZE:
            ink = _ink(character, font(float(int(_EM * _INK_SIZE / max(ink.size)))))
        if ink is not None:
            image = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
            image.paste(ink, ((GLYPH_SIZE - ink.width) // 2, (GLYPH_SIZE - ink.height) // 2))
            yield character, image


def _ink(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """A character as large as its ink is; None if it has none."""
    left, top, right, bottom = (int(end) for end in font.getbbox(character))
    image = Image.new("L", (max(1, right - left + 2), max(1, bottom - top + 2)))
    ImageDraw.Draw(image).text((1 - left, 1 - top), character, 255, font)
    box = image.getbbox()
    return None if box is None else image.crop(box)


def _is_visible(character: str) -> bool:
    """Whether a character stands by itself: no control, unassigned or private code, no space, no combining mark."""
    return unicodedata.category(character)[0] not in "CZM" and bool(unicodedata.name(character, ""))


def split(found: list[Glyph]) -> dict[str, list[Glyph]]:
    """The glyphs of the splits "train" and "test", shuffled.

    Of each character every sixth face, in an order of its own, is in the test split. Every character is in both.
    """
    parts: dict[str, list[Glyph]] = {"train": [], "test": []}
    seen: dict[str, int] = defaultdict(int)
    for glyph in sorted(found, key=lambda glyph: _hash(glyph.key)):
        is_test = seen[glyph.character] % _TEST_EVERY == _TEST_EVERY - 1
        seen[glyph.character] += 1
        parts["test" if is_test else "train"].append(glyph)
    return parts


def sample(glyph: Glyph, label: int, colour: bool) -> tuple[str, dict[str, bytes]]:
    """A glyph as a sample of a data set: its key, and its members "png", "cls" and "txt".

    In grey it is white on black; in colour its caption says which colour is on which.
    """
    caption = f"{name_of(glyph.character)}, {_FACES[glyph.face]}"
    image = glyph.ink
    if colour:
        above, below = pair_of(colour_pairs(), glyph.key)
        caption += f", {above} on {below}"
        image = coloured(image, above, below)
    png = io.BytesIO()
    image.save(png, "PNG")
    return glyph.key, {"png": png.getvalue(), "cls": str(label).encode(), "txt": caption.encode()}


@functools.cache
def colour_pairs() -> list[tuple[str, str]]:
    """Names of two colours that stand out against each other."""
    return [(a, b) for a in _PALETTE for b in _PALETTE if _contrast(_PALETTE[a], _PALETTE[b]) >= _MIN_CONTRAST]


@functools.cache
def dark_on_light() -> list[tuple[str, str]]:
    """Those of them with a dark colour on a light one."""
    lights = {name: _luminance(colour) for name, colour in _PALETTE.items()}
    return [(a, b) for a, b in colour_pairs() if lights[a] < lights[b] >= _LIGHT]


def pair_of(pairs: list[tuple[str, str]], key: str) -> tuple[str, str]:
    """The pair of colours that an image's key draws."""
    return pairs[_hash(f"{key} colour") % len(pairs)]


def coloured(ink: Image.Image, above: str, below: str) -> Image.Image:
    """An image of mode L in two colours: what is white in it in the first, what is black in the second."""
    image = ink.copy()
    image.putpalette(np.linspace(_PALETTE[below], _PALETTE[above], 256).round().astype(np.uint8).tobytes())
    return image


def _contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """The contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted(_luminance(colour) + 0.05 for colour in (one, other))
    return light / dark


def _luminance(colour: tuple[int, int, int]) -> float:
    """The relative luminance of an sRGB colour, 0 to 1 (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
