"""Notes: chords of synthesised instruments, which every machine has.

No machine ships recordings that one could learn from. So six instruments are synthesised, each playing a
chord, with pitch, loudness, beginning, noise and the colour of the microphone at random. What is held out is
a *combination*: an instrument with a chord that it was never heard to play, though other instruments were.

    sine      sin(2 pi f t)
    saw       all harmonics, the k-th 1/k as loud; its jump is rounded against aliasing (PolyBLEP)
    square    the odd harmonics of it
    bell      frequency modulation whose depth decays (Chowning 1973)
    pluck     a string: a burst of noise in a loop that averages neighbours (Karplus and Strong 1983)
    organ     six harmonics of one note, with vibrato

    python -m data.notes FOLDER      write the sounds as .wav files, a folder for each instrument

Shapes: S samples.
"""

import wave
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import command

INSTRUMENTS = ("sine", "saw", "square", "bell", "pluck", "organ")
CHORDS = {
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "diminished": (0, 3, 6),
    "augmented": (0, 4, 8),
}  # semitones
ROOTS = range(45, 69)  # MIDI numbers: A2, 110 Hz, to G sharp 4, 415 Hz
HELD_OUT = 1 / 8  # share of each instrument's chords
TAKES = 4  # sounds of each combination
ORGAN = {1: 1.0, 2: 0.8, 3: 0.6, 4: 0.5, 6: 0.3, 8: 0.3}  # harmonic: loudness


class Note(NamedTuple):
    """A chord of an instrument, in one of several takes, which differ by chance."""

    instrument: str
    chord: str
    root: int  # MIDI number of its lowest note
    take: int = 0


def choose(name: str) -> tuple[list[Note], list[Note]]:
    """Return (notes to learn from, notes held out) of the set "notes": always the same.

    Every instrument, chord and root is among those to learn from. Raises ValueError for another name.
    """
    if name != "notes":
        raise ValueError(f"--data {name}: expected notes, or a folder of sounds")
    learn, held = [], []
    for i, instrument in enumerate(INSTRUMENTS):
        every = [(chord, root) for chord in CHORDS for root in ROOTS]
        order = np.random.default_rng(i).permutation(len(every))
        for place, j in enumerate(order):
            takes = [Note(instrument, *every[j], take) for take in range(TAKES)]
            (held if place < len(every) * HELD_OUT else learn).extend(takes)
    return learn, held


def smoothed_saw(turns: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return a saw wave at a phase in turns, which advances by `step` turns a sample. The two samples around
    each jump lie on parabolas, which takes out most of the aliasing."""
    phase = turns % 1
    y = 2 * phase - 1
    before, after = phase > 1 - step, phase < step
    x = (phase[before] - 1) / step[before]
    y[before] -= x * x + 2 * x + 1
    x = phase[after] / step[after]
    y[after] -= 2 * x - x * x - 1
    return y


def pluck(frequency: float, n: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return a plucked string (n,): y_i = .996 (y_{i - N} + y_{i - N - 1}) / 2, which begins with noise."""
    N = round(rate / frequency - 0.5)  # the average adds half a sample
    block, last = rng.uniform(-1, 1, N), 0.0
    blocks = []
    for _ in range(-(-n // N)):
        blocks.append(block)
        shifted = np.concatenate(([last], block[:-1]))
        block, last = 0.996 * (block + shifted) / 2, block[-1]
    return np.concatenate(blocks)[:n]


def tone(instrument: str, frequency: float, n: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return one note (n,) of an instrument. `render` decides how loud its chord is."""
    if instrument == "pluck":
        return 2 * pluck(frequency, n, rate, rng)
    t, phase = np.arange(n) / rate, rng.uniform()
    turns = frequency * t + phase
    if instrument == "sine":
        return np.sin(2 * np.pi * turns)
    if instrument == "saw":
        return smoothed_saw(turns, np.full(n, frequency / rate))
    if instrument == "square":
        step = np.full(n, frequency / rate)
        return smoothed_saw(turns, step) - smoothed_saw(turns + 0.5, step)
    if instrument == "bell":
        depth, ratio = 4 * np.exp(-4 * t), 1.4
        return np.exp(-2 * t) * np.sin(2 * np.pi * turns + depth * np.sin(2 * np.pi * ratio * frequency * t))
    # The organ: its frequency swings by 1 percent, a sixth of a semitone, six times a second.
    swing = frequency * 0.01 / (2 * np.pi * 6) * np.sin(2 * np.pi * 6 * t + rng.uniform(0, 6))
    turns = turns + swing
    return sum(loud * np.sin(2 * np.pi * k * turns) for k, loud in ORGAN.items() if k * frequency < rate / 2)


def render(note: Note, n: int, rate: int) -> np.ndarray:
    """Return the sound of a note, int16 (n,): n samples, `rate` of them a second."""
    # A generator for each note: a sound does not depend on which others there are.
    places = INSTRUMENTS.index(note.instrument), list(CHORDS).index(note.chord), note.root, note.take
    rng = np.random.default_rng(places)
    detuned, begin = note.root + rng.uniform(-0.3, 0.3), int(rng.uniform(0, 0.4) * n)
    loudness, noise = 10 ** rng.uniform(-1, -0.2), 10 ** rng.uniform(-2, -0.5)

    # The notes of the chord, which begin together and fade in within 5 ms.
    sound = np.zeros(n)
    for semitones in CHORDS[note.chord]:
        frequency = 440 * 2 ** ((detuned + semitones - 69) / 12)
        sound[begin:] += tone(note.instrument, frequency, n - begin, rate, rng)
    sound[begin:] *= np.minimum(np.arange(n - begin) / (0.005 * rate), 1)

    # The microphone: up to 6 decibels per octave in favour of high frequencies, or of low ones.
    octaves = np.log2(np.maximum(np.fft.rfftfreq(n, 1 / rate), 50) / 1000)
    sound = np.fft.irfft(np.fft.rfft(sound) * 10 ** (rng.uniform(-6, 6) / 20 * octaves), n)

    # One peak for all, then their loudness, and noise relative to that.
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
    for part, notes in zip(("train", "val"), choose("notes"), strict=True):
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
