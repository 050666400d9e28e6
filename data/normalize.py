r"""Normalizers: how a text is changed before it is cut into words.

A tokenizer.json describes a normalizer as a *part*, a JSON object with a "type" and settings; `normalizer`
returns the function that a part describes. Examples, with the families that use them:

    BERT, uncased      BertNormalizer: no control characters, spaces around Chinese characters, no accents,
                       small letters
    Qwen               NFC: a letter and its accent are one character
    T5                 Precompiled: replacements from a table (data/charsmap.py)
    ALBERT             quotes replaced, NFKD, StripAccents, Lowercase, Precompiled
    DeBERTa v2, v3     Strip, Precompiled, Replace runs of spaces by one
    Llama 2, Mistral   Prepend "▁", Replace " " by "▁"

The results equal those of Hugging Face's `tokenizers` for characters that Unicode has not changed since
version 8; see data/wordpiece.py.
"""

import functools
import unicodedata
from collections.abc import Callable

import regex

from data.charsmap import precompiled
from data.wordpiece import CharacterTable, clean
from data.words import RUST_WHITESPACE

Normalizer = Callable[[str], str]


def lowercase(text: str) -> str:
    """Return the text in small letters, each character by itself: a sigma at the end of a word is σ."""
    return "".join([char.lower() for char in text]) if "Σ" in text else text.lower()


def without_marks(text: str, categories: tuple[str, ...]) -> str:
    """Return the text without the characters of these categories, such as accents in the form NFD."""
    if text.isascii():
        return text
    return "".join([char for char in text if unicodedata.category(char) not in categories])


def pattern_of(part: dict) -> regex.Pattern:
    """Return the pattern of a part: {"String": text} or {"Regex": text}.

    Raises ValueError for a text that is not a regular expression.
    """
    match part["pattern"]:
        case {"String": str(text)} if text:
            return regex.compile(regex.escape(text, special_only=True))
        case {"Regex": str(text)}:
            try:
                return regex.compile(text)
            except regex.error as error:
                raise ValueError(f"pattern {text!r} is not a regular expression: {error}") from None
    raise ValueError(f"pattern {str(part['pattern'])[:200]} is not supported; expected String or Regex")


def replace(part: dict) -> Normalizer:
    """Return the normalizer Replace, which writes `content` for each match. It is also a decoder."""
    content = part["content"]
    if "String" in part["pattern"]:
        return lambda text: text.replace(part["pattern"]["String"], content)
    pattern = pattern_of(part)
    return lambda text: pattern.sub(lambda match: content, text)


def strip(part: dict) -> Normalizer:
    """Return the normalizer Strip, which removes whitespace at the beginning, at the end, or at both."""
    left, right = part["strip_left"], part["strip_right"]

    def stripped(text: str) -> str:
        text = text.lstrip(RUST_WHITESPACE) if left else text
        return text.rstrip(RUST_WHITESPACE) if right else text

    return stripped


def bert(part: dict) -> Normalizer:
    """Return BertNormalizer: the steps clean and fold of data/wordpiece.py, without cutting into words.

    Raises ValueError for clean_text = false.
    """
    chinese_chars, lower = part["handle_chinese_chars"], part["lowercase"]
    strips = lower if part["strip_accents"] is None else part["strip_accents"]
    if not part["clean_text"]:
        raise ValueError("BertNormalizer with clean_text = false is not supported; expected true")
    cleaned = CharacterTable(functools.partial(clean, chinese_chars=chinese_chars))

    def normalized(text: str) -> str:
        text = text.translate(cleaned)
        if strips:
            text = without_marks(unicodedata.normalize("NFD", text), ("Mn",))
        return lowercase(text) if lower else text

    return normalized


def sequence(part: dict) -> Normalizer:
    """Return the normalizer Sequence, which applies its normalizers one after another."""
    functions = [normalizer(inner) for inner in part["normalizers"]]

    def normalized(text: str) -> str:
        for function in functions:
            text = function(text)
        return text

    return normalized


NORMALIZERS: dict[str, Callable[[dict], Normalizer]] = {
    "NFC": lambda part: functools.partial(unicodedata.normalize, "NFC"),
    "NFD": lambda part: functools.partial(unicodedata.normalize, "NFD"),
    "NFKC": lambda part: functools.partial(unicodedata.normalize, "NFKC"),
    "NFKD": lambda part: functools.partial(unicodedata.normalize, "NFKD"),
    "Lowercase": lambda part: lowercase,
    "StripAccents": lambda part: functools.partial(without_marks, categories=("Mn", "Mc", "Me")),
    "Prepend": lambda part: lambda text: part["prepend"] + text if text else text,
    "Replace": replace,
    "Strip": strip,
    "Precompiled": precompiled,
    "BertNormalizer": bert,
    "Sequence": sequence,
}


def maker(what: str, part: dict, table: dict[str, Callable]) -> Callable:
    """Return the entry of a table for the type of a part.

    what: the kind of part for the message, such as "normalizer". Raises ValueError, which names the type, if
    the table has no entry.
    """
    if part["type"] not in table:
        kinds = ", ".join(table)
        raise ValueError(f"{what} {str(part['type'])[:100]!r} is not supported; expected one of {kinds}")
    return table[part["type"]]


def normalizer(part: dict | None) -> Normalizer:
    """Return the function of a normalizer; that of None leaves the text as it is.

    Raises ValueError for a type or a setting that is not supported.
    """
    return maker("normalizer", part, NORMALIZERS)(part) if part else lambda text: text
