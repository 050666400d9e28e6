"""Longer contexts: slower rotary positions, so that a model reads longer texts than those it was trained on.

Pair i of a head's K features turns by p w_i at position p, with w_i = theta^(-2i/K). Within the original
context of L tokens a fast pair has turned many times, and a slow one not even once: beyond L it comes to
angles that the model has never seen. With w_i / s in place of w_i, for a factor s > 1, all angles stay known
ones. But the fast pairs, which tell near positions apart, then do so less well. There are three ways to
choose which pairs are slowed down:

    linear     all pairs (Chen et al. 2023, 2306.15595)
    llama3     fully those that turn fewer than `low_freq_factor` times within L, and not at all those that
               turn more than `high_freq_factor` times; between these, w_i / s and w_i are mixed linearly in
               the number of turns (Llama 3.1)
    yarn       fully those that turn fewer than `beta_slow` times, and not at all those that turn more than
               `beta_fast` times; between these, the mix is linear in i, as in the authors' code, and in the
               paper linear in the number of turns (Peng et al. 2023, 2309.00071, section 3.2)

More keys make a softmax flatter. YaRN makes up for it by larger scores: cos and sin, of queries and of keys,
are multiplied by 0.1 ln(s) + 1 (section 3.4), so that scores grow by its square. DeepSeek's models multiply
the scale of their scores by a factor computed from `mscale_all_dim` instead (attention_variants/latent.py).
Their cos and sin are multiplied by the factor from `mscale` divided by that from `mscale_all_dim`.

The settings have the names of Hugging Face's rope_scaling, which formats/decoders.py checks. As published for
Qwen2.5 and Qwen3, to reach 131,072 tokens:

    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""

import math

import torch
from torch import Tensor


def stretched(frequencies: Tensor, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """Return the frequencies (K / 2,) slowed down, and the factor of cos and sin.

    frequencies: w_i (K / 2,), in radians per token. theta: their base. scaling: settings with the names of
    the header; `rope_type` is "linear", "llama3" or "yarn".
    """
    s, kind = scaling["factor"], scaling["rope_type"]
    if kind == "linear":
        return frequencies / s, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / s, 1.0
    ramp = yarn_ramp(len(frequencies), theta, scaling, frequencies.device)
    return frequencies / s * ramp + frequencies * (1 - ramp), yarn_factor(scaling)


def yarn_ramp(n: int, theta: float, scaling: dict, device: torch.device | None = None) -> Tensor:
    """Return how far YaRN slows down each of n pairs, (n,): from 0, not at all, to 1, by the factor s.

    theta, scaling: as for `stretched`. device: of the result.
    """
    width, original = 2 * n, scaling["original_max_position_embeddings"]

    # The pair i, not a whole number, for which theta^(-2i/K) L = 2 pi times.
    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # The pairs are made on the device, since a copy to it would wait for the GPU. 0.001 is the authors' guard
    # against a division by 0.
    pairs = torch.arange(n, device=device).float()
    return ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)


def yarn_factor(scaling: dict) -> float:
    """Return the factor of cos and sin in YaRN: `attention_factor`, or if it is None that of the header."""
    s, given = scaling["factor"], scaling.get("attention_factor")
    if given is not None:
        return given
    of_angles, of_scores = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if of_angles and of_scores:
        return magnitude(s, of_angles) / magnitude(s, of_scores)
    return magnitude(s, 1)


def magnitude(s: float, weight: float) -> float:
    """Return 0.1 weight ln(s) + 1, by which YaRN multiplies queries and keys; 1 for s of at most 1."""
    return 0.1 * weight * math.log(s) + 1 if s > 1 else 1.0
