"""Perplexity of a text, by a sliding window.

    exp(-mean_i log p(x_i | the tokens before it that the window holds))

A model reads a window of at most max_seq_len tokens at a time. The window moves on by `stride` tokens, and
each window predicts only the tokens that no window before it has predicted. With a smaller stride these
tokens have more context, so the perplexity is lower, but there are more windows to read (Baevski and Auli
2019, arXiv:1809.10853; Press et al. 2021, arXiv:2012.15832).

Perplexity is a figure per token. Models with different tokenizers are compared in bits per byte of one text:

    -sum_i log2 p(x_i | ...) / number of UTF-8 bytes

    python -m evaluation.perplexity runs/gpt/model book.txt       any decoder, any text that --data reads

Shapes: N tokens of the text, B windows, T tokens of a window, V vocabulary.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats import command
from formats.progress import progress_bar

TOKENS_PER_PASS = 2048  # of the windows that are read in one forward pass; it has at least one window


@torch.no_grad()
def nats(model: nn.Module, tokens: Tensor, stride: int) -> float:
    """Return the sum of -log p, in nats, of the tokens (N,), int64, without the first.

    model: computes logits (B, T, V) from tokens (B, T). stride: the number of tokens by which the window
    moves on. Raises ValueError for a stride outside 1 ... max_seq_len, and for fewer than two tokens.
    """
    context, N = model.config.max_seq_len, tokens.numel()
    if not 1 <= stride <= context or N < 2:
        raise ValueError(f"perplexity: stride {stride}, {N} tokens: expected 1 to {context}, and at least 2")

    # The windows of a group are read in one pass, so they have equal lengths and predict equally many tokens.
    # The first window predicts all of its tokens, and the last one may be shorter: each is read alone.
    starts = [stride * i for i in range(1 + max(0, math.ceil((N - 1 - context) / stride)))]
    rows, last = max(1, TOKENS_PER_PASS // context), len(starts) - 1
    groups = [starts[:1]] + [starts[i : min(i + rows, last)] for i in range(1, last, rows)]
    if last > 0:
        groups.append(starts[last:])

    # In all windows but the first one, the first `context - stride` tokens are predicted already.
    total = 0.0
    for group in progress_bar(groups, "windows", leave=False):
        windows = torch.stack([tokens[start : start + context + 1] for start in group])  # (B, T + 1)
        n_seen = 0 if group[0] == 0 else context - stride
        logits, targets = model(windows[:, :-1])[:, n_seen:], windows[:, 1 + n_seen :]
        total += F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
    return total


def perplexity(model: nn.Module, tokens: Tensor, stride: int) -> float:
    """Return exp(mean of -log p) of the tokens (N,) without the first. Arguments and errors: see `nats`."""
    return math.exp(nats(model, tokens, stride) / (tokens.numel() - 1))


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raise ValueError if the logits of a model depend on later tokens, or are not finite.

    A model that reads later tokens reads those that it should predict, so its perplexity means nothing. It is
    found by changing the last of up to 16 tokens. model: computes logits (1, T, V) from tokens (1, T).
    """
    T, V = min(16, model.config.max_seq_len), model.config.vocab_size
    tokens = torch.arange(T, device=next(model.parameters()).device)[None] % V
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    before, after = model(tokens)[:, :-1], model(other)[:, :-1]
    if not before.isfinite().all():
        raise ValueError("the logits are not finite; expected numbers: the weights may be damaged")
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
        moved = (before - after).abs().amax().item()
        raise ValueError(
            f"a later token moves the logits of earlier ones by {moved:.3g}; expected a causal model"
        )


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(
        description="Print how well a model predicts a text: perplexity, and bits per byte."
    )
    add = parser.add_argument
    add("model", type=command.path, help="directory of a decoder, or of an adapter")
    add("text", type=command.filled, help="a file, folder, glob or URL, as for train.py --data")
    add("--stride", type=int, metavar="N", help="tokens by which the window moves on (default: half of it)")
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of .json, .csv ... that holds the text (default %(default)s)",
    )
    add(
        "--cache", type=command.path, default=Path("cache"), help="folder for downloads (default %(default)s)"
    )
    args = parser.parse_args(argv)

    from data import corpus, text
    from evaluation.multiple_choice import load

    # Open the text and the model, in float32.
    files = corpus.find_files(args.text, args.cache, print)
    model, tokenizer = load(args.model)
    check_causal(model)

    # As in training, each document begins with the token that separates documents, but the first with the
    # tokens that the tokenizer puts in front of a text, if there are any.
    tokens, n_bytes, begin = [], 0, tokenizer.begin_ids or [tokenizer.eot_id]
    with text.bad_texts(args.text, "refuse", print) as on_bad_text:
        for document in corpus.documents(files, on_bad_text, args.text_field):
            tokens += [*begin, *tokenizer.encode(document)]
            begin = [tokenizer.eot_id]
            n_bytes += len(document.encode())
    if len(tokens) < 2:
        raise ValueError(f"{args.text}: no text in it; expected at least one token")

    # Measure.
    stride = max(1, model.config.max_seq_len // 2) if args.stride is None else args.stride
    device = next(model.parameters()).device
    total, n = nats(model, torch.tensor(tokens, device=device), stride), len(tokens) - 1
    print(f"text             {n_bytes:,} bytes, {n:,} tokens")
    print(f"nats per token   {total / n:.4f}")
    print(f"perplexity       {math.exp(min(total / n, 700)):.4g}")
    print(f"bits per byte    {total / math.log(2) / n_bytes:.4f}")


if __name__ == "__main__":
    command.run(main)
