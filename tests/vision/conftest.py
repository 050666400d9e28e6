"""A few glyphs in place of thousands, for runs of a few steps."""

import pytest

from data import glyphs
from data.glyphs import Glyph

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmr10", "STIXGeneral")


@pytest.fixture
def few_glyphs(monkeypatch):
    """Let every set of glyphs be three characters in five fonts, of which two are held out."""
    every = [Glyph(font, character) for font in FONTS for character in "Ab7"]
    monkeypatch.setattr(glyphs, "choose", lambda name: (every[:9], every[9:]))
