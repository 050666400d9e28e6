"""Sounds, from files or synthesised, as rows {"sound": int16 (S,), "length": int64 (), "label": int64 ()}.

    notes                   chords of six instruments, synthesised here (data/notes.py)
    a folder of folders     a folder for each class; or train/ and val/ (or test/) with such folders
    a folder of sounds      sounds without classes

Files are .wav with whole numbers of 8, 16, 24 or 32 bits; .flac, .ogg and .wav with floating-point numbers
need the package soundfile (pip install soundfile). Every sound becomes 16 bits, one channel, and the rate and
length of the model: channels are averaged, another rate is resampled, and the beginning of a longer sound is
kept. Each of these is counted and printed, and so are silent and shorter sounds. A file that is damaged, cut
off, empty or shorter than one frame is refused, or left out with --bad-text skip. Folders are decoded once,
to a memory map below --cache. No more of a file is read than the model needs.

    python -m data.sounds FOLDER      decode a folder, and print what is in it

Shapes: N sounds, S samples.
"""

import importlib
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data import notes
from data.class_folders import Kind, Part, existing_folder, fingerprint, print_contents, read
from data.rows import Dataset, Row, Rows
from formats import command

KIND = Kind("sound", (".wav", ".flac", ".ogg"), "notes", np.int16)
RATES = (1_000, 768_000)  # the least and most samples a second: a file with another rate is taken for damaged
MOST_CHANNELS = 64
SHORTEST = 400  # samples: one frame of a spectrogram (vision/spectrogram.py)
LONGEST = 3_600  # seconds, the most that `main` accepts
SILENCE = 1e-4  # a sound that stays below this share of full scale is counted as silent
ZEROS = 12  # zeros of the sinc to each side of its middle, in resampling
MARGIN = 0.02  # seconds that are read beyond what is kept: more than ZEROS / 0.97 samples at the lowest rate
VERSION = 1  # of the decoding, part of a cache's name: raise it where the same file gives other samples


class SoundRows(Rows):
    """Sounds as rows {"sound": int16 (S,), "length": int64 (), "label": int64 (), "augment": bool ()}.

    length: samples of the sound itself, behind which there are zeros. label: -1 where there are no classes.
    augment: true for sounds to learn from.
    """

    def __init__(self, part: Part, augment: bool):
        super().__init__(part.arrays)
        self.labels, self.lengths, self.augment = part.labels, part.lengths, np.array(augment)

    def __getitem__(self, i: int) -> Row:
        i %= len(self.rows)
        sound = np.array(self.rows[i])  # a copy: a memory map cannot be written to
        length = len(sound) if self.lengths is None else self.lengths[i]
        numbers = {"length": np.array(length, np.int64), "label": np.array(self.labels[i], np.int64)}
        return {"sound": sound, **numbers, "augment": self.augment}


def prepare(
    data: str,
    n: int,
    rate: int,
    cache: Path,
    *,
    val: str | None = None,
    bad_sounds: str = "refuse",
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Return the sounds that `data` names in one of the header's forms, to learn from and held out.

    n: samples of each; rate: samples a second. val: a folder of sounds to hold out; by default it is a tenth
    of each class. bad_sounds: "skip" leaves out what cannot be read, "refuse" raises ValueError. notify is
    called with one line of what was converted or left out. Raises ValueError for all that a user can mend.
    """
    if data == "notes":
        if val is not None:
            raise ValueError(f"--val {val}: {data} has a held-out part of its own; leave out --val")
        parts = []
        for side in notes.choose():
            labels = [notes.INSTRUMENTS.index(note.instrument) for note in side]
            parts.append(Part(notes.sounds(side, n, rate), np.array(labels)))
        return as_dataset(*parts, notes.INSTRUMENTS, rate)

    folder = existing_folder(data, "--data", KIND)
    made_from = {"version": VERSION, "shape": [n], "rate": rate}

    def decoded(path: Path, counts: Counter) -> np.ndarray:
        return decode(path, n, rate, counts)

    skip = bad_sounds == "skip"
    return as_dataset(*read(folder, val, KIND, made_from, decoded, cache, skip, notify), rate)


def as_dataset(train: Part, val: Part, labels: Sequence[str], rate: int) -> Dataset:
    """Return two parts as a Dataset that is counted in seconds. labels: the names of the classes.

    Raises ValueError for a part without sounds.
    """
    name, seconds = fingerprint(train, val, labels, KIND), train.arrays.shape[1] / rate
    summary = f"{len(train.arrays):,} sounds of {seconds:.2f} s at {rate:,} Hz to learn from, "
    summary += f"{len(val.arrays):,} held out, {len(labels)} classes"
    rows, unit = (SoundRows(train, True), SoundRows(val, False)), "seconds-of-sound"
    options = {"summary": summary, "unit": unit, "units_per_row": seconds, "labels": tuple(labels)}
    return Dataset(name, None, *rows, **options)


# --- decoding


def decode(path: Path, n: int, rate: int, counts: Counter) -> np.ndarray:
    """Return the first n samples of a file at a rate, int16, fewer where it is shorter, and count in `counts`
    what had to be converted.

    Raises ValueError for a file that is damaged, cut off, or shorter than one frame.
    """
    # Read a little more than is kept, so that a resampled sound ends as it would if all had been read.
    samples, own_rate, n_frames = read_start(path, n / rate + MARGIN)
    if samples.shape[1] > 1:
        counts[f"of {samples.shape[1]} channels (averaged)"] += 1
    sound = samples.mean(axis=1)
    if own_rate != rate:
        counts[f"at {own_rate:,} Hz (resampled)"] += 1
        sound = resampled(sound, own_rate, rate)
    length = n_frames * rate / own_rate
    if length < SHORTEST:
        shortest = f"at least {SHORTEST / rate:.3g} s of sound"
        raise ValueError(f"{path}: {n_frames} samples at {own_rate:,} Hz; expected {shortest}")
    if length > n:
        counts[f"longer than {n / rate:.2f} s (beginning kept)"] += 1
    elif length < n:
        counts[f"shorter than {n / rate:.2f} s"] += 1
    sound = sound[:n]
    if np.abs(sound).max() < SILENCE:
        counts["silent"] += 1
    return (sound * 32768).round().clip(-32768, 32767).astype(np.int16)


def read_start(path: Path, seconds: float) -> tuple[np.ndarray, int, int]:
    """Return the first seconds of a file, float64 (S, channels) from -1 to 1, its rate, and the number of all
    its samples.

    Raises ValueError for a file that is damaged, cut off or no sound.
    """
    try:
        if path.suffix.lower() == ".wav":
            try:
                return read_wav(path, seconds)
            except wave.Error as error:
                if "unknown format" not in str(error):
                    raise
        return read_by_library(path, seconds)
    except (wave.Error, EOFError, OSError, RuntimeError) as error:  # soundfile's errors are RuntimeErrors
        raise ValueError(f"{path}: damaged, or no sound ({error})") from None


def read_wav(path: Path, seconds: float) -> tuple[np.ndarray, int, int]:
    """Return what `read_start` returns, for a .wav file of whole numbers, by the standard library."""
    with wave.open(str(path), "rb") as file:
        n_channels, width, rate, n_frames, *_ = file.getparams()
        check_header(path, rate, n_channels)
        if width > 4:
            raise ValueError(f"{path}: samples of {8 * width} bits; expected 8, 16, 24 or 32")
        n = min(n_frames, int(seconds * rate) + 1)
        raw = file.readframes(n)
        # Read the last sample, too: a file that is cut off has none.
        file.setpos(max(0, n_frames - 1))
        if len(raw) < n * n_channels * width or (n_frames and not file.readframes(1)):
            raise ValueError(f"{path}: cut off; its header promises {n_frames:,} samples; copy it again")
    if width == 1:  # from 0 to 255
        samples = np.frombuffer(raw, np.uint8).astype(np.float64) - 128
    else:
        # The bytes of a number become the upper bytes of a number of 32 bits, which is divided to its size.
        padded = np.zeros((len(raw) // width, 4), np.uint8)
        padded[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        samples = padded.view("<i4")[:, 0] / 2 ** (8 * (4 - width))
    return samples.reshape(-1, n_channels) / 2 ** (8 * width - 1), rate, n_frames


def read_by_library(path: Path, seconds: float) -> tuple[np.ndarray, int, int]:
    """Return what `read_start` returns, for other formats, by soundfile. Raises ValueError without it."""
    try:
        soundfile = importlib.import_module("soundfile")
    except ImportError:
        raise ValueError(
            f"{path}: .flac, .ogg, and .wav of other than whole numbers need: pip install soundfile"
        ) from None
    with soundfile.SoundFile(str(path)) as file:
        check_header(path, file.samplerate, file.channels)
        n = min(file.frames, int(seconds * file.samplerate) + 1)
        samples = file.read(n, dtype="float64", always_2d=True)
        if len(samples) < n:
            raise ValueError(f"{path}: cut off; its header promises {file.frames:,} samples; copy it again")
        if not np.isfinite(samples).all():
            raise ValueError(f"{path}: a sample is not finite; the program that wrote it has failed")
        return samples, file.samplerate, file.frames


def check_header(path: Path, rate: int, n_channels: int) -> None:
    """Raise ValueError for a rate or a number of channels that no recording has."""
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{path}: {rate:,} samples a second; expected {RATES[0]:,} to {RATES[1]:,}")
    if not 1 <= n_channels <= MOST_CHANNELS:
        raise ValueError(f"{path}: {n_channels} channels; expected 1 to {MOST_CHANNELS}")


def resampled(sound: np.ndarray, rate: int, new: int) -> np.ndarray:
    """Return a sound (S,) at a new rate, without aliasing: y(t) = sum_i x_i c sinc(c (t - i)) w(t - i).

    t is in samples of the old rate. c: the share of its frequencies that the new rate can hold, less 3 % for
    the slope of the filter. w: a Hann window that ends at about ZEROS zeros of the sinc to each side (Smith,
    Digital Audio Resampling Home Page). The sound is zero before its beginning and behind its end.
    """
    c = min(1.0, new / rate) * 0.97
    half = int(np.ceil(ZEROS / c))
    times = np.arange(int(len(sound) * new / rate)) * (rate / new)  # in samples of the sound
    padded, out = np.pad(sound, half), np.empty(len(times))
    taps = np.arange(-half + 1, half + 1)
    for start in range(0, len(times), 4096):  # in parts, which bounds the memory
        t = times[start : start + 4096, None]
        i = np.floor(t).astype(np.int64) + taps  # (part, taps): the samples that are summed for each t
        distance = t - i
        window = np.cos(np.pi * distance / (2 * half)) ** 2
        out[start : start + 4096] = (padded[i + half] * c * np.sinc(c * distance) * window).sum(axis=1)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Decode sounds, and print what is in them.")
    add = parser.add_argument
    add("data", nargs="?", default="notes", help="sounds, as for train.py --data (default %(default)s)")
    add("--val", metavar="FOLDER", help="held-out sounds (default: a tenth of each class)")
    add("--seconds", type=float, default=1.0, help="seconds of each sound (default %(default)s)")
    add("--rate", type=int, default=16_000, help="samples a second (default %(default)s)")
    add("--cache", type=command.path, default=Path("cache"), help="folder for them (default %(default)s)")
    add(
        "--bad-text",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with a file that is no sound (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if not RATES[0] <= args.rate <= RATES[1]:
        raise ValueError(f"--rate {args.rate}: expected {RATES[0]:,} to {RATES[1]:,} samples a second")
    shortest = SHORTEST / args.rate
    if not shortest <= args.seconds <= LONGEST:
        raise ValueError(f"--seconds {args.seconds}: expected {shortest:g} to {LONGEST:,}")
    n = round(args.seconds * args.rate)
    dataset = prepare(args.data, n, args.rate, args.cache, val=args.val, bad_sounds=args.bad_text)
    print_contents(dataset)


if __name__ == "__main__":
    command.run(main)
