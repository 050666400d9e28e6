r"""Instruction tuning: a base model learns to answer.

    loss = -mean over the tokens x_t of responses  log p(x_t | x_<t)

A base model continues text: asked a question, it may well go on with more questions. Trained a little further
on conversations, it answers, also kinds of question that it was not trained on (FLAN, Wei et al. 2021;
InstructGPT, Ouyang et al. 2022). The objective is pretraining's, but only the responses are
predicted (Tülu, Wang et al. 2023): the model is to give answers, not to ask.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A *template* writes it
as tokens, and whoever asks the model later must write the same ones, so it is also kept beside the tokenizer
as Hugging Face's libraries read it. The conversations are *packed*: laid whole into rows of T tokens, as many
as fit, each attending to itself alone.

    tokens   <|endoftext|> <|user|>\n What is 2 + 2? \n<|assistant|>\n 4 <|endoftext|>     the next one ...
    targets                                                         4 <|endoftext|>

    python -m posttraining.instruct                    the built-in conversations: how many, and some of them
    python -m posttraining.instruct questions.jsonl    the same of a file; `read_conversations` says what it may hold

Shapes: B rows of T tokens; marked tokens are int64, a token id and two marks in one number (see `pack`).
"""

import argparse
import bisect
import hashlib
import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.conversations import read_conversations
from data.stdlib_questions import stdlib_conversations
from data.text import Dataset, Split
from data.tokenizer import Tokenizer, get_tokenizer
from formats.chat_template import (  # noqa: F401
    Conversation,
    end_id,
    prompt_tokens,
    render,
    save_chat_template,
)

IGNORED = -100  # a target that is not predicted

ID = (1 << 32) - 1  # marked tokens: the bits of the token id,
RESPONSE = 1 << 32  # the mark of a token that is part of a response,
BEGIN = 1 << 33  # and that of the first token of a conversation, or of the padding at the end of a row

HELD_OUT = 1 / 10  # share of a file's conversations


def mark(messages: Conversation, tokenizer: Tokenizer) -> np.ndarray:
    """Marked tokens (N,) of a conversation."""
    tokens, in_response = render(messages, tokenizer)
    marked = np.array(tokens, np.int64)
    marked[in_response] |= RESPONSE
    marked[0] |= BEGIN
    return marked


def pack(
    conversations: list[Conversation],
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Split:
    """The conversations in rows of exactly seq_len tokens, as marked tokens int64 (n_rows * seq_len,).

    Each is laid, the longest first, into the row where it leaves the least room (best fit, Ding et al. 2024);
    the rest of a row is end-of-text tokens. One longer than a row is cut at its end, or left out if nothing
    of a response would remain; `say` is told how many. Rows come in an order drawn from the seed.

    A marked token is its id in the low 32 bits and two marks above, RESPONSE and BEGIN. So one array of
    numbers, as train.py's loader takes it, carries the text, what of it is to be predicted and where
    attention ends. And since rows are as long as the loader's windows are apart, its windows of T + 1 tokens
    are exactly the rows, in every epoch, each with the first token of the next row at its end. That one has
    the mark BEGIN and not RESPONSE, so it is no target.

    Raises ValueError if no conversation is left.
    """
    whole = [mark(messages, tokenizer) for messages in conversations]
    kept = [i for i, marked in enumerate(whole) if (marked[:seq_len] & RESPONSE).any()]
    n_cut, n_left_out = sum(len(whole[i]) > seq_len for i in kept), len(whole) - len(kept)
    if not kept:
        shortest = min((len(marked) for marked in whole), default=0)
        found = f"{len(whole)} conversations, the shortest of {shortest} tokens"
        raise ValueError(f"--seq-len {seq_len}: too short for all of {found}; expected longer rows")
    if n_cut or n_left_out:
        say(f"{len(whole)} conversations: {n_cut} cut to {seq_len} tokens, {n_left_out} left out as too long")

    rng = np.random.default_rng(seed)
    shuffled = [whole[kept[i]][:seq_len] for i in rng.permutation(len(kept))]
    rows: list[list[np.ndarray]] = []
    free: list[tuple[int, int]] = []  # (tokens, row), ascending
    for marked in sorted(shuffled, key=len, reverse=True):
        i = bisect.bisect_left(free, (len(marked), 0))
        room, row = free.pop(i) if i < len(free) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(marked)
        if room > len(marked):
            bisect.insort(free, (room - len(marked), row))

    packed = np.full((len(rows), seq_len), tokenizer.eot_id, np.int64)
    for place, row in enumerate(rng.permutation(len(rows))):
        marked = np.concatenate(rows[row])
        packed[place, : len(marked)] = marked
        packed[place, len(marked) : len(marked) + 1] |= BEGIN
    n_bytes = sum(len(message["content"].encode()) for i in kept for message in conversations[i])
    return Split(packed.reshape(-1), n_bytes, len(kept))


def prepare(
    data: str, tokenizer: Tokenizer, seq_len: int, seed: int = 0, say: Callable[[str], None] = print
) -> Dataset:
    """The conversations of data, "stdlib" or a file, packed: those to train on and those held out.

    Of a file, a tenth is held out, the same tenth for every seed; what it holds twice counts once. The
    dataset's name is a hash of all that decides the batches. Raises ValueError for a file that
    `read_conversations` refuses, less than two conversations, or a seq_len too short for all of them.
    """
    if data == "stdlib":
        train, val = stdlib_conversations()
    else:
        conversations = list({json.dumps(c): c for c in read_conversations(Path(data))}.values())
        if len(conversations) < 2:
            raise ValueError(f"{data}: one conversation; expected at least two, since one is held out")
        order = np.random.default_rng(0).permutation(len(conversations))
        n_val = max(1, int(len(conversations) * HELD_OUT))
        val = [conversations[i] for i in sorted(order[:n_val])]
        train = [conversations[i] for i in sorted(order[n_val:])]

    train, val = (pack(side, tokenizer, seq_len, seed, say) for side in (train, val))
    # One token more, so that the last row too is a whole window of `data.held_out_batches`.
    val.tokens = np.append(val.tokens, tokenizer.eot_id | BEGIN)
    content = hashlib.sha256(f"{tokenizer.fingerprint} {seq_len} {seed} ".encode())
    content.update(train.tokens.tobytes() + val.tokens.tobytes())
    return Dataset(f"instruct-{content.hexdigest()[:16]}", tokenizer, train, val)


def make_batch(
    marked: Tensor, config: Any, generator: torch.Generator, tokenizer: Tokenizer | None = None
) -> dict[str, Tensor]:
    """Windows of T + 1 marked tokens (B, T + 1) to one row: "tokens" and "targets" (1, B T), "cu_seqlens".

    targets: the token that follows if it is part of a response, else -100. cu_seqlens: int32, where the
    conversations begin, and B T: attention stays inside each. The other arguments are there because every
    objective is given them.
    """
    ids = marked & ID
    targets = torch.where(marked[:, 1:] & RESPONSE != 0, ids[:, 1:], IGNORED)
    begins = marked[:, :-1] & BEGIN != 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return {
        "tokens": ids[:, :-1].reshape(1, -1),
        "targets": targets.reshape(1, -1),
        "cu_seqlens": torch.cat([starts, starts.new_tensor([begins.numel()])]).int(),
    }


def part_of(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """The i-th of n equal parts of a batch from `make_batch`: whole rows, which conversations never cross."""
    part = {name: batch[name].chunk(n, dim=1)[i] for name in ("tokens", "targets")}
    length = part["tokens"].shape[1]
    ends = batch["cu_seqlens"] - i * length
    return part | {"cu_seqlens": ends[(ends >= 0) & (ends <= length)]}


def conversations_in(marked: Tensor, n: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) as token ids, of up to n conversations in marked rows, spread evenly over them.

    marked: int64 of any shape. Of several turns, the first; the response has its end token unless it was cut.
    """
    flat = marked.flatten().cpu().numpy()
    found = []
    for conversation in np.split(flat, np.flatnonzero(flat & BEGIN))[1:]:
        in_response = (conversation & RESPONSE) != 0
        if not in_response.any():
            continue  # padding
        ids = (conversation & ID).tolist()
        first = int(in_response.argmax())
        end = first + int(np.append(~in_response[first:], True).argmax())
        found.append((ids[:first], ids[first:end]))
    n = min(n, len(found))
    return [found[i * len(found) // n] for i in range(n)]


def answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """The model's likeliest answer, token by token, to each prompt (from `prompt_tokens`).

    An answer ends by its end token, after max_new_tokens, or where the longest prompt of its batch and the
    answer would be longer than the model reads.
    """
    end, result = end_id(tokenizer), []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        room = max(0, model.config.max_seq_len - max(map(len, batch)))
        for new in model.generate(batch, min(max_new_tokens, room), temperature=0, stop=end):
            result.append(tokenizer.decode(new[:-1] if new[-1:] == [end] else new))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Count conversations and show some of them as trained on.")
    parser.add_argument("file", nargs="?", type=Path, help="of conversations (default: the built-in ones)")
    parser.add_argument("--tokenizer", default="bytes", help="as for train.py (default bytes)")
    parser.add_argument("-n", type=int, default=5, help="how many to show (default 5)")
    args = parser.parse_args()
    tokenizer = get_tokenizer(args.tokenizer)
    if args.file is not None:
        conversations = read_conversations(args.file)
        print(f"{len(conversations):,} conversations")
    else:
        conversations, held_out = stdlib_conversations()
        print(f"{len(conversations):,} conversations to train on, {len(held_out):,} held out")
    lengths = [len(render(messages, tokenizer)[0]) for messages in conversations]
    print(f"{np.mean(lengths):.1f} tokens on average, at most {max(lengths):,}; responses are in »«")
    for i in range(min(args.n, len(conversations))):
        tokens, in_response = render(conversations[i * len(conversations) // args.n], tokenizer)
        print()
        for is_response, group in groupby(zip(in_response, tokens, strict=True), key=lambda pair: pair[0]):
            text = tokenizer.decode(token for _, token in group)
            print(f"»{text}«" if is_response else text, end="")
        print()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
