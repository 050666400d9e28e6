"""data/charsmap.py against the library, with SentencePiece's default map."""

import base64
import lzma
import struct
import unicodedata
from pathlib import Path

import pytest

from data.charsmap import precompiled, read_charsmap

BLOB = lzma.decompress((Path(__file__).parents[1] / "fixtures" / "tokenizers" / "nmt_nfkc.xz").read_bytes())


def part(blob: bytes, **more) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()} | more


def test_the_map_is_nfkc_with_a_few_exceptions():
    table = read_charsmap(BLOB)
    assert len(table) > 10_000 and max(map(len, table)) > 1
    assert (
        table["ﬁ"] == "fi" and table["e\u0301"] == "é" and table["\u3000"] == " " and table["\u200b"] == " "
    )
    same = sum(unicodedata.normalize("NFKC", key) == value for key, value in table.items())
    assert same / len(table) > 0.99


def test_every_key_alone_and_among_others_is_replaced_as_the_library_does():
    library = pytest.importorskip("tokenizers")
    theirs, ours = library.normalizers.Precompiled(BLOB), precompiled(part(BLOB))
    keys = sorted(read_charsmap(BLOB))
    for i in range(0, len(keys), 40):
        text = "x".join(keys[i : i + 40]) + " a\u0301\u0323 e\u0301\u0324 \r\n A\x00z"
        assert ours(text) == theirs.normalize_str(text)


def test_the_longest_key_counts_in_sentencepieces_own_files():
    ours = precompiled(part(BLOB, longest=True))
    assert ours("ｶﾞx ｶ e\u0301\u0324\ufb01") == "ガx カ é\u0324fi"
    assert precompiled(part(BLOB))("ｶﾞ") != "ガ"  # the library takes the shortest


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x01",
        struct.pack("<I", 10**6),
        struct.pack("<II", 4, 0x7FFFFFFF),
        BLOB[:5000],
        BLOB[:300_000][:-7],
    ],
)
def test_a_damaged_map_is_refused_or_read(blob):
    try:
        read_charsmap(blob)
    except ValueError as error:
        assert str(error).startswith("precompiled_charsmap is damaged") and "\n" not in str(error)


def test_a_trie_that_leads_back_to_itself_is_refused():
    # Every byte leads from a unit to a unit of the same block with that label.
    units = [byte | (1 << 10) if byte else 1 << 10 for byte in range(512)]
    with pytest.raises(ValueError, match="circle"):
        read_charsmap(struct.pack("<I512I", 2048, *units) + b"\0")
