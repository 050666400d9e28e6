r"""WordPiece: how BERT and its family read text.

Like byte-pair encoding (data/tokenizer.py) it writes text with a finite vocabulary of words and parts of
words. It differs in how a word is cut, and in what it keeps of the text: words only. Spaces are gone, and for
"uncased" vocabularies accents and capitals too. A piece that does not begin its word is written with "##" in
front. In four steps (Devlin et al. 2018, arXiv:1810.04805, whose code defines the details):

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

`train_wordpiece` learns a vocabulary by merging frequent pairs. Ids equal those of
`transformers.BertTokenizer` (its `tokenizers` library, in Rust) except for rare characters that Unicode added
or changed since 2015: the library's tables of accents, punctuation and format characters are of Unicode 8,
its capitals of a newer version than Python's. With Python 3.11 (Unicode 14) 559 of 1,112,064 characters
differ (119 with a cased vocabulary).

    python -m data.wordpiece DIRECTORY "Some text"      its pieces and ids, with the vocabulary in DIRECTORY

    tokenizer = WordPiece.load("bert-base-uncased")     a directory with tokenizer.json or vocab.txt
    tokenizer.decode(tokenizer.encode("Hello!")) == "hello !"
"""

import functools
import hashlib
import json
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from data.merges import learn_tokens
from data.special_tokens import SpecialTokens, split_at
from data.words import check_texts
from formats import command, wordpiece_json
from formats.wordpiece_json import BERT_ROLES, LONGEST_WORD

CACHED_WORDS = 1 << 18

# The Unicode blocks of Chinese characters. The library has 0x2B920 where BERT's own code has 0x2B820.
CHINESE = (
    *(range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0x20000, 0x2A6E0), range(0x2A700, 0x2B740)),
    *(range(0x2B740, 0x2B820), range(0x2B920, 0x2CEB0), range(0xF900, 0xFB00), range(0x2F800, 0x2FA20)),
)


def clean(char: str, chinese_chars: bool) -> str:
    """Return the result of the step clean for a character: itself, with spaces around it, a space, or ""."""
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
    """Return the result of the steps fold and split for a character.

    Each character is lowered alone, so a Greek capital sigma at the end of a word becomes σ, not ς.
    """
    category = unicodedata.category(char)
    if strip_accents and category == "Mn":
        return ""
    if category[0] == "P" or char in string.punctuation:  # ASCII's symbols, such as $, count as punctuation
        return f" {char} "
    return char.lower() if lowercase else char


class CharacterTable(dict):
    """A table for `str.translate`: a function of a character, whose results are cached."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self.function = function

    def __missing__(self, code: int) -> str:
        self[code] = self.function(chr(code))
        return self[code]


def longest_match(
    word: str, vocab: dict[str, int], longest: int, unknown: int, later: str = "##", limit: int = LONGEST_WORD
) -> list[int]:
    """Return the ids of a word's pieces: from the left, the longest that fits each time.

    longest: the number of characters of the longest piece. unknown: the id of a word with a place where no
    piece fits, or of more than `limit` characters. later: the prefix of a piece that does not begin its word.
    """
    if len(word) > limit:
        return [unknown]

    ids, start, prefix = [], 0, ""
    while start < len(word):
        for end in range(min(len(word), start + longest), start, -1):
            piece = vocab.get(prefix + word[start:end])
            if piece is not None:
                break
        else:
            return [unknown]
        ids.append(piece)
        start, prefix = end, later
    return ids


def longest_pieces(model: dict) -> Callable[[str], list[int]]:
    """Return the function from a word to ids that a WordPiece model of a tokenizer.json describes.

    Raises ValueError if its unknown token is not in its vocabulary.
    """
    vocab, unknown = model["vocab"], model["vocab"].get(model["unk_token"])
    if unknown is None:
        raise ValueError(f"unk_token {model['unk_token']!r} is not in the vocabulary; name one that is")
    longest, later = max(map(len, vocab)), model["continuing_subword_prefix"]
    limit = model["max_input_chars_per_word"]
    return lambda word: longest_match(word, vocab, longest, unknown, later, limit)


class WordPiece(SpecialTokens):
    """A WordPiece tokenizer, with the methods of `tokenizer.Tokenizer`. Attributes besides the arguments:

    n_vocab       the largest id + 1, which is the vocabulary size of a model
    eot_id        the id of [SEP], which separates documents
    fingerprint   SHA-256 of everything that determines the ids
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
        """Make the tokenizer.

        vocab            {piece: id}
        strip_accents    None means as `lowercase`
        chinese_chars    each Chinese character is a word of its own
        special_tokens   {name: id}, in vocab or beyond it; by default those that have a role
        roles            {role: name}, such as "mask_token": "[MASK]"; by default BERT's, where vocab has them

        Raises ValueError if ids are not distinct numbers, or if [UNK] or [SEP] is missing.
        """
        # The special tokens, by default those of BERT that are in the vocabulary.
        if special_tokens is None:
            names = set((roles or BERT_ROLES).values())
            special_tokens = {name: i for name, i in vocab.items() if name in names}
        if roles is None:
            roles = {role: name for role, name in BERT_ROLES.items() if name in special_tokens}
        self.vocab, self.special_tokens, self.roles = vocab, special_tokens, roles
        self.check_roles()
        for role in ("unk_token", "sep_token"):
            self.role_id(role)

        # Every piece has one id, and every id one piece.
        pieces = vocab | special_tokens
        moved = [name for name, i in special_tokens.items() if vocab.get(name, i) != i]
        if moved:
            ids = f"{vocab[moved[0]]} and {special_tokens[moved[0]]}"
            raise ValueError(f"special token {moved[0]!r} has two ids, {ids}; leave one")
        numbers = all(isinstance(i, int) and 0 <= i < 2**32 for i in pieces.values())
        if not numbers or len(set(pieces.values())) < len(pieces):
            raise ValueError(f"ids of {len(pieces)} pieces must be whole numbers, differ, and fit 32 bits")

        # Tables and caches for encoding.
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

    def with_special_tokens(self, roles: dict[str, str], names: Iterable[str] = ()) -> "WordPiece":
        """Return this tokenizer with a special token for each of these roles, and for names without a role.

        A role that already has a token keeps it; names that the vocabulary lacks get the ids n_vocab,
        n_vocab + 1, ... Raises ValueError for an unknown role.
        """
        special_tokens, roles = self.extended(roles, names, self.vocab)
        arguments = {"lowercase": self.lowercase, "strip_accents": self.strip_accents}
        arguments |= {"chinese_chars": self.chinese_chars, "special_tokens": special_tokens, "roles": roles}
        return WordPiece(self.vocab, **arguments)

    @property
    def begin_ids(self) -> list[int]:
        """Return the ids that stand in front of a prompt: none, since an encoder adds its [CLS] itself."""
        return []

    def split(self, text: str) -> list[str]:
        """Return the words of a text: the steps clean, fold and split."""
        text = text.translate(self.cleaned)
        if self.strips:
            text = unicodedata.normalize("NFD", text)
        return text.translate(self.folded).split()

    def cut(self, word: str) -> list[int]:
        """Return the ids of a word's pieces: from the left, the longest that fits each time."""
        return longest_match(word, self.vocab, self.longest, self.unk_id)

    def encode(self, text: str, allowed_special: set[str] | Literal["all"] = frozenset()) -> list[int]:
        """Return the token ids of a text, without [CLS] in front or [SEP] behind.

        Text that spells a special token is encoded as text: "[MASK]" is three words. Only the names in
        allowed_special (or "all") become special tokens, as all of them do in Hugging Face's tokenizers.
        """
        # Parts with an odd index are names of special tokens, the others text.
        ids: list[int] = []
        for i, part in enumerate(split_at(self.allowed(allowed_special), text)):
            if i % 2 == 1:
                ids.append(self.special_tokens[part])
                continue
            for word in self.split(part):
                known = self.words.get(word)
                if known is None:
                    if len(self.words) >= CACHED_WORDS:
                        self.words.clear()
                    known = self.words[word] = self.cut(word)
                ids += known
        return ids

    def encode_batch(self, texts: list[str], n_threads: int) -> list[list[int]]:
        """Return the token ids of each text. It uses no threads: Python's lock would let only one run."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words of token ids, separated by spaces. An id beyond the vocabulary becomes U+FFFD."""
        words = [self.pieces.get(int(token), "\ufffd") for token in tokens]
        return " ".join(words).replace(" ##", "")

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """Return (n_vocab,) bool: True for tokens that continue a word, such as "##ing"."""
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
        """Return the tokenizer of a checkpoint: of its tokenizer.json, or else of its vocab.txt.

        directory may also be one of these files. Their settings for truncation and padding are ignored. Ids
        with `allowed_special="all"` equal Hugging Face's with `add_special_tokens=False`. Raises ValueError
        naming anything that would make them differ.
        """
        arguments = wordpiece_json.read(directory)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None


def join_pieces(left: str, right: str) -> str:
    """Return the union of two pieces that stand side by side in a word: "##ab" and "##c" give "##abc"."""
    return left + right.removeprefix("##")


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, progress: bool = False
) -> WordPiece:
    """Return a WordPiece tokenizer learned from texts, whose order does not matter.

    The pieces are those of byte-pair encoding (data/merges.py) on characters, as in Hugging Face's trainer:
    Google never published its own. vocab_size counts everything: BERT's five special tokens (ids 0 to 4), all
    characters of the texts, as the first of a word and behind "##", and what is learned. Raises ValueError if
    these are more than vocab_size.
    """
    check_texts(texts)

    # Count the words, and write each as a list of its characters, "##" in front of all but the first.
    names = list(BERT_ROLES.values())
    prepared = WordPiece({name: i for i, name in enumerate(names)}, lowercase=lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word in prepared.split(text) if len(word) <= LONGEST_WORD)
    written = [[word[0], *("##" + char for char in word[1:])] for word in counts]

    # Learn the pieces. The special tokens come first.
    alphabet = sorted({piece for word in written for piece in word})
    if len(names) + len(alphabet) > vocab_size:
        least = len(names) + len(alphabet)
        raise ValueError(f"vocabulary size {vocab_size} is too small; the characters alone need {least}")
    index = {piece: i for i, piece in enumerate(alphabet)}
    words = [[index[piece] for piece in word] for word in written]
    n_pieces = vocab_size - len(names)
    arguments = (words, list(counts.values()), alphabet, n_pieces, progress, join_pieces)
    pieces = [*names, *learn_tokens(*arguments)]
    return WordPiece({piece: i for i, piece in enumerate(pieces)}, lowercase=lowercase)


def main() -> None:
    parser = command.Parser(description="Show the pieces and ids of a text.")
    parser.add_argument("directory", type=command.path, help="a checkpoint with tokenizer.json or vocab.txt")
    parser.add_argument("text", help="it may spell special tokens, such as [MASK]")
    options = parser.parse_args()

    tokenizer = WordPiece.load(options.directory)
    ids = tokenizer.encode(options.text, "all")
    print(" ".join(tokenizer.pieces[i] for i in ids))
    print(" ".join(map(str, ids)))


if __name__ == "__main__":
    command.run(main)
