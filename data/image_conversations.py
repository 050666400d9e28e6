r"""Conversations about images, from files or about drawn scenes, as rows of tokens, each with an image.

Files have LLaVA's format, or are images with captions:

    {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                              {"from": "gpt", "value": "A cat."}]}
    {"image": "coco/1.jpg", "caption": "A cat on a mat."}

in any file of records (data/records.py), such as the lines of a .jsonl or the items of a .json. The other
forms of data/conversations.py are read, too. The name of an image is relative to a folder. A conversation has
one image, whose place "<image>" marks in a question, or none.

LLaVA is trained in two stages (vision/llava.py). In stage 1 a row is an image and its caption, without a
question: the model learns to read the image. In stage 2 it is a whole conversation.

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
    """A conversation, and the image that it is about, if there is one."""

    messages: Conversation
    image: Path | int | None  # a file, the number of a drawn picture, or none


def to_seen(record: Any, folder: Path) -> Seen:
    """Return the conversation in a record, and the path of its image in the folder.

    Raises ValueError for a record of an unknown format, for another number of "<image>" than of images, and
    for an image that is not a file in the folder.
    """
    name = record.get("image") if isinstance(record, dict) else None
    if name is not None and "caption" in record:
        turns = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": record["caption"]}]
        record = {"messages": turns}
    messages = to_messages(record)
    n = sum(message["content"].count(IMAGE) for message in messages if message["role"] != "assistant")
    if n != (name is not None):
        given = "no image" if name is None else f"the image {name!r:.60}"
        raise ValueError(f"{n} times {IMAGE} in the questions, but {given}: expected one for each image")
    if name is None:
        return Seen(messages, None)

    # The file of records may be a stranger's, so only images below the folder are read.
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

    on_bad is called with a message for a record that `to_seen` refuses, and may raise an error; otherwise the
    record is left out. Raises ValueError if there is no such folder, and for a file that cannot be read or
    has no conversations.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder; expected the folder of the images in {path}")
    expected = f'{EXPECTED}, each with {{"image": "FILE"}}, or {{"image", "caption"}}'
    return converted(path, "conversations", expected, partial(to_seen, folder=folder), on_bad)


# --- from conversations to rows


def as_tokens(seen: Conversation, tokenizer: Tokenizer, image: ImageTokens, stage: int) -> tuple[list, list]:
    """Return the token ids of a conversation, and for each whether it is predicted.

    Predicted are the answers and their ends. In stage 1 only the image and the first answer, its caption, are
    written.
    """
    if stage == 2:
        return render(seen, tokenizer, image)
    caption = next(message["content"] for message in seen if message["role"] == "assistant")
    begin = tokenizer.begin_ids or [tokenizer.eot_id]
    parts = [*((token, False) for token in begin), (IMAGE, False), (caption, True), (end_id(tokenizer), True)]
    return encode(with_images(iter(parts), image), tokenizer)


def before_answer(seen: Conversation, tokenizer: Tokenizer, image: ImageTokens, stage: int) -> list[int]:
    """Return the token ids of `as_tokens` that are in front of the first answer, as a prompt for it."""
    if stage == 1:
        tokens, learned = as_tokens(seen, tokenizer, image, stage)
        return tokens[: learned.index(True)]
    first = next(i for i, message in enumerate(seen) if message["role"] == "assistant")
    return prompt_tokens(seen[:first], tokenizer, image)


def length_within(tokens: list[int], seq_len: int, image: ImageTokens) -> int:
    """Return how many of the tokens a row of seq_len keeps. An image that would be cut is left out whole."""
    if len(tokens) <= seq_len or tokens[seq_len] != image.id:
        return min(len(tokens), seq_len)
    return seq_len - (tokens[:seq_len].count(image.id) % image.n)


def as_row(tokens: list[int], learned: list[bool], seq_len: int, image: ImageTokens, eot_id: int) -> Row:
    """Return the row of a conversation, with seq_len = T:

    "tokens" (T,)     the tokens, cut to T, or padded with eot_id
    "targets" (T,)    the token that follows each if `learned` marks it, else -100
    "length" ()       the tokens without padding
    """
    n = length_within(tokens, seq_len, image)
    row = np.full(seq_len, eot_id, np.int64)
    targets = np.full(seq_len, IGNORED, np.int64)
    row[:n] = tokens[:n]
    targets[: max(n - 1, 0)] = np.where(learned[1:n], tokens[1:n], IGNORED)
    return {"tokens": row, "targets": targets, "length": np.array(n)}


def about(question: str, answer: str) -> Conversation:
    """Return the conversation of a question, with the image in front of it, and its answer."""
    asked = f"{IMAGE}\n{question}" if question else IMAGE
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


class SceneTalks:
    """Conversations about drawn scenes, a sequence of `Seen`.

    Conversation i is question i mod 8 of scene i // 8, or where a scene has only one conversation, question
    i mod 8 of scene i, or its caption.
    """

    def __init__(self, parts: dict[str, int], captions: bool, every: bool = True):
        """Draw the scenes.

        parts: {part: number of its scenes}. captions: the caption of each scene in the place of questions.
        every: all eight questions of each scene, or else one.
        """
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
        """Return the picture of a scene by its number, uint8 of a shape (C, H, W)."""
        return fitted(self.images[number : number + 1], shape[1:], shape[0])[0]


class FileTalks(list):
    """Conversations of a file, a list of `Seen`."""

    def pixels(self, path: Path, shape: tuple[int, int, int]) -> np.ndarray:
        """Return an image, uint8 of a shape (C, H, W), with a border if its aspect ratio is another.

        Raises OSError for a file that cannot be read: a run ends by that in one line.
        """
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
        """Return a text that differs whenever the rows of the same conversations may differ."""
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
