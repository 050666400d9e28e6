"""Sounds from files of every kind: what is converted, counted, refused, and decoded once."""

import re
import struct
import wave
from collections import Counter

import numpy as np
import pytest
from scipy.signal import resample_poly

from data import sounds
from data.notes import write_wav

N, RATE = 2000, 8000


def tone(n, rate=RATE, frequency=440.0):
    return (20_000 * np.sin(2 * np.pi * frequency * np.arange(n) / rate)).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two classes, each of ten sounds of its own pitch."""
    for name, frequency in (("high", 1500.0), ("low", 300.0)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            write_wav(tmp_path / "set" / name / f"{i}.wav", tone(N, frequency=frequency + i), RATE)
    return tmp_path / "set"


def prepare(folder, **options):
    """Return the data set of a folder, and the lines that are printed."""
    lines = []
    return sounds.prepare(
        str(folder), N, RATE, folder.parent / "cache", notify=lines.append, **options
    ), lines


def test_a_folder_for_each_class_is_decoded_once_to_a_memory_map(folder, monkeypatch):
    dataset, lines = prepare(folder)
    assert dataset.labels == ("high", "low") and lines == []
    assert dataset.unit == "seconds-of-sound" and dataset.units_per_row == 0.25
    assert "18 sounds of 0.25 s at 8,000 Hz to learn from, 2 held out, 2 classes" in dataset.summary
    row = dataset.train[0]
    assert row["sound"].dtype == np.int16 and row["sound"].shape == (N,) and row["length"] == N
    assert row["augment"] and not dataset.val[0]["augment"] and isinstance(dataset.train.rows, np.memmap)
    spectrum = np.abs(np.fft.rfft(row["sound"]))
    assert abs(spectrum.argmax() * RATE / N - (1500, 300)[row["label"]]) < 20

    # The second time nothing is decoded. A changed file is.
    monkeypatch.setattr(sounds, "decode", lambda *_: pytest.fail("decoded again"))
    assert prepare(folder)[0].fingerprint == dataset.fingerprint
    monkeypatch.undo()
    write_wav(folder / "low" / "0.wav", tone(N + 1), RATE)
    assert prepare(folder)[0].fingerprint != dataset.fingerprint


def test_what_is_converted_is_counted(folder):
    low = folder / "low"
    write_wav(low / "0.wav", np.stack((tone(N), tone(N, frequency=500.0)), 1), RATE)
    write_wav(low / "1.wav", tone(2 * N, 2 * RATE), 2 * RATE)
    write_wav(low / "2.wav", tone(3 * N), RATE)
    write_wav(low / "3.wav", tone(N // 2), RATE)
    write_wav(low / "4.wav", np.zeros(N, np.int16), RATE)
    dataset, lines = prepare(folder)
    expected = [
        "1 at 16,000 Hz (resampled)",
        "1 longer than 0.25 s (beginning kept)",
        "1 of 2 channels (averaged)",
    ]
    assert lines == [f"20 sounds read: {', '.join(expected)}, 1 shorter than 0.25 s, 1 silent"]
    rows = [part[i] for part in (dataset.train, dataset.val) for i in range(len(part))]
    lengths = [int(row["length"]) for row in rows]
    assert sorted(lengths)[:2] == [N // 2, N]
    short = rows[lengths.index(N // 2)]["sound"]
    assert short[: N // 2].any() and not short[N // 2 :].any()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_8_to_32_bits_are_the_same_sound(width, tmp_path):
    exact = np.array([0.0, 0.5, -0.5, 0.25, -1.0, 127 / 128] * 100)
    whole = (exact * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    raw = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in whole)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, width, RATE, 0, "NONE", ""))
        file.writeframes(raw)
    decoded = sounds.decode(tmp_path / "a.wav", 600, RATE, Counter())
    assert np.array_equal(decoded, (exact * 32768).astype(np.int16))


@pytest.mark.parametrize("rate, new", [(44_100, 16_000), (8000, 16_000), (16_000, 8000), (44_099, 16_000)])
def test_another_rate_keeps_what_both_can_hold_and_nothing_else(rate, new):
    t, u = np.arange(rate) / rate, np.arange(new) / new
    for frequency in (50.0, 1000.0, 3000.0):
        out = sounds.resampled(np.sin(2 * np.pi * frequency * t), rate, new)
        inner = slice(new // 10, -new // 10)
        assert len(out) == new
        assert np.abs(out - np.sin(2 * np.pi * frequency * u))[inner].max() < 2e-3
    if new < rate:  # what would come back as another pitch is gone
        high = sounds.resampled(np.sin(2 * np.pi * 0.62 * new * t), rate, new)
        assert np.abs(high[inner]).max() < 2e-3


def test_resampling_agrees_with_scipy():
    x = np.convolve(np.random.default_rng(0).standard_normal(44_100), np.ones(8) / 8, "same")
    ours, theirs = sounds.resampled(x, 44_100, 16_000), resample_poly(x, 160, 441)
    difference = (ours - theirs)[200:-200]
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(theirs**2))


def test_what_cannot_be_read_is_refused_by_name_or_left_out(folder, monkeypatch):
    low = folder / "low"
    whole = (low / "0.wav").read_bytes()
    cases = {
        "0.wav": (whole[:-1000], "cut off; its header promises 2,000 samples"),
        "1.wav": (b"RIFF no sound at all", "damaged, or no sound"),
        "2.wav": (b"", "damaged, or no sound"),
        "3.wav": (whole[:24] + struct.pack("<I", 7) + whole[28:], "7 samples a second; expected 1,000"),
        "4.wav": (whole[:22] + struct.pack("<H", 99) + whole[24:], "99 channels; expected 1 to 64"),
        "5.wav": (
            whole[:20] + struct.pack("<H", 3) + whole[22:],
            "other than whole numbers need: pip install",
        ),
        "5b.wav": (whole[:32] + struct.pack("<HH", 8, 64) + whole[36:], "samples of 64 bits; expected 8, 16"),
        "6.flac": (b"fLaC", "need: pip install soundfile"),
    }
    write_wav(low / "7.wav", tone(20), RATE)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    for name, (content, words) in cases.items():
        (low / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            sounds.decode(low / name, N, RATE, Counter())
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"7\.wav: 20 samples at 8,000 Hz; expected at least 0\.05 s"):
        sounds.decode(low / "7.wav", N, RATE, Counter())
    with pytest.raises(ValueError, match=r"0\.wav: cut off.*--bad-text skip to leave such sounds out"):
        prepare(folder)
    dataset, lines = prepare(folder, bad_sounds="skip")
    assert len(dataset.train) + len(dataset.val) == 13 and lines[-1] == "22 sounds read: 9 left out"
    assert lines[0].startswith("skipped: ") and len(lines) == 5 + 1


def test_the_beginning_of_a_long_file_is_read_and_no_more(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(50 * N), RATE)
    read, original = [], wave.Wave_read.readframes
    monkeypatch.setattr(wave.Wave_read, "readframes", lambda self, n: read.append(n) or original(self, n))
    counts = Counter()
    assert len(sounds.decode(tmp_path / "a.wav", N, RATE, counts)) == N
    assert sum(read) < 1.1 * N and counts == {"longer than 0.25 s (beginning kept)": 1}


def test_a_resampled_sound_ends_as_if_the_whole_file_had_been_read(tmp_path):
    x = np.random.default_rng(0).integers(-9000, 9000, 16_000).astype(np.int16)
    for own, rate in ((1_000, 1_001), (1_000, 48_000), (44_100, 16_000)):
        write_wav(tmp_path / "a.wav", x, own)
        whole = sounds.resampled(x / 32768, own, rate)[:500]
        found = sounds.decode(tmp_path / "a.wav", 500, rate, Counter())
        assert np.array_equal(found, (whole * 32768).round()), (own, rate)


def test_flac_and_floating_point_are_read_where_soundfile_is_installed(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    x = tone(N) / 32768
    soundfile.write(tmp_path / "a.flac", x, RATE)
    soundfile.write(tmp_path / "a.wav", x, RATE, subtype="FLOAT")
    for name in ("a.flac", "a.wav"):
        assert np.abs(sounds.decode(tmp_path / name, N, RATE, Counter()) - tone(N).astype(int)).max() <= 1
    (tmp_path / "a.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"a\.flac: "):
        sounds.decode(tmp_path / "a.flac", N, RATE, Counter())


def test_what_is_no_set_of_sounds_is_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="--data nowhere: not found; expected notes, or a folder of sounds"):
        sounds.prepare("nowhere", N, RATE, tmp_path)
    with pytest.raises(ValueError, match="--val x: notes has a held-out part of its own"):
        sounds.prepare("notes", N, RATE, tmp_path, val="x")
    sounds.main([str(folder), "--seconds", "0.25", "--rate", "8000", "--cache", str(tmp_path / "cache")])
    assert "9 high" in capsys.readouterr().out
    for flags, problem in (
        (["--rate", "7"], "--rate 7: expected 1,000 to 768,000 samples a second"),
        (["--seconds", "0.01"], "--seconds 0.01: expected 0.025 to 3,600"),
        (["--seconds", "inf"], "--seconds inf: expected 0.025"),
        (["--seconds", "nan"], "--seconds nan: expected 0.025"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)):
            sounds.main([str(folder), *flags])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a class without sounds; expected files of"):
        prepare(folder)
