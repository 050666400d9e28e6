"""Draws from a distribution over V words in constant time: the alias method (Walker 1977, Vose 1991).

The negatives of word2vec.py are drawn from P(n) ~ count(n)^0.75, one for each word of the text. A search in
the cumulative sums of P would take log2 V steps for each draw. Here each word n has a bar of height V P(n),
1 in the mean. Bars above 1 are cut, and their pieces put on bars below 1, until there are V columns of height
1. Column n then holds word n below, and above it at most one other word. A draw is a uniform column and a
uniform height in it, and takes the word that is there.
"""

import torch
from torch import Generator, Tensor


class Noise:
    """The distribution over V words in proportion to count ** power: p (V,) float64, and its columns."""

    def __init__(self, counts: Tensor, power: float):
        """Make the columns in time proportional to V. counts: (V,), positive."""
        self.p = counts.double() ** power  # (V,)
        self.p /= self.p.sum()
        height = (self.p * len(self.p)).tolist()
        above = list(range(len(height)))

        # Fill a column below 1 with a piece of a bar above 1, as long as there are both.
        small = [i for i, h in enumerate(height) if h < 1]
        large = [i for i, h in enumerate(height) if h >= 1]
        while small and large:
            low, high = small.pop(), large[-1]
            above[low] = high
            height[high] -= 1 - height[low]
            if height[high] < 1:
                small.append(large.pop())
        # The columns that are left have height 1 but for rounding.
        for i in small + large:
            height[i] = 1.0
        self.below, self.above = torch.tensor(height), torch.tensor(above)

    def draw(self, *shape: int, generator: Generator) -> Tensor:
        """Return words drawn from the distribution, int64 of this shape."""
        column = torch.randint(len(self.above), shape, generator=generator)
        height = torch.rand(shape, generator=generator)
        return torch.where(height < self.below[column], column, self.above[column])
