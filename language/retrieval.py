"""Retrieval: find the chunks of a text that are most like a given one, by the rare words they share (TF-IDF).

    terms of a chunk     its runs of three tokens, without the terms that more than a tenth of all chunks have
    idf(t)               ln(chunks / chunks with t) + 1             a rare term counts more
    w(c, t)              (times that t is in c) * idf(t), divided by the norm of these over all t
    score(q, c)          sum over t of w(q, t) w(c, t)              the cosine of their vectors

(Salton and Buckley 1988; it is scikit-learn's TfidfVectorizer with smooth_idf=False and max_df=0.1.) The
chunks of the highest score are the neighbours that retro.py reads. Its paper finds neighbours by the mean of
BERT's states, which needs a BERT and an index of billions of vectors. Neighbours by shared terms need
neither, and lower the loss more (Doostmohammadi et al. 2023, 2305.16243, by BM25), since most of what a
decoder gains from neighbours is what it copies.

The index is an inverted one: for each term the chunks that hold it, and their weights. Four arrays and the
tokens of the text are in a directory as .npy files, and are memory-mapped.

A neighbour must not come from the document of the chunk that it is for, or a model learns to copy from the
text that it has to predict. So a search excludes a range of chunks: all that overlap a document which the
chunk overlaps, and the one before them, whose continuation overlaps it too.

Shapes: C chunks of the text, m tokens of a chunk, k neighbours.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats.atomic import damage, replace_directory, write_checksums
from formats.progress import progress_bar

N = 3  # tokens of a term
MOST = 1 / 10  # a term in more than this share of the chunks is left out ...
FEW = 10  # ... if it is in more chunks than this, too
BITS = 21  # of a token: three of them fill the 63 bits of a positive int64, a term


def terms_of(tokens: np.ndarray) -> np.ndarray:
    """Return the terms of tokens (..., m) as numbers, int64 (..., m - 2): the same run is the same number."""
    wide = np.asarray(tokens, np.int64)
    m = wide.shape[-1]
    return sum(wide[..., i : m - N + 1 + i] << (BITS * (N - 1 - i)) for i in range(N))


@dataclass
class Index:
    """The chunks of a text by their terms. A search is deterministic: of equal scores the first chunk wins.

    copy.deepcopy returns the index itself, since nothing changes it, so that copies of a model share it.
    """

    tokens: np.ndarray  # (n,): the whole text; tokens after the last whole chunk are in continuations only
    m: int  # tokens of a chunk
    filler: int  # the token in place of those after the end of the text, and of neighbours that are not found
    terms: np.ndarray  # int64 (n_terms,): sorted
    starts: np.ndarray  # int64 (n_terms + 1,): where the entries of a term begin in the two arrays below
    chunks: np.ndarray  # int32 (n_entries,): the chunks with the term, in ascending order
    weights: np.ndarray  # float32 (n_entries,): w(c, t)

    @classmethod
    def build(cls, tokens: np.ndarray, m: int, filler: int) -> "Index":
        """Return the index of the chunks of m tokens of a text (n,).

        Raises ValueError for a text of less than one chunk, for chunks of fewer than three tokens and for
        tokens of 2^21 or more.
        """
        C = len(tokens) // m
        if C == 0 or m < N:
            raise ValueError(
                f"chunks of {m} tokens of a text of {len(tokens)}: expected chunks of at least {N} tokens, "
                "and a text of at least one chunk"
            )
        if tokens.max() >= 1 << BITS:
            raise ValueError(f"token {tokens.max()}: expected numbers below {1 << BITS}")

        # List the pairs of a term and a chunk (its owner), sorted, each once with its count.
        found = terms_of(tokens[: C * m].reshape(C, m)).ravel()
        owner = np.repeat(np.arange(C, dtype=np.int32), m - N + 1)
        order = np.argsort(found, kind="stable")  # owners stay in ascending order
        found, owner = found[order], owner[order]
        first = np.flatnonzero(np.r_[True, (found[1:] != found[:-1]) | (owner[1:] != owner[:-1])])
        counts = np.diff(np.r_[first, len(found)])
        found, owner = found[first], owner[first]

        # Leave out frequent terms, which take most of the time of a search and distinguish few chunks.
        _, place, frequency = np.unique(found, return_inverse=True, return_counts=True)
        kept = frequency[place] <= max(FEW, MOST * C)
        found, owner, counts = found[kept], owner[kept], counts[kept]

        # Compute the weights of the others.
        terms, starts, frequency = np.unique(found, return_index=True, return_counts=True)
        weights = counts * np.repeat(np.log(C / frequency) + 1, frequency)
        norms = np.sqrt(np.bincount(owner, weights**2, minlength=C))
        weights = (weights / norms[owner]).astype(np.float32)
        starts = np.r_[starts, len(found)].astype(np.int64)
        return cls(tokens, m, filler, terms, starts, owner, weights)

    def __deepcopy__(self, memo) -> "Index":
        return self

    def __len__(self) -> int:
        return len(self.tokens) // self.m

    def scores(self, query: np.ndarray) -> np.ndarray:
        """Return the score of each chunk, float64 (C,), for a query of any number of tokens (q,).

        Terms of the query that are not in the index are ignored, in its norm too.
        """
        wanted, counts = np.unique(terms_of(query), return_counts=True)
        at = np.searchsorted(self.terms, wanted)
        known = np.searchsorted(self.terms, wanted, side="right") > at
        at, counts = at[known], counts[known]
        if not len(at):  # nothing in common
            return np.zeros(len(self))
        begins, ends = self.starts[at], self.starts[at + 1]
        weights = counts * (np.log(len(self) / (ends - begins)) + 1)
        weights /= np.sqrt((weights**2).sum())
        spans = [slice(b, e) for b, e in zip(begins, ends, strict=True)]
        chunks = np.concatenate([self.chunks[span] for span in spans])
        parts = [w * self.weights[span] for w, span in zip(weights, spans, strict=True)]
        return np.bincount(chunks, np.concatenate(parts), minlength=len(self))

    def search(self, query: np.ndarray, k: int, excluded: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Return the k chunks of the highest scores, int64 (k,), the best first; -1 if fewer share a term.

        excluded: a range of chunks that are left out: the first, and the one after the last.
        """
        scores = self.scores(query)
        scores[excluded[0] : excluded[1]] = 0
        candidates = np.flatnonzero(scores)
        if len(candidates) > k:
            least = np.partition(scores[candidates], -k)[-k]
            candidates = candidates[scores[candidates] >= least]
        best = candidates[np.lexsort((candidates, -scores[candidates]))][:k]
        return np.r_[best, np.full(k - len(best), -1)]

    def read(self, chunks: np.ndarray) -> np.ndarray:
        """Return each of the chunks (...) and the m tokens after it, int64 (..., 2 m); -1 gives fillers."""
        place = chunks[..., None] * self.m + np.arange(2 * self.m)
        outside = (place >= len(self.tokens)) | (chunks[..., None] < 0)
        return np.where(outside, self.filler, self.tokens[np.where(outside, 0, place)]).astype(np.int64)

    def neighbours(self, query: np.ndarray, k: int) -> np.ndarray:
        """Return the tokens of the k best neighbours of a query, int64 (k, 2 m)."""
        return self.read(self.search(query, k))

    def save(self, directory: Path) -> None:
        """Write the arrays and their checksums to a directory, all or nothing."""
        with replace_directory(directory) as new:
            np.save(new / "sizes.npy", np.array([self.m, self.filler]))
            for name in ("tokens", "terms", "starts", "chunks", "weights"):
                np.save(new / f"{name}.npy", getattr(self, name))
            write_checksums(new)

    @classmethod
    def open(cls, directory: Path) -> "Index":
        """Return the index in a directory, memory-mapped. Raises ValueError if it is missing or damaged."""
        problem = damage(directory) if directory.is_dir() else f"{directory}: no such directory"
        if problem is not None:
            raise ValueError(f"{problem}; expected the text to retrieve from, which train.py writes")
        names = ("tokens", "terms", "starts", "chunks", "weights")
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}
        m, filler = np.load(directory / "sizes.npy").tolist()
        return cls(m=m, filler=filler, **arrays)


def own_chunks(tokens: np.ndarray, m: int, eot_id: int) -> np.ndarray:
    """Return for each chunk of a text (n,) the range of chunks that its neighbours must not be in, (C, 2):
    the first, and the one after the last.

    A document begins at each eot_id. The range holds all chunks that overlap a document which the chunk
    overlaps, and one chunk before them, since its continuation overlaps the first document.
    """
    C = len(tokens) // m
    begins = np.flatnonzero(np.asarray(tokens) == eot_id)
    begins = np.unique(np.r_[0, begins, len(tokens)])
    first = np.searchsorted(begins, np.arange(C) * m, side="right") - 1
    last = np.searchsorted(begins, np.arange(C) * m + m - 1, side="right")
    low, high = begins[first] // m - 1, -(-begins[last] // m)
    return np.stack([low.clip(min=0), high.clip(max=C)], axis=1)


def find_all(
    index: Index, tokens: np.ndarray, k: int, excluded: Iterable[tuple[int, int]], title: str
) -> np.ndarray:
    """Return the k neighbours in an index of every whole chunk of a text (n,), int32 (n // m, k).

    excluded: the range for each chunk, as `Index.search` takes it. title: of the progress bar.
    """
    m = index.m
    queries = tokens[: len(tokens) // m * m].reshape(-1, m)
    found = np.empty((len(queries), k), np.int32)
    with progress_bar(len(queries), title) as bar:
        for i, (query, span) in enumerate(zip(queries, excluded, strict=True)):
            found[i] = index.search(query, k, tuple(span))
            bar.update(1)
    return found


def common_run(chunk: np.ndarray, neighbours: np.ndarray) -> int:
    """Return the length of the longest run of tokens that a chunk (m,) shares with one of the neighbours
    (k, r): the overlap r(C) of Borgeaud et al. 2022, section 2.6, times m."""
    longest = 0
    for row in neighbours:
        # ends[j]: the length of the longest common run that ends at chunk[i] and row[j].
        ends = np.zeros(len(row) + 1, np.int64)
        for token in chunk:
            ends[1:] = np.where(row == token, ends[:-1] + 1, 0)
            longest = max(longest, int(ends.max()))
    return longest
