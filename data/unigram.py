r"""The unigram model: a word is cut into the pieces that are together the most probable.

Byte-pair encoding joins pairs in a fixed order. The unigram model (Kudo 2018, arXiv:1804.10959; the default
of SentencePiece, Kudo and Richardson 2018, arXiv:1808.06226) gives each piece v of its vocabulary a
probability p(v). The probability of a segmentation of a word w is the product of those of its pieces:

    P(v1 ... vk) = p(v1) ... p(vk),     sum over v of p(v) = 1
    best(w)      = argmax of P over all segmentations of w              Viterbi's algorithm
    P(w)         = sum of P over all segmentations of w                 the forward algorithm

Training is expectation maximisation (section 3.2), in which the segmentations are the hidden variables. It
begins with all frequent substrings of the words and removes pieces until the vocabulary has its size. With
n(w) the count of a word:

    E    c(v) = sum over words of n(w) E[number of v in w]  =  d/d log p(v) of  sum of n(w) log P(w)
    M    log p(v) = digamma(c(v)) - digamma(sum of c), without pieces of c(v) < 1/2. This is SentencePiece's
         sparse prior, from Liang and Klein's tutorial at ACL 2007; plain EM has log c(v) - log(sum of c)
    prune, after each two rounds, to 3/4 of the pieces: those stay whose removal would lower the likelihood
           the most. A removed piece is then written as its best segmentation into others.

The segmentations of a word are the paths through a lattice: its nodes are the places between characters, its
edges the pieces. data/lattices.py has those of all distinct words as arrays; one NumPy operation advances
by a character in all of them. No piece has characters of two scripts, such as a letter and a bracket, so
words are cut there before they are counted.

*Sampling* draws a segmentation with a probability proportional to P^alpha, instead of the best one, so that
a model reads a word in several ways (*subword regularisation*, sections 2.1 and 3.3).

    python -m data.unigram FILE... --vocab-size 8000 --out my_tokenizer      learn one and look at it

Shapes: V pieces, W characters of the longest piece.
"""

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import regex

from data.corpus import documents
from data.lattices import Lattices
from data.merges import BYTE_PIECES, byte_fallback
from data.normalize import normalizer
from data.pre_tokenize import pre_tokenizer
from data.records import refuse
from data.words import check_texts
from formats import command, pipeline_json, tokenizer_json
from formats.progress import progress_bar

SPACE = "▁"  # a space, at the beginning of a word
UNKNOWN_PENALTY = 10.0  # nats below the least probable piece
LONGEST_PIECE = 16  # characters
ROUNDS = 2  # of E and M before each pruning
SHRINK = 0.75  # the share of pieces that pruning leaves
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5

# A piece has characters of only one of these scripts, or of the three of Japanese.
SCRIPTS = (
    *("Latin", "Common", "Inherited", "Cyrillic", "Greek", "Arabic", "Hebrew", "Armenian", "Georgian"),
    *("Devanagari", "Bengali", "Gujarati", "Gurmukhi", "Kannada", "Malayalam", "Tamil", "Telugu", "Sinhala"),
    *("Hangul", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Ethiopic"),
)
JAPANESE = r"[\p{Han}\p{Hiragana}\p{Katakana}ー]+"
# The runs of one script in a word, each with the ▁ before it. Of several ▁, all but the last form a run of
# their own.
RUNS = regex.compile(
    rf"{SPACE}+(?={SPACE})|{SPACE}?(?:{JAPANESE}|"
    + "|".join(rf"(?:(?![{SPACE}ー])\p{{Script={script}}})+" for script in SCRIPTS)
    + rf"|[^{SPACE}])|{SPACE}"
)


# --- one word: the best segmentation, and a random one


def best_pieces(model: dict, hidden: Iterable[str]) -> Callable[[str], list[int]]:
    """Return the function from a word to the ids of its best segmentation by the "model" of a tokenizer.json.

    hidden: pieces that are not found in a text, such as special tokens. A run of characters without a piece
    becomes one unknown token, or with byte_fallback the tokens of its bytes. Raises ValueError for a model
    without an unknown token, and for scores that are not finite numbers.
    """
    vocab, unknown = model["vocab"], model["unk_id"]
    if not isinstance(unknown, int) or not 0 <= unknown < len(vocab):
        raise ValueError(f"unk_id {unknown!r} is no piece of {len(vocab)}; expected the number of one")
    for piece, score in vocab:
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"piece {piece!r} has score {score!r}; expected a finite number")
    ids = {piece: i for i, (piece, _) in enumerate(vocab)}
    has_bytes = bool(model.get("byte_fallback"))
    of_unknown = byte_fallback(ids, unknown) if has_bytes else lambda text: [unknown]
    unknown_score = min(score for _, score in vocab) - UNKNOWN_PENALTY

    # Each piece with its score, and each text that only begins a piece with None. So the search for pieces
    # from a character on ends as soon as a text is not in the table.
    hidden = {*hidden, vocab[unknown][0], *(BYTE_PIECES if has_bytes else ())}
    scores = {piece: float(score) for piece, score in vocab if piece not in hidden}
    beginnings = {piece[:end] for piece in scores for end in range(1, len(piece))}
    table: dict[str, float | None] = dict.fromkeys(beginnings) | scores

    def encode(word: str) -> list[int]:
        """Return the ids of a word."""
        # The best segmentation of the first i characters: its score, where its last piece begins, and whether
        # that is a piece (or an unknown character).
        n = len(word)
        best, begin, known = [0.0] + [-math.inf] * n, [0] * (n + 1), [True] * (n + 1)
        for start in range(n):
            so_far = best[start]
            for end in range(start + 1, n + 1):
                score = table.get(word[start:end], math.nan)
                if score is None:
                    continue
                if score != score:  # NaN: no piece begins with these characters
                    break
                if so_far + score > best[end]:
                    best[end], begin[end], known[end] = so_far + score, start, True
            if word[start] not in scores and so_far + unknown_score > best[start + 1]:
                best[start + 1], begin[start + 1], known[start + 1] = so_far + unknown_score, start, False

        # Collect the pieces from the end to the beginning. Adjacent unknown characters are joined.
        tokens, end = [], n
        while end > 0:
            start = begin[end]
            if known[end]:
                tokens.append(ids[word[start:end]])
            else:
                while start > 0 and not known[start]:
                    start = begin[start]
                tokens += reversed(of_unknown(word[start:end]))
            end = start
        return tokens[::-1]

    return encode


def sample_pieces(word: str, scores: dict[str, float], alpha: float, draw: random.Random) -> list[str]:
    """Return a random segmentation of a word, with a probability proportional to P^alpha.

    scores: {piece: log p}, for pieces of at most LONGEST_PIECE characters; a character without a piece is
    UNKNOWN_PENALTY below the least of them. alpha: finite; 0 makes all segmentations equally likely, and the
    larger it is, the more often the best one is drawn. The forward algorithm sums over all segmentations of
    each beginning of the word; pieces are then drawn from the end (section 3.3 of the paper).
    """
    unknown_score = min(scores.values()) - UNKNOWN_PENALTY
    # total[i]: log of the sum of P^alpha over the segmentations of the first i characters. edges[i]: where
    # the pieces that end at i + 1 begin, and their weights.
    total, edges = [0.0], []
    for end in range(1, len(word) + 1):
        starts = [i for i in range(max(0, end - LONGEST_PIECE), end) if i == end - 1 or word[i:end] in scores]
        logs = [total[i] + alpha * scores.get(word[i:end], unknown_score) for i in starts]
        highest = max(logs)
        weights = [math.exp(value - highest) for value in logs]
        total.append(highest + math.log(sum(weights)))
        edges.append((starts, weights))

    pieces, end = [], len(word)
    while end > 0:
        (start,) = draw.choices(*edges[end - 1])
        pieces.append(word[start:end])
        end = start
    return pieces[::-1]


# --- all words: training


def digamma(x: np.ndarray) -> np.ndarray:
    """Return digamma, the derivative of log Gamma, at x > 0.

    digamma(x) = digamma(x + 1) - 1 / x raises x to 7 or more, where the asymptotic series is exact enough.
    """
    x, result = np.array(x, float), np.zeros(np.shape(x))
    for _ in range(7):
        low = x < 7
        result[low] -= 1 / x[low]
        x[low] += 1
    y = 1 / (x - 0.5) ** 2
    return result + np.log(x - 0.5) + y * (1 / 24 - y * (7 / 960 - y * (31 / 8064 - y * 127 / 30720)))


def with_unknown(log_p: np.ndarray) -> np.ndarray:
    """Return (V + 2,): log_p (V,), that of an unknown character, at the index UNKNOWN = -2
    and that of a missing edge, at NO_EDGE = -1."""
    return np.concatenate((log_p, [log_p.min() - UNKNOWN_PENALTY, -np.inf]))


def em_round(lattices: Lattices, log_p: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the new log_p after the steps E and M, and the log-likelihood before them.

    Pieces with an expected count below 1/2 are removed from the lattices.
    """
    counts, likelihood = lattices.expected_counts(with_unknown(log_p))
    kept = np.flatnonzero(counts >= 0.5)
    lattices.keep(kept)
    return digamma(counts[kept]) - digamma(counts[kept].sum()), likelihood


def prune(lattices: Lattices, log_p: np.ndarray, least: int) -> np.ndarray:
    """Remove a quarter of the pieces, but keep at least `least`, and return the log_p of those that stay.

    A piece that is in no best segmentation of a word is removed, and so is one whose alternative, its best
    segmentation into other pieces, is more probable. A piece without an alternative stays. For the rest, the
    loss is by how much the likelihood would fall if the alternative were written; the largest losses stay.
    """
    counts = lattices.best_counts(with_unknown(log_p))
    scores, parts = lattices.alternatives(with_unknown(log_p))
    alone = ~np.isfinite(scores)
    useful = (counts > 0) & (alone | (scores <= log_p))

    # The log-likelihood of an occurrence of a piece v, before: log(c(v) / C), C = sum of c. After: the sum of
    # log((c(u) + c(v)) / C') over its parts u, where C' = C + c(v) (number of parts - 1).
    with np.errstate(divide="ignore", invalid="ignore"):
        before = np.log(counts) - np.log(counts.sum())
        n_parts = (parts >= 0).sum(1)
        added = np.log(counts[parts] + counts[:, None])
        after = np.where(parts >= 0, added, 0).sum(1) - n_parts * np.log(
            counts.sum() + counts * (n_parts - 1)
        )
        loss = np.where(alone, np.inf, counts * (before - after))
    order = np.argsort(np.where(useful, -loss, np.inf), kind="stable")
    n_kept = max(least, int(SHRINK * len(log_p)), int((alone & useful).sum()))
    kept = order[: min(n_kept, int(useful.sum()))]
    lattices.keep(kept)
    return log_p[kept]


def required(words: Counter[str], coverage: float) -> set[str]:
    """Return the most frequent characters of the words, which make up the share `coverage` of the text."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for char in word:
            counts[char] += n
    left, chars = coverage * counts.total(), set()
    for char, n in counts.most_common():
        if left <= 0:
            break
        chars.add(char)
        left -= n
    return chars


def learn_pieces(
    words: Counter[str],
    n_pieces: int,
    *,
    coverage: float = 0.9995,
    n_seeds: int = 1_000_000,
    progress: bool = False,
) -> list[tuple[str, float]]:
    """Return n_pieces pieces with their log p, the most probable first, learned from words and their counts.

    coverage: the share of the text that the characters in the vocabulary make up; rarer characters are
    unknown. n_seeds: the number of pieces to begin with. Raises ValueError if the words have more than
    n_pieces characters, or too few substrings.
    """
    # Cut the words into runs of one script, without rare characters.
    chars = required(words, coverage)
    if len(chars) > n_pieces:
        raise ValueError(f"{n_pieces} pieces are too few for {len(chars)} characters, beside special tokens")
    runs: Counter[str] = Counter()
    for word, n in words.items():
        for run in RUNS.findall(word):
            for part in regex.split(r"\0", "".join([char if char in chars else "\0" for char in run])):
                runs[part] += n
    del runs[""]
    if not runs:
        raise ValueError("the words have no characters; give texts that are not empty")

    # Go from many pieces to 1.1 n_pieces, or until pruning removes none.
    lattices = Lattices(runs, n_seeds, LONGEST_PIECE)
    log_p = np.log(lattices.covers / lattices.covers.sum())
    bar = progress_bar(desc="expectation maximisation", unit=" rounds", disable=not progress)
    while True:
        for _ in range(ROUNDS):
            log_p, likelihood = em_round(lattices, log_p)
            nats = likelihood / lattices.weights.sum()
            bar.set_postfix_str(f"{len(log_p):,} pieces, {nats:.4f} nats per word")
            bar.update()
        n_before = len(log_p)
        if n_before <= int(1.1 * n_pieces):
            break
        log_p = prune(lattices, log_p, int(1.1 * n_pieces))
        if len(log_p) == n_before:
            break
    bar.close()
    # All required characters, then the most probable of the other pieces. A required character that training
    # removed gets a log p below all others.
    found = dict(zip(lattices.pieces(), log_p.tolist(), strict=True))
    removed = sorted(chars - found.keys())
    pieces = {char: min(found.values()) - 1e-4 * i for i, char in enumerate(removed)}
    pieces |= {char: found[char] for char in chars & found.keys()}
    for piece in sorted(found.keys() - chars, key=found.__getitem__, reverse=True)[: n_pieces - len(pieces)]:
        pieces[piece] = found[piece]
    if len(pieces) < n_pieces:
        raise ValueError(f"the text has {len(pieces)} useful pieces, not {n_pieces}; ask for fewer")
    return sorted(pieces.items(), key=lambda item: (-item[1], item[0]))


# --- a tokenizer


def surroundings(lossless: bool) -> dict:
    """Return the normalizer, pre-tokenizer and decoder of a tokenizer.json for a learned vocabulary.

    lossless: keep every space and line break, as Gemma does. Otherwise text is prepared as T5's is: NFKC, and
    any whitespace is one space.
    """
    decoders: list[dict] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if lossless:
        one_word = {"Regex": f"{SPACE}*[^{SPACE}]+|{SPACE}+"}
        normal = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        cut = {"type": "Split", "pattern": one_word, "behavior": "Isolated", "invert": False}
    else:
        space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
        normal = {"type": "NFKC"}
        cut = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]}
        decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoder = {"type": "Sequence", "decoders": decoders}
    return {"normalizer": normal, "pre_tokenizer": cut, "decoder": decoder}


def train_unigram(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lossless: bool = True,
    byte_fallback: bool = False,
    progress: bool = False,
) -> dict:
    """Return the content of a tokenizer.json, with a unigram model learned from texts.

    vocab_size counts everything: <pad>, </s> and <unk> (ids 0, 1, 2), with byte_fallback 256 bytes, and the
    pieces. lossless: see `surroundings`. Raises ValueError as `learn_pieces`, and for texts without a word.
    """
    check_texts(texts)
    # Count the words.
    described = surroundings(lossless)
    normalize, cut = normalizer(described["normalizer"]), pre_tokenizer(described["pre_tokenizer"])
    words: Counter[str] = Counter()
    for text in progress_bar(texts, "counting words", unit=" texts", disable=not progress):
        words.update(cut([normalize(text)], True))
    del words[""]
    if not words:
        raise ValueError("no text to learn from; give texts that are not empty")

    # The model. The post-processor puts </s> behind a text, as in T5.
    first = [(name, 0.0) for name in (*SPECIAL, *(BYTE_PIECES if byte_fallback else ()))]
    learned = learn_pieces(words, vocab_size - len(first), progress=progress)
    ids = {name: i for i, name in enumerate(SPECIAL)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokenizer_json.added_tokens(ids),
        **described,
        "post_processor": tokenizer_json.template(ids, {}, ((), (SPECIAL[1],))),
        "model": {"type": "Unigram", "unk_id": 2, "vocab": first + learned, "byte_fallback": byte_fallback},
    }


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Learn a unigram model from text files and look at it.")
    add = parser.add_argument
    add("files", nargs="+", type=command.path, metavar="FILE", help="files of text, or of records")
    add("--text-field", default="text", metavar="NAME", help="the field with the text (default %(default)s)")
    add("--vocab-size", type=int, default=8000, help="pieces and special tokens (default %(default)s)")
    like_t5 = "NFKC, any whitespace is one space; without it, nothing is lost"
    add("--like-t5", action="store_true", help=like_t5)
    add("--byte-fallback", action="store_true", help="write unknown characters by 256 tokens for bytes")
    add("--out", type=command.path, metavar="DIR", help="save tokenizer.json here")
    args = parser.parse_args(argv)

    texts = documents([(str(path), path) for path in args.files], refuse, args.text_field)
    options = {"lossless": not args.like_t5, "byte_fallback": args.byte_fallback}
    file = train_unigram(texts, args.vocab_size, progress=sys.stderr.isatty(), **options)
    vocab = file["model"]["vocab"]
    scores = dict(vocab[len(SPECIAL) :])
    print(f"vocabulary size  {len(vocab)}")
    print(f"longest pieces   {' '.join(sorted(scores, key=len, reverse=True)[:12])}")

    # A word in several ways: the likelier, the more often.
    word, draw = f"{SPACE}tokenizers", random.Random(0)
    encode = best_pieces(file["model"], SPECIAL)
    print(f"best             {'|'.join(vocab[i][0] for i in encode(word))}")
    drawn = Counter("|".join(sample_pieces(word, scores, 0.2, draw)) for _ in range(100))
    for segmentation, n in drawn.most_common(4):
        print(f"{n:3} of 100       {segmentation}")
    if args.out:
        roles = {"pad_token": "<pad>", "unk_token": "<unk>"}
        pipeline_json.write(args.out, file, eot=SPECIAL[1], roles=roles)
        print(f"saved to         {args.out}")


if __name__ == "__main__":
    command.run(main)
