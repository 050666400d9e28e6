r"""Byte-pair encoding: how text becomes the integers that a language model reads.

A model needs a finite vocabulary. There are too many whole words, and a new word would have no token; single
bytes can write any text, but make it four times longer. Byte-pair encoding starts from the 256 bytes and
learns frequent longer strings from a corpus (Sennrich et al. 2016, arXiv:1508.07909):

    V = {0, ..., 255}                                       the bytes
    repeat:  (a, b) = argmax over pairs of ids  count(a b)      adjacent, in the corpus as it is now written
             V <- V + {ab};  write ab for every a b in the corpus

The position of a token in the order of learning is its *rank*. To encode a new text, join the adjacent pair
whose union has the lowest rank, again and again, until no union is in V.

A regular expression first cuts the text into *pre-tokens* (a word with its leading space, a few digits, a run
of spaces). No token crosses their borders; otherwise the vocabulary would fill with "dog." "dog!" "dog?"
(GPT-2, Radford et al. 2019, section 2.2, which also moved from characters to bytes). So the corpus shrinks to
a table of distinct pre-tokens and their counts, and training reads only that table.

Training is implemented here. Encoding is done by `tiktoken` (Rust) from the ranks and the pattern.
formats/tokenizer_json.py writes both to a file that `transformers.AutoTokenizer` reads.

    python -m data.tokenizer FILE... --vocab-size 4096 --out my_tokenizer      learn one and look at it

    tokenizer = train_bpe(texts, 4096)          or get_tokenizer("bytes" | "gpt2" | "my_tokenizer")
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
"""

import functools
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import regex
import tiktoken

from data.corpus import documents
from data.merges import learn_tokens
from data.records import refuse
from data.special_tokens import SpecialTokens, split_at
from data.wordpiece import WordPiece
from data.words import (
    GPT4_PATTERN,
    PROBE,
    RUST_WHITESPACE,
    TIKTOKEN_PATTERNS,
    UTF8_BYTES,
    check_texts,
    continues,
    cut_long_space,
)
from formats import command, tokenizer_json
from formats.progress import progress_bar
from formats.tokenizer_json import END_OF_TEXT
from formats.wordpiece_json import is_wordpiece, vocabulary_file

if TYPE_CHECKING:
    from data.pipeline import Pipeline


def count_pre_tokens(texts: Iterable[str], pattern: str, progress: bool) -> Counter[str]:
    """Return how often each pre-token occurs: the table that training reads.

    Raises ValueError for a pattern that is not a regular expression.
    """
    try:
        splitter = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"split pattern {pattern!r} is not a regular expression: {error}") from None

    counts: Counter[str] = Counter()
    for text in progress_bar(texts, "counting words", unit=" texts", disable=not progress):
        counts.update(match[0] for match in splitter.finditer(text))
    return counts


def check_parts(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int], eot: str) -> None:
    """Raise ValueError unless these parts make a tokenizer; see `Tokenizer`."""
    lacking = [byte for byte in UTF8_BYTES if bytes([byte]) not in ranks]
    if lacking:
        raise ValueError(f"the vocabulary lacks {len(lacking)} of UTF-8's 243 bytes ({lacking[0]}, ...)")

    # A name of spaces may also be an ordinary token: the special token is found first.
    both = [name for name in special_tokens if not name or (name.encode() in ranks and not name.isspace())]
    if both:
        raise ValueError(f"special token {both[0]!r} is empty or also an ordinary token; rename it")
    if eot not in special_tokens:
        known = f"{len(special_tokens)}, such as {list(special_tokens)[:6]}"
        raise ValueError(f"end-of-text token {eot!r} is no special token; there are {known}")

    ids = sorted([*ranks.values(), *special_tokens.values()])
    if len(set(ids)) < len(ids) or not 0 <= ids[0] <= ids[-1] < 2**32:
        raise ValueError(f"token ids must differ and fit 32 bits, got {len(ids)} in {ids[0]}..{ids[-1]}")
    if re.search(r"\d\}\+", pattern):
        raise ValueError(f"split pattern {pattern!r} has {{n}}+, whose meaning differs by engine")


class Tokenizer(SpecialTokens):
    """A byte-level BPE tokenizer: ranks, split pattern and special tokens. Attributes besides the arguments:

    encoding      tiktoken's object
    token_bytes   {id: the bytes of the token}
    n_vocab       the largest id + 1, which is the vocabulary size of a model; smaller ids may be unused
    eot_id        the id that separates documents
    fingerprint   SHA-256 of everything that determines the ids: equal fingerprints mean equal ids
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        special_tokens: dict[str, int],
        nfc: bool = False,
        eot: str = END_OF_TEXT,
        roles: dict[str, str] | None = None,
        mask_lstrip: bool = False,
        around: tokenizer_json.Around = tokenizer_json.NOTHING,
        plain: tokenizer_json.Plain | None = None,
    ) -> None:
        """Make the tokenizer.

        nfc: bring text to Unicode's composed form first. eot: the name of the token that ends a document.
        roles: the uses of special tokens, such as "mask_token" -> "[MASK]" (see `with_special_tokens`).
        mask_lstrip: the mask token includes the space before it, as RoBERTa's and ModernBERT's do.
        around: the names of special tokens in front of a text and behind it (see `begin_ids`).
        plain: {name: normalized} of those of special_tokens that are found in any text, such as Qwen 3's
        <think>; True: they are looked for after nfc.
        Raises ValueError if the parts do not make a tokenizer that can encode any text.
        """
        check_parts(ranks, pattern, special_tokens, eot)

        # Keep the arguments. `late` are the names that are looked for in the normalised text. A token that
        # has a role or ends a document is special in any case.
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.nfc, self.eot = nfc, eot
        self.roles, self.mask_lstrip, self.around = dict(roles or {}), mask_lstrip, around
        named = {eot, *self.roles.values()}
        self.plain = {name: flag for name, flag in (plain or {}).items() if name not in named}
        self.plain |= {name: True for name in special_tokens if name.isspace()}
        self.late = {name for name, normalized in self.plain.items() if normalized}
        self.check_roles()
        if mask_lstrip:
            self.role_id("mask_token")

        # tiktoken silently drops characters that the pattern leaves out, so such a pattern is refused.
        try:
            self.encoding = tiktoken.Encoding(
                "plinth", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        except ValueError as error:
            raise ValueError(f"split pattern {pattern!r} is not a regular expression: {error}") from None
        if self.encoding.decode(self.encoding.encode_ordinary(PROBE)) != PROBE:
            raise ValueError(f"split pattern {pattern!r} leaves out some characters; it must match all text")

        # The other attributes. `around` is not part of the fingerprint, as `encode` adds no tokens.
        self.token_bytes = {i: token for token, i in ranks.items()}
        self.token_bytes |= {i: name.encode() for name, i in special_tokens.items()}
        self.n_vocab = max(self.token_bytes) + 1
        self.eot_id = special_tokens[eot]
        by_token = sorted((token.hex(), i) for token, i in ranks.items())
        content = [by_token, pattern, sorted(special_tokens.items()), nfc, eot]
        content += [self.roles["mask_token"]] if mask_lstrip else []
        found_in_any = sorted(item for item in self.plain.items() if not item[0].isspace())
        content += [found_in_any] if found_in_any else []
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_special_tokens(self, roles: dict[str, str], names: Iterable[str] = ()) -> "Tokenizer":
        """Return this tokenizer with a special token for each of these roles, and for names without a role.

        An encoder needs {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token":
        "[PAD]"}. A role that already has a token keeps it; new names get the ids n_vocab, n_vocab + 1, ...
        A new mask token includes the space before it, as in RoBERTa: ordinary tokens begin with theirs, so in
        "import [MASK] as np" the masked token is " numpy". Raises ValueError for an unknown role, or a name
        that is an ordinary token.
        """
        special_tokens, roles = self.extended(roles, names, vocab={})
        mask_is_new = "mask_token" in roles and roles["mask_token"] not in self.special_tokens
        arguments = {"nfc": self.nfc, "eot": self.eot, "roles": roles}
        arguments |= {"mask_lstrip": self.mask_lstrip or mask_is_new, "around": self.around}
        return Tokenizer(self.ranks, self.pattern, special_tokens, **arguments, plain=self.plain)

    @property
    def begin_ids(self) -> list[int]:
        """Return the ids that stand in front of a prompt, such as Llama 3's <|begin_of_text|>; often none.

        Tokens that the file puts behind a text are left out, since a model continues the prompt.
        """
        return [self.special_tokens[name] for name in self.around[0]]

    def encode(self, text: str, allowed_special: set[str] | Literal["all"] = frozenset()) -> list[int]:
        """Return the token ids of a text, without any token added in front (see `begin_ids`) or behind.

        Text that spells a special token is encoded as text: a document that mentions "<|endoftext|>" must not
        end there. Only the names in allowed_special (or "all") become special tokens, as all of them do in
        Hugging Face's tokenizers. Added tokens that are not marked as special, as <think> of Qwen 3 and the
        runs of spaces of GPT-NeoX and ModernBERT, are always found. Lone surrogates, which have no UTF-8,
        become U+FFFD.
        """
        # Parts with an odd index are names of special tokens, the others text.
        parts = split_at((self.allowed(allowed_special) | self.plain.keys()) - self.late, text)
        tokens: list[int] = []
        for i, part in enumerate(parts):
            if i % 2 == 1:
                tokens.append(self.special_tokens[part])
                continue

            # Text: strip the space that belongs to a mask, normalise, and encode between the late ones.
            if self.mask_lstrip and parts[i + 1 : i + 2] == [self.roles["mask_token"]]:
                part = part.rstrip(RUST_WHITESPACE)
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            for j, piece in enumerate(split_at(self.late, part)):
                if j % 2 == 1:
                    tokens.append(self.special_tokens[piece])
                    continue
                for section in cut_long_space(piece):
                    tokens += self.encoding.encode_ordinary(section)
        return tokens

    def encode_batch(self, texts: list[str], n_threads: int) -> list[list[int]]:
        """Return the token ids of each text. Threads suffice, as tiktoken releases Python's lock."""
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of any token ids.

        A model may generate half a character, or an id beyond the vocabulary, since embeddings are often
        padded to a round size. Both become U+FFFD, so that decoding a sample never fails.
        """
        pieces = [self.token_bytes.get(int(token), "\ufffd".encode()) for token in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """Return (n_vocab,) bool: True for tokens that continue a word. Special tokens do not."""
        result = np.zeros(self.n_vocab, bool)
        result[[i for token, i in self.ranks.items() if continues(token)]] = True
        return result

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads."""
        content = (self.ranks, self.pattern, self.special_tokens, self.nfc, self.eot)
        tokenizer_json.write(directory, *content, self.roles, self.mask_lstrip, self.around, self.plain)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Return the tokenizer in a tokenizer.json: one saved here, or that of GPT-2, Llama 3, Qwen ...

        directory may also be the file itself. Documents end with the `eos_token` of tokenizer_config.json
        beside it, else with <|endoftext|>. Ids equal Hugging Face's with `add_special_tokens=False`. Raises
        ValueError for anything that would make them differ: another algorithm, normalizer or splitter.
        """
        arguments = tokenizer_json.read(directory)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError for a vocabulary without room for the 256 bytes and <|endoftext|>."""
    if vocab_size < 257:
        raise ValueError(f"vocabulary size {vocab_size} is too small; 256 bytes and {END_OF_TEXT} need 257")


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, pattern: str = GPT4_PATTERN, progress: bool = False
) -> Tokenizer:
    """Return a tokenizer learned from texts, whose order does not matter.

    vocab_size counts everything: 256 bytes (ids 0-255), merges, and <|endoftext|> (the last id). Texts in
    which too few pairs occur twice give a smaller vocabulary.
    Raises ValueError for a vocab_size below 257 or a pattern that is not a regular expression.
    """
    check_vocab_size(vocab_size)
    check_texts(texts)

    pre_tokens = count_pre_tokens(texts, pattern, progress)
    words = [list(word.encode("utf-8", "replace")) for word in pre_tokens]
    alphabet = [bytes([byte]) for byte in range(256)]
    tokens = learn_tokens(words, list(pre_tokens.values()), alphabet, vocab_size - 1, progress)
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(ranks, pattern, {END_OF_TEXT: len(tokens)})


def open_tokenizer(path: Path) -> "Tokenizer | WordPiece | Pipeline":
    """Return the tokenizer in a directory or file, by the fastest of the three classes that reads it.

    Raises ValueError, which names the part that is not supported, for a file that none of them reads.
    """
    # Imported here, as most tokenizers need neither.
    from data.pipeline import Pipeline
    from formats import pipeline_json

    if pipeline_json.tokenizer_file(path).suffix == ".model" and not (path / "vocab.txt").is_file():
        return Pipeline.load(path)
    # A tokenizer.json that the faster classes refuse may be one for Pipeline; a vocab.txt is not.
    try:
        return (WordPiece if is_wordpiece(path) else Tokenizer).load(path)
    except ValueError:
        if vocabulary_file(path).suffix == ".txt":
            raise
    return Pipeline.load(path)


def get_tokenizer(name: str) -> "Tokenizer | WordPiece | Pipeline":
    """Return the tokenizer of a name.

    The name is "bytes", a tiktoken encoding such as "gpt2", a directory with tokenizer.json, BERT's vocab.txt
    or a SentencePiece model, or the path of such a file. Raises ValueError for any other name, for a file
    with a part that is not supported (see data/pipeline.py), or if a download fails.
    """
    if name == "bytes":
        return Tokenizer({bytes([byte]): byte for byte in range(256)}, GPT4_PATTERN, {END_OF_TEXT: 256})

    if name in TIKTOKEN_PATTERNS:
        try:
            published = tiktoken.get_encoding(name)
        except OSError as error:  # the base class of the errors of `requests`
            kind = type(error).__name__
            raise ValueError(f"cannot download {name!r} ({kind}); go online or use 'bytes'") from None
        return Tokenizer(published._mergeable_ranks, TIKTOKEN_PATTERNS[name], published._special_tokens)

    if Path(name).exists():
        return open_tokenizer(Path(name))
    raise ValueError(
        f"unknown tokenizer {name!r}; use 'bytes', 'bpe:4096' (where there is a corpus to train on), "
        f"{', '.join(TIKTOKEN_PATTERNS)}, or a directory with tokenizer.json"
    )


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Learn a byte-pair encoding from text files and look at it.")
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        type=command.path,
        metavar="FILE",
        help="files of text, or of records with a field of text",
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of .jsonl, .csv ... that holds the text (default %(default)s)",
    )
    add("--vocab-size", type=int, default=4096, help="256 bytes, merges, end of text (default %(default)s)")
    add("--out", type=command.path, metavar="DIR", help="save tokenizer.json here")
    options = parser.parse_args(argv)
    check_vocab_size(options.vocab_size)

    # Learn the tokenizer.
    files = [(str(path), path) for path in options.files]
    texts = list(documents(files, refuse, options.text_field))
    n_bytes = sum(len(text.encode()) for text in texts)
    if n_bytes == 0:
        raise ValueError(f"no text in {', '.join(map(str, options.files))}; give files that are not empty")

    tokenizer = train_bpe(texts, options.vocab_size, progress=sys.stderr.isatty())

    # Show what it learned.
    n_tokens = sum(len(tokens) for tokens in tokenizer.encode_batch(texts, os.cpu_count() or 1))
    words = [token.decode("utf-8", "replace") for token in tokenizer.ranks]
    longest = sorted((word for word in words if regex.search(r"\p{L}", word)), key=len, reverse=True)[:12]
    sample = "In 2019, tokenizers weren't new: for token in text.split(): print(token)"

    print(f"vocabulary size  {tokenizer.n_vocab}")
    print(f"bytes per token  {n_bytes / n_tokens:.3f}  ({n_bytes:,} bytes, {n_tokens:,} tokens)")
    print(f"longest tokens   {' '.join(map(repr, longest))}")
    print(f"a sentence       {'|'.join(tokenizer.decode([token]) for token in tokenizer.encode(sample))}")
    if options.out:
        tokenizer.save(options.out)
        print(f"saved to         {options.out}")


if __name__ == "__main__":
    command.run(main)
