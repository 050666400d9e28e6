"""The index against TF-IDF by its equation and scikit-learn; what a search leaves out; overlaps."""

import math
from collections import Counter
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from language.retrieval import Index, common_run, find_all, own_chunks, terms_of

EOT = 7


def text(n, n_vocab=7, seed=0):
    """Return n random tokens below n_vocab."""
    return np.random.default_rng(seed).integers(n_vocab, size=n).astype(np.uint16)


def test_terms_are_numbers_of_their_own():
    runs = np.array([[1, 2, 3], [3, 2, 1], [1, 2, 2], [0, 0, 1], [0, 1, 0], [2**21 - 1] * 3])
    assert len(np.unique(terms_of(runs))) == len(runs) and terms_of(runs).shape == (6, 1)


def runs(chunk):
    return Counter(tuple(chunk[i : i + 3].tolist()) for i in range(len(chunk) - 2))


@pytest.mark.parametrize("n_vocab", [4, 7, 60])  # nearly all terms frequent, some, none
def test_scores_are_those_of_the_equation_term_by_term(n_vocab):
    m, tokens = 10, text(1505, n_vocab)
    chunks = [runs(chunk) for chunk in tokens[:1500].reshape(-1, m)]
    n_chunks_with = Counter(term for chunk in chunks for term in chunk)
    idf = {term: math.log(150 / n) + 1 for term, n in n_chunks_with.items() if n <= 15}  # a tenth

    def weights(chunk):
        found = {term: n * idf[term] for term, n in chunk.items() if term in idf}
        norm = math.sqrt(sum(w * w for w in found.values())) or 1.0
        return {term: w / norm for term, w in found.items()}

    index = Index.build(tokens, m, EOT)
    for query in (tokens[30:40], text(m, n_vocab, 1), text(m, n_vocab, 2)):
        own = weights(runs(query))
        expected = [sum(own.get(t, 0) * w for t, w in weights(chunk).items()) for chunk in chunks]
        np.testing.assert_allclose(index.scores(query), expected, atol=1e-6)  # weights are float32


@pytest.mark.parametrize("n_vocab", [4, 7, 60])
def test_scores_are_those_of_scikit_learn(n_vocab):
    peers = pytest.importorskip("sklearn.feature_extraction.text")
    m, tokens = 10, text(1505, n_vocab)
    chunks = tokens[:1500].reshape(-1, m)
    peer = peers.TfidfVectorizer(
        analyzer=lambda row: [tuple(row[i : i + 3].tolist()) for i in range(m - 2)],
        smooth_idf=False,
        max_df=15,  # a tenth
    )
    expected = peer.fit_transform(chunks)
    index = Index.build(tokens, m, EOT)
    for query in (chunks[3], text(m, n_vocab, 1), text(m, n_vocab, 2)):
        theirs = (expected @ peer.transform([query]).T).toarray().ravel()
        np.testing.assert_allclose(index.scores(query), theirs, atol=1e-6)  # weights are float32


def test_a_search_returns_the_best_first_and_of_equal_ones_the_first():
    a, b, c, d = [1, 2, 3, 4], [1, 2, 3, 5], [6, 5, 4, 3], [1, 2, 3, 4]
    index = Index.build(np.array(a + b + c + d), 4, EOT)
    assert index.search(np.array(a), 3).tolist() == [0, 3, 1]
    assert index.search(np.array(a), 2, (0, 1)).tolist() == [3, 1]
    assert index.search(np.array(a), 4).tolist() == [0, 3, 1, -1]  # the third shares no term
    assert index.search(np.array([5, 5, 5, 5]), 2).tolist() == [-1, -1]
    # A text whose terms are all too frequent has an index without terms, in which nothing is found.
    assert Index.build(np.zeros(500, np.int64), 5, EOT).search(np.zeros(5, np.int64), 2).tolist() == [-1, -1]
    found = index.read(np.array([1, 3, -1])).tolist()
    assert found == [b + c, d + [EOT] * 4, [EOT] * 8]


@given(st.integers(0, 1000), st.integers(3, 9))
def test_no_neighbour_shares_a_document_with_its_chunk(seed, m):
    """Nor does its continuation. Documents begin at 0 here, and are of any length, some below a chunk."""
    tokens = text(200, 3, seed)
    rng = np.random.default_rng(seed)
    tokens[rng.choice(200, 8, replace=False)] = EOT
    document = np.cumsum(tokens == EOT)
    index, own = Index.build(tokens, m, EOT), own_chunks(tokens, m, EOT)
    for c, row in enumerate(find_all(index, tokens, 3, own, "neighbours")):
        of_chunk = set(range(document[c * m], document[c * m + m - 1] + 1))
        for n in row[row >= 0]:
            assert not of_chunk & set(document[n * m : n * m + 2 * m].tolist())
    # And no more is left out than that: chunks two documents away may be found.
    assert ((own[:, 1] - own[:, 0]) * m <= 200).all() and (own[:, 0] <= np.arange(len(own))).all()


def test_it_is_kept_on_disk_and_a_damaged_one_is_refused(tmp_path):
    index = Index.build(text(500), 5, EOT)
    index.save(tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    assert isinstance(opened.weights, np.memmap) and (opened.m, opened.filler) == (5, EOT)
    query = text(5, seed=3)
    assert np.array_equal(opened.neighbours(query, 4), index.neighbours(query, 4))
    raw = bytearray((tmp_path / "index" / "terms.npy").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "index" / "terms.npy").write_bytes(raw)
    with pytest.raises(ValueError, match=r"terms\.npy is damaged"):
        Index.open(tmp_path / "index")
    with pytest.raises(ValueError, match="no such directory"):
        Index.open(tmp_path / "other")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="chunks of 2 tokens"):
        Index.build(text(50), 2, EOT)
    with pytest.raises(ValueError, match="text of 4"):
        Index.build(text(4), 5, EOT)
    with pytest.raises(ValueError, match="token 2097152"):
        Index.build(np.array([1, 2, 2**21]), 3, EOT)


@given(st.integers(0, 1000))
def test_the_common_run_is_that_of_difflib(seed):
    chunk, neighbours = text(9, 3, seed), text(36, 3, seed + 1).reshape(2, 18)
    expected = max(
        SequenceMatcher(None, chunk.tolist(), row.tolist(), autojunk=False).find_longest_match().size
        for row in neighbours
    )
    assert common_run(chunk, neighbours) == expected
