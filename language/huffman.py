"""Huffman's code: the prefix code of the shortest mean length (Huffman 1952).

In a prefix code no code is the beginning of another, so that codes can follow each other without a separator.
The symbols are the leaves of a binary tree. The two rarest become the children of a new node, whose count is
the sum of theirs; this is repeated with the nodes that have no parent yet, until one is left, the root. The
code of a symbol is the way from the root to its leaf, one bit for each inner node on it. No other prefix code
has a smaller

    sum over symbols v of count(v) * length(v)  =  sum over inner nodes of their count

and the mean length is less than one bit above the entropy of the symbols. Hierarchical softmax (word2vec.py)
predicts a word by the bits of its code, so frequent words take few dot products.

    python -m language.huffman       the code of six words, and its mean length beside the entropy

Shapes: V symbols, V - 1 inner nodes, P bits of the longest code.
"""

from typing import NamedTuple

import numpy as np

from formats import command


class Code(NamedTuple):
    """The codes of V symbols, each from the root on, padded with node 0 and bit 0 after its end."""

    lengths: np.ndarray  # int64 (V,): bits of each code
    nodes: np.ndarray  # int64 (V, P): the inner nodes on the way, 0 to V - 2; the root is V - 2
    bits: np.ndarray  # uint8 (V, P): which child of each of these nodes is next on the way


def huffman(counts: np.ndarray) -> Code:
    """Return an optimal prefix code for symbols of these counts (V,), positive integers.

    Among equal counts leaves come before inner nodes, which makes the longest code as short as it can be.
    Raises ValueError for fewer than two symbols, and for counts below 1.
    """
    counts = np.asarray(counts, dtype=np.int64)
    n = len(counts)
    if n < 2:
        raise ValueError(f"{n} symbols: a code needs at least 2")
    if counts.min() < 1:
        raise ValueError(f"a count of {counts.min()}: expected counts of at least 1")

    # Nodes 0 to n - 1 are the leaves, the rarest first, and n to 2 n - 2 the inner nodes. These are made in
    # ascending order of their counts. So both are sorted queues, and the rarest node is first in one of them.
    order = np.argsort(counts, kind="stable")
    weight = np.append(counts[order], np.zeros(n - 1, np.int64)).tolist()
    parent, bit = np.zeros(2 * n - 1, np.int64), np.zeros(2 * n - 1, np.uint8)
    leaf, inner = 0, n
    for node in range(n, 2 * n - 1):
        for side in (0, 1):
            if leaf < n and (inner == node or weight[leaf] <= weight[inner]):
                child, leaf = leaf, leaf + 1
            else:
                child, inner = inner, inner + 1
            parent[child], bit[child] = node, side
            weight[node] += weight[child]

    # A parent has a higher number than its children, so one pass from the root down finds every depth.
    depth = np.zeros(2 * n - 1, np.int64)
    for node in range(2 * n - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1

    # Walk up from all leaves at once, and write each code from its end to its beginning. at: the node that
    # each leaf has reached.
    lengths = depth[:n]
    nodes, bits = np.zeros((n, lengths.max()), np.int64), np.zeros((n, lengths.max()), np.uint8)
    at, leaves = np.arange(n), np.arange(n)
    for step in range(lengths.max()):
        leaves = leaves[lengths[leaves] > step]
        place = lengths[leaves] - 1 - step
        bits[leaves, place] = bit[at[leaves]]
        at[leaves] = parent[at[leaves]]
        nodes[leaves, place] = at[leaves] - n

    # Put the codes into the order of the symbols.
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    return Code(lengths[rank], nodes[rank], bits[rank])


def main(argv: list[str] | None = None) -> None:
    command.Parser(description="Print Huffman's code of six words, and its mean length.").parse_args(argv)
    words = {"self": 40, "the": 21, "if": 19, "return": 12, "none": 5, "huffman": 3}
    counts = np.array(list(words.values()))
    code, p = huffman(counts), counts / counts.sum()
    for word, n, length, bits in zip(words, counts, code.lengths, code.bits, strict=True):
        print(f"{word:10} {n:3}  {''.join(map(str, bits[:length]))}")
    print(f"mean length {p @ code.lengths:.3f} bits; entropy {-(p @ np.log2(p)):.3f}; equal lengths 3")


if __name__ == "__main__":
    command.run(main)
