"""Folders of files, one for each class: found, partly held out, and decoded once to a memory map.

    a folder of folders      a folder for each class; or train/ and val/ (or test/) with such folders
    a folder of files        examples without classes

data/images.py and data/sounds.py give the kind of files and the function that decodes a file to an array. All
arrays of a set have one shape. They are kept below --cache, with a manifest. What had to be converted is
counted and printed; a file that cannot be read is refused, or left out with --bad-text skip.

Shapes: N examples.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.rows import Dataset
from data.text import only_one_at
from formats.atomic import damage, names_full_disk, replace_directory, write_checksums
from formats.progress import progress_bar

HELD_OUT = 1 / 10  # share of each class
VAL = ("val", "valid", "validation", "test")  # names of a folder to hold out; the first that exists is used
MOST_NAMED = 5  # files that are left out are named up to this number, and then counted


class Kind(NamedTuple):
    """A kind of files, such as images."""

    noun: str  # for one of them, such as "image"
    suffixes: tuple[str, ...]
    drawn: str  # the set of this kind that needs no files, such as "glyphs"
    dtype: type  # of the arrays that they become


class Found(NamedTuple):
    """A file in a folder."""

    path: Path
    label: int  # the number of its class, -1 without classes
    is_held_out: bool


class Part(NamedTuple):
    """One of the two parts of a set: the examples to learn from, or those held out."""

    arrays: np.ndarray  # (N, ...), perhaps memory-mapped
    labels: np.ndarray  # int64 (N,), -1 without classes
    lengths: np.ndarray | None = None  # int64 (N,), of the last axis without its padding; None: no padding


def existing_folder(name: str, flag: str, kind: Kind) -> Path:
    """Return the path of a folder. Raises ValueError if there is none. flag: "--data" or "--val"."""
    path = Path(name)
    if not path.is_dir():
        what = "a file" if path.exists() else "not found"
        raise ValueError(f"{flag} {name}: {what}; expected {kind.drawn}, or a folder of {kind.noun}s")
    return path


def read(
    folder: Path,
    val: str | None,
    kind: Kind,
    made_from: dict,
    decode: Callable[[Path, Counter], np.ndarray],
    cache: Path,
    skip: bool,
    notify: Callable[[str], None],
) -> tuple[Part, Part, list[str]]:
    """Return the part of a folder to learn from, the part held out, and the names of the classes.

    val: the folder of --val, or None. decode(path, counts): returns the array of a file, which may be shorter
    along its last axis, adds to counts what it had to convert, and raises ValueError for a file that cannot
    be read. made_from: what else the arrays depend on, as JSON, and their "shape". cache: the folder of
    --cache. skip: leave out files that cannot be read. notify is called with one line of what was converted
    or left out. Raises ValueError for what a user can mend.
    """
    with only_one_at(cache, notify):
        found, labels = find_files(folder, val, kind)
        return *decoded(found, labels, made_from, decode, cache, kind, skip, notify), labels


def fingerprint(train: Part, val: Part, labels: Sequence[str], kind: Kind) -> str:
    """Return a hash of all arrays, labels and names of classes.

    Raises ValueError for a part without arrays, and for a label beyond the classes.
    """
    digest = hashlib.sha256(json.dumps(list(labels)).encode())
    for name, part in (("to learn from", train), ("held out", val)):
        if not len(part.arrays):
            raise ValueError(f"no {kind.noun}s are {name}; expected at least one")
        if labels and part.labels.max() >= len(labels):
            expected = f"expected 0 to {len(labels) - 1}, the classes"
            raise ValueError(f"one of the {kind.noun}s {name} has label {part.labels.max()}; {expected}")
        digest.update(str(part.arrays.shape).encode() + part.labels.tobytes())
        if part.lengths is not None and (part.lengths < part.arrays.shape[-1]).any():
            digest.update(part.lengths.tobytes())
        for array in part.arrays:
            digest.update(array.tobytes())
    return f"{kind.noun}s-{digest.hexdigest()[:16]}"


def print_contents(dataset: Dataset) -> None:
    """Print the summary of a set, and how many examples to learn from each of its first 100 classes has."""
    print(dataset.summary)
    counts = Counter(dataset.train.labels.tolist())
    for i, label in enumerate(dataset.labels[:100]):
        print(f"    {counts[i]:7,} {label}")


def find_files(folder: Path, val: str | None, kind: Kind) -> tuple[list[Found], list[str]]:
    """Return the files of a folder, and the names of its classes in alphabetical order.

    val: the folder of --val, or None. Raises ValueError where files stand beside folders, for a class without
    files, for held-out files of other classes, and for a --val inside of the folder to learn from.
    """
    held_out = next((name for name in VAL if (folder / name).is_dir()), VAL[0])
    inside = {"train": folder / "train", "val": folder / held_out}
    inside = {part: path for part, path in inside.items() if path.is_dir()}
    if val is not None:
        held = existing_folder(val, "--val", kind)
        inside = {"train": inside.get("train", folder), "val": held}
        if held.resolve().is_relative_to(inside["train"].resolve()):
            raise ValueError(f"--val {val}: is part of {inside['train']}; expected {kind.noun}s of its own")
    if inside.keys() != {"train", "val"}:
        members, labels = class_folders(folder, kind)
        return hold_out(members), labels
    (train, labels), (held, others) = (class_folders(inside[part], kind) for part in ("train", "val"))
    if others != labels:
        odd = sorted(set(others) ^ set(labels))
        raise ValueError(f"{inside['val']}: class {odd[0]!r}: expected the classes of {inside['train']}")
    return [Found(*m, False) for m in train] + [Found(*m, True) for m in held], labels


def class_folders(folder: Path, kind: Kind) -> tuple[list[tuple[Path, int]], list[str]]:
    """Return (path, number of its class) of the files in a folder, and the names of the classes.

    Raises ValueError where files stand beside folders, and for a folder or a class without files.
    """
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = files_in(folder, kind, deep=not folders)
    nouns, expected = f"{kind.noun}s", " ".join(kind.suffixes)
    if not folders:
        if not loose:
            raise ValueError(
                f"{folder}: no {nouns}; expected files of {expected}, or a folder for each class"
            )
        return [(path, -1) for path in loose], []
    if loose:
        raise ValueError(
            f"{folder}: has {nouns} ({loose[0].name} ...) beside folders ({folders[0].name} ...); expected "
            f"a folder for each class, or {nouns} alone"
        )
    members = [(path, i) for i, one in enumerate(folders) for path in files_in(one, kind, deep=True)]
    for i, one in enumerate(folders):
        if not any(label == i for _, label in members):
            raise ValueError(f"{one}: a class without {nouns}; expected files of {expected}")
    return members, [one.name for one in folders]


def files_in(folder: Path, kind: Kind, deep: bool) -> list[Path]:
    """Return the files of a kind in a folder, sorted. deep: also those in folders inside it.

    Names that begin with a dot are hidden: such files and folders are passed over, as .ipynb_checkpoints is.
    """

    paths = folder.rglob("*") if deep else folder.glob("*")
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in kind.suffixes
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    )


def hold_out(members: list[tuple[Path, int]]) -> list[Found]:
    """Return all files, of which a tenth of each class is held out, and at least one of two or more.

    The choice is the same in every run.
    """
    found = []
    for label in sorted({label for _, label in members}):
        paths = [path for path, own in members if own == label]
        n_held = max(int(len(paths) * HELD_OUT), len(paths) > 1)
        held = set(np.random.default_rng(label + 1).permutation(len(paths))[:n_held].tolist())
        found += [Found(path, label, i in held) for i, path in enumerate(paths)]
    return found


# --- decoding


def decoded(
    found: list[Found],
    labels: list[str],
    made_from: dict,
    decode: Callable[[Path, Counter], np.ndarray],
    cache: Path,
    kind: Kind,
    skip: bool,
    notify: Callable[[str], None],
) -> tuple[Part, Part]:
    """Return both parts of the files found, memory-mapped from a folder below the cache.

    The folder is built if it is missing or damaged. The parameters are those of `read`.
    """
    # The folder's name is a hash of the names, sizes and times of change of the files. So the files need not
    # be read to find out whether the cache is that of the same files.
    made_from = made_from | {"labels": labels, "skip": skip}
    stats = [(one.path, one.path.stat()) for one in found]
    files = [(path.parent.name, path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    places = [(one.label, one.is_held_out) for one in found]
    key = hashlib.sha256(json.dumps([made_from, files, places]).encode()).hexdigest()
    home = cache / f"{kind.noun}s-{key[:16]}"
    problem = damage(home)
    if problem is not None:
        if home.exists():
            notify(f"{problem}: built anew")
        build(home, made_from, found, decode, kind, skip, notify)

    # Print what was converted at every start.
    manifest = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
    if manifest["notes"]:
        counted = ", ".join(f"{n:,} {note}" for note, n in sorted(manifest["notes"].items()))
        notify(f"{len(found):,} {kind.noun}s read: {counted}")
    return open_part(home, manifest, "train", kind.dtype), open_part(home, manifest, "val", kind.dtype)


def open_part(home: Path, manifest: dict, name: str, dtype: type) -> Part:
    """Return the part of this name, "train" or "val", with its arrays memory-mapped."""
    labels, lengths = (np.array(manifest[key], np.int64) for key in (name, f"{name}_lengths"))
    shape = (len(labels), *manifest["shape"])
    if not len(labels):  # an empty file cannot be mapped
        return Part(np.empty(shape, dtype), labels, lengths)
    return Part(np.memmap(home / f"{name}.bin", dtype, "r", shape=shape), labels, lengths)


def build(
    home: Path,
    made_from: dict,
    found: list[Found],
    decode: Callable[[Path, Counter], np.ndarray],
    kind: Kind,
    skip: bool,
    notify: Callable[[str], None],
) -> None:
    """Decode files to home/train.bin and val.bin, with their labels in manifest.json, all or nothing.

    The parameters are those of `read`.
    """
    notes, kept = Counter(), {"train": [], "val": [], "train_lengths": [], "val_lengths": []}
    with replace_directory(home) as new, progress_bar(desc="decode", total=len(found), unit=kind.noun) as bar:
        with open(new / "train.bin", "wb") as train, open(new / "val.bin", "wb") as val:
            for one in found:
                bar.update()
                try:
                    array = decode(one.path, notes)
                except ValueError as error:
                    left_out(error, kind, skip, notes, notify)
                    continue
                whole = np.zeros(made_from["shape"], kind.dtype)
                whole[..., : array.shape[-1]] = array
                with names_full_disk(home):
                    (val if one.is_held_out else train).write(whole.tobytes())
                part = "val" if one.is_held_out else "train"
                kept[part].append(one.label)
                kept[f"{part}_lengths"].append(array.shape[-1])
        manifest = made_from | kept | {"notes": notes}
        (new / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        write_checksums(new)


def left_out(
    error: ValueError, kind: Kind, skip: bool, notes: Counter, notify: Callable[[str], None]
) -> None:
    """Count a file that cannot be read in notes, and name the first few. Raises ValueError unless skip."""
    if not skip:
        raise ValueError(
            f"{error}; mend or remove it, or pass --bad-text skip to leave such {kind.noun}s out"
        ) from None
    notes["left out"] += 1
    if notes["left out"] <= MOST_NAMED:
        notify(f"skipped: {error}")
