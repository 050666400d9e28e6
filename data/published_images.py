"""Published sets of images, read from the files as they are published.

    MNIST, Fashion-MNIST, EMNIST    *train*images-idx3-ubyte and so on, also .gz
    CIFAR-10                        the "binary version": data_batch_1.bin to data_batch_5.bin, test_batch.bin
    CIFAR-100                       the "binary version": train.bin, test.bin

An idx file (LeCun) of bytes is the magic number 00 00 08 d, then d dimensions as big-endian numbers of 32
bits, and the entries. A record of CIFAR is a byte with the label (in CIFAR-100 a coarse label comes first),
and 3 x 32 x 32 bytes. The "python version" of CIFAR is a pickle, which could run any code, and is refused.

Shapes: N images, C channels, H x W pixels.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

LARGEST = 8 << 30  # bytes of one array: more is damage, or a file made to fill the memory
Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (N, C, H, W), labels int64 (N,)


def read(folder: Path) -> tuple[Arrays, Arrays, list[str]] | None:
    """Return (the part to learn from, the test part, the names of the classes) of the set in a folder.

    Returns None for a folder without such files. Raises ValueError for files that are missing or damaged.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any("idx3-ubyte" in name or "idx1-ubyte" in name for name in names):
        return read_idx_set(folder, names)
    if any(name in names for name in ("data_batch_1.bin", "train.bin")):
        return read_cifar(folder, names)
    if any(name in names for name in ("data_batch_1", "batches.meta")):
        raise ValueError(
            f"{folder}: CIFAR's python version, a pickle, which could run any code; expected the binary "
            "version, data_batch_1.bin and so on"
        )
    return None


def read_idx_set(folder: Path, names: list[str]) -> tuple[Arrays, Arrays, list[str]]:
    """Return the set in the idx files of a folder: (the part to learn from, the test part, the classes).

    The names of the files tell images from labels and the parts from each other. Raises ValueError for files
    that are missing, damaged or without images.
    """
    parts = []
    for words, part in ((("train",), "train"), (("t10k", "test"), "test")):
        files = []
        for kind in ("images", "labels"):
            own = [name for name in names if kind in name and any(word in name for word in words)]
            if len(own) != 1:
                found = ", ".join(own) or "none"
                raise ValueError(f"{folder}: {part} {kind}: found {found}; expected one such idx file")
            files.append(own[0])
        images, labels = (read_idx(folder / name) for name in files)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder / files[0]}: {images.shape} beside labels {labels.shape}; expected (N, H, W), (N,)"
            )
        if not images.size:
            raise ValueError(f"{folder / files[0]}: {images.shape}: no images; expected at least one")
        if files[0].startswith("emnist"):  # EMNIST's images are transposed
            images = images.transpose(0, 2, 1)
        parts.append((images[:, None], labels.astype(np.int64)))
    n_classes = int(parts[0][1].max()) + 1
    return *parts, [str(i) for i in range(n_classes)]


def read_idx(path: Path) -> np.ndarray:
    """Return the array in an idx file of bytes, uint8. Raises ValueError for a damaged or any other file."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise ValueError(
                    f"{path}: begins {magic.hex(' ')}; expected an idx file of bytes, 00 00 08 01 or 03"
                )
            shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
            n = math.prod(shape)
            if n > LARGEST:
                raise ValueError(f"{path}: {n:,} bytes promised; at most {LARGEST:,} are read")
            content = file.read(n + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download it again") from None
    if len(content) != n:
        found = "more" if len(content) > n else f"{len(content):,}"
        raise ValueError(f"{path}: {found} bytes, {n:,} promised; download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar(folder: Path, names: list[str]) -> tuple[Arrays, Arrays, list[str]]:
    """Return the set in CIFAR-10's or CIFAR-100's binary files: (the part to learn from, the test part, the
    classes). Classes without a file of names beside them are numbers."""
    ten = "data_batch_1.bin" in names
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    test, n_classes = ("test_batch.bin", 10) if ten else ("test.bin", 100)
    for name in (*train, test):
        if name not in names:
            raise ValueError(f"{folder}: {name} is missing; expected all files of the set; unpack it again")
    parts = []
    for files in (train, [test]):
        arrays = [read_records(folder / name, 1 if ten else 2, n_classes) for name in files]
        parts.append(tuple(np.concatenate(side) for side in zip(*arrays, strict=True)))
    labels = [str(i) for i in range(n_classes)]
    described = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
    if described.is_file():
        labels = described.read_text(encoding="utf-8").split()
        if len(labels) != n_classes:
            raise ValueError(f"{described}: {len(labels)} names; expected {n_classes}")
    return *parts, labels


def read_records(path: Path, n_labels: int, n_classes: int) -> Arrays:
    """Return the images (N, 3, 32, 32) and labels (N,) in a file of records.

    A record has n_labels bytes, the last of which is the class, and the pixels. Raises ValueError for a file
    that is cut off, and for a label beyond the classes.
    """
    raw, size = np.fromfile(path, np.uint8), n_labels + 3 * 32 * 32
    if not len(raw) or len(raw) % size:
        raise ValueError(f"{path}: {len(raw):,} bytes; expected records of {size:,}; download it again")
    records = raw.reshape(-1, size)
    labels = records[:, n_labels - 1].astype(np.int64)
    if labels.max() >= n_classes:
        i = int((labels >= n_classes).argmax())
        raise ValueError(f"{path}: record {i} has label {labels[i]}; expected 0 to {n_classes - 1}")
    return records[:, n_labels:].reshape(-1, 3, 32, 32), labels
