r"""WordPiece: how BERT and its family read text.

Like byte-pair encoding (data/tokenizer.py) it writes text with a finite vocabulary of words and parts of words. It
differs in how a word is cut, and in what it keeps of the text: words only. Spaces are gone, and for "uncased"
vocabularies accents and capitals too. A piece that does not begin its word is written with "##" in front. In
four steps (Devlin et al. 2018, arXiv:1810.04805, whose code defines the details):

    clean      control characters vanish, whitespace becomes a space, a Chinese character is a word of its own
    fold       if uncased: no accents (Unicode's form NFD without its marks), small letters
    split      at spaces; each punctuation mark is a word of its own
    cut        each word w from the left, by the longest piece that fits (Wu et al. 2016, arXiv:1609.08144,
               chose the pieces that make the corpus most likely; longest match is how BERT applies them):

        s <- 0
        while s < |w|:   e <- max {e : piece(s, e) in V},   piece(s, e) = w[s:e] if s = 0 else "##" + w[s:e]
                         emit piece(s, e);  s <- e

        A word with a place where no piece fits, or of more than 100 characters, is one [UNK].

    "Unaffable Québec!"  ->  un ##aff ##able quebec !

Vocabularies are read here, not learned; for that there is byte-pair encoding. Ids equal those of
`transformers.BertTokenizer` (its `tokenizers` library, in Rust) for all text but rare characters that are new
to Unicode, or moved within it, since 2015: the library's tables of accents, punctuation and format characters
are of Unicode 8, its capitals of a newer one than Python's. With Python 3.11 (Unicode 14) it reads 559 of
1,112,064 characters differently (119 with a cased vocabulary).

    python -m data.wordpiece DIRECTORY "Some text"       its pieces and ids, with the vocabulary of a checkpoint

    tokenizer = WordPiece.load("bert-base-uncased")         a directory with tokenizer.json or vocab.txt
    tokenizer.decode(tokenizer.encode("Hello!")) == "hello !"
"""

import argparse
import functools
import hashlib
import json
import string
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from data.special_tokens import SpecialTokens, split_at
from formats import wordpiece_json
from formats.wordpiece_json import BERT_ROLES, LONGEST_WORD

CACHED_WORDS = 1 << 18

# Blocks of characters written without spaces. BERT's own code has 0x2B820 where the library has 0x2B920.
CHINESE = (
    *(range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0x20000, 0x2A6E0), range(0x2A700, 0x2B740)),
    *(range(0x2B740, 0x2B820), range(0x2B920, 0x2CEB0), range(0xF900, 0xFB00), range(0x2F800, 0x2FA20)),
)


def clean(char: str, chinese_chars: bool) -> str:
    """What a character becomes before accents are looked at: itself, a space, or nothing."""
    if char in "\t\n\r":
        return " "
    category = unicodedata.category(char)
    if category in ("Cc", "Cf", "Co", "Cs") or char == "\ufffd":  # control, format, private, half a character
        return ""
    if category[0] == "Z":
        return " "
    if chinese_chars and any(ord(char) in block for block in CHINESE):
        return f" {char} "
    return char


def fold(char: str, lowercase: bool, strip_accents: bool) -> str:
    """What a character becomes in the end. One at a time, so a Greek sigma that ends a word stays a σ."""
    category = unicodedata.category(char)
    if strip_accents and category == "Mn":
        return ""
    if category[0] == "P" or char in string.punctuation:  # ASCII's symbols, such as $, count as punctuation
        return f" {char} "
    return char.lower() if lowercase else char


class CharacterTable(dict):
    """What `str.translate` looks characters up in: a function of a character that remembers its answers."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self.function = function

    def __missing__(self, code: int) -> str:
        self[code] = self.function(chr(code))
        return self[code]


class WordPiece(SpecialTokens):
    """A vocabulary and how to prepare text for it. Encodes and decodes like `tokenizer.Tokenizer`.

    Attributes, besides the arguments: `n_vocab` (largest id + 1, the width a model needs), `eot_id` (the
    [SEP] token's id, which separates documents), `fingerprint` (SHA-256 of all that decides the ids).
    """

    def __init__(
        self,
        vocab: dict[str, int],
        *,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        chinese_chars: bool = True,
        special_tokens: dict[str, int] | None = None,
        roles: dict[str, str] | None = None,
    ) -> None:
        """vocab: piece -> id. strip_accents: None does as `lowercase` does. chinese_chars: each is a word.

        special_tokens: name -> id, in `vocab` or beyond it; by default those that have a role. roles: what
        they are for ("mask_token" -> "[MASK]"); by default BERT's names as far as the vocabulary has them.
        Raises ValueError if ids are no distinct numbers, or [UNK] or [SEP] is missing.
        """
        if special_tokens is None:
            names = set((roles or BERT_ROLES).values())
            special_tokens = {name: i for name, i in vocab.items() if name in names}
        if roles is None:
            roles = {role: name for role, name in BERT_ROLES.items() if name in special_tokens}
        self.vocab, self.special_tokens, self.roles = vocab, special_tokens, roles
        self.check_roles()
        for role in ("unk_token", "sep_token"):
            self.role_id(role)

        pieces = vocab | special_tokens
        moved = [name for name, i in special_tokens.items() if vocab.get(name, i) != i]
        if moved:
            ids = f"{vocab[moved[0]]} and {special_tokens[moved[0]]}"
            raise ValueError(f"special token {moved[0]!r} has two ids, {ids}; leave one")
        numbers = all(isinstance(i, int) and 0 <= i < 2**32 for i in pieces.values())
        if not numbers or len(set(pieces.values())) < len(pieces):
            raise ValueError(f"ids of {len(pieces)} pieces must be whole numbers, differ, and fit 32 bits")

        self.lowercase, self.strip_accents, self.chinese_chars = lowercase, strip_accents, chinese_chars
        self.strips = lowercase if strip_accents is None else strip_accents
        self.cleaned = CharacterTable(functools.partial(clean, chinese_chars=chinese_chars))
        self.folded = CharacterTable(functools.partial(fold, lowercase=lowercase, strip_accents=self.strips))
        self.pieces = {i: piece for piece, i in pieces.items()}
        self.longest = max(map(len, pieces))
        self.unk_id, self.eot_id = self.role_id("unk_token"), self.sep_id
        self.n_vocab = max(self.pieces) + 1
        self.words: dict[str, list[int]] = {}

        special = [sorted(special_tokens.items()), roles["unk_token"], roles["sep_token"]]
        content = ["WordPiece", sorted(vocab.items()), lowercase, self.strips, chinese_chars, *special]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_special_tokens(self, roles: dict[str, str]) -> "WordPiece":
        """The same vocabulary with a special token for each of these roles, as far as it has none yet.

        Names that the vocabulary lacks get the ids n_vocab, n_vocab + 1, ...; a role that is taken keeps its
        token. Raises ValueError for an unknown role.
        """
        special_tokens, roles = self.extended(roles, self.vocab)
        arguments = {"lowercase": self.lowercase, "strip_accents": self.strip_accents}
        arguments |= {"chinese_chars": self.chinese_chars, "special_tokens": special_tokens, "roles": roles}
        return WordPiece(self.vocab, **arguments)

    def cut(self, word: str) -> list[int]:
        """The ids of the longest pieces that fit, from the left."""
        if len(word) > LONGEST_WORD:
            return [self.unk_id]

        ids, start, prefix = [], 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self.longest), start, -1):
                piece = self.vocab.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return [self.unk_id]
            ids.append(piece)
            start, prefix = end, "##"
        return ids

    def encode(self, text: str, allowed_special: set[str] | Literal["all"] = frozenset()) -> list[int]:
        """The token ids of a text. Nothing is put in front or behind (no [CLS] or [SEP]).

        Text that spells a special token is text: "[MASK]" is three words. Only the names in `allowed_special`
        (or "all") become their special ids, which is what Hugging Face's tokenizers always do.
        """
        ids: list[int] = []
        for i, part in enumerate(split_at(self.allowed(allowed_special), text)):
            if i % 2 == 1:
                ids.append(self.special_tokens[part])
                continue
            part = part.translate(self.cleaned)
            if self.strips:
                part = unicodedata.normalize("NFD", part)
            for word in part.translate(self.folded).split():
                known = self.words.get(word)
                if known is None:
                    if len(self.words) >= CACHED_WORDS:
                        self.words.clear()
                    known = self.words[word] = self.cut(word)
                ids += known
        return ids

    def encode_batch(self, texts: list[str], n_threads: int) -> list[list[int]]:
        """`encode` for many texts. One thread does it all: Python's lock lets no other work beside it."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The words of some token ids, a space between them. An id beyond the vocabulary shows as U+FFFD."""
        words = [self.pieces.get(int(token), "\ufffd") for token in tokens]
        return " ".join(words).replace(" ##", "")

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """(n_vocab,) bool: True where a token continues the word before it, as "##ing" does."""
        continues = np.zeros(self.n_vocab, bool)
        continues[[i for piece, i in self.vocab.items() if piece.startswith("##")]] = True
        continues[list(self.special_tokens.values())] = False
        return continues

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, which `AutoTokenizer` reads."""
        settings = (self.lowercase, self.strip_accents, self.chinese_chars)
        wordpiece_json.write(directory, self.vocab, *settings, self.special_tokens, self.roles)

    @classmethod
    def load(cls, directory: Path) -> "WordPiece":
        """Read a checkpoint's tokenizer.json (what it says of truncation and padding is left alone), or else
        its vocab.txt and tokenizer_config.json.

        `directory` may also be one of these files. Ids equal Hugging Face's with `add_special_tokens=False`
        and `allowed_special="all"` here; whatever would make them differ is a ValueError that names it.
        """
        arguments = wordpiece_json.read(directory)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the pieces and ids of a text.")
    parser.add_argument("directory", type=Path, help="a checkpoint with tokenizer.json or vocab.txt")
    parser.add_argument("text")
    options = parser.parse_args()

    tokenizer = WordPiece.load(options.directory)
    ids = tokenizer.encode(options.text, "all")
    print(" ".join(tokenizer.pieces[i] for i in ids))
    print(" ".join(map(str, ids)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
