"""formats/tokenizer_json.py against Hugging Face's own reading of the files it writes."""

import hashlib
import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pipeline import Pipeline
from data.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer, train_bpe
from data.words import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN
from formats.tokenizer_json import BYTE_TO_CHAR, read, recover_merges, to_bytes, to_text, write

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

# Characters of Unicode 3.2 only: what a newly assigned letter is depends on the age of each engine's tables.
CHARACTERS = [chr(c) for c in range(0x30000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs")]
SPLITTING = list("aZ09 é中'sS.,_\n\r\t\u00a0\u0301😀<|>")
SETTLED_TEXT = st.text(st.one_of(st.sampled_from(SPLITTING), st.sampled_from(CHARACTERS)), max_size=40)


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_bpe([REAL_TEXT, PROSE], 700)


@pytest.fixture(scope="module")
def variants(learned, tmp_path_factory) -> dict[str, tuple[Tokenizer, Path]]:
    """Tokenizers with each split pattern, saved."""
    made = {
        "learned": learned,
        "bytes": get_tokenizer("bytes"),
        "gpt2": train_bpe([REAL_TEXT, PROSE], 500, pattern=GPT2_PATTERN),
        "o200k": train_bpe([REAL_TEXT, PROSE], 500, pattern=O200K_PATTERN),
    }
    directories = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, tokenizer in made.items():
        tokenizer.save(directories[name])
    return {name: (tokenizer, directories[name]) for name, tokenizer in made.items()}


def test_byte_alphabet_is_that_of_gpt2():
    assert to_text(b" \n\x00~\xad") == "ĠĊĀ~Ń"
    assert to_bytes(to_text(bytes(range(256)))) == bytes(range(256))
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    assert sorted(BYTE_TO_CHAR.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_merges_are_recovered_from_ranks():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" t": 256, b"he": 257, b" the": 258}
    assert recover_merges(ranks) == [(b" ", b"t"), (b"h", b"e"), (b" t", b"he")]


def test_read_gives_back_what_write_took(learned, tmp_path):
    arguments = {"ranks": learned.ranks, "pattern": r"[\s\S]", "nfc": True, "eot": "</s>"}
    arguments["special_tokens"] = {"</s>": 800, "<mask>": 750}
    write(tmp_path / "new" / "folder", **arguments)
    assert read(tmp_path / "new" / "folder") == arguments


def same_as_hugging_face(tokenizer: Tokenizer, directory: Path, texts: list[str]) -> None:
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in texts:
        ids = tokenizer.encode(text, "all")  # they always turn special tokens in the text into their ids
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids), text


@pytest.mark.parametrize("name", ["learned", "bytes", "gpt2", "o200k"])
def test_tokenizers_gives_the_same_ids(variants, name):
    same_as_hugging_face(*variants[name], [*STRESS, REAL_TEXT])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["learned", "bytes", "gpt2", "o200k"]), SETTLED_TEXT)
def test_tokenizers_gives_the_same_ids_on_any_text(variants, name, text):
    same_as_hugging_face(*variants[name], [text])


def test_tokenizers_decodes_broken_characters_alike(variants):
    tokenizer, directory = variants["learned"]
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(directory / "tokenizer.json"))
    generator = random.Random(0)
    for _ in range(300):
        ids = generator.choices(range(tokenizer.n_vocab), k=6)
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "qwen3_moe", "mixtral", "gpt2", "modernbert"])
def test_auto_tokenizer_gives_the_same_ids(learned, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    learned.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert theirs.eos_token_id == learned.eot_id and len(theirs) == learned.n_vocab
    for text in STRESS:
        ids = learned.encode(text, "all")
        assert theirs(text)["input_ids"] == ids, text  # so nothing is put in front or behind, either
        assert theirs.decode(ids) == text


ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
ENCODER_TEXTS = [
    *STRESS,
    "import [MASK] as np",
    " \u3000\n[MASK][MASK]  [CLS] é",
    "the [MASK], [SEP] 中文[PAD]",
]


@pytest.mark.parametrize("mask_lstrip", [False, True])
@pytest.mark.parametrize("model_type", [None, "bert", "electra", "modernbert", "roberta"])
def test_auto_tokenizer_reads_the_special_tokens_of_an_encoder(learned, tmp_path, model_type, mask_lstrip):
    transformers = pytest.importorskip("transformers")
    tokenizer = learned.with_special_tokens(ROLES)
    if not mask_lstrip:
        tokenizer = Tokenizer(learned.ranks, learned.pattern, tokenizer.special_tokens, roles=ROLES)
    tokenizer.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    for role in ("cls", "sep", "mask", "pad"):
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, f"{role}_id")
    assert theirs.eos_token_id == tokenizer.eot_id and len(theirs) == tokenizer.n_vocab
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    for text in ENCODER_TEXTS:
        ids = tokenizer.encode(text, "all")
        assert theirs(text)["input_ids"] == [cls, *ids, sep], text
        pair = theirs(text, "a", return_token_type_ids=True)
        assert pair["input_ids"] == [cls, *ids, sep, *tokenizer.encode("a"), sep]
        assert sum(pair["token_type_ids"]) == 2

    theirs.save_pretrained(tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        loaded = Tokenizer.load(directory)
        assert (loaded.fingerprint, loaded.roles) == (tokenizer.fingerprint, ROLES)
        assert loaded.mask_lstrip == mask_lstrip


def test_files_without_roles_stay_as_they_are(tmp_path):
    tokenizer = get_tokenizer("bytes")
    tokenizer.save(tmp_path)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in sorted(tmp_path.iterdir())]
    assert (tokenizer.fingerprint[:8], hashes) == ("2358b3bb", ["964b54b0", "1e2606c6"])


def config_of(directory: Path) -> dict:
    return json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_a_decoders_config_has_what_other_programs_look_for(learned, tmp_path):
    """Without them CTranslate2 cannot load what it converted, llama.cpp puts a token of its own choice before
    every prompt, and transformers 4 gives token_type_ids, which `generate` refuses."""
    learned.save(tmp_path)
    config = config_of(tmp_path)
    assert config["bos_token"] == config["unk_token"] == config["eos_token"] == END_OF_TEXT
    assert config["add_bos_token"] is False
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert Tokenizer.load(tmp_path).roles == learned.roles == {}


def test_an_encoders_config_lets_transformers_give_token_type_ids_and_put_cls_in_front(learned, tmp_path):
    learned.with_special_tokens(ROLES).save(tmp_path)
    assert not config_of(tmp_path).keys() & {"model_input_names", "add_bos_token", "bos_token", "unk_token"}


@pytest.mark.parametrize(
    ("given", "roles"),
    [
        ({"eos_token": "</s>"}, {}),
        ({"eos_token": "</s>", "bos_token": "<s>"}, {"bos_token": "<s>"}),
        ({"eos_token": "</s>", "unk_token": {"content": "<s>"}}, {"unk_token": "<s>"}),
        ({"eos_token": {"content": "</s>"}, "bos_token": "</s>", "unk_token": {"content": "</s>"}}, {}),
    ],
    ids=["none", "bos", "unk", "both the same, as GPT-2's"],
)
def test_published_tokens_stay_when_read_written_and_read_again(learned, tmp_path, given, roles):
    arguments = {"ranks": learned.ranks, "pattern": GPT4_PATTERN, "special_tokens": {"<s>": 700, "</s>": 701}}
    write(tmp_path, nfc=False, eot="</s>", **arguments)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    loaded = Tokenizer.load(tmp_path)
    loaded.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.roles == loaded.roles == roles and again.fingerprint == loaded.fingerprint
    config = config_of(tmp_path)
    for role in ("bos_token", "unk_token"):
        assert config[role] == roles.get(role, "</s>")
    same_as_hugging_face(again, tmp_path, ["<s>a b</s>"])


@pytest.mark.parametrize("name", ["learned", "bytes", "gpt2", "o200k"])
def test_load_gives_back_what_was_saved(variants, name):
    tokenizer, directory = variants[name]
    assert Tokenizer.load(directory).fingerprint == tokenizer.fingerprint
    assert get_tokenizer(str(directory)).fingerprint == tokenizer.fingerprint
    assert get_tokenizer(str(directory / "tokenizer.json")).fingerprint == tokenizer.fingerprint
    assert sorted(path.name for path in directory.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_other_special_tokens_and_gaps_in_the_ids(learned, tmp_path):
    specials = {"</s>": 800, "<mask>": 750, "<｜pad｜>": 1000}
    tokenizer = Tokenizer(learned.ranks, GPT4_PATTERN, specials, nfc=True, eot="</s>")
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.eot_id, loaded.n_vocab) == (800, 1001)
    same_as_hugging_face(loaded, tmp_path, ["a</s> <mask>b<｜pad｜>", "e\u0301"])


def test_tokens_that_no_merge_reaches(tmp_path):
    # "abc" is a token though neither "ab" nor "bc" is: it can only be a whole pre-token.
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    tokenizer = Tokenizer(ranks, GPT4_PATTERN, {END_OF_TEXT: 257})
    assert recover_merges(ranks) == []
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    same_as_hugging_face(tokenizer, tmp_path, ["abc abc xabc", "abc"])


def change(directory: Path, target: Path, edit) -> Path:
    """A copy of a saved tokenizer.json with one thing edited."""
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    edit(content)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def like_gpt2(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["model"] = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "vocab": content["model"]["vocab"],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }


def like_llama3(content: dict) -> None:
    """Every way to make each token; special tokens in `added_tokens` only; a begin-of-text template."""
    vocab = content["model"]["vocab"]
    del vocab[END_OF_TEXT]
    splits = [(token[:i], token[i:]) for token in vocab for i in range(1, len(token))]
    content["model"]["merges"] = [f"{a} {b}" for a, b in splits if a in vocab and b in vocab]
    bos = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    end = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [len(vocab)], "tokens": [END_OF_TEXT]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, sequence],
        "pair": [bos, sequence, sequence],
        "special_tokens": end,
    }


def like_qwen(content: dict) -> None:
    content["normalizer"] = {"type": "NFC"}
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = GPT4_PATTERN.replace("{1,3}", "")
    content["model"]["ignore_merges"] = False
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def like_roberta(content: dict) -> None:
    """As trained with Hugging Face's library: special tokens first, a mask that takes the space before it."""
    like_gpt2(content)
    model, names = content["model"], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    del model["vocab"][END_OF_TEXT]
    ids = {name: i for i, name in enumerate(names)}
    model["vocab"] = ids | {token: i + len(ids) for token, i in model["vocab"].items()}
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        {"id": i, "content": name, "lstrip": name == "<mask>"} | flags for name, i in ids.items()
    ]
    content["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["</s>", 2],
        "cls": ["<s>", 0],
        "trim_offsets": True,
        "add_prefix_space": False,
    }


def like_modernbert(content: dict) -> None:
    """GPT-NeoX's vocabulary: no tokens for bytes that UTF-8 does not use, runs of spaces as added tokens."""
    like_gpt2(content)
    vocab = content["model"]["vocab"]
    content["normalizer"] = {"type": "NFC"}
    for byte in (0xC0, 0xC1, *range(0xF5, 0x100)):
        del vocab[BYTE_TO_CHAR[byte]]
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True, "lstrip": False}
    spaces = flags | {"normalized": True, "special": False}
    names = {"    ": spaces, "   ": spaces, "  ": spaces, END_OF_TEXT: flags, "[CLS]": flags, "[SEP]": flags}
    names["[MASK]"] = flags | {"lstrip": True}
    vocab.pop(END_OF_TEXT)
    content["added_tokens"] = [
        {"id": 699 + i, "content": name} | flags for i, (name, flags) in enumerate(names.items())
    ]
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}


@pytest.mark.parametrize("layout", [like_roberta, like_modernbert])
def test_layouts_of_published_encoders(variants, tmp_path, layout):
    change(variants["gpt2"][1], tmp_path, layout)
    if layout is like_roberta:
        config = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    else:
        config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": {"content": "[MASK]"}}
    mask = config["mask_token"] if layout is like_roberta else "[MASK]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)

    assert loaded.mask_lstrip and loaded.roles["mask_token"] == mask
    assert loaded.eot_id == loaded.special_tokens["</s>" if layout is like_roberta else END_OF_TEXT]
    texts = [
        f"a {mask} b",
        f"x  \n {mask}{mask}   \u00a0{mask}",
        "def f():\n      return   1",
        "e\u0301>\u0338",
    ]
    texts += [text.replace("[MASK]", mask) for text in [*ENCODER_TEXTS, REAL_TEXT]]
    same_as_hugging_face(loaded, tmp_path, texts)
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == loaded.fingerprint
    same_as_hugging_face(loaded, tmp_path / "again", texts)


@pytest.mark.parametrize("layout", [like_gpt2, like_llama3, like_qwen])
def test_layouts_of_published_tokenizers(variants, tmp_path, layout):
    name = "gpt2" if layout is like_gpt2 else "learned"
    loaded = Tokenizer.load(change(variants[name][1], tmp_path, layout))
    assert loaded.ranks == variants[name][0].ranks and loaded.nfc == (layout is like_qwen)
    assert loaded.pattern == (GPT2_PATTERN if layout is like_gpt2 else loaded.pattern)
    same_as_hugging_face(loaded, tmp_path, [*STRESS, REAL_TEXT])


def test_tokens_that_are_not_special_are_found_in_every_text_and_stay_so(learned, tmp_path):
    """As Qwen's <think>, which transformers' decode(skip_special_tokens=True) must not drop."""
    transformers = pytest.importorskip("transformers")
    learned.with_special_tokens({}, ["<think>", "<|im_end|>"]).save(tmp_path / "special")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')

    def edit(content):
        content["added_tokens"][-2]["special"] = False

    loaded = Tokenizer.load(change(tmp_path / "special", tmp_path, edit))
    loaded.with_special_tokens({"pad_token": "[PAD]"}).save(tmp_path / "again")
    thought = loaded.special_tokens["<think>"]
    text = "a <think>b<|im_end|>"
    for directory in (tmp_path, tmp_path / "again"):
        ours, theirs = Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
        assert ours.encode(text)[-1] != ours.special_tokens["<|im_end|>"]
        assert ours.encode(text).count(thought) == 1 and ours.encode(text) == Pipeline.load(directory).encode(
            text
        )
        assert ours.encode(text, "all") == theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ours.encode(text, "all"), skip_special_tokens=True) == "a <think>b"
    assert loaded.fingerprint != Tokenizer.load(tmp_path / "special").fingerprint


def test_eos_token_ends_documents(learned, tmp_path):
    specials = learned.special_tokens | {"<|im_end|>": 700}
    Tokenizer(learned.ranks, learned.pattern, specials).save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for eos_token, eot_id in (("<|im_end|>", 700), ({"content": "<|im_end|>"}, 700), (None, 699)):
        config.write_text(json.dumps({"eos_token": eos_token}))
        assert Tokenizer.load(tmp_path).eot_id == eot_id
    config.write_text(json.dumps({"eos_token": ["<|im_end|>"]}))
    with pytest.raises(ValueError, match="is not a string"):
        Tokenizer.load(tmp_path)
    config.unlink()
    assert Tokenizer.load(tmp_path).eot_id == 699


def set_model(**values):
    return lambda content: content["model"].update(values)


def set_top(**values):
    return lambda content: content.update(values)


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def set_split(**values):
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(values)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
WITH_PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
UNSPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
MASK = {"id": 699, "content": END_OF_TEXT, "lstrip": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_model(type="WordPiece"), "model type WordPiece"),
        (set_model(byte_fallback=True), "byte_fallback"),
        (set_model(dropout=0.1), "dropout"),
        (set_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (set_model(vocab={"▁the": 0}), "does not belong"),
        (set_model(merges=[["x", "▁"]]), "does not belong"),
        (set_model(merges=[["!", "\u0122"]]), "does not belong"),
        (set_model(merges=[["a"]]), "not enough values"),
        (set_model(vocab=None), "not a complete tokenizer.json"),
        (lambda content: content["model"]["merges"].pop(), "no merge makes"),
        (lambda content: content["model"]["vocab"].pop("a"), "the vocabulary lacks|does not belong"),
        (lambda content: content["model"]["vocab"].update(a=0), "ids must differ"),
        (lambda content: content["model"]["vocab"].update(a="97"), "not a complete tokenizer.json .*'97'"),
        (lambda content: content["model"]["vocab"].update(a=97.5), "not a complete tokenizer.json .*97.5"),
        (swap_merges, "not in the order of ids"),
        (set_top(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
        (set_top(pre_tokenizer=None), "pre-tokenizer None"),
        (set_top(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "pre-tokenizer .*Sequence"),
        (set_top(pre_tokenizer=METASPACE), "pre-tokenizer .*Metaspace"),
        (set_top(pre_tokenizer=WITH_PREFIX), "pre-tokenizer .*ByteLevel"),
        (set_top(pre_tokenizer=UNSPLIT), "pre-tokenizer .*ByteLevel"),
        (set_split(behavior="Removed"), "pre-tokenizer .*Removed"),
        (set_split(invert=True), "pre-tokenizer .*invert"),
        (set_split(pattern={"String": " "}), "pre-tokenizer .*String"),
        (set_split(pattern={"Regex": 5}), "not a complete tokenizer.json .*5 is not a string"),
        (set_split(pattern={"Regex": "("}), "not a regular expression"),
        (set_top(added_tokens=[MASK]), "lstrip"),
        (set_top(added_tokens=[MASK | {"lstrip": False, "rstrip": True}]), "rstrip"),
        (
            set_top(added_tokens=[MASK | {"lstrip": False, "content": "  "}]),
            "of spaces that is not normalized",
        ),
        (set_top(added_tokens=[]), "end-of-text token"),
        (lambda content: content.pop("model"), "not a complete tokenizer.json"),
    ],
)
def test_load_refuses_what_it_cannot_do_exactly(variants, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.load(change(variants["learned"][1], tmp_path, edit))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_load_refuses_damaged_files(variants, tmp_path):
    whole = (variants["learned"][1] / "tokenizer.json").read_bytes()
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no such file; expected a directory that holds tokenizer"):
        Tokenizer.load(tmp_path)
    for damaged in (b"", whole[: len(whole) // 2], b"\xff\xfe{}", b"[]", b"null", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)


BEGIN = "<|begin_of_text|>"
OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def processor(tokenizer, kind):
    """Return a post_processor as files have it: with a template that begins with BEGIN, or without."""
    pieces = [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    if kind.endswith("behind"):
        pieces.append({"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}})
    ids = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in tokenizer.special_tokens.items()}
    begins = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": ids}
    begins["pair"] = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    sequence = {"type": "Sequence", "processors": [OFFSETS, begins]}
    return {
        "none": None,
        "offsets": OFFSETS,
        "sequence": sequence,
        "sequence in sequence": {"type": "Sequence", "processors": [sequence]},
    }.get(kind, begins)


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize(
    "kind", ["none", "offsets", "template", "sequence", "sequence in sequence", "template and behind"]
)
def test_a_prompt_begins_as_transformers_begins_it(learned, tmp_path, kind, add_bos):
    transformers = pytest.importorskip("transformers")
    tokenizer = learned.with_special_tokens({"bos_token": BEGIN})
    tokenizer.save(tmp_path)
    for name, changes in (
        ("tokenizer.json", {"post_processor": processor(tokenizer, kind)}),
        ("tokenizer_config.json", {"add_bos_token": add_bos, "bos_token": BEGIN}),
    ):
        content = json.loads((tmp_path / name).read_text()) | changes
        content = {
            key: value for key, value in content.items() if key != "add_bos_token" or value is not None
        }
        (tmp_path / name).write_text(json.dumps(content))

    # What is saved again begins as the original does, also in a tokenizer with more special tokens.
    ours = Tokenizer.load(tmp_path)
    again = ours.with_special_tokens({"pad_token": "[PAD]"})
    again.save(tmp_path / "again")
    for read_by_us, directory in ((ours, tmp_path), (Tokenizer.load(tmp_path / "again"), tmp_path / "again")):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        end = [tokenizer.eot_id] if kind.endswith("behind") else []
        for text in ("", "hello", " a\n"):
            assert [*read_by_us.begin_ids, *read_by_us.encode(text), *end] == theirs(text)["input_ids"]
    assert bool(ours.begin_ids) == (kind not in ("none", "offsets"))
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert written["add_bos_token"] == bool(ours.begin_ids) and ours.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"type": "Other"}, "post-processor Other is not supported"),
        (
            {"special_tokens": {BEGIN: {"id": BEGIN, "ids": [3], "tokens": ["a"]}}},
            "adds token 3, which is no",
        ),
        ({"single": []}, "not a complete tokenizer.json"),
        ({"special_tokens": {}}, "not a complete tokenizer.json"),
    ],
)
def test_a_post_processor_that_makes_no_sense_is_refused(learned, tmp_path, changed, message):
    tokenizer = learned.with_special_tokens({"bos_token": BEGIN})
    tokenizer.save(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["post_processor"] = processor(tokenizer, "template") | changed
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_added_tokens_that_are_not_special_are_found_in_any_text(learned, tmp_path):
    """As Qwen 3's <think>, and what `add_tokens` of transformers adds, which is looked for after NFC."""
    tokenizers = pytest.importorskip("tokenizers")
    qwen, saved = tmp_path / "qwen", tmp_path / "saved"
    Tokenizer(learned.ranks, GPT4_PATTERN, learned.special_tokens, nfc=True).save(qwen)
    theirs = tokenizers.Tokenizer.from_file(str(qwen / "tokenizer.json"))
    theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=False), "</think>", "café"])
    theirs.save(str(qwen / "tokenizer.json"))

    ours = Tokenizer.load(qwen)
    ours.with_special_tokens({"pad_token": "<pad>"}).save(saved)
    again = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    for text in ("<think>\n\n</think>\n\nyes", "a cafe\u0301 <think>\u0338</think>\u0338", *STRESS[:5]):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ours.encode(text, "all") == ids, text
        assert Tokenizer.load(saved).encode(text) == ids == again.encode(text, add_special_tokens=False).ids
    ids = ours.encode(f"<think>yes{END_OF_TEXT}")
    assert ids[0] == 700 and ours.eot_id not in ids
    assert again.decode(ids, skip_special_tokens=True) == f"<think>yes{END_OF_TEXT}"
    assert Tokenizer.load(saved).fingerprint == ours.with_special_tokens({"pad_token": "<pad>"}).fingerprint
    assert ours.fingerprint != learned.fingerprint
