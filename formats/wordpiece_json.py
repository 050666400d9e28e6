"""The files of WordPiece vocabularies such as BERT's: tokenizer.json, or vocab.txt as in 2018.

tokenizer.json holds the *pieces* with their ids, the settings by which text is prepared (see
data/wordpiece.py), and the *special tokens*:

    normalizer      BertNormalizer: lowercase, strip_accents (null: as lowercase), handle_chinese_chars
    pre_tokenizer   BertPreTokenizer: split at spaces and punctuation
    model           type         WordPiece
                    unk_token    "[UNK]"
                    vocab        {"[PAD]": 0, ..., "the": 1996, ..., "##s": 2015, ...}
    added_tokens    [{"content": "[MASK]", "id": 103, "special": true, ...}, ...]

vocab.txt has a piece per line, the first with id 0; the settings are then in tokenizer_config.json
("do_lower_case" and others), and absent ones have the values of the first BERT, which is uncased. With both
files, tokenizer_config.json has the *roles* of special tokens ("mask_token": "[MASK]").
"""

from pathlib import Path

from formats import tokenizer_json
from formats.atomic import replace_file
from formats.json_file import read_json, write_json
from formats.tokenizer_json import EXPECTED, STYLE

# BERT's names of the tokens of roles, which hold where a file does not name them.
BERT_ROLES = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",
}
LONGEST_WORD = 100  # characters; a longer word is an unknown token

# The classes of transformers that read a vocab.txt as BERT does. BertJapaneseTokenizer does not, for example.
LIKE_BERT = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")


def write(
    directory: Path,
    vocab: dict[str, int],
    lowercase: bool,
    strip_accents: bool | None,
    chinese_chars: bool,
    special_tokens: dict[str, int],
    roles: dict[str, str],
) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt, which `AutoTokenizer` reads.

    vocab, special_tokens: {piece: id}. strip_accents: None means as lowercase. chinese_chars: whether each
    Chinese character is a word. roles: {role: name}.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokenizer_json.added_tokens(special_tokens),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": chinese_chars,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": tokenizer_json.template(special_tokens, roles),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": roles["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        },
    }
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "strip_accents": strip_accents,
        "tokenize_chinese_chars": chinese_chars,
        "clean_up_tokenization_spaces": False,
    } | roles
    write_json(directory / "tokenizer.json", file, **STYLE)
    write_json(directory / "tokenizer_config.json", config, **STYLE)
    with replace_file(directory / "vocab.txt") as new:  # a line for each id, empty if the id is not used
        pieces = {i: piece for piece, i in (vocab | special_tokens).items()}
        lines = [pieces.get(i, "") + "\n" for i in range(max(pieces) + 1)]
        new.write_text("".join(lines), encoding="utf-8", newline="\n")


def vocabulary_file(directory: str | Path) -> Path:
    """Return the path of the tokenizer.json in a directory, or else of its vocab.txt. directory may also be
    one of these files."""
    path = Path(directory)
    if not path.is_dir():
        return path
    has_only_text = (path / "vocab.txt").is_file() and not (path / "tokenizer.json").is_file()
    return path / ("vocab.txt" if has_only_text else "tokenizer.json")


def is_wordpiece(directory: str | Path) -> bool:
    """Return whether a directory or file holds a WordPiece vocabulary. Raises ValueError for damaged JSON."""
    path = vocabulary_file(directory)
    if path.suffix == ".txt":
        return True
    model = read_json(path, EXPECTED).get("model")
    if not isinstance(model, dict):
        return False
    # The oldest files, such as DistilBERT's, do not name their model's type.
    return model.get("type", "WordPiece") == "WordPiece" and "max_input_chars_per_word" in model


def read_roles(config: dict, names: dict[str, int]) -> dict[str, str]:
    """Return {role: name} of the roles in a tokenizer_config.json, and BERT's for absent ones.

    names: {name: id} of all tokens; a role whose token is not among them is left out.
    """
    usual = {role: name for role, name in BERT_ROLES.items() if name in names}
    return usual | tokenizer_json.read_roles(config, names)


def expect(what: str, found: dict, **allowed: tuple) -> None:
    """Raise ValueError for the first setting in found whose value is not one of those allowed.

    what: that which has the settings, for the error. allowed: {setting: its allowed values}.
    """
    for key, values in allowed.items():
        if found.get(key) not in values:
            raise ValueError(
                f"{what} with {key} = {str(found.get(key))[:200]} is not supported; expected {values[0]}"
            )


def read_tokenizer_json(file: dict, config: dict) -> dict:
    """Return the result of `read` for a tokenizer.json.

    file, config: the content of tokenizer.json and of tokenizer_config.json, which alone has the roles.
    """
    # Only BERT's way to prepare text, and to cut it into words and pieces, is implemented.
    model, normalizer = file["model"], file["normalizer"] or {}
    expect("a model", model, type=("WordPiece", None), continuing_subword_prefix=("##",))
    expect("WordPiece", model, max_input_chars_per_word=(LONGEST_WORD,))
    expect("a normalizer", normalizer, type=("BertNormalizer",), clean_text=(True,))
    expect("a pre-tokenizer", file["pre_tokenizer"] or {}, type=("BertPreTokenizer",))

    # These settings are in both files, and must agree.
    names = {"do_lower_case": "lowercase", "tokenize_chinese_chars": "handle_chinese_chars"}
    for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        here = normalizer[names.get(key, key)]
        if config.get(key, here) != here:
            raise ValueError(f"{names.get(key, key)} is {here}, but tokenizer_config.json says {config[key]}")

    # The flags lstrip and rstrip, by which a token includes spaces around it, may be set: WordPiece drops
    # spaces.
    for token in file["added_tokens"]:
        expect(f"special token {token['content']!r}", token, single_word=(False,), normalized=(False,))
    special_tokens = {token["content"]: token["id"] for token in file["added_tokens"]}
    roles = read_roles(config, special_tokens) | {"unk_token": model["unk_token"]}
    # Tokens that are not special are found in any text, which data/pipeline.py implements.
    for token in file["added_tokens"]:
        if token["content"] not in roles.values():
            expect(f"added token {token['content']!r}", token, special=(True,))
    return {
        "vocab": model["vocab"],
        "lowercase": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "chinese_chars": normalizer["handle_chinese_chars"],
        "special_tokens": {model["unk_token"]: model["vocab"][model["unk_token"]]} | special_tokens,
        "roles": roles,
    }


def read_vocab_txt(path: Path, config: dict) -> dict:
    """Return the result of `read` for the vocab.txt at path. config: the content of tokenizer_config.json."""
    # Only what BERT's own tokenizer does is implemented.
    if not path.is_file():
        raise ValueError("no such file; expected a directory that holds tokenizer.json or vocab.txt")
    if path.with_name("added_tokens.json").is_file():
        raise ValueError("pieces in added_tokens.json are not supported; expected them in tokenizer.json")
    kind = config.get("tokenizer_class") or LIKE_BERT[0]
    if kind.removesuffix("Fast") not in LIKE_BERT:
        raise ValueError(f"tokenizer_class {kind} is not supported; expected {', '.join(LIKE_BERT)}")
    expect("tokenizer_config.json", config, do_basic_tokenize=(True, None), never_split=(None, []))
    for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        expect("tokenizer_config.json", config, **{key: (True, False, None)})

    # Line i holds the piece of id i.
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error}); download it again") from None
    vocab = {piece: i for i, piece in enumerate(lines)}
    added = {token["content"]: int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    roles = read_roles(config, vocab | added)
    return {
        "vocab": vocab,
        "lowercase": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents"),
        "chinese_chars": config.get("tokenize_chinese_chars", True),
        "special_tokens": {name: vocab[name] for name in roles.values() if name in vocab} | added,
        "roles": roles,
    }


def read(directory: Path) -> dict:
    """Return the arguments of `write`, from tokenizer.json or else vocab.txt, and tokenizer_config.json.

    directory may also be one of the first two files. Raises ValueError naming what is damaged, or what
    data/wordpiece.py would do differently (another algorithm, normalizer or pre-tokenizer).
    """
    path = vocabulary_file(directory)
    is_text = path.suffix == ".txt"
    file = None if is_text else read_json(path, EXPECTED)
    config = tokenizer_json.read_configuration(path)
    with tokenizer_json.damage_named(path):
        arguments = read_vocab_txt(path, config) if is_text else read_tokenizer_json(file, config)
        for name in arguments["special_tokens"]:
            if not isinstance(name, str):
                raise TypeError(f"{name!r} is not a string")
    return arguments
