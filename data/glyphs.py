"""Glyphs: pictures of characters, drawn from fonts that every machine has.

    (font, character) -> 32 x 32 grey picture, its label (the character), its caption (style and name)

matplotlib, which this project needs anyway, ships 40 TrueType fonts. 21 of them are used: DejaVu, STIX and
Computer Modern. The others have other signs under the codes of letters, or empty frames. Each pair of a font
and a character is one image with an exact label, and needs no download. Held out are whole fonts, or pairs
whose font and character occur among the images to learn from, but not together.

    glyphs          62 letters and digits, drawn in 21 fonts; a tenth of the pairs is held out
    glyphs:fonts    the same; nine fonts are held out (STIX, Computer Modern), twelve are to learn from
    glyphs:few      the same nine fonts are held out; three of the twelve are to learn from: 186 images
    glyphs:all      Latin, Greek and Cyrillic letters, and digits: 17,000 pairs, a tenth of them held out
    glyphs:dejavu   those of glyphs:all in the twelve fonts of glyphs:fonts: for learning without labels. The
                    nine other fonts stay unseen, and a probe of the features is measured on them

    python -m data.glyphs [glyphs:all]      print how many there are, and some captions
"""

import string
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import command

SIZE = 32  # pixels, both ways
FONT_SIZE = 24  # pixels
HELD_OUT = 1 / 10  # share of the pairs
ALPHANUMERIC = string.ascii_uppercase + string.ascii_lowercase + string.digits
BLOCKS = (range(0x21, 0x250), range(0x370, 0x530), range(0x1E00, 0x2000))  # codes that "glyphs:all" looks at
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "DIGIT")  # how the names of the characters in "glyphs:all" begin
FONTS = {  # the file's name without .ttf: its style in words
    "DejaVuSans": "sans",
    "DejaVuSans-Bold": "bold sans",
    "DejaVuSans-Oblique": "oblique sans",
    "DejaVuSans-BoldOblique": "bold oblique sans",
    "DejaVuSansMono": "monospaced",
    "DejaVuSansMono-Bold": "bold monospaced",
    "DejaVuSansMono-Oblique": "oblique monospaced",
    "DejaVuSansMono-BoldOblique": "bold oblique monospaced",
    "DejaVuSerif": "serif",
    "DejaVuSerif-Bold": "bold serif",
    "DejaVuSerif-Italic": "italic serif",
    "DejaVuSerif-BoldItalic": "bold italic serif",
    "STIXGeneral": "times",
    "STIXGeneralBol": "bold times",
    "STIXGeneralItalic": "italic times",
    "STIXGeneralBolIta": "bold italic times",
    "cmr10": "roman",
    "cmb10": "bold roman",
    "cmss10": "roman sans",
    "cmti10": "italic roman",
    "cmtt10": "typewriter",
}
UNSEEN = tuple(font for font in FONTS if not font.startswith("DejaVu"))  # held out in glyphs:fonts and :few
FEW = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")  # to learn from in "glyphs:few"
SETS = ("glyphs", "glyphs:fonts", "glyphs:few", "glyphs:all", "glyphs:dejavu")


class Glyph(NamedTuple):
    """A character in a font."""

    font: str
    character: str


def caption(glyph: Glyph) -> str:
    """Return the style and the name of a glyph: "bold italic serif latin small letter g with breve"."""
    return f"{FONTS[glyph.font]} {unicodedata.name(glyph.character).lower()}"


@cache
def open_font(name: str, size: int = FONT_SIZE):
    """Return a font at a size in pixels. Raises ValueError where this matplotlib does not ship it."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    try:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); install matplotlib again") from None


def draw(glyph: Glyph) -> np.ndarray:
    """Return the picture of a glyph, uint8 (1, SIZE, SIZE): white, 255, in the middle of black, 0."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIZE, SIZE))
    middle = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(image).text(middle, glyph.character, 255, font=open_font(glyph.font), anchor="mm")
    return np.asarray(image)[None]


@cache
def covered(font: str) -> frozenset[int]:
    """Return the codes of the characters that a font has."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    return frozenset(FT2Font(str(path)).get_charmap())


def all_glyphs() -> list[Glyph]:
    """Return the glyphs of "glyphs:all", in the order of fonts and codes.

    Of Computer Modern it has only the 62 letters and digits: under other codes that has other characters.
    """
    every = [chr(code) for block in BLOCKS for code in block]
    known = [c for c in every if c.isalnum() and unicodedata.name(c, "").startswith(SCRIPTS)]
    return [
        Glyph(font, character)
        for font in FONTS
        for character in (ALPHANUMERIC if font.startswith("cm") else known)
        if ord(character) in covered(font)
    ]


def choose(name: str) -> tuple[list[Glyph], list[Glyph]]:
    """Return (glyphs to learn from, glyphs held out) of one of SETS.

    Either whole fonts are held out, or pairs whose font and character both occur among those to learn from.
    Raises ValueError for another name.
    """
    if name not in SETS:
        raise ValueError(f"--data {name}: expected {', '.join(SETS[:-1])} or {SETS[-1]}")
    if name == "glyphs:all":
        return hold_out_pairs(all_glyphs())
    if name == "glyphs:dejavu":
        return hold_out_pairs([g for g in all_glyphs() if g.font not in UNSEEN])
    glyphs = [Glyph(f, c) for f in FONTS for c in ALPHANUMERIC]
    if name == "glyphs":
        return hold_out_pairs(glyphs)
    train = [g for g in glyphs if (g.font in FEW if name == "glyphs:few" else g.font not in UNSEEN)]
    return train, [g for g in glyphs if g.font in UNSEEN]


def hold_out_pairs(glyphs: list[Glyph]) -> tuple[list[Glyph], list[Glyph]]:
    """Return (glyphs to learn from, a tenth to hold out). The choice is the same in every run.

    Each character stays in at least one font among those to learn from.
    """
    left: dict[str, int] = {}
    for glyph in glyphs:
        left[glyph.character] = left.get(glyph.character, 0) + 1
    held: set[Glyph] = set()
    for i in np.random.default_rng(0).permutation(len(glyphs)):
        if len(held) < int(len(glyphs) * HELD_OUT) and left[glyphs[i].character] > 1:
            held.add(glyphs[i])
            left[glyphs[i].character] -= 1
    return [g for g in glyphs if g not in held], [g for g in glyphs if g in held]


def pictures(glyphs: Iterable[Glyph]) -> np.ndarray:
    """Return the pictures of glyphs, uint8 (n, 1, SIZE, SIZE)."""
    return np.stack([draw(glyph) for glyph in glyphs])


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Count the glyphs of a set, and print some captions.")
    parser.add_argument(
        "name", nargs="?", default="glyphs", help=f"one of {', '.join(SETS)} (default %(default)s)"
    )
    args = parser.parse_args(argv)
    for part, glyphs in zip(("to learn from", "held out"), choose(args.name), strict=True):
        n_characters = len({glyph.character for glyph in glyphs})
        n_fonts = len({glyph.font for glyph in glyphs})
        print(f"{len(glyphs):,} {part}: {n_characters:,} characters in {n_fonts} fonts")
        for i in range(4):
            glyph = glyphs[i * len(glyphs) // 4]
            print(f"    {glyph.character}  {caption(glyph)}")


if __name__ == "__main__":
    command.run(main)
