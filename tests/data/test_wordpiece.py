"""data/wordpiece.py and formats/wordpiece_json.py against BertTokenizer.

Its ids for fixtures/wordpiece, those of the library for any text, and the files of both.
"""

import json
import pickle
import runpy
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import wordpiece as module
from data.pipeline import Pipeline
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece

FIXTURE = Path(__file__).parents[1] / "fixtures" / "wordpiece"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
TEXTS = EXPECTED["texts"]
SETTINGS = {
    "uncased": {"lowercase": True},
    "cased": {"lowercase": False},
    "uncased, accents kept": {"lowercase": True, "strip_accents": False},
    "cased, accents stripped": {"lowercase": False, "strip_accents": True},
    "uncased, Chinese unspaced": {"lowercase": True, "chinese_chars": False},
}

# Characters whose category has been the same since Unicode 3.2: newer ones depend on the age of the tables.
OLD = unicodedata.ucd_3_2_0
CATEGORIES = {
    chr(c): OLD.category(chr(c)) for c in range(0x110000) if OLD.category(chr(c)) not in ("Cn", "Cs")
}
SETTLED = [char for char, category in CATEGORIES.items() if category == unicodedata.category(char)]
FRAGMENTS = ["[MASK]", "[SEP]", *" \u0301İΣ각中\u00ad\x85$", "hello", "llow", "👩‍👩", "##"]


@pytest.fixture(scope="module")
def vocab() -> dict[str, int]:
    return WordPiece.load(FIXTURE).vocab


@pytest.fixture(scope="module")
def variants(vocab) -> dict[str, WordPiece]:
    return {name: WordPiece(vocab, **setting) for name, setting in SETTINGS.items()}


@pytest.fixture(scope="module")
def theirs(variants, tmp_path_factory) -> dict:
    """The Rust library, reading what is saved here."""
    library = pytest.importorskip("tokenizers")
    made = {}
    for name, tokenizer in variants.items():
        directory = tmp_path_factory.mktemp("saved")
        tokenizer.save(directory)
        made[name] = library.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_bert_tokenizer(variants, name):
    for text, ids in zip(TEXTS, EXPECTED[name], strict=True):
        assert variants[name].encode(text, "all") == ids, text


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(SETTINGS)),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(SETTLED)), max_size=30).map("".join),
)
def test_ids_are_those_of_the_library_on_any_text(variants, theirs, name, text):
    ids = theirs[name].encode(text, add_special_tokens=False).ids
    assert variants[name].encode(text, "all") == ids
    assert variants[name].decode(ids) == theirs[name].decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_each_character_is_prepared_as_the_library_does(variants, theirs, name):
    tokenizer, library = variants[name], theirs[name]
    chars = [char for char in SETTLED if CATEGORIES[char] not in ("Co", "Lo")]  # many, and all alike
    chars += SETTLED[:: len(SETTLED) // 5000]
    for i in range(0, len(chars), 1000):
        text = " ".join(f"a{char}b {char}" for char in chars[i : i + 1000])
        expected = library.pre_tokenizer.pre_tokenize_str(library.normalizer.normalize_str(text))
        ours = text.translate(tokenizer.cleaned)
        ours = unicodedata.normalize("NFD", ours) if tokenizer.strips else ours
        assert ours.translate(tokenizer.folded).split() == [word for word, _ in expected]


def pieces(tokenizer: WordPiece, text: str, allowed: str | frozenset = frozenset()) -> str:
    return " ".join(tokenizer.pieces[i] for i in tokenizer.encode(text, allowed))


def test_longest_match_from_the_left():
    words = ["[UNK]", "[SEP]", "un", "una", "##ff", "##able", "##f", "able", "!"]
    tokenizer = WordPiece({word: i for i, word in enumerate(words)})
    assert pieces(tokenizer, "Unaffable able!") == "una ##ff ##able able !"
    assert pieces(tokenizer, "unxable unff f") == "[UNK] un ##ff [UNK]"  # "f" only within a word
    assert pieces(tokenizer, "un" + "f" * 98) == "un" + " ##ff" * 49
    assert pieces(tokenizer, "un" + "f" * 99) == "[UNK]"  # 101 characters
    assert tokenizer.encode("\ud83dun\udc00") == tokenizer.encode("un")  # half characters are rubbish


def test_special_tokens_only_when_allowed(variants):
    tokenizer = variants["uncased"]
    text = "a[MASK]b [SEP]"
    assert not {tokenizer.mask_id, tokenizer.sep_id} & set(tokenizer.encode(text))
    assert pieces(tokenizer, text, "all") == "a [MASK] b [SEP]"
    only_mask = tokenizer.encode(text, {"[MASK]"})
    assert tokenizer.mask_id in only_mask and tokenizer.sep_id not in only_mask
    with pytest.raises(ValueError, match="no special token '<mask>'; there are 5, such as"):
        tokenizer.encode(text, {"<mask>"})


def test_interface_of_a_tokenizer(variants, vocab):
    tokenizer = variants["uncased"]
    assert tokenizer.n_vocab == len(vocab) == len(tokenizer.continues_word)
    assert tokenizer.eot_id == tokenizer.sep_id == vocab["[SEP]"]
    names = ["[CLS]", "[MASK]", "[PAD]"]
    assert [tokenizer.cls_id, tokenizer.mask_id, tokenizer.pad_id] == [vocab[name] for name in names]
    assert tokenizer.encode_batch(TEXTS, 3) == [tokenizer.encode(text) for text in TEXTS]
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])

    assert tokenizer.continues_word.dtype == bool
    continuing = [piece for piece, i in vocab.items() if tokenizer.continues_word[i]]
    assert continuing == [piece for piece in vocab if piece.startswith("##")]

    ids = [vocab["hello"], vocab["##ing"], tokenizer.sep_id, -1, 10**9]
    assert tokenizer.decode(np.array(ids)) == "helloing [SEP] \ufffd \ufffd"
    assert tokenizer.decode([vocab["##ing"]]) == "##ing" and tokenizer.decode([]) == ""


def test_the_cache_of_words_is_bounded(variants, monkeypatch):
    monkeypatch.setattr(module, "CACHED_WORDS", 5)
    tokenizer = WordPiece(variants["cased"].vocab, lowercase=False)
    for text, ids in zip(TEXTS, EXPECTED["cased"], strict=True):
        assert tokenizer.encode(text, "all") == ids and len(tokenizer.words) <= 5


def test_fingerprint_names_what_decides_the_ids(vocab, variants):
    assert len({tokenizer.fingerprint for tokenizer in variants.values()}) == len(SETTINGS)
    same = WordPiece(dict(reversed(vocab.items())), strip_accents=True)  # which is what None means here
    assert same.fingerprint == variants["uncased"].fingerprint
    assert WordPiece(vocab | {"new": 9999}).fingerprint != same.fingerprint


@pytest.mark.parametrize("name", SETTINGS)
def test_load_gives_back_what_was_saved(variants, tmp_path, name):
    tokenizer = variants[name]
    tokenizer.save(tmp_path)
    found = [get_tokenizer(str(tmp_path)), get_tokenizer(str(tmp_path / "tokenizer.json"))]
    (tmp_path / "tokenizer.json").unlink()
    found += [get_tokenizer(str(tmp_path)), WordPiece.load(tmp_path / "vocab.txt")]
    assert all((t.fingerprint, t.roles) == (tokenizer.fingerprint, tokenizer.roles) for t in found)


@pytest.mark.parametrize("model_type", [None, "bert", "electra", "distilbert", "modernbert"])
def test_auto_tokenizer_gives_the_same_ids(variants, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    tokenizer = variants["cased" if model_type == "electra" else "uncased"]
    tokenizer.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert len(theirs) == tokenizer.n_vocab
    assert (theirs.mask_token_id, theirs.pad_token_id) == (tokenizer.mask_id, tokenizer.pad_id)
    for text in TEXTS:
        ids = tokenizer.encode(text, "all")
        assert theirs(text)["input_ids"] == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    theirs.save_pretrained(tmp_path / "again")
    assert WordPiece.load(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_roles_that_a_vocabulary_lacks_are_added_behind_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = WordPiece(
        {"[UNK]": 0, "</s>": 1, "a": 2, "[PAD]": 3}, roles={"unk_token": "[UNK]", "sep_token": "</s>"}
    )
    with pytest.raises(ValueError, match=r"this tokenizer has no mask token \(\[MASK\]\); use"):
        _ = small.mask_id
    whole = small.with_special_tokens(module.BERT_ROLES)
    assert (whole.sep_id, whole.pad_id, whole.cls_id, whole.mask_id, whole.n_vocab) == (1, 3, 4, 5, 6)
    whole.save(tmp_path)
    assert WordPiece.load(tmp_path).fingerprint == whole.fingerprint
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a[MASK]</s>")["input_ids"]
    assert ids == [whole.cls_id, *whole.encode("a[MASK]</s>", "all"), whole.sep_id]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": {}}, "no unk token"),
        ({"vocab": {"[UNK]": 0}}, "no sep token"),
        ({"vocab": {"[UNK]": 0, "[SEP]": 0}}, "must be whole numbers, differ"),
        ({"vocab": {"[UNK]": 0, "[SEP]": 1.5}}, "must be whole numbers"),
        ({"vocab": {"[UNK]": 0, "[SEP]": -1}}, "fit 32 bits"),
        ({"special_tokens": {"[UNK]": 0, "[SEP]": 7}}, "'[SEP]' has two ids, 1 and 7"),
        ({"roles": {"unk_token": "[UNK]", "sep_token": "</s>"}}, "sep_token '</s>' is no special token"),
        ({"roles": {"unk_token": "[UNK]", "sep": "[SEP]"}}, "no role 'sep'; there are cls_token"),
    ],
)
def test_impossible_vocabularies(arguments, message):
    with pytest.raises(ValueError) as raised:
        WordPiece(**{"vocab": {"[UNK]": 0, "[SEP]": 1}} | arguments)
    assert message in str(raised.value)


def put(*keys: str | int, value):
    """An edit of a JSON object: one value, at the end of some keys."""

    def edit(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
NOT_SPECIAL = [{"id": 600, "content": "new", "single_word": False, "normalized": True, "special": False}]
FOUND = [NOT_SPECIAL[0] | {"normalized": False}]  # in any text, by data/pipeline.py


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("tokenizer", put("model", value=BPE), "type = BPE"),
        (
            "tokenizer",
            put("model", "continuing_subword_prefix", value="@@"),
            "continuing_subword_prefix = @@",
        ),
        ("tokenizer", put("model", "max_input_chars_per_word", value=200), "max_input_chars_per_word = 200"),
        ("tokenizer", put("model", "vocab", "a", value="7"), "must be whole numbers"),
        ("tokenizer", put("model", "unk_token", value="<unk>"), "not a complete tokenizer.json .*<unk>"),
        ("tokenizer", put("normalizer", value=None), "normalizer with type = None"),
        ("tokenizer", put("normalizer", value={"type": "Lowercase"}), "normalizer with type = Lowercase"),
        ("tokenizer", put("normalizer", "clean_text", value=False), "clean_text = False"),
        ("tokenizer", put("pre_tokenizer", value={"type": "Whitespace"}), "pre-tokenizer .*Whitespace"),
        ("tokenizer", put("added_tokens", value=NOT_SPECIAL), "special token 'new' with normalized = True"),
        ("tokenizer", put("added_tokens", value=FOUND), "added token 'new' with special = False is not supp"),
        (
            "tokenizer",
            put("added_tokens", 0, "content", value=5),
            "not a complete tokenizer.json .*5 is not a string",
        ),
        ("tokenizer_config", put("do_lower_case", value=False), "lowercase is True, but .* says False"),
        ("tokenizer_config", put("strip_accents", value=False), "strip_accents is None, but .* says False"),
        ("tokenizer", lambda content: content.clear(), "not a complete tokenizer.json"),
    ],
)
def test_load_refuses_what_it_would_do_differently(variants, tmp_path, file, edit, message):
    variants["uncased"].save(tmp_path)
    path = tmp_path / f"{file}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        WordPiece.load(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class BertJapaneseTokenizer"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize = False"),
        ({"never_split": ["a"]}, "never_split"),
        ({"do_lower_case": "false"}, "do_lower_case = false is not supported; expected True"),
        ({"sep_token": "</s>", "unk_token": "<unk>"}, None),  # tokens it lacks: BERT's names are there
        ({"do_lower_case": False, "tokenizer_class": "BertTokenizerFast", "never_split": None}, None),
    ],
)
def test_vocab_txt_with_settings(tmp_path, config, message):
    shutil.copy(FIXTURE / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if message is None:
        name = "uncased" if config.get("do_lower_case", True) else "cased"
        assert [WordPiece.load(tmp_path).encode(text, "all") for text in TEXTS] == EXPECTED[name]
        return
    with pytest.raises(ValueError, match=message):
        get_tokenizer(str(tmp_path))


def test_files_of_older_and_newer_kinds(variants, tmp_path):
    tokenizer = variants["uncased"]
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["type"]  # DistilBERT's file is that old
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0}
    for token in content["added_tokens"]:
        token["lstrip"] = True  # without effect, where spaces are dropped
    path.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    found = get_tokenizer(str(tmp_path))
    assert (found.fingerprint, found.roles) == (tokenizer.fingerprint, tokenizer.roles)


def test_damaged_and_missing_files(tmp_path):
    for name in ("tokenizer.json", "vocab.txt"):
        with pytest.raises(ValueError, match="no such file"):
            WordPiece.load(tmp_path / name)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        get_tokenizer(str(tmp_path))
    for damaged in ("", "[]", "null", "{}", '{"model": 5}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            get_tokenizer(str(tmp_path))
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            WordPiece.load(tmp_path)


def test_byte_level_bpe_is_still_read_as_such(tmp_path):
    get_tokenizer("bytes").save(tmp_path)
    assert isinstance(get_tokenizer(str(tmp_path)), Tokenizer)


def test_one_string_in_the_place_of_texts_is_refused():
    with pytest.raises(TypeError, match="got one string; put it in a list"):
        module.train_wordpiece("ab ab", 20)


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data/wordpiece.py", str(FIXTURE), "Hello[MASK]"])
    module.main()
    assert capsys.readouterr().out.splitlines()[0] == "hello [MASK]"

    monkeypatch.setattr(sys, "argv", ["data/wordpiece.py", "nowhere", "x"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(module.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_all_tokenizers_have_the_methods_of_the_byte_level_one():
    methods = {name for name in dir(Tokenizer) if not name.startswith("_")}
    assert methods >= {"begin_ids", "encode", "decode", "save"}
    assert methods <= set(dir(WordPiece)) and methods <= set(dir(Pipeline))
