"""Decontamination: find the items of a test in the training text, by runs of words that both have.

An item is contaminated if a run of 13 of its words is in a document (GPT-3: Brown et al. 2020,
arXiv:2005.14165, appendix C). An item of fewer words has no such run, so a filter of 13 misses every short
question that was copied word by word. Here all words of a short item together are one run, if they are at
least four. Items of fewer words are not searched for, since they may occur by chance, and the report says so.

A run that is in more than ten documents is a common phrase (a licence, an idiom) and is no sign of a leak.

The documents that hold an item are removed from the training text, or stay; in both cases the report has a
row for each item with what was found of it, so that a model can also be scored on the clean items alone.

Words are those of data/near_duplicates.py: without case, accents, punctuation and the values of numbers.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.near_duplicates import n_grams, words_of
from data.records import RECORDS, OnBad, read_records, suffix_of

N_GRAM = 13  # words
FEWEST = 4  # words of an item that is searched for
COMMON = 10  # documents: a run of words in more than these is a common phrase


@dataclass
class Item:
    """An item of a test, and the runs of its words that are searched for."""

    place: str  # in its file
    n_words: int
    grams: np.ndarray  # (k,) uint64, hashes of the runs; k = 0 for an item that is too short

    def report(self, found: set[int]) -> dict:
        """Return the row of the item in a report. found: the hashes of runs that are in documents."""
        n_found = sum(gram in found for gram in self.grams.tolist())
        row: dict[str, Any] = {"item": self.place, "words": self.n_words, "n_grams": len(self.grams)}
        return row | {"found": n_found, "contaminated": n_found > 0 if len(self.grams) else None}


def length_for(n_words: int) -> int:
    """Return the length in words of the runs of an item of n_words words, 0 for an item that is too short."""
    return min(N_GRAM, n_words) if n_words >= FEWEST else 0


def as_item(place: str, text: str) -> Item:
    """Return the item with the runs of words of a text. place: where the text is in its file."""
    words = words_of(text)
    n = length_for(len(words))
    return Item(place, len(words), np.unique(n_grams(words, n)) if n else np.zeros(0, np.uint64))


def strings_in(value: Any) -> Iterable[str]:
    """Yield all strings in a record, in order, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)


def read_items(path: Path, fields: list[str], on_bad: OnBad) -> list[Item]:
    """Return the items in a file of records: the text of these fields in order, or of all strings if there
    are no fields.

    Raises ValueError for a file that is not of records or has no items, and for a record without a field.
    """
    if suffix_of(path) not in RECORDS:
        raise ValueError(f"{path}: expected a file of test items: {', '.join(RECORDS)}, also .gz")
    items = []
    for place, value in read_records(path, str(path), on_bad, tuple(fields)):
        missing = [field for field in fields if not isinstance(value, dict) or field not in value]
        if missing:
            known = ", ".join(map(repr, value)) if isinstance(value, dict) else "none"
            raise ValueError(f"{place}: no field {missing[0]!r}, it has {known:.300}; see --item-fields")
        chosen = [value[field] for field in fields] if fields else value
        items.append(as_item(place, " ".join(strings_in(chosen))))
    if not items:
        raise ValueError(f"{path}: has no test items; expected a record for each")
    return items


class Search:
    """The runs of words of all items, by their length in words, which are looked up in documents."""

    def __init__(self, items: list[Item]):
        by_length: dict[int, list[np.ndarray]] = {}
        for item in items:
            by_length.setdefault(length_for(item.n_words), []).append(item.grams)
        self.by_length = {
            n: np.unique(np.concatenate(grams)) for n, grams in sorted(by_length.items()) if n > 0
        }

    def found_in(self, text: str) -> np.ndarray:
        """Return (k,) uint64, the different hashes of runs of items that are in a text."""
        words = words_of(text)
        found = [np.intersect1d(grams, n_grams(words, n)) for n, grams in self.by_length.items()]
        return np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))


def common(found: Iterable[np.ndarray], most: int = COMMON) -> set[int]:
    """Return the hashes that are in more than `most` documents. found: those of each document."""
    counts = Counter(gram for grams in found for gram in grams.tolist())
    return {gram for gram, n in counts.items() if n > most}
