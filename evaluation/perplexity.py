"""Perplexity of a text, by a sliding window.

    exp(-mean_i log p(x_i | the tokens before it that the window holds))

A model reads at most max_seq_len tokens at a time. The window moves on by `stride` tokens, and each window
predicts only the tokens that no window before it has predicted. A smaller stride gives these more context, so
the perplexity is lower, and costs more passes (Baevski and Auli 2019, arXiv:1809.10853; Press et al. 2021,
arXiv:2012.15832).

Perplexity is per token, so models with different tokenizers are compared in bits per byte of the same text:

    -sum_i log2 p(x_i | ...) / number of UTF-8 bytes

    python -m evaluation.perplexity runs/gpt/model book.txt       any decoder, any text that --data reads
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats import command
from formats.progress import progress_bar

TOKENS_PER_PASS = 2048  # of the windows that go through the model together, but at least one window


@torch.no_grad()
def nats(model: nn.Module, tokens: Tensor, stride: int) -> float:
    """Return the sum of -log p over tokens (N,), all but the first.

    model: computes logits (B, T, V) from tokens (B, T). stride: tokens by which the window moves on. Raises
    ValueError for a stride outside 1 ... max_seq_len, and for fewer than two tokens.
    """
    context, N = model.config.max_seq_len, tokens.numel()
    if not 1 <= stride <= context or N < 2:
        raise ValueError(f"perplexity: stride {stride}, {N} tokens: expected 1 to {context}, and at least 2")

    # The windows go through the model in groups of equal length: the first one, several at a time of those
    # between, which are full, and the last one, which may be shorter.
    starts = [stride * i for i in range(1 + max(0, math.ceil((N - 1 - context) / stride)))]
    rows, last = max(1, TOKENS_PER_PASS // context), len(starts) - 1
    groups = [starts[:1]] + [starts[i : min(i + rows, last)] for i in range(1, last, rows)]
    if last > 0:
        groups.append(starts[last:])

    # The first window predicts all its tokens; in later ones `context - stride` are predicted already.
    total = 0.0
    for group in progress_bar(groups, "windows", leave=False):
        windows = torch.stack([tokens[start : start + context + 1] for start in group])  # (B, T + 1)
        n_seen = 0 if group[0] == 0 else context - stride
        logits, targets = model(windows[:, :-1])[:, n_seen:], windows[:, 1 + n_seen :]
        total += F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
    return total


def perplexity(model: nn.Module, tokens: Tensor, stride: int) -> float:
    """Return exp(mean of -log p) over tokens (N,), all but the first. For arguments and errors see `nats`."""
    return math.exp(nats(model, tokens, stride) / (tokens.numel() - 1))


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raise ValueError if another last token changes what a model predicts before it.

    The input of such a model holds what it should predict, so its perplexity means nothing. model: computes
    logits (1, T, V) from tokens (1, T).
    """
    T, V = min(16, model.config.max_seq_len), model.config.vocab_size
    tokens = torch.arange(T, device=next(model.parameters()).device)[None] % V
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    before, after = model(tokens)[:, :-1], model(other)[:, :-1]
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
    from data.tokenizer import get_tokenizer
    from formats.open_model import open_model

    # As in training, each document begins with the token that separates documents.
    tokenizer, files = get_tokenizer(str(args.model)), corpus.find_files(args.text, args.cache, print)
    tokens, n_bytes = [], 0
    with text.bad_texts(args.text, "refuse", print) as on_bad_text:
        for document in corpus.documents(files, on_bad_text, args.text_field):
            tokens += [tokenizer.eot_id, *tokenizer.encode(document)]
            n_bytes += len(document.encode())
    if len(tokens) < 2:
        raise ValueError(f"{args.text}: no text in it; expected at least one token")

    # Open the model.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_model(args.model).to(device).eval()
    if not hasattr(model, "new_cache"):
        raise ValueError(f"{args.model}: expected a decoder, which predicts the next token")
    check_causal(model)

    # Measure.
    stride = args.stride or max(1, model.config.max_seq_len // 2)
    total, n = nats(model, torch.tensor(tokens, device=device), stride), len(tokens) - 1
    print(f"text             {n_bytes:,} bytes, {n:,} tokens")
    print(f"nats per token   {total / n:.4f}")
    print(f"perplexity       {math.exp(min(total / n, 700)):.4g}")
    print(f"bits per byte    {total / math.log(2) / n_bytes:.4f}")


if __name__ == "__main__":
    command.run(main)
