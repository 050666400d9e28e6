"""Exact substrings: a run of fifty words or more that came before is cut out; its first occurrence stays.

Lee et al. 2021 (arXiv:2107.06499, section 4.1) find repeated substrings by a suffix array and remove all of
them. Here a polynomial hash of each window of W words finds them, and the first occurrence stays:

    S[i] = sum of c[j] B^j for j < i,     hash(start, end) = (S[end] - S[start]) B^-start     modulo 2^64

c[j] is a random number for the value of byte j, and B is odd, so that it has an inverse. So the hashes of all
windows of a text are a few operations on arrays. The hashes that come twice or more are found by sorting.
Each pass over the texts sorts those of one range of values, so that memory is bounded. Then each window with
such a hash is compared, byte for byte, with the first that had it.

A window begins and ends with a word, so no cut is inside a word or inside the bytes of a character. Words are
what is between spaces. A character of three bytes or more begins a word, for scripts without spaces.

`lines` returns the hashes of lines, to find those that many documents share: menus, licences, notices of
cookies.

Shapes: n bytes of a text, k windows or lines.
"""

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from data.near_duplicates import mix, odd_numbers

WORDS = 50  # W, of a window (Lee et al.: 50 tokens)
LINE_BYTES = 30  # of the shortest line that is compared: "else:" is in every program
MEMORY = 512 << 20  # bytes of hashes that are sorted at a time; collecting them takes as much again

BASE = 0x9E3779B97F4A7C15  # odd
INVERSE = pow(BASE, -1, 1 << 64)
OF_BYTE = odd_numbers(256, seed=3)
SPACES = np.isin(np.arange(256), list(b" \t\n\r\v\f"))

Cuts = list[tuple[int, int]]  # intervals of bytes


class Powers:
    """The powers B^i and B^-i modulo 2^64, for i up to the length of the longest text so far."""

    def __init__(self):
        self.up = self.down = np.ones(1, np.uint64)

    def reach(self, n: int) -> None:
        """Compute the powers for i up to n - 1, if they are lacking."""
        if len(self.up) < n:
            for name, base in (("up", BASE), ("down", INVERSE)):
                powers = np.full(max(n, 2 * len(self.up)), base, np.uint64)
                powers[0] = 1
                setattr(self, name, np.cumprod(powers, dtype=np.uint64))


POWERS = Powers()


def words_in(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes at which the words of a text begin and end. raw: (n,) uint8, UTF-8."""
    inside = np.flatnonzero(~SPACES[raw])
    if not len(inside):
        return inside, inside
    begins = raw[inside] >= 0xE0  # of a character of three bytes or four
    begins[0] = True
    begins[1:] |= np.diff(inside) > 1
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(inside)) - 1
    return inside[first], inside[last] + 1


def windows(raw: np.ndarray, n_words: int = WORDS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (starts, ends, hashes), each (k,), of all windows of n_words words in raw, (n,) uint8.

    starts and ends are bytes, hashes are uint64.
    """
    starts, ends = words_in(raw)
    k = max(0, len(starts) - n_words + 1)
    starts, ends = starts[:k], ends[n_words - 1 :]
    if not k:
        return starts, ends[:0], np.zeros(0, np.uint64)
    POWERS.reach(len(raw))
    sums = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum(OF_BYTE[raw] * POWERS.up[: len(raw)], out=sums[1:])
    return starts, ends, mix((sums[ends] - sums[starts]) * POWERS.down[starts])


def repeated_hashes(
    hashes: Callable[[], Iterable[np.ndarray]], n_total: int, times: int = 2, memory: int = MEMORY
) -> np.ndarray:
    """Return the hashes that come at least `times` times, sorted.

    hashes: a function that yields all of them in arrays; it is called once in each pass. n_total: how many
    there are at most. A pass sorts those of one range of values; the ranges are equal, and so many that the
    hashes of one take about `memory` bytes.
    """
    n_passes = max(1, -(-n_total * 8 // memory))
    found = []
    for number in range(n_passes):
        in_range = []
        for some in hashes():
            is_in = (some >> np.uint64(32)) * np.uint64(n_passes) >> np.uint64(32) == number
            in_range.append(some[is_in])
        all_of_them = np.concatenate([np.zeros(0, np.uint64), *in_range])
        del in_range
        all_of_them.sort()
        # A hash comes `times` times if it equals the one that is times - 1 places further on.
        many = all_of_them[times - 1 :] == all_of_them[: max(0, len(all_of_them) - times + 1)]
        found.append(np.unique(all_of_them[times - 1 :][many]))
    return np.concatenate(found)


class Repeats:
    """The first place of each repeated hash, by which the repeats in texts, given in order, are found."""

    def __init__(self, repeated: np.ndarray, raw_of: Callable[[int], bytes], n_words: int = WORDS):
        """Prepare the search. repeated: the sorted hashes of `repeated_hashes`. raw_of: returns an earlier
        text by its number."""
        self.repeated, self.raw_of, self.n_words = repeated, raw_of, n_words
        self.texts = np.full(len(repeated), -1, np.int64)  # where each hash came first: the text,
        self.starts = np.zeros(len(repeated), np.int64)  # and the byte of it

    def cuts(self, number: int, text: bytes) -> Cuts:
        """Return the intervals of a text that have come before, in it or in an earlier one.

        Texts are given once each, by rising numbers.
        """
        raw = np.frombuffer(text, np.uint8)
        starts, ends, hashes = windows(raw, self.n_words)
        if not len(hashes) or not len(self.repeated):
            return []
        places = np.minimum(np.searchsorted(self.repeated, hashes), len(self.repeated) - 1)
        hits = np.flatnonzero(self.repeated[places] == hashes)

        # The source of a hash that no earlier text had is its first window here. NumPy keeps the last of
        # several values that are written to one place, so the windows are written in reverse.
        new = hits[self.texts[places[hits]] < 0][::-1]
        self.texts[places[new]] = number
        self.starts[places[new]] = starts[new]
        sources, source_starts = self.texts[places[hits]], self.starts[places[hits]]
        is_later = (sources != number) | (source_starts != starts[hits])
        hits, sources, source_starts = hits[is_later], sources[is_later], source_starts[is_later]
        if not len(hits):
            return []

        # Successive windows with successive sources are compared at once, or one by one if they differ.
        shift = starts[hits] - source_starts
        breaks = (np.diff(hits) != 1) | (np.diff(sources) != 0) | (np.diff(shift) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(hits)]
        found: Cuts = []
        for i, j in pairwise(edges):
            source = text if sources[i] == number else self.raw_of(int(sources[i]))
            rows = [(i, j)]
            if not same_bytes(text, starts[hits[i]], ends[hits[j - 1]], source, source_starts[i]):
                rows = [(k, k + 1) for k in range(i, j)]
            for a, b in rows:
                start, end = int(starts[hits[a]]), int(ends[hits[b - 1]])
                if same_bytes(text, start, end, source, source_starts[a]):
                    # Where the window overlaps with its source in the same text, the source stays complete.
                    if sources[a] == number:
                        start = max(start, int(ends[hits[a]] - shift[a]))
                    found.append((start, end))
        return merged(found)


def same_bytes(text: bytes, start: int, end: int, source: bytes, source_start: int) -> bool:
    """Return whether text[start:end] is in a source, from source_start on."""
    return text[start:end] == source[source_start : source_start + end - start]


def merged(intervals: Cuts) -> Cuts:
    """Return the union of intervals, in order and without overlaps."""
    found: Cuts = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def cut(text: bytes, cuts: Cuts) -> bytes:
    """Return a text without intervals of it, which are in order."""
    edges = [0, *(edge for interval in cuts for edge in interval), len(text)]
    return b"".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


def remove(texts: list[str], n_words: int = WORDS) -> list[str]:
    """Return the texts without substrings of n_words words or more that have come before."""
    raws = [text.encode() for text in texts]

    def hashes() -> Iterator[np.ndarray]:
        return (windows(np.frombuffer(raw, np.uint8), n_words)[2] for raw in raws)

    repeats = Repeats(repeated_hashes(hashes, sum(map(len, raws))), raws.__getitem__, n_words)
    return [cut(raw, repeats.cuts(i, raw)).decode() for i, raw in enumerate(raws)]


def lines(text: bytes) -> tuple[np.ndarray, Cuts]:
    """Return the hashes (k,) uint64 of the lines of LINE_BYTES bytes or more, and the interval of each line.

    A hash is that of the line without the spaces around it; an interval includes the line break.
    """
    hashes, places, start = [], [], 0
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if len(bare) >= LINE_BYTES:
            hashes.append(int.from_bytes(blake2b(bare, digest_size=8).digest()))
            places.append((start, start + len(line)))
        start += len(line)
    return np.array(hashes, np.uint64), places
