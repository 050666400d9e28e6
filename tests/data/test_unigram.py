"""data/unigram.py and data/lattices.py against sums over all segmentations, and on text."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import unigram as module
from data.lattices import NO_EDGE, UNKNOWN, Lattices
from data.pipeline import Pipeline
from data.unigram import best_pieces, learn_pieces, sample_pieces, train_unigram

WORDS = Counter({"▁abab": 5, "▁abc": 3, "bca": 2, "▁a": 7, "cabcab": 1})
# A text that never changes: in another one, two segmentations may be equally probable, between which ours and
# the library's rounding decide.
TEXT = (Path(__file__).parents[1] / "fixtures" / "prose_and_code.txt").read_text(encoding="utf-8")


def segmentations(word: str, pieces) -> list[tuple[str, ...]]:
    """Return all ways to write a word by pieces."""
    if not word:
        return [()]
    ends = [end for end in range(1, len(word) + 1) if word[:end] in pieces]
    return [(word[:end], *rest) for end in ends for rest in segmentations(word[end:], pieces)]


@pytest.fixture
def lattices() -> Lattices:
    return Lattices(WORDS, 100, 4)


@pytest.fixture
def log_p(lattices) -> np.ndarray:
    """Return log p of the pieces, of an unknown character, and of no edge."""
    p = np.random.default_rng(0).random(len(lattices.size)) + 0.1
    return np.concatenate((np.log(p / p.sum()), [-30, -np.inf]))


def test_the_first_pieces_are_all_characters_and_the_substrings_that_occur_twice(lattices):
    counts = Counter()
    for word, n in WORDS.items():
        for start, end in itertools.combinations(range(len(word) + 1), 2):
            if end - start <= 4:
                counts[word[start:end]] += n
    chars = {piece for piece in counts if len(piece) == 1}
    # Those of 4 characters are the longest here, and none is left out for a longer one.
    repeated = {piece for piece, n in counts.items() if n >= 2}
    always = {
        piece
        for piece in repeated
        if 1 < len(piece) < 4 and any(counts[piece + char] == counts[piece] for char in chars)
    }
    assert set(lattices.pieces()) == chars | repeated - always
    assert always and len(lattices.pieces()) == len(set(lattices.pieces()))
    by_piece = dict(zip(lattices.pieces(), lattices.covers, strict=True))
    assert all(by_piece[piece] == counts[piece] * len(piece) for piece in by_piece)


def test_expected_counts_are_sums_over_all_segmentations(lattices, log_p):
    pieces = lattices.pieces()
    scores = dict(zip(pieces, log_p, strict=False))
    expected, likelihood = Counter(), 0.0
    for word, n in WORDS.items():
        ways = {way: math.exp(sum(scores[piece] for piece in way)) for way in segmentations(word, scores)}
        total = sum(ways.values())
        likelihood += n * math.log(total)
        for way, p in ways.items():
            for piece in way:
                expected[piece] += n * p / total
    counts, found = lattices.expected_counts(log_p)
    assert found == pytest.approx(likelihood, rel=1e-12)
    np.testing.assert_allclose(counts, [expected[piece] for piece in pieces], rtol=1e-10)
    # They are the gradient of the likelihood.
    step = np.zeros_like(log_p)
    step[3] = 1e-5
    up, down = lattices.expected_counts(log_p + step)[1], lattices.expected_counts(log_p - step)[1]
    assert (up - down) / 2e-5 == pytest.approx(counts[3], rel=1e-6)


def test_best_counts_and_alternatives_are_those_of_the_best_segmentations(lattices, log_p):
    pieces = lattices.pieces()
    scores = dict(zip(pieces, log_p, strict=False))

    def best(word: str, without=()) -> tuple[str, ...] | None:
        ways = [way for way in segmentations(word, scores.keys() - without)]
        return max(ways, key=lambda way: sum(scores[piece] for piece in way), default=None)

    expected = Counter()
    for word, n in WORDS.items():
        for piece in best(word):
            expected[piece] += n
    np.testing.assert_array_equal(lattices.best_counts(log_p), [expected[piece] for piece in pieces])
    found, parts = lattices.alternatives(log_p)
    for piece, score, row in zip(pieces, found, parts, strict=True):
        way = best(piece, {piece})
        assert [pieces[i] for i in row[row != NO_EDGE][::-1]] == list(way or ()), piece
        assert score == (pytest.approx(sum(scores[p] for p in way)) if way else -np.inf)


def test_a_character_that_is_removed_is_unknown(lattices, log_p):
    pieces = lattices.pieces()
    kept = np.array([i for i, piece in enumerate(pieces) if "c" not in piece])
    lattices.keep(kept)
    assert lattices.pieces() == [pieces[i] for i in kept]
    n_unknown = sum(n * word.count("c") for word, n in WORDS.items())
    starts = lattices.starts[:, None] + np.arange(8)
    assert (lattices.ends == UNKNOWN).sum() == sum(word.count("c") for word in WORDS)
    counts, _ = lattices.expected_counts(np.concatenate((log_p[kept], [-30, -np.inf])))
    n_chars = sum(n * len(word) for word, n in WORDS.items())
    assert counts @ lattices.size == pytest.approx(n_chars - n_unknown) and starts.shape[0] == len(WORDS)


def test_digamma():
    scipy = pytest.importorskip("scipy.special")
    x = np.array([1e-3, 0.5, 1, 2.5, 6.9, 7, 100, 1e9])
    np.testing.assert_allclose(module.digamma(x), scipy.digamma(x), rtol=1e-9)


def test_training_raises_the_likelihood_and_ends_at_the_size():
    words = Counter("▁" + word for word in TEXT.split())
    pieces = learn_pieces(words, 300, coverage=1.0)
    assert len(pieces) == len({piece for piece, _ in pieces}) == 300
    assert {char for word in words for char in word} <= {piece for piece, _ in pieces}
    assert [score for _, score in pieces] == sorted((score for _, score in pieces), reverse=True)
    assert "▁the" in dict(pieces) and sum(math.exp(score) for _, score in pieces) == pytest.approx(
        1, abs=0.05
    )
    # E and M never lower the likelihood, apart from the prior and from rare pieces that are removed.
    lattices = Lattices(words, 2000, 8)
    log_p, found = np.log(lattices.covers / lattices.covers.sum()), []
    for _ in range(4):
        log_p, likelihood = module.em_round(lattices, log_p)
        found.append(likelihood)
    assert found == sorted(found) and found[3] > found[0]


def test_no_piece_has_characters_of_two_scripts_and_spaces_come_first():
    words = Counter({"▁foo(bar);": 9, "▁日本語カナabc": 9, "▁▁▁x": 5, "é2x": 4})
    for piece, _ in learn_pieces(words, 25, coverage=1.0):
        assert module.RUNS.fullmatch(piece) or set(piece) == {"▁"}, piece
    assert module.RUNS.findall("▁foo(bar);▁▁x") == ["▁foo", "(", "bar", ");", "▁", "▁x"]
    assert module.RUNS.findall("▁日本語カナーabc▁") == ["▁日本語カナー", "abc", "▁"]


def test_the_best_segmentation_is_the_best_of_all():
    draw = random.Random(0)
    words = ["".join(draw.choices("ab", k=n)) for n in range(1, 5) for _ in range(4)]
    vocab = [["<unk>", 0.0], *([piece, -draw.random() * 5] for piece in sorted({*words, "a", "b"}))]
    encode, scores = best_pieces({"vocab": vocab, "unk_id": 0}, ()), dict(vocab)
    for _ in range(50):
        word = "".join(draw.choices("ab", k=9))
        found = sum(vocab[i][1] for i in encode(word))
        best = max(
            sum(scores[piece] for piece in way) for way in segmentations(word, scores.keys() - {"<unk>"})
        )
        assert found == pytest.approx(best) and "".join(vocab[i][0] for i in encode(word)) == word


def test_unknown_characters_side_by_side_are_one_token_or_their_bytes():
    vocab = [["<unk>", 0.0], ["a", -1.0], *([piece, 0.0] for piece in module.BYTE_PIECES)]
    assert best_pieces({"vocab": vocab, "unk_id": 0}, ())("é☃aé") == [0, 1, 0]
    encode = best_pieces({"vocab": vocab, "unk_id": 0, "byte_fallback": True}, ())
    assert encode("éaé") == [2 + 0xC3, 2 + 0xA9, 1, 2 + 0xC3, 2 + 0xA9]
    assert encode("<0x41>") == [2 + byte for byte in b"<0x41>"]  # the name of a byte is text


def test_samples_follow_the_probabilities_of_all_segmentations():
    scores = {"a": -2.0, "b": -1.5, "ab": -2.5, "ba": -3.0, "aba": -4.0}
    draw, n = random.Random(1), 4000
    for alpha in (1.0, 0.3):
        ways = {way: math.exp(alpha * sum(scores[p] for p in way)) for way in segmentations("abab", scores)}
        drawn = Counter(tuple(sample_pieces("abab", scores, alpha, draw)) for _ in range(n))
        assert drawn.keys() <= ways.keys()
        for way, weight in ways.items():
            p = weight / sum(ways.values())
            assert abs(drawn[way] - n * p) < 5 * math.sqrt(n * p * (1 - p)), way
    assert set(sample_pieces("ab☃", scores, 50.0, draw)) == {"ab", "☃"}


@pytest.mark.parametrize("lossless", [True, False])
def test_a_trained_tokenizer_writes_its_text_and_is_the_librarys(lossless, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = ["--vocab-size", "700", "--byte-fallback", "--out", str(tmp_path / "learned")]
    module.main([str(tmp_path / "text.txt"), *flags, *([] if lossless else ["--like-t5"])])
    tokenizer = Pipeline.load(tmp_path / "learned")
    assert tokenizer.n_vocab == 700 and tokenizer.eot == "</s>" and tokenizer.pad_id == 0
    text = "  def new(self):\n\t\treturn '☃ new'  \n" if lossless else "def new(self): return '☃ new'"
    assert tokenizer.decode(tokenizer.encode(text)) == text or not lossless
    assert tokenizer.decode(tokenizer.encode(TEXT)) == (TEXT if lossless else " ".join(TEXT.split()))
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer.from_file(str(tmp_path / "learned" / "tokenizer.json"))
    assert theirs.encode(TEXT, add_special_tokens=False).ids == tokenizer.encode(TEXT, "all")


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="5 pieces are too few for"):
        train_unigram([TEXT], 8)
    with pytest.raises(ValueError, match="useful pieces, not 99997; ask for fewer"):
        train_unigram([TEXT], 100_000)
    with pytest.raises(ValueError, match="no text to learn from"):
        train_unigram([], 100)


def test_one_string_and_text_without_a_character_are_refused():
    with pytest.raises(TypeError, match="got one string; put it in a list"):
        train_unigram("ab ab ab ab", 5)
    with pytest.raises(ValueError, match="no characters; give texts that are not empty"):
        train_unigram(["\0\0\0"], 8)


def test_the_same_text_gives_the_same_tokenizer():
    first, second = (train_unigram([TEXT[:3000], TEXT[3000:6000]][::step], 200) for step in (1, -1))
    assert json.dumps(first) == json.dumps(second)
