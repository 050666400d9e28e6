"""The files of any tokenizer: tokenizer.json with all its parts, or a SentencePiece model.

formats/tokenizer_json.py and formats/wordpiece_json.py read the two kinds of tokenizer.json that have a
faster tokenizer here, and only them. This file reads all kinds: it finds the file, and what
tokenizer_config.json adds, the *roles* of special tokens and the token that ends a document. The parts are
implemented in data/pipeline.py. Older directories have no tokenizer.json but a model of SentencePiece
(formats/sentencepiece_model.py), or CLIP's two files (formats/clip_vocabulary.py).

Where tokenizer_config.json names no role, the usual names have theirs: [MASK] or <mask> is the mask token.
"""

from pathlib import Path

from formats import clip_vocabulary, sentencepiece_model, tokenizer_json
from formats.json_file import read_json, write_json
from formats.tokenizer_json import END_OF_TEXT, EXPECTED, FILLED_ROLES, ROLES, STYLE, Around

# The names of SentencePiece's file in published directories.
MODEL_FILES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
VOCABULARY = clip_vocabulary.FILES[0]
USUAL_ROLES = {
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}
USUAL_ENDS = (END_OF_TEXT, "</s>", "<eos>")


def tokenizer_file(path: Path) -> Path:
    """Return the tokenizer.json of a directory, else its SentencePiece model, else CLIP's vocab.json; or
    the file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = [name for name in ("tokenizer.json", *MODEL_FILES, VOCABULARY) if (path / name).is_file()]
    return path / (names[0] if names else "tokenizer.json")


def name_of(value: str | dict | None) -> str | None:
    """Return the name of a token in tokenizer_config.json, where it may also be an object."""
    name = value["content"] if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise TypeError(f"token {name!r} is not a string")
    return name


def read_names(file: dict, config: dict) -> dict:
    """Return {"eot": the name of the token that ends a document, "roles": {role: name}}.

    Documents end with the eos_token, or else with the sep_token, or with a token that is usual for it. Raises
    ValueError if there is none of them.
    """
    # An encoder's first and last tokens are in its post-processor, if nowhere else.
    names = {token["content"]: token["id"] for token in file["added_tokens"]}
    given = {role: name_of(config[role]) for role in ROLES if config.get(role)}
    usual = {role: name for role, some in USUAL_ROLES.items() for name in some[::-1] if name in names}
    around = tokenizer_json.read_around(file.get("post_processor"), names)
    if "mask_token" in given | usual and [len(side) for side in around] == [1, 1]:
        usual |= {"cls_token": around[0][0], "sep_token": around[1][0]}
    roles = {role: name for role, name in (usual | given).items() if name in names}

    ends = [name_of(config.get("eos_token")), roles.get("sep_token"), *USUAL_ENDS]
    eot = next((name for name in ends if name in names), None)
    if eot is None:
        raise ValueError("no token ends a document; name one as eos_token in tokenizer_config.json")
    return {
        "eot": eot,
        "roles": {r: name for r, name in roles.items() if name != eot or r not in FILLED_ROLES},
    }


def read(directory: Path) -> dict:
    """Return the arguments of `write`, from the files in a directory; it may also be one of the files.

    Raises ValueError for a file that is missing or damaged, without a look at most parts.
    """
    path = tokenizer_file(directory)
    config_path = path.with_name("tokenizer_config.json")
    config = read_json(config_path) if config_path.is_file() else {}
    if path.suffix == ".model":
        file = sentencepiece_model.read(path, config)
    elif path.name == VOCABULARY:
        file = clip_vocabulary.read(path)
    else:
        file = read_json(path, EXPECTED)
    with tokenizer_json.damage_named(path):
        file = clip_vocabulary.with_spaces(file)
        return {"file": file} | read_names(file, config)


def write(directory: Path, file: dict, eot: str, roles: dict[str, str]) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = {token["content"]: token["id"] for token in file["added_tokens"]}
    around: Around = tokenizer_json.read_around(file.get("post_processor"), names)
    config = tokenizer_json.configuration(eot, roles, around)
    # A plain name would reset the flags that the token has in tokenizer.json.
    entries = {token["content"]: token for token in file["added_tokens"]}
    for role, name in config.items():
        entry = entries.get(name) if role in roles else None
        if entry is not None and entry.get("lstrip"):
            config[role] = {"__type": "AddedToken"} | {k: v for k, v in entry.items() if k != "id"}
    write_json(directory / "tokenizer.json", file, **STYLE)
    write_json(directory / "tokenizer_config.json", config, **STYLE)
