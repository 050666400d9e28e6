"""Preferences on the Markov chain of posttraining/frontier.py, where the best possible result is known.

    p(a preferred to b) = sigmoid(R(a) - R(b))        a, b drawn from the reference, R the exact reward

These are the labels of Bradley and Terry (1952), the model of preferences that DPO and reward models assume.
So with infinitely many pairs DPO converges to the optimum ref exp(R / beta) / Z, and a reward model to R plus
a constant. Every preference has the same prompt, the token BEGIN.
"""

import math

import numpy as np
import torch
from torch import nn

from data.preferences import Example, as_dataset
from data.rows import Dataset
from posttraining import frontier
from posttraining.frontier import Chain

N_TRAIN, N_HELD_OUT = 4000, 1000


def dataset(chain: Chain, n: int = N_TRAIN, n_held_out: int = N_HELD_OUT) -> Dataset:
    """Return n pairs of sequences of the chain to learn from, and n_held_out held out, always the same."""
    generator = torch.Generator().manual_seed(0)
    pairs = chain.sample(4 * (n + n_held_out), generator).view(-1, 2, chain.T)
    pairs = pairs[(pairs[:, 0] != pairs[:, 1]).any(1)][: n + n_held_out]  # (n + n_held_out, 2, T)
    p = torch.sigmoid(chain.reward(pairs[:, 0]) - chain.reward(pairs[:, 1]))
    flipped = torch.rand(len(p), generator=generator) >= p
    pairs[flipped] = pairs[flipped].flip(1)
    prompt = np.array([chain.begin], np.int64)
    examples = [Example(prompt, (a, b)) for a, b in pairs.numpy()]
    best = torch.maximum(p, 1 - p)[n:].mean().item()
    summary = f"{n:,} pairs of sequences of a Markov chain, {n_held_out:,} held out"
    data = as_dataset(examples[:n], examples[n:], None, summary)
    data.guess = f"chance ranks 50.0% of the pairs as labelled, the exact reward {best:.1%} of them"
    return data


def placed(model: nn.Module, beta: float | None) -> str:
    """Return the exact reward and KL of a model of the chain beside the best that its KL allows, as text.

    beta: if given, the optimum of reward - beta KL is added; None for a method that has another optimum.
    """
    reward, kl, outside = frontier.exact_value(model)
    start = frontier.optimum(math.inf)[0]
    share = frontier.share_of_gain(reward, kl)
    lines = [f"reward {reward:.4f} at KL {kl:.4f} nats; the reference has {start:.4f} at 0"]
    lines += [f"the most reward at this KL is {frontier.reward_at(kl):.4f}: {share:.1%} of the possible gain"]
    if beta is not None:
        best, best_kl = frontier.optimum(beta)
        lines += [f"the optimum for beta {beta:g} is {best:.4f} at KL {best_kl:.4f}"]
    if outside > 1e-3:
        lines += [f"{outside:.1%} of its sequences have a token that the chain lacks, and do not count"]
    return "\n".join(lines)
