"""Pairs of texts, a source and its target: what a translator or a summariser learns from.

    Ein Hund schläft.<TAB>A dog sleeps.                             a line of a .tsv file, without a heading
    {"source": "Ein Hund schläft.", "target": "A dog sleeps."}      a line of a .jsonl file

or the same two fields in any other file of records (data/records.py), such as the columns of a .csv.

`read` reads pairs and holds some out, `as_dataset` makes rows of tokens, `make_batch` pads them.

Shapes: B pairs, S tokens of the longest source, T of the longest target.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from data.records import OnBad, converted, decode, is_valid, open_utf8, refuse, suffix_of
from data.rows import Dataset, Row, Rows, frequency_loss
from data.text import bad_texts

EXPECTED = 'expected a source, a tab and a target; or a record {"source": ..., "target": ...}'
MOST_HELD_OUT = 1000  # pairs


class Pair(NamedTuple):
    source: str
    target: str


def read_pairs(path: Path, on_bad: OnBad = refuse) -> list[Pair]:
    """Return the pairs in a file, without the spaces around their texts, which may be empty.

    on_bad is called with a message for a line or a record that is no pair, and may raise an error; otherwise
    the pair is left out. Raises ValueError for a file that cannot be read, or without pairs.
    """
    if suffix_of(path) == ".tsv":
        pairs = tab_separated(path, on_bad)
    else:
        pairs = converted(path, "pairs of texts", EXPECTED, as_pair, on_bad)
    if not pairs:
        raise ValueError(f"{path}: has no pairs of texts; {EXPECTED}")
    return [Pair(source.strip(), target.strip()) for source, target in pairs]


def tab_separated(path: Path, on_bad: OnBad) -> list[Pair]:
    """Return the pairs on the lines of a .tsv file, without its empty lines. on_bad: as in `read_pairs`."""
    pairs, offset = [], 0
    with open_utf8(path, str(path), on_bad) as file:
        for number, raw in enumerate(file, 1):
            text = decode(raw, str(path), offset, on_bad)
            offset += len(raw)
            if not (text or "").strip():
                continue
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) == 2:
                pairs.append(Pair(*cells))
            else:
                on_bad(f"{path}, line {number}: {len(cells)} cells between tabs; {EXPECTED}")
    return pairs


def as_pair(record: object) -> Pair:
    """Return the pair in a record. Raises ValueError if there is none."""
    texts = [record.get(field) for field in Pair._fields] if isinstance(record, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{record!r:.80}: {EXPECTED}")
    for field, text in zip(Pair._fields, texts, strict=True):
        is_valid(text, field, refuse)
    return Pair(*texts)


def read(
    data: str, val: str | None, bad_text: str, notify: Callable[[str], None]
) -> tuple[list[Pair], list[Pair], Counter]:
    """Return the pairs to train on, those held out, and how many pairs were left out, by reason.

    val: the file of pairs to hold out; None: those of a twentieth of the sources in data, at most
    MOST_HELD_OUT, the same for every seed. No source that is held out is in a pair to train on. Raises
    ValueError as `read_pairs` does, and where nothing is left to train on or to hold out.
    """
    counts: Counter = Counter()

    def read_file(name: str, flag: str) -> list[Pair]:
        with bad_texts(f"{flag} {name}", bad_text, notify) as on_bad:
            found = read_pairs(Path(name), on_bad)
        full = [pair for pair in found if pair.source and pair.target]
        counts["empty"] += len(found) - len(full)
        counts["duplicates"] += len(full) - len(set(full))
        return list(dict.fromkeys(full))

    train, held_out = read_file(data, "--data"), [] if val is None else read_file(val, "--val")
    if val is None:
        sources = list(dict.fromkeys(pair.source for pair in train))
        n = min(MOST_HELD_OUT, max(1, len(sources) // 20))
        chosen = {sources[i] for i in np.random.default_rng(0).permutation(len(sources))[:n]}
        held_out = [pair for pair in train if pair.source in chosen]
    chosen = {pair.source for pair in held_out}
    kept = [pair for pair in train if pair.source not in chosen]
    counts["with a source that is held out"] += len(train) - len(kept) - (len(held_out) if val is None else 0)
    if not kept or not held_out:
        raise ValueError(f"--data {data}: {len(kept)} pairs to train on, {len(held_out)} held out; give more")
    return kept, held_out, counts


def as_dataset(
    train: list[Pair],
    held_out: list[Pair],
    tokenizer,
    seq_len: int,
    counts: Counter | None = None,
    cut: bool = False,
    special: frozenset[str] = frozenset(),
) -> Dataset:
    """Return rows {"source": (n,), "target": (n,)}, int32: tokens, an end token, and -1 as padding.

    A pair with more than seq_len tokens on one side is dropped; with `cut` a longer source is cut instead.
    The summary has the number of these pairs, beside `counts`, those of `read`. special: names of special
    tokens that are read as such in the texts. Raises ValueError if all pairs of a part are dropped.
    """
    digest = hashlib.sha256(f"{tokenizer.fingerprint} ".encode())
    sides, targets, counts = [], [], Counter(counts)
    for name, pairs in (("to train on", train), ("held out", held_out)):
        rows = [[[*tokenizer.encode(text, special), tokenizer.eot_id] for text in pair] for pair in pairs]
        n_cut = sum(len(source) > seq_len for source, _ in rows) if cut else 0
        if n_cut:
            counts[f"with a source cut to {seq_len} tokens"] += n_cut
            # The last token of a source is its end token, which stays.
            rows = [[[*source[:-1][: seq_len - 1], source[-1]], target] for source, target in rows]
        short = [row for row in rows if max(map(len, row)) <= seq_len]
        if not short:
            raise ValueError(f"--seq-len {seq_len}: too short for all {len(rows)} pairs {name}; give more")
        counts[f"longer than {seq_len} tokens"] += len(rows) - len(short)
        counts[name] += len(short)
        n = max(len(side) for row in short for side in row)
        table = np.full((len(short), 2, n), -1, np.int32)
        for cells, row in zip(table, short, strict=True):
            for cell, side in zip(cells, row, strict=True):
                cell[: len(side)] = side
        digest.update(table.tobytes() + name.encode())
        targets.append(np.concatenate([target for _, target in short]))
        sides.append(Rows([{"source": source, "target": target} for source, target in table]))
    line = ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items()) if n)
    occurring = np.bincount(targets[0], minlength=tokenizer.n_vocab)
    return Dataset(
        f"pairs-{digest.hexdigest()[:16]}",
        tokenizer,
        *sides,
        summary=f"pairs of texts: {line}",
        guess=f"by frequency a token of a target has {frequency_loss(occurring, targets[1]):.2f} nats",
    )


def sides_of(row: Row) -> tuple[list[int], list[int]]:
    """Return the tokens of a row's source and target, with their end tokens."""
    return tuple(row[name][row[name] >= 0].tolist() for name in Pair._fields)


def make_batch(rows: list[Row], config, generator: Generator, tokenizer) -> dict[str, Tensor]:
    """Return a batch of B pairs: "tokens" (B, S), the sources, padded with pad_id; "targets" (B, T), padded
    with -100; and where the sources differ in length their "lengths" (B,)."""
    sources, targets = zip(*map(sides_of, rows), strict=True)
    lengths = torch.tensor([len(source) for source in sources])
    tokens, answers = (
        torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, side)), batch_first=True, padding_value=value)
        for side, value in ((sources, tokenizer.pad_id), (targets, -100))
    )
    batch = {"tokens": tokens, "targets": answers}
    return batch if lengths.min() == lengths.max() else batch | {"lengths": lengths}
