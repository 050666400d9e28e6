"""The character map of SentencePiece: which characters are replaced before a text is cut.

A SentencePiece model carries its normalisation as a table from strings to strings, mostly Unicode's NFKC with
a few exceptions, so that it does not depend on a version of Unicode. The table is a *double-array trie* (Aoe
1989, IEEE Transactions on Software Engineering 15(9); the layout is that of the library darts-clone):

    4 bytes    the size of the trie in bytes, little-endian like all numbers
    the trie   units of 4 bytes
    the rest   the replacements, in UTF-8, each ended by a zero byte

All nodes are in one array of units. The children of a node are found from its *base* o: the byte c leads to
the unit u at place p = o XOR c, if the label of u is c. The base of the root is the offset of unit 0. In a
unit u:

    u & 0x800000FF                         the label; that of a leaf is no byte
    (u >> 10) << ((u & 0x200) >> 6)        the offset d: the base of this child is p XOR d
    u & 0x100                              not 0 if the bytes so far are a key. Then the unit at place p XOR d
                                           is a leaf, whose lowest 31 bits are the place of the replacement
"""

import base64
import functools
import re
import struct
from collections.abc import Callable, Iterator

import numpy as np
import regex

# A function from the bytes of a text to the keys with which it begins, the shortest first: for each one its
# length in bytes and its replacement.
Keys = Callable[[bytes], Iterator[tuple[int, str]]]
LONGEST_KEY = 64  # bytes; the published maps have keys of at most 12
# A match is a run of printable ASCII, or else one grapheme. A run lacks its last character if a character
# beyond ASCII follows, since that may be a mark on it. PLAIN finds these runs in bytes.
GRAPHEMES = regex.compile(r"[ -~]+(?![^\x00-\x7f])|\X")
PLAIN = re.compile(rb"[ -~]+(?![\x80-\xff])")


def read_charsmap(blob: bytes) -> tuple[Keys, bool]:
    """Return the function that finds the keys of a character map, and whether there are plain keys.

    A plain key is one printable ASCII character, or begins with two of them. Raises ValueError if the map is
    damaged.
    """
    try:
        (size,) = struct.unpack_from("<I", blob)
        units = np.frombuffer(blob, "<u4", size // 4, offset=4)
        texts = blob[4 + size :]
        places = units[units >= 1 << 31] & 0x7FFFFFFF
        if size < 4 or texts[-1:] != b"\0" or (len(places) and places.max() >= len(texts)):
            raise ValueError("its parts have other sizes")
        texts.decode()
    except (struct.error, ValueError) as error:
        raise ValueError(f"precompiled_charsmap is damaged ({error}); download the file again") from None
    table: list[int] = units.tolist()
    n_units = len(table)

    def offset(unit: int) -> int:
        return (unit >> 10) << ((unit & 0x200) >> 6)

    def keys(text: bytes) -> Iterator[tuple[int, str]]:
        """Yield the keys with which a text begins: follow its bytes through the trie as far as they lead."""
        base = offset(table[0])
        for n, byte in enumerate(text[:LONGEST_KEY], 1):
            place = base ^ byte
            if byte == 0 or place >= n_units or table[place] & 0x800000FF != byte:
                return
            base = place ^ offset(table[place])
            if table[place] & 0x100 and base < n_units:
                start = table[base] & 0x7FFFFFFF
                yield n, texts[start : texts.find(b"\0", start)].decode(errors="replace")

    # Look for plain keys. The published maps have none, so printable ASCII can be passed over.
    plain, has_plain_keys = range(0x20, 0x7F), False
    for first in plain:
        place = offset(table[0]) ^ first
        if place < n_units and table[place] & 0x800000FF == first:
            base = place ^ offset(table[place])
            goes_on = any(base ^ b < n_units and table[base ^ b] & 0x800000FF == b for b in plain)
            has_plain_keys |= goes_on or table[place] & 0x100 != 0
    return keys, has_plain_keys


def precompiled(part: dict) -> Callable[[str], str]:
    r"""Return the normalizer Precompiled of a tokenizer.json, as the library applies it.

    A grapheme of at most five bytes is replaced by the replacement of the shortest key that it begins with,
    so "\r\n" becomes one space. In longer graphemes, and in those without a key, each character is looked up
    alone. A part with the entry "longest", which formats/sentencepiece_model.py writes, is applied by
    `longest_first`.
    Raises ValueError for a damaged map.
    """
    try:
        blob = base64.b64decode(part["precompiled_charsmap"], validate=True)
    except ValueError as error:
        raise ValueError(f"precompiled_charsmap is not base64 ({error}); download the file again") from None
    keys, has_plain_keys = read_charsmap(blob)
    if part.get("longest"):
        return longest_first(keys, has_plain_keys)

    def shortest(text: str) -> str | None:
        """Return the replacement of the shortest key that a text begins with, or None."""
        return next((replacement for _, replacement in keys(text.encode())), None)

    changed = {ord(char): new for char in map(chr, range(0x20, 0x7F)) if (new := shortest(char)) is not None}

    @functools.lru_cache(1 << 16)
    def replace(grapheme: str) -> str:
        """Return the replacement of a grapheme that has other characters than printable ASCII."""
        whole = shortest(grapheme) if len(grapheme.encode()) < 6 else None
        if whole is not None:
            return whole
        return "".join([char if (new := shortest(char)) is None else new for char in grapheme])

    def normalized(text: str) -> str:
        """Return a text with its graphemes replaced."""
        pieces = GRAPHEMES.findall(text)
        return "".join(
            [p.translate(changed) if p.isascii() and p.isprintable() else replace(p) for p in pieces]
        )

    return normalized


def longest_first(keys: Keys, has_plain_keys: bool) -> Callable[[str], str]:
    """Return the function that replaces the longest key at each place of a text, as SentencePiece does.

    keys, has_plain_keys: of `read_charsmap`.
    """

    def longest(text: bytes) -> tuple[int, str] | None:
        """Return the longest key that a text begins with, or None."""
        return max(keys(text), default=None, key=lambda found: found[0])

    def replace(text: str) -> str:
        """Return a text with its longest keys replaced, from left to right."""
        raw, parts, done, at = text.encode(), [], 0, 0  # parts: the result for the first `done` bytes
        while at < len(raw):
            # Without plain keys, printable ASCII stays as it is.
            plain = None if has_plain_keys else PLAIN.match(raw, at)
            found = longest(raw[at : at + LONGEST_KEY]) if plain is None else None
            if plain is not None:
                at = plain.end()
            elif found is not None:
                parts += [raw[done:at].decode(), found[1]]
                done = at = at + found[0]
            else:  # to the next character
                at += 1 + sum(raw[at] >= first for first in (0xC0, 0xE0, 0xF0))
        return "".join([*parts, raw[done:].decode()])

    return replace
