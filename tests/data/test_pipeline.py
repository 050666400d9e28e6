"""data/pipeline.py against Hugging Face's `tokenizers`, with the parts that published families have."""

import copy
import json
import shutil
import sys
import unicodedata
from pathlib import Path

import fuzz
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate
import train
from data import pipeline as module
from data.piece_decoders import decoder
from data.pipeline import Pipeline
from data.pre_tokenize import PRE_TOKENIZERS, pre_tokenizer
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from evaluation import perplexity
from generate import print_stream
from gpt import GPT
from gpt import Config as DecoderConfig
from language import beam_search
from language.t5 import SIZES, T5

library = pytest.importorskip("tokenizers")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
FAMILIES = sorted(path.parent.name for path in FIXTURES.glob("*/tokenizer.json"))
OLD = unicodedata.ucd_3_2_0
# Characters whose category has been the same since Unicode 3.2: newer ones depend on the age of the tables.
CATEGORIES = {chr(c): OLD.category(chr(c)) for c in range(0x110000)}
SETTLED = [
    c for c, kind in CATEGORIES.items() if kind not in ("Cn", "Cs") and kind == unicodedata.category(c)
]
USUAL = [char for char in SETTLED if ord(char) < 0x3200]
FRAGMENTS = [
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "▁", "▁▁", "\u0301", "e\u0301", "İ", "Σ", "ﬁ", "é")
]
FRAGMENTS += [
    *("hello", "import", " self", " the", "👩‍👩", "##", "12", "9,", "``", "''", "-", "don't", "\uff76\uff9e")
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(USUAL), st.sampled_from(SETTLED)), max_size=24
).map("".join)


FUZZ = fuzz.drawn(20)


@pytest.fixture(scope="module")
def ours() -> dict[str, Pipeline]:
    return {name: Pipeline.load(FIXTURES / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def theirs() -> dict:
    return {name: library.Tokenizer.from_file(str(FIXTURES / name / "tokenizer.json")) for name in FAMILIES}


def by_score(tokenizer: Pipeline, ids: list[int]) -> float:
    """Return the log-probability of ids, for a unigram model; an unknown character's is 0."""
    vocab = tokenizer.file["model"]["vocab"]
    return sum(vocab[i][1] for i in ids if i < len(vocab))


def agree(tokenizer: Pipeline, library_tokenizer, text: str) -> None:
    """Check the ids of a text, and the text of these ids.

    The library reads a score with an error in its last digit, which decides between segmentations that are
    equally probable: "aaa" is "a" and "aa", or "aa" and "a". These have the same ids in another order.
    """
    ids, expected = (
        tokenizer.encode(text, "all"),
        library_tokenizer.encode(text, add_special_tokens=False).ids,
    )
    if ids != expected:
        assert tokenizer.file["model"]["type"] == "Unigram" and sorted(ids) == sorted(expected), text
    assert tokenizer.decode(expected) == library_tokenizer.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize("name", FAMILIES)
@FUZZ
@given(st.data())
def test_ids_and_text_are_those_of_the_library_on_any_text(name, ours, theirs, data):
    # Names of special and other added tokens are in the text too. A byte's own name is spelled, not a byte.
    added = [token["content"] for token in ours[name].file["added_tokens"]]
    parts = data.draw(st.lists(st.one_of(TEXTS, st.sampled_from([*added[:6], *added[-4:]])), max_size=4))
    agree(ours[name], theirs[name], "".join(parts))


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_library_on_long_words_and_long_texts(name, ours, theirs):
    path = Path(module.__file__)
    for text in (
        "",
        " ",
        "x" * 3000,
        "ab" * 999,
        "中文" * 500,
        " " * 300 + "a",
        path.read_text(encoding="utf-8")[:5000],
    ):
        agree(ours[name], theirs[name], text)


def test_every_character_is_prepared_as_the_library_does(ours, theirs):
    chars = SETTLED[:: len(SETTLED) // 1000] + USUAL[::3]
    for i in range(0, len(chars), 2000):
        text = " ".join(f"a{char}b" for char in chars[i : i + 2000])
        for name in ("albert", "words", "deepseek-v3", "deberta-v2"):
            agree(ours[name], theirs[name], text)


@pytest.mark.parametrize(
    "behavior", ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
)
@pytest.mark.parametrize("invert", [False, True])
def test_a_split_does_with_its_matches_what_the_library_does(behavior, invert):
    snake = {"MergedWithPrevious": "merged_with_previous", "MergedWithNext": "merged_with_next"}
    expected = library.pre_tokenizers.Split(
        library.Regex(r"\d|-"), snake.get(behavior, behavior.lower()), invert=invert
    )
    part = {"type": "Split", "pattern": {"Regex": r"\d|-"}, "behavior": behavior, "invert": invert}
    for text in ("a1b22c", "12", "abc", "1a", "a1", "--a--1b", ""):
        words = [word for word in pre_tokenizer(part)([text], True) if word]
        assert words == [word for word, _ in expected.pre_tokenize_str(text)], text


@pytest.mark.parametrize("start, stop", [(1, 0), (0, 1), (2, 1), (0, 3)])
def test_the_decoder_strip_does_at_both_sides_what_the_library_does(start, stop):
    part = {"type": "Strip", "content": "a", "start": start, "stop": stop}
    for token in ("xa", "aax", "xaaaa", "aaxaa", "xa\n", "\naa", "a\na", "xaa\n\n"):
        assert decoder(part)([token]) == [library.decoders.Strip("a", start, stop).decode([token])], token


def test_special_tokens_only_when_allowed_and_other_added_tokens_always(ours):
    gemma = ours["gemma"]
    ids = {token["content"]: token["id"] for token in gemma.file["added_tokens"]}
    assert gemma.encode("<bos>a\n\nb").count(ids["\n\n"]) == 1
    assert ids["<bos>"] not in gemma.encode("<bos>a\n\nb")
    assert gemma.encode("<bos>a", "all")[0] == gemma.encode("<bos>a", {"<bos>"})[0] == ids["<bos>"]
    with pytest.raises(ValueError, match="no special token"):
        gemma.encode("x", {"<none>"})
    for name, tokenizer in ours.items():
        special = set(tokenizer.special_tokens.values()) - {tokenizer.roles.get("unk_token")}
        names = "".join(tokenizer.special_tokens)
        unknown = tokenizer.special_tokens.get(tokenizer.roles.get("unk_token"))
        assert not (set(tokenizer.encode(names)) & special) - {unknown}, name


def test_the_fastest_class_opens_a_directory():
    kinds = {name: type(get_tokenizer(str(FIXTURES / name))) for name in FAMILIES}
    assert kinds.pop("llama3") is kinds.pop("qwen2") is Tokenizer
    assert set(kinds.values()) == {Pipeline}
    assert type(get_tokenizer(str(FIXTURES.parent / "wordpiece" / "vocab.txt"))) is WordPiece
    for name in ("llama3", "qwen2"):  # both classes agree
        text = "In 2019: naïve \u0041\u030a 'don't'\r\n  x"
        assert Pipeline.load(FIXTURES / name).encode(text) == Tokenizer.load(FIXTURES / name).encode(text)


def test_roles_and_the_tokens_around_a_text_are_found(ours):
    assert (
        ours["roberta"].roles["cls_token"] == "<s>" and ours["roberta"].sep_id == 2
    )  # of its post-processor
    assert ours["roberta"].mask_id == ours["roberta"].n_vocab - 1
    assert ours["deberta"].roles["pad_token"] == "[PAD]" and ours["deberta"].cls_id == 1
    assert ours["albert"].eot == "[SEP]" and ours["t5"].eot == "</s>" and ours["gemma"].eot == "<eos>"
    assert [ours[name].begin_ids for name in ("llama2", "t5", "gemma")] == [[1], [], [2]]
    assert ours["t5"].special_tokens["<extra_id_0>"] == ours["t5"].n_vocab - 1  # descending, from the top
    assert ours["t5"].special_tokens["<extra_id_99>"] == ours["t5"].n_vocab - 100


@pytest.mark.parametrize("name", ["roberta", "llama2", "t5"])
def test_a_saved_tokenizer_is_the_same_here_and_in_the_library(name, ours, tmp_path):
    ours[name].save(tmp_path)
    again = get_tokenizer(str(tmp_path))
    assert again.fingerprint == ours[name].fingerprint and again.roles == ours[name].roles
    assert again.begin_ids == ours[name].begin_ids and again.eot_id == ours[name].eot_id
    transformers = pytest.importorskip("transformers")
    text = "  The naïve café\n costs 12 euros"
    their = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their.encode(text, add_special_tokens=False) == again.encode(text, "all")
    assert their.eos_token_id == again.eot_id


def test_added_roles_and_names_get_new_ids(ours, tmp_path):
    whole = ours["llama2"].with_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"}, ["<extra>"])
    n = ours["llama2"].n_vocab
    assert (whole.pad_id, whole.mask_id, whole.special_tokens["<extra>"]) == (n, n + 1, n + 2)
    assert whole.n_vocab == n + 3 and whole.fingerprint != ours["llama2"].fingerprint
    assert whole.encode("a <mask> b", "all") == [*whole.encode("a"), whole.mask_id, *whole.encode(" b")]
    assert ours["t5"].with_special_tokens({"pad_token": "<other>"}).pad_id == 0  # it has one
    whole.save(tmp_path)
    assert Pipeline.load(tmp_path).fingerprint == whole.fingerprint


def test_tokens_that_continue_a_word(ours):
    for name, word in (("llama2", " self.x"), ("t5", " self.x"), ("roberta", " self.x"), ("words", "self.x")):
        tokenizer = ours[name]
        ids = tokenizer.encode(word)
        continues = [bool(tokenizer.continues_word[i]) for i in ids]
        pieces = [tokenizer.pieces[i] for i in ids]
        begins = ["▁", "Ġ", ".", "x", "self"] if name == "words" else ["▁", "Ġ", "."]
        expected = [not piece.startswith(tuple(begins)) or piece == "x" for piece in pieces]
        if name == "words":
            expected = [piece.startswith("##") for piece in pieces]
        assert continues == expected, (name, pieces)
    assert not ours["llama2"].continues_word[ours["llama2"].eot_id]


def test_ids_beyond_the_vocabulary_and_half_characters_become_a_replacement_character(ours):
    for tokenizer in ours.values():
        assert "\ufffd" in tokenizer.decode([tokenizer.n_vocab + 5])
    half = ours["llama2"].vocab["<0xE2>"]
    assert ours["llama2"].decode([half]) == "\ufffd"
    assert ours["t5"].encode("\ud83d") == ours["t5"].encode("\ufffd")


def test_a_continued_text_has_the_space_of_its_first_word(ours, capsys):
    tokenizer = ours["llama2"]
    prompt, both = tokenizer.encode("import"), tokenizer.encode("import self")
    assert both[: len(prompt)] == prompt
    steps = [[token] for token in both[len(prompt) :]]
    assert print_stream(iter(steps), tokenizer, [], prompt) == " self"
    assert print_stream(iter(steps), tokenizer, []) == "self"  # a text of its own, such as an answer
    capsys.readouterr()


def test_a_directory_like_llama_2s_is_measured_continued_and_trained_further(tmp_path, capsys, monkeypatch):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    tokenizer = Pipeline.load(FIXTURES / "llama2")
    torch.manual_seed(0)
    GPT(DecoderConfig(1, 2, 16, 32, vocab_size=tokenizer.n_vocab, max_seq_len=32)).save_pretrained(model)
    for file in (FIXTURES / "llama2").iterdir():
        shutil.copy(file, model)
    text.write_text("The naïve self of 12 imports.\n" * 40, encoding="utf-8")

    perplexity.main([str(model), str(text)])
    assert (
        f"{1 + len(tokenizer.encode(text.read_text(encoding='utf-8'))) - 1:,} tokens"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(sys, "argv", ["gpt.py", str(model), "--prompt", "self", "--max-new-tokens", "3"])
    generate.main(GPT, {})
    assert capsys.readouterr().out.startswith("self")
    flags = (
        f"--model gpt --init-from {model} --data {text} --out {tmp_path / 'run'} --cache {tmp_path / 'cache'}"
    )
    assert (
        train.main(
            [*flags.split(), *["--steps", "2", "--seq-len", "16", "--batch-size", "2", "--device", "cpu"]]
        )
        == 0
    )
    assert get_tokenizer(str(tmp_path / "run" / "model")).fingerprint == tokenizer.fingerprint


def test_t5_trains_with_the_tokenizer_of_a_published_directory_and_fills_its_sentinels(tmp_path, capsys):
    text, folder = tmp_path / "text.txt", FIXTURES / "t5"
    text.write_text("The naïve self of 12 imports a new thing.\n" * 60, encoding="utf-8")
    flags = (
        f"--model t5 --tokenizer {folder} --data {text} --out {tmp_path / 'run'} --cache {tmp_path / 'cache'}"
    )
    flags += " --steps 2 --seq-len 16 --batch-size 2 --device cpu"
    assert train.main(flags.split()) == 0
    saved, published = get_tokenizer(str(tmp_path / "run" / "model")), Pipeline.load(folder)
    assert saved.special_tokens == published.special_tokens and saved.pad_id == 0  # nothing was added
    capsys.readouterr()
    model, ids = str(tmp_path / "run" / "model"), ["--text", "self<extra_id_0>", "--max-new-tokens", "2"]
    beam_search.main(T5, SIZES, [model, *ids])
    assert capsys.readouterr().out.startswith("self")


def changed(name: str, path: tuple, value) -> dict:
    """Return the content of a family's tokenizer.json with another value at a path."""
    file = json.loads((FIXTURES / name / "tokenizer.json").read_text())
    *above, key = path
    parent = file
    for step in above:
        parent = parent[step]
    parent[key] = value
    return file


MISTAKES = [
    ("t5", ("normalizer",), {"type": "Nmt"}, "normalizer 'Nmt' is not supported"),
    ("t5", ("pre_tokenizer",), {"type": "UnicodeScripts"}, "pre-tokenizer 'UnicodeScripts' is not supported"),
    ("t5", ("pre_tokenizer",), {"type": "Punctuation", "behavior": "x"}, "behavior 'x' is not supported"),
    ("t5", ("decoder",), {"type": "CTC"}, "decoder 'CTC' is not supported"),
    ("t5", ("post_processor",), {"type": "Other"}, "post-processor Other is not supported"),
    ("t5", ("model",), {"type": "WordLevel", "vocab": {}}, "model type WordLevel is not supported"),
    ("t5", ("model", "unk_id"), None, "unk_id None is no piece"),
    ("t5", ("model", "unk_id"), 10_000, "unk_id 10000 is no piece"),
    ("t5", ("model", "vocab", 7), ["▁", -1.0], "piece '▁' has two ids"),
    (
        "t5",
        ("model", "vocab", 7),
        ["new", float("nan")],
        "piece 'new' has score nan; expected a finite number",
    ),
    ("t5", ("model", "vocab", 7), ["", -1.0], "piece '' with id 7 is no text"),
    ("t5", ("model", "vocab", 7), [5, -1.0], "piece 5 with id 7 is no text"),
    ("t5", ("normalizer", "precompiled_charsmap"), "AAAA", "precompiled_charsmap is damaged"),
    ("t5", ("normalizer", "precompiled_charsmap"), "?", "precompiled_charsmap is not base64"),
    ("llama2", ("model", "unk_token"), "<none>", None),  # it has bytes
    ("deberta", ("model", "vocab", "é"), None, "piece 'é' has id None; expected a whole number"),
    ("llama2", ("model", "vocab", "▁"), 5, "have the same id 5"),
    ("llama2", ("model", "dropout"), 0.1, "BPE with dropout = 0.1 is not supported"),
    ("llama2", ("model", "merges", 0), ["▁", "nowhere"], "'nowhere' is not in the vocabulary"),
    ("t5", ("added_tokens", 5, "id"), 400, "has id 400, which in the vocabulary is"),
    ("words", ("model", "unk_token"), "<none>", "unk_token '<none>' is not in the vocabulary"),
    (
        "deepseek-v3",
        ("pre_tokenizer", "pretokenizers", 0, "pattern"),
        {"Regex": "("},
        "not a regular expression",
    ),
]


@pytest.mark.parametrize("name, path, value, words", MISTAKES)
def test_what_is_missing_or_damaged_is_named_in_one_line(name, path, value, words, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "model")
    file = changed(name, path, copy.deepcopy(value))
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(file))
    if words is None:
        get_tokenizer(str(tmp_path / "model"))
        return
    with pytest.raises(ValueError) as raised:
        get_tokenizer(str(tmp_path / "model"))
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / "model") in str(raised.value)


def test_a_bpe_without_any_token_for_the_unknown_is_refused(tmp_path):
    file = changed("llama2", ("model", "unk_token"), None)
    file["model"]["byte_fallback"] = False
    with pytest.raises(ValueError, match="unk_token None is not in the vocabulary"):
        Pipeline(file, "</s>", {})


def test_a_metaspace_of_an_older_file_has_no_setting_split(tmp_path):
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    newer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    files = [changed("llama2", ("pre_tokenizer",), part) | {"normalizer": None} for part in (older, newer)]
    ids = [Pipeline(file, "</s>", {}).encode("def self (x):  y") for file in files]
    assert ids[0] == ids[1]


def test_the_command_shows_tokens_and_ids(capsys):
    module.main([str(FIXTURES / "t5"), "self<extra_id_0>"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[0].startswith("▁") and shown[0].endswith("<extra_id_0>")
    assert shown[1].split()[-1] == str(Pipeline.load(FIXTURES / "t5").n_vocab - 1)


def test_all_pre_tokenizers_of_the_table_are_tested(ours):
    used = {
        part["type"]
        for t in ours.values()
        for part in module.parts_of(t.file["pre_tokenizer"], "pretokenizers")
    }
    assert set(PRE_TOKENIZERS) - used <= {"Sequence", "BertPreTokenizer"}
