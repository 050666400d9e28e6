"""Exact substrings: all but the first occurrence is cut, at borders of words; little is left to find."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from data import exact_substrings as exact

MODULES = sorted(Path(os.__file__).parent.glob("*.py"))  # of Python's own library


def words(seed: int, n: int) -> str:
    generator = random.Random(seed)
    return " ".join(f"{generator.choice('abcdefgh')}{generator.randrange(10_000)}" for _ in range(n))


def remove(texts: list[str], n_words: int = exact.WORDS) -> list[str]:
    """Return the texts without substrings of n_words words or more that have come before."""
    raws = [text.encode() for text in texts]

    def hashes():
        return (exact.windows(np.frombuffer(raw, np.uint8), n_words)[2] for raw in raws)

    repeated = exact.repeated_hashes(hashes, sum(map(len, raws)))
    repeats = exact.Repeats(repeated, raws.__getitem__, n_words)
    return [exact.cut(raw, repeats.cuts(i, raw)).decode() for i, raw in enumerate(raws)]


def repeats_by_hand(texts: list[str], n: int) -> list[set[int]]:
    """Return the numbers of the words of each text that are in a run of n words that came before.

    Words of the first such run, in the same text, stay.
    """
    first, found = {}, []
    for number, text in enumerate(texts):
        parts, marked = text.split(), set()
        for i in range(len(parts) - n + 1):
            source, place = first.setdefault(tuple(parts[i : i + n]), (number, i))
            if (source, place) != (number, i):
                marked |= set(range(max(i, place + n) if source == number else i, i + n))
        found.append(marked)
    return found


def test_the_first_occurrence_stays_and_later_ones_are_cut():
    shared = words(0, 60)
    texts = [f"{words(1, 80)} {shared} {words(2, 10)}", f"{words(3, 30)} {shared} {words(4, 30)}", shared]
    left = remove(texts)
    assert left[0] == texts[0]
    assert left[1] == f"{words(3, 30)}  {words(4, 30)}" and left[2] == ""
    assert remove([words(0, 49)] * 3) == [words(0, 49)] * 3  # shorter than a window


@pytest.mark.parametrize("seed", range(4))
def test_what_is_cut_equals_a_search_by_sets_of_runs_of_words(seed):
    generator = random.Random(seed)
    texts = [" ".join(generator.choices("abcde", k=generator.randrange(60))) for _ in range(12)]
    expected = repeats_by_hand(texts, 6)
    for text, left, marked in zip(texts, remove(texts, 6), expected, strict=True):
        parts = text.split()
        assert left.split() == [part for i, part in enumerate(parts) if i not in marked]


def test_characters_are_never_cut_and_scripts_without_spaces_are_searched():
    chinese = "".join(chr(0x4E00 + random.Random(5).randrange(1000) + i) for i in range(80))
    accents = " ".join(f"é{i}ü" for i in range(70))
    left = remove([f"{chinese} {accents}", f"Ä{chinese} ö {accents} 🎉", "🎉" * 200])
    assert left[1] == "Ä ö  🎉"
    assert set(left[2]) <= {"🎉"} and len(left[2]) == 50


def test_a_hash_that_two_windows_share_by_chance_cuts_nothing(monkeypatch):
    monkeypatch.setattr(exact, "OF_BYTE", np.zeros(256, np.uint64))  # all windows have one hash
    texts = [words(seed, 70) for seed in range(4)]
    assert remove(texts) == texts
    # Each window is compared with the first that had its hash; copies of that one are still found.
    assert remove([words(1, 50), words(2, 70), words(1, 50)])[2] == ""


@pytest.mark.parametrize("n", range(13))
def test_fewer_hashes_than_the_times_they_are_looked_for_are_no_error(n):
    some = np.zeros(n, np.uint64)
    assert exact.repeated_hashes(lambda: [some], n, 10).tolist() == [0] * (n >= 10)


def test_hashes_are_counted_in_passes_over_ranges_of_them():
    generator = np.random.default_rng(0)
    some = [generator.integers(0, 1 << 64, 500, np.uint64) for _ in range(4)]
    some.append(np.concatenate([some[0][:50], some[1][:20], some[0][:10]]))
    for times, n in ((2, 70), (3, 10)):
        expected = exact.repeated_hashes(lambda: some, 2080, times)
        assert len(expected) == n and (np.diff(expected) > 0).all()
        for memory in (8 * 2080, 3000, 100):
            assert (exact.repeated_hashes(lambda: some, 2080, times, memory) == expected).all()


def test_a_second_pass_over_the_library_with_planted_copies_finds_below_a_thousandth():
    texts = [path.read_text(encoding="utf-8") for path in MODULES[:25]]
    generator = random.Random(0)
    dirty = []
    for text in texts:
        other, at = generator.choice(texts), generator.randrange(len(text) + 1)
        start = generator.randrange(max(1, len(other) - 2000))
        dirty.append(text[:at] + other[start : start + 2000] + text[at:])
    once = remove(dirty)
    n_before, n_once = sum(map(len, dirty)), sum(map(len, once))
    assert n_before - n_once > 0.6 * 2000 * len(texts)
    assert n_once - sum(map(len, remove(once))) < 0.001 * n_once


def test_one_letter_a_million_times_is_one_word():
    assert remove(["a" * 1_000_000]) == ["a" * 1_000_000]
    assert remove(["a " * 20_000])[0].split() == ["a"] * exact.WORDS


def test_long_lines_are_hashed_without_the_spaces_around_them():
    text = b"short\n   a line of more than thirty characters  \r\na line of more than thirty characters"
    hashes, places = exact.lines(text)
    assert hashes[0] == hashes[1] and text[slice(*places[1])] == b"a line of more than thirty characters"
    assert exact.cut(text, places) == b"short\n"
