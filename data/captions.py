"""Images with captions: drawn or from files, as rows {"image": uint8 (C, H, W), "tokens": int64 (T,), ...}.

    glyphs, glyphs:all and others     characters, drawn; "bold serif latin small letter g" (data/glyphs.py)
    scenes                            two drawn objects; "a small red bar above a large cyan ring"
    captions.jsonl                    {"image": "a.jpg", "caption": "..."} on each line: one caption, or a
                                      list of them; also "file_name" and "text", and .json .csv .tsv .parquet
    a folder                          with metadata.jsonl or metadata.csv in it, as Hugging Face lays it out
    shards-{000..127}.tar             WebDataset's tar files (data/tar_images.py)

Paths of images are relative to the file that names them. An image may stand on several lines; in each epoch
it comes with the next of its captions. Images are decoded once, to a memory map below --cache, as in
data/images.py. A twentieth is held out, at most 1,000, unless --val names others.

Drawn sets bring tests: classes that are described in words, and captions that are nearly right.

Shapes: N images, M captions, T tokens of the longest caption.
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

SHARE, MOST_HELD_OUT = 1 / 20, 1_000  # of the images of files
METADATA = ("metadata.jsonl", "metadata.csv")
N_SCENES, N_HELD_OUT = 16_000, 500  # scenes to learn from, and of each part that is held out
EXPECTED = 'expected records {"image": PATH, "caption": TEXT}'


class ZeroShot(NamedTuple):
    """A classification of the held-out images: the prompts of each class, and the class of each image."""

    name: str
    prompts: tuple[tuple[str, ...], ...]
    answers: tuple[int, ...]


class Swap(NamedTuple):
    """A wrong caption for each held-out image, with the same words as the right one, or nearly."""

    name: str
    wrong: tuple[str, ...]


@dataclass
class Part:
    """Images with their captions, and what they are tested with."""

    images: np.ndarray  # uint8 (N, C, H, W), perhaps memory-mapped
    captions: list[tuple[str, ...]]  # of each image, one or more
    groups: dict[str, range] = field(default_factory=dict)  # images that are looked up among each other
    classes: tuple[ZeroShot, ...] = ()
    swaps: tuple[Swap, ...] = ()


class CaptionRows(Rows):
    """A Part as rows {"image", "tokens", "augment": bool ()}. In epoch e an image has its e-th caption.

    tokens: int32 (M, T), of all captions. first: where those of each image begin, and the end (N + 1,).
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
    """Return both parts of a set of glyphs. The held-out one is classified by character, by style, by both.

    A character is described by its captions in every style, a style by those of every character.
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
    """Return scenes to learn from, and those held out: of pairs of a colour and a shape that occur among the
    first, and of pairs that do not. Their swaps exchange the colours, or turn the relation around."""
    drawn = [scenes.pictures(N_SCENES, "train")]
    drawn += [scenes.pictures(N_HELD_OUT, part) for part in ("val", "unseen")]
    captions = [[(scenes.caption(scene),) for scene in some] for _, some in drawn]
    held = [*drawn[1][1], *drawn[2][1]]
    swaps = (
        Swap("colours swapped", tuple(scenes.caption(scenes.with_colours_swapped(scene)) for scene in held)),
        Swap("relation reversed", tuple(scenes.caption(scenes.with_relation_reversed(s)) for s in held)),
    )
    groups = {"": range(N_HELD_OUT), "unseen pairs": range(N_HELD_OUT, 2 * N_HELD_OUT)}
    pixels = np.concatenate([drawn[1][0], drawn[2][0]])
    return [Part(drawn[0][0], captions[0]), Part(pixels, captions[1] + captions[2], groups, (), swaps)]


# --- sets from files


def find(data: str, flag: str, bad_text: str, notify: Callable[[str], None]) -> dict:
    """Return {path of an image, or its place in a shard: its captions} for a file, folder or shards.

    Raises ValueError for what cannot be read, or with bad_text "skip" leaves it out.
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
    """Return the path of an image and its captions of a record. Raises ValueError if there are none."""
    name = record.get("image", record.get("file_name")) if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{record!r:.80}: {EXPECTED}")
    return name, captions_of(record)


def file_parts(
    data: str, val: str | None, shape: tuple[int, int, int], cache: Path, bad: str, notify: Callable
) -> list[Part]:
    """Return both parts of a set from files, decoded to a shape (C, H, W) below the cache."""
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
    what cannot be read, "refuse" raises ValueError, as does everything else that a user can mend.
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
    """Return the tokenizer of a name; "bpe:N" is learned from the captions of the first part."""
    size = bpe_size(name)
    if size is None:
        return get_tokenizer(name)
    return train_bpe([text for texts in next(iter(parts)).captions for text in texts], size)


def encode(texts: Sequence[str], tokenizer, most: int, length: int | None = None) -> tuple[np.ndarray, int]:
    """Return the tokens of texts, int32 (M, T), and how many texts were cut to `most` tokens.

    A row is what begins a text, if there is such a token, the text, its end token, and padding up to the
    longest, or to `length`. Padding is the tokenizer's, else further end tokens.
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
    """Return two parts as a Dataset, with captions of at most `most` tokens, see `encode`.

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
    """Return two parts, and for each the numbers of its captions, int32 (M, T), as a Dataset.

    reader: what made the numbers, in the place of a tokenizer. kind and made_by: what the name of the set
    begins with, and what it depends on beside images and numbers. note: the end of the summary. Raises
    ValueError for a part without images.
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
