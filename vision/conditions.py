"""What an image is drawn by: words of its caption, its class, or nothing; as rows for denoisers.

    "bold serif latin small letter g"   ->  the numbers of its words, in any order, each once
    a class folder                      ->  the number of the class
    a folder of images                  ->  nothing

A model has a learned vector for each word and sums them (vision/unet.py), so it can draw combinations that it
has never seen. Their order is lost: "a red bar above a blue ring" is drawn as "a blue bar above a red ring"
is. A last row stands for no words at all. Words of held-out captions that occur in none to learn from are
left out.

Shapes: N images, W words of the longest caption.
"""

import difflib
import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import captions
from data.captions import METADATA
from data.records import RECORDS, suffix_of
from data.rows import Dataset
from data.tar_images import is_shards
from engine import parallel
from formats.json_file import read_json, write_json
from vision.classify_images import load_images

FILE = "words.json"
MOST = 20_000  # words, the most frequent ones
WORD = re.compile(r"[\w'-]+")


def split(text: str) -> list[str]:
    """Return the words of a text, in small letters, each once."""
    return list(dict.fromkeys(WORD.findall(text.lower())))


class Words(NamedTuple):
    """The words, or the classes, of a model, in the place of a tokenizer. A word's number is its place."""

    names: tuple[str, ...]
    are_classes: bool = False

    @property
    def n_vocab(self) -> int:
        """Return the number of rows: the words, and none."""
        return len(self.names) + 1

    @property
    def none(self) -> int:
        """Return the number of the row that stands for no words."""
        return len(self.names)

    def split(self, text: str) -> list[str]:
        return [text] if self.are_classes else split(text)

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text's words. Raises ValueError for one that is not known, or none."""
        number = {name: i for i, name in enumerate(self.names)}
        found = self.split(text)
        for word in found:
            if word not in number:
                what = "class" if self.are_classes else "word"
                near = difflib.get_close_matches(word, self.names, 3, 0.5) or self.names[:3]
                among = f"none of the {len(self.names)} that this model has learned"
                raise ValueError(f"{what} {word!r}: {among}; near it: {', '.join(near)}")
        if not found:
            raise ValueError(f"{text!r}: no word; expected some that this model has learned")
        return [number[word] for word in found]

    def table(self, texts: Sequence[str], width: int | None = None) -> np.ndarray:
        """Return the numbers of the known words of texts, int32 (N, W), with -1 behind them.

        A text without any known word has the row of none."""
        number = {name: i for i, name in enumerate(self.names)}
        rows = [[number[word] for word in self.split(text) if word in number] for text in texts]
        rows = [row or [self.none] for row in rows]
        found = np.full((len(rows), width or max(map(len, rows), default=1)), -1, np.int32)
        for place, row in zip(found, rows, strict=True):
            place[: len(row)] = row
        return found

    def save(self, directory: str | Path) -> None:
        """Write words.json."""
        write_json(Path(directory) / FILE, {"names": self.names, "are_classes": self.are_classes})


def read_words(directory: str | Path) -> Words | None:
    """Return the words in a model's directory, None where there are none. Raises ValueError for damage."""
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    names = content.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: names {names!r:.100}: expected a list of words")
    return Words(tuple(names), bool(content.get("are_classes")))


def nothing(numbers: Tensor, none: int) -> Tensor:
    """Return rows of no words in the shape of numbers (B, W), the number `none` and then -1."""
    found = torch.full_like(numbers, -1)
    found[:, 0] = none
    return found


def learned(texts: Sequence[str]) -> Words:
    """Return the words of texts, in alphabetical order."""
    counts = Counter(word for text in texts for word in split(text))
    return Words(tuple(sorted(word for word, _ in counts.most_common(MOST))))


def have_captions(data: str) -> bool:
    """Return whether --data names images with captions, and not folders of images."""
    path = Path(data)
    if captions.is_drawn(data) or is_shards(data):
        return True
    if path.is_dir():
        return any((path / name).is_file() for name in METADATA)
    return suffix_of(path) in RECORDS


def load(args: Namespace, config: Any) -> Dataset:
    """Return the images that --data names, at the config's size, with Words as their tokenizer, or None.

    With --init-from the words are those of the model's directory. Raises ValueError for what
    `data.captions.read` and `data.images.prepare` refuse, and for other classes than a pretrained model's.
    """
    own = read_words(args.init_from) if args.init_from else None
    if not have_captions(args.data):
        dataset = load_images(args, config)
        words = Words(dataset.labels, are_classes=True) if dataset.labels else None
        if args.init_from and own != words:
            raise ValueError(f"--data {args.data}: other classes than those of {args.init_from}")
        dataset.tokenizer = words
        return dataset
    if args.document_mask:
        raise ValueError("--document-mask: captions are rows of their own; leave it out")
    with parallel.one_per_machine_first():
        options = {"channels": config.n_channels if args.init_from else None, "val": args.val}
        parts = captions.read(args.data, config.size, args.cache, bad=args.bad_text, **options)
    return as_dataset(parts, own)


def as_dataset(parts: Sequence[captions.Part], words: Words | None = None) -> Dataset:
    """Return images with the words of their captions; words: those of a trained model."""
    texts = [[text for captions in part.captions for text in captions] for part in parts]
    words = words or learned(texts[0])
    width = max(words.table(some).shape[1] for some in texts)  # one, so that a model sees one shape
    tables = [words.table(some, width) for some in texts]
    note = f"{len(words.names):,} words"
    return captions.with_tables(parts, tables, words, "words", json.dumps(words), note)
