"""Perplexity of a text, by a sliding window.

    exp(-mean_i log p(x_i | the tokens before it that the window holds))

A model reads at most max_seq_len tokens at a time. The window moves on by `stride` tokens, and each window
predicts only the tokens that no window before it has. A smaller stride gives them more context and costs more
passes (the sliding-window figures of GPT-2, Radford et al. 2019, section 3.1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, stride: int) -> float:
    """Return exp(mean nats) of tokens (N,), all but the first. model(tokens (1, T)): logits (1, T, V).

    Raises ValueError for a stride outside 1 ... max_seq_len, and for fewer than two tokens.
    """
    context = model.config.max_seq_len
    if not 1 <= stride <= context or tokens.numel() < 2:
        raise ValueError(
            f"perplexity: stride {stride}, {tokens.numel()} tokens: expected 1 to {context}, and 2 tokens"
        )
    nats, scored = 0.0, 1  # the first token has no context to be predicted from
    for start in range(0, tokens.numel() - 1, stride):
        targets = tokens[start + 1 : start + context + 1]
        n_new = start + 1 + targets.numel() - scored
        logits = model(tokens[None, start : start + targets.numel()])[0, -n_new:]  # (n_new, V)
        nats += F.cross_entropy(logits.double(), targets[-n_new:], reduction="sum").item()
        scored += n_new
        if scored == tokens.numel():
            break
    return math.exp(nats / (scored - 1))
