"""tokenizer.json: the file in which Hugging Face's libraries keep a byte-pair encoding.

A byte-pair encoding (see data/tokenizer.py) consists of its *ranks* (token -> id, in the order of learning),
the *pattern* that cuts text into pre-tokens, and the *special tokens*. The file holds them like this (here
three tokens were learned):

    normalizer      null, or {"type": "NFC"}: compose accents first
    pre_tokenizer   Split by the pattern, then ByteLevel: write each byte as a character of the byte alphabet
    model           type     BPE
                    vocab    {..., "a": 97, ..., "Ġt": 256, "he": 257, "Ġthe": 258, "<|endoftext|>": 259}
                    merges   [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]]
    added_tokens    [{"content": "<|endoftext|>", "id": 259, "special": true, ...}]

*Byte alphabet.* JSON keys are text, but a token may be any bytes, such as half of a character. So GPT-2 gave
each of the 256 bytes a printable character: " the" is the key "Ġthe", and "é", two bytes in UTF-8, is "Ã©".

*Ranks and merges.* `merges` has the pair that each token is made of; tiktoken needs the ranks alone. Of the
adjacent pairs in a text, Hugging Face joins the one that is first in `merges`, tiktoken the one that makes
the token of the lowest rank. The two agree if the merges are complete and in the order of ranks. So
`recover_merges` computes the merges from the ranks, and reading checks that those in the file are the same.

*Roles.* tokenizer_config.json, beside the file, names the token that ends a document (`eos_token`) and those
that an encoder such as BERT needs (`cls_token`, `sep_token`, `mask_token`, `pad_token`).

*Around a text.* The post_processor puts special tokens in front of a text, such as Llama 3's
<|begin_of_text|>, or behind it. In transformers 5 nothing else does: `add_bos_token` in tokenizer_config.json
has no effect beside a tokenizer.json.

A decoder needs no role but `eos_token`. But programs that convert models also look for a `bos_token` and an
`unk_token`; without them they fail, or use an arbitrary id. So both are written as the token of `eos_token`,
as in GPT-2's file, and ignored when they are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from formats.json_file import read_json, write_json

# The roles of special tokens, as transformers names them, with the usual name of such a token.
ROLES = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "bos_token": "[BOS]",
}
END_OF_TEXT = "<|endoftext|>"
EXPECTED = "a directory that holds tokenizer.json"
STYLE = {"indent": 1, "end": ""}  # arguments of `write_json` for the files of tokenizers
# Roles that a decoder lacks: they are written as its eos_token.
FILLED_ROLES = ("bos_token", "unk_token")

# {name: normalized} of added tokens that are not special: they are found in any text, after Unicode's
# normalisation or before it.
Plain = dict[str, bool]
# The names of the special tokens in front of a text and behind it.
Around = tuple[tuple[str, ...], tuple[str, ...]]
NOTHING: Around = ((), ())

# GPT-2's split pattern. ByteLevel cuts by it where the file has no Split before it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> dict[int, str]:
    """Return a printable character for each byte.

    The 188 bytes that are printable in Latin-1 keep their character; the other 68 get the characters from
    U+0100 on, in order. The space (32) becomes "Ġ", the newline (10) "Ċ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_text(token: bytes) -> str:
    """Return a token in the byte alphabet."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def to_bytes(text: str) -> bytes:
    """Return the token of a text in the byte alphabet. Raises KeyError for a character that is not in it."""
    return bytes(CHAR_TO_BYTE[char] for char in text)


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each token of several bytes was made from, in the order of the tokens' ranks.

    Ranks do not contain the two parts of a token. But when the token was learned, its bytes were written with
    the tokens that existed then, so encoding them with the lower ranks alone gives the pair. Some published
    vocabularies have tokens for which this gives more than two parts. Merging never makes such a token, which
    is used only where it is an entire pre-token; so it is left out.
    """
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts, limit = [bytes([byte]) for byte in token], ranks[token]

        while len(parts) > 2:
            unions = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
            lowest = min(unions)
            if lowest >= limit:
                break
            i = unions.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def added_tokens(
    special_tokens: dict[str, int], lstrip: str | None = None, plain: Plain | None = None
) -> list[dict]:
    """Return the entries of special tokens, {name: id}, in tokenizer.json.

    lstrip: the name of the token that includes the space before it, if there is one. A token in `plain`, or
    whose name is spaces only, is marked as not special. The latter is marked as normalized: Hugging Face then
    looks for it in a text after the special ones.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    plain = {name: True for name in special_tokens if name.isspace()} | (plain or {})
    by_id = sorted(special_tokens.items(), key=lambda item: item[1])
    entries = [{"id": i, "content": name} | flags for name, i in by_id]
    for entry in entries:
        entry["lstrip"] = entry["content"] == lstrip
        entry["normalized"] = plain.get(entry["content"], False)
        entry["special"] = entry["content"] not in plain
    return entries


def template(special_tokens: dict[str, int], roles: dict[str, str], around: Around = NOTHING) -> dict | None:
    """Return the post-processor that puts special tokens around a text, or None if there are none.

    special_tokens: {name: id}. The tokens are those of the roles cls_token and sep_token, if there are both,
    with another sep_token behind the second text of a pair; otherwise those in `around`.
    """
    is_encoder = "cls_token" in roles and "sep_token" in roles
    front, behind = ((roles["cls_token"],), (roles["sep_token"],)) if is_encoder else around
    if not (front or behind):
        return None

    def pieces(front: tuple[str, ...], text: str, behind: tuple[str, ...], segment: int) -> list[dict]:
        parts = [("SpecialToken", name) for name in front]
        parts += [("Sequence", text), *(("SpecialToken", name) for name in behind)]
        return [{kind: {"id": name, "type_id": segment}} for kind, name in parts]

    single = pieces(front, "A", behind, 0)
    names = dict.fromkeys((*front, *behind))
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *pieces(() if is_encoder else front, "B", behind, 1)],
        "special_tokens": {n: {"id": n, "ids": [special_tokens[n]], "tokens": [n]} for n in names},
    }


def write(
    directory: Path,
    ranks: dict[bytes, int],
    pattern: str,
    special_tokens: dict[str, int],
    nfc: bool,
    eot: str,
    roles: dict[str, str] | None = None,
    mask_lstrip: bool = False,
    around: Around = NOTHING,
    plain: Plain | None = None,
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads.

    ranks, pattern: the byte-pair encoding. special_tokens: {name: id}. nfc: whether text is normalised to NFC
    first. eot: the name of the token that ends a document. roles: {role: name}. mask_lstrip: whether the mask
    token includes the space before it. around: the names of the tokens around a text. plain: those of
    special_tokens that are found in any text.
    """
    roles = roles or {}

    # Special tokens are in the vocabulary too: otherwise Hugging Face would give them ids after the largest.
    vocab = {to_text(token): i for token, i in ranks.items()} | special_tokens
    special = added_tokens(special_tokens, roles["mask_token"] if mask_lstrip else None, plain)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    model = {
        "type": "BPE",
        "ignore_merges": True,  # as in tiktoken, a pre-token that is in the vocabulary is that token
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": [[to_text(left), to_text(right)] for left, right in recover_merges(ranks)],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": template(special_tokens, roles, around),
        "decoder": bytewise,
        "model": model,
    }

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "tokenizer.json", tokenizer, **STYLE)
    write_json(directory / "tokenizer_config.json", configuration(eot, roles, around, special), **STYLE)


def configuration(eot: str, roles: dict[str, str], around: Around, added_tokens: list[dict]) -> dict:
    """Return the content of tokenizer_config.json. added_tokens: the entries in tokenizer.json."""
    # A token that includes the space before it is written as an object: a plain name would reset that flag.
    entries = {token["content"]: token for token in added_tokens if token.get("lstrip")}
    objects = {
        role: {"__type": "AddedToken"} | {key: value for key, value in entries[name].items() if key != "id"}
        for role, name in roles.items()
        if name in entries
    }

    # The class is the general one, because the classes of model types (GPT2Tokenizer, Qwen2Tokenizer ...)
    # replace the file's split pattern by their own. For type qwen2, transformers 5 always does.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eot,
        "clean_up_tokenization_spaces": False,
    }
    if not {"cls_token", "sep_token"} <= roles.keys():  # of a decoder
        config |= dict.fromkeys(FILLED_ROLES, eot)
        config["bos_token"] = around[0][0] if around[0] else eot
        config["add_bos_token"] = bool(around[0])  # llama.cpp adds one by default
        # By default transformers 4 adds token_type_ids, which no decoder's `generate` accepts.
        config["model_input_names"] = ["input_ids", "attention_mask"]
    return config | roles | objects


def read_configuration(path: Path) -> dict:
    """Return the content of the tokenizer_config.json beside the file at path, {} if there is none."""
    config_path = path.with_name("tokenizer_config.json")
    return read_json(config_path) if config_path.is_file() else {}


def read_splitting(file: dict) -> tuple[bool, str]:
    """Return whether a tokenizer.json normalises text to NFC, and its split pattern.

    Raises ValueError for another normalizer or pre-tokenizer than those named at the top of this file.
    """
    normalizer, pre = file.get("normalizer"), file["pre_tokenizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"normalizer {str(normalizer)[:200]} is not supported; expected NFC or none")
    nfc = normalizer is not None

    match pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]:
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return nfc, pattern
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return nfc, GPT2_PATTERN  # GPT-2's own file lacks use_regex, which is newer
    raise ValueError(
        f"pre-tokenizer {str(pre)[:300]} is not supported; expected ByteLevel or Split, ByteLevel"
    )


def read_roles(config: dict, special_tokens: dict[str, int]) -> dict[str, str]:
    """Return {role: name} of the roles in a tokenizer_config.json whose tokens are in special_tokens."""
    names = {role: name_of(config[role]) for role in ROLES if config.get(role)}
    return {role: name for role, name in names.items() if name in special_tokens}


def name_of(value: str | dict | None) -> str | None:
    """Return the name of a token in tokenizer_config.json, where it is a text or an object, None for None.

    Raises TypeError for any other value.
    """
    name = value["content"] if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise TypeError(f"token {name!r} is not a string")
    return name


def read_mask_lstrip(added_tokens: list[dict], mask: str | None) -> bool:
    """Return whether the mask token includes the space before it, by its flag "lstrip".

    mask: the name of that token. Raises ValueError if another token has the flag, or if any has "rstrip" or
    "single_word".
    """
    lstrip = False
    for token in added_tokens:
        name, normalized = token["content"], token.get("normalized", False)
        if name.isspace() and not normalized:
            raise ValueError(f"special token {name!r} of spaces that is not normalized is not supported")
        for flag in ("lstrip", "rstrip", "single_word"):
            if not token.get(flag):
                continue
            if flag != "lstrip" or name != mask or normalized:
                raise ValueError(f"special token {name!r} with {flag} is not supported")
            lstrip = True
    return lstrip


def read_plain(added_tokens: list[dict], named: set[str]) -> Plain:
    """Return the tokens that are not marked as special, without those of spaces and those in `named`."""
    return {
        token["content"]: bool(token.get("normalized"))
        for token in added_tokens
        if not (token.get("special", True) or token["content"].isspace() or token["content"] in named)
    }


def read_around(processor: dict | None, special_tokens: dict[str, int]) -> Around:
    """Return the names of the tokens that a post-processor puts around a text. special_tokens: {name: id}.

    Raises ValueError for a token that is no special token, and for a post-processor that is not implemented.
    """
    kind = processor["type"] if processor else "ByteLevel"
    if kind == "ByteLevel":  # changes the places of tokens in the text, and adds none
        return NOTHING
    if kind == "Sequence":
        front, behind = NOTHING
        for part in processor["processors"]:
            outer = read_around(part, special_tokens)
            front, behind = outer[0] + front, behind + outer[1]
        return front, behind
    if kind in ("BertProcessing", "RobertaProcessing"):
        sides = [[processor["cls"][1]], [processor["sep"][1]]]
    elif kind == "TemplateProcessing":
        sides, known = [[], []], processor["special_tokens"]
        place = next(i for i, piece in enumerate(processor["single"]) if "Sequence" in piece)
        for i, piece in enumerate(processor["single"]):
            if i != place:
                sides[i > place] += known[piece["SpecialToken"]["id"]]["ids"]
    else:
        raise ValueError(f"post-processor {str(kind)[:200]} is not supported; expected TemplateProcessing")
    names = {i: name for name, i in special_tokens.items()}
    for i in (*sides[0], *sides[1]):
        if i not in names:
            raise ValueError(f"the post-processor adds token {i!r}, which is no special token")
    return tuple(names[i] for i in sides[0]), tuple(names[i] for i in sides[1])


def read_ranks(model: dict, special_tokens: dict[str, int]) -> dict[bytes, int]:
    """Return the ranks in `model` of a tokenizer.json, after checking that its merges agree with them.

    They agree if they are in the order of ids and contain all pairs that `recover_merges` returns. They may
    contain further pairs that make the same token, as in Llama 3's file. Raises ValueError if they do not
    agree, and for another model than byte-level BPE.
    """
    # Only plain byte-level BPE is implemented.
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ValueError(f"model type {kind} is not supported; expected byte-level BPE")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"BPE with {option} = {model[option]!r} is not supported")

    # Translate from the byte alphabet.
    try:
        ranks = {to_bytes(token): i for token, i in model["vocab"].items() if token not in special_tokens}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        merges = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
        order = [ranks[left + right] for left, right in merges]
    except KeyError as error:
        raise ValueError(f"{error} does not belong in a vocabulary of byte-level tokens") from None

    # Compare the merges with those that follow from the ranks.
    for earlier, later in pairwise(order):
        if earlier > later:
            raise ValueError(f"merges are not in the order of ids: {later} is made after {earlier}")
    needed = recover_merges(ranks)
    lost = {left + right for left, right in set(needed) - set(merges)}
    if not model.get("ignore_merges"):
        lost |= {token for token in ranks if len(token) > 1} - {left + right for left, right in needed}
    if lost:
        raise ValueError(f"no merge makes {min(lost)!r} ({len(lost)} such tokens), but tiktoken would use it")
    return ranks


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn an error that a damaged file at path causes within this block into a ValueError with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, LookupError, StopIteration, TypeError) as error:
        kind = type(error).__name__
        raise ValueError(
            f"{path} is not a complete {path.name} ({kind}: {error}); download it again"
        ) from None


def read(directory: Path) -> dict:
    """Return the arguments of `write`, from a file written here or that of GPT-2, Llama 3, Qwen and others.

    directory may also be the file itself. `eot`, `roles`, `mask_lstrip`, `around` and `plain` are left out
    where the files do not contain them, and `around` also where it follows from the roles. `eot` is the
    `eos_token` in tokenizer_config.json; without it, it is left out if there is <|endoftext|>, and otherwise
    is the `sep_token`. Raises ValueError naming what is damaged, or what tiktoken would do differently
    (another algorithm, normalizer or pre-tokenizer).
    """
    path = Path(directory)
    path = path / "tokenizer.json" if path.is_dir() else path
    file, config = read_json(path, EXPECTED), read_configuration(path)

    with damage_named(path):
        nfc, pattern = read_splitting(file)
        special_tokens = {token["content"]: token["id"] for token in file["added_tokens"]}
        roles = read_roles(config, special_tokens)
        mask_lstrip = read_mask_lstrip(file["added_tokens"], roles.get("mask_token"))
        ranks = read_ranks(file["model"], special_tokens)
        around = read_around(file.get("post_processor"), special_tokens)
        if around == ((roles.get("cls_token"),), (roles.get("sep_token"),)):
            around = NOTHING

        # The token that ends a document.
        eot = name_of(config.get("eos_token"))
        roles = {role: name for role, name in roles.items() if name != eot or role not in FILLED_ROLES}
        if not eot and END_OF_TEXT not in special_tokens:
            eot = roles.get("sep_token")
        plain = read_plain(file["added_tokens"], {eot or END_OF_TEXT, *roles.values()})

        # Damaged files may have values of other types.
        for text in (pattern, *special_tokens):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not a string")
        for i in (*ranks.values(), *special_tokens.values()):
            if not isinstance(i, int):
                raise TypeError(f"id {i!r} is not an integer")
    arguments = {"ranks": ranks, "pattern": pattern, "special_tokens": special_tokens, "nfc": nfc}
    optional = {"eot": eot, "roles": roles, "mask_lstrip": mask_lstrip, "plain": plain}
    optional |= {} if around == NOTHING else {"around": around}
    return arguments | {name: value for name, value in optional.items() if value}
