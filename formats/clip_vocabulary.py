"""CLIP's vocabulary as OpenAI publishes it: vocab.json and merges.txt, translated to a tokenizer.json.

    vocab.json    {piece: id}: the 256 bytes, each of them with "</w>", the merged pieces, two special tokens
    merges.txt    a heading, then a pair of pieces on each line, in the order in which they are merged

Texts are lower-cased, and runs of spaces become one space. The last piece of a word ends with "</w>"; GPT-2
instead puts a space before the first piece of the next word. In a decoded text "</w>" becomes a space: in
transformers the class CLIPTokenizer does that, not the decoder in the file, so `with_spaces` adds it to the
decoder. Directories that transformers writes have a tokenizer.json, which data/pipeline.py reads; older ones
hold the two files alone.
"""

from pathlib import Path

from formats.json_file import read_json

FILES = ("vocab.json", "merges.txt")
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
# OpenAI's pattern of what is a word.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read(path: Path) -> dict:
    """Return the content of a tokenizer.json for the vocab.json at path and the merges.txt beside it.

    Raises ValueError for a file that is missing or damaged, and for a vocabulary of another kind.
    """
    vocab, merges_path = read_json(path), path.with_name(FILES[1])
    if not (START in vocab and END in vocab):
        raise ValueError(
            f"{path}: has no {START} and {END}, as CLIP's has; expected a tokenizer.json beside it"
        )
    if not merges_path.is_file():
        raise ValueError(f"{merges_path}: no such file; expected the merges of {path}")
    try:
        lines = merges_path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_path}: not UTF-8 ({error}); download it again") from None
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for merge in merges:
        if len(merge) != 2 or "".join(merge) not in vocab:
            raise ValueError(
                f"{merges_path}: line {' '.join(merge)!r:.80}: expected two pieces that make a third"
            )

    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    model = {"type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": ""}
    model |= {"end_of_word_suffix": SUFFIX, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    around = {"type": "RobertaProcessing", "sep": [END, vocab[END]], "cls": [START, vocab[START]]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[name], "content": name, **special} for name in (START, END)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": around | {"trim_offsets": False, "add_prefix_space": False},
        "decoder": bytewise | {"add_prefix_space": True},
        "model": model | {"vocab": vocab, "merges": merges},
    }


def with_spaces(file: dict) -> dict:
    """Return the content of a tokenizer.json whose decoder writes a space at the end of a word.

    file: the content of any tokenizer.json. It is changed only if its pieces mark the end of a word, as by
    "</w>", and its decoder only turns bytes into text.
    """
    suffix, decoder = file["model"].get("end_of_word_suffix"), file.get("decoder")
    if not suffix or not decoder or decoder.get("type") != "ByteLevel":
        return file
    space = {"type": "Replace", "pattern": {"String": suffix}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 1}
    return file | {"decoder": {"type": "Sequence", "decoders": [decoder, space, strip]}}
