"""Rotary positions slowed down: which pairs, by how much, and what happens to scores."""

import math

import pytest
import torch

from attention_variants.longer_context import magnitude, stretched, yarn_factor, yarn_ramp

THETA, K = 10_000.0, 64
W = THETA ** (-torch.arange(0, K, 2) / K)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"factor": 8.0, "original_max_position_embeddings": 4096}


def turns():
    return 4096 * W / (2 * math.pi)


def test_linear_slows_every_pair_down_by_the_factor_and_leaves_scores():
    slowed, factor = stretched(W, THETA, {"rope_type": "linear", "factor": 4.0})
    assert torch.equal(slowed, W / 4) and factor == 1


def test_llama3_keeps_pairs_that_turn_often_and_slows_down_those_that_do_not_turn_once():
    slowed, factor = stretched(W, THETA, LLAMA3)
    fast, slow = turns() > 4, turns() < 1
    assert torch.equal(slowed[fast], W[fast]) and torch.equal(slowed[slow], W[slow] / 8) and factor == 1
    between = ~(fast | slow)
    assert between.any() and (slowed[between] < W[between]).all() and (slowed[between] > W[between] / 8).all()


def test_yarn_keeps_pairs_of_32_turns_and_slows_down_those_below_one():
    slowed, _ = stretched(W, THETA, YARN)
    fast, slow = turns() > 33, turns() < 0.7  # the ends of the ramp are rounded outwards, to whole pairs
    assert torch.equal(slowed[fast], W[fast])
    torch.testing.assert_close(slowed[slow], W[slow] / 4)
    assert (slowed[:-1] > slowed[1:]).all()


def test_the_ramp_without_rounding_has_its_ends_at_the_turns_that_are_named():
    # theta and L chosen so that pair 4 of 16 turns 8 times and pair 12 turns once: theta^(1/2) = 8.
    scaling = YARN | {
        "original_max_position_embeddings": 16 * math.pi * 8**0.5,
        "beta_fast": 8,
        "beta_slow": 1,
    }
    ramp = yarn_ramp(16, 64.0, scaling | {"truncate": False})
    expected = ((torch.arange(16) - 4) / 8).clamp(0, 1)
    torch.testing.assert_close(ramp, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings, factor",
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_cos_and_sin_grow_as_the_settings_say(settings, factor):
    assert yarn_factor(YARN | settings) == pytest.approx(factor, rel=1e-12)


def test_scores_of_unlike_lengths_grow_by_the_square_as_both_sides_are_rotated():
    from gpt import rope, rotate

    positions = torch.arange(6)[None]
    q, k = torch.randn(2, 1, 6, 1, K, generator=torch.Generator().manual_seed(0))
    plain = stretched(W, THETA, YARN)[0]
    cos, sin = rope(positions, THETA, K, YARN)
    angles = positions[..., None] * plain
    angles = torch.cat((angles, angles), -1)[:, :, None]
    without = (rotate(q, angles.cos(), angles.sin()) * rotate(k, angles.cos(), angles.sin())).sum(-1)
    grown = (rotate(q, cos, sin) * rotate(k, cos, sin)).sum(-1)
    torch.testing.assert_close(grown, without * magnitude(4.0, 1) ** 2)
