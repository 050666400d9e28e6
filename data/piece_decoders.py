"""Decoders of tokenizers: how the tokens of a text become the text again.

A decoder is a part of a tokenizer.json, as a normalizer is (data/normalize.py). `decoder` returns the
function that a part describes, from a list of tokens to a list of texts, which are then joined. Examples,
with the families that use them:

    GPT-2, Llama 3     ByteLevel: characters of the byte alphabet become bytes
    BERT               WordPiece: a space in front of each token without "##"
    T5, ALBERT         Metaspace: "▁" becomes a space, and vanishes in the first token
    Llama 2, Mistral   Replace "▁" by " ", ByteFallback ("<0xE2>" becomes a byte), Fuse, Strip one space
"""

import re
from collections.abc import Callable
from itertools import groupby

from data.merges import BYTE_PIECES
from data.normalize import maker, replace
from data.pre_tokenize import metaspace_scheme
from formats.tokenizer_json import CHAR_TO_BYTE

Decoder = Callable[[list[str]], list[str]]
BYTES = {piece: byte for byte, piece in enumerate(BYTE_PIECES)}
# What the clean-up of the decoder WordPiece replaces, in this order.
CLEANUP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
CLEANUP += ((" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


def byte_level(part: dict) -> Decoder:
    """Return the decoder ByteLevel: a token is bytes, each written as a character of the byte alphabet.

    A token with any other character, such as a special token, is text.
    """

    def function(tokens: list[str]) -> list[str]:
        parts = [
            bytes([CHAR_TO_BYTE[char] for char in token])
            if all(char in CHAR_TO_BYTE for char in token)
            else token.encode()
            for token in tokens
        ]
        return [b"".join(parts).decode(errors="replace")]

    return function


def byte_fallback(part: dict) -> Decoder:
    """Return the decoder ByteFallback: a run of tokens such as "<0xE2>" is decoded as bytes in UTF-8.

    If they are not UTF-8, each byte becomes a U+FFFD.
    """

    def function(tokens: list[str]) -> list[str]:
        texts = []
        for is_byte, run in groupby(tokens, key=lambda token: token in BYTES):
            if not is_byte:
                texts += run
                continue
            raw = bytes([BYTES[token] for token in run])
            try:
                texts.append(raw.decode())
            except UnicodeDecodeError:
                texts += ["\ufffd"] * len(raw)
        return texts

    return function


def word_piece(part: dict) -> Decoder:
    """Return the decoder WordPiece: a token, but the first, loses its prefix, "##", or gets a space in front.

    With cleanup, spaces in front of punctuation marks and English contractions are removed, see CLEANUP.
    """
    prefix, cleanup = part["prefix"], part["cleanup"]

    def text(i: int, token: str) -> str:
        if i > 0:
            token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        for old, new in CLEANUP if cleanup else ():
            token = token.replace(old, new)
        return token

    return lambda tokens: [text(i, token) for i, token in enumerate(tokens)]


def metaspace(part: dict) -> Decoder:
    """Return the decoder Metaspace: a "▁" becomes a space.

    Those of the first token are dropped if the pre-tokenizer writes a "▁" in front of a text.
    """
    mark, first = part["replacement"], "" if metaspace_scheme(part) != "never" else " "
    return lambda tokens: [token.replace(mark, " " if i else first) for i, token in enumerate(tokens)]


def strip(part: dict) -> Decoder:
    """Return the decoder Strip, which removes the character `content` from each token: up to `start` times at
    its beginning, and up to `stop` times at its end."""
    content, start, stop = re.escape(part["content"]), part["start"], part["stop"]
    left, right = re.compile(rf"\A(?:{content}){{0,{start}}}"), re.compile(rf"(?:{content}){{0,{stop}}}\Z")
    return lambda tokens: [right.sub("", left.sub("", token), count=1) for token in tokens]


def sequence(part: dict) -> Decoder:
    """Return the decoder Sequence, which applies its decoders one after another."""
    functions = [decoder(inner) for inner in part["decoders"]]

    def function(tokens: list[str]) -> list[str]:
        for inner in functions:
            tokens = inner(tokens)
        return tokens

    return function


def replaced(part: dict) -> Decoder:
    """Return the decoder Replace, which writes `content` for each match of its pattern in a token."""
    function = replace(part)
    return lambda tokens: [function(token) for token in tokens]


DECODERS: dict[str, Callable[[dict], Decoder]] = {
    "ByteLevel": byte_level,
    "ByteFallback": byte_fallback,
    "WordPiece": word_piece,
    "Metaspace": metaspace,
    "Replace": replaced,
    "Strip": strip,
    "Fuse": lambda part: lambda tokens: ["".join(tokens)],
    "Sequence": sequence,
}


def decoder(part: dict | None) -> Decoder:
    """Return the function of a decoder; that of None separates tokens by spaces.

    Raises ValueError for a type or a setting that is not supported.
    """
    return maker("decoder", part, DECODERS)(part) if part else lambda tokens: [" ".join(tokens)]
