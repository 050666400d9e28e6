"""Windows: the words that stand near each word of a text, drawn again in every epoch of word2vec.

Some occurrences of frequent words are removed before windows are drawn, so that a window reaches across the
gaps. An occurrence of a word that makes up a share f of the text is kept with the probability

    (sqrt(f / t) + 1) t / f         word2vec's own code; always where this is 1 or more
    sqrt(t / f)                     the paper (Mikolov et al. 2013b, 1310.4546, section 2.3); not used here

The window of each word reaches r words to either side, with r uniform in 1 ... w, so a word at distance d is
in it with probability (w - d + 1) / w. The text is cut into blocks of L neighbouring words, and the blocks
are put in random order. The span of a block is the block and w more words on either side. The windows of a
block are rows of a mask over its span, so that word2vec.py can multiply matrices.

Shapes: N blocks, L words of a block, S = L + 2 w words of its span, T words of a text, V of the vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from language.noise import Noise

PREPARED = 4096  # words of a batch, many steps of word2vec.py: fewer and larger draws and gathers are faster


class Batch(NamedTuple):
    """N blocks of neighbouring words, with their windows and negatives."""

    spans: Tensor  # int64 (N, S): the words of each block, and `window` more on either side
    mask: Tensor  # (N, L, S): 1 where a word of the span is in the window of a word of the block
    drawn: Tensor  # int64 (N, L): negatives; those of column i are for the i-th words of all blocks


def centres_of(batch: Batch) -> Tensor:
    """Return the words (N, L) of the blocks, without the rest of their spans."""
    L, S = batch.mask.shape[1:]
    return batch.spans[:, (S - L) // 2 : (S + L) // 2]


def means(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (N, L, S) of the mean of each window, and (N, L, 1): 1 if it has a word, else 0."""
    n = mask.sum(-1, keepdim=True)
    return mask / n.clamp(min=1), (n > 0).to(mask.dtype)


def keep_probability(counts: Tensor, t: float) -> Tensor:
    """Return the probability (V,), float64, with which an occurrence of each word is kept.

    counts: (V,). t: the share of the text above which words are removed. Values above 1 mean always.
    """
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
    """Yield the batches of one epoch: all blocks of `length` words of a text, in random order.

    ids: int64 (T,), T > 0. documents: int64 (T,), the number of the document of each word, 0 or more; no
    window leaves the document of its word. window: the largest r. dtype: of the mask.
    """
    # Cut the text into blocks of L with their spans. It is padded with words of document -1 at both ends.
    w, L = window, length
    n_blocks = math.ceil(len(ids) / L)
    margin = (w, n_blocks * L - len(ids) + w)
    spans = F.pad(ids, margin).unfold(0, L + 2 * w, L)  # (n_blocks, S)
    documents = F.pad(documents.int(), margin, value=-1).unfold(0, L + 2 * w, L)

    # A word is in a window if it is near enough, and in the same document, which is not the padding.
    distance = (torch.arange(L)[:, None] + w - torch.arange(L + 2 * w)).abs().short()  # (L, S)
    distance[distance == 0] = w + 1  # no word is in its own window
    for chosen in torch.randperm(n_blocks, generator=generator).split(PREPARED // L):
        of_span = documents[chosen]  # (N, S)
        own = of_span[:, w : w + L, None]  # (N, L, 1)
        radius = torch.randint(1, w + 1, own.shape, generator=generator).short()
        mask = (distance <= radius) & (of_span[:, None] == own) & (own >= 0)
        drawn = noise.draw(len(chosen), L, generator=generator)
        yield Batch(spans[chosen], mask.to(dtype), drawn)
