"""Images with captions in tar files, as WebDataset lays them out (Aizman et al. 2019, arXiv 2001.01858).

    000017.jpg 000017.txt       members with the same name up to the first dot are one sample
    000018.png 000018.json      the caption is the .txt, or "caption" of the .json; other members are ignored
    train-{000..127}.tar        the shards: a range in braces, a glob, or a folder with .tar files

Nothing is unpacked: the headers of a shard are read once, and an image is read from the shard when it is
decoded. Links, devices and folders in a shard are passed over.
"""

import glob
import io
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

from data.class_folders import Kind
from data.records import OnBad

MOST_SHARDS = 1_000_000  # that a range in braces may stand for
LONGEST_CAPTION = 1 << 20  # bytes of a .txt or .json
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """An image inside of a shard. It has those attributes of a Path that class_folders and images use."""

    parent: Path  # the shard
    name: str
    offset: int  # where its bytes begin in the shard
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.parent}, {self.name}"

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.size, st_mtime_ns=self.parent.stat().st_mtime_ns)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Return the member's bytes as a file."""
        with open(self.parent, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def is_shards(data: str) -> bool:
    """Return whether a value of --data or --val names shards: a .tar, or a folder with some."""
    return data.lower().endswith(".tar") or (Path(data).is_dir() and any(Path(data).glob("*.tar")))


def find_shards(data: str, flag: str) -> list[Path]:
    """Return the paths of the shards that `data` names, in order.

    flag: "--data" or "--val", for messages. Raises ValueError for a shard that is missing, and where there is
    none.
    """
    if Path(data).is_dir():
        return sorted(Path(data).glob("*.tar"))
    # Replace each range by its numbers, from left to right.
    names = [data]
    while found := RANGE.search(names[0]):
        first, last = found.groups()
        if not int(first) <= int(last) < int(first) + MOST_SHARDS // len(names):
            raise ValueError(f"{flag} {data}: {found[0]}: expected a rising range, such as {{000..127}}")
        numbers = range(int(first), int(last) + 1)
        names = [RANGE.sub(f"{i:0{len(first)}}", name, count=1) for name in names for i in numbers]
    is_pattern = names == [data] and not Path(data).is_file()
    paths = [Path(name) for name in (sorted(glob.glob(data)) if is_pattern else names)]
    if not paths:
        raise ValueError(f"{flag} {data}: not found; expected .tar files with images and captions")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{flag} {data}: {path} is missing")
    return paths


def read_shard(path: Path, kind: Kind, on_bad: OnBad) -> list[tuple[Member, list[str]]]:
    """Return the images of a kind in a shard with their captions, in the order of the images.

    on_bad is called once with a message for a sample whose caption is missing or cannot be read, and may
    raise an error; otherwise the sample is left out. Raises ValueError for a file that is no tar file.
    """
    images: dict[str, Member] = {}
    captions: dict[str, list[str]] = {}
    unreadable: set[str] = set()  # the samples for which on_bad has been called
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key = f"{folder}/{stem}"
                if not info.isreg() or not stem:
                    continue
                if f".{suffix}".lower() in kind.suffixes:
                    images[key] = Member(path, info.name, info.offset_data, info.size)
                elif suffix.lower() in ("txt", "json") and key not in captions:
                    try:
                        captions[key] = caption_in(tar, info, suffix.lower())
                    except ValueError as error:
                        unreadable.add(key)
                        on_bad(f"{path}, {info.name}: {error}")
    except (tarfile.TarError, EOFError) as error:
        expected = "expected one that is not compressed, as images are already"
        raise ValueError(f"{path}: not a tar file, or cut off ({error}); {expected}") from None
    for key, member in images.items():
        if key not in captions and key not in unreadable:
            on_bad(f"{member}: has no caption; expected a .txt or .json of the same name beside it")
    return [(member, captions[key]) for key, member in images.items() if key in captions]


def caption_in(tar: tarfile.TarFile, info: tarfile.TarInfo, suffix: str) -> list[str]:
    """Return the captions in a member of a shard. Raises ValueError if there are none."""
    if info.size > LONGEST_CAPTION:
        raise ValueError(f"{info.size:,} bytes; expected at most {LONGEST_CAPTION:,} of a caption")
    text = tar.extractfile(info).read().decode("utf-8")  # a UnicodeDecodeError is a ValueError
    return captions_of(json.loads(text) if suffix == "json" else {"caption": text})


def captions_of(record: object) -> list[str]:
    """Return the "caption" or "text" of a record, one string or a list of them, without empty ones.

    Raises ValueError if there is none.
    """
    value = record.get("caption", record.get("text")) if isinstance(record, dict) else None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{record!r:.80}: expected a "caption", a string or a list of strings')
    kept = [text.strip() for text in texts if text.strip()]
    if not kept:
        raise ValueError("the caption is empty")
    return kept
