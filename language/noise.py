"""Draws from a distribution of many words in constant time: the alias method (Walker 1977, Vose 1991).

Negatives of word2vec (word2vec.py) come from P(n) ~ count(n)^0.75, one draw for each word of the text. A
search in cumulative sums takes log2 V steps for a draw. Here the V words are V columns of height 1, cut from
bars of height V P(n): each column has at most two words, its own below, and above it a part of a word that
has more than 1. A draw is a column, and a height in it.
"""

import torch
from torch import Generator, Tensor


class Noise:
    """The distribution of V words in proportion to count ** power."""

    def __init__(self, counts: Tensor, power: float):
        """counts: (V,), positive. Takes time in proportion to V."""
        self.p = counts.double() ** power  # (V,)
        self.p /= self.p.sum()
        height = (self.p * len(self.p)).tolist()
        above = list(range(len(height)))

        # A column that is not full is filled up from a bar that is too high, as long as there are both.
        small = [i for i, h in enumerate(height) if h < 1]
        large = [i for i, h in enumerate(height) if h >= 1]
        while small and large:
            low, high = small.pop(), large[-1]
            above[low] = high
            height[high] -= 1 - height[low]
            if height[high] < 1:
                small.append(large.pop())
        # What is left is 1 up to rounding.
        for i in small + large:
            height[i] = 1.0
        self.below, self.above = torch.tensor(height), torch.tensor(above)

    def draw(self, *shape: int, generator: Generator) -> Tensor:
        """Return words, int64 of this shape."""
        column = torch.randint(len(self.above), shape, generator=generator)
        height = torch.rand(shape, generator=generator)
        return torch.where(height < self.below[column], column, self.above[column])
