"""Synthesised notes: always the same, in combinations that are held out, and what the instruments are."""

import wave

import numpy as np
import pytest

from data import notes
from data.notes import Note


def test_held_out_chords_of_an_instrument_are_played_by_others():
    learn, held = notes.choose()
    assert (len(learn), len(held)) == (2016, 288) and notes.choose() == (learn, held)
    pairs = [{note[:3] for note in part} for part in (learn, held)]
    assert not pairs[0] & pairs[1]
    for place in range(3):  # each instrument, chord and root is learned
        assert {note[place] for note in held} <= {note[place] for note in learn}


@pytest.mark.parametrize("instrument", notes.INSTRUMENTS)
def test_a_sound_is_always_the_same_and_its_lowest_note_is_the_root(instrument):
    note, n = Note(instrument, "major", 57, 1), 8000
    sound = notes.render(note, n, 16_000)
    assert (
        sound.dtype == np.int16
        and sound.shape == (n,)
        and np.array_equal(sound, notes.render(note, n, 16_000))
    )
    assert not np.array_equal(sound, notes.render(note._replace(take=0), n, 16_000))
    peak = np.abs(sound).max() / 32768
    assert 0.09 < peak <= 1
    # From 150 to 240 Hz the loudest is 220 Hz, give or take 30 cents, and 20 more because the peaks of a
    # third of a second are some hertz wide.
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(n), 8 * n))
    frequencies = np.fft.rfftfreq(8 * n, 1 / 16_000)
    low = (frequencies > 150) & (frequencies < 240)
    loudest = frequencies[low][spectrum[low].argmax()]
    assert 220 * 2 ** (-0.5 / 12) < loudest < 220 * 2 ** (0.5 / 12)


def test_a_saw_has_all_harmonics_and_a_square_the_odd_ones_with_little_aliasing():
    n, rate, f = 16_000, 16_000, 500.0  # the rounding of jumps makes high ones less loud, at 3 kHz by a tenth
    for instrument, present in (("saw", lambda k: True), ("square", lambda k: k % 2 == 1)):
        tone = notes.tone(instrument, f, n, rate, np.random.default_rng(0))
        spectrum = np.abs(np.fft.rfft(tone)) / n
        for k in range(1, 7):
            expected = (1 if instrument == "saw" else 2) / (np.pi * k) if present(k) else 0.0
            assert spectrum[round(k * f)] == pytest.approx(expected, rel=0.12, abs=2e-3), (instrument, k)
    # Harmonics beyond half the rate come back, in a naive saw between the others.
    f = 1730.0
    turns = f * np.arange(n) / rate
    smooth = np.abs(np.fft.rfft(notes.smoothed_saw(turns, f / rate)))
    naive = np.abs(np.fft.rfft(2 * (turns % 1) - 1))
    between = np.ones(len(smooth), bool)
    between[np.round(np.arange(0, rate / 2, f)).astype(int)] = False
    assert np.sum(smooth[between] ** 2) < 0.2 * np.sum(naive[between] ** 2)


def test_the_command_writes_folders_of_wav_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notes, "ROOTS", range(45, 47))
    notes.main([str(tmp_path / "set")])
    assert "48 sounds of one second" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--takes 5: expected 1 to 4"):
        notes.main([str(tmp_path / "set"), "--takes", "5"])
    assert len(list((tmp_path / "set" / "val").rglob("*.wav"))) == 6
    with wave.open(str(next((tmp_path / "set" / "train" / "bell").iterdir()))) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, 16_000)
