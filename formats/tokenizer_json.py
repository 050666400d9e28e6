"""tokenizer.json: the file in which Hugging Face's libraries keep a byte-pair encoding.

A byte-pair encoding (see data/tokenizer.py) is its *ranks* (token -> id, in the order in which they were learned),
the *pattern* that cuts text into pre-tokens, and the *special tokens*. The file holds them like this (three
tokens were learned):

    normalizer      null, or {"type": "NFC"}: compose accents first
    pre_tokenizer   Split by the pattern, then ByteLevel: write each byte as a character of the byte alphabet
    model           type     BPE
                    vocab    {..., "a": 97, ..., "Ġt": 256, "he": 257, "Ġthe": 258, "<|endoftext|>": 259}
                    merges   [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]]
    added_tokens    [{"content": "<|endoftext|>", "id": 259, "special": true, ...}]

*Byte alphabet.* JSON keys are text, but a token is any bytes, often half a character. So GPT-2 gave each of
the 256 bytes a printable character: " the" is the key "Ġthe", and "é", two bytes in UTF-8, is "Ã©".

*Ranks and merges.* The file names the pair that each token is made of; tiktoken knows ranks only. To encode,
Hugging Face joins the adjacent pair that stands first in `merges`, tiktoken the one whose union is of lowest
rank. These agree if the merges are in the order of ranks and none is missing. So `recover_merges` finds the
merges that belong to some ranks, and reading checks that those in the file say what the ranks say.

tokenizer_config.json, beside it, names the token that ends a document (`eos_token`) and those that an encoder
such as BERT needs (`cls_token`, `sep_token`, `mask_token`, `pad_token`): their *roles*.

A decoder needs no other token than the first. But programs that convert models look for a begin-of-text and
an unknown token too, and fail or take some id if there is none. So both are written as the `eos_token`, as in
GPT-2's file, and are no roles when read as such.
"""

from itertools import pairwise
from pathlib import Path

from formats.json_file import read_json, write_json

# The roles of special tokens, by the names that transformers gives them, and the usual name of such a token.
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
STYLE = {"indent": 1, "end": ""}  # of the JSON files of tokenizers, arguments of `write_json`
FILLED_ROLES = ("bos_token", "unk_token")  # of a decoder: written as the eos_token where it has none

# GPT-2's split pattern: what ByteLevel does by itself, where the file has no Split before it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte.

    Bytes that print in Latin-1 stand for themselves; the other 68 take the characters from U+0100 on, in
    order. The space (32) comes out as "Ġ", the newline (10) as "Ċ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_text(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def to_bytes(text: str) -> bytes:
    return bytes(CHAR_TO_BYTE[char] for char in text)


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was made from, in the order of the tokens' ranks.

    Ranks say what was learned and when, not from which two parts. But at the time when a token was learned,
    its text was written with the tokens known by then: encode it with the lower ranks only, and what is left
    is the pair. A token left in more than two parts cannot be reached by merging (some published vocabularies
    have such tokens; they are used only when they are a whole pre-token) and has no entry.
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


def added_tokens(special_tokens: dict[str, int], lstrip: str | None = None) -> list[dict]:
    """The entries of special tokens in tokenizer.json. The token named by `lstrip` takes the space before it.

    A name of spaces only is one that Hugging Face finds in any text, and last, so it is not marked special.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(special_tokens.items(), key=lambda item: item[1])
    entries = [{"id": i, "content": name} | flags for name, i in by_id]
    for entry in entries:
        entry["lstrip"] = entry["content"] == lstrip
        entry["normalized"] = entry["content"].isspace()
        entry["special"] = not entry["normalized"]
    return entries


def template(special_tokens: dict[str, int], roles: dict[str, str]) -> dict | None:
    """A post-processor that puts [CLS] before a text and [SEP] behind; None for a tokenizer without them."""
    if "cls_token" not in roles or "sep_token" not in roles:
        return None
    cls, sep = roles["cls_token"], roles["sep_token"]

    def special(name: str, segment: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    single = [special(cls, 0), first, special(sep, 0)]
    ids = {name: {"id": name, "ids": [special_tokens[name]], "tokens": [name]} for name in (cls, sep)}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second, special(sep, 1)],
        "special_tokens": ids,
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
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads."""
    roles = roles or {}
    # Special tokens are in the vocabulary too: it fixes their ids, which otherwise follow on the largest.
    vocab = {to_text(token): i for token, i in ranks.items()} | special_tokens
    special = added_tokens(special_tokens, roles["mask_token"] if mask_lstrip else None)

    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    model = {
        "type": "BPE",
        "ignore_merges": True,  # a pre-token that is in the vocabulary is that token, as in tiktoken
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
        "post_processor": template(special_tokens, roles),
        "decoder": bytewise,
        "model": model,
    }
    # The general class: that of a model type (GPT2Tokenizer, Qwen2Tokenizer ...) brings its own split
    # pattern instead of the file's. (For type qwen2, transformers 5 insists on its own all the same.)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eot,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer["post_processor"] is None:  # a decoder's
        config |= dict.fromkeys(FILLED_ROLES, eot)
        config["add_bos_token"] = False  # unless told, llama.cpp puts one in front
        # transformers 4 would add token_type_ids, which no decoder's `generate` takes.
        config["model_input_names"] = ["input_ids", "attention_mask"]
    config |= roles
    if mask_lstrip:  # the name alone would take the flag away again
        mask = next(token for token in special if token["content"] == roles["mask_token"])
        config["mask_token"] = {"__type": "AddedToken"} | {k: v for k, v in mask.items() if k != "id"}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "tokenizer.json", tokenizer, **STYLE)
    write_json(directory / "tokenizer_config.json", config, **STYLE)


def read_splitting(file: dict) -> tuple[bool, str]:
    """(nfc, split pattern) of a tokenizer.json; ValueError if it prepares text in a way not known here."""
    normalizer, pre = file.get("normalizer"), file["pre_tokenizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"normalizer {str(normalizer)[:200]} is not supported, only NFC or none")
    nfc = normalizer is not None

    match pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]:
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return nfc, pattern
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return nfc, GPT2_PATTERN  # GPT-2's own file is older than the field use_regex
    raise ValueError(f"pre-tokenizer {str(pre)[:300]} is not supported, only ByteLevel or Split, ByteLevel")


def read_roles(config: dict, special_tokens: dict[str, int]) -> dict[str, str]:
    """The roles in a tokenizer_config.json, without those of tokens that the vocabulary lacks."""
    given = {role: config[role] for role in ROLES if config.get(role)}
    names = {role: token["content"] if isinstance(token, dict) else token for role, token in given.items()}
    return {role: name for role, name in names.items() if name in special_tokens}


def read_mask_lstrip(added_tokens: list[dict], mask: str | None) -> bool:
    """Whether the mask token takes the space before it; ValueError if another one does, or takes more."""
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


def read_ranks(model: dict, special_tokens: dict[str, int]) -> dict[bytes, int]:
    """Ranks from the vocabulary of a tokenizer.json's model, once its merges are known to say the same.

    They do if the list is in the order of ids (several ways to make one token may follow each other, as in
    Llama 3's file), and if every token's own last pair is in it.
    """
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ValueError(f"model type {kind} is not supported, only byte-level BPE")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"BPE with {option} = {model[option]!r} is not supported")

    try:
        ranks = {to_bytes(token): i for token, i in model["vocab"].items() if token not in special_tokens}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        merges = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
        order = [ranks[left + right] for left, right in merges]
    except KeyError as error:
        raise ValueError(f"{error} does not belong in a vocabulary of byte-level tokens") from None

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


def read(directory: Path) -> dict:
    """The arguments of `write`, from a file written here or from GPT-2's, Llama 3's, Qwen's and their like.

    `directory` may also be the file itself. Those of `eot`, `roles` and `mask_lstrip` that it says nothing of
    are left out. Documents end with tokenizer_config.json's `eos_token`, else <|endoftext|>, else the
    `sep_token`. Raises ValueError for what tiktoken would do differently (another algorithm, normalizer or
    splitter), naming it.
    """
    path = Path(directory)
    path = path / "tokenizer.json" if path.is_dir() else path
    config_path = path.with_name("tokenizer_config.json")
    file = read_json(path, EXPECTED)
    config = read_json(config_path) if config_path.exists() else {}

    try:
        nfc, pattern = read_splitting(file)
        special_tokens = {token["content"]: token["id"] for token in file["added_tokens"]}
        roles = read_roles(config, special_tokens)
        mask_lstrip = read_mask_lstrip(file["added_tokens"], roles.get("mask_token"))
        ranks = read_ranks(file["model"], special_tokens)
        eos = config.get("eos_token")
        eot = eos["content"] if isinstance(eos, dict) else eos
        roles = {role: name for role, name in roles.items() if name != eot or role not in FILLED_ROLES}
        if not eot and END_OF_TEXT not in special_tokens:
            eot = roles.get("sep_token")

        for text in (pattern, *special_tokens, *([eot] if eot else [])):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is no text")
        for i in (*ranks.values(), *special_tokens.values()):
            if not isinstance(i, int):
                raise TypeError(f"id {i!r} is no whole number")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        kind = type(error).__name__
        raise ValueError(f"{path} is no whole tokenizer.json ({kind}: {error}); get it again") from None
    arguments = {"ranks": ranks, "pattern": pattern, "special_tokens": special_tokens, "nfc": nfc}
    optional = {"eot": eot, "roles": roles, "mask_lstrip": mask_lstrip}
    return arguments | {name: value for name, value in optional.items() if value}
