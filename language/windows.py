"""Windows: the words that stand near each word of a text, drawn anew in every epoch of word2vec.

Frequent words are removed before windows are drawn, so that these reach across what is removed. An occurrence
of a word that makes up a share f of the text is kept with the probability

    (sqrt(f / t) + 1) t / f         the authors' code, from 1 on always; the paper has sqrt(t / f)

The window of each word reaches r words to either side, with r uniform in 1 ... w: a word at distance d is in
it with probability (w - d + 1) / w. The text is cut into blocks of L neighbouring words, which come in random
order. The windows of a block are rows of a mask over its span, so that word2vec.py multiplies matrices.

Shapes: N blocks, L words of a block, S = L + 2 w words of its span, T words of a text, V of the vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from language.noise import Noise

PREPARED = 4096  # words of a batch


class Batch(NamedTuple):
    """Blocks of neighbouring words."""

    spans: Tensor  # int64 (N, S): the words of each block, with `window` more on either side
    mask: Tensor  # (N, L, S): 1 where a word of the span is in the window of a word of the block
    drawn: Tensor  # int64 (N, L): negatives; the i-th of all blocks are for the i-th words of all blocks


def centres_of(batch: Batch) -> Tensor:
    """Return the words (N, L) of the blocks, without the rest of their spans."""
    L, S = batch.mask.shape[1:]
    return batch.spans[:, (S - L) // 2 : (S + L) // 2]


def means(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (N, L, S) of the mean of each window, and 1 or 0 (N, L, 1): does it hold a word?"""
    n = mask.sum(-1, keepdim=True)
    return mask / n.clamp(min=1), (n > 0).to(mask.dtype)


def keep_probability(counts: Tensor, t: float) -> Tensor:
    """Return the probability (V,) with which an occurrence of each word is kept; from 1 on it always is."""
    share = counts.double() / counts.sum()
    return ((share / t).sqrt() + 1) * t / share


def batches(
    ids: Tensor,
    documents: Tensor,
    noise: Noise,
    window: int,
    length: int,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Batch]:
    """Yield the batches of one epoch: all blocks of `length` words of the text ids (T,), in random order.

    No window leaves the document of its word: documents (T,) has the number of each word's, 0 or more. dtype:
    of the mask.
    """
    # Cut the words into blocks of L, each with a margin. The text ends in words of no document.
    w, L = window, length
    n_blocks = math.ceil(len(ids) / L)
    margin = (w, n_blocks * L - len(ids) + w)
    spans = F.pad(ids, margin).unfold(0, L + 2 * w, L)  # (n_blocks, S)
    places = F.pad(documents.int(), margin, value=-1).unfold(0, L + 2 * w, L)

    distance = (torch.arange(L)[:, None] + w - torch.arange(L + 2 * w)).abs().short()  # (L, S)
    distance[distance == 0] = w + 1  # no word is in its own window
    for chosen in torch.randperm(n_blocks, generator=generator).split(PREPARED // L):
        there = places[chosen]
        own = there[:, w : w + L, None]  # (N, L, 1)
        radius = torch.randint(1, w + 1, own.shape, generator=generator).short()
        mask = (distance <= radius) & (there[:, None] == own) & (own >= 0)
        drawn = noise.draw(len(chosen), L, generator=generator)
        yield Batch(spans[chosen], mask.to(dtype), drawn)
