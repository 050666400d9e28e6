r"""Near duplicates: MinHash signatures find pairs of texts that may be alike, and exact counts decide.

Two texts are similar if their sets of *shingles*, runs of five words, overlap (Broder 1997, "On the
resemblance and containment of documents"):

    J(A, B) = |A and B| / |A or B|                                           the Jaccard similarity

There are too many pairs to compare them all. But in a random order of all shingles, the first of A and the
first of B are the same with probability J. A signature of a text holds its first shingle in each of K = b r
random orders, cut into b bands of r. A pair of texts is a candidate if they agree in a whole band
(locality-sensitive hashing):

    P(candidate) = 1 - (1 - J^r)^b             an S-curve; with FineWeb's b 14, r 8: .21 at J .6, .92 at .8

A candidate is no proof. Here J of each candidate is computed from the two sets. Two texts are *alike* if J is
at least 0.75, and only a text that is alike to a *representative*, an earlier text that stays, is removed. So
of each cluster its first text stays, and every other is alike to that one. In a chain a ~ b ~ c in which a
and c differ, b alone is removed. (A pipeline that joined all candidates kept 2 documents of the 859,092 of a
source: github.com/marin-community/marin/issues/6854.)

Words are compared without case, accents, punctuation and values of numbers. In scripts without spaces each
character is a word, and so is each emoji. A text of fewer than five words has one shingle, all of its words;
a text without words has itself as its shingle. Only the empty text has none, and is alike to no other.

    python -m data.near_duplicates        the S-curve, and how often candidates are found

Shapes: n texts, m shingles, K hashes, b bands, r rows.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import regex

from formats import command

BANDS, ROWS, SHINGLE = 14, 8, 5  # those of FineWeb (arXiv:2406.17557)
SIMILARITY = 0.75  # J from which on a text is removed
MOST_COMPARED = 100  # representatives that a bucket holds at most, and that a text is compared with at most
MOST_WORDS = 1 << 20  # words whose hashes are kept in memory
BLOCK = 2048  # shingles that are hashed at a time; with K orders they fit into the cache of a core

DIGITS, ASCII_WORD = re.compile(r"\d+"), re.compile(r"[a-z0-9]+")
WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"(?V1)[{WITHOUT_SPACES}\p{{So}}]|[[\p{{L}}\p{{N}}]--[{WITHOUT_SPACES}]]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text: small letters without accents, 0 for each run of digits, no punctuation."""
    text = DIGITS.sub("0", text.lower())
    if text.isascii():
        return ASCII_WORD.findall(text)
    decomposed = unicodedata.normalize("NFD", text)
    return WORD.findall("".join(char for char in decomposed if unicodedata.category(char) != "Mn"))


class Hashes(dict):
    """A dict from words to hashes of 64 bits, the same in every process. It computes those that it lacks."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        found = self[word] = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest())
        return found


HASHES = Hashes()


def mix(x: np.ndarray) -> np.ndarray:
    """Return uint64 of which every bit depends on all bits of x; different x give different results.

    These are the last steps of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cache
def odd_numbers(n: int, seed: int, dtype=np.uint64) -> np.ndarray:
    """Return (n,) random odd numbers. x -> a x modulo 2^k is one-to-one if a is odd."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, np.iinfo(dtype).max, n, dtype, endpoint=True) | dtype(1)


def n_grams(words: list[str], n: int) -> np.ndarray:
    """Return (max(0, len(words) - n + 1),) uint64, the hashes of all runs of n words, in order.

    The hash of a run is mix(sum_i a_i h_i), of the hashes h_i of its words and n odd numbers a_i.
    """
    hashes = np.fromiter(map(HASHES.__getitem__, words), np.uint64, len(words))
    m = max(0, len(words) - n + 1)
    total = np.zeros(m, np.uint64)
    for i, factor in enumerate(odd_numbers(n, seed=n)):
        total += hashes[i : i + m] * factor
    return mix(total)


def shingles(text: str, n: int = SHINGLE) -> np.ndarray:
    """Return (m,) uint64, sorted, the hashes of the different shingles of n words in a text."""
    words = words_of(text)
    if not words:
        whole = text.strip()
        words = [whole] if whole else []
    return np.unique(n_grams(words, min(n, len(words)))) if words else np.zeros(0, np.uint64)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the similarity of two sorted sets of shingles; that of an empty set with any other is 0."""
    if not len(a) or not len(b):
        return 0.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def s_curve(similarity, bands: int = BANDS, rows: int = ROWS):
    """Return the probability that two texts of this similarity J are a candidate, 1 - (1 - J^r)^b."""
    return 1 - (1 - similarity**rows) ** bands


class Signatures:
    """The functions that make signatures of K = bands x rows hashes."""

    def __init__(self, bands: int = BANDS, rows: int = ROWS):
        """Draw the K orders. An order sorts the x by (x xor c) a modulo 2^32, with random odd c and a."""
        self.bands, self.rows = bands, rows
        self.factors = odd_numbers(bands * rows, 0, np.uint32)[:, None]  # (K, 1)
        self.offsets = odd_numbers(bands * rows, 1, np.uint32)[:, None]
        self.buffer = np.empty(bands * rows * BLOCK, np.uint32)

    def of(self, shingles: np.ndarray) -> np.ndarray:
        """Return (K,) uint32, the smallest hash in each order of (m,) shingles, m >= 1."""
        x = (shingles >> np.uint64(32)).astype(np.uint32)
        smallest = np.full(len(self.factors), 0xFFFFFFFF, np.uint32)
        for i in range(0, len(x), BLOCK):
            block = x[i : i + BLOCK]
            table = self.buffer[: len(block) * len(self.factors)].reshape(-1, len(block))  # (K, BLOCK)
            hashed = np.bitwise_xor(block, self.offsets, out=table)
            hashed *= self.factors
            np.minimum(smallest, hashed.min(1), out=smallest)
        return smallest

    def in_bands(self, shingles: np.ndarray) -> np.ndarray:
        """Return (b,) uint64, a hash of each band; zeros for the empty set."""
        if not len(shingles):
            return np.zeros(self.bands, np.uint64)
        rows = self.of(shingles).reshape(self.bands, self.rows).astype(np.uint64)
        numbers = np.arange(1, self.bands + 1, dtype=np.uint64)  # equal rows in other bands: other hashes
        return mix((rows * odd_numbers(self.rows, 2)).sum(1, dtype=np.uint64) + mix(numbers))


class Alike(NamedTuple):
    """A text that is removed, and why."""

    text: int  # its number
    representative: int  # the number of the earlier text that stays
    similarity: float  # J of the two


def find(
    bands: np.ndarray,
    shingles_of: Callable[[int], np.ndarray],
    similarity: float = SIMILARITY,
    counts: Counter | None = None,
) -> Iterator[Alike]:
    """Yield the texts that are alike to an earlier text that stays, in order.

    bands: (n, b) of `Signatures.in_bands`. shingles_of: returns the set of a text by its number. counts: gets
    the numbers of pairs "compared" and "alike". A text is compared first with those that share most bands.
    """
    counts = Counter() if counts is None else counts
    is_shared = shared(bands)
    buckets: dict[int, list[int]] = {}  # for each hash of a band, the representatives that have it
    for text in np.flatnonzero(is_shared.any(1)).tolist():
        keys = bands[text, is_shared[text]].tolist()
        near = Counter(other for key in keys for other in buckets.get(key, ()))
        ours = shingles_of(text)
        for other, _ in sorted(near.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_COMPARED]:
            counts["compared"] += 1
            found = jaccard(ours, shingles_of(other))
            if found >= similarity:
                counts["alike"] += 1
                yield Alike(text, other, found)
                break
        else:
            for key in keys:
                bucket = buckets.setdefault(key, [])
                if len(bucket) < MOST_COMPARED:
                    bucket.append(text)


def shared(bands: np.ndarray) -> np.ndarray:
    """Return (n, b) bool: True where another text has the same hash in a band, unless the hash is 0."""
    result = np.zeros(bands.shape, bool)
    for j in range(bands.shape[1]):
        order = np.argsort(bands[:, j], kind="stable")
        column = bands[order, j]
        same = column[1:] == column[:-1]
        result[order[1:], j] = same
        result[order[:-1], j] |= same
    return result & (bands != 0)


def planted_pair(generator: np.random.Generator, similarity: float, m: int = 300) -> tuple[np.ndarray, ...]:
    """Return two random sets of about m shingles whose similarity is nearest to the wanted one."""
    both = round(2 * m * similarity / (1 + similarity))
    drawn = mix(generator.integers(1, 1 << 63, 2 * m - both, np.uint64))
    return np.unique(drawn[:m]), np.unique(drawn[m - both :])


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Print the S-curve, and how often pairs of texts become candidates.")
    parser.add_argument("--bands", type=int, default=BANDS, help="bands of a signature (default %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS, help="hashes in a band (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=200, help="pairs for each line (default %(default)s)")
    args = parser.parse_args(argv)
    for name in ("bands", "rows", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: {getattr(args, name)}: expected at least 1")

    signatures, generator = Signatures(args.bands, args.rows), np.random.default_rng(0)
    print("similarity  expected  found")
    for similarity in (0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        pairs = [planted_pair(generator, similarity) for _ in range(args.pairs)]
        found = [(signatures.in_bands(a) == signatures.in_bands(b)).any() for a, b in pairs]
        expected = s_curve(similarity, args.bands, args.rows)
        print(f"{similarity:10.2f}  {expected:8.1%}  {np.mean(found):5.1%}")


if __name__ == "__main__":
    command.run(main)
