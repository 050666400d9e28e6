"""Prompts: the texts that a policy completes when it learns from a reward.

    --data chain     BEGIN of the chain in posttraining/frontier.py, again and again
    --data stdlib    questions about Python's library, as for --task instruct
    --data FILE      conversations (data/conversations.py): the prompt is all before the last answer

The answers in the data are not learned: only reward=exact compares completions with them.

Shapes: N prompts of P tokens at most, with answers of A tokens at most.
"""

import hashlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data.rows import Dataset, Row, Rows
from data.tokenizer import get_tokenizer
from formats.chat_template import Conversation, end_id, prompt_tokens
from posttraining import frontier, instruct


@dataclass
class Prompts(Dataset):
    """Rows {"prompt" (P,), "prompt_length" (), "answer" (A,), "answer_length" ()}, int64, padded with 0."""

    stop: int | None = None  # the token that ends a completion; None: only its length does
    scorer: Callable | None = None  # from scores.find


def of_chain(beta: float) -> Prompts:
    """Return the chain's only prompt 256 times, so that a batch can hold several, and the known results.

    beta: coefficient of the KL penalty, for the text of the optimum.
    """
    rows = Rows(padded([([frontier.Chain().begin], [])] * 256))
    # At beta 0.02 the optimum is that of beta 0 in all digits shown.
    (start, _), (reward, kl) = frontier.optimum(float("inf")), frontier.optimum(max(beta, 0.02))
    best = f"the optimum at beta {beta:g} has reward {reward:.4f} at KL {kl:.4f}"
    guess = f"the reference has reward {start:.4f} at KL 0; {best}"
    return Prompts("chain", None, rows, rows, "a Markov chain of 4 states and 8 tokens", guess=guess)


def of_conversations(args: Namespace, n_new: int, notify: Callable[[str], None] = print) -> Prompts:
    """Return the prompts of the conversations that --data names, to learn from and held out.

    n_new: tokens of the longest completion. Prompts that leave no room for it in --seq-len are dropped and
    counted. Raises ValueError where none is left.
    """
    tokenizer = get_tokenizer(args.tokenizer)
    *sides, _ = instruct.read(args.data, args.val, args.bad_text, notify)
    content, found, n_dropped = hashlib.sha256(f"{tokenizer.fingerprint} {n_new}".encode()), [], 0
    for conversations in sides:
        pairs = [prompt_and_answer(conversation, tokenizer) for conversation in conversations]
        kept = [pair for pair in pairs if len(pair[0]) + n_new <= args.seq_len]
        n_dropped += len(pairs) - len(kept)
        if not kept:
            shortest = min(len(prompt) for prompt, _ in pairs)
            raise ValueError(
                f"--seq-len {args.seq_len}: no room for the shortest prompt of --data {args.data}, "
                f"{shortest} tokens, and {n_new} new ones; lower --set max_new_tokens"
            )
        content.update(repr(kept).encode())
        found.append(Rows(padded(kept)))
    summary = f"{len(found[0]):,} prompts to learn from, {len(found[1]):,} held out"
    if n_dropped:
        notify(f"{n_dropped:,} prompts dropped: longer than {args.seq_len} tokens less {n_new} new ones")
    fingerprint = f"prompts-{content.hexdigest()[:16]}"
    return Prompts(fingerprint, tokenizer, *found, summary, stop=end_id(tokenizer))


def prompt_and_answer(messages: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids of all before the last message of a conversation, and those of this answer."""
    *before, last = messages
    return prompt_tokens(before, tokenizer), tokenizer.encode(last["content"])


def padded(pairs: list[tuple[list[int], list[int]]]) -> list[Row]:
    """Return rows as in `Prompts` of pairs (prompt, answer) of token ids, all of the same shapes."""
    longest = {name: max(len(pair[i]) for pair in pairs) for i, name in enumerate(("prompt", "answer"))}
    rows = []
    for pair in pairs:
        row = {}
        for (name, width), ids in zip(longest.items(), pair, strict=True):
            row[name] = np.array(ids + [0] * (width - len(ids)), np.int64)
            row[f"{name}_length"] = np.array(len(ids))
        rows.append(row)
    return rows


def unpadded(batch: dict[str, Tensor], name: str) -> list[list[int]]:
    """Return the token ids, without padding, of each row of a batch. name: "prompt" or "answer"."""
    lengths = batch[f"{name}_length"].tolist()
    return [row[:length] for row, length in zip(batch[name].tolist(), lengths, strict=True)]
