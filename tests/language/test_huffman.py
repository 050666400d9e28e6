"""language/huffman.py: the code is prefix-free, and no code has a smaller total length."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language import huffman
from language.huffman import huffman as code_of

COUNTS = st.lists(st.integers(1, 10**6), min_size=2, max_size=60)


def smallest_total(counts) -> int:
    """Return the sum of count * length of an optimal code: the sum of all inner nodes of Huffman's tree."""
    heap, total = list(map(int, counts)), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


def texts(code) -> list[str]:
    return ["".join(map(str, bits[:n])) for bits, n in zip(code.bits, code.lengths, strict=True)]


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_the_code_is_optimal_and_prefix_free(counts):
    code = code_of(np.array(counts))
    assert counts @ code.lengths == smallest_total(counts)
    found = sorted(texts(code))  # where one is a prefix of another, it is so of its neighbour
    assert not any(b.startswith(a) for a, b in itertools.pairwise(found))
    assert sum(2.0 ** -int(n) for n in code.lengths) == 1.0  # Kraft: the code is complete


@settings(max_examples=50, deadline=None)
@given(COUNTS)
def test_the_nodes_of_a_code_are_those_on_the_way_from_the_root(counts):
    code = code_of(np.array(counts))
    # What was decided before a node is the same for all words below it, and each node is one prefix.
    prefix = {}
    for text, nodes, n in zip(texts(code), code.nodes, code.lengths, strict=True):
        assert nodes[0] == len(counts) - 2
        for i in range(n):
            assert prefix.setdefault(int(nodes[i]), text[:i]) == text[:i]
    assert sorted(prefix) == list(range(len(counts) - 1)) and len(set(prefix.values())) == len(prefix)


def test_equal_counts_of_a_power_of_two_give_equal_lengths():
    assert code_of(np.full(64, 7)).lengths.tolist() == [6] * 64


def test_counts_that_have_no_code_are_refused():
    with pytest.raises(ValueError, match="needs at least 2"):
        code_of(np.array([3]))
    with pytest.raises(ValueError, match="count of 0"):
        code_of(np.array([3, 0]))


def test_the_command_prints_a_code(capsys):
    huffman.main([])  # the inner nodes: 8 + 20 + 39 + 60 + 100 = 227, of 100 words
    assert "mean length 2.270 bits; entropy 2.192" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        huffman.main(["--words", "6"])
