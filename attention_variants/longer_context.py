"""Longer contexts: rotary positions slowed down, so that a model reads texts longer than those it learned on.

Pair i of a head's K features turns by p w_i at position p, with w_i = theta^(-2i/K). Within the original
context of L tokens a fast pair has turned many times, and a slow one not even once: beyond L it comes to
angles that the model has never seen. Positions p / s with a factor s > 1 stay within the known angles, and
blur near positions, which fast pairs tell apart. Three ways to choose which pairs are slowed down:

    linear     all:  w_i / s                                                   Chen et al. 2023, 2306.15595
    llama3     those that turn less than `high_freq_factor` times within L, fully those below
               `low_freq_factor`; between them w is mixed linearly in the number of turns        Llama 3.1
    yarn       those that turn less than `beta_fast` times within L, fully those below `beta_slow`; between
               them w is mixed linearly in i, as in the authors' code; in the paper linearly in the turns
               (Peng et al. 2023, 2309.00071, section 3.2)

More keys make a softmax flatter. YaRN makes up for it by larger scores: cos and sin, of queries and of keys,
are multiplied by 0.1 ln(s) + 1 (section 3.4), so that scores grow by its square. DeepSeek puts this into the
scale of its scores instead (attention_variants/latent.py), and for cos and sin the ratio remains of what
`mscale` and `mscale_all_dim` make.

The settings have the names of Hugging Face's rope_scaling, which formats/decoders.py checks. As published for
Qwen2.5 and Qwen3, to reach 131,072 tokens:

    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""

import math

import torch
from torch import Tensor


def stretched(frequencies: Tensor, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """Return the frequencies w (K / 2,) slowed down as `scaling` says, and the factor of cos and sin."""
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
    """Return how far each of n pairs is slowed down by YaRN, (n,): 0 not at all, 1 by the whole factor."""
    width, original = 2 * n, scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = torch.arange(n, device=device).float()  # made there: a copy would wait for the GPU
    return ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)


def yarn_factor(scaling: dict) -> float:
    """Return by how much YaRN multiplies cos and sin: `attention_factor`, or what the other settings make."""
    s, given = scaling["factor"], scaling.get("attention_factor")
    if given is not None:
        return given
    of_angles, of_scores = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if of_angles and of_scores:
        return magnitude(s, of_angles) / magnitude(s, of_scores)
    return magnitude(s, 1)


def magnitude(s: float, weight: float) -> float:
    """Return 0.1 weight ln(s) + 1, by which YaRN multiplies queries and keys, and 1 where s is 1."""
    return 0.1 * weight * math.log(s) + 1 if s > 1 else 1.0
