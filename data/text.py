"""Text: from documents to rows of tokens.

    documents -> tokens, each document led by <|endoftext|> -> shards on disk -> windows of T + 1 tokens

data/corpus.py finds the documents. The last of them, a twentieth of the text, are *held out*, unless a corpus
of its own is named for that: neither the model nor a learned tokenizer sees them in training, so the loss on
them is the loss on new text. The tokens of the two splits, train and val, are kept as memory-mapped *shards*
(data/shards.py), of which each run reads its rows.

    python -m data.text [CORPUS] [--tokenizer bpe:4096]      build the shards, print what is in them

Shapes: B batch, T tokens of a row, n tokens of the text.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from data.corpus import Files, documents, find_files
from data.rows import Dataset, Row, Rows, frequency_loss
from data.shards import Corpus, build_shards, check_shards, open_shards
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from formats import command
from formats.atomic import replace_directory

HELD_OUT = 1 / 20  # share of the text that is held out for validation
HELD_OUT_BYTES = 4 << 20  # bytes held out at most: more would cost time and hardly add precision
MIN_HELD_OUT = 20  # bytes of text: a loss on less says nothing
BPE_BYTES = 64 << 20  # a tokenizer learns from about this much text: every k-th document of a larger corpus
MOST_NAMED = 5  # texts and files that are skipped are named up to this number, and then counted


def prepare(
    data: str,
    tokenizer: str,
    cache: Path,
    *,
    val: str | None = None,
    text_field: str = "text",
    bad_text: str = "refuse",
    notify: Callable[[str], None] = print,
) -> Corpus:
    """Find, check, tokenise and memory-map a corpus. Undamaged shards in the cache are used again.

    data, tokenizer: as for --data and --tokenizer. val: the corpus to hold out, None for the last part of
    data. text_field: the field that holds the text in files of records. bad_text: "refuse" raises ValueError
    at the first text that is not UTF-8, "skip" leaves it out. notify is called with a line for what is left
    out and for each shard built anew. Raises ValueError for everything a user can mend.
    """
    n_tokens = bpe_size(tokenizer)
    # A wrong name of a tokenizer is an error before any work begins.
    tok = get_tokenizer(tokenizer) if n_tokens is None else None
    with only_one_at(cache, notify):
        # The first pass finds the corpus's hash, the sizes of its documents, and text that is not UTF-8.
        files = find_files(data, cache, notify)
        with bad_texts(f"--data {data}", bad_text, notify) as on_bad_text:
            corpus_sha256, sizes = survey(documents(files, on_bad_text, text_field))
        if val is None:
            cut = held_out_from(sizes)
        else:
            held_out = find_held_out(val, cache, files, notify)
            with bad_texts(f"--val {val}", bad_text, notify) as on_bad_text:
                val_sha256, val_sizes = survey(documents(held_out, on_bad_text, text_field))
            if val_sha256 == corpus_sha256:
                raise ValueError(f"--val {val}: the same text as --data {data}; expected text of its own")
            files, sizes, cut = files + held_out, sizes + val_sizes, sum(sizes)
            corpus_sha256 = hashlib.sha256(f"{corpus_sha256} {val_sha256}".encode()).hexdigest()
        check_sizes(data, val, cut, sum(sizes))
        split = partial(documents_of, files, sizes, cut, text_field)

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
        if cut not in accumulate(sizes):  # a document is divided, by the rule of `divide`
            made_from["nearest_line_break"] = near(sum(sizes) - cut)
        problem = check_shards(home, made_from)
        if problem is not None:
            if home.exists():
                notify(f"{problem}: built anew")
            build_shards(home, made_from, tok, split, {"train": cut, "val": sum(sizes) - cut})
        return open_shards(home, tok)


@contextmanager
def bad_texts(what: str, bad_text: str, notify: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Yield the function to call with each text that is not UTF-8: it refuses the text, or counts it.

    what: the flag and its value, for the error.
    """
    n_bad = 0

    def on_bad_text(problem: str) -> None:
        nonlocal n_bad
        if bad_text == "refuse":
            raise ValueError(f"{what}: {problem}; mend it, or pass --bad-text skip to leave such text out")
        n_bad += 1
        if n_bad <= MOST_NAMED:
            notify(f"skipped: {problem}")

    yield on_bad_text
    if n_bad > MOST_NAMED:
        notify(f"skipped: {n_bad:,} texts in all")


def find_held_out(val: str, cache: Path, files: Files, notify: Callable[[str], None]) -> Files:
    """Return the files of --val. Raises ValueError if one of them is also among those of --data."""
    held_out = find_files(val, cache, notify, flag="--val")
    trained_on = {os.path.realpath(path) for _, path in files}
    for _, path in held_out:
        if os.path.realpath(path) in trained_on:
            raise ValueError(f"--val {val}: {path} is also part of --data; expected text of its own")
    return held_out


def check_sizes(data: str, val: str | None, n_train: int, total: int) -> None:
    """Raise ValueError if there is too little text, in bytes, to learn from or to hold out."""
    n_val = total - n_train
    if n_val >= MIN_HELD_OUT and n_train >= MIN_HELD_OUT:
        return
    if val is not None and n_train >= MIN_HELD_OUT:
        raise ValueError(f"--val {val}: {n_val} bytes of text; expected at least {MIN_HELD_OUT}")
    if val is not None:
        raise ValueError(f"--data {data}: {n_train} bytes of text; expected at least {MIN_HELD_OUT}")
    least = math.ceil(MIN_HELD_OUT / HELD_OUT)
    raise ValueError(
        f"--data {data}: {total} bytes of text; expected at least {least}, of which a twentieth is held out; "
        "give more text, or name held-out text by --val"
    )


def survey(texts: Iterable[str]) -> tuple[str, list[int]]:
    """Return the SHA-256 of the documents of a corpus, and the size in bytes of each of them."""
    digest, sizes = hashlib.sha256(), []
    for text in texts:
        raw = text.encode()
        digest.update(f"{len(raw)}:".encode() + raw)  # with the length, "ab", "c" differs from "a", "bc"
        sizes.append(len(raw))
    return digest.hexdigest(), sizes


def documents_of(files: Files, sizes: list[int], cut: int, text_field: str, name: str) -> Iterator[str]:
    """Yield the documents of the part called name, "train" or "val", which meet at byte `cut`.

    sizes: of all documents, in bytes. The document at the cut is divided between the two.
    """
    start, tolerance = 0, near(sum(sizes) - cut)
    # Text that is not UTF-8 has been reported by the first pass.
    for size, text in zip(sizes, documents(files, lambda problem: None, text_field), strict=True):
        in_train, in_val = divide(text, start, size, cut, tolerance)
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
    """Hold a lock on the cache: of two runs started together, one prepares the data and the other waits."""
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
    """Return N of "bpe:N", or None for another tokenizer.

    Raises ValueError if N is below 257 or no whole number.
    """
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


def near(n_held_out: int) -> int:
    """Return how far, in bytes, the cut may move to a line break if n_held_out bytes are to be held out."""
    return n_held_out // 4


def divide(text: str, start: int, size: int, cut: int, tolerance: int) -> tuple[str, str]:
    """Return the parts of a document before and after the cut.

    The cut moves on to the next line break, or back to the last one, or else to the next whole character.
    start, size: of the document in the corpus, in bytes. cut: the byte of the corpus from `held_out_from`.
    tolerance: how far it may move to a line break.
    """
    if start + size <= cut:
        return text, ""
    if start >= cut:
        return "", text
    raw, wanted = text.encode(), cut - start
    after, before = raw.find(b"\n", wanted) + 1, raw.rfind(b"\n", 0, wanted) + 1
    if 0 < after < size and after - wanted <= tolerance:
        at = after
    elif before > 0 and wanted - before <= tolerance:
        at = before
    else:
        at = wanted
        while at < size and raw[at] & 0xC0 == 0x80:  # 10xxxxxx: inside a character of UTF-8
            at += 1
    return raw[:at].decode(), raw[at:].decode()


def learned_tokenizer(
    home: Path, size: int, texts: Callable[[], Iterator[str]], n_bytes: int, notify: Callable[[str], None]
) -> Tokenizer:
    """Return the tokenizer of `size` tokens that is saved in home, or learn it from texts() and save it.

    n_bytes: the size of all the text. notify is called with one line if the saved one is damaged.
    """
    checksum = home / "fingerprint"
    if checksum.is_file():
        try:
            tokenizer = Tokenizer.load(home)
        except ValueError:
            tokenizer = None
        if tokenizer is not None and tokenizer.fingerprint == checksum.read_text(encoding="utf-8"):
            return tokenizer
        notify(f"{home / 'tokenizer.json'}: missing or damaged: learned anew")
    every = math.ceil(n_bytes / BPE_BYTES)
    sample = (text for i, text in enumerate(texts()) if i % every == 0)
    tokenizer = train_bpe(sample, size, progress=True)
    with replace_directory(home) as new:
        tokenizer.save(new)
        (new / checksum.name).write_text(tokenizer.fingerprint, encoding="utf-8")
    return tokenizer


class Windows(Rows):
    """Training text as rows {"tokens": int64 (T + 1,)}, in which every token is a target equally often.

    Think of the n tokens as a circle, tiled over and over by windows of T: window g predicts the T tokens
    that follow token g T mod n. Epoch e consists of the windows that begin in turn e of the circle. Windows
    follow each other without gaps, also across epochs, so no token is left out at the end. Unless T divides
    n, the windows of the next epoch begin at other tokens.

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

    Raises ValueError if the training text is shorter than one row, or with only_whole the held-out text.
    """
    train, val = corpus.train.tokens, corpus.val.tokens
    if only_whole and len(val) <= seq_len:
        raise ValueError(
            f"--seq-len: rows are of {seq_len + 1} tokens, but the held-out text has only {len(val)}; "
            "give more text, or shorter rows"
        )
    counts = np.bincount(train[: 1 << 24], minlength=corpus.tokenizer.n_vocab)
    right, nats = np.mean(val == counts.argmax()), frequency_loss(counts, val)
    return Dataset(
        corpus.name,
        corpus.tokenizer,
        Windows(train, seq_len),
        HeldOut(val, seq_len, corpus.val.n_bytes, only_whole),
        text=corpus.name.partition("-")[0],
        summary=f"{len(train):,} tokens to train on, {len(val):,} held out",
        guess=f"the most frequent token is right for {right:.2%} of the held out; by frequency a token has "
        f"{nats:.2f} nats",
    )


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Tokenise a corpus and print what is in it.")
    add = parser.add_argument
    add("data", nargs="?", default="stdlib", help="corpus, as for train.py --data (default stdlib)")
    add("--val", metavar="WHAT", help="held-out text (default: the last twentieth of the corpus)")
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of .json, .csv ... that holds the text (default %(default)s)",
    )
    add("--tokenizer", type=command.filled, default="bpe:4096", help="as for train.py (default %(default)s)")
    add(
        "--cache",
        type=command.path,
        default=Path("cache"),
        help="folder for the tokens (default %(default)s)",
    )
    add(
        "--bad-text",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with a file or record that is no text (default refuse)",
    )
    args = parser.parse_args(argv)
    options = {"val": args.val, "text_field": args.text_field, "bad_text": args.bad_text}
    dataset = prepare(args.data, args.tokenizer, args.cache, **options)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        n_tokens = len(split.tokens)
        sizes = f"{split.n_documents:,} documents, {split.n_bytes:,} bytes, {n_tokens:,} tokens"
        print(f"{name:5} {sizes}, {split.n_bytes / n_tokens:.2f} bytes per token")


if __name__ == "__main__":
    command.run(main)
