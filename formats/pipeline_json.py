"""The files of a tokenizer of any kind: tokenizer.json with all its parts, or an older file instead of it.

formats/tokenizer_json.py and formats/wordpiece_json.py read two kinds of tokenizer.json, byte-level BPE and
WordPiece, for which there are faster tokenizers. This file reads all kinds. It returns the content of
tokenizer.json, whose parts data/pipeline.py implements, and from tokenizer_config.json the *roles* of special
tokens and the token that ends a document. Older directories have a model of SentencePiece instead
(formats/sentencepiece_model.py), or CLIP's two files (formats/clip_vocabulary.py).

A role that tokenizer_config.json does not name belongs to the token with its usual name, such as [MASK].
"""

from pathlib import Path

from formats import clip_vocabulary, sentencepiece_model, tokenizer_json
from formats.json_file import read_json, write_json
from formats.tokenizer_json import END_OF_TEXT, EXPECTED, FILLED_ROLES, ROLES, STYLE, Around

# The names of SentencePiece's file in published directories.
MODEL_FILES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
VOCABULARY = clip_vocabulary.FILES[0]
USUAL_ROLES = {  # role: its usual names, the first of them preferred
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}
USUAL_ENDS = (END_OF_TEXT, "</s>", "<eos>")  # usual names of the token that ends a document


def tokenizer_file(path: Path) -> Path:
    """Return the path of the tokenizer.json in a directory, else of its SentencePiece model, else of CLIP's
    vocab.json. path may also be one of these files."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = [name for name in ("tokenizer.json", *MODEL_FILES, VOCABULARY) if (path / name).is_file()]
    return path / (names[0] if names else "tokenizer.json")


def read_names(file: dict, config: dict) -> dict:
    """Return {"eot": the name of the token that ends a document, "roles": {role: name}}.

    file, config: the content of tokenizer.json and of tokenizer_config.json. A document ends with the
    eos_token, or else with the sep_token, or else with a token that has one of the usual names. Raises
    ValueError if there is none of them.
    """
    # In an encoder, which has a mask token, the tokens around a text are cls_token and sep_token.
    names = {token["content"]: token["id"] for token in file["added_tokens"]}
    given = {role: tokenizer_json.name_of(config[role]) for role in ROLES if config.get(role)}
    usual = {role: name for role, some in USUAL_ROLES.items() for name in some[::-1] if name in names}
    around = tokenizer_json.read_around(file.get("post_processor"), names)
    if "mask_token" in given | usual and [len(side) for side in around] == [1, 1]:
        usual |= {"cls_token": around[0][0], "sep_token": around[1][0]}
    roles = {role: name for role, name in (usual | given).items() if name in names}

    ends = [tokenizer_json.name_of(config.get("eos_token")), roles.get("sep_token"), *USUAL_ENDS]
    eot = next((name for name in ends if name in names), None)
    if eot is None:
        raise ValueError("no token ends a document; name one as eos_token in tokenizer_config.json")
    return {
        "eot": eot,
        "roles": {r: name for r, name in roles.items() if name != eot or r not in FILLED_ROLES},
    }


def read(directory: Path) -> dict:
    """Return the arguments of `write`, from the files in a directory, which may also be one of the files.

    Raises ValueError for a file that is missing or damaged. Most parts of a tokenizer.json are not checked
    here, but by data/pipeline.py.
    """
    path = tokenizer_file(directory)
    config = tokenizer_json.read_configuration(path)
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
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads.

    file: the content of tokenizer.json. eot, roles: as `read_names` returns them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = {token["content"]: token["id"] for token in file["added_tokens"]}
    around: Around = tokenizer_json.read_around(file.get("post_processor"), names)
    config = tokenizer_json.configuration(eot, roles, around, file["added_tokens"])
    write_json(directory / "tokenizer.json", file, **STYLE)
    write_json(directory / "tokenizer_config.json", config, **STYLE)
