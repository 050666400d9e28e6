"""Near duplicates: signatures follow the S-curve, clusters have one survivor, odd texts stay apart."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import near_duplicates as near

MODULES = sorted(Path(os.__file__).parent.glob("*.py"))  # of Python's own library


def removed_from(texts: list[str], similarity: float = near.SIMILARITY) -> dict[int, near.Alike]:
    sets = [near.shingles(text) for text in texts]
    bands = np.array([near.Signatures().in_bands(one) for one in sets])
    return {alike.text: alike for alike in near.find(bands, sets.__getitem__, similarity)}


def text_of(generator: np.random.Generator, n: int) -> list[str]:
    return [f"word{'abcdefghij'[i % 10]}{chr(97 + i // 10 % 26)}" for i in generator.integers(0, 260, n)]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8])
def test_candidates_and_agreeing_hashes_are_as_frequent_as_the_formulas_state(similarity):
    signatures, generator, n = near.Signatures(), np.random.default_rng(7), 600
    pairs = [near.planted_pair(generator, similarity, 200) for _ in range(n)]
    J = near.jaccard(*pairs[0])
    same = np.array([signatures.of(a) == signatures.of(b) for a, b in pairs])
    assert abs(J - similarity) < 0.005
    assert abs(same.mean() - J) < 3 * np.sqrt(J * (1 - J) / same.size)
    candidates, expected = same.reshape(n, near.BANDS, near.ROWS).all(2).any(1), near.s_curve(J)
    assert abs(candidates.mean() - expected) < 3 * np.sqrt(expected * (1 - expected) / n)
    # The orders are independent: the share of agreeing hashes varies as the binomial distribution does.
    assert 0.8 < same.mean(1).var() / (J * (1 - J) / near.BANDS / near.ROWS) < 1.25


def test_planted_copies_are_removed_as_often_as_the_s_curve_states_and_nothing_else():
    # A copy has some words replaced; which pairs are alike is computed for all of them, without signatures.
    generator = np.random.default_rng(1)
    originals = [text_of(generator, 200) for _ in range(120)]
    copies = []
    for words in originals:
        words = list(words)
        for place in generator.choice(len(words), generator.integers(1, 7), replace=False):
            words[place] = f"changed{chr(97 + place % 26)}{chr(97 + place // 26)}"
        copies.append(words)
    texts = [" ".join(words) for words in originals + copies]
    sets = [near.shingles(text) for text in texts]
    J = [near.jaccard(sets[i], sets[i + 120]) for i in range(120)]
    found = removed_from(texts)
    assert all(near.jaccard(sets[a.text], sets[a.representative]) >= near.SIMILARITY for a in found.values())
    assert all(a.representative == a.text - 120 for a in found.values())  # no pair but those planted
    alike = [near.s_curve(similarity) for similarity in J if similarity >= near.SIMILARITY]
    sigma = np.sqrt(sum(p * (1 - p) for p in alike))
    assert len(alike) > 50 and abs(len(found) - sum(alike)) <= 3 * sigma


def test_a_chain_is_not_merged_and_a_cluster_keeps_its_first_text():
    words = text_of(np.random.default_rng(3), 400)
    other = text_of(np.random.default_rng(4), 400)
    chain = [
        " ".join(other[: 24 * i] + words[24 * i :]) for i in range(6)
    ]  # each alike to the next, not further
    sets = [near.shingles(text) for text in chain]
    assert near.jaccard(sets[0], sets[1]) > 0.85 and near.jaccard(sets[0], sets[5]) < 0.6
    found = removed_from(chain)
    left = set(range(6)) - set(found)
    assert {0} < left and all(a.representative in left for a in found.values())
    assert all(near.jaccard(sets[a.text], sets[a.representative]) >= 0.75 for a in found.values())
    # Copies of one text: the first stays, all others are removed for its sake.
    cluster = removed_from([chain[0]] * 5)
    assert set(cluster) == {1, 2, 3, 4} and {a.representative for a in cluster.values()} == {0}


def test_a_candidate_that_is_not_alike_stays():
    sets = [near.planted_pair(np.random.default_rng(0), 0.5)[i] for i in (0, 1)]
    same_bands = np.ones((2, near.BANDS), np.uint64)
    counts = Counter()
    assert not list(near.find(same_bands, sets.__getitem__, counts=counts)) and counts == {"compared": 1}


def test_empty_short_chinese_and_emoji_texts_are_neither_lost_nor_all_merged():
    texts = ["", "", "   ", "yes", "no", "yes", "...", "---", "good morning", "good evening"]
    texts += ["今天天气很好我们去公园散步", "今天天气很好我们去公园散步。", "昨天下雨所以大家都在家里看书"]
    texts += ["😀🎉👍", "😀🎉👍😀", "🚀🌧🍞", "😀🎉👍"]
    found = removed_from(texts)
    assert {(a.text, a.representative) for a in found.values()} == {(5, 3), (11, 10), (16, 13)}


def test_case_accents_punctuation_and_values_of_numbers_do_not_matter_but_words_do():
    base = "Le café est ouvert le 12 mai, de 9 à 17 heures"
    same = "le cafe est OUVERT le 3 mai de 10 a 18 heures!"
    assert near.jaccard(near.shingles(base), near.shingles(same)) == 1
    assert near.words_of("self.x_y = 3.14  # 今天") == ["self", "x", "y", "0", "0", "今", "天"]
    assert near.jaccard(near.shingles("one two three"), near.shingles("one two four")) == 0
    assert near.jaccard(near.shingles("one two three"), near.shingles("one two three four")) == 0


def test_hashes_are_the_same_in_every_process():
    # Python's own hash of a string differs between processes. These values were computed once.
    assert near.HASHES["plinth"] == 0x96E36E3E9C7BEEC8
    assert int(near.shingles("a b c d e")[0]) == 0xA750A25C47D3D618


def test_a_bucket_of_many_texts_that_are_not_alike_takes_linear_time():
    n = 400
    bands = np.ones((n, near.BANDS), np.uint64)
    sets = near.mix(np.arange(n, dtype=np.uint64))[:, None]
    counts = Counter()
    assert not list(near.find(bands, sets.__getitem__, counts=counts))
    assert counts["compared"] <= n * near.MOST_COMPARED


def test_modules_of_the_library_are_compared_with_few_others(capsys):
    texts = [path.read_text(encoding="utf-8") for path in MODULES[:15]]
    counts = Counter()
    sets = [near.shingles(text) for text in texts]
    bands = np.array([near.Signatures().in_bands(one) for one in sets])
    assert not list(near.find(bands, sets.__getitem__, counts=counts)) and counts["compared"] < 10
    near.main(["--pairs", "20"])
    assert "0.95    100.0%  100.0%" in capsys.readouterr().out
