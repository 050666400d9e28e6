r"""Pre-tokenizers: how a text is cut into words, whose borders no token crosses.

Like a normalizer (data/normalize.py), a pre-tokenizer is a part of a tokenizer.json, and `pre_tokenizer`
returns its function, from words to smaller words. Examples, with the families that use them:

    BERT               BertPreTokenizer: at spaces, and at each punctuation mark
    GPT-2, RoBERTa     ByteLevel: by GPT-2's pattern; each byte is then written as a character
    Llama 3, Qwen      Split by a pattern, ByteLevel
    DeepSeek           several Splits, ByteLevel
    T5, ALBERT         WhitespaceSplit, Metaspace: at spaces; a word begins with "▁"
    DeBERTa v2         Punctuation, Metaspace
    Gemma              Split at spaces
    Llama 2, Mistral   none: the text is one word

The first word of a list stays in it even if it is empty. So a later pre-tokenizer can tell the word at the
start of the text from the others: Metaspace may write a "▁" in front of this word only.
"""

from collections.abc import Callable, Iterator

import regex

from data.normalize import maker, pattern_of
from formats.tokenizer_json import BYTE_TO_CHAR, GPT2_PATTERN

# A function of a list of words, and of whether the first is at the start of the text, to smaller words.
PreTokenizer = Callable[[list[str], bool], list[str]]
BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
# The characters that Rust counts as whitespace, and those that BERT counts as punctuation.
SPACES = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"


def pieces(text: str, pattern: regex.Pattern, invert: bool) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text in order, each with True if it matches the pattern (invert: if not)."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], invert
        yield match[0], not invert
        end = match.end()
    if end < len(text):
        yield text[end:], invert


def split(pattern: regex.Pattern, behavior: str, invert: bool = False) -> PreTokenizer:
    """Return the function that cuts words where the pattern matches (invert: where it does not).

    behavior: one of BEHAVIORS. A match is removed, becomes a word of its own ("Isolated"), is joined to the
    word before or after it, or forms one word with the matches beside it ("Contiguous"). Raises ValueError
    for another behavior.
    """
    if behavior not in BEHAVIORS:
        raise ValueError(f"behavior {behavior!r} is not supported; expected {', '.join(BEHAVIORS)}")

    def cut(text: str) -> list[str]:
        if behavior == "Isolated":
            return [piece for piece, _ in pieces(text, pattern, invert)]
        if behavior == "Removed":
            return ["" if is_match else piece for piece, is_match in pieces(text, pattern, invert)]

        # The other three join a match to a neighbour. "MergedWithNext" is "MergedWithPrevious" in reverse.
        parts, words, was_match = list(pieces(text, pattern, invert)), [], False
        backwards = behavior == "MergedWithNext"
        for piece, is_match in reversed(parts) if backwards else parts:
            joins = is_match == was_match if behavior == "Contiguous" else is_match and not was_match
            if joins and words:
                words[-1] = piece + words[-1] if backwards else words[-1] + piece
            else:
                words.append(piece)
            was_match = is_match
        return words[::-1] if backwards else words

    def function(words: list[str], at_start: bool) -> list[str]:
        return [piece for word in words for piece in (cut(word) or [""])]

    return function


def split_part(part: dict) -> PreTokenizer:
    """Return the pre-tokenizer Split, which has a pattern and a behavior of its own."""
    return split(pattern_of(part), part["behavior"], part["invert"])


def byte_level(part: dict) -> PreTokenizer:
    """Return the pre-tokenizer ByteLevel: each byte of a word in UTF-8 is written as one character.

    With use_regex (in older files, which lack the field, always) it first cuts by GPT-2's pattern.
    """
    cut = split(regex.compile(GPT2_PATTERN), "Isolated") if part.get("use_regex", True) else None

    def function(words: list[str], at_start: bool) -> list[str]:
        if part["add_prefix_space"]:
            words = [f" {word}" if word and word[0] != " " else word for word in words]
        if cut is not None:
            words = cut(words, at_start)
        return ["".join([BYTE_TO_CHAR[byte] for byte in word.encode()]) for word in words]

    return function


def metaspace_scheme(part: dict) -> str:
    """Return where Metaspace writes a "▁" in front: "always", "never", or at the "first" word of the text.

    Older files have add_prefix_space in the place of prepend_scheme.
    """
    scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
    if scheme not in ("always", "never", "first"):
        raise ValueError(f"prepend_scheme {scheme!r} is not supported; expected always, never or first")
    return scheme


def metaspace(part: dict) -> PreTokenizer:
    """Return the pre-tokenizer Metaspace: a space is written as "▁", and a word begins with it."""
    mark, scheme = part["replacement"], metaspace_scheme(part)
    cut = split(regex.compile(regex.escape(mark)), "MergedWithNext")

    def function(words: list[str], at_start: bool) -> list[str]:
        words = [word.replace(" ", mark) for word in words]
        for i, word in enumerate(words):
            is_marked = scheme == "always" or (scheme == "first" and at_start and i == 0)
            if is_marked and word and word[0] != mark:
                words[i] = mark + word
        return cut(words, at_start) if part.get("split", True) else words

    return function


def sequence(part: dict) -> PreTokenizer:
    """Return the pre-tokenizer Sequence, which applies its pre-tokenizers one after another."""
    functions = [pre_tokenizer(inner) for inner in part["pretokenizers"]]

    def function(words: list[str], at_start: bool) -> list[str]:
        for inner in functions:
            words = inner(words, at_start)
            words = words[:1] + [word for word in words[1:] if word]
        return words

    return function


def by_pattern(pattern: str, behavior: str, invert: bool = False) -> Callable[[dict], PreTokenizer]:
    """Return an entry of PRE_TOKENIZERS: a pre-tokenizer that has no settings and cuts by this pattern."""
    return lambda part: split(regex.compile(pattern), behavior, invert)


def bert(part: dict) -> PreTokenizer:
    """Return BertPreTokenizer: cut at spaces, which vanish, and at punctuation marks."""
    at_spaces = split(regex.compile(SPACES), "Removed")
    at_marks = split(regex.compile(PUNCTUATION), "Isolated")
    return lambda words, at_start: at_marks(at_spaces(words, at_start), at_start)


PRE_TOKENIZERS: dict[str, Callable[[dict], PreTokenizer]] = {
    "ByteLevel": byte_level,
    "Metaspace": metaspace,
    "Split": split_part,
    "Whitespace": by_pattern(r"\w+|[^\w\s]+", "Removed", invert=True),
    "WhitespaceSplit": by_pattern(SPACES, "Removed"),
    "Punctuation": lambda part: split(regex.compile(PUNCTUATION), part.get("behavior", "Isolated")),
    "Digits": lambda part: split(
        regex.compile(r"\p{N}"), "Isolated" if part["individual_digits"] else "Contiguous"
    ),
    "BertPreTokenizer": bert,
    "Sequence": sequence,
}


def pre_tokenizer(part: dict | None) -> PreTokenizer:
    """Return the function of a pre-tokenizer; that of None leaves the words as they are.

    Raises ValueError for a type or a setting that is not supported.
    """
    return maker("pre-tokenizer", part, PRE_TOKENIZERS)(part) if part else lambda words, at_start: words
