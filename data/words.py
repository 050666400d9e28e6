r"""Words and characters: the facts about text that a tokenizer depends on.

GPT4_PATTERN ...     regular expressions that cut text into pre-tokens
PROBE                a text with every kind of character, to test such a pattern
RUST_WHITESPACE      the characters that Rust's libraries strip as whitespace
check_texts          refuses one string in the place of several
continues            finds whether a token begins inside of a word, for the masking of whole words
cut_long_space       protects tiktoken's regex engine from runs of a million spaces
"""

import re
from collections.abc import Iterable
from itertools import pairwise

import regex

from formats.tokenizer_json import GPT2_PATTERN

# These patterns cut text into pre-tokens. (The oldest one, GPT2_PATTERN, is in formats/tokenizer_json.py.)
# Three engines read them: `regex` (training), tiktoken's, in Rust (encoding), and Oniguruma (Hugging Face).
# tiktoken's own patterns have possessive quantifiers, which are faster, but Oniguruma reads `x{1,3}+` as
# `(?:x{1,3})+`.
#
# GPT-4's pattern, as Llama 3 writes it: contractions in either case, digits in groups of up to three, so that
# numbers take about a thousand tokens of the vocabulary, line breaks apart from the indentation after them.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The same as in tiktoken's cl100k_base: whitespace at the end of a text is one pre-token, even with line
# breaks.
CL100K_PATTERN = GPT4_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")

# GPT-4o's pattern: a word may also begin at a capital after small letters, so camelCase is two pre-tokens.
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TIKTOKEN_PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "r50k_base": GPT2_PATTERN,
    "p50k_base": GPT2_PATTERN,
    "cl100k_base": CL100K_PATTERN,
    "o200k_base": O200K_PATTERN,
}

# The bytes that occur in UTF-8. Of the other 13 the vocabularies of GPT-NeoX and ModernBERT have no tokens.
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]

# Python also counts the separators 0x1C to 0x1F as whitespace, Rust does not.
RUST_WHITESPACE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace() and not 0x1C <= c <= 0x1F)

# A text with a character of every kind that a pattern may distinguish.
PROBE = "aZé中ـ͏ '9٣.,\u00a0_$😀\x00\t \r\n\n  x \u2028"

LONGEST_SPACE = 250_000  # characters


def check_texts(texts: Iterable[str]) -> None:
    """Raise TypeError for one string where an iterable of strings is expected; its items are characters."""
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, got one string; put it in a list")


def continues(token: bytes) -> bool:
    """Return whether a token continues the word before it.

    It does if it begins with a letter, a digit, a mark or an underscore, or with a byte that is not the first
    of its character. If a token has only the first bytes of a character, the very first byte decides:
    characters that begin with C2, E2 or F0 are mostly punctuation, symbols and emoji, all others mostly
    letters. token: at least one byte.
    """
    first = token[0]
    if 0x80 <= first < 0xC0:
        return True
    char = token[:4].decode("utf-8", "replace")[0]
    if char == "\ufffd":
        return first not in (0xC2, 0xE2, 0xF0)
    return regex.match(r"[\p{L}\p{N}\p{M}_]", char) is not None


def cut_long_space(text: str) -> list[str]:
    r"""Return a text in parts, cut inside runs of whitespace longer than 250,000 characters.

    For `\s+(?!\S)` tiktoken's regex engine stores a state for each character, to go back to, and panics at a
    million. Such runs occur in crawled text. A cut changes only tokens of the run. A text without such a run
    is returned as one part.
    """
    if len(text) <= LONGEST_SPACE:
        return [text]

    cuts = [0]
    for run in re.finditer(r"\s{1000,}", text):
        cuts += range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE)
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]
