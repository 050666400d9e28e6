r"""Lattices: all segmentations of all words of a corpus, as arrays.

A word of n characters has n + 1 nodes, the places before, between and after its characters, and an edge from
node i to node j where the characters between i and j are a piece. A path from the first node to the last is a
segmentation. An edge from i to j with the piece v has the score s(v) = log p(v), and

    forward      a(j) = log of the sum of exp(a(i) + s(v)) over the edges to j
                 a(first) = 0,   a(last) = log P(word)
    share        q(edge) = exp(a(i) + s(v) - a(j)), the probability that a path to j comes by this edge
    backward     g(last) = count of the word;   for each edge to j:   g(i) += g(j) q,   c(v) += g(j) q

g is the expected number of paths through a node, and c that of the pieces: the gradient of the sum of
count * log P(word) by s. Viterbi's algorithm has a maximum in the place of the sum. One step of either
computes one node of every word at once. data/unigram.py trains with these functions.

Shapes: N nodes of all words, W characters of the longest piece, V pieces.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

# Lattices.ends has these numbers where there is no piece. As indices they are the last two of V + 2 scores.
UNKNOWN, NO_EDGE = -2, -1


def substrings(text: np.ndarray, counts: np.ndarray, longest: int) -> Iterator[tuple]:
    """Yield for n = 1, 2, ... the substrings of n characters that occur at least twice; for n = 1, all.

    text: (N,) characters as numbers, -1 between words. counts: (N,) how often the word at each place occurs.
    Each item is (which, count, first): the number of the substring that begins at each place, or -1, (N,);
    for each substring, how often it occurs, and the first place at which it begins.
    """
    N, n_chars = len(text), int(text.max()) + 1
    # A substring of n + 1 characters is one of n characters and the character after it. Its key is made of
    # the number of the former and that of the latter.
    keys = text
    for n in range(1, longest + 1):
        at = np.flatnonzero(keys >= 0)
        if len(at) == 0:
            return
        _, first, number = np.unique(keys[at], return_index=True, return_inverse=True)
        count, first = np.bincount(number, counts[at]), at[first]
        often = (count >= 2) | (n == 1)
        renumber = np.where(often, np.cumsum(often) - 1, -1)
        which = np.full(N, -1)
        which[at] = renumber[number]
        yield which, count[often], first[often]

        after = np.full(N, -1)
        after[: N - n] = text[n:]
        keys = np.where((which >= 0) & (after >= 0), which * n_chars + after, -1)


class Lattices:
    """The lattices of all words, the longest word first. Pieces are numbers, 0 to V - 1.

    joined   all words, with a zero character after each; its indices are the nodes
    inside   (N,) True for nodes with a character of their word before them: all but the first of each word
    starts   (n_words,) the first node of each word
    lengths  (n_words,) the characters of each word
    weights  (n_words,) how often each word occurs
    ends     (N, W) in column j the piece of j + 1 characters that ends at a node, or UNKNOWN, or NO_EDGE
    place    (V,) a node at which each piece begins
    size     (V,) the characters of each piece
    covers   (V,) size times occurrences of each piece; only for the first pieces: `keep` does not update it
    """

    def __init__(self, words: Counter[str], n_seeds: int, longest: int) -> None:
        """Make the lattices of words and their counts.

        The pieces are substrings of at most `longest` characters: first all single characters, then those
        that cover most of the text, until there are n_seeds.
        """
        ordered = sorted(words, key=lambda word: (-len(word), word))
        self.joined = "\0".join([*ordered, ""])
        self.lengths = np.array([len(word) for word in ordered])
        self.starts = np.concatenate(([0], np.cumsum(self.lengths + 1)[:-1]))
        self.weights = np.array([words[word] for word in ordered], float)
        self.inside = np.ones(len(self.joined), bool)
        self.inside[self.starts] = False

        # Find the substrings. One of two or more characters that is always followed by the same character
        # gets the frequency 0, which leaves it out: the longer one with this character is as frequent.
        text = np.frombuffer(self.joined.encode("utf-32-le"), np.uint32).astype(np.int64)
        text = np.where(text == 0, -1, text)
        levels = list(substrings(text, np.repeat(self.weights, self.lengths + 1), longest))
        frequency = [count.copy() for _, count, _ in levels]
        for (shorter, _, _), (longer, count, _), found in zip(
            levels[1:], levels[2:], frequency[1:], strict=False
        ):
            at = np.flatnonzero(longer >= 0)
            most = np.zeros(len(found))
            np.maximum.at(most, shorter[at], count[longer[at]])
            found[most == found] = 0

        # Take all single characters, then the substrings that cover most, until there are n_seeds.
        size = np.concatenate([np.full(len(found), n) for n, found in enumerate(frequency, 1)])
        covers = np.concatenate(frequency) * size
        order = np.argsort(np.where(size == 1, -np.inf, -covers), kind="stable")
        order = order[: max(n_seeds, len(frequency[0]))]
        order = order[covers[order] > 0]
        self.size, self.covers = size[order], covers[order]
        self.place = np.concatenate([first for _, _, first in levels])[order]

        # Number the edges by the pieces that are taken.
        renumber = np.full(len(size), NO_EDGE, np.int32)
        renumber[order] = np.arange(len(order))
        self.ends = np.full((len(text), len(levels)), NO_EDGE, np.int32)
        below = 0
        for j, (which, count, _) in enumerate(levels):
            at = np.flatnonzero(which >= 0)
            self.ends[at + j + 1, j] = renumber[below + which[at]]
            below += len(count)

    def pieces(self) -> list[str]:
        """Return the pieces as text, (V,)."""
        return [self.joined[i : i + n] for i, n in zip(self.place.tolist(), self.size.tolist(), strict=True)]

    def keep(self, kept: np.ndarray) -> None:
        """Keep only the pieces with these numbers, which become 0, 1, 2, ... in this order.

        A character that is no piece any more becomes an unknown one.
        """
        renumber = np.full(len(self.size) + 2, NO_EDGE, np.int32)
        renumber[UNKNOWN] = UNKNOWN
        renumber[kept] = np.arange(len(kept))
        self.ends = renumber[self.ends]
        self.ends[self.inside & (self.ends[:, 0] == NO_EDGE), 0] = UNKNOWN
        self.size, self.place = self.size[kept], self.place[kept]

    def steps(self) -> Iterator[np.ndarray]:
        """Yield for n = 1, 2, ... the node after n characters of each word that has at least n."""
        n_longer = np.searchsorted(-self.lengths, -np.arange(1, self.lengths[0] + 1), side="right")
        for step, n in enumerate(n_longer, 1):
            yield self.starts[:n] + step

    def expected_counts(self, log_p: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the expected number of each piece in all words, (V,), and the sum of count * log P(word).

        The expectation is over the segmentations of each word, with their probabilities.

        log_p: (V + 2,), of the pieces, of an unknown character, and minus infinity where there is no edge.
        """
        # Forward: total is a, share is q of the edges to each node, by their length.
        N, W = self.ends.shape
        back = np.arange(1, W + 1)
        total, share, steps = np.zeros(N), np.zeros((N, W)), list(self.steps())
        for step, nodes in enumerate(steps, 1):
            n = min(step, W)
            edges = total[nodes[:, None] - back[:n]] + log_p[self.ends[nodes, :n]]
            highest = edges.max(1, keepdims=True)
            edges = np.exp(edges - highest)
            sums = edges.sum(1, keepdims=True)
            total[nodes] = (highest + np.log(sums))[:, 0]
            share[nodes, :n] = edges / sums

        # Backward, from the last nodes: through is g; share becomes g(j) q.
        last, through = self.starts + self.lengths, np.zeros(N)
        through[last] = self.weights
        for step, nodes in reversed(list(enumerate(steps, 1))):
            n = min(step, W)
            share[nodes, :n] *= through[nodes, None]
            for j in range(n):
                through[nodes - j - 1] += share[nodes, j]
        counts = np.bincount(self.ends.ravel() + 2, share.ravel(), len(self.size) + 2)
        return counts[2:], float(self.weights @ total[last])

    def best_counts(self, log_p: np.ndarray) -> np.ndarray:
        """Return how often each piece occurs in the best segmentations of all words, (V,)."""
        # The score of the best path to each node, and the column in `ends` of its last edge.
        N, W = self.ends.shape
        back = np.arange(1, W + 1)
        best, choice = np.zeros(N), np.zeros(N, np.int64)
        for step, nodes in enumerate(self.steps(), 1):
            n = min(step, W)
            edges = best[nodes[:, None] - back[:n]] + log_p[self.ends[nodes, :n]]
            choice[nodes] = edges.argmax(1)
            best[nodes] = edges.max(1)

        # Follow the choices back, one piece of every word at a time.
        counts = np.zeros(len(self.size) + 2)
        nodes, starts, weights = self.starts + self.lengths, self.starts, self.weights
        while len(nodes) > 0:
            edges = choice[nodes]
            counts += np.bincount(self.ends[nodes, edges] + 2, weights, len(counts))
            nodes = nodes - edges - 1
            left = nodes > starts
            nodes, starts, weights = nodes[left], starts[left], weights[left]
        return counts[2:]

    def alternatives(self, log_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best segmentation of each piece into others: its score (V,), and its pieces (V, W).

        The score is minus infinity where there is none. A row has the pieces from the last to the first, and
        then NO_EDGE.
        """
        # Viterbi's algorithm within each piece, at the place where it begins. Columns are characters of it.
        W, V = self.ends.shape[1], len(self.size)
        back = np.arange(1, W + 1)
        log_p = np.where(np.arange(V + 2) < V, log_p, -np.inf)  # no unknown characters
        best, choice = np.zeros((V, W + 1)), np.zeros((V, W + 1), np.int64)
        for step in range(1, W + 1):
            some = np.flatnonzero(self.size >= step)
            edges = log_p[self.ends[self.place[some] + step, :step]] + best[some][:, step - back[:step]]
            edges[self.size[some] == step, step - 1] = -np.inf  # the piece itself
            choice[some, step], best[some, step] = edges.argmax(1), edges.max(1)

        # Follow the choices back, one part of every piece at a time.
        parts, at, rows = np.full((V, W), NO_EDGE), self.size.copy(), np.arange(V)
        for column in range(W):
            left = at > 0
            some, nodes = rows[left], at[left]
            edges = choice[some, nodes]
            parts[some, column] = self.ends[self.place[some] + nodes, edges]
            at[left] -= edges + 1
        score = best[rows, self.size]
        parts[~np.isfinite(score)] = NO_EDGE
        return score, parts
