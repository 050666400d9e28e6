"""Text: from documents to rows of tokens.

    documents -> tokens, each document led by <|endoftext|> -> shards on disk -> windows of T + 1 tokens

data/corpus.py finds the documents. The last of them, a twentieth of the text, are *held out*: neither the
model nor a learned tokenizer sees them in training, so the loss on them is the loss on new text. The tokens
of the two splits, train and val, are kept as memory-mapped *shards* with a manifest of what they were made
from; a shard that is stale or damaged is named and built again.

    python -m data.text [CORPUS] [--tokenizer bpe:4096]      build the shards, print what is in them

Shapes: B batch, T tokens of a row, n tokens of the text.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from data.corpus import documents, find_files
from data.rows import Dataset, Row, Rows
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from formats.atomic import damage, replace_directory, write_checksums
from formats.progress import progress_bar

HELD_OUT = 1 / 20  # share of the text that is held out for validation ...
HELD_OUT_BYTES = 4 << 20  # and at most this much: more would cost time and hardly add precision
MIN_BYTES = 100  # of text: with less there is nothing to hold out
BPE_BYTES = 64 << 20  # a tokenizer learns from about this much text: every k-th document of a larger corpus
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


def prepare(
    data: str,
    tokenizer: str,
    cache: Path,
    *,
    bad_text: str = "refuse",
    notify: Callable[[str], None] = print,
) -> Corpus:
    """Find, check, tokenise and memory-map a corpus. Undamaged shards in the cache are used again.

    data, tokenizer: as for --data and --tokenizer. bad_text: "refuse" raises ValueError at the first text
    that is not UTF-8, "skip" leaves it out. notify is called with one line for each text left out and each
    shard built anew. Raises ValueError for everything a user can mend.
    """
    n_tokens = bpe_size(tokenizer)
    # A wrong name of a tokenizer is an error before any work begins.
    tok = get_tokenizer(tokenizer) if n_tokens is None else None

    def on_bad_text(problem: str) -> None:
        if bad_text == "refuse":
            raise ValueError(
                f"--data {data}: {problem}; mend it, or pass --bad-text skip to leave such text out"
            )
        notify(f"skipped: {problem}")

    with only_one_at(cache, notify):
        # The first pass finds the corpus's hash, the sizes of its documents, and text that is not UTF-8.
        files = find_files(data, cache)
        corpus_sha256, sizes = survey(documents(files, on_bad_text))
        if sum(sizes) < MIN_BYTES:
            raise ValueError(
                f"--data {data}: {sum(sizes)} bytes of text; expected at least {MIN_BYTES} to learn from"
            )
        cut = held_out_from(sizes)
        split = partial(documents_of, files, sizes, cut)

        # Learn a byte-pair encoding from the training part, unless --tokenizer names one that exists.
        if n_tokens is not None:
            home = cache / f"{corpus_sha256[:16]}-bpe-{n_tokens}"
            tok = learned_tokenizer(home, n_tokens, lambda: split("train"), sum(sizes), notify)

        # Tokenise, unless the cache has undamaged shards of this corpus and tokenizer.
        home = cache / f"{corpus_sha256[:16]}-{tok.fingerprint[:16]}"
        made_from = {
            "corpus_sha256": corpus_sha256,
            "tokenizer_sha256": tok.fingerprint,
            "held_out_from_byte": cut,
        }
        problem = check_shards(home, made_from)
        if problem is not None:
            if home.exists():
                notify(f"{problem}: built anew")
            build_shards(home, made_from, tok, split, {"train": cut, "val": sum(sizes) - cut})
        return open_shards(home, tok)


def survey(texts: Iterable[str]) -> tuple[str, list[int]]:
    """Return the SHA-256 of a corpus and the size in bytes of each of its documents."""
    digest, sizes = hashlib.sha256(), []
    for text in texts:
        raw = text.encode()
        digest.update(f"{len(raw)}:".encode() + raw)  # with the length, "ab", "c" differs from "a", "bc"
        sizes.append(len(raw))
    return digest.hexdigest(), sizes


def documents_of(files: list[Path], sizes: list[int], cut: int, name: str) -> Iterator[str]:
    """Yield the documents of the part called name, "train" or "val", which meet at byte `cut`.

    sizes: of all documents, in bytes. The document at the cut is divided between the two.
    """
    start = 0
    # Text that is not UTF-8 has been reported by the first pass.
    for size, text in zip(sizes, documents(files, lambda problem: None), strict=True):
        in_train, in_val = divide(text, start, size, cut)
        start += size
        part = in_train if name == "train" else in_val
        if part:
            yield part


def reopen(cache: Path, name: str, tokenizer: str) -> Corpus:
    """Open a Corpus that `prepare` has made, by its name and tokenizer, without reading the documents."""
    n_tokens = bpe_size(tokenizer)
    learned = cache / f"{name.partition('-')[0]}-bpe-{n_tokens}"
    tok = get_tokenizer(tokenizer) if n_tokens is None else Tokenizer.load(learned)
    return open_shards(cache / name, tok)


@contextmanager
def only_one_at(cache: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Lock the cache: of two runs started together, one prepares the data and the other finds it."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "lock")  # an operating system's lock: released even if the process is killed
    try:
        lock.acquire(timeout=1)
    except Timeout:
        notify(f"waiting for another process that prepares data in {cache}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def bpe_size(tokenizer: str) -> int | None:
    """Return N of "bpe:N", or None for another tokenizer. ValueError if N is below 257 or no number."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise ValueError(
            f"--tokenizer {tokenizer}: expected bpe:N, N at least 257 (256 bytes and the end of text)"
        )
    return int(size)


def held_out_from(sizes: list[int]) -> int:
    """Return the byte of the corpus where the held-out part begins.

    sizes: of the documents, in bytes. The last documents that make up the share HELD_OUT are held out. Where
    whole documents would come to more than twice that, exactly the share is, and it begins inside one.
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
    """Return the parts of a document before and after the cut, which moves on to the next line break.

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
    home: Path, size: int, texts: Callable[[], Iterator[str]], n_bytes: int, notify: Callable[[str], None]
) -> Tokenizer:
    """Return the encoding of `size` tokens learned from texts(), or the one kept in home by an earlier run.

    n_bytes: of all the text. notify is called if the one kept is damaged.
    """
    checksum = home / "fingerprint"
    if checksum.is_file():
        try:
            tokenizer = Tokenizer.load(home)
        except ValueError:
            tokenizer = None
        if tokenizer is not None and tokenizer.fingerprint == checksum.read_text():
            return tokenizer
        notify(f"{home / 'tokenizer.json'}: missing or damaged: learned anew")
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

    made_from: the hashes that the manifest records. split(name): yields the documents of "train" or "val".
    sizes: their bytes, for the progress bar.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    manifest = {**made_from, "dtype": np.dtype(dtype).name}
    with replace_directory(home) as new:
        for name in ("train", "val"):
            counts = {"tokens": 0, "bytes": 0, "documents": 0}
            bar = progress_bar(desc=f"tokenise {name}", total=sizes[name], unit="B", unit_scale=True)
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
    """Return a description of the first fault of the shards in home, or None."""
    problem = damage(home)
    if problem is not None:
        return problem
    manifest = json.loads((home / "manifest.json").read_text())
    if any(manifest.get(key) != value for key, value in made_from.items()):
        return f"{home} was made from another corpus or tokenizer"
    return None


def open_shards(home: Path, tokenizer: Tokenizer) -> Corpus:
    manifest = json.loads((home / "manifest.json").read_text())
    train, val = open_shard(home, manifest, "train"), open_shard(home, manifest, "val")
    return Corpus(home.name, tokenizer, train, val)


def open_shard(home: Path, manifest: dict, name: str) -> Split:
    """Return a split with its tokens memory-mapped."""
    tokens = np.memmap(home / f"{name}.bin", dtype=manifest["dtype"], mode="r")
    return Split(tokens, manifest[name]["bytes"], manifest[name]["documents"])


class Windows(Rows):
    """Training text as rows {"tokens": int64 (T + 1,)}, which visit every token once an epoch.

    Think of the tokens as a circle of n, tiled over and over by windows of T: window g predicts the T
    tokens that follow token g T mod n. Epoch e is the windows that begin in the e-th turn. No window comes
    twice, no token is left out at the end, and the seams fall elsewhere in each epoch.

    tokens: (n,), of any integer type. seq_len: T. Raises ValueError if n is not above T.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        if len(tokens) <= seq_len:
            raise ValueError(
                f"--seq-len {seq_len}: the training text has only {len(tokens)} tokens; give more text"
            )
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return self.epoch_start(1)

    def epoch_start(self, epoch: int) -> int:
        """Return the number of the first window that begins in this turn: ceil(epoch * n / T)."""
        return -(-epoch * len(self.tokens) // self.seq_len)

    def __getitem__(self, g: int) -> Row:
        T, n = self.seq_len, len(self.tokens)
        start = g * T % n
        window = np.empty(T + 1, np.int64)
        before_the_seam = self.tokens[start : start + T + 1]
        window[: len(before_the_seam)] = before_the_seam
        window[len(before_the_seam) :] = self.tokens[: T + 1 - len(before_the_seam)]
        return {"tokens": window}


class HeldOut(Rows):
    """Held-out text as rows {"tokens": int64}, in which every token but the first is a target once, in order.

    All rows have T + 1 tokens but the last, which has the tokens that remain (at least two), unless
    only_whole leaves it out.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, n_bytes: int, only_whole: bool = False):
        self.tokens, self.seq_len, self.n_bytes = tokens, seq_len, n_bytes
        self.n_targets = len(tokens) - 1
        self.only_whole = only_whole

    def __len__(self) -> int:
        n_whole, rest = divmod(self.n_targets, self.seq_len)
        return n_whole + (rest > 0 and not self.only_whole)

    def __getitem__(self, i: int) -> Row:
        T = self.seq_len
        return {"tokens": np.asarray(self.tokens[i * T : (i + 1) * T + 1], np.int64)}


def as_rows(corpus: Corpus, seq_len: int, *, only_whole: bool = False) -> Dataset:
    """Return the rows of T + 1 tokens, T = seq_len, of a tokenised corpus. See `Windows` and `HeldOut`.

    Raises ValueError if the training text is shorter than one row.
    """
    train, val = corpus.train.tokens, corpus.val.tokens
    most_frequent = np.bincount(train[: 1 << 24]).argmax()
    return Dataset(
        corpus.name,
        corpus.tokenizer,
        Windows(train, seq_len),
        HeldOut(val, seq_len, corpus.val.n_bytes, only_whole),
        summary=f"{len(train):,} tokens to train on, {len(val):,} held out",
        guess=f"the most frequent token is right for {np.mean(val == most_frequent):.2%} of the held out",
    )


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
