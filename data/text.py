"""Data: from documents to training batches.

    documents -> tokens, each document led by <|endoftext|> -> shards on disk -> windows of T + 1 tokens

data/corpus.py finds the documents. The last of them, a twentieth of the text, are *held out*: the model, and the
tokenizer if one is learned, never see them in training, so the loss on them is the loss on new text. The
tokens of the two splits, train and val, are kept as memory-mapped *shards* with a manifest of what they were
made from; a shard that is stale or damaged is named and rebuilt.

The loader is a function of (seed, sample number) alone: nothing to save but the step, nothing repeated or
skipped on resuming, and the same sequence for any number of processes.

    python -m data.text [CORPUS] [--tokenizer bpe:4096]      build the shards, print what is in them
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from data.corpus import documents, find_files
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from formats.atomic import damage, replace_directory, write_checksums

HELD_OUT = 1 / 20  # share of the text that is held out for validation ...
HELD_OUT_BYTES = 4 << 20  # ... and the most of it: longer evaluation buys no precision worth its time
MIN_BYTES = 100  # of text: below this there is nothing to hold out
BPE_BYTES = 64 << 20  # a tokenizer learns from about this much text: of a larger corpus, every k-th document
BATCH_CHARACTERS = 4 << 20  # of text tokenised at a time


@dataclass
class Split:
    """One of the two parts of a corpus, train or val."""

    tokens: np.ndarray  # memory-mapped uint16 or uint32 (n_tokens,)
    n_bytes: int  # of the UTF-8 text they stand for
    n_documents: int


@dataclass
class Dataset:
    """A corpus, tokenised and divided."""

    name: str  # of the shards' folder, made of the corpus's and the tokenizer's hashes
    tokenizer: Tokenizer
    train: Split
    val: Split


def prepare(
    data: str, tokenizer: str, cache: Path, *, bad_text: str = "refuse", say: Callable[[str], None] = print
) -> Dataset:
    """Find, check, tokenise and memory-map a corpus; what is in the cache and whole is not made again.

    data, tokenizer: as for --data and --tokenizer. bad_text: "refuse" raises ValueError at the first text
    that is not UTF-8, "skip" leaves it out and says so. Raises ValueError for everything a user can mend.
    """
    n_tokens = bpe_size(tokenizer)
    if n_tokens is None:
        tok = get_tokenizer(tokenizer)  # first of all, so that a wrong name is found before any work

    def on_bad_text(problem: str) -> None:
        if bad_text == "refuse":
            raise ValueError(
                f"--data {data}: {problem}; mend it, or pass --bad-text skip to leave such text out"
            )
        say(f"skipped: {problem}")

    def silently(problem: str) -> None:
        """For every pass after the first, which has said it."""

    with only_one_at(cache, say):
        # First pass: is all of it text, how much is it, and is it what the shards were made from?
        files = find_files(data, cache)
        digest, sizes = hashlib.sha256(), []
        for text in documents(files, on_bad_text):
            raw = text.encode()
            digest.update(f"{len(raw)}:".encode() + raw)  # the length tells "ab", "c" from "a", "bc"
            sizes.append(len(raw))
        if sum(sizes) < MIN_BYTES:
            raise ValueError(
                f"--data {data}: {sum(sizes)} bytes of text; expected at least {MIN_BYTES} to learn from"
            )
        corpus_sha256 = digest.hexdigest()
        cut = held_out_from(sizes)

        def split(name: str) -> Iterator[str]:
            """The documents of "train" or "val"."""
            start = 0
            for size, text in zip(sizes, documents(files, silently), strict=True):
                in_train, in_val = divide(text, start, size, cut)
                start += size
                part = in_train if name == "train" else in_val
                if part:
                    yield part

        if n_tokens is not None:
            home = cache / f"{corpus_sha256[:16]}-bpe-{n_tokens}"
            tok = learned_tokenizer(home, n_tokens, lambda: split("train"), sum(sizes), say)
        home = cache / f"{corpus_sha256[:16]}-{tok.fingerprint[:16]}"
        made_from = {
            "corpus_sha256": corpus_sha256,
            "tokenizer_sha256": tok.fingerprint,
            "held_out_from_byte": cut,
        }
        problem = check_shards(home, made_from)
        if problem is not None:
            if home.exists():
                say(f"{problem}: built anew")
            build_shards(home, made_from, tok, split, {"train": cut, "val": sum(sizes) - cut})
        return open_shards(home, tok)


def reopen(cache: Path, name: str, tokenizer: str) -> Dataset:
    """A Dataset that `prepare` has made, by its name and tokenizer; the corpus is not looked at again."""
    n_tokens = bpe_size(tokenizer)
    learned = cache / f"{name.partition('-')[0]}-bpe-{n_tokens}"
    tok = get_tokenizer(tokenizer) if n_tokens is None else Tokenizer.load(learned)
    return open_shards(cache / name, tok)


@contextmanager
def only_one_at(cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from the cache: of two runs started together, one prepares and the other finds."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "lock")  # the system's own, given back even by a process that is killed
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"waiting for another process that prepares data in {cache}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def bpe_size(tokenizer: str) -> int | None:
    """N of "bpe:N", None for another tokenizer. Raises ValueError if N is not a number or below 257."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise ValueError(
            f"--tokenizer {tokenizer}: expected bpe:N, N at least 257 (256 bytes and the end of text)"
        )
    return int(size)


def held_out_from(sizes: list[int]) -> int:
    """The byte of the corpus where validation begins: at a document, or inside one that is too large.

    sizes: of the documents, in bytes. Held out are the last documents that make up the share wanted; where
    whole ones would come to more than twice that, exactly the share, which begins inside a document.
    """
    total = sum(sizes)
    wanted = min(int(total * HELD_OUT), HELD_OUT_BYTES)
    start = total
    for size in reversed(sizes):
        start -= size
        if total - start >= wanted:
            break
    if total - start > 2 * wanted:
        return total - wanted
    return start


def divide(text: str, start: int, size: int, cut: int) -> tuple[str, str]:
    """The parts of a document before and after the cut, which moves on to the next line break.

    start, size: of the document in the corpus, in bytes. cut: the byte of the corpus from `held_out_from`.
    """
    if start + size <= cut:
        return text, ""
    if start >= cut:
        return "", text
    raw = text.encode()
    at = raw.find(b"\n", cut - start) + 1
    if at == 0 or at == size:  # no line break to use: the next whole character
        at = cut - start
        while at < size and raw[at] & 0xC0 == 0x80:  # 10xxxxxx: inside a character of UTF-8
            at += 1
    return raw[:at].decode(), raw[at:].decode()


def learned_tokenizer(
    home: Path, size: int, texts: Callable[[], Iterator[str]], n_bytes: int, say: Callable[[str], None]
) -> Tokenizer:
    """The encoding of `size` tokens learned from texts(), or the one kept in home from an earlier run.

    n_bytes: of all the text. say is told if the one kept is damaged.
    """
    checksum = home / "fingerprint"
    if checksum.is_file():
        try:
            tokenizer = Tokenizer.load(home)
        except ValueError:
            tokenizer = None
        if tokenizer is not None and tokenizer.fingerprint == checksum.read_text():
            return tokenizer
        say(f"{home / 'tokenizer.json'}: missing or damaged: learned anew")
    every = math.ceil(n_bytes / BPE_BYTES)
    sample = (text for i, text in enumerate(texts()) if i % every == 0)
    tokenizer = train_bpe(sample, size, progress=True)
    with replace_directory(home) as new:
        tokenizer.save(new)
        (new / checksum.name).write_text(tokenizer.fingerprint)
    return tokenizer


def build_shards(
    home: Path,
    made_from: dict,
    tokenizer: Tokenizer,
    split: Callable[[str], Iterator[str]],
    sizes: dict[str, int],
) -> None:
    """Write home/train.bin, val.bin, manifest.json and their checksums, all or nothing.

    made_from: what the manifest says the shards were made from. split: gives the documents of "train" or
    "val". sizes: their bytes, to show how far the work is.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    manifest = {**made_from, "dtype": np.dtype(dtype).name}
    with replace_directory(home) as new:
        for name in ("train", "val"):
            counts = {"tokens": 0, "bytes": 0, "documents": 0}
            bar = tqdm(desc=f"tokenise {name}", total=sizes[name], unit="B", unit_scale=True)
            with open(new / f"{name}.bin", "wb") as shard, bar:
                for batch in batches(split(name)):
                    encoded = tokenizer.encode_batch(batch, os.cpu_count() or 1)
                    for text, ids in zip(batch, encoded, strict=True):
                        np.array([tokenizer.eot_id, *ids], dtype).tofile(shard)
                        n_bytes = len(text.encode())
                        counts["tokens"] += 1 + len(ids)
                        counts["bytes"] += n_bytes
                        counts["documents"] += 1
                        bar.update(n_bytes)
            manifest[name] = counts
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        write_checksums(new)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of about BATCH_CHARACTERS characters."""
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
    """What is wrong with the shards in home, or None."""
    problem = damage(home)
    if problem is not None:
        return problem
    manifest = json.loads((home / "manifest.json").read_text())
    if any(manifest.get(key) != value for key, value in made_from.items()):
        return f"{home} was made from another corpus or tokenizer"
    return None


def open_shards(home: Path, tokenizer: Tokenizer) -> Dataset:
    manifest = json.loads((home / "manifest.json").read_text())
    train, val = open_shard(home, manifest, "train"), open_shard(home, manifest, "val")
    return Dataset(home.name, tokenizer, train, val)


def open_shard(home: Path, manifest: dict, name: str) -> Split:
    """The split of that name, its tokens left on disk until they are read."""
    tokens = np.memmap(home / f"{name}.bin", dtype=manifest["dtype"], mode="r")
    return Split(tokens, manifest[name]["bytes"], manifest[name]["documents"])


class Loader:
    """Windows of T + 1 tokens in a shuffled order that visits every token once an epoch.

    Think of the tokens as a circle of n, tiled over and over by windows of T: window g predicts the T
    tokens that follow token g T mod n. Epoch e is the windows that begin in the e-th turn, in an order
    drawn from (seed, e). No window comes twice, no token is left out at the end, and the seams fall
    elsewhere in each epoch.

    tokens: (n,), of any integer type. seq_len: T. Raises ValueError if n is not above T.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int):
        if len(tokens) <= seq_len:
            raise ValueError(
                f"--seq-len {seq_len}: the training text has only {len(tokens)} tokens; give more text"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.epoch, self.order = -1, np.empty(0, np.int64)  # the epoch last asked for, and its order

    def first_window(self, epoch: int) -> int:
        """The first window that begins in this epoch: ceil(epoch * n / T)."""
        return -(-epoch * len(self.tokens) // self.seq_len)

    def window(self, sample: int) -> int:
        """The window that comes at this place in the sequence of all samples."""
        epoch = sample * self.seq_len // len(self.tokens)
        first = self.first_window(epoch)
        if epoch != self.epoch:
            n = self.first_window(epoch + 1) - first
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(n)
        return first + int(self.order[sample - first])

    def batch(self, first_sample: int, n: int) -> Tensor:
        """Samples first_sample ... first_sample + n - 1 as int64 (n, T + 1)."""
        rows = np.empty((n, self.seq_len + 1), np.int64)
        for i in range(n):
            start = self.window(first_sample + i) * self.seq_len % len(self.tokens)
            row = self.tokens[start : start + self.seq_len + 1]
            rows[i, : len(row)] = row
            rows[i, len(row) :] = self.tokens[: self.seq_len + 1 - len(row)]  # round the end of the circle
        return torch.from_numpy(rows)


def held_out_batches(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """Windows in which every token but the first is a target once, in order: int64 (batch_size, T + 1).

    The last whole windows may be fewer than batch_size; the tokens that then remain come as one shorter row.
    """
    n_whole = (len(tokens) - 1) // seq_len
    for first in range(0, n_whole, batch_size):
        starts = range(first, min(first + batch_size, n_whole))
        rows = [np.asarray(tokens[i * seq_len : (i + 1) * seq_len + 1], np.int64) for i in starts]
        yield torch.from_numpy(np.stack(rows))
    rest = np.asarray(tokens[n_whole * seq_len :], np.int64)
    if len(rest) > 1:
        yield torch.from_numpy(rest)[None]


def cu_seqlens(tokens: Tensor, eot_id: int) -> Tensor:
    """Where the n documents in tokens (B, T) begin, rows laid end to end, and then B T: int32 (n + 1,).

    This keeps `kernels.attention` from crossing from one document to another, with the rows run as one,
    `tokens.view(1, -1)`. A document begins at each end-of-text token and at each row.
    """
    begins = tokens == eot_id
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([tokens.numel()])]).int()


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokenise a corpus and print what is in it.")
    parser.add_argument(
        "data", nargs="?", default="stdlib", help="corpus, as for train.py --data (default stdlib)"
    )
    parser.add_argument("--tokenizer", default="bpe:4096")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--bad-text", choices=("refuse", "skip"), default="refuse")
    args = parser.parse_args()
    dataset = prepare(args.data, args.tokenizer, args.cache, bad_text=args.bad_text)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        n_tokens = len(split.tokens)
        print(
            f"{name:5} {split.n_documents:,} documents, {split.n_bytes:,} bytes, {n_tokens:,} tokens, ",
            end="",
        )
        print(f"{split.n_bytes / n_tokens:.2f} bytes per token")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
