"""Merges: the pairs that byte-pair encodings learn, and how a word is joined by them.

Every byte-pair encoding, of bytes (data/tokenizer.py) or of characters (Llama 2, Mistral, Gemma), and a
WordPiece vocabulary are learned by the same loop over words and their counts, `learn_tokens`. Its result is
applied by tiktoken where the symbols are bytes, and otherwise here, by `merge` (Sennrich et al. 2016,
arXiv:1508.07909):

    while a pair of neighbours is in merges:  join the pair with the lowest rank, the leftmost of equal ones

`byte_pairs` returns the BPE model of a tokenizer.json as a function. The symbols of a word are its
characters. A character that is no token becomes the tokens of its bytes in UTF-8, "<0xE2>" and so on (*byte
fallback*), or the unknown token.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import add
from typing import TypeVar

from data.words import UTF8_BYTES
from formats.progress import progress_bar

Token = TypeVar("Token", str, bytes)
# {(id, id) of two neighbours: (rank, id of their union)}; the lowest rank is joined first.
Merges = dict[tuple[int, int], tuple[int, int]]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def merge_pair(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Return the word with new_id for each pair, from left to right: with aa = 9, a a a becomes 9 a."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def count_pairs(
    words: list[list[int]], counts: Sequence[int]
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], set[int]]]:
    """Return how often each pair of neighbours occurs, and the words that hold it, both as defaultdicts."""
    pair_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            where[pair].add(index)
    return pair_counts, where


def learn_tokens(
    words: list[list[int]],
    counts: Sequence[int],
    alphabet: list[Token],
    n_tokens: int,
    progress: bool,
    join: Callable[[Token, Token], Token] = add,
) -> list[Token]:
    """Return n_tokens tokens in the order of their ranks: the alphabet, then the learned ones.

    words: as indices into the alphabet; they are changed. counts: how often each word occurs. join: returns
    the union of two tokens. Among equally frequent pairs the one with the smallest ids comes first, so the
    order of the texts does not matter. The list is shorter if no pair is left that occurs at least twice.
    """
    # A merge changes only words that hold its pair; `where` lists these, and some more that held it once.
    pair_counts, where = count_pairs(words, counts)

    # Each pair is in the heap once, with its count at that time. Pairs with the newest token are pushed when
    # they are fully counted, and counts of older pairs only fall. So an entry is never too low, and it is
    # enough to correct it when it comes out.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    tokens = list(alphabet)
    bar = progress_bar(total=n_tokens - len(alphabet), desc="merging pairs", disable=not progress)

    # Merge the most frequent pair until there are enough tokens.
    while heap and len(tokens) < n_tokens:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count < -negative_count:
            heapq.heappush(heap, (-count, pair))
            continue
        if count < 2:
            break

        # The union of the pair is the new token.
        new_id = len(tokens)
        tokens.append(join(tokens[pair[0]], tokens[pair[1]]))
        bar.update()
        # Write it into the words, and correct the counts of all pairs in them.
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


def merge(symbols: list[int], merges: Merges) -> list[int]:
    """Return the ids of a word after all merges of its n symbols, in O(n log n) steps."""
    # A linked list of the symbols, and a heap of the pairs that can be joined. A -1 in the list is no
    # neighbour; as a symbol, it is one that has been joined to the symbol before it.
    symbols = list(symbols)
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    heap = []

    def push(i: int, j: int) -> None:
        """Put the pair of the symbols at i and j on the heap, if it can be joined."""
        found = merges.get((symbols[i], symbols[j])) if i >= 0 and j >= 0 else None
        if found is not None:
            heapq.heappush(heap, (found[0], i, found[1]))

    for i in range(len(symbols) - 1):
        push(i, i + 1)

    # Join the pair of the lowest rank, unless one of its symbols has since been joined to another.
    while heap:
        _, i, union = heapq.heappop(heap)
        j = after[i]
        if symbols[i] < 0 or j < 0 or merges.get((symbols[i], symbols[j]), (0, -1))[1] != union:
            continue
        symbols[i], symbols[j] = union, -1
        after[i] = after[j]
        if after[j] >= 0:
            before[after[j]] = i
        push(before[i], i)
        push(i, after[i])
    return [symbol for symbol in symbols if symbol >= 0]


def read_merges(model: dict) -> Merges:
    """Return the merges of a BPE model. Raises ValueError for one whose parts or union are no tokens."""
    vocab, n_prefix = model["vocab"], len(model.get("continuing_subword_prefix") or "")
    merges: Merges = {}
    for rank, entry in enumerate(model["merges"]):
        left, right = entry.split(" ") if isinstance(entry, str) else entry
        for token in (left, right, left + right[n_prefix:]):
            if token not in vocab:
                raise ValueError(f"merge {rank}, {left!r} and {right!r}: {token!r} is not in the vocabulary")
        # Of two entries for one pair the last counts, as in Hugging Face's tokenizers.
        merges[vocab[left], vocab[right]] = (rank, vocab[left + right[n_prefix:]])
    return merges


def byte_fallback(vocab: dict[str, int], unknown: int | None) -> Callable[[str], list[int]]:
    """Return the function from characters that are no token to the ids of their bytes in UTF-8.

    unknown: the id of the unknown token, which takes their place where a byte is no token, or None. Raises
    ValueError if there is neither.
    """
    ids = [vocab.get(piece) for piece in BYTE_PIECES]
    missing = [piece for byte, piece in enumerate(BYTE_PIECES) if ids[byte] is None and byte in UTF8_BYTES]
    if missing and unknown is None:
        raise ValueError(f"byte_fallback without a token {missing[0]} ({len(missing)} such bytes)")

    def encode(text: str) -> list[int]:
        found = [ids[byte] for byte in text.encode()]
        return [unknown] if None in found else found

    return encode


def byte_pairs(model: dict, covered: bool) -> Callable[[str], list[int]]:
    """Return the function from a word to ids that a BPE model of a tokenizer.json describes.

    covered: the words have only characters of the byte alphabet, so that no unknown token is needed. Raises
    ValueError for dropout, and for a model without any token for unknown characters.
    """
    # Read the options. Each symbol but the first has the prefix in front, and the last ends in the suffix.
    vocab, merges = model["vocab"], read_merges(model)
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    ignore_merges, fuse = model.get("ignore_merges"), model.get("fuse_unk")
    unknown = vocab.get(model.get("unk_token"))
    fallback = byte_fallback(vocab, unknown) if model.get("byte_fallback") else None
    if model.get("dropout"):
        raise ValueError(f"BPE with dropout = {model['dropout']!r} is not supported; set it to null")
    if unknown is None and fallback is None and not covered:
        raise ValueError(f"unk_token {model.get('unk_token')!r} is not in the vocabulary; name one that is")

    def encode(word: str) -> list[int]:
        """Return the ids of a word."""
        if ignore_merges and word in vocab:
            return [vocab[word]]
        # `waiting` holds an unknown token until a known character or the end. So it comes after the bytes of
        # characters in between, as in Hugging Face's tokenizers.
        symbols: list[int] = []
        waiting: list[int] = []
        for i, char in enumerate(word):
            name = (prefix if i else "") + char + (suffix if i == len(word) - 1 else "")
            token = vocab.get(name)
            if token is not None:
                symbols += [*waiting, token]
                waiting = []
            elif fallback is not None and (found := fallback(name)) != [unknown]:
                symbols += found
            elif unknown is not None:
                symbols += [] if fuse else waiting
                waiting = [unknown]
        return merge(symbols + waiting, merges)

    return encode


def never_joins(model: dict, space: str) -> bool:
    """Return whether a text can be cut in front of each run of spaces without a change of its ids.

    It can if no token has a space after another character, and the space is a token: then no merge, and no
    run of unknown characters, goes across such a place. With ignore_merges it cannot, since that looks up
    each word as a whole.
    """
    inside = any(space in piece.lstrip(space) for piece in model["vocab"] if len(piece) > 1)
    return space in model["vocab"] and not inside and not model.get("ignore_merges")
