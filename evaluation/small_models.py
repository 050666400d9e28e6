"""Small models for studies: a small vocabulary, training in a minute, many answers to one prompt.

A study of what search or verification adds needs a model that is sometimes right, and hundreds of answers. So
the tokens of these GPTs (gpt.py) are the words of a small language, each training step has newly drawn rows,
and a prompt is read once to write n answers.

    python -m evaluation.small_models       a model learns to reverse four digits

Shapes: B rows, T tokens, V vocabulary.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats import command
from formats.progress import progress_bar
from gpt import GPT, Config

# A token of a text: a name with the parenthesis of a call, a number, a sign of one or more characters.
PIECE = re.compile(r"\[::-1\]|\[1:\]|\[:-1\]|==|!=|->|<<|>>|[a-z]+\(?|\d+|\S")

Row = tuple[list[int], list[int]]  # tokens that the model reads, and those that it learns to write then


class Vocabulary:
    """The tokens of a small language: the pieces of its texts, numbered from 1. Token 0 ends a text."""

    end = 0

    def __init__(self, texts: Iterable[str]):
        """texts: they must have every piece of the language, as the rules of its grammar do."""
        self.pieces = ["<end>", *dict.fromkeys(piece for text in texts for piece in PIECE.findall(text))]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises ValueError for a piece that is not in the vocabulary."""
        try:
            return [self.ids[piece] for piece in PIECE.findall(text)]
        except KeyError as error:
            raise ValueError(f"piece {error} of {text!r}: not in the vocabulary") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the pieces of tokens with spaces in between."""
        return " ".join(self.pieces[token] for token in tokens)


def small_gpt(vocabulary: Vocabulary, max_seq_len: int, seed: int, layers: int = 3, width: int = 96) -> GPT:
    """Return a GPT with random weights and heads of width 24; by default about 350,000 parameters."""
    torch.manual_seed(seed)
    return GPT(Config(layers, width // 24, width, 8 * width // 3, len(vocabulary), max_seq_len, qk_norm=True))


# --- training


def make_batch(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return inputs and targets, int64 (B, T), of rows, padded on the right. Tokens to write are targets."""
    T = max(len(read) + len(written) for read, written in rows) - 1
    tokens, targets = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), -100)
    for i, (read, written) in enumerate(rows):
        row = torch.tensor(read + written)
        tokens[i, : len(row) - 1] = row[:-1]
        targets[i, len(read) - 1 : len(row) - 1] = row[len(read) :]
    return {"tokens": tokens, "targets": targets}


def fit(model: GPT, draw_rows: Callable[[], Sequence[Row]], steps: int, lr: float = 3e-3) -> float:
    """Train a model in place by AdamW, and return the mean loss of the last tenth of the steps, in nats per
    token.

    draw_rows returns the rows of a step. lr: the highest learning rate, after a warm-up of 5 % of the steps;
    then it falls linearly to 0.
    """
    # As in engine/optim.py, only matrices have weight decay.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    model.train()
    for step in progress_bar(range(steps), "training", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.05 * steps), 1.05 * (1 - step / steps))
        loss, _ = model.loss(make_batch(draw_rows()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    last = losses[-math.ceil(steps / 10) :]
    return sum(last) / len(last)


# --- writing


class Answer(NamedTuple):
    """An answer that a model has written."""

    tokens: tuple[int, ...]  # without the end
    log_p: float  # of the tokens and the end, by the model at temperature 1


@torch.inference_mode()
def answers(
    model: GPT,
    prompts: Sequence[list[int]],
    n: int,
    max_new: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[list[Answer]]:
    """Return n answers to each prompt, which is read once. At temperature 0 all are the greedy one.

    max_new: tokens of an answer at most, its end included; an answer without an end is cut there.
    """
    # Read the prompts, then repeat each row of the cache n times.
    cache = model.new_cache([len(prompt) for prompt in prompts], max(map(len, prompts)) + max_new)
    T = max(map(len, prompts))
    hidden = model.hidden(torch.tensor([p + [0] * (T - len(p)) for p in prompts]), cache=cache)  # (B, T, D)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    hidden = hidden[torch.arange(len(prompts)), last].repeat_interleave(n, dim=0)  # (B n, D)
    keep_rows(cache, torch.arange(len(prompts)).repeat_interleave(n))

    written: list[list[int]] = [[] for _ in range(len(prompts) * n)]
    log_p, rows = torch.zeros(len(written)), torch.arange(len(written))  # rows: the answers without an end
    for step in range(max_new):
        logits = model.logits(hidden).float()
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        log_p[rows] += logits.log_softmax(dim=-1).gather(1, token)[:, 0]
        goes_on = token[:, 0] != Vocabulary.end
        for row, new in zip(rows[goes_on].tolist(), token[goes_on, 0].tolist(), strict=True):
            written[row].append(new)

        # Remove the answers that have ended from the batch.
        rows, token = rows[goes_on], token[goes_on]
        if len(rows) == 0 or step == max_new - 1:
            break
        if not goes_on.all():
            keep_rows(cache, goes_on.nonzero()[:, 0])
        hidden = model.hidden(token, cache=cache)[:, 0]
    found = [Answer(tuple(tokens), x) for tokens, x in zip(written, log_p.tolist(), strict=True)]
    return [found[i : i + n] for i in range(0, len(found), n)]


def keep_rows(cache, rows: Tensor) -> None:
    """Keep only these rows (n,) of a `generate.KVCache`, in place and in this order; they may repeat."""
    cache.lengths = [cache.lengths[i] for i in rows.tolist()]
    for stored in (cache.keys, cache.values):
        stored[:] = [part[rows] for part in stored]


def main(argv: list[str] | None = None) -> None:
    command.Parser(description="Train a small model to reverse four digits.").parse_args(argv)
    vocabulary, generator = Vocabulary(["0 1 2 3 4 5 6 7 8 9 ->"]), random.Random(0)

    def row() -> Row:
        digits = [str(generator.randrange(10)) for _ in range(4)]
        return vocabulary.encode(" ".join(digits) + " ->"), [*vocabulary.encode(" ".join(digits[::-1])), 0]

    model = small_gpt(vocabulary, 16, seed=0, layers=2, width=48)
    print(f"loss {fit(model, lambda: [row() for _ in range(64)], 400):.3f} nats per token")
    for read, written in (row() for _ in range(3)):
        (found,) = answers(model, [read], 5, 6, torch.Generator().manual_seed(0))
        right = sum(answer.tokens == tuple(written[:-1]) for answer in found)
        print(f"{vocabulary.decode(read)} {vocabulary.decode(found[0].tokens):10} {right} of 5 answers right")


if __name__ == "__main__":
    command.run(main)
