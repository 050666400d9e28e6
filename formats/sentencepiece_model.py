"""tokenizer.model: the file of SentencePiece, translated to the content of a tokenizer.json.

The file is a message of Protocol Buffers (protobuf.dev/programming-guides/encoding): a sequence of fields,
each a key and a value. The upper bits of a key are the number of the field, the lowest three the type of the
value. Type 0 is a whole number of variable length, 1 and 5 are eight and four bytes, and 2 is a length and as
many bytes, which may be another message. These fields are read:

    1  a piece, once for each id      1 text, 2 score (float), 3 type: 1 normal, 2 unknown, 3 control,
                                      4 defined by the user, 5 unused, 6 byte
    2  how it was trained             3 algorithm: 1 unigram, 2 BPE; 22 split_by_whitespace;
                                      24 treat_whitespace_as_suffix; 35 byte_fallback
    3  how text is normalised         2 the character map, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
                                      5 escape_whitespaces

The special tokens depend on the family: T5 adds sentinels, and the ids of XLM-RoBERTa begin with four tokens
of fairseq, the library that it was trained with. The family is the tokenizer_class in tokenizer_config.json,
or else follows from the model_type in config.json. Without these two, the pieces are SentencePiece's own.
"""

import base64
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from formats import tokenizer_json
from formats.json_file import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces
ALGORITHM, SPLIT_AT_SPACES, SPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 22, 24, 35  # fields of the trainer
CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5  # fields of the normaliser
SPACE = "▁"  # stands for a space in pieces
FAMILIES = {  # model_type: tokenizer_class
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "t5": "T5Tokenizer",
    "albert": "AlbertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")  # the first four ids of XLM-RoBERTa
# The tokens that each family puts in front of a text and behind it.
AROUND = {
    "LlamaTokenizer": (("<s>",), ()),
    "GemmaTokenizer": (("<bos>",), ()),
    "T5Tokenizer": ((), ("</s>",)),
    "AlbertTokenizer": (("[CLS]",), ("[SEP]",)),
    "DebertaV2Tokenizer": (("[CLS]",), ("[SEP]",)),
    "XLMRobertaTokenizer": (("<s>",), ("</s>",)),
}


Piece = tuple[str, float, int]  # text, score, type


def number(data: bytes, at: int) -> tuple[int, int]:
    """Return the whole number of variable length at a place of data, and the place behind it.

    Each byte holds seven bits, the lowest first; the eighth bit is set if another byte follows.
    """
    value, shift = 0, 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of each field of a message. Raises ValueError or IndexError if it is damaged."""
    at = 0
    while at < len(data):
        key, at = number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = number(data, at)
        elif kind in (1, 2, 5):
            length, at = number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("it ends within a field")
        else:
            raise ValueError(f"no field has type {kind}")
        yield key >> 3, value


def parse(data: bytes) -> tuple[list[Piece], dict, dict]:
    """Return the pieces of a model, and the fields of its trainer and of its normaliser.

    If data is damaged, it raises one of the errors that `read` turns into a ValueError with the path.
    """
    pieces, trainer, normalizer = [], {}, {}
    for field, value in fields(data):
        if field == 1:
            piece = dict(fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, trainer, normalizer


def merges(scores: dict[str, float]) -> list[list[str]]:
    """Return the merges of SentencePiece's BPE: the pairs of pieces that make a piece, best score first.

    scores: of the pieces.
    """
    found = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += [(score, left, right) for left, right in cuts if left in scores and right in scores]
    found.sort(key=lambda item: (item[0], len(item[1]), len(item[2])), reverse=True)
    return [[left, right] for _, left, right in found]


def normalizers(settings: dict, config: dict, family: str | None) -> list[dict]:
    """Return the normalizers of a tokenizer.json, in their order.

    settings: the fields of the model's normaliser. config: the content of tokenizer_config.json.
    """
    parts: list[dict] = []
    if family == "AlbertTokenizer":
        parts += [replace({"String": quotes}, '"') for quotes in ("``", "''")]
        if not config.get("keep_accents"):
            parts += [{"type": "NFKD"}, {"type": "StripAccents"}]
    if config.get("do_lower_case", family == "AlbertTokenizer"):
        parts.append({"type": "Lowercase"})
    # SentencePiece replaces the longest key at each place; see data/charsmap.py.
    if settings.get(CHARSMAP):
        charsmap = base64.b64encode(settings[CHARSMAP]).decode()
        parts.append({"type": "Precompiled", "precompiled_charsmap": charsmap, "longest": True})
    if settings.get(REMOVE_SPACES, 1):
        # Engines differ in whether ^ and $ match beside a line break, so the ends are where no character is.
        ends = rf"(?<![\s\S]) +|[ {SPACE}]+(?![\s\S])"
        parts += [replace({"Regex": ends}, ""), replace({"Regex": " {2,}"}, " ")]
    if settings.get(DUMMY_PREFIX, 1):
        parts.append({"type": "Prepend", "prepend": SPACE})
    return [*parts, replace({"String": " "}, SPACE)]


def replace(pattern: dict, content: str) -> dict:
    """Return the part of a tokenizer.json, a normalizer or a decoder, that replaces a pattern."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def family_pieces(pieces: list[Piece], config: dict, family: str | None) -> list[Piece]:
    """Return the pieces of a SentencePiece model with those that its family adds or changes.

    config: the content of tokenizer_config.json.
    """
    if family == "XLMRobertaTokenizer":  # <unk>, <s> and </s>, the first three, become fairseq's four
        first = [(name, 0.0, UNKNOWN if name == "<unk>" else CONTROL) for name in FAIRSEQ]
        return [*first, *pieces[3:], ("<mask>", 0.0, CONTROL)]
    if family == "T5Tokenizer":
        n_extra = config.get("extra_ids", 100)
        return pieces + [(f"<extra_id_{i}>", 0.0, CONTROL) for i in reversed(range(n_extra))]
    if family == "DebertaV2Tokenizer" and "[MASK]" not in [piece for piece, _, _ in pieces]:
        return [*pieces, ("[MASK]", 0.0, CONTROL)]
    if family == "AlbertTokenizer":  # the lower score keeps pieces such as "9," from being used
        commas = [piece[-1:] == "," and piece[-2:-1].isdigit() for piece, _, _ in pieces]
        return [(p, s - 100 * comma, t) for (p, s, t), comma in zip(pieces, commas, strict=True)]
    return pieces


def check_spaces(pieces: list[Piece], trainer: dict, settings: dict) -> None:
    """Raise ValueError for another treatment of spaces than one before each word, and for user-defined pieces
    where spaces are added or removed.

    Such a piece becomes an added token, which is found before a text is normalised. So each part of the text
    beside it would get a space in front, where SentencePiece writes one for the whole text.
    """
    advice = "is not implemented; use a directory with tokenizer.json"
    if trainer.get(SPACE_AS_SUFFIX) or not settings.get(ESCAPE_SPACES, 1):
        option = "treat_whitespace_as_suffix" if trainer.get(SPACE_AS_SUFFIX) else "escape_whitespaces false"
        raise ValueError(f"{option} {advice}")
    options = {"add_dummy_prefix": DUMMY_PREFIX, "remove_extra_whitespaces": REMOVE_SPACES}
    option = next((name for name, field in options.items() if settings.get(field, 1)), None)
    defined = next((piece for piece, _, kind in pieces if kind == USER_DEFINED), None)
    if None not in (option, defined):
        raise ValueError(f"user-defined piece {defined!r} with {option} {advice}")


def translate(data: bytes, config: dict, family: str | None) -> dict:
    """Return the content of a tokenizer.json for data, the bytes of a SentencePiece model.

    config: the content of tokenizer_config.json. family: a tokenizer_class, or None. Raises ValueError for
    another algorithm than unigram and BPE, and as `check_spaces` does.
    """
    pieces, trainer, settings = parse(data)
    algorithm = {1: "Unigram", 2: "BPE"}.get(trainer.get(ALGORITHM, 1))
    if algorithm is None:
        raise ValueError("its algorithm is neither unigram nor BPE; use a directory with tokenizer.json")
    check_spaces(pieces, trainer, settings)

    # The model.
    pieces = family_pieces(pieces, config, family)
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError("it has no unknown token")
    if len({piece for piece, _, _ in pieces}) < len(pieces):
        twice = Counter(piece for piece, _, _ in pieces).most_common(1)[0][0]
        raise ValueError(f"piece {twice!r} occurs twice")
    model: dict = {"type": algorithm, "byte_fallback": bool(trainer.get(BYTE_FALLBACK))}
    if algorithm == "Unigram":
        model |= {"unk_id": unknown, "vocab": [[piece, score] for piece, score, _ in pieces]}
    else:
        normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
        model |= {"vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)}, "merges": merges(normal)}
        model |= {"unk_token": pieces[unknown][0], "fuse_unk": True}

    # The parts before and after the model. Where runs of spaces are kept, or pieces go across spaces, text is
    # not cut at spaces.
    has_prefix, removes_spaces = settings.get(DUMMY_PREFIX, 1), settings.get(REMOVE_SPACES, 1)
    is_cut = removes_spaces and trainer.get(SPLIT_AT_SPACES, 1)
    words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True}
    decoders = [replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    added = {p: i for i, (p, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    around = AROUND.get(family, tokenizer_json.NOTHING)
    for name in (*around[0], *around[1]):
        if name not in added:
            raise ValueError(f"it has no {name}, which {family} puts around a text")
    entries = tokenizer_json.added_tokens(added, "[MASK]" if "[MASK]" in added else "<mask>")
    for entry in entries:
        entry["normalized"], entry["special"] = False, pieces[entry["id"]][2] != USER_DEFINED
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": {"type": "Sequence", "normalizers": normalizers(settings, config, family)},
        "pre_tokenizer": words if is_cut else None,
        "post_processor": tokenizer_json.template(added, {}, around),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def read(path: Path, config: dict) -> dict:
    """Return the content of a tokenizer.json for the SentencePiece model at path.

    config: the content of tokenizer_config.json. Raises ValueError for a file that is missing, damaged or not
    implemented, and for a family that is not in AROUND.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a SentencePiece model")
    config_path = path.with_name("config.json")
    model_type = read_json(config_path).get("model_type") if config_path.is_file() else None
    family = str(config.get("tokenizer_class") or FAMILIES.get(str(model_type), model_type) or "")
    family = family.removesuffix("Fast") or None
    if family is not None and family not in AROUND:
        known = ", ".join(AROUND)
        raise ValueError(
            f"{path}: {family} is not supported without a tokenizer.json; expected one of {known}"
        )
    try:
        return translate(path.read_bytes(), config, family)
    except (ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model that can be read: {error}") from None
