"""language/word_corpus.py: words, their vocabulary and phrases."""

from collections import Counter

import numpy as np
import pytest

from language.word_corpus import encode, find_phrases, join_phrases, read_corpus, words_of

TEXTS = [
    text.split()
    for text in (
        "new york is big and new york is old",
        "the new times the york times new york times",
        "is the new york one new",
    )
]


def test_identifiers_are_split_at_underscores_humps_and_digits():
    found = words_of("def readHTTPHeader_line2(self, XMLParser, __init__): # Don't")
    assert found == ["def", "read", "http", "header", "line", "self", "xml", "parser", "init", "don", "t"]


def test_rare_words_are_removed_and_the_frequent_ones_come_first():
    corpus = encode(TEXTS, 2)
    counts = Counter(word for text in TEXTS for word in text)
    assert corpus.words[:2] == ["new", "york"] and corpus.counts.tolist() == sorted(
        corpus.counts, reverse=True
    )
    assert {w: counts[w] for w in corpus.words} == dict(zip(corpus.words, corpus.counts, strict=True))
    again = [[corpus.words[i] for i in corpus.ids[corpus.documents == d]] for d in range(3)]
    assert again == [[word for word in text if counts[word] >= 2] for text in TEXTS]
    assert corpus.ids.dtype == np.int64 and len(corpus) == sum(map(len, again))


def test_a_text_without_frequent_words_is_refused():
    with pytest.raises(ValueError, match="1 of 2 words occur at least 2 times"):
        encode([["a", "a", "b"]], 2)
    with pytest.raises(ValueError, match="min_count 0"):
        encode(TEXTS, 0)


def test_the_score_of_a_phrase_is_its_equation():
    # new 6, york 5, new york 4, 24 words.
    assert sum(map(len, TEXTS)) == 24
    found = find_phrases(TEXTS, 2, 1.0)
    assert found[("new", "york")] == pytest.approx((4 - 2) / (6 * 5) * 24, abs=1e-12)
    assert ("york", "times") not in found  # 2 - 2 = 0


def test_phrases_are_joined_from_the_left_and_a_word_is_in_one_of_them():
    joined = join_phrases(["a", "b", "c", "a", "b"], {("a", "b"), ("b", "c")})
    assert joined == ["a_b", "c", "a_b"]
    assert join_phrases([], {("a", "b")}) == []


def score(worda_count, wordb_count, bigram_count, len_vocab, min_count, corpus_word_count):
    """Return the score of the authors' code, in gensim's signature; its own has len_vocab for N."""
    return (bigram_count - min_count) / worda_count / wordb_count * corpus_word_count


def test_phrases_are_those_of_gensim():
    phrases = pytest.importorskip("gensim.models.phrases")

    generator = np.random.default_rng(0)
    texts = [[f"w{i}" for i in generator.geometric(0.2, 40)] for _ in range(30)]
    texts = [[*text, "return", "value", *text[:3]] for text in texts]
    peer = phrases.Phrases(texts, min_count=3, threshold=1.2, scoring=score)
    ours = find_phrases(texts, 3, 1.2)
    assert len(ours) > 3
    theirs = peer.export_phrases()
    assert {"_".join(pair): pytest.approx(s) for pair, s in ours.items()} == theirs
    assert [join_phrases(text, ours) for text in texts] == [peer[text] for text in texts]


def test_two_passes_find_longer_phrases(tmp_path):
    generator = np.random.default_rng(1)
    noise = [" ".join("abcdefgh"[i] * 2 for i in generator.integers(0, 8, 200)) for _ in range(40)]
    text = " . ".join(f"{line} keyboard interrupt error {line}" for line in noise)
    (tmp_path / "text.txt").write_text(text)
    lines = []
    corpus = read_corpus(str(tmp_path / "text.txt"), 5, 2, lines.append)
    assert "keyboard_interrupt_error" in corpus.words and len(lines) == 2
