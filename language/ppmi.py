"""Counted vectors: positive pointwise mutual information, and the best approximation of low rank.

What skip-gram approximates by gradient descent can be counted (Levy and Goldberg 2014; Levy, Goldberg and
Dagan 2015, TACL 3). With n(w, c) the pairs of a word and one in its window, n(w) the pairs of w, and
P(c) ~ count(c)^0.75 as for negatives:

    PPMI(w, c) = max(0, log(n(w, c) / (n(w) P(c))))
    PPMI       ~ U S V^T of rank D,        the vector of w is row w of U S^0.5

n(w, c) is its expectation over random windows: a pair at distance d counts (window - d + 1) / window.
There is no learning rate, and nothing is drawn but the first guess of the decomposition.

    python -m language.ppmi            the same text and table as word2vec, in some ten seconds

Shapes: V words, T words of the text, D width, M pairs that occur.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from formats import command, word_vectors
from language.analogies import PAIRS, all_questions, table
from language.word_corpus import WordCorpus, read_corpus


def pair_counts(corpus: WordCorpus, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs that occur: w and c, int64 (M,), and the expectation of n(w, c), float64 (M,)."""
    V, ids, places = len(corpus.words), corpus.ids, corpus.documents
    codes, weights = np.empty(0, np.int64), np.empty(0)
    for d in range(1, window + 1):
        same = places[d:] == places[:-d]
        found, n = np.unique(ids[:-d][same] * V + ids[d:][same], return_counts=True)
        codes, where = np.unique(np.concatenate((codes, found)), return_inverse=True)
        weights = np.bincount(where, np.concatenate((weights, n * ((window - d + 1) / window))))
    w, c = codes // V, codes % V
    # Each pair is also one of c and w.
    codes, where = np.unique(np.concatenate((codes, c * V + w)), return_inverse=True)
    return codes // V, codes % V, np.bincount(where, np.concatenate((weights, weights)))


def pmi(corpus: WordCorpus, window: int, power: float = 0.75) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs that occur: w and c, int64 (M,), and their pointwise mutual information (M,)."""
    w, c, n = pair_counts(corpus, window)
    p = corpus.counts**power
    p /= p.sum()
    return w, c, np.log(n / (np.bincount(w, n, len(corpus.words))[w] * p[c]))


def svd_vectors(corpus: WordCorpus, window: int = 5, d_model: int = 100, seed: int = 0) -> Tensor:
    """Return the vectors (V, D) of a corpus' words: U S^0.5 of their PPMI.

    The decomposition is the randomised one of Halko et al. 2011, with four power iterations.
    """
    V = len(corpus.words)
    w, c, values = pmi(corpus, window)
    positive = values > 0
    places = torch.from_numpy(np.stack((w, c))[:, positive])
    known = torch.from_numpy(values[positive]).float()
    matrix = torch.sparse_coo_tensor(places, known, (V, V), check_invariants=True).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(matrix, min(V, d_model + 20), niter=4)
    return (u * s.sqrt())[:, :d_model]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(
        description="Word vectors without training: PPMI and a singular value decomposition."
    )
    add = parser.add_argument
    add("--data", default="stdlib", help="file, folder, glob, URL, or stdlib (default %(default)s)")
    add("--window", type=int, default=5, help="words on either side, at most (default %(default)s)")
    add("--d-model", type=int, default=100, help="numbers in a vector (default %(default)s)")
    add(
        "--min-count",
        type=int,
        default=5,
        help="occurrences of a word in the vocabulary (default %(default)s)",
    )
    add(
        "--out",
        type=command.path,
        default=Path("runs/ppmi"),
        help="folder of vectors.bin (default %(default)s)",
    )
    args = parser.parse_args(argv)
    for name in ("window", "d_model"):
        if not 1 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} {getattr(args, name)}: expected at least 1")
    corpus = read_corpus(args.data, args.min_count, 0, print)
    vectors = svd_vectors(corpus, args.window, args.d_model)
    word_vectors.write(args.out / "vectors.bin", corpus.words, vectors.numpy())
    print(table(corpus.words, vectors, {name: all_questions(pairs) for name, pairs in PAIRS.items()}))
    print(f"saved to {args.out / 'vectors.bin'}")


if __name__ == "__main__":
    command.run(main)
