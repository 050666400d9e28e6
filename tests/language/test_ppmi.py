"""language/ppmi.py: counts, information and decomposition against NumPy, written out."""

import numpy as np
import pytest
from conftest import run_command

from formats import word_vectors
from language.ppmi import pair_counts, pmi, svd_vectors
from language.word_corpus import encode

TEXTS = [[f"w{i}" for i in np.random.default_rng(seed).geometric(0.3, 60)] for seed in range(5)]
CORPUS = encode(TEXTS, 2)
V, WINDOW = len(CORPUS.words), 3


def counted() -> np.ndarray:
    """Return the expected pairs (V, V), word by word: the mean over all sizes of the window."""
    n = np.zeros((V, V))
    for i, j in np.ndindex(len(CORPUS), len(CORPUS)):
        if i != j and CORPUS.documents[i] == CORPUS.documents[j]:
            n[CORPUS.ids[i], CORPUS.ids[j]] += np.mean([abs(i - j) <= r for r in range(1, WINDOW + 1)])
    return n


def dense(w, c, values) -> np.ndarray:
    out = np.zeros((V, V))
    out[w, c] = values
    return out


def test_pairs_are_counted_with_their_expectation():
    np.testing.assert_allclose(dense(*pair_counts(CORPUS, WINDOW)), counted(), rtol=1e-12)


def test_the_information_is_that_of_the_equation():
    n, p = counted(), CORPUS.counts**0.75 / (CORPUS.counts**0.75).sum()
    w, c, values = pmi(CORPUS, WINDOW)
    np.testing.assert_allclose(values, np.log(n / n.sum(1, keepdims=True) / p)[w, c], rtol=1e-11, atol=1e-12)
    assert len(w) == (n > 0).sum()


def test_the_vectors_have_the_products_of_the_best_approximation():
    u, s, _ = np.linalg.svd(np.maximum(dense(*pmi(CORPUS, WINDOW)), 0))
    rank = 3
    expected = (u[:, :rank] * s[:rank]) @ u[:, :rank].T
    vectors = svd_vectors(CORPUS, WINDOW, rank).numpy().astype(np.float64)
    # float32, and a randomised decomposition that is exact where it has more columns than the matrix.
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)


def test_the_command_writes_vectors(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join("a b c d e f".replace(" ", " x ") for _ in range(9)))
    flags = ["--d-model", "3", "--out", str(tmp_path)]
    ended = run_command("-m", "language.ppmi", "--data", str(tmp_path / "text.txt"), *flags)
    assert ended.code == 0 and word_vectors.read(tmp_path / "vectors.bin")[1].shape == (7, 3)
    ended = run_command("-m", "language.ppmi", "--data", str(tmp_path / "text.txt"), "--window", "0")
    assert ended.code == 2 and "window 0: expected at least 1" in ended.err
    ended = run_command("-m", "language.ppmi", "--data", str(tmp_path / "text.txt"), "--d-model", "8")
    assert ended.code == 2 and "d_model 8: expected at most 7" in ended.err


def test_a_wrong_power_would_be_seen():
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(pmi(CORPUS, WINDOW)[2], pmi(CORPUS, WINDOW, 1.0)[2], rtol=1e-3)
