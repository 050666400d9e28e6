"""data/tokenizer.py against a naive trainer, and on text that is hard to cut."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import tokenizer as module
from data.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer, train_bpe
from data.words import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, TIKTOKEN_PATTERNS, continues
from formats.tokenizer_json import recover_merges

REAL_TEXT = Path(json.__file__).read_text(encoding="utf-8")
PROSE = "the cat sat on the mat; that's the cat's mat, isn't it? naïve café, 中文字符, 2024 and 1999!\n" * 4

STRESS = [
    "",
    " ",
    "a\n  ",
    "a  \n",
    "a\n\n \n  b",
    "\r\n\r\n x\r",
    "\t\tdef f(x):\n\t\treturn  x**2  # squared\n\n\n",
    "IT'S it's we'LL 're ''s 'ſ",
    "1234567 12 ٣٤٥ ½ Ⅷ 3.14e-10",
    "中文字符和日本語テキスト 한국어 العربية हिन्दी ไทย",
    "e\u0301 é \u212b Å ﬁ ŉ ß İ",
    "👩‍👩‍👧‍👦 🇩🇪 😀😀 ☃️ 𝔘𝔫𝔦",
    "\x00\x01\x7f\x85\x1c\x1f",
    " \u00a0\u2003\u3000\u2028 x\u200b\u200dy\ufeff",
    f"{END_OF_TEXT} <|endoftext {END_OF_TEXT}{END_OF_TEXT}",
    "camelCaseWordsHTTPServer snake_case-and-more/path/to",
    " " * 70 + "x" + "\n" * 40 + "=" * 90 + "a" * 700,
]


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_bpe([REAL_TEXT, PROSE], 700)


def naive_merges(texts: list[str], vocab_size: int, pattern: str = GPT4_PATTERN) -> list[tuple[bytes, bytes]]:
    """BPE as defined: recount every pair of the whole corpus for each merge."""
    words = Counter(word for text in texts for word in regex.findall(pattern, text))
    corpus = [([bytes([byte]) for byte in word.encode()], count) for word, count in words.items()]
    ids = {bytes([byte]): byte for byte in range(256)}
    merges = []

    while len(ids) < vocab_size - 1:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in corpus:
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        if pairs[best] < 2:
            break

        merges.append(best)
        ids[best[0] + best[1]] = len(ids)
        for parts, _ in corpus:
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab c", max_size=60), max_size=6), st.integers(257, 300))
@example(["aaaaa aaaa aaa", "abababa bababab aab"], 290)
def test_training_equals_the_naive_trainer(texts, vocab_size):
    expected = naive_merges(texts, vocab_size)
    tokenizer = train_bpe(texts, vocab_size)
    assert recover_merges(tokenizer.ranks) == expected
    # No two merges may make the same bytes: the vocabulary would be short of one token.
    assert tokenizer.n_vocab == 257 + len(expected) == len(tokenizer.ranks) + 1


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN, r"[\s\S]+"])
def test_training_equals_the_naive_trainer_on_real_text(pattern):
    texts = [REAL_TEXT[:6000], PROSE]
    assert recover_merges(train_bpe(texts, 400, pattern=pattern).ranks) == naive_merges(texts, 400, pattern)


def test_training_does_not_depend_on_the_order_of_texts(learned):
    lines = [*REAL_TEXT.splitlines(keepends=True), *PROSE.splitlines(keepends=True)]
    first = train_bpe(lines, 400)
    random.Random(0).shuffle(lines)
    assert train_bpe(iter(lines), 400).fingerprint == first.fingerprint
    assert train_bpe([REAL_TEXT, PROSE], 700).fingerprint == learned.fingerprint


def test_vocabulary_sizes(learned):
    assert learned.n_vocab == 700 and learned.eot_id == 699
    assert train_bpe([], 1000).n_vocab == 257
    assert train_bpe(["abab"], 257).n_vocab == 257
    # "ab" occurs twice, "abab" once: one merge, then nothing is left that repeats.
    assert train_bpe(["abab"], 1000).n_vocab == 258


def test_training_survives_lone_surrogates():
    assert train_bpe(["x\ud83d x\ud83d"], 300).n_vocab >= 257


def test_learning_compresses(learned):
    assert len(learned.encode(REAL_TEXT)) < 0.5 * len(REAL_TEXT.encode())


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(learned, text):
    assert learned.decode(learned.encode(text)) == text
    assert learned.decode(learned.encode(text, "all")) == text


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN])
def test_round_trip_of_awkward_text(pattern):
    for tokenizer in (get_tokenizer("bytes"), train_bpe([REAL_TEXT, PROSE], 500, pattern=pattern)):
        for text in STRESS:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN])
def test_a_million_spaces_do_not_panic(pattern):
    tokenizer = train_bpe([" " * 64 + "a"] * 2, 300, pattern=pattern)
    text = "a" + " " * 1_200_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ordinary = "def f():\n    return 0\n" * 20_000  # long, but without long runs: not cut anywhere
    assert tokenizer.encode(ordinary) == tokenizer.encoding.encode_ordinary(ordinary)


def test_batches_equal_single_texts(learned):
    for n_threads in (1, 3):
        assert learned.encode_batch(STRESS, n_threads) == [learned.encode(text) for text in STRESS]


def test_special_tokens_only_when_allowed(learned):
    text = f"a{END_OF_TEXT}b"
    assert learned.eot_id not in learned.encode(text)
    assert learned.eot_id not in learned.encode_batch([text], 1)[0]
    expected = [*learned.encode("a"), learned.eot_id, *learned.encode("b")]
    assert learned.encode(text, "all") == learned.encode(text, {END_OF_TEXT}) == expected
    assert learned.decode(expected) == text
    with pytest.raises(ValueError, match=r"no special token '\[MASK\]'"):
        learned.encode(text, {"[MASK]"})


def test_decode_never_fails(learned):
    tokens = [*learned.encode("a"), learned.n_vocab, -1, 2**40, *learned.encode("b"), 0xE4]
    assert learned.decode(tokens) == "a\ufffd\ufffd\ufffdb\ufffd"
    assert learned.decode([]) == ""
    assert learned.encode("\ud83d") == learned.encode("\ufffd")


def test_decode_takes_tensors(learned):
    assert learned.decode(torch.tensor(learned.encode("Hello"))) == "Hello"


def test_nfc_composes_before_encoding(learned):
    composing = Tokenizer(learned.ranks, GPT4_PATTERN, learned.special_tokens, nfc=True)
    assert composing.encode("e\u0301") == learned.encode("é") != learned.encode("e\u0301")
    assert composing.fingerprint != learned.fingerprint


def test_fingerprint_names_the_content(learned):
    backwards = dict(reversed(learned.ranks.items()))
    assert Tokenizer(backwards, learned.pattern, learned.special_tokens).fingerprint == learned.fingerprint
    assert Tokenizer(backwards, GPT2_PATTERN, learned.special_tokens).fingerprint != learned.fingerprint
    assert Tokenizer(backwards, learned.pattern, {END_OF_TEXT: 999}).fingerprint != learned.fingerprint


ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}


def test_special_tokens_for_an_encoder(learned):
    whole = learned.with_special_tokens(ROLES)
    assert (learned.n_vocab, whole.n_vocab, whole.eot_id) == (700, 704, 699)
    assert [whole.cls_id, whole.sep_id, whole.mask_id, whole.pad_id] == [700, 701, 702, 703]
    assert whole.encode(REAL_TEXT) == learned.encode(REAL_TEXT)
    assert whole.encode("a[MASK]b", {"[MASK]"}) == [*whole.encode("a"), 702, *whole.encode("b")]
    assert whole.fingerprint != learned.fingerprint

    # What is there already stays: the token of a role, the id of a name.
    again = whole.with_special_tokens({"mask_token": "<mask>", "bos_token": END_OF_TEXT})
    assert (again.mask_id, again.n_vocab, again.fingerprint) == (702, 704, whole.fingerprint)
    assert again.roles == ROLES | {"bos_token": END_OF_TEXT}
    assert learned.with_special_tokens({}).fingerprint == learned.fingerprint

    with pytest.raises(ValueError, match=r"this tokenizer has no mask token \(\[MASK\]\); use an encoder's"):
        _ = learned.mask_id
    with pytest.raises(ValueError, match=r"no role 'mask'; there are cls_token, "):
        learned.with_special_tokens({"mask": "[MASK]"})
    with pytest.raises(ValueError, match="'a' is empty or also an ordinary token"):
        learned.with_special_tokens({"mask_token": "a"})


def test_a_mask_that_takes_the_space_before_it(learned):
    greedy = learned.with_special_tokens(ROLES)
    code = [*learned.encode("import"), greedy.mask_id, *learned.encode(" as np")]
    assert greedy.encode("import [MASK] as np", allowed_special={"[MASK]"}) == code

    # A mask token that is there already keeps its ways.
    whole = Tokenizer(learned.ranks, GPT4_PATTERN, greedy.special_tokens)
    whole = whole.with_special_tokens(ROLES).with_special_tokens(ROLES)
    assert greedy.mask_lstrip and not whole.mask_lstrip and not learned.with_special_tokens({}).mask_lstrip
    assert greedy.encode("a \u3000\n\x85[MASK] b", "all") == whole.encode("a[MASK] b", "all")
    assert greedy.encode("a [CLS] [MASK] [MASK]", "all") == whole.encode("a [CLS][MASK][MASK]", "all")
    assert greedy.encode("a [MASK] b") == learned.encode("a [MASK] b")
    assert greedy.encode("a\x1c[MASK]", "all") == whole.encode("a\x1c[MASK]", "all")
    assert greedy.fingerprint != whole.fingerprint


def test_of_overlapping_special_tokens_the_longest_counts():
    specials = {END_OF_TEXT: 256, "<a>": 257, "<a><b>": 258, "<b>": 259, "  ": 260, "    ": 261}
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)}, GPT4_PATTERN, specials)
    assert tokenizer.encode("<a><b><a><a>", "all") == [258, 257, 257]
    # Spaces are no message of their own: they are found in every text, as Hugging Face does.
    assert (
        tokenizer.encode(" " * 7 + "x") == tokenizer.encode(" " * 7 + "x", "all") == [261, 260, 32, ord("x")]
    )


def test_tokens_that_continue_a_word(learned):
    whole = learned.with_special_tokens(ROLES)
    flags = whole.continues_word
    assert flags.shape == (704,) and flags.dtype == bool and not flags[699:].any()
    words: list[list[int]] = [[]]
    for token in whole.encode("the naïve_cat's 中文 mat; 2024."):
        words += [] if flags[token] else [[]]
        words[-1].append(token)
    expected = ["the", " naïve_cat", "'s", " 中文", " mat", ";", " 2024", "."]
    assert [whole.decode(word) for word in words] == expected

    assert [continues(c.encode()) for c in "aé9_ـ\u0301中"] == [True] * 7
    assert [continues(c.encode()) for c in " \n.-$😀—\u00a0"] == [False] * 8
    # Parts of characters: ï, its second byte, я's first; the first bytes of an emoji, a dash and a §.
    parts = [b"\xaf", b"\xd1", b"\xe4\xb8", b"\xd1a", b"\xf0\x9f", b"\xe2\x80", b"\xc2"]
    assert [continues(part) for part in parts] == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roles": {"mask_token": "[MASK]"}}, "mask_token '[MASK]' is no special token; there are 1"),
        ({"roles": {"mask": END_OF_TEXT}}, "no role 'mask'"),
        ({"mask_lstrip": True}, "no mask token"),
        ({"ranks": {b"a": 0}}, "lacks 242 of UTF-8's 243 bytes"),
        ({"special_tokens": {}}, "end-of-text token '<|endoftext|>'"),
        ({"special_tokens": {END_OF_TEXT: 5}}, "ids must differ"),
        ({"special_tokens": {END_OF_TEXT: -1}}, "fit 32 bits"),
        ({"special_tokens": {END_OF_TEXT: 256, "a": 257}}, "'a' is empty or also an ordinary token"),
        ({"eot": "</s>"}, "end-of-text token '</s>'"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": r"\p{L}+|\s+"}, "leaves out some characters"),
        ({"pattern": r"\p{N}{1,3}+|[\s\S]"}, "differs by engine"),
    ],
)
def test_impossible_tokenizers(arguments, message):
    good = {
        "ranks": {bytes([byte]): byte for byte in range(256)},
        "pattern": GPT4_PATTERN,
        "special_tokens": {END_OF_TEXT: 256},
    }
    with pytest.raises(ValueError, match=regex.escape(message)):
        Tokenizer(**good | arguments)


def test_training_mistakes():
    with pytest.raises(ValueError, match="vocabulary size 256 is too small"):
        train_bpe(["text"], 256)
    with pytest.raises(ValueError, match="not a regular expression"):
        train_bpe(["text"], 300, pattern="(")
    with pytest.raises(TypeError, match="got one string"):
        train_bpe("text", 300)


def test_unknown_names():
    for name in ("gpt5", "bpe:4096"):
        with pytest.raises(ValueError, match=f"tokenizer '{name}'.*'bytes'.*bpe:4096.*gpt2.*directory"):
            get_tokenizer(name)


def test_failed_download_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="cannot download 'cl100k_base'"):
        get_tokenizer("cl100k_base")


SHIPPED = {  # the possessive patterns that tiktoken ships
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_tiktoken_encodings_take_the_portable_pattern(name, learned, monkeypatch, tmp_path):
    # Stands in for a downloaded encoding. Whitespace with line breaks is a token of its own.
    spaces = [b"\n  ", b" \n\n", b"\r\n\r\n "]
    ranks = learned.ranks | {token: 1000 + i for i, token in enumerate(spaces)}
    options = {"mergeable_ranks": ranks, "special_tokens": learned.special_tokens}
    published = tiktoken.Encoding(name, pat_str=SHIPPED[name], **options)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: published)
    tokenizer = get_tokenizer(name)
    assert tokenizer.pattern == TIKTOKEN_PATTERNS[name]
    for text in [*STRESS, REAL_TEXT, "a\n  ", "a \n\n", "a\r\n\r\n ", "\n  b"]:
        assert tokenizer.encode(text) == published.encode_ordinary(text)

    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*STRESS, "a\n  ", "\n  b"]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, "all")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.tokenizer", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)


def test_command_line(tmp_path):
    result = run(json.__file__, "--vocab-size", "400", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "vocabulary size  400" in result.stdout and "bytes per token" in result.stdout
    assert Tokenizer.load(tmp_path / "out").fingerprint == train_bpe([REAL_TEXT], 400).fingerprint


def test_command_line_mistakes(tmp_path):
    (tmp_path / "empty.txt").touch()
    mistakes = [[str(tmp_path / "none.txt")], [str(tmp_path / "empty.txt")], [__file__, "--vocab-size", "9"]]
    for arguments in mistakes:
        result = run(*arguments)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_vocabulary_that_is_too_small_is_refused_before_any_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="vocabulary size 9 is too small"):
        module.main([str(tmp_path / "none.txt"), "--vocab-size", "9"])


def test_a_tokenizer_learns_from_the_files_that_a_run_reads_and_refuses_the_others(tmp_path, capsys):
    texts = ["one two two", "two one one"] * 30
    (tmp_path / "x.csv").write_text("id,body\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    module.main(
        [str(tmp_path / "x.csv"), "--text-field", "body", "--vocab-size", "262", "--out", str(tmp_path)]
    )
    assert "vocabulary size  262" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path).fingerprint == train_bpe(texts, 262).fingerprint
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    with pytest.raises(ValueError, match=r"latin\.txt: byte 3 \(0xe9\) is not UTF-8"):
        module.main([str(tmp_path / "latin.txt")])
    with pytest.raises(ValueError, match="no field 'text', it has 'id', 'body'"):
        module.main([str(tmp_path / "x.csv")])
