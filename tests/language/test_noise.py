"""language/noise.py: draws have the distribution that they should have."""

import torch
from torch import Generator

from language.noise import Noise


def test_the_columns_hold_the_distribution_exactly():
    counts = torch.randint(1, 10_000, (500,), generator=Generator().manual_seed(0))
    noise, n = Noise(counts, 0.75), len(counts)
    # Column i gives its own word `below` of its height, and the rest to another one.
    below = noise.below.double()
    p = (below / n).index_add(0, noise.above, (1 - below) / n)
    expected = counts.double() ** 0.75
    torch.testing.assert_close(p, expected / expected.sum(), rtol=0, atol=1e-8)  # heights are float32
    torch.testing.assert_close(noise.p, expected / expected.sum(), rtol=1e-12, atol=0)


def test_draws_occur_as_often_as_their_probability():
    noise, n = Noise(torch.tensor([100, 1, 10, 1]), 1.0), 200_000
    drawn = noise.draw(n // 4, 4, generator=Generator().manual_seed(1))
    assert drawn.shape == (n // 4, 4)
    share = torch.bincount(drawn.flatten(), minlength=4) / n
    error = (noise.p * (1 - noise.p) / n).sqrt()
    assert ((share - noise.p).abs() < 4.5 * error).all()
