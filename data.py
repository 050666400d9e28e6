"""Data: from text to training batches.

    corpus -> documents -> tokens, each document led by <|endoftext|> -> shards on disk -> windows of T + 1
    tokens

A corpus is the Python standard library's own source ("stdlib", on every machine, no download), a file, a
folder, a glob, a URL or a public corpus known by name. Its tokens are kept as one memory-mapped shard per
split with a manifest of hashes; a shard that is stale or damaged is named and rebuilt. The last documents
are held out for validation.

The loader is a function of (seed, sample number) alone: nothing to save but the step, nothing repeated or
skipped on resuming, and the same sequence for any number of processes.

    python data.py [CORPUS] [--tokenizer bpe:4096]      build the shards, print what is in them
"""

import argparse
import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import damage, replace_directory, sha256, write_checksums
from tokenizer import Tokenizer, get_tokenizer, train_bpe

SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # each also with .gz
PUBLIC = {  # name: (URL, SHA-256 of the file)
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
HELD_OUT = 1 / 20  # share of the text that is held out for validation ...
HELD_OUT_BYTES = (
    4 << 20
)  # ... and the most of it: beyond this, longer evaluation buys no precision worth its time
MIN_BYTES = 100  # of text: below this there is nothing to hold out
BPE_BYTES = 64 << 20  # a tokenizer learns from at most about this much text, spread evenly over the corpus
BATCH_BYTES = 4 << 20  # text tokenised at a time

Files = list[tuple[str, Path]]  # what a file is called in the corpus, and where it is


def stdlib_files() -> Files:
    """The standard library's source files by module name, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        ours = parts[0] in sys.stdlib_module_names
        generated = parts[0] in ("encodings", "pydoc_data") or parts == ("html", "entities")
        if ours and not generated and not {"test", "tests", "idle_test"} & set(parts):
            files.append((".".join(parts), path))
    return sorted(files)


def find_files(data: str, cache: Path) -> Files:
    """The files of a corpus, in a fixed order. Raises ValueError where there are none, naming what was looked for."""
    if data == "stdlib":
        files = stdlib_files()
        if not files:
            raise ValueError(
                "--data stdlib: this Python has no source files; name a file or folder of text instead"
            )
        return files
    if data in PUBLIC:
        return [(data, download(*PUBLIC[data], cache))]
    if data.startswith(("http://", "https://")):
        return [(data, download(data, None, cache))]
    path = Path(data)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.name.removesuffix(".gz").endswith(SUFFIXES) and p.is_file()]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise ValueError(f"--data {data}: no {', '.join(SUFFIXES)} file in this directory (nor with .gz)")
        return sorted((p.relative_to(path).as_posix(), p) for p in found)
    if path.is_file():
        return [(path.name, path)]
    matches = sorted(Path(name) for name in glob.glob(data, recursive=True) if Path(name).is_file())
    if not matches:
        known = ", ".join(["stdlib", *PUBLIC])
        raise ValueError(
            f"--data {data}: no such file or folder, no match as a glob, not a corpus ({known}) or URL"
        )
    return [(p.as_posix(), p) for p in matches]


def download(url: str, checksum: str | None, cache: Path) -> Path:
    """Fetch url once into the cache, checking its SHA-256 if one is known."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rstrip('/').split('/')[-1]}"
    path = cache / "downloads" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(name + ".partial")
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
                size = int(response.headers.get("Content-Length", 0)) or None
                with tqdm(total=size, unit="B", unit_scale=True, desc="download") as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
        except (OSError, urllib.error.URLError) as error:
            raise ValueError(f"--data {url}: cannot be downloaded ({error})") from None
        os.replace(partial, path)
    if checksum is not None and sha256(path) != checksum:
        path.unlink()
        raise ValueError(f"--data {url}: the download's SHA-256 is not {checksum}; it was removed, try again")
    return path


def documents(files: Files, on_bad_text: Callable[[str], None]) -> Iterator[str]:
    """The texts of the files: one per file, or per line of .jsonl ({"text": ...}); empty ones are left out.

    on_bad_text is told the file and the byte offset of what is not text, which is then left out; it may
    raise.
    """
    for name, path in files:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
        try:
            with opened as file:
                if not path.name.removesuffix(".gz").endswith(".jsonl"):
                    text = decode(file.read(), name, 0, on_bad_text)
                    if text:
                        yield text
                    continue
                offset = 0
                for line in file:
                    text = decode_json(line, name, offset, on_bad_text) if line.strip() else None
                    if text:
                        yield text
                    offset += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None


def decode(raw: bytes, name: str, offset: int, on_bad_text: Callable[[str], None]) -> str | None:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        on_bad_text(f"{name}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8")
        return None
    if "\0" in text:
        on_bad_text(f"{name}: byte {offset + raw.index(0)} is NUL: binary data, not text")
        return None
    return text.removeprefix("\ufeff")


def decode_json(line: bytes, name: str, offset: int, on_bad_text: Callable[[str], None]) -> str | None:
    text = decode(line, name, offset, on_bad_text)
    if text is None:
        return None
    try:
        text = json.loads(text)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        on_bad_text(f'{name}: the line at byte {offset} is not an object with a "text"')
        return None
    return text


@dataclass
class Split:
    """tokens: memory-mapped uint16 or uint32 (n,). n_bytes: of the text they stand for."""

    tokens: np.ndarray
    n_bytes: int
    n_documents: int


@dataclass
class Dataset:
    """name: of the shards, made of the corpus's and the tokenizer's hashes."""

    name: str
    tokenizer: Tokenizer
    train: Split
    val: Split


def prepare(data: str, tokenizer: str, cache: Path, *, bad_text: str = "refuse", say=print) -> Dataset:
    """Find, check, tokenise and memory-map a corpus; what is in the cache and whole is not made again.

    data, tokenizer: as for --data and --tokenizer. bad_text: "refuse" raises ValueError at the first text
    that is not UTF-8, "skip" leaves it out and says so. Raises ValueError for everything a user can mend.
    """
    n_tokens = bpe_size(tokenizer)
    fixed = get_tokenizer(tokenizer) if n_tokens is None else None

    def on_bad_text(problem: str) -> None:
        if bad_text == "refuse":
            raise ValueError(
                f"--data {data}: {problem}; mend it, or pass --bad-text skip to leave such text out"
            )
        say(f"skipped: {problem}")

    def silently(problem: str) -> None:  # said once, in the first pass
        pass

    # First pass: is all of it text, how much is it, and is it what the shards were made from?
    files = find_files(data, cache)
    digest, sizes = hashlib.sha256(), []
    for text in documents(files, on_bad_text):
        raw = text.encode()
        digest.update(f"{len(raw)}:".encode() + raw)
        sizes.append(len(raw))
    if sum(sizes) < MIN_BYTES:
        raise ValueError(
            f"--data {data}: {sum(sizes)} bytes of text; expected at least {MIN_BYTES} to learn from"
        )
    corpus = digest.hexdigest()
    cut = held_out_from(sizes)

    def split(name: str) -> Iterator[str]:
        start = 0
        for size, text in zip(sizes, documents(files, silently), strict=True):
            in_train, in_val = divide(text, start, size, cut)
            start += size
            part = in_train if name == "train" else in_val
            if part:
                yield part

    if fixed is not None:
        tok = fixed
    else:
        home = cache / f"{corpus[:16]}-bpe-{n_tokens}"
        tok = learned_tokenizer(home, n_tokens, lambda: split("train"), sum(sizes), say)
    home = cache / f"{corpus[:16]}-{tok.fingerprint[:16]}"
    made_from = {"corpus_sha256": corpus, "tokenizer_sha256": tok.fingerprint, "held_out_from_byte": cut}
    problem = check_shards(home, made_from)
    if problem is not None:
        if home.exists():
            say(f"{problem}: built anew")
        build_shards(home, made_from, tok, split)
    manifest = json.loads((home / "manifest.json").read_text())
    return Dataset(home.name, tok, *(open_shard(home, manifest, name) for name in ("train", "val")))


def bpe_size(tokenizer: str) -> int | None:
    """N of "bpe:N", None for another tokenizer."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise ValueError(
            f"--tokenizer {tokenizer}: expected bpe:N, N at least 257 (256 bytes and the end of text)"
        )
    return int(size)


def held_out_from(sizes: list[int]) -> int:
    """The byte of the corpus where validation begins: at a document, or inside one if documents are too large."""
    total = sum(sizes)
    wanted = min(int(total * HELD_OUT), HELD_OUT_BYTES)
    start = total
    for size in reversed(sizes):
        start -= size
        if total - start >= wanted:
            break
    return start if total - start <= 2 * wanted else total - wanted


def divide(text: str, start: int, size: int, cut: int) -> tuple[str, str]:
    """The parts of a document before and after the cut; one that the cut falls into is divided at a line break."""
    if start + size <= cut:
        return text, ""
    if start >= cut:
        return "", text
    raw = text.encode()
    at = raw.find(b"\n", cut - start) + 1
    if at == 0 or at == size:  # no line break to use: the next whole character
        at = cut - start
        while at < size and raw[at] & 0xC0 == 0x80:
            at += 1
    return raw[:at].decode(), raw[at:].decode()


def learned_tokenizer(
    home: Path, size: int, texts: Callable[[], Iterator[str]], n_bytes: int, say: Callable[[str], None]
) -> Tokenizer:
    """The byte-pair encoding of `size` tokens learned from texts, which make n_bytes, or an earlier one in home."""
    checksum = home / "fingerprint"
    if checksum.is_file():
        try:
            tokenizer = Tokenizer.load(home)
        except ValueError:
            tokenizer = None
        if tokenizer is not None and tokenizer.fingerprint == checksum.read_text():
            return tokenizer
        say(f"{home / 'tokenizer.json'}: missing or damaged: learned anew")
    every = -(-n_bytes // BPE_BYTES)
    tokenizer = train_bpe((text for i, text in enumerate(texts()) if i % every == 0), size, progress=True)
    with replace_directory(home) as new:
        tokenizer.save(new)
        (new / checksum.name).write_text(tokenizer.fingerprint)
    return tokenizer


def build_shards(
    home: Path, made_from: dict, tokenizer: Tokenizer, split: Callable[[str], Iterator[str]]
) -> None:
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    manifest = {**made_from, "dtype": np.dtype(dtype).name}
    with replace_directory(home) as new:
        for name in ("train", "val"):
            counts = {"tokens": 0, "bytes": 0, "documents": 0}
            bar = tqdm(desc=f"tokenise {name}", unit="B", unit_scale=True)
            with open(new / f"{name}.bin", "wb") as shard, bar:
                for batch in batches(split(name)):
                    for text, ids in zip(
                        batch, tokenizer.encode_batch(batch, os.cpu_count() or 1), strict=True
                    ):
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
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_shards(home: Path, made_from: dict) -> str | None:
    """What is wrong with the shards in home, or None."""
    problem = damage(home)
    if problem is None:
        manifest = json.loads((home / "manifest.json").read_text())
        if {key: manifest.get(key) for key in made_from} != made_from:
            return f"{home} was made from another corpus or tokenizer"
    return problem


def open_shard(home: Path, manifest: dict, name: str) -> Split:
    tokens = np.memmap(home / f"{name}.bin", dtype=manifest["dtype"], mode="r")
    return Split(tokens, manifest[name]["bytes"], manifest[name]["documents"])


class Loader:
    """Windows of T + 1 tokens in a shuffled order that visits every token once an epoch.

    Think of the tokens as a circle of n, tiled over and over by windows of T: window g predicts the T
    tokens that follow token g T mod n. Epoch e is the windows that begin in the e-th turn, in an order
    drawn from (seed, e). No window comes twice, no token is left out at the end, and the seams fall
    elsewhere in each epoch.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int):
        if len(tokens) <= seq_len:
            raise ValueError(
                f"--seq-len {seq_len}: the training text has only {len(tokens)} tokens; give more text"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def first_window(self, epoch: int) -> int:
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
    """All tokens but the first as targets, once each and in order: (batch_size, T + 1), the last ones smaller."""
    n_whole = (len(tokens) - 1) // seq_len
    for first in range(0, n_whole, batch_size):
        starts = range(first, min(first + batch_size, n_whole))
        rows = [np.asarray(tokens[i * seq_len : (i + 1) * seq_len + 1], np.int64) for i in starts]
        yield torch.from_numpy(np.stack(rows))
    rest = np.asarray(tokens[n_whole * seq_len :], np.int64)
    if len(rest) > 1:
        yield torch.from_numpy(rest)[None]


def cu_seqlens(tokens: Tensor, eot_id: int) -> Tensor:
    """Where documents begin in rows (B, T) laid end to end, and the end: int32 (n + 1,) for
    `kernels.attention`.

    A row and an end-of-text token each begin a document; run the rows as one, `tokens.view(1, -1)`.
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
        per_token = split.n_bytes / len(split.tokens)
        print(
            f"{name:5} {split.n_documents:,} documents, {split.n_bytes:,} bytes, {len(split.tokens):,} tokens, ",
            end="",
        )
        print(f"{per_token:.2f} bytes per token")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
