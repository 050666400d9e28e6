"""Conditions of a denoiser: the words of an image's caption, its class, or none, as rows of numbers.

    images with captions     the numbers of the caption's words, each once
    a folder for each class  the number of the class
    a folder of images       no condition

A model has a learned vector for each word and sums them (vision/unet.py), so it can draw combinations that it
has never seen. The order of words is lost: "a red bar above a blue ring" and "a blue bar above a red ring"
are the same condition. One more number, the last, stands for no words at all. Words that occur only in
held-out captions are left out.

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
    """Return the words of a text in lower case, each once, in the order of their first use."""
    return list(dict.fromkeys(WORD.findall(text.lower())))


class Words(NamedTuple):
    """The words or the classes that a model has learned. A data set holds them in place of a tokenizer; the
    number of a word is its index in `names`."""

    names: tuple[str, ...]
    are_classes: bool = False

    @property
    def n_vocab(self) -> int:
        """Return how many numbers there are: one for each word, and one for no words."""
        return len(self.names) + 1

    @property
    def none(self) -> int:
        """Return the number that stands for no words."""
        return len(self.names)

    def split(self, text: str) -> list[str]:
        """Return the words of a text; the name of a class is not split."""
        return [text] if self.are_classes else split(text)

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text's words. Raises ValueError for an unknown word, and if there is
        none."""
        number = {name: i for i, name in enumerate(self.names)}
        found = self.split(text)
        for word in found:
            if word not in number:
                what = "class" if self.are_classes else "word"
                near = difflib.get_close_matches(word, self.names, 3, 0.5)
                some = f"near it: {', '.join(near)}" if near else f"such as {', '.join(self.names[:3])}"
                among = f"none of the {len(self.names)} that this model has learned"
                raise ValueError(f"{what} {word!r}: {among}; {some}")
        if not found:
            raise ValueError(f"{text!r}: no word; expected some that this model has learned")
        return [number[word] for word in found]

    def table(self, texts: Sequence[str], width: int | None = None) -> np.ndarray:
        """Return the numbers of the known words of each text, int32 (N, W), padded with -1.

        A text without any known word has the number of no words. width: W, the largest number of known words
        of a text (default: that of these texts)."""
        number = {name: i for i, name in enumerate(self.names)}
        rows = [[number[word] for word in self.split(text) if word in number] for text in texts]
        rows = [row or [self.none] for row in rows]
        found = np.full((len(rows), width or max(map(len, rows), default=1)), -1, np.int32)
        for place, row in zip(found, rows, strict=True):
            place[: len(row)] = row
        return found

    def save(self, directory: str | Path) -> None:
        """Write the words to words.json in a directory."""
        write_json(Path(directory) / FILE, {"names": self.names, "are_classes": self.are_classes})


def read_words(directory: str | Path) -> Words | None:
    """Return the words of the model in a directory, or None if it has no words. Raises ValueError for a
    damaged words.json."""
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    names = content.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: names {names!r:.100}: expected a list of words")
    return Words(tuple(names), bool(content.get("are_classes")))


def in_words(words: Words | None) -> str:
    """Return in words what a model has learned, such as "2 classes, cats, dogs"."""
    if words is None:
        return "no classes"
    some = ", ".join(words.names[:3]) + ", ..." * (len(words.names) > 3)
    return f"{len(words.names)} {'classes' if words.are_classes else 'words'}, {some}"


def nothing(numbers: Tensor, none: int) -> Tensor:
    """Return the condition without words in the shape of numbers (B, W): in each row `none`, and then -1."""
    found = torch.full_like(numbers, -1)
    found[:, 0] = none
    return found


def learned(texts: Sequence[str]) -> Words:
    """Return the words of texts in alphabetical order; if there are more than MOST, the most frequent."""
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
    """Return the images that --data names, at the config's size. Their tokenizer is a `Words`, or None
    without captions and classes.

    With --init-from the words are those of the model's directory. Raises ValueError for what
    `data.captions.read` and `data.images.prepare` refuse, and for classes or captions that a pretrained model
    has not learned.
    """
    own = read_words(args.init_from) if args.init_from else None
    if not have_captions(args.data):
        dataset = load_images(args, config)
        words = Words(dataset.labels, are_classes=True) if dataset.labels else None
        if args.init_from and own != words:
            both = f"{in_words(words)}, but the model in {args.init_from} has learned {in_words(own)}"
            raise ValueError(f"--data {args.data}: {both}; expected the same")
        dataset.tokenizer = words
        return dataset
    if args.document_mask:
        raise ValueError("--document-mask: captions are rows of their own; leave it out")
    if args.init_from and own is None:
        expected = "expected a folder of images without classes"
        raise ValueError(
            f"--data {args.data}: captions, but the model in {args.init_from} reads none; {expected}"
        )
    with parallel.one_per_machine_first():
        options = {"channels": config.n_channels if args.init_from else None, "val": args.val}
        parts = captions.read(args.data, config.size, args.cache, bad=args.bad_text, **options)
    return as_dataset(parts, own)


def as_dataset(parts: Sequence[captions.Part], words: Words | None = None) -> Dataset:
    """Return images with the words of their captions as rows.

    parts: images with captions, for training and held out. words: those of a trained model (default: those of
    the training captions).
    """
    texts = [[text for texts in part.captions for text in texts] for part in parts]
    words = words or learned(texts[0])
    width = max(words.table(some).shape[1] for some in texts)  # the same in both parts
    tables = [words.table(some, width) for some in texts]
    note = f"{len(words.names):,} words"
    return captions.with_tables(parts, tables, words, "words", json.dumps(words), note)
