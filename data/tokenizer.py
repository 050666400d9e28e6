r"""Byte-pair encoding: how text becomes the integers that a language model reads.

A model needs a finite vocabulary. Whole words are too many and leave the unseen word without a name; single
bytes name everything, but make texts four times longer than they need be. Byte-pair encoding starts from the
256 bytes and learns the frequent longer strings from a corpus (Sennrich et al. 2016, arXiv:1508.07909):

    V = {0, ..., 255}                                       the bytes
    repeat:  (a, b) = argmax over pairs of ids  count(a b)      adjacent, in the corpus as it is now written
             V <- V + {ab};  write ab for every a b in the corpus

The order in which tokens were learned is their *rank*. To encode a new text, join the adjacent pair whose
union has the lowest rank, again and again, until no union is in V. Text is first cut by a regular expression
into *pre-tokens* (a word with its leading space, a few digits, a run of spaces) that no token may cross.
Otherwise the vocabulary fills with "dog." "dog!" "dog?" (GPT-2, Radford et al. 2019, section 2.2, which also
moved from characters to bytes). So the corpus shrinks to a table of distinct pre-tokens and their counts, and
that table is all that training looks at.

Training happens here. Encoding is run by `tiktoken` (Rust), which wants exactly the two things learned: ranks
and pattern. formats/tokenizer_json.py writes them to a file that `transformers.AutoTokenizer` reads.

    python -m data.tokenizer FILE... --vocab-size 4096 --out my_tokenizer      learn one and look at it

    tokenizer = train_bpe(texts, 4096)          or get_tokenizer("bytes" | "gpt2" | "my_tokenizer")
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
"""

import argparse
import functools
import hashlib
import heapq
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from data.special_tokens import SpecialTokens, split_at
from data.wordpiece import WordPiece
from formats import tokenizer_json
from formats.tokenizer_json import END_OF_TEXT, GPT2_PATTERN
from formats.wordpiece_json import is_wordpiece

# How text is cut. GPT2_PATTERN, the oldest, belongs to the file format. Three engines read these: `regex`
# (training), tiktoken's Rust (encoding) and Oniguruma (Hugging Face). tiktoken ships faster forms with
# possessive quantifiers, but Oniguruma reads `x{1,3}+` as `(?:x{1,3})+`.
#
# GPT-4's, as Llama 3 writes it: contractions in either case, digits in groups of up to three (a few thousand
# number tokens, each much used), and line breaks apart from the indentation that follows them.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GPT-4o's also lets a word begin at a capital after small letters: camelCase is two pre-tokens.
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TIKTOKEN_PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "r50k_base": GPT2_PATTERN,
    "p50k_base": GPT2_PATTERN,
    "cl100k_base": GPT4_PATTERN,
    "o200k_base": O200K_PATTERN,
}


def count_pre_tokens(texts: Iterable[str], pattern: str, progress: bool) -> Counter[str]:
    """The table that training looks at: how often each pre-token occurs."""
    try:
        splitter = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"split pattern {pattern!r} is not a regular expression: {error}") from None

    counts: Counter[str] = Counter()
    for text in tqdm(texts, "counting words", unit=" texts", disable=not progress):
        counts.update(match[0] for match in splitter.finditer(text))
    return counts


def merge_pair(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Write `new_id` for each `pair` in a word, from left to right: with aa = 9, a a a becomes 9 a."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def learn_tokens(pre_tokens: Counter[str], n_tokens: int, progress: bool) -> list[bytes]:
    """The 256 bytes and what is learned from them, up to n_tokens in all, in the order of ranks.

    Of equally frequent pairs the one with the smallest ids goes first, so that the order of the texts does
    not matter. Learning ends early when no pair occurs twice: seen once is no pattern.
    """
    words = [list(word.encode("utf-8", "replace")) for word in pre_tokens]
    counts = list(pre_tokens.values())

    # A merge touches only the words that hold its pair; `where` finds them (and some that no longer do).
    pair_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            where[pair].add(index)

    # Each pair is in the heap once. Only pairs with the newest token gain, and are pushed once fully counted;
    # from then on a pair only loses. So no entry is too low, and correcting it when it surfaces is enough.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    bar = tqdm(total=n_tokens - 256, desc="merging pairs", disable=not progress)

    while heap and len(tokens) < n_tokens:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count < -negative_count:
            heapq.heappush(heap, (-count, pair))
            continue
        if count < 2:
            break

        new_id = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        bar.update()
        born: set[tuple[int, int]] = set()
        for index in where.pop(pair):
            word = words[index]
            merged = merge_pair(word, pair, new_id)
            if len(merged) == len(word):
                continue
            for old in pairwise(word):
                pair_counts[old] -= counts[index]
            for new in pairwise(merged):
                pair_counts[new] += counts[index]
                if new_id in new:
                    where[new].add(index)
                    born.add(new)
            words[index] = merged
        for new in born:
            heapq.heappush(heap, (-pair_counts[new], new))
    bar.close()
    return tokens


# All that occur in UTF-8. GPT-NeoX's vocabulary, and ModernBERT's after it, has no tokens for the other 13.
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]

# A character of every kind that a pattern tells apart; one that it does not match would silently be dropped.
_PROBE = "aZé中ـ͏ '9٣.,\u00a0_$😀\x00\t \r\n\n  x \u2028"
_LONGEST_SPACE = 250_000  # characters


def cut_long_space(text: str) -> list[str]:
    r"""Cut a text inside runs of whitespace longer than 250,000 characters; any other text stays whole.

    For `\s+(?!\S)` tiktoken's regex engine remembers one way back per character, and panics when there are a
    million. Such runs occur in crawled text. The cut changes tokens inside the run only.
    """
    if len(text) <= _LONGEST_SPACE:
        return [text]

    cuts = [0]
    for run in re.finditer(r"\s{1000,}", text):
        cuts += range(run.start() + _LONGEST_SPACE, run.end(), _LONGEST_SPACE)
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]


def continues(token: bytes) -> bool:
    """Whether a token goes on with the word before it: it begins with a letter, digit, mark, underscore, or
    with a later byte of a character.

    Of a character whose first bytes alone are in the token, the first says enough: C2, E2 and F0 begin mostly
    punctuation, symbols and emoji, the others mostly letters.
    """
    first = token[0]
    if 0x80 <= first < 0xC0:
        return True
    char = token[:4].decode("utf-8", "replace")[0]
    if char == "\ufffd":
        return first not in (0xC2, 0xE2, 0xF0)
    return regex.match(r"[\p{L}\p{N}\p{M}_]", char) is not None


# Whitespace as Rust understands it.
_SPACES = "".join(chr(c) for c in range(0x3001) if chr(c).isspace() and not 0x1C <= c <= 0x1F)


class Tokenizer(SpecialTokens):
    """Ranks, split pattern and special tokens, ready to encode and decode.

    Attributes, besides the arguments: `encoding` (tiktoken's object), `token_bytes` (id -> its bytes),
    `n_vocab` (largest id + 1, the width a model needs; some ids below may be unused), `eot_id` (separates
    documents), `fingerprint` (SHA-256 of all that decides the ids: equal fingerprints, equal token streams).
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
    ) -> None:
        """With `nfc`, text is first brought to Unicode's composed form. `eot` is the name behind `eot_id`.

        roles: what special tokens are for, such as "mask_token" -> "[MASK]" (see `with_special_tokens`).
        mask_lstrip: the mask token takes the space before it, as RoBERTa's and ModernBERT's do.
        Raises ValueError if the parts do not make a tokenizer that can encode any text.
        """
        lacking = [byte for byte in UTF8_BYTES if bytes([byte]) not in ranks]
        if lacking:
            raise ValueError(f"the vocabulary lacks {len(lacking)} of UTF-8's 243 bytes ({lacking[0]}, ...)")
        # Spaces may be both: as special tokens they go first, so that the ordinary token is never seen.
        self.runs = {name for name in special_tokens if name.isspace()}
        both = [
            name for name in special_tokens if not name or (name.encode() in ranks and name not in self.runs)
        ]
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

        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.nfc, self.eot = nfc, eot
        self.roles, self.mask_lstrip = dict(roles or {}), mask_lstrip
        self.check_roles()
        if mask_lstrip:
            self.role_id("mask_token")
        try:
            self.encoding = tiktoken.Encoding(
                "plinth", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        except ValueError as error:
            raise ValueError(f"split pattern {pattern!r} is not a regular expression: {error}") from None
        if self.encoding.decode(self.encoding.encode_ordinary(_PROBE)) != _PROBE:
            raise ValueError(f"split pattern {pattern!r} leaves out some characters; it must match all text")

        self.token_bytes = {i: token for token, i in ranks.items()}
        self.token_bytes |= {i: name.encode() for name, i in special_tokens.items()}
        self.n_vocab = ids[-1] + 1
        self.eot_id = special_tokens[eot]
        by_token = sorted((token.hex(), i) for token, i in ranks.items())
        content = [by_token, pattern, sorted(special_tokens.items()), nfc, eot]
        content += [self.roles["mask_token"]] if mask_lstrip else []
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_special_tokens(self, roles: dict[str, str]) -> "Tokenizer":
        """The same encoding with a special token for each of these roles, as far as it has none yet.

        An encoder needs {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token":
        "[PAD]"}. New names get the ids n_vocab, n_vocab + 1, ...; a role that is taken keeps its token.
        A new mask token takes the space before it, as in RoBERTa: here tokens begin with their space (" as"),
        so in "import [MASK] as np" the space before the mask is part of what the mask stands for.
        Raises ValueError for an unknown role, or a name that is an ordinary token.
        """
        special_tokens, roles = self.extended(roles, vocab={})
        mask_is_new = "mask_token" in roles and roles["mask_token"] not in self.special_tokens
        arguments = {"nfc": self.nfc, "eot": self.eot, "roles": roles}
        arguments["mask_lstrip"] = self.mask_lstrip or mask_is_new
        return Tokenizer(self.ranks, self.pattern, special_tokens, **arguments)

    def encode(self, text: str, allowed_special: set[str] | Literal["all"] = frozenset()) -> list[int]:
        """The token ids of a text. Nothing is put in front or behind (no begin- or end-of-text token).

        Text that spells a special token is text: a document that mentions "<|endoftext|>" must not end there.
        Only the names in `allowed_special` (or "all") become their special ids, which is what Hugging Face's
        tokenizers always do. (Runs of spaces, which GPT-NeoX and ModernBERT have among them, always do: they
        announce nothing.) Lone surrogates, which have no UTF-8, become U+FFFD.
        """
        parts = split_at(self.allowed(allowed_special) - self.runs, text)
        tokens: list[int] = []
        for i, part in enumerate(parts):
            if i % 2 == 1:
                tokens.append(self.special_tokens[part])
                continue
            if self.mask_lstrip and parts[i + 1 : i + 2] == [self.roles["mask_token"]]:
                part = part.rstrip(_SPACES)
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            for j, piece in enumerate(split_at(self.runs, part)):
                if j % 2 == 1:
                    tokens.append(self.special_tokens[piece])
                    continue
                for whole in cut_long_space(piece):
                    tokens += self.encoding.encode_ordinary(whole)
        return tokens

    def encode_batch(self, texts: list[str], n_threads: int) -> list[list[int]]:
        """`encode` for many texts at once. Threads suffice: tiktoken lets go of Python's lock as it works."""
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some token ids, whatever they are.

        A model may emit half a character, or an id beyond the vocabulary (embeddings are often padded to a
        round width). Both show as U+FFFD, so that looking at a sample never ends a run.
        """
        pieces = [self.token_bytes.get(int(token), "\ufffd".encode()) for token in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """(n_vocab,) bool: True where a token continues the word before it. Special tokens do not."""
        result = np.zeros(self.n_vocab, bool)
        result[[i for token, i in self.ranks.items() if continues(token)]] = True
        return result

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads."""
        content = (self.ranks, self.pattern, self.special_tokens, self.nfc, self.eot)
        tokenizer_json.write(directory, *content, self.roles, self.mask_lstrip)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read a byte-level BPE tokenizer.json: one saved here, or GPT-2's, Llama 3's, Qwen's and their like.

        `directory` may also be the file itself. Documents end with the `eos_token` of tokenizer_config.json
        beside it, else with <|endoftext|>. Ids equal Hugging Face's with `add_special_tokens=False`; whatever
        would make them differ (another algorithm, normalizer or splitter) is a ValueError that names it.
        """
        arguments = tokenizer_json.read(directory)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, pattern: str = GPT4_PATTERN, progress: bool = False
) -> Tokenizer:
    """Learn a tokenizer from texts.

    `vocab_size` counts everything: 256 bytes (ids 0-255), merges, and <|endoftext|> (the last id). Texts in
    which too few pairs occur twice give a smaller one. Their order does not matter.
    Raises ValueError for a vocabulary below 257 or a pattern that is no regular expression.
    """
    if vocab_size < 257:
        raise ValueError(f"vocabulary size {vocab_size} is too small; 256 bytes and {END_OF_TEXT} need 257")
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, got one string; put it in a list")

    tokens = learn_tokens(count_pre_tokens(texts, pattern, progress), vocab_size - 1, progress)
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(ranks, pattern, {END_OF_TEXT: len(tokens)})


def get_tokenizer(name: str) -> Tokenizer | WordPiece:
    """The tokenizer of a name: "bytes", a tiktoken encoding, or a directory (or file) with tokenizer.json.

    A directory may also have BERT's vocab.txt. Raises ValueError for any other name, for a file that
    `Tokenizer.load` or `WordPiece.load` refuses, or if a download fails.
    """
    if name == "bytes":
        return Tokenizer({bytes([byte]): byte for byte in range(256)}, GPT4_PATTERN, {END_OF_TEXT: 256})

    if name in TIKTOKEN_PATTERNS:
        try:
            published = tiktoken.get_encoding(name)
        except OSError as error:  # what `requests` raises derives from it
            kind = type(error).__name__
            raise ValueError(f"cannot download {name!r} ({kind}); go online or use 'bytes'") from None
        return Tokenizer(published._mergeable_ranks, TIKTOKEN_PATTERNS[name], published._special_tokens)

    if Path(name).exists():
        return (WordPiece if is_wordpiece(name) else Tokenizer).load(Path(name))
    raise ValueError(
        f"unknown tokenizer {name!r}; use 'bytes', 'bpe:4096' (where there is a corpus to train on), "
        f"{', '.join(TIKTOKEN_PATTERNS)}, or a directory with tokenizer.json"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn a byte-pair encoding from text files and look at it.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="bytes + merges + 1 (default 4096)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save tokenizer.json here")
    options = parser.parse_args()

    texts = [path.read_text(encoding="utf-8", errors="replace") for path in options.files]
    n_bytes = sum(len(text.encode()) for text in texts)
    if n_bytes == 0:
        raise ValueError(f"no text in {', '.join(map(str, options.files))}; give files that are not empty")

    tokenizer = train_bpe(texts, options.vocab_size, progress=sys.stderr.isatty())
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
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
