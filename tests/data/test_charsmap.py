"""data/charsmap.py against the library, with SentencePiece's default map."""

import base64
import lzma
import random
import struct
import unicodedata
from pathlib import Path

import pytest

from data.charsmap import longest_first, precompiled, read_charsmap

BLOB = lzma.decompress((Path(__file__).parents[1] / "fixtures" / "tokenizers" / "nmt_nfkc.xz").read_bytes())


def part(blob: bytes, **more) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()} | more


def test_keys_are_found_the_shortest_first():
    keys, has_plain_keys = read_charsmap(BLOB)
    assert not has_plain_keys
    assert list(keys("ﬁx".encode())) == [(3, "fi")] and list(keys(b"a")) == []
    assert list(keys("ｶﾞ".encode())) == [(3, "カ"), (6, "ガ")]
    assert list(keys("\u3000".encode())) == list(keys("\u200b".encode())) == [(3, " ")]


def test_characters_are_replaced_as_the_library_does():
    library = pytest.importorskip("tokenizers")
    theirs, ours = library.normalizers.Precompiled(BLOB), precompiled(part(BLOB))
    draw = random.Random(0)
    chars = [chr(code) for code in range(0x3400) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    chars = chars[::3] + [chr(code) for code in (*range(0xF900, 0xFFFE, 9), *range(0x1D400, 0x1D7FF, 9))]
    draw.shuffle(chars)
    marks = "\u0301\u0323\u3099\uff9e\u200d"
    for i in range(0, len(chars), 100):
        text = "".join(char + draw.choice(marks) * (draw.random() < 0.3) for char in chars[i : i + 100])
        text += "plain a\u0301\u0323 e\u0301\u0324 \r\n A\x00z"
        assert ours(text) == theirs.normalize_str(text)


def test_the_longest_key_counts_in_sentencepieces_own_files():
    ours = precompiled(part(BLOB, longest=True))
    assert ours("ｶﾞx ｶ e\u0301\u0324\ufb01") == "ガx カ é\u0324fi"
    assert precompiled(part(BLOB))("ｶﾞ") != "ガ"  # the library takes the shortest


def test_plain_characters_may_be_keys_too():
    keys = {b"..": "…", b"A": "a", b"Ab": "x"}

    def search(text):
        yield from ((len(key), keys[key]) for key in sorted(keys, key=len) if text.startswith(key))

    assert longest_first(search, True)("A...Ab é.") == "a….x é."


@pytest.mark.parametrize("key", [b"A", b"...", b"(c)"])
def test_a_plain_key_of_any_length_is_found_in_the_map(key):
    # A trie of this key alone: unit 0 is the root; the unit of byte i is at place 256 (i + 1) + byte, where
    # place 256 (i + 1) is what the children of the byte before are counted from; then a leaf.
    units, base = [0xFF] * 256 * (len(key) + 2), 0
    places = [256 * (i + 1) + byte for i, byte in enumerate(key)]
    for place, label in zip([0, *places], [0, *key], strict=True):
        below = 256 * (base + 1)  # of the children of this unit
        is_key = place == places[-1]
        units[place] = label | ((place ^ below) << 10) | (0x100 if is_key else 0)
        base += 1
    units[256 * base] = 1 << 31  # the leaf, with the replacement at 0
    blob = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + b"!\0"
    keys, has_plain_keys = read_charsmap(blob)
    assert list(keys(key + b"x")) == [(len(key), "!")] and has_plain_keys
    assert precompiled(part(blob, longest=True))(f"ab{key.decode()}cé") == "ab!cé"


@pytest.mark.parametrize(
    "blob", [b"", b"\x01", struct.pack("<I", 10**6), struct.pack("<II", 4, 1 << 31), BLOB[:5000], BLOB[:-1]]
)
def test_a_damaged_map_is_refused(blob):
    with pytest.raises(ValueError, match=r"^precompiled_charsmap is damaged"):
        read_charsmap(blob)


def test_a_trie_that_leads_anywhere_is_only_followed_as_far_as_the_text_goes():
    # Every byte leads from a unit to a unit of the same block with that label, or beyond the last.
    for offset in (1 << 10, 0x1FFFFF << 10):
        units = [byte | offset | 0x100 for byte in range(256)]
        keys, _ = read_charsmap(struct.pack("<I256I", 1024, *units) + b"\0")
        assert len(list(keys(b"abc" * 1000))) <= 64
