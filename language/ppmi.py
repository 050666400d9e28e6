"""Word vectors by counting: positive pointwise mutual information (PPMI), approximated by a low rank.

The optimum of skip-gram (word2vec.py), which gradient descent approaches, can be computed from counts (Levy
and Goldberg 2014; Levy, Goldberg and Dagan 2015, TACL 3). Let n(w, c) be the number of times that c is in a
window of w, n(w) its sum over all c, and P(c) ~ count(c)^0.75 the distribution of skip-gram's negatives:

    PPMI(w, c) = max(0, log(n(w, c) / (n(w) P(c))))
    PPMI       ~ U S V^T of rank D,        the vector of w is row w of U S^0.5

Since word2vec draws the size of its windows, n(w, c) is an expectation: a pair at distance d counts
(window - d + 1) / window. There is no learning rate, and the only draw is the start of the decomposition.

    python -m language.ppmi            the same text and table as word2vec

Shapes: V words, T words of the text, D width, M pairs that occur.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from formats import command, word_vectors
from language.analogies import PAIRS, all_questions, table
from language.word_corpus import WordCorpus, read_corpus


def pair_counts(corpus: WordCorpus, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs that occur, each once: w and c, int64 (M,), and the expected n(w, c), float64 (M,)."""
    # A pair is coded as the number w V + c. Count those of each distance, w before c, and add them up.
    V, ids, places = len(corpus.words), corpus.ids, corpus.documents
    codes, weights = np.empty(0, np.int64), np.empty(0)
    for d in range(1, window + 1):
        same = places[d:] == places[:-d]
        found, n = np.unique(ids[:-d][same] * V + ids[d:][same], return_counts=True)
        codes, where = np.unique(np.concatenate((codes, found)), return_inverse=True)
        weights = np.bincount(where, np.concatenate((weights, n * ((window - d + 1) / window))))
    w, c = codes // V, codes % V
    # Where c is in a window of w, w is in one of c: count the pairs the other way round too.
    codes, where = np.unique(np.concatenate((codes, c * V + w)), return_inverse=True)
    return codes // V, codes % V, np.bincount(where, np.concatenate((weights, weights)))


def pmi(corpus: WordCorpus, window: int, power: float = 0.75) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs that occur: w and c, int64 (M,), and their pointwise mutual information (M,), in nats.

    power: of the counts in P(c).
    """
    w, c, n = pair_counts(corpus, window)
    p = corpus.counts**power
    p /= p.sum()
    return w, c, np.log(n / (np.bincount(w, n, len(corpus.words))[w] * p[c]))


def svd_vectors(corpus: WordCorpus, window: int = 5, d_model: int = 100, seed: int = 0) -> Tensor:
    """Return the vectors (V, d_model), float32, of the words of a corpus: U S^0.5 of their PPMI.

    The decomposition is the randomised one of Halko et al. 2011, with 20 columns more than the rank, of which
    the first are drawn by the seed, and four power iterations. Raises ValueError for d_model above V, since
    the rank is at most V.
    """
    V = len(corpus.words)
    if d_model > V:
        raise ValueError(f"d_model {d_model}: expected at most {V}, the number of different words")
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
    add(
        "--data",
        default="stdlib",
        help="file, folder, glob, URL, or stdlib, Python's source (default %(default)s)",
    )
    add("--window", type=int, default=5, help="words on either side, at most (default %(default)s)")
    add("--d-model", type=int, default=100, help="numbers in a vector (default %(default)s)")
    add(
        "--min-count",
        type=int,
        default=5,
        help="fewest occurrences of a word in the vocabulary (default %(default)s)",
    )
    add(
        "--out",
        type=command.path,
        default=Path("runs/ppmi"),
        help="folder of vectors.bin (default %(default)s)",
    )
    args = parser.parse_args(argv)
    for name in ("window", "d_model"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)}: expected at least 1")
    corpus = read_corpus(args.data, args.min_count, 0, print)
    vectors = svd_vectors(corpus, args.window, args.d_model)
    word_vectors.write(args.out / "vectors.bin", corpus.words, vectors.numpy())
    print(table(corpus.words, vectors, {name: all_questions(pairs) for name, pairs in PAIRS.items()}))
    print(f"saved to {args.out / 'vectors.bin'}")


if __name__ == "__main__":
    command.run(main)
