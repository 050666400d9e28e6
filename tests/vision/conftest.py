"""A few glyphs and sounds in place of thousands, for runs of a few steps."""

import pytest

from data import glyphs, notes
from data.glyphs import Glyph
from data.notes import Note

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmr10", "STIXGeneral")


@pytest.fixture
def few_glyphs(monkeypatch):
    """Let every set of glyphs be three characters in five fonts, of which two are held out."""
    every = [Glyph(font, character) for font in FONTS for character in "Ab7"]
    monkeypatch.setattr(glyphs, "choose", lambda name: (every[:9], every[9:]))


@pytest.fixture
def few_notes(monkeypatch):
    """Let the set of notes be two chords of each instrument, of which one take each is held out."""
    every = [Note(instrument, "major", root, 0) for instrument in notes.INSTRUMENTS for root in (50, 55)]
    held = [note._replace(take=1) for note in every]
    monkeypatch.setattr(notes, "choose", lambda: (every, held))
