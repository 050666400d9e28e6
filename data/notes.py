"""Notes: chords of synthesised instruments, a set of sounds that needs no download.

Six instruments are synthesised, each playing a chord, with pitch, loudness, beginning, noise and the
frequency response of the microphone at random. Held out are *combinations*: an instrument with a chord on a
root that it never plays among the sounds to learn from, where other instruments do.

    sine      sin(2 pi f t)
    saw       all harmonics, the k-th 1/k as loud; its jumps are rounded against aliasing (PolyBLEP, Välimäki
              and Huovilainen 2007, IEEE Signal Processing Magazine 24(2))
    square    the odd harmonics of a saw
    bell      frequency modulation whose depth decays (Chowning 1973)
    pluck     a string: a burst of noise in a loop that averages neighbours (Karplus and Strong 1983)
    organ     six harmonics of one note, with vibrato

    python -m data.notes FOLDER      write the sounds as .wav files, a folder for each instrument

Shapes: N sounds, n samples of each.
"""

import wave
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import command

INSTRUMENTS = ("sine", "saw", "square", "bell", "pluck", "organ")
CHORDS = {  # name: its notes in semitones above the root
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "diminished": (0, 3, 6),
    "augmented": (0, 4, 8),
}
ROOTS = range(45, 69)  # MIDI numbers: A2, 110 Hz, to G sharp 4, 415 Hz
HELD_OUT = 1 / 8  # share of each instrument's pairs of a chord and a root
TAKES = 4  # sounds of each combination of instrument, chord and root
ORGAN = {1: 1.0, 2: 0.8, 3: 0.6, 4: 0.5, 6: 0.3, 8: 0.3}  # harmonic: loudness


class Note(NamedTuple):
    """A chord of an instrument. Its takes differ in what is random."""

    instrument: str
    chord: str
    root: int  # MIDI number of its lowest note
    take: int = 0


def choose() -> tuple[list[Note], list[Note]]:
    """Return (notes to learn from, notes held out), the same in every run.

    Every instrument, chord and root is among those to learn from.
    """
    learn, held = [], []
    for i, instrument in enumerate(INSTRUMENTS):
        every = [(chord, root) for chord in CHORDS for root in ROOTS]
        order = np.random.default_rng(i).permutation(len(every))
        for place, j in enumerate(order):
            takes = [Note(instrument, *every[j], take) for take in range(TAKES)]
            (held if place < len(every) * HELD_OUT else learn).extend(takes)
    return learn, held


def smoothed_saw(turns: np.ndarray, step: float) -> np.ndarray:
    """Return a saw wave at phases `turns` (n,), in turns, which advance by `step` from sample to sample.

    A polynomial is added to the two samples around each jump, which takes out most of the aliasing.
    """
    phase = turns % 1
    y = 2 * phase - 1
    before, after = phase > 1 - step, phase < step
    x = (phase[before] - 1) / step
    y[before] -= x * x + 2 * x + 1
    x = phase[after] / step
    y[after] -= 2 * x - x * x - 1
    return y


def pluck(frequency: float, n: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return a plucked string (n,): y_i = .996 (y_{i - P} + y_{i - P - 1}) / 2, with noise as the first P."""
    P = round(rate / frequency - 0.5)  # the period is P + 1/2 samples, since the average adds a half
    block, last = rng.uniform(-1, 1, P), 0.0
    blocks = []
    for _ in range(-(-n // P)):
        blocks.append(block)
        shifted = np.concatenate(([last], block[:-1]))
        block, last = 0.996 * (block + shifted) / 2, block[-1]
    return np.concatenate(blocks)[:n]


def tone(instrument: str, frequency: float, n: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return one note (n,) of an instrument, of any loudness: `render` scales each chord."""
    if instrument == "pluck":
        return 2 * pluck(frequency, n, rate, rng)
    t, phase = np.arange(n) / rate, rng.uniform()
    turns = frequency * t + phase
    if instrument == "sine":
        return np.sin(2 * np.pi * turns)
    step = frequency / rate
    if instrument == "saw":
        return smoothed_saw(turns, step)
    if instrument == "square":
        return smoothed_saw(turns, step) - smoothed_saw(turns + 0.5, step)
    if instrument == "bell":
        depth, ratio = 4 * np.exp(-4 * t), 1.4
        return np.exp(-2 * t) * np.sin(2 * np.pi * turns + depth * np.sin(2 * np.pi * ratio * frequency * t))
    # The organ: its frequency swings by 1 percent up and down, a sixth of a semitone, six times a second.
    swing = frequency * 0.01 / (2 * np.pi * 6) * np.sin(2 * np.pi * 6 * t + rng.uniform(0, 6))
    turns = turns + swing
    return sum(loud * np.sin(2 * np.pi * k * turns) for k, loud in ORGAN.items() if k * frequency < rate / 2)


def render(note: Note, n: int, rate: int) -> np.ndarray:
    """Return the sound of a note, int16 (n,): n samples, `rate` of them a second."""
    # Each note has a generator of its own, so a sound does not depend on which others are rendered.
    seed = INSTRUMENTS.index(note.instrument), list(CHORDS).index(note.chord), note.root, note.take
    rng = np.random.default_rng(seed)
    detuned, begin = note.root + rng.uniform(-0.3, 0.3), int(rng.uniform(0, 0.4) * n)
    loudness, noise = 10 ** rng.uniform(-1, -0.2), 10 ** rng.uniform(-2, -0.5)

    # The notes of the chord, which begin together and fade in within 5 ms.
    sound = np.zeros(n)
    for semitones in CHORDS[note.chord]:
        frequency = 440 * 2 ** ((detuned + semitones - 69) / 12)
        sound[begin:] += tone(note.instrument, frequency, n - begin, rate, rng)
    sound[begin:] *= np.minimum(np.arange(n - begin) / (0.005 * rate), 1)

    # The microphone favours high frequencies or low ones, by up to 6 decibels per octave.
    octaves = np.log2(np.maximum(np.fft.rfftfreq(n, 1 / rate), 50) / 1000)
    sound = np.fft.irfft(np.fft.rfft(sound) * 10 ** (rng.uniform(-6, 6) / 20 * octaves), n)

    # Scale to a peak of 1, add noise relative to it, and scale by the loudness.
    sound = loudness * (sound / np.abs(sound).max() + noise * rng.standard_normal(n))
    return (32767 * sound.clip(-1, 1)).round().astype(np.int16)


def sounds(notes: Iterable[Note], n: int, rate: int) -> np.ndarray:
    """Return the sounds of notes, int16 (N, n)."""
    return np.stack([render(note, n, rate) for note in notes])


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Write synthesised sounds as .wav files.")
    add = parser.add_argument
    add("folder", type=command.path, help="folder to write to; it gets a folder for each instrument")
    add("--takes", type=int, default=1, help=f"sounds of each combination, at most {TAKES} (default 1)")
    args = parser.parse_args(argv)
    if not 1 <= args.takes <= TAKES:
        raise ValueError(f"--takes {args.takes}: expected 1 to {TAKES}")
    n_written = 0
    for part, notes in zip(("train", "val"), choose(), strict=True):
        for note in (note for note in notes if note.take < args.takes):
            path = args.folder / part / note.instrument / f"{note.chord}-{note.root}-{note.take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, render(note, 16_000, 16_000), 16_000)
            n_written += 1
    print(f"{n_written:,} sounds of one second in {args.folder}")


def write_wav(path: Path, sound: np.ndarray, rate: int) -> None:
    """Write samples, int16 (S,) or (S, channels), as a .wav file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound.astype("<i2").tobytes())


if __name__ == "__main__":
    command.run(main)
