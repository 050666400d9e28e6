"""data/merges.py against merges by the definition."""

import random
from itertools import pairwise

import pytest

from data.merges import BYTE_PIECES, byte_pairs, merge, never_joins
from data.wordpiece import WordPiece, train_wordpiece


def by_definition(symbols: list[int], merges: dict) -> list[int]:
    """Join the pair with the lowest rank, the leftmost of equal ones, again and again."""
    symbols = list(symbols)
    while True:
        found = [(merges[pair][0], i) for i, pair in enumerate(pairwise(symbols)) if pair in merges]
        if not found:
            return symbols
        _, i = min(found)
        symbols[i : i + 2] = [merges[symbols[i], symbols[i + 1]][1]]


def test_merging_joins_the_pair_of_the_lowest_rank_first():
    draw = random.Random(0)
    for _ in range(300):
        merges, n = {}, 3
        for rank in range(draw.randrange(1, 12)):
            merges.setdefault((draw.randrange(n), draw.randrange(n)), (rank, n))
            n += 1
        symbols = draw.choices(range(3), k=draw.randrange(0, 30))
        assert merge(symbols, merges) == by_definition(symbols, merges)
    assert merge([1] * 100_000, {(1, 1): (0, 2)}) == [2] * 50_000  # and is fast


def test_a_text_is_cut_at_spaces_only_where_no_token_has_one_inside():
    vocab = {"▁": 0, "a": 1, "▁a": 2, "▁▁": 3}
    assert never_joins({"vocab": vocab}, "▁")
    assert not never_joins({"vocab": vocab | {"a▁": 4}}, "▁")
    assert not never_joins({"vocab": vocab, "ignore_merges": True}, "▁")
    assert not never_joins({"vocab": {"a": 0}}, "▁")


def test_unknown_characters_prefixes_and_suffixes():
    vocab = {"?": 0, "a": 1, "-b": 2, "-b!": 3, "a-b": 4, "ab!": 5, "<0xC3>": 6, "<0xA9>": 7}
    model = {"vocab": vocab, "merges": ["a -b!"], "continuing_subword_prefix": "-", "end_of_word_suffix": "!"}
    model["vocab"] = vocab | {"ab!": 5}
    encode = byte_pairs(model | {"unk_token": "?"}, covered=False)
    assert encode("ab") == [5] and encode("abb") == [1, 2, 3] and encode("xyb") == [0, 0, 3]
    assert byte_pairs(model | {"unk_token": "?", "fuse_unk": True}, covered=False)("xyb") == [0, 3]
    plain = {"vocab": vocab, "merges": [], "unk_token": "?", "byte_fallback": True}
    assert byte_pairs(plain, covered=False)("éa☃") == [6, 7, 1, 0]  # not all bytes of ☃ are tokens
    with pytest.raises(ValueError, match="byte_fallback without a token <0x00>"):
        byte_pairs(plain | {"unk_token": None}, covered=False)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("lacking", [(), ("<0xC3>",), ("<0xC3>", "<0xE2>")])
def test_characters_whose_bytes_are_no_tokens_are_unknown_in_the_librarys_order(fuse, lacking):
    library = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    vocab |= {piece: i for i, piece in enumerate(BYTE_PIECES, len(vocab)) if piece not in lacking}
    options = {"unk_token": "<unk>", "fuse_unk": fuse, "byte_fallback": True}
    theirs = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[("a", "b")], **options))
    encode = byte_pairs({"vocab": vocab, "merges": ["a b"], **options}, covered=False)
    draw = random.Random(0)
    for _ in range(200):
        word = "".join(draw.choices("abxé…ü", k=draw.randrange(1, 9)))
        assert encode(word) == theirs.encode(word).ids


def test_wordpiece_learns_the_most_frequent_pairs():
    texts = ["low low low lower lowest", "newer NEWER new wide wider"] * 3
    tokenizer = train_wordpiece(texts, 40)
    words = [(word.lower(), 1) for text in texts for word in text.split()]
    written = [[word[0], *("##" + c for c in word[1:])] for word, _ in words]
    alphabet = sorted({piece for word in written for piece in word})
    pieces = list(alphabet)
    while len(pieces) < 35:
        counts = {}
        for word in written:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(
            counts,
            key=lambda pair: (-counts[pair], pieces.index(pair[0]), pieces.index(pair[1])),
            default=None,
        )
        if best is None or counts[best] < 2:
            break
        union = best[0] + best[1].removeprefix("##")
        pieces.append(union)
        for word in written:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [union]
                i += 1
    names = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    assert list(tokenizer.vocab) == names + pieces and len(pieces) > len(alphabet)
    assert (
        isinstance(tokenizer, WordPiece)
        and tokenizer.decode(tokenizer.encode("Lower NEWEST")) == "lower newest"
    )
    assert tokenizer.unk_id not in tokenizer.encode(" ".join(texts))
    with pytest.raises(ValueError, match="vocabulary size 10 is too small; the characters alone need"):
        train_wordpiece(texts, 10)
