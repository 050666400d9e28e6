"""Published tokenizers: whatever a tokenizer.json describes, part by part.

Such a file is a list of parts. All but the last turn a text into tokens, in this order; the last turns tokens
into a text:

    added tokens      names that are found in a text before anything else: [MASK], <extra_id_0>, "\\n\\n"
    normalizer        data/normalize.py: one form of accents, capitals and spaces
    pre-tokenizer     data/pre_tokenize.py: from a text to its words
    model             BPE (data/merges.py), Unigram (data/unigram.py) or WordPiece: from a word to its tokens
    post-processor    the tokens around a text, [CLS] and [SEP] or <s>; here only in `begin_ids`
    decoder           data/piece_decoders.py: from tokens to text

Two kinds have a faster tokenizer of their own, which `get_tokenizer` of data/tokenizer.py prefers: byte-level
BPE as GPT-2, Llama 3 and Qwen have it (tiktoken), and BERT's WordPiece. All others are a `Pipeline`: RoBERTa,
ALBERT, T5, DeBERTa, Llama 2, Mistral, Gemma, DeepSeek. A part that is not supported is an error that names
it.

    tokenizer = Pipeline.load("t5-small")
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

    python -m data.pipeline DIRECTORY "Some text"      its tokens and ids, with the tokenizer in DIRECTORY
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import regex

from data.merges import BYTE_PIECES, byte_pairs, never_joins
from data.normalize import normalizer
from data.piece_decoders import decoder
from data.pre_tokenize import pre_tokenizer, split
from data.special_tokens import SpecialTokens
from data.unigram import best_pieces
from data.wordpiece import CACHED_WORDS, longest_pieces
from data.words import PROBE, RUST_WHITESPACE, UTF8_BYTES, continues
from formats import command, pipeline_json
from formats.tokenizer_json import BYTE_TO_CHAR, CHAR_TO_BYTE, added_tokens, read_around, template, to_bytes

SURROGATES = regex.compile("[\ud800-\udfff]")
WORD = regex.compile(r"[\w\u200c\u200d]")
SPACE = "▁"
WORDS = regex.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
LONGEST_KEPT = 100  # characters of the longest word whose ids are kept in the cache


def parts_of(part: dict | None, inner: str) -> list[dict]:
    """Return a part as a list, or the parts of a Sequence and of the Sequences in it.

    inner: the setting that holds the parts of a Sequence, such as "pretokenizers".
    """
    if part and part["type"] == "Sequence":
        return [one for below in part[inner] for one in parts_of(below, inner)]
    return [part] if part else []


def read_vocabulary(model: dict, kind: str | None) -> dict[str, int]:
    """Return {piece: id} of a model. Raises ValueError for an unknown kind, and for a piece with two ids."""
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise ValueError(f"model type {kind} is not supported; expected BPE, Unigram or WordPiece")
    if kind != "Unigram":
        return model["vocab"]
    vocab: dict[str, int] = {}
    for i, (piece, _) in enumerate(model["vocab"]):
        if vocab.setdefault(piece, i) != i:
            raise ValueError(f"piece {piece!r} has two ids, {vocab[piece]} and {i}; leave one")
    return vocab


def check_vocabulary(vocab: dict[str, int], added: dict[str, int]) -> None:
    """Raise ValueError unless each piece is text and has an id of its own.

    vocab, added: {piece: id} of the model and of the added tokens, which may be in the model too.
    """
    if not vocab:
        raise ValueError("the vocabulary is empty; download the file again")
    for piece, i in (vocab | added).items():
        if not isinstance(piece, str) or not piece:
            raise ValueError(f"piece {piece!r} with id {i!r} is no text; remove it")
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**32:
            raise ValueError(f"piece {piece!r} has id {i!r}; expected a whole number of at most 32 bits")
    seen: dict[int, str] = {}
    for piece, i in vocab.items():
        if i in seen:
            raise ValueError(f"pieces {seen[i]!r} and {piece!r} have the same id {i}; give one another")
        seen[i] = piece
    for name, i in added.items():
        if seen.get(i, name) != name or vocab.get(name, i) != i:
            raise ValueError(f"added token {name!r} has id {i}, which in the vocabulary is {seen.get(i)!r}")


class Added:
    """The search for added tokens in a text, which may have to stand alone or include spaces beside them."""

    def __init__(self, names: dict[str, dict]) -> None:
        """Prepare the search. names: {what to find: its entry in added_tokens}."""
        longest_first = sorted(names, key=len, reverse=True)
        self.pattern = regex.compile("|".join(map(regex.escape, longest_first))) if names else None
        self.names = names

    def split(self, text: str) -> list[str | int]:
        """Return a text cut at its added tokens: parts of it, and ids."""
        if self.pattern is None:
            return [text] if text else []
        parts: list[str | int] = []
        end = 0
        for match in self.pattern.finditer(text):
            start, stop, token = match.start(), match.end(), self.names[match[0]]
            # With single_word, a token within a longer word is not found.
            beside = text[start - 1 : start] + text[stop : stop + 1]
            if token.get("single_word") and WORD.search(beside):
                continue
            # A token may include the spaces before and after it.
            while token.get("lstrip") and start > end and text[start - 1] in RUST_WHITESPACE:
                start -= 1
            while token.get("rstrip") and stop < len(text) and text[stop] in RUST_WHITESPACE:
                stop += 1
            if start > end:
                parts.append(text[end:start])
            parts.append(token["id"])
            end = stop
        return [*parts, text[end:]] if end < len(text) else parts


class Pipeline(SpecialTokens):
    """A tokenizer of any parts, with the methods of `tokenizer.Tokenizer`. Attributes besides the arguments:

    vocab         {piece: id} of the model
    n_vocab       the largest id + 1, which is the vocabulary size of a model
    eot_id        the id that separates documents
    around        the names of the tokens that the post-processor puts in front of a text and behind it
    fingerprint   SHA-256 of everything that determines the ids
    """

    def __init__(self, file: dict, eot: str, roles: dict[str, str]) -> None:
        """Make the tokenizer. file: the content of a tokenizer.json. eot: the name of the token that ends a
        document. roles: {role: name}, such as "mask_token": "[MASK]".

        Raises ValueError for a part, or a setting of a part, that is not supported, and for a vocabulary
        whose pieces are not text or share an id.
        """
        # The vocabulary. Of the added tokens, the special ones and those with a role are found in a text only
        # where the caller allows them; all others are found in any text, like pieces.
        self.file, self.eot, self.roles, model = file, eot, dict(roles), file["model"]
        kind = model.get("type", "BPE" if "merges" in model else None)
        self.vocab = read_vocabulary(model, kind)
        added = file["added_tokens"]
        named = {eot, *roles.values()}
        self.special_tokens = {
            t["content"]: t["id"] for t in added if t.get("special") or t["content"] in named
        }
        check_vocabulary(self.vocab, {token["content"]: token["id"] for token in added})
        self.check_roles()

        # The functions of the parts.
        self.normalize, self.decoder = normalizer(file.get("normalizer")), decoder(file.get("decoder"))
        pre = file.get("pre_tokenizer")
        self.pre_tokenize, parts = pre_tokenizer(pre), parts_of(pre, "pretokenizers")
        self.bytewise = bool(parts) and parts[-1]["type"] == "ByteLevel"
        if kind == "BPE":
            covered = self.bytewise and all(BYTE_TO_CHAR[byte] in self.vocab for byte in UTF8_BYTES)
            self.model = byte_pairs(model, covered)
            # Where a text is one long word, it is cut at spaces if no merge goes across them. That changes no
            # token, and the ids of the short words are found in the cache.
            unsplit = all(p["type"] == "Metaspace" and not p.get("split", True) for p in parts)
            if unsplit and never_joins(model, SPACE):
                whole, cut = self.pre_tokenize, split(WORDS, "Isolated")
                self.pre_tokenize = lambda words, at_start: cut(whole(words, at_start), at_start)
        elif kind == "Unigram":
            self.model = best_pieces(model, self.special_tokens)
        else:
            self.model = longest_pieces(model)

        # The other attributes, and the caches.
        self.pieces = {i: piece for piece, i in self.vocab.items()}
        self.pieces |= {token["id"]: token["content"] for token in added}
        self.n_vocab, self.eot_id = max(self.pieces) + 1, self.special_tokens[eot]
        self.around = read_around(file.get("post_processor"), self.special_tokens)
        self.words: dict[str, list[int]] = {}  # the cache of `of_word`
        self.searches: dict[frozenset[str], tuple[Added, Added]] = {}  # that of `search`
        content = [model, file.get("normalizer"), pre, added, eot]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self.decode(self.encode(PROBE, "all"))  # settings of a wrong type are errors here, not later

    def with_special_tokens(self, roles: dict[str, str], names: Iterable[str] = ()) -> "Pipeline":
        """Return this tokenizer with a special token for each of these roles, and for names without a role.

        A role that already has a token keeps it; names that the vocabulary lacks get the ids n_vocab,
        n_vocab + 1, ... A new mask token includes the space before it. Raises ValueError for an unknown role.
        """
        special_tokens, roles = self.extended(roles, names, self.vocab)
        new = {name: i for name, i in special_tokens.items() if name not in self.special_tokens}
        entries = added_tokens(new, roles.get("mask_token"))
        old = [token for token in self.file["added_tokens"] if token["content"] not in new]
        file = self.file | {"added_tokens": [*old, *entries]}
        if file.get("post_processor") is None:
            file["post_processor"] = template(special_tokens, roles)
        return Pipeline(file, self.eot, roles)

    @property
    def begin_ids(self) -> list[int]:
        """Return the ids that stand in front of a prompt, such as Llama 2's <s>; often none.

        Tokens that the file puts behind a text are left out, since a model continues the prompt.
        """
        return [self.special_tokens[name] for name in self.around[0]]

    def search(self, allowed: frozenset[str]) -> tuple[Added, Added]:
        """Return the searches for added tokens in a text as it is, and in the normalised text.

        allowed: the special tokens to look for. Others are always looked for.
        """
        if allowed not in self.searches:
            tokens = [
                token
                for token in self.file["added_tokens"]
                if token["content"] in allowed or token["content"] not in self.special_tokens
            ]
            before = {token["content"]: token for token in tokens if not token.get("normalized")}
            after = {self.normalize(token["content"]): token for token in tokens if token.get("normalized")}
            after.pop("", None)
            self.searches[allowed] = Added(before), Added(after)
        return self.searches[allowed]

    def encode(self, text: str, allowed_special: set[str] | Literal["all"] = frozenset()) -> list[int]:
        """Return the token ids of a text, without any token added in front (see `begin_ids`) or behind.

        Text that spells a special token is encoded as text. Only the names in allowed_special (or "all")
        become special tokens, as all of them do in Hugging Face's tokenizers. Lone surrogates become U+FFFD.
        """
        # Cut the text at added tokens, normalise the parts between them, cut these at the added tokens that
        # are found in normalised text, then into words.
        before, after = self.search(frozenset(self.allowed(allowed_special)))
        ids: list[int] = []
        for i, part in enumerate(before.split(SURROGATES.sub("\ufffd", text))):
            if isinstance(part, int):
                ids.append(part)
                continue
            for j, piece in enumerate(after.split(self.normalize(part))):
                if isinstance(piece, int):
                    ids.append(piece)
                    continue
                for word in self.pre_tokenize([piece], i == j == 0):
                    known = self.words.get(word)
                    ids += self.of_word(word) if known is None else known
        return ids

    def of_word(self, word: str) -> list[int]:
        """Return the ids of a word, which are kept for the next time unless it is long."""
        ids = self.model(word) if word else []
        if len(word) <= LONGEST_KEPT:
            if len(self.words) >= CACHED_WORDS:
                self.words.clear()
            self.words[word] = ids
        return ids

    def encode_batch(self, texts: list[str], n_threads: int) -> list[list[int]]:
        """Return the token ids of each text. It uses no threads: Python's lock would let only one run."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids. An id beyond the vocabulary becomes U+FFFD."""
        return "".join(self.decoder([self.pieces.get(int(token), "\ufffd") for token in tokens]))

    @functools.cached_property
    def continues_word(self) -> np.ndarray:
        """Return (n_vocab,) bool: True for tokens that continue a word. Special tokens do not."""
        prefix = self.file["model"].get("continuing_subword_prefix")
        result = np.zeros(self.n_vocab, bool)
        for piece, i in self.vocab.items():
            if piece in BYTE_PIECES:
                result[i] = continues(bytes([BYTE_PIECES.index(piece)]))
            elif self.bytewise and all(char in CHAR_TO_BYTE for char in piece):
                result[i] = continues(to_bytes(piece))
            else:
                result[i] = (
                    piece.startswith(prefix) if prefix else piece[0] != SPACE and continues(piece.encode())
                )
        result[list(self.special_tokens.values())] = False
        return result

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads."""
        pipeline_json.write(directory, self.file, self.eot, self.roles)

    @classmethod
    def load(cls, directory: Path) -> "Pipeline":
        """Return the tokenizer of a checkpoint: of its tokenizer.json, or else of its SentencePiece model.

        directory may also be one of these files. Ids with `allowed_special="all"` equal Hugging Face's with
        `add_special_tokens=False`. Raises ValueError naming anything that would make them differ.
        """
        arguments = pipeline_json.read(directory)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{directory}: {str(error).splitlines()[0]}") from None
        except (AttributeError, LookupError, TypeError, OverflowError) as error:
            kind = type(error).__name__
            raise ValueError(
                f"{directory}: no complete tokenizer.json ({kind}: {str(error)[:200]!r}); download it again"
            ) from None


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Show the tokens and ids of a text.")
    parser.add_argument(
        "directory", type=command.path, help="a checkpoint with tokenizer.json or tokenizer.model"
    )
    parser.add_argument("text", help="it may spell special tokens, such as [MASK]")
    args = parser.parse_args(argv)

    tokenizer = Pipeline.load(args.directory)
    ids = tokenizer.encode(args.text, "all")
    print(" ".join(tokenizer.pieces[i] for i in ids))
    print(" ".join(map(str, ids)))


if __name__ == "__main__":
    command.run(main)
