r"""Conversations about images: from files, or about drawn scenes, to rows of tokens with an image each.

Files have LLaVA's format, or are images with captions:

    {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                              {"from": "gpt", "value": "A cat."}]}
    {"image": "coco/1.jpg", "caption": "A cat on a mat."}

in any file of records (data/records.py): a line each of a .jsonl, or the items of a .json. All other forms of
conversations that data/conversations.py reads are read, too; without an "image" they are text alone. Images
are named relative to a folder. A conversation has one image, whose place "<image>" marks in a question.

Shapes: T tokens of a row, C channels, H x W pixels.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data import scenes
from data.conversations import EXPECTED, to_messages
from data.images import decode, fitted
from data.records import converted, refuse
from data.rows import Row, Rows
from data.tokenizer import Tokenizer
from formats.chat_template import (
    IMAGE,
    Conversation,
    ImageTokens,
    encode,
    end_id,
    prompt_tokens,
    render,
    with_images,
)

IGNORED = -100  # a target that is not predicted


class Seen(NamedTuple):
    """A conversation about an image, or about none."""

    messages: Conversation
    image: Path | int | None  # a file, or the number of a drawn picture


def to_seen(record: Any, folder: Path) -> Seen:
    """Return the conversation in a record, with its image in the folder.

    Raises ValueError for a record of an unknown format, for a place of an image without an image and the
    other way round, and for an image that is not a file in the folder.
    """
    name = record.get("image") if isinstance(record, dict) else None
    if name is not None and "caption" in record:
        turns = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": record["caption"]}]
        record = {"messages": turns}
    messages = to_messages(record)
    n = sum(message["content"].count(IMAGE) for message in messages if message["role"] != "assistant")
    if n != (name is not None):
        given = "no image" if name is None else f"the image {name!r:.60}"
        raise ValueError(f"{n} times {IMAGE} in the questions, but {given}: expected one for each other")
    if name is None:
        return Seen(messages, None)

    # The name is a stranger's: only files below the folder are read.
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"image {name!r:.60}: expected the name of one file")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"image {name!r:.60}: expected a name relative to the folder {folder}")
    if not (folder / parts).is_file():
        raise ValueError(f"image {name!r:.60}: no such file in the folder {folder}")
    return Seen(messages, folder / parts)


def read_seen(path: Path, folder: Path, on_bad: Callable[[str], None] = refuse) -> list[Seen]:
    """Return the conversations in a file of records, with their images in a folder; see `to_seen`.

    on_bad is called with a message for a record that is none, and may raise an error; otherwise the record is
    left out. Raises ValueError for a folder that is none, for a file that cannot be read, and for one without
    conversations.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder; expected the folder of the images in {path}")
    expected = f'{EXPECTED}, each with {{"image": "FILE"}}, or {{"image", "caption"}}'
    return converted(path, "conversations", expected, partial(to_seen, folder=folder), on_bad)


# --- from conversations to rows


def as_tokens(seen: Conversation, tokenizer: Tokenizer, image: ImageTokens, stage: int) -> tuple[list, list]:
    """Return the token ids of a conversation, and which of them are learned.

    In stage 1 it is the image and the first answer alone, its caption.
    """
    if stage == 2:
        return render(seen, tokenizer, image)
    caption = next(message["content"] for message in seen if message["role"] == "assistant")
    begin = tokenizer.begin_ids or [tokenizer.eot_id]
    parts = [*((token, False) for token in begin), (IMAGE, False), (caption, True), (end_id(tokenizer), True)]
    return encode(with_images(iter(parts), image), tokenizer)


def before_answer(seen: Conversation, tokenizer: Tokenizer, image: ImageTokens, stage: int) -> list[int]:
    """Return the token ids in front of the first answer in a conversation, those of `as_tokens`."""
    if stage == 1:
        tokens, learned = as_tokens(seen, tokenizer, image, stage)
        return tokens[: learned.index(True)]
    first = next(i for i, message in enumerate(seen) if message["role"] == "assistant")
    return prompt_tokens(seen[:first], tokenizer, image)


def length_within(tokens: list[int], seq_len: int, image: ImageTokens) -> int:
    """Return how many of the tokens are kept in a row of seq_len: all, or those before the cut, which is not
    inside of an image but in front of it."""
    if len(tokens) <= seq_len or tokens[seq_len] != image.id:
        return min(len(tokens), seq_len)
    return seq_len - (tokens[:seq_len].count(image.id) % image.n)


def as_row(tokens: list[int], learned: list[bool], seq_len: int, image: ImageTokens, eot_id: int) -> Row:
    """Return "tokens" (T,), filled up with ends of text, "targets" (T,), the token that follows if it is
    learned, else -100, and "length" (), the tokens of the conversation, of a row of seq_len = T tokens."""
    n = length_within(tokens, seq_len, image)
    row = np.full(seq_len, eot_id, np.int64)
    targets = np.full(seq_len, IGNORED, np.int64)
    row[:n] = tokens[:n]
    targets[: max(n - 1, 0)] = np.where(learned[1:n], tokens[1:n], IGNORED)
    return {"tokens": row, "targets": targets, "length": np.array(n)}


def about(question: str, answer: str) -> Conversation:
    """Return a question about an image, which stands in front of it, and its answer."""
    asked = f"{IMAGE}\n{question}" if question else IMAGE
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


class SceneTalks:
    """Conversations about drawn scenes, a sequence of `Seen`.

    Number i is question i mod 8 of scene i / 8, or with captions the caption of scene i.
    """

    def __init__(self, parts: dict[str, int], captions: bool, every: bool = True):
        """Draw the scenes. parts: how many of each part; every: all questions of a scene, or one of each."""
        drawn = [scenes.pictures(n, part) for part, n in parts.items()]
        self.images = np.concatenate([images for images, _ in drawn])
        self.scenes = [scene for _, of_part in drawn for scene in of_part]
        self.captions, self.n_each = captions, 1 if captions or not every else 2 * len(scenes.KINDS)

    def __len__(self) -> int:
        return len(self.scenes) * self.n_each

    def __getitem__(self, i: int) -> Seen:
        number = i // self.n_each
        scene = self.scenes[number]
        if self.captions:
            return Seen(about("", scenes.caption(scene)), number)
        asked = scenes.questions(scene)
        question = asked[i % len(asked)]
        return Seen(about(question.text, question.answer), number)

    def pixels(self, number: int, shape: tuple[int, int, int]) -> np.ndarray:
        """Return a picture, uint8 of a shape (C, H, W)."""
        return fitted(self.images[number : number + 1], shape[1:], shape[0])[0]


class FileTalks(list):
    """Conversations of a file, a list of `Seen`."""

    def pixels(self, path: Path, shape: tuple[int, int, int]) -> np.ndarray:
        """Return an image, uint8 of a shape (C, H, W), with a border where it is not square. Raises
        OSError for a file that cannot be read, since it is read while a model is trained."""
        try:
            return decode(path, shape, Counter(), border=True)
        except ValueError as error:
            raise OSError(str(error)) from None


@dataclass(frozen=True)
class Writing:
    """The settings by which conversations become rows."""

    tokenizer: Tokenizer
    image: ImageTokens
    stage: int
    seq_len: int  # T
    shape: tuple[int, int, int]  # of an image, (C, H, W)

    def row(self, messages: Conversation) -> Row:
        """Return a conversation as the arrays of `as_row`."""
        tokens, learned = as_tokens(messages, self.tokenizer, self.image, self.stage)
        return as_row(tokens, learned, self.seq_len, self.image, self.tokenizer.eot_id)

    @property
    def fingerprint(self) -> str:
        """Return all of it as text."""
        return f"{self.tokenizer.fingerprint} {self.image} {self.stage} {self.seq_len} {self.shape}"


class TalkRows(Rows):
    """Conversations as rows: those of `as_row`, and "image", uint8 (C, H, W), black where there is none."""

    def __init__(self, talks: SceneTalks | FileTalks, writing: Writing):
        super().__init__(talks)
        self.writing = writing

    def __getitem__(self, i: int) -> Row:
        writing = self.writing
        messages, name = self.rows[i % len(self.rows)]
        row = writing.row(messages)
        blank = np.zeros(writing.shape, np.uint8)
        return row | {"image": blank if name is None else self.rows.pixels(name, writing.shape)}
