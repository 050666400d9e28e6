r"""Text as a sequence of words: identifiers split into words, a vocabulary, phrases.

Text is cut at everything that is not an ASCII letter, and where a small letter precedes a capital:
`readHTTPHeader_line` becomes read, http, header, line. (So it is meant for source code and English; `naïve`
becomes na, ve.) Words that occur fewer than `min_count` times are removed, so that windows (windows.py) reach
across them. The corpus is one array of word numbers, and beside it the number of each word's document.

Phrases (Mikolov et al. 2013b, 1310.4546, section 4) are pairs of words that occur together more often than
their own counts suggest, such as `return_value`. With N words in the corpus,

    score(a, b) = (count(a b) - min_count) / (count(a) count(b)) * N           joined where it is > threshold

(The paper leaves out N; the authors' code has it.) Subtracting min_count keeps pairs of rare words from being
joined. A second pass, over text in which the first has joined pairs, finds phrases of up to four words.

Shapes: V words of the vocabulary, T words of the corpus.
"""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.corpus import documents, find_files

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def words_of(text: str) -> list[str]:
    """Return the words of a source text in lower case, with identifiers split into their words."""
    return [word.lower() for word in WORD.findall(text)]


class WordCorpus(NamedTuple):
    """A text of T words as numbers, and the vocabulary of V words."""

    words: list[str]  # V, the most frequent first
    counts: np.ndarray  # int64 (V,): occurrences of each
    ids: np.ndarray  # int64 (T,): the text, as indices of words
    documents: np.ndarray  # int64 (T,): the number of the document that each is in, 0 or more

    def __len__(self) -> int:
        return len(self.ids)


def encode(texts: Iterable[Sequence[str]], min_count: int = 5) -> WordCorpus:
    """Return documents, each a sequence of words, as a WordCorpus without the words that occur fewer than
    min_count times.

    Words of equal count are in the order of their first occurrence. Raises ValueError if fewer than two words
    are frequent enough.
    """
    if min_count < 1:
        raise ValueError(f"min_count {min_count}: expected at least 1")
    texts = list(texts)
    found = Counter(word for text in texts for word in text)
    frequent = [(word, n) for word, n in found.most_common() if n >= min_count]
    if len(frequent) < 2:
        raise ValueError(
            f"{len(frequent)} of {len(found)} words occur at least {min_count} times; expected 2 or more: "
            "give more text, or a smaller min_count"
        )
    index = {word: i for i, (word, _) in enumerate(frequent)}
    encoded = [[index[word] for word in text if word in index] for text in texts]
    ids = np.concatenate([np.array(text, np.int64) for text in encoded])
    documents = np.repeat(np.arange(len(texts)), [len(text) for text in encoded])
    return WordCorpus(list(index), np.array([n for _, n in frequent], np.int64), ids, documents)


def find_phrases(
    texts: Sequence[Sequence[str]], min_count: int = 5, threshold: float = 100.0
) -> dict[tuple[str, str], float]:
    """Return the pairs of neighbouring words that score above the threshold, with their scores.

    Pairs that occur fewer than min_count times are left out. No pair crosses the end of a document.
    """
    single = Counter(word for text in texts for word in text)
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    total = single.total()
    scores = {
        (a, b): (n - min_count) / (single[a] * single[b]) * total
        for (a, b), n in pairs.items()
        if n >= min_count
    }
    return {pair: score for pair, score in scores.items() if score > threshold}


def join_phrases(text: Sequence[str], phrases: Container[tuple[str, str]]) -> list[str]:
    """Return the document with each pair (a, b) in phrases joined to one word a_b, from left to right."""
    joined, i = [], 0
    while i < len(text):
        is_phrase = tuple(text[i : i + 2]) in phrases
        joined.append("_".join(text[i : i + 1 + is_phrase]))
        i += 1 + is_phrase
    return joined


def read_corpus(
    data: str, min_count: int = 5, passes: int = 0, notify: Callable[[str], None] = lambda line: None
) -> WordCorpus:
    """Return the words of the text that `data` names, as find_files of data/corpus.py reads it.

    passes: how often phrases are found and joined. notify is called with a line for each text that cannot be
    read, and one for each pass. Raises ValueError for passes below 0, and as `encode` does.
    """
    if passes < 0:
        raise ValueError(f"phrases {passes}: expected 0 passes or more")
    texts = [words_of(text) for text in documents(find_files(data, Path("cache"), notify), notify)]
    for _ in range(passes):
        phrases = find_phrases(texts, min_count)
        texts = [join_phrases(text, phrases) for text in texts]
        best = sorted(phrases, key=phrases.get, reverse=True)[:6]
        notify(f"{len(phrases):,} phrases, such as {' '.join('_'.join(pair) for pair in best)}")
    return encode(texts, min_count)
