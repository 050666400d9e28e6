r"""word2vec: vectors of words, learned from which words stand near each other.

Every word w has two vectors: v_w, with which it predicts, and u_w, with which it is predicted. A pair of a
word and one that stands near it is told from pairs with a drawn word n (Mikolov et al. 2013b, 1310.4546,
equation 4):

    skip-gram    -log s(u_c . v_w) - sum over k drawn n of log s(-u_n . v_w)          s: the sigmoid
    CBOW         the same with c the word in the middle, and for v_w the mean of the v of the words around it

This is *negative sampling*. The drawn words come from P(n) ~ count(n)^0.75. *Hierarchical softmax* predicts c
by the bits of its Huffman code instead (huffman.py), with a vector u for each inner node of the tree:

    -sum over the nodes j on the way to c of log s(+-u_j . v_w)         + for bit 0, - for bit 1

The window of each word is drawn from 1 to `window`, so that near words count more. Frequent words are removed
before that, each occurrence kept with probability (sqrt(f / t) + 1) t / f for a share f of the text (the
authors' code; the paper has sqrt(t / f)), and windows reach across what is removed.

What it converges to is known. Let n(w, c) be the pairs, and P(c) what negatives are drawn from. Then each dot
product has a minimum of its own (Levy and Goldberg 2014, section 3), reached where vectors are long enough:

    u_c . v_w = log(n(w, c) / (n(w) P(c))) - log k          the pointwise mutual information, less log k

**One batch.** Pair by pair, this is a hundred numbers at a time, and far from what a processor can do. Here a
*block* of L neighbouring words is one product of matrices: its L words by the L + 2 window words of its span
(of which a mask keeps the windows), and by L drawn words that the block shares. With shared negatives each
counts k / L per pair, which leaves the expected gradient as it is. The file's four kinds of training differ in
what predicts and what is predicted (`skip_gram`, `cbow`, `skip_gram_tree`, `cbow_tree`), and share the step:

    error = positive - (positive + negative) * s(X Y^T),     X += lr error Y,     Y += lr error^T X

CBOW's gradient is that of the mean: the error reaches each of n context words divided by n. The authors' code and
gensim do not divide (gensim's issue 1873; Irsoy et al. 2020, 2012.15332), which is a larger step, longer the
more words there are; `undivided` does the same.

    python -m language.word2vec                         two minutes on Python's library; neighbours, analogies
    python -m language.analogies runs/word2vec/vectors.bin --near encode

Shapes: V words, D width, N blocks, L words of a block, S = L + 2 window words of its span, P bits of a code.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data.rows import seed_of
from formats import command
from formats.progress import progress_bar
from language.huffman import huffman
from language.word_corpus import WordCorpus, encode, words_of

BLOCK = 16  # L, words


@dataclass(frozen=True)
class Config:
    architecture: str = "cbow"  # or skip_gram
    hierarchical: bool = False  # hierarchical softmax instead of negative sampling
    d_model: int = 100
    window: int = 5  # words on either side, at most
    negatives: int = 5  # k, for each pair
    noise_power: float = 0.75  # negatives are drawn from count ** noise_power
    subsample: float = 1e-3  # t, a share of the text; 0 keeps every word
    undivided: bool = False  # CBOW with the gradient of the authors' code
    epochs: int = 15
    lr: float = 0.075  # falls linearly to 1e-4 of it
    batch_size: int = 512  # words


class Vectors(NamedTuple):
    """All parameters: 2 V D with negative sampling, (2 V - 1) D with a tree."""

    input: Tensor  # (V, D): v, what is saved and compared
    output: Tensor  # (V, D): u of each word; or (V - 1, D): of each inner node


class Tree(NamedTuple):
    """The Huffman codes of all words, padded to P bits, as floating-point numbers."""

    nodes: Tensor  # int64 (V, P)
    zeros: Tensor  # (V, P): 1 where the bit is 0, else 0
    inside: Tensor  # (V, P): 1 within the code, 0 behind its end


class Batch(NamedTuple):
    """Blocks of neighbouring words."""

    spans: Tensor  # int64 (N, S): the words of each block, with `window` more on either side
    mask: Tensor  # (N, L, S): 1 where a word of the span is in the window of a word of the block
    drawn: Tensor  # int64 (N, L): negatives, shared by the words of a block


class Terms(NamedTuple):
    """The terms of a loss: I predictions in each block, of J binary decisions each."""

    read: Tensor  # int64 (N, R): the words whose v the predictions are made of
    mix: Tensor | None  # (N, I, R): their weights in each prediction; None: I = R, each predicts alone
    predicted: Tensor  # int64 (N, J): the words, or inner nodes, whose u are multiplied with it
    positive: Tensor  # (N, I, J): how often log s(u . v) counts
    total: Tensor  # (N, I, J): how often log s(u . v) or log s(-u . v) counts


# --- what predicts, and what is predicted


def skip_gram(batch: Batch, k: int) -> Terms:
    """Return the terms of skip-gram: each word of a block predicts those of its window, and no drawn one."""
    centres, pairs = centres_of(batch), batch.mask.sum(-1, keepdim=True)  # (N, L), (N, L, 1)
    N, L, S = batch.mask.shape
    total = batch.mask.new_empty(N, L, S + L)
    total[:, :, :S], total[:, :, S:] = batch.mask, pairs * (k / L)
    positive = F.pad(batch.mask, (0, L))
    return Terms(centres, None, torch.cat((batch.spans, batch.drawn), 1), positive, total)


def cbow(batch: Batch, k: int) -> Terms:
    """Return the terms of CBOW: the mean of a window predicts the word in its middle, and no drawn one."""
    mean, filled = means(batch.mask)  # (N, L, S), (N, L, 1)
    N, L, _ = batch.mask.shape
    total = batch.mask.new_empty(N, L, 2 * L)
    total[:, :, :L], total[:, :, L:] = torch.eye(L, dtype=mean.dtype) * filled, filled * (k / L)
    positive = F.pad(total[:, :, :L], (0, L))
    return Terms(batch.spans, mean, torch.cat((centres_of(batch), batch.drawn), 1), positive, total)


def skip_gram_tree(batch: Batch, tree: Tree) -> Terms:
    """Return the terms of skip-gram for blocks of one word: the words of its window predict its code.

    So does the authors' code. Over a whole text the pairs are the same either way.
    """
    code = centres_of(batch)[:, 0]  # (N,)
    window = batch.mask.mT  # (N, S, 1)
    zeros, inside = tree.zeros[code][:, None], tree.inside[code][:, None]  # (N, 1, P)
    return Terms(batch.spans, None, tree.nodes[code], window * zeros, window * inside)


def cbow_tree(batch: Batch, tree: Tree) -> Terms:
    """Return the terms of CBOW for blocks of one word: the mean of its window predicts its code."""
    code = centres_of(batch)[:, 0]
    mean, filled = means(batch.mask)  # (N, 1, S), (N, 1, 1)
    zeros, inside = tree.zeros[code][:, None], tree.inside[code][:, None]
    return Terms(batch.spans, mean, tree.nodes[code], filled * zeros, filled * inside)


def centres_of(batch: Batch) -> Tensor:
    """Return the words (N, L) of the blocks, without the rest of their spans."""
    L, S = batch.mask.shape[1:]
    return batch.spans[:, (S - L) // 2 : (S + L) // 2]


def means(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (N, L, S) of the mean of each window, and 1 or 0 (N, L, 1): does it hold a word?"""
    n = mask.sum(-1, keepdim=True)
    return mask / n.clamp(min=1), (n > 0).to(mask.dtype)


# --- a step


def update(vectors: Vectors, terms: Terms, lr: float, undivided: bool = False) -> tuple[Tensor, Tensor]:
    """Make one step of gradient descent in place, on the sum of the terms.

    A word that occurs several times in the batch gets the sum of its gradients, all at the vectors before the
    step. undivided: see the header. Returns the scores X Y^T (N, I, J) before the step, for `loss`.
    """
    # What predicts (N, I, D), what is predicted (N, J, D), and lr times minus the derivative of the loss.
    read, y = F.embedding(terms.read, vectors.input), F.embedding(terms.predicted, vectors.output)
    x = read if terms.mix is None else terms.mix @ read
    scores = x @ y.mT
    error = torch.addcmul(terms.positive, terms.total, scores.sigmoid(), value=-1).mul_(lr)

    # The gradient of a mean goes back to its words in the shares that they have in it.
    dx, dy = error @ y, error.mT @ x
    if terms.mix is not None:
        dx = ((terms.mix > 0).to(dx.dtype) if undivided else terms.mix).mT @ dx
    vectors.input.index_add_(0, terms.read.flatten(), dx.flatten(0, 1))
    vectors.output.index_add_(0, terms.predicted.flatten(), dy.flatten(0, 1))
    return scores


def loss(scores: Tensor, terms: Terms) -> Tensor:
    """Return the sum of the terms in nats: of -log s(score), and of -log s(-score), as often as each counts."""
    return (terms.total * F.softplus(scores) - terms.positive * scores).sum()


# --- the data of an epoch


def keep_probability(counts: Tensor, t: float) -> Tensor:
    """Return the probability (V,) with which an occurrence of each word is kept; from 1 on it always is."""
    share = counts.double() / counts.sum()
    return ((share / t).sqrt() + 1) * t / share


class Noise:
    """The distribution of negatives, count ** power: drawn in constant time (Walker 1977, Vose 1991).

    The V words are V columns of height 1, cut from bars of height V P(n): each column has at most two words,
    its own below, and above it a part of a word that has more than 1. A draw is a column, and a height in it.
    """

    def __init__(self, counts: Tensor, power: float):
        height = counts.double() ** power
        height = (height * (len(height) / height.sum())).tolist()
        self.above = list(range(len(height)))
        small = [i for i, h in enumerate(height) if h < 1]
        large = [i for i, h in enumerate(height) if h >= 1]
        while small and large:
            low, high = small.pop(), large[-1]
            self.above[low] = high
            height[high] -= 1 - height[low]
            if height[high] < 1:
                small.append(large.pop())
        # What is left is 1 up to rounding.
        for i in small + large:
            height[i] = 1.0
        self.below, self.above = torch.tensor(height), torch.tensor(self.above)

    def draw(self, *shape: int, generator: Generator) -> Tensor:
        """Return words, int64 of this shape."""
        column = torch.randint(len(self.above), shape, generator=generator)
        height = torch.rand(shape, generator=generator)
        return torch.where(height < self.below[column], column, self.above[column])


def batches(
    ids: Tensor, documents: Tensor, noise: Noise, config: Config, generator: Generator, dtype=torch.float32
) -> Iterator[Batch]:
    """Yield the batches of one epoch: all blocks of the words ids (T,), in random order.

    No window leaves the document of its word: documents (T,) has the number of each word's, 0 or more.
    """
    # Cut the words into blocks of L, each with a margin. The text ends in words of no document.
    w, L = config.window, 1 if config.hierarchical else BLOCK
    n_blocks = math.ceil(len(ids) / L)
    margin = (w, n_blocks * L - len(ids) + w)
    spans = F.pad(ids, margin).unfold(0, L + 2 * w, L)  # (n_blocks, S)
    places = F.pad(documents.int(), margin, value=-1).unfold(0, L + 2 * w, L)

    distance = (torch.arange(L)[:, None] + w - torch.arange(L + 2 * w)).abs().short()  # (L, S)
    distance[distance == 0] = w + 1  # no word is in its own window
    for chosen in torch.randperm(n_blocks, generator=generator).split(max(1, config.batch_size // L)):
        there = places[chosen]
        own = there[:, w : w + L, None]  # (N, L, 1)
        radius = torch.randint(1, w + 1, own.shape, generator=generator).short()
        mask = (distance <= radius) & (there[:, None] == own) & (own >= 0)
        drawn = noise.draw(len(chosen), L, generator=generator)
        yield Batch(spans[chosen], mask.to(dtype), drawn)


# --- training


def new_vectors(corpus: WordCorpus, config: Config, generator: Generator) -> Vectors:
    """Return v, uniform within 0.5 / D of 0, and u, which is 0."""
    V, D = len(corpus.words), config.d_model
    v = (torch.rand(V, D, generator=generator) - 0.5) / D
    return Vectors(v, torch.zeros(V - config.hierarchical, D))


def tree_of(corpus: WordCorpus) -> Tree:
    """Return the Huffman code of a corpus' words."""
    code = huffman(corpus.counts)
    inside = torch.arange(code.nodes.shape[1]) < torch.from_numpy(code.lengths)[:, None]
    zeros = torch.from_numpy(code.bits == 0) & inside
    return Tree(torch.from_numpy(code.nodes), zeros.float(), inside.float())


MEASURED = 16  # the loss is that of each 16th batch


def train(
    corpus: WordCorpus, config: Config, seed: int = 0, watch: Callable[[int, float], None] = lambda *_: None
) -> Vectors:
    """Return vectors learned from a corpus. watch(epoch, mean loss of a prediction) is called after each."""
    counts, ids = torch.from_numpy(corpus.counts), torch.from_numpy(corpus.ids)
    documents = torch.from_numpy(corpus.documents)
    keep = keep_probability(counts, config.subsample).float() if config.subsample else None
    noise = Noise(counts, config.noise_power)
    tree = tree_of(corpus) if config.hierarchical else None
    make = {
        (False, False): cbow,
        (True, False): skip_gram,
        (False, True): cbow_tree,
        (True, True): skip_gram_tree,
    }
    terms_of = make[config.architecture == "skip_gram", config.hierarchical]
    what = tree if config.hierarchical else config.negatives

    vectors = new_vectors(corpus, config, Generator().manual_seed(seed))
    for epoch in range(config.epochs):
        generator = Generator().manual_seed(seed_of(seed, epoch))
        kept = (
            torch.ones_like(ids, dtype=torch.bool)
            if keep is None
            else torch.rand(len(ids), generator=generator) < keep[ids]
        )
        total, n, done, n_kept = torch.zeros(()), 0, 0, int(kept.sum())
        for i, batch in enumerate(batches(ids[kept], documents[kept], noise, config, generator)):
            progress = (epoch + done / n_kept) / config.epochs
            terms = terms_of(batch, what)
            scores = update(vectors, terms, config.lr * max(1 - progress, 1e-4), config.undivided)
            if i % MEASURED == 0:
                total += loss(scores, terms)
                n += len(batch.spans) * batch.mask.shape[1]
            done += len(batch.spans) * batch.mask.shape[1]
        watch(epoch, total.item() / n)
    return vectors
