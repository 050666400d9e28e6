"""Glyphs drawn from the fonts of matplotlib, and which of them are held out."""

import numpy as np
import pytest

from data import glyphs
from data.glyphs import Glyph

FEW = [Glyph(font, character) for font in ("DejaVuSans", "STIXGeneralBol", "cmtt10") for character in "Ag7b"]


def test_a_glyph_is_ink_in_the_middle_of_a_black_square_and_always_the_same():
    pictures = glyphs.pictures(FEW)
    assert pictures.shape == (12, 1, 32, 32) and pictures.dtype == np.uint8
    assert pictures.max(axis=(1, 2, 3)).min() > 200 and pictures[:, 0, 0, 0].max() == 0
    assert len({picture.tobytes() for picture in pictures}) == 12
    assert np.array_equal(pictures, glyphs.pictures(FEW))
    rows, columns = (pictures.sum(axis).nonzero()[-1] for axis in ((0, 1, 3), (0, 1, 2)))
    assert abs(rows.mean() - 15.5) < 3 and abs(columns.mean() - 15.5) < 3


def test_a_caption_is_the_style_and_the_name_of_the_character():
    assert glyphs.caption(Glyph("DejaVuSerif-BoldItalic", "ğ")) == (
        "bold italic serif latin small letter g with breve"
    )
    assert len(glyphs.FONTS) == 21 and len(set(glyphs.FONTS.values())) == 21


def test_held_out_are_pairs_whose_font_and_character_were_both_seen():
    train, held = glyphs.choose("glyphs")
    assert (len(train), len(held)) == (1172, 130) and not set(train) & set(held)
    assert {g.character for g in held} <= {g.character for g in train}
    assert {g.font for g in held} <= {g.font for g in train}
    assert glyphs.choose("glyphs") == (train, held)


def test_held_out_are_whole_fonts():
    train, held = glyphs.choose("glyphs:fonts")
    assert (len(train), len(held)) == (12 * 62, 9 * 62)
    assert not {g.font for g in train} & {g.font for g in held}


def test_fonts_are_held_out_of_few_labels_and_of_the_images_without_labels():
    few, unseen = glyphs.choose("glyphs:few")
    assert len(few) == 186 and unseen == glyphs.choose("glyphs:fonts")[1]
    train, held = glyphs.choose("glyphs:dejavu")
    fonts = {g.font for g in unseen}
    assert not fonts & {g.font for g in train + held + few} and len(train) > 10_000
    assert len(held) == (len(train) + len(held)) // 10 and not set(train) & set(held)
    assert set(train + held) < set(glyphs.all_glyphs())


def test_all_glyphs_are_letters_and_digits_that_their_font_really_has():
    train, held = glyphs.choose("glyphs:all")
    every = train + held
    assert len(every) == len(set(every)) > 15_000 and len(held) == len(every) // 10
    assert {g.character for g in held} <= {g.character for g in train}
    assert {g.character for g in every if g.font.startswith("cm")} == set(glyphs.ALPHANUMERIC)
    sample = every[:: len(every) // 100]
    assert glyphs.pictures(sample).max(axis=(1, 2, 3)).min() > 100


def test_the_command_counts_and_a_wrong_name_is_refused(capsys):
    glyphs.main(["glyphs:fonts"])
    assert "558 held out: 62 characters in 9 fonts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--data glyphs:x: expected glyphs"):
        glyphs.choose("glyphs:x")
