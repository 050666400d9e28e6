"""Images with captions: drawn or from files, as rows {"image": uint8 (C, H, W), "tokens": int64 (T,), ...}.

    glyphs, glyphs:all and others     characters, drawn; "bold serif latin small letter g" (data/glyphs.py)
    scenes                            two drawn objects; "a small red bar above a large cyan ring"
    captions.jsonl                    {"image": "a.jpg", "caption": "..."} on each line: one caption, or a
                                      list of them; also "file_name" and "text", and .json .csv .tsv .parquet
    a folder                          with metadata.jsonl or metadata.csv in it, as Hugging Face lays it out
    shards-{000..127}.tar             WebDataset's tar files (data/tar_images.py)

Paths of images are relative to the file that names them. An image may stand on several lines; in each epoch
it comes with the next of its captions. Images are decoded once, to a memory map below --cache, as in
data/images.py. A twentieth of the images, at most 1,000, is held out, unless --val names other images.

The held-out part of a drawn set also has tests: classes that are described in words (`ZeroShot`), or captions
that are nearly right (`Swap`).

Shapes: N images, C channels, H x W pixels, M captions, T tokens of the longest caption.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import class_folders, glyphs, images, scenes
from data.class_folders import Found
from data.images import KIND, VERSION, decode, fitted
from data.records import RECORDS, converted, suffix_of
from data.rows import Dataset, Row, Rows
from data.tar_images import captions_of, find_shards, is_shards, read_shard
from data.text import bad_texts, bpe_size, only_one_at
from data.tokenizer import get_tokenizer, train_bpe

SHARE, MOST_HELD_OUT = 1 / 20, 1_000  # of the images from files, the share and the number to hold out at most
METADATA = ("metadata.jsonl", "metadata.csv")
N_SCENES, N_HELD_OUT = 16_000, 500  # scenes to learn from, and scenes of each held-out part
EXPECTED = 'expected records {"image": PATH, "caption": TEXT}'


class ZeroShot(NamedTuple):
    """A classification of the held-out images by descriptions of the classes."""

    name: str
    prompts: tuple[tuple[str, ...], ...]  # the descriptions of each class
    answers: tuple[int, ...]  # the class of each image


class Swap(NamedTuple):
    """A wrong caption for each held-out image, made of the same words as the right one, or nearly so."""

    name: str
    wrong: tuple[str, ...]


@dataclass
class Part:
    """The images to learn from or those held out, with their captions, and tests of the latter."""

    images: np.ndarray  # uint8 (N, C, H, W), perhaps memory-mapped
    captions: list[tuple[str, ...]]  # of each image, one or more
    groups: dict[str, range] = field(default_factory=dict)  # retrieval searches each group of images alone
    classes: tuple[ZeroShot, ...] = ()
    swaps: tuple[Swap, ...] = ()


class CaptionRows(Rows):
    """A Part as rows {"image": uint8 (C, H, W), "tokens": int64 (T,), "augment": bool ()}.

    In epoch e an image has caption e modulo the number of its captions. tokens: int32 (M, T), those of all
    captions, in the order of the images. augment: true for images to learn from. first: (N + 1,), the first
    caption of each image, and M.
    """

    def __init__(self, part: Part, tokens: np.ndarray, augment: bool):
        super().__init__(part.images)
        self.part, self.tokens, self.augment = part, tokens, np.array(augment)
        self.first = np.cumsum([0, *map(len, part.captions)])

    def __getitem__(self, i: int) -> Row:
        epoch, i = divmod(i, len(self.rows))
        first, end = self.first[i : i + 2]
        tokens = self.tokens[first + epoch % (end - first)].astype(np.int64)
        return {"image": np.array(self.rows[i]), "tokens": tokens, "augment": self.augment}


# --- drawn sets


def glyph_parts(name: str) -> list[Part]:
    """Return both parts of a set of glyphs; the held-out one is classified by character, by font, by both.

    The prompts of a class are the captions of all its glyphs, of both parts: those of a character in every
    font, those of a font with every character.
    """
    sides = glyphs.choose(name)
    parts = [Part(glyphs.pictures(side), [(glyphs.caption(glyph),) for glyph in side]) for side in sides]
    everything = [*sides[0], *sides[1]]
    ways: dict[str, Callable] = {
        "character": lambda glyph: glyph.character,
        "style": lambda glyph: glyph.font,
        "both": lambda glyph: glyph,
    }
    classes = []
    for way, key in ways.items():
        prompts: dict[object, list[str]] = {}
        for glyph in everything:
            prompts.setdefault(key(glyph), []).append(glyphs.caption(glyph))
        number = {one: i for i, one in enumerate(prompts)}
        answers = tuple(number[key(glyph)] for glyph in sides[1])
        classes.append(ZeroShot(way, tuple(map(tuple, prompts.values())), answers))
    parts[1].classes = tuple(classes)
    return parts


def scene_parts() -> list[Part]:
    """Return the scenes to learn from and those held out.

    The first half of the held-out scenes has pairs of a colour and a shape that occur among those to learn
    from, the second half has pairs that do not. Wrong captions exchange the colours or reverse the relation.
    """
    drawn = [scenes.pictures(N_SCENES, "train")]
    drawn += [scenes.pictures(N_HELD_OUT, part) for part in ("val", "unseen")]
    captions = [[(scenes.caption(scene),) for scene in some] for _, some in drawn]
    held = [*drawn[1][1], *drawn[2][1]]
    changes = {
        "colours swapped": scenes.with_colours_swapped,
        "relation reversed": scenes.with_relation_reversed,
    }
    swaps = tuple(
        Swap(name, tuple(scenes.caption(change(scene)) for scene in held)) for name, change in changes.items()
    )
    groups = {"": range(N_HELD_OUT), "unseen pairs": range(N_HELD_OUT, 2 * N_HELD_OUT)}
    pixels = np.concatenate([drawn[1][0], drawn[2][0]])
    return [Part(drawn[0][0], captions[0]), Part(pixels, captions[1] + captions[2], groups, (), swaps)]


# --- sets from files


def find(data: str, flag: str, bad_text: str, notify: Callable[[str], None]) -> dict:
    """Return {image: its captions} of a file of records, a folder or shards. An image is a Path or a Member.

    flag: "--data" or "--val", for messages. Raises ValueError for what cannot be read; bad_text "skip" leaves
    it out instead.
    """
    found: dict = {}
    with bad_texts(f"{flag} {data}", bad_text, notify) as on_bad:
        if is_shards(data):
            for path in find_shards(data, flag):
                found |= {member: tuple(captions) for member, captions in read_shard(path, KIND, on_bad)}
            return found or nothing_in(data, flag)
        path = Path(data)
        if path.is_dir():
            names = [name for name in METADATA if (path / name).is_file()]
            path = path / (names[0] if names else METADATA[0])
        if not path.is_file() or suffix_of(path) not in RECORDS:
            raise ValueError(
                f"{flag} {data}: expected glyphs, scenes, a file of records such as captions.jsonl, a folder "
                f"with {METADATA[0]}, or .tar files"
            )
        for name, captions in converted(path, "images with captions", EXPECTED, as_pair, on_bad):
            image = path.parent / name
            if not image.is_file():
                on_bad(f"{path}: {name}: no such image beside this file")
                continue
            found[image] = (*found.get(image, ()), *captions)
    return found or nothing_in(data, flag)


def nothing_in(data: str, flag: str) -> dict:
    """Raise ValueError: there are no images with captions."""
    raise ValueError(f"{flag} {data}: has no images with captions; {EXPECTED}")


def as_pair(record: object) -> tuple[str, list[str]]:
    """Return the path of the image in a record, and its captions. Raises ValueError if one is missing."""
    name = record.get("image", record.get("file_name")) if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{record!r:.80}: {EXPECTED}")
    return name, captions_of(record)


def file_parts(
    data: str, val: str | None, shape: tuple[int, int, int], cache: Path, bad: str, notify: Callable
) -> list[Part]:
    """Return both parts of a set from files, decoded to a shape (C, H, W) below the cache.

    bad: as --bad-text. Raises ValueError for what cannot be read, and for images that are in both parts.
    """
    found = find(data, "--data", bad, notify)
    held = find(val, "--val", bad, notify) if val is not None else {}
    if both := found.keys() & held.keys():
        raise ValueError(f"--val {val}: {next(iter(both))} is among --data, too; expected other images")
    every = {**found, **held}
    n = min(MOST_HELD_OUT, max(1, int(len(found) * SHARE)))
    chosen = set(np.random.default_rng(0).permutation(len(found))[:n].tolist()) if not held else set()
    files = [Found(path, i, path in held or i in chosen) for i, path in enumerate(every)]

    made_from = {"version": VERSION, "shape": list(shape), "captions": True}
    with only_one_at(cache, notify):
        arguments = (lambda path, notes: decode(path, shape, notes), cache, KIND, bad == "skip", notify)
        decoded = class_folders.decoded(files, [], made_from, *arguments)
    captions = list(every.values())
    return [Part(part.arrays, [captions[i] for i in part.labels]) for part in decoded]


# --- from parts to a data set


def is_drawn(data: str) -> bool:
    """Return whether --data names images that are drawn here: scenes, or a set of glyphs."""
    return data == "scenes" or data.partition(":")[0] == "glyphs"


def read(
    data: str,
    size: tuple[int, int],
    cache: Path,
    *,
    channels: int | None = None,
    val: str | None = None,
    bad: str = "refuse",
    notify: Callable[[str], None] = print,
) -> list[Part]:
    """Return the images that `data` names with their captions, to learn from and held out.

    size: height and width. channels: 1 or 3; None: those that the set has, 3 in files. bad: "skip" leaves out
    what cannot be read, "refuse" raises ValueError for it, as for everything else that a user can mend.
    """
    if not is_drawn(data):
        return file_parts(data, val, (channels or 3, *size), cache, bad, notify)
    if val is not None:
        raise ValueError(f"--val {val}: {data} has a held-out part of its own; leave out --val")
    parts = scene_parts() if data == "scenes" else glyph_parts(data)
    for part in parts:
        part.images = fitted(part.images, size, channels)
    return parts


def choose_tokenizer(name: str, parts: Iterable[Part]):
    """Return the tokenizer of a name; "bpe:N" is trained on the captions of the first part."""
    size = bpe_size(name)
    if size is None:
        return get_tokenizer(name)
    return train_bpe([text for texts in next(iter(parts)).captions for text in texts], size)


def encode(texts: Sequence[str], tokenizer, most: int, length: int | None = None) -> tuple[np.ndarray, int]:
    """Return the tokens of M texts, int32 (M, T), and how many texts were cut to `most` tokens.

    A row has the tokenizer's begin token if there is one, the text, an end token, and padding up to `length`,
    or without it up to the longest row. Padding is the tokenizer's pad token, or else more end tokens.
    """
    rows = [[*tokenizer.begin_ids, *ids] for ids in tokenizer.encode_batch(list(texts), 1)]
    n_cut = sum(len(row) >= most for row in rows)
    rows = [[*row[: most - 1], tokenizer.eot_id] for row in rows]
    fill = tokenizer.pad_id if "pad_token" in tokenizer.roles else tokenizer.eot_id
    table = np.full((len(rows), length or max(map(len, rows), default=0)), fill, np.int32)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return table, n_cut


def as_dataset(parts: Sequence[Part], tokenizer, most: int, length: int | None = None) -> Dataset:
    """Return two parts as a Dataset. most, length: tokens of a caption, see `encode`.

    Raises ValueError for a part without images.
    """
    texts = [[text for captions in part.captions for text in captions] for part in parts]
    if length is None:  # one length for both parts, so that a compiled model sees one shape
        length = max(encode(some, tokenizer, most)[0].shape[1] for some in texts)
    tables, notes = [], Counter()
    for some in texts:
        table, n_cut = encode(some, tokenizer, most, length)
        tables.append(table)
        notes["captions"] += len(table)
        notes[f"of them cut to {most} tokens"] += n_cut
    counts = ", ".join(f"{n:,} {what}" for what, n in notes.items() if n)
    return with_tables(parts, tables, tokenizer, "captions", tokenizer.fingerprint, counts)


def with_tables(
    parts: Sequence[Part], tables: Sequence[np.ndarray], reader: Any, kind: str, made_by: str, note: str
) -> Dataset:
    """Return two parts as a Dataset. tables: for each part the tokens of its captions, int32 (M, T).

    reader: the Dataset's tokenizer, or another object that made the tokens. The fingerprint begins with kind,
    and is a hash of the images, of the tokens and of made_by. note: the end of the summary. Raises ValueError
    for a part without images.
    """
    rows = [CaptionRows(*pair, augment=i == 0) for i, pair in enumerate(zip(parts, tables, strict=True))]
    stored = [class_folders.Part(part.images, np.zeros(len(part.images), np.int64)) for part in parts]
    digest = hashlib.sha256(class_folders.fingerprint(*stored, [], images.KIND).encode())
    digest.update(made_by.encode())
    for table in tables:
        digest.update(table.tobytes())
    _, _, H, W = parts[0].images.shape
    summary = f"{len(rows[0]):,} images of {H} x {W} to learn from, {len(rows[1]):,} held out; {note}"
    name = f"{kind}-{digest.hexdigest()[:16]}"
    return Dataset(name, reader, *rows, summary=summary, unit="images", units_per_row=1)
