"""The character map of SentencePiece: which characters are replaced before a text is cut.

A SentencePiece model carries its normalisation as a table from strings to strings, mostly Unicode's NFKC with
a few exceptions, so that it does not depend on a version of Unicode. The table is a *double-array trie* (Aoe
1989, IEEE Transactions on Software Engineering 15(9); the layout is that of the library darts-clone):

    4 bytes    the size of the trie in bytes, little-endian like all numbers
    the trie   units of 4 bytes
    the rest   the replacements, in UTF-8, each ended by a zero byte

All nodes are in one array. From the node with the offset o, the byte c leads to the unit at o XOR c, if the
unit has the label c. In a unit u:

    u & 0x800000FF                         the label; of a leaf, it is no byte
    (u >> 10) << ((u & 0x200) >> 6)        the offset of its children, relative to the unit, by XOR
    u & 0x100                              is the string up to here a key? Then the unit at the node's own
                                           offset is a leaf, whose lowest 31 bits are the place of its
                                           replacement
"""

import base64
import functools
import struct
from collections.abc import Callable

import numpy as np
import regex

LABELS = np.arange(1, 256, dtype=np.uint32)
PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]
LONGEST_KEY = 64  # bytes; the published maps have keys of at most 15
# Printable ASCII, without a last character that a mark may follow; otherwise a grapheme.
GRAPHEMES = regex.compile(r"[ -~]+(?![^\x00-\x7f])|\X")


def read_charsmap(blob: bytes) -> dict[str, str]:
    """Return the table of a character map. Raises ValueError if its trie is damaged."""
    try:
        (size,) = struct.unpack_from("<I", blob)
        units = np.zeros(size // 1024 * 256 + 256, np.uint32)  # whole blocks of 256
        units[: size // 4] = np.frombuffer(blob, "<u4", size // 4, offset=4)
        replacements = blob[4 + size :]
        table: dict[str, str] = {}

        # Visit all nodes. A damaged trie may lead back to a node.
        waiting, n_nodes = [(0, b"")], 0
        while waiting:
            place, key = waiting.pop()
            unit, n_nodes = int(units[place]), n_nodes + 1
            if n_nodes > len(units) or len(key) > LONGEST_KEY:
                raise ValueError("the trie has a circle")
            base = place ^ (unit >> 10) << ((unit & 0x200) >> 6)
            if unit & 0x100 and key:
                start = int(units[base]) & 0x7FFFFFFF
                table[key.decode()] = replacements[start : replacements.index(b"\0", start)].decode()
            for i in np.flatnonzero(units[base ^ LABELS] & 0x800000FF == LABELS):
                waiting.append((base ^ int(LABELS[i]), key + bytes([LABELS[i]])))
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"precompiled_charsmap is damaged ({error}); download the file again") from None
    return table


def longest_first(table: dict[str, str]) -> Callable[[str], str]:
    """Return the function that replaces the longest key at each place of a text, as SentencePiece does."""
    longest = max(map(len, table), default=0)
    first = regex.compile("|".join(map(regex.escape, sorted({key[0] for key in table}))) or r"(?!)")

    def replace(text: str) -> str:
        parts, done = [], 0
        for match in first.finditer(text):
            start = match.start()
            for end in range(min(len(text), start + longest), start, -1):
                if start >= done and text[start:end] in table:
                    parts += [text[done:start], table[text[start:end]]]
                    done = end
                    break
        return "".join([*parts, text[done:]])

    return replace


def precompiled(part: dict) -> Callable[[str], str]:
    r"""Return the normalizer Precompiled of a tokenizer.json, as the library applies it.

    A grapheme of at most five bytes is replaced by what the table has for the shortest key that it begins
    with, so "\r\n" is one space. In longer ones, and in those without a key, each character is replaced. A
    part that was read from a SentencePiece model is marked as "longest", and then follows `longest_first`.
    Raises ValueError for a damaged map.
    """
    try:
        blob = base64.b64decode(part["precompiled_charsmap"], validate=True)
    except ValueError as error:
        raise ValueError(f"precompiled_charsmap is not base64 ({error}); download the file again") from None
    table = read_charsmap(blob)
    if part.get("longest"):
        return longest_first(table)
    printable = {ord(char): table[char] for char in PRINTABLE if char in table}

    @functools.lru_cache(1 << 16)
    def replace(grapheme: str) -> str:
        """Return the replacement of a grapheme, or of printable ASCII."""
        if " " <= grapheme[0] <= "~" and len(grapheme) != 1 and grapheme.isascii():
            return grapheme.translate(printable)
        if len(grapheme.encode()) < 6:
            for end in range(1, len(grapheme) + 1):
                if grapheme[:end] in table:
                    return table[grapheme[:end]]
        return "".join(table.get(char, char) for char in grapheme)

    return lambda text: "".join([replace(grapheme) for grapheme in GRAPHEMES.findall(text)])
