"""Rows for retro.py: tokens with the neighbours of each chunk, of random facts or of any text.

    facts            "kazemo is 4821": a key of six letters and a value of four digits, drawn at random. Each
                     chunk of a row but the last ends with a key, and the next begins with its value; only
                     the values are targets. No held-out fact is in a row of the training part. The text that
                     is searched holds all facts, in another order
    any other        the text of --data. A row is T tokens. The neighbours of its chunks are found in the
                     training part, outside of their own documents; those of held-out text too

Neighbours depend on the text alone, so those of a text are found once and kept in --cache, with the index.

Shapes: T tokens of a row, U = T / m chunks of m tokens, k neighbours of r = 2 m tokens.
"""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.rows import Dataset, Row, Rows, stack
from data.text import HeldOut
from data.tokenizer import get_tokenizer
from engine import contract, parallel
from formats.atomic import damage, replace_directory, write_checksums
from language.retrieval import Index, find_all, own_chunks

N_FACTS, N_HELD_OUT, FACTS_SEED = 20_000, 2_000, 0
KEY, VALUE = 6, 4  # letters of a key, digits of a value
SHOWN = 64  # rows of held-out facts of which an evaluation measures the accuracy


class WithNeighbours(Rows):
    """Rows {"tokens": (T + 1,), "targets": (T,), "neighbours": (U, k, 2 m)} of other rows."""

    def __init__(self, rows: Rows, index: Index, found: np.ndarray):
        """Add neighbours to rows, which have "tokens" (T + 1,) and perhaps "targets" (T,).

        found: int32 (chunks, k), the neighbours of the chunks of all rows, one row after the other.
        """
        super().__init__(rows)
        self.index, self.found = index, found
        self.n_targets, self.n_bytes = rows.n_targets, rows.n_bytes
        self.per_row = len(rows[0]["tokens"][:-1]) // index.m  # U; the last row may have fewer

    def __getitem__(self, i: int) -> Row:
        i %= len(self.rows)
        row, first = self.rows[i], i * self.per_row
        tokens = row["tokens"]
        U = (len(tokens) - 1) // self.index.m
        neighbours = self.index.read(np.asarray(self.found[first : first + U], np.int64))
        return {"tokens": tokens, "targets": row.get("targets", tokens[1:]), "neighbours": neighbours}


def batch_of(rows: list[Row]) -> dict[str, Tensor]:
    """Return "tokens" and "targets" (B, T) and "neighbours" (B, U, k, r), all int64."""
    batch = stack(rows)
    return batch | {"tokens": batch["tokens"][:, :-1]}


def load_data(args: Namespace, config: Any) -> Dataset:
    """Return the rows of facts or of text. Raises ValueError for a --seq-len that is not whole chunks."""
    if args.document_mask:
        raise ValueError("--document-mask: neighbours belong to chunks of whole rows; leave it out")
    m = config.chunk
    if args.seq_len % m:
        raise ValueError(f"--seq-len {args.seq_len}: expected a multiple of {m}, the tokens of a chunk")
    if args.data == "facts":
        return load_facts(args.seq_len, m, config.n_neighbours)
    return load_text(args, m, config.n_neighbours)


# --- facts


def text_of(facts: list[tuple[str, str]], m: int) -> str:
    """Return a text with the line "KEY is VALUE." for each of the facts, of m characters with its line break.

    It begins with the end of a line, "----.", so that each chunk of m characters ends with "KEY is ", and the
    next one begins with the value.
    """
    answers = ["-" * VALUE, *(value for _, value in facts)]
    asked = [f"{key} is ".rjust(m - VALUE - 2) for key, _ in facts]
    return "".join(f"{answer}.\n{key}" for answer, key in zip(answers, [*asked, ""], strict=True))


def draw_facts(n: int) -> list[tuple[str, str]]:
    """Return n facts (key, value) with different keys, the same at each call."""
    rng = np.random.default_rng(FACTS_SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    keys = dict.fromkeys("".join(word) for word in rng.choice(letters, (n + n // 100 + 9, KEY)))
    return [(key, f"{rng.integers(10**VALUE):0{VALUE}}") for key in list(keys)[:n]]


class Facts(Rows):
    """Rows of U chunks of m bytes: each chunk ends with "KEY is ", and the next begins with the value. The
    targets are the digits of the values, except of that of the last key, which would be in the next row."""

    def __init__(self, facts: list[tuple[str, str]], seq_len: int, m: int):
        """Shuffle the facts, and put U = seq_len / m of them into each row."""
        rng, U = np.random.default_rng(FACTS_SEED), seq_len // m
        order = rng.permutation(len(facts))
        super().__init__(
            [
                self.row([facts[i] for i in chosen], m)
                for chosen in order[: len(facts) // U * U].reshape(-1, U)
            ]
        )

    @staticmethod
    def row(facts: list[tuple[str, str]], m: int) -> Row:
        """Return "tokens" (T + 1,) and "targets" (T,), int64; -100 where nothing is predicted."""
        text = text_of(facts, m)[: len(facts) * m]
        tokens = np.frombuffer((text + facts[-1][1][0]).encode(), np.uint8).astype(np.int64)
        place = np.arange(len(tokens) - 1)  # of the token that predicts
        is_value = (place >= m - 1) & ((place + 1) % m < VALUE) & (place + 1 < len(text))
        return {"tokens": tokens, "targets": np.where(is_value, tokens[1:], -100)}


def load_facts(seq_len: int, m: int, k: int) -> Dataset:
    """Return rows of facts with their neighbours. Raises ValueError for chunks too short for a fact."""
    least = KEY + VALUE + 6
    if m < least:
        raise ValueError(f"chunk {m}: expected at least {least} tokens, for a fact; or name a text by --data")
    facts, tokenizer = draw_facts(N_FACTS + N_HELD_OUT), get_tokenizer("bytes")
    # Without its first chunk, whose "----" would match the first chunk of every row.
    text = text_of([("a" * KEY, "0" * VALUE), *facts], m)[m:]
    index = Index.build(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), m, tokenizer.eot_id)
    parts = {}
    for name, some in (("train", facts[:N_FACTS]), ("val", facts[N_FACTS:])):
        rows = Facts(some, seq_len, m)
        tokens = np.concatenate([rows[i]["tokens"][:-1] for i in range(len(rows))])
        nothing = np.zeros((len(tokens) // m, 2), np.int64)  # nothing is excluded
        parts[name] = WithNeighbours(rows, index, find_all(index, tokens, k, nothing, f"neighbours, {name}"))
    return Dataset(
        hashlib.sha256(f"{text} {seq_len} {m} {k}".encode()).hexdigest(),
        tokenizer,
        **parts,
        summary=f"{N_FACTS:,} facts to learn from, {N_HELD_OUT:,} others are asked; all can be looked up",
        guess=f"a value guessed at random is right for {10.0 ** (2 - VALUE):g} %",
    )


# --- text


def load_text(args: Namespace, m: int, k: int) -> Dataset:
    """Return rows of T = --seq-len tokens of the text in --data, with the neighbours of their chunks.

    Raises ValueError if a part of the text has no more than T tokens, or as `prepare` does.
    """
    corpus = contract.load_corpus(args)
    splits = {"train": corpus.train, "val": corpus.val}
    for name, split in splits.items():
        if len(split.tokens) <= args.seq_len:
            raise ValueError(
                f"--seq-len {args.seq_len}: {name} has {len(split.tokens)} tokens; give more text"
            )
    home = args.cache / f"{corpus.name}-chunks-{m}-{k}"
    with parallel.one_per_machine_first():
        if damage(home) is not None:
            prepare(home, corpus, m, k)
    index = Index.open(home.with_name(f"{home.name}-index"))
    parts = {}
    for name, split in splits.items():
        rows = HeldOut(split.tokens, args.seq_len, split.n_bytes, only_whole=name == "train")
        parts[name] = WithNeighbours(rows, index, np.load(home / f"{name}.npy", mmap_mode="r"))
    return Dataset(
        f"{corpus.name} {m} {k}",
        corpus.tokenizer,
        **parts,
        text=corpus.name.partition("-")[0],
        summary=f"{len(index):,} chunks of {m} tokens to retrieve from",
    )


def prepare(home: Path, corpus, m: int, k: int) -> None:
    """Write the index of the training part, and to `home` the neighbours of all chunks of both parts.

    Each of the two directories is written all or nothing. Raises ValueError for a training part of one
    document, since neighbours come from other documents.
    """
    train, val, eot_id = corpus.train.tokens, corpus.val.tokens, corpus.tokenizer.eot_id
    if corpus.train.n_documents < 2:
        raise ValueError("--data: one document; neighbours come from other documents, so give several")
    index, own = Index.build(np.asarray(train), m, eot_id), own_chunks(train, m, eot_id)
    # The held-out part may begin within the last document of the training part, which these chunks exclude.
    first = np.flatnonzero(np.asarray(val[1:]) == eot_id)
    n_first = -(-(1 + first[0]) // m) if len(first) else len(val) // m
    of_val = np.zeros((len(val) // m, 2), np.int64)
    of_val[:n_first] = own[-1]
    found = {
        "train": find_all(index, train, k, own, "neighbours"),
        "val": find_all(index, val, k, of_val, "neighbours of held-out text"),
    }
    index.save(home.with_name(f"{home.name}-index"))
    with replace_directory(home) as new:
        for name, chunks in found.items():
            np.save(new / f"{name}.npy", chunks)
        write_checksums(new)


# --- what is shown


@torch.no_grad()
def accuracy(model, batch: dict[str, Tensor], neighbours: Tensor | None) -> float:
    """Return the share of the values in a batch of facts whose digits all have the largest logits, each given
    the right digits before it. neighbours: (B, U, k, r), or None for a pass without retrieval."""
    right = model(batch["tokens"], neighbours=neighbours).argmax(-1) == batch["targets"]
    asked = batch["targets"] >= 0
    return right[asked].view(-1, VALUE).all(-1).double().mean().item()


def show(model, dataset: Dataset, out: Path | None = None) -> str:
    """Return lines that show what a model does with held-out rows. Nothing is written to out.

    Of facts: the shares of values that are right with their neighbours, without, and with those of other
    questions. Of a text: the continuation of the first half of a row, and a neighbour.
    """
    val, device = dataset.val, next(model.parameters()).device
    n = min(SHOWN, len(val)) if isinstance(val.rows, Facts) else 1
    batch = {name: t.to(device) for name, t in batch_of([val[i] for i in range(n)]).items()}
    neighbours = batch["neighbours"]
    if isinstance(val.rows, Facts):
        of_others = neighbours.roll(1, 0)
        shares = [accuracy(model, batch, given) for given in (neighbours, None, of_others)]
        names = ("with their neighbours", "without", "with those of other questions")
        found = ", ".join(f"{share:.1%} {name}" for share, name in zip(shares, names, strict=True))
        return f"{found}, of {int((batch['targets'] >= 0).sum()) // VALUE} facts never seen in training"

    # Continue the first half of a row, and show a neighbour of its last chunk.
    decode, prompt = dataset.tokenizer.decode, batch["tokens"][0][: batch["tokens"].shape[1] // 2].tolist()
    before, model.index = model.index, val.index
    generator = torch.Generator(device).manual_seed(0)
    new = model.generate([prompt], len(prompt), temperature=0.8, top_p=0.95, generator=generator)[0]
    model.index = before
    text, u = f"{decode(prompt)}|||{decode(new)}", len(prompt) // val.index.m - 1
    return f"{text}\n\n--- a neighbour\n{decode(neighbours[0, u, 0].tolist())}" if u >= 0 else text
