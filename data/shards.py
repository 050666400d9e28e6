"""Shards: the tokens of a corpus on disk, memory-mapped, with a manifest that describes them.

    home/train.bin, val.bin    token ids, uint16 or uint32, with <|endoftext|> in front of each document
    home/manifest.json         hashes of the corpus and the tokenizer, numbers of tokens, bytes and documents
    home/checksums.json        the SHA-256 of each of these files

A folder is written completely or not at all. data/text.py builds it anew where `check_shards` finds a fault.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer
from formats.atomic import damage, names_full_disk, replace_directory, write_checksums
from formats.progress import progress_bar

BATCH_CHARACTERS = 4 << 20  # of text tokenised at a time


@dataclass
class Split:
    """One of the two parts of a corpus, train or val."""

    tokens: np.ndarray  # memory-mapped uint16 or uint32 (n_tokens,)
    n_bytes: int  # of the UTF-8 text they stand for
    n_documents: int


@dataclass
class Corpus:
    """A tokenised corpus in two parts."""

    name: str  # of the shards' folder, made of the corpus's and the tokenizer's hashes
    tokenizer: Tokenizer
    train: Split
    val: Split


def build_shards(
    home: Path,
    made_from: dict,
    tokenizer: Tokenizer,
    split: Callable[[str], Iterator[str]],
    sizes: dict[str, int],
) -> None:
    """Write home/train.bin, val.bin, manifest.json and their checksums, all or nothing.

    made_from: the hashes that the manifest records. split(name): yields the documents of "train" or "val".
    sizes: their bytes, for the progress bar.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    manifest = {**made_from, "dtype": np.dtype(dtype).name}
    with replace_directory(home) as new:
        for name in ("train", "val"):
            counts = {"tokens": 0, "bytes": 0, "documents": 0}
            bar = progress_bar(desc=f"tokenise {name}", total=sizes[name], unit="B", unit_scale=True)
            path = new / f"{name}.bin"
            with names_full_disk(home / path.name), open(path, "wb") as shard, bar:
                for batch in batches(split(name)):
                    encoded = tokenizer.encode_batch(batch, os.cpu_count() or 1)
                    for text, ids in zip(batch, encoded, strict=True):
                        shard.write(np.array([tokenizer.eot_id, *ids], dtype).tobytes())
                        n_bytes = len(text.encode())
                        counts["tokens"] += 1 + len(ids)
                        counts["bytes"] += n_bytes
                        counts["documents"] += 1
                        bar.update(n_bytes)
            manifest[name] = counts
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        write_checksums(new)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield the texts in order, in lists of about BATCH_CHARACTERS characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_shards(home: Path, made_from: dict) -> str | None:
    """Return a description of the first fault of the shards in home: missing, damaged, or made from another
    corpus or tokenizer than made_from has. Without a fault return None."""
    problem = damage(home)
    if problem is not None:
        return problem
    manifest = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
    if any(manifest.get(key) != value for key, value in made_from.items()):
        return f"{home} was made from another corpus or tokenizer"
    return None


def open_shards(home: Path, tokenizer: Tokenizer) -> Corpus:
    """Return the corpus in home, whose shards have no fault. tokenizer: the one that made them."""
    manifest = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
    train, val = open_shard(home, manifest, "train"), open_shard(home, manifest, "val")
    return Corpus(home.name, tokenizer, train, val)


def open_shard(home: Path, manifest: dict, name: str) -> Split:
    """Return the split "train" or "val", with its tokens memory-mapped."""
    tokens = np.memmap(home / f"{name}.bin", dtype=manifest["dtype"], mode="r")
    return Split(tokens, manifest[name]["bytes"], manifest[name]["documents"])
