r"""Instruction tuning: a base model learns to answer.

    loss = -mean over the tokens x_t of responses  log p(x_t | x_<t)

A base model continues text: after a question, it may well continue with more questions. Trained a little
further on conversations, it answers, even kinds of question that were not in the training data (FLAN, Wei et
al. 2021; InstructGPT, Ouyang et al. 2022). The objective is that of pretraining, but only the tokens of
responses are targets (Tülu, Wang et al. 2023): the model should give answers, and not ask questions.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A *template* turns it
into tokens (formats/chat_template.py); a prompt must later be made by the same template, so it is also saved
beside the tokenizer as Hugging Face's libraries read it. Conversations are *packed*: put undivided into rows
of T tokens, as many as fit, each attending to itself alone.

    tokens      <|endoftext|> <|user|>\n What is 2 + 2? \n<|assistant|>\n 4 <|endoftext|>     the next one ...
    predicted                                                          4 <|endoftext|>

    python -m posttraining.instruct                    the built-in conversations: how many, and some of them
    python -m posttraining.instruct questions.jsonl    the same for a file, see data/conversations.py
    python train.py --model gpt --init-from runs/gpt/model --task instruct     train all weights
    python train.py --model lora --base runs/gpt/model                         train an adapter, see lora.py

Shapes: B rows of T tokens.
"""

import argparse
import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.conversations import read_conversations
from data.rows import Dataset, Row, Rows, stack
from data.stdlib_questions import stdlib_conversations
from data.text import bad_texts
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import command
from formats.atomic import replace_file
from formats.chat_template import Conversation, end_id, render, save_chat_template

IGNORED = -100  # a target that is not predicted
HELD_OUT = 1 / 10  # share of a file's conversations

STEPS = 1000
LEARNING_RATE = 0.25  # times the default rate, to train all weights; adapters have rates of their own


def as_row(messages: Conversation, tokenizer: Tokenizer) -> Row:
    """Return a conversation of N tokens as arrays (N,).

    "tokens" int64; "in_response" bool, True for tokens that are predicted; "begins" bool, True for the first.
    """
    tokens, in_response = render(messages, tokenizer)
    begins = np.arange(len(tokens)) == 0
    return {"tokens": np.array(tokens, np.int64), "in_response": np.array(in_response), "begins": begins}


def rows_within(
    conversations: list[Conversation], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Row], int]:
    """Return (rows, how many of them are cut): conversations as arrays of `as_row`, cut to seq_len tokens.

    Those without a token of a response in their first seq_len are left out. Raises ValueError if all are.
    """
    rows = [as_row(messages, tokenizer) for messages in conversations]
    kept = [row for row in rows if row["in_response"][:seq_len].any()]
    if not kept:
        shortest = min((len(row["tokens"]) for row in rows), default=0)
        sizes = f"{len(rows)} conversations, the shortest of {shortest} tokens"
        raise ValueError(f"--seq-len {seq_len}: too short for all of {sizes}; expected longer rows")
    n_cut = sum(len(row["tokens"]) > seq_len for row in kept)
    return [{name: array[:seq_len] for name, array in row.items()} for row in kept], n_cut


def pack(rows: list[Row], tokenizer: Tokenizer, seq_len: int, seed: int = 0) -> list[Row]:
    """Return conversations, from `rows_within`, packed into rows of exactly seq_len tokens.

    Each is put, the longest first, into the row where it leaves the least room (best fit, Ding et al. 2024).
    The rest of a row is end-of-text tokens, which begin a segment of their own. Rows come in an order drawn
    from the seed.
    """
    # Choose a row for each, in random order among those of equal length.
    rng = np.random.default_rng(seed)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    packed: list[list[Row]] = []
    free: list[tuple[int, int]] = []  # (tokens, row), ascending
    for conversation in sorted(shuffled, key=lambda row: len(row["tokens"]), reverse=True):
        length = len(conversation["tokens"])
        i = bisect.bisect_left(free, (length, 0))
        room, number = free.pop(i) if i < len(free) else (seq_len, len(packed))
        if number == len(packed):
            packed.append([])
        packed[number].append(conversation)
        if room > length:
            bisect.insort(free, (room - length, number))
    return [join(packed[number], tokenizer.eot_id, seq_len) for number in rng.permutation(len(packed))]


def join(conversations: list[Row], eot_id: int, seq_len: int) -> Row:
    """Return one row of seq_len tokens of these conversations, filled up with end-of-text tokens."""
    n_padding = seq_len - sum(len(row["tokens"]) for row in conversations)
    padding = {
        "tokens": np.full(n_padding, eot_id, np.int64),
        "in_response": np.zeros(n_padding, bool),
        "begins": np.arange(n_padding) == 0,
    }
    return {name: np.concatenate([row[name] for row in [*conversations, padding]]) for name in padding}


def read(
    data: str, val: str | None, bad_text: str, notify: Callable[[str], None]
) -> tuple[list[Conversation], list[Conversation], Counter]:
    """Return the conversations to train on, those held out, and how many records were read or left out.

    The counts: "read", "no conversations", "duplicates". data: "stdlib" or a file; val: a file, None for a
    tenth of data, the same tenth for every seed. Of duplicates the first is kept, of those in data and val
    the one in val.
    """
    counts = Counter()

    def read_file(name: str, flag: str) -> dict[str, Conversation]:
        with bad_texts(f"{flag} {name}", bad_text, notify) as on_bad_text:

            def on_bad(problem: str) -> None:
                on_bad_text(problem)
                counts.update({"read": 1, "no conversations": 1})

            found = read_conversations(Path(name), on_bad)
        counts.update({"read": len(found)})
        return {json.dumps(conversation): conversation for conversation in found}

    # The conversations by their content, so that duplicates count once.
    held_out = None if val is None else read_file(val, "--val")
    if data == "stdlib":
        train, last = stdlib_conversations()
        counts["read"] += len(train) + len(last)
        if held_out is None:
            return train, last, counts
        found = {json.dumps(conversation): conversation for conversation in train + last}
    else:
        found = read_file(data, "--data")
    n_read = counts["read"] - counts["no conversations"]

    # Hold some out.
    if held_out is None:
        conversations = list(found.values())
        if len(conversations) < 2:
            raise ValueError(f"{data}: one conversation; expected at least two, since one is held out")
        order = np.random.default_rng(0).permutation(len(conversations))
        n_val = max(1, int(len(conversations) * HELD_OUT))
        held = [conversations[i] for i in sorted(order[:n_val])]
        train = [conversations[i] for i in sorted(order[n_val:])]
    else:
        held = list(held_out.values())
        train = [conversation for key, conversation in found.items() if key not in held_out]
        if not train:
            raise ValueError(f"--val {val}: it has all conversations of --data {data}; expected others")
    counts["duplicates"] = n_read - len(train) - len(held)
    return train, held, counts


def prepare(
    data: str,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int = 0,
    notify: Callable[[str], None] = print,
    *,
    val: str | None = None,
    bad_text: str = "refuse",
    longest: int | None = None,
) -> Dataset:
    """Return the conversations of data, packed: those to train on and those held out. See `read`.

    notify is called with one line of what became of every conversation. longest: the tokens that the model
    reads, for that line. The fingerprint is a hash of all that decides the batches. Raises ValueError for a
    file that `read_conversations` refuses, for fewer than two conversations, and for a seq_len too short for
    all of them.
    """
    *sides, counts = read(data, val, bad_text, notify)
    packed = []
    for name, conversations in zip(("to train on", "held out"), sides, strict=True):
        rows, n_cut = rows_within(conversations, tokenizer, seq_len)
        counts.update({name: len(rows), "cut": n_cut, "without an answer": len(conversations) - len(rows)})
        packed.append(pack(rows, tokenizer, seq_len, seed))
    notify(account(counts, seq_len, longest))

    content = hashlib.sha256(f"{tokenizer.fingerprint} {seq_len} {seed} ".encode())
    for i, rows in enumerate(packed):
        if i == 1 and val is not None:
            content.update(b"held out")  # where the one part ends and the other begins
        for row in rows:
            for array in row.values():
                content.update(array.tobytes())
    fingerprint = f"instruct-{content.hexdigest()[:16]}"
    summary = f"{counts['to train on']:,} conversations to train on, {counts['held out']:,} held out"
    return Dataset(fingerprint, tokenizer, Rows(packed[0]), Rows(packed[1]), summary)


def account(counts: Counter, seq_len: int, longest: int | None) -> str:
    """Return a line of what became of every conversation, from the counts by `read` and `prepare`.

    The numbers up to the semicolon add up to those that were read; those that are cut are among the last two.
    """
    without = f"without an answer in their first {seq_len} tokens"
    names = {"no conversations": "no conversations", "duplicates": "duplicates", "without an answer": without}
    parts = [f"{counts[name]:,} {words}" for name, words in names.items() if counts[name]]
    parts += [f"{counts[name]:,} {name}" for name in ("to train on", "held out")]
    line = f"{counts['read']:,} conversations read: {', '.join(parts)}"
    if counts["cut"] or counts["without an answer"]:
        limit = "all that this model reads" if seq_len == longest else "as --seq-len says"
        if longest is not None and seq_len < longest:
            limit += f"; up to --seq-len {longest} is possible"
        line += f"; {counts['cut']:,} of these are cut to {seq_len} tokens, {limit}"
    return line


def load_data(args: argparse.Namespace, config: Any) -> Dataset:
    """Return the conversations that --data names. Raises ValueError for a model that generates no text, and
    for a tokenizer without line breaks, which the template of a conversation has."""
    if "eos_token_id" not in [field.name for field in fields(config)]:
        raise ValueError("--task instruct: an encoder gives no answers; expected a decoder, as gpt")
    tokenizer = get_tokenizer(args.tokenizer)
    if isinstance(tokenizer, WordPiece):
        raise ValueError("--task instruct: WordPiece drops the line breaks of conversations; expected BPE")
    options = {"val": args.val, "bad_text": args.bad_text, "longest": config.max_seq_len}
    return prepare(args.data, tokenizer, args.seq_len, **options)


def make_batch(
    rows: list[Row], config: Any, generator: torch.Generator, tokenizer: Tokenizer | None = None
) -> dict[str, Tensor]:
    """Return B rows of T tokens as one: "tokens" and "targets" (1, B T) and "cu_seqlens" (n + 1,), int32.

    targets: the token that follows if it is part of a response, else -100. cu_seqlens: where the n
    conversations begin, and B T, so that attention stays inside each.
    """
    columns = stack(rows)
    tokens, in_response, begins = columns["tokens"], columns["in_response"], columns["begins"]
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = torch.where(in_response[:, 1:], tokens[:, 1:], IGNORED)
    starts = begins.flatten().nonzero().flatten()
    return {
        "tokens": tokens.reshape(1, -1),
        "targets": targets.reshape(1, -1),
        "cu_seqlens": torch.cat([starts, starts.new_tensor([begins.numel()])]).int(),
    }


def split(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """Return the i-th of n equal parts of a batch: whole rows, which conversations never cross."""
    part = {name: batch[name].chunk(n, dim=1)[i] for name in ("tokens", "targets")}
    length = part["tokens"].shape[1]
    ends = batch["cu_seqlens"] - i * length
    return part | {"cu_seqlens": ends[(ends >= 0) & (ends <= length)]}


def conversations_in(rows: list[Row], n: int) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, response) as token ids of up to n conversations in rows, spread evenly over them.

    Of several turns it is the first. The response has its end token unless it was cut.
    """
    found = []
    for row in rows:
        starts = np.flatnonzero(row["begins"])[1:]
        for tokens, in_response in zip(
            np.split(row["tokens"], starts), np.split(row["in_response"], starts), strict=True
        ):
            if not in_response.any():
                continue  # padding
            first = int(in_response.argmax())
            end = first + int(np.append(~in_response[first:], True).argmax())
            found.append((tokens[:first].tolist(), tokens[first:end].tolist()))
    n = min(n, len(found))
    return [found[i * len(found) // n] for i in range(n)]


def answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """Return the model's likeliest answer, token by token, to each prompt.

    prompts: token ids, from formats.chat_template.prompt_tokens. An answer ends by its end token, after
    max_new_tokens, or where the longest prompt of its batch and the answer would be longer than the model
    reads; there may be room for none.
    """
    end, result = end_id(tokenizer), []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        room = max(0, model.config.max_seq_len - max(map(len, batch)))
        for new in model.generate(batch, min(max_new_tokens, room), temperature=0, stop=end):
            result.append(tokenizer.decode(new[:-1] if new[-1:] == [end] else new))
    return result


@torch.no_grad()
def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return answers to held-out questions, beside those at the run's first evaluation (before.json)."""
    tokenizer = dataset.tokenizer
    held_out = [dataset.val[i] for i in range(min(16, len(dataset.val)))]
    questions = conversations_in(held_out, 4)
    after = answers(model, tokenizer, [prompt for prompt, _ in questions], 60)
    path = out / "before.json"
    if not path.exists():
        with replace_file(path) as new:
            new.write_text(json.dumps(after), encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))

    shown = []
    for (prompt, expected), *both in zip(questions, before, after, strict=True):
        texts = [tokenizer.decode(prompt), tokenizer.decode(expected), *both]
        labels = ("", "expected: ", "before:   ", "after:    ")
        shown.append("\n".join(label + text.strip() for label, text in zip(labels, texts, strict=True)))
    return "\n\n".join(shown)


def save_tokenizer(dataset: Dataset, directory: Path) -> None:
    """Write the tokenizer and the template of conversations."""
    dataset.tokenizer.save(directory)
    save_chat_template(dataset.tokenizer, directory)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Count conversations and show some of them as trained on.")
    add = parser.add_argument
    add("file", nargs="?", type=command.path, help="a file of conversations (default: the built-in ones)")
    add("--tokenizer", type=command.filled, default="bytes", help="as for train.py (default %(default)s)")
    add("-n", type=int, default=5, help="how many to show (default %(default)s)")
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    if args.file is not None:
        conversations = read_conversations(args.file)
        n_duplicates = len(conversations) - len({json.dumps(messages) for messages in conversations})
        duplicates = f", {n_duplicates:,} of them duplicates" if n_duplicates else ""
        print(f"{len(conversations):,} conversations{duplicates}")
    else:
        conversations, held_out = stdlib_conversations()
        print(f"{len(conversations):,} conversations to train on, {len(held_out):,} held out")
    lengths = [len(render(messages, tokenizer)[0]) for messages in conversations]
    print(f"{np.mean(lengths):.1f} tokens on average, at most {max(lengths):,}; responses are in »«")
    n = min(args.n, len(conversations))
    for i in range(n):
        tokens, in_response = render(conversations[i * len(conversations) // n], tokenizer)
        print()
        for is_response, group in groupby(zip(in_response, tokens, strict=True), key=lambda pair: pair[0]):
            text = tokenizer.decode(token for _, token in group)
            print(f"»{text}«" if is_response else text, end="")
        print()


if __name__ == "__main__":
    command.run(main)
