"""formats/sentencepiece_model.py: ids equal those that SentencePiece gave for the same files."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from data.pipeline import Pipeline
from data.tokenizer import get_tokenizer
from formats.sentencepiece_model import fields, parse

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
MODELS = ("llama2/tokenizer.model", "t5/spiece.model")


def alone(path: str, tmp_path: Path, config: dict | None = None) -> Path:
    """Return a directory that holds only a model, and maybe a tokenizer_config.json."""
    shutil.copy(FIXTURES / path, tmp_path)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("path", MODELS)
def test_ids_are_those_of_sentencepiece(path, tmp_path):
    tokenizer = get_tokenizer(str(alone(path, tmp_path)))
    for text, ids in zip(EXPECTED["texts"], EXPECTED[path], strict=True):
        found = tokenizer.encode(text)
        if found != ids:  # equally probable segmentations, which the rounding of 32 bits decides
            assert len(set(text.split()[0])) == 1 and sorted(found) == sorted(ids), text


def test_families_have_their_own_tokens(tmp_path):
    llama = get_tokenizer(str(alone(MODELS[0], tmp_path, {"tokenizer_class": "LlamaTokenizer"})))
    published = Pipeline.load(FIXTURES / "llama2")
    assert llama.begin_ids == [1] and llama.eot == "</s>"
    for text in EXPECTED["texts"][::5]:
        assert llama.encode(text, "all") == published.encode(text, "all")


def test_t5_has_sentinels_and_its_end_behind_a_text(tmp_path):
    alone(MODELS[1], tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    t5, published = get_tokenizer(str(tmp_path)), Pipeline.load(FIXTURES / "t5")
    assert t5.special_tokens == published.special_tokens and t5.n_vocab == published.n_vocab
    assert t5.begin_ids == [] and t5.around == ((), ("</s>",))
    text = "Thank you <extra_id_0> me<extra_id_1>"
    assert t5.encode(text, "all") == published.encode(text, "all")
    t5.save(tmp_path / "saved")
    again = get_tokenizer(str(tmp_path / "saved"))
    assert [again.encode(text) for text in EXPECTED["texts"]] == [
        t5.encode(text) for text in EXPECTED["texts"]
    ]


def test_robertas_numbering_begins_with_four_tokens_of_fairseq(tmp_path):
    # SentencePiece's own ids of this model are <pad>, </s>, <unk>: pieces begin at 3, here at 4.
    alone(MODELS[1], tmp_path, {"tokenizer_class": "XLMRobertaTokenizerFast"})
    bare, tokenizer = parse((tmp_path / "spiece.model").read_bytes())[0], get_tokenizer(str(tmp_path))
    assert [tokenizer.pieces[i] for i in range(5)] == ["<s>", "<pad>", "</s>", "<unk>", bare[3][0]]
    assert tokenizer.pieces[tokenizer.n_vocab - 1] == "<mask>" and tokenizer.mask_id == tokenizer.n_vocab - 1
    assert tokenizer.roles["cls_token"] == "<s>" and tokenizer.around == (("<s>",), ("</s>",))


def test_albert_and_deberta_prepare_text_in_their_own_ways(tmp_path):
    alone(MODELS[1], tmp_path, {"tokenizer_class": "AlbertTokenizer", "eos_token": "</s>"})
    with pytest.raises(ValueError, match=r"it has no \[CLS\], which AlbertTokenizer puts around a text"):
        get_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PegasusTokenizer"}')
    with pytest.raises(ValueError, match=r"PegasusTokenizer is not supported without a tokenizer\.json"):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "it has no pieces"),
        (b"IQ== 0\nIg== 1\n", ""),  # the tokenizer.model of Llama 3, which is tiktoken's file
        (b"\x80\x04\x95\x10", ""),  # a pickle
        (b"\x0a\xff\xff\xff\xff\x0f", "ends within a field"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x03", "neither unigram nor BPE"),
        (b"\x0a\x03\x0a\x01a", "no unknown token"),
        (b"\x0a\x05\x0a\x01a\x18\x02" * 2, "piece 'a' occurs twice"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x12\x03\xc0\x01\x01", "treat_whitespace_as_suffix is not implemented"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x1a\x02\x28\x00", "escape_whitespaces false is not implemented"),
        (b"\x0a\x05\x0a\x01a\x18\x04", "user-defined piece 'a' with add_dummy_prefix is not implemented"),
        (
            b"\x0a\x05\x0a\x01a\x18\x04\x1a\x02\x18\x00",
            "'a' with remove_extra_whitespaces is not implemented",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(raw, words, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ValueError, match="is not a SentencePiece model that can be read") as raised:
        get_tokenizer(str(tmp_path))
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / "tokenizer.model") in str(raised.value)


def test_pieces_go_across_spaces_and_only_the_very_end_is_stripped(tmp_path):
    """As in sentencepiece with split_by_whitespace=False, and with a map that keeps line breaks."""

    def model(*pieces: str, split: int) -> bytes:
        scores = [struct.pack("<f", -1.0 / len(piece)) for piece in pieces]
        entries = [b"\x0a" + bytes([len(piece.encode())]) + piece.encode() + b"\x15" for piece in pieces]
        whole = [entry + score for entry, score in zip(entries, scores, strict=True)]
        data = b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in whole)
        return data + b"\x0a\x09\x0a\x05<unk>\x18\x02" + b"\x12\x03\xb0\x01" + bytes([split])

    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    found = {}
    for split in (0, 1):
        (tmp_path / "tokenizer.model").write_bytes(model("▁", "a", "b", "▁a▁b", split=split))
        tokenizer = get_tokenizer(str(tmp_path))
        found[split] = [[tokenizer.pieces[i] for i in tokenizer.encode(text)] for text in (" a  b ", "a \n")]
    assert found[0] == [["▁a▁b"], ["▁", "a", "▁", "<unk>"]]
    assert found[1] == [["▁", "a", "▁", "b"], ["▁", "a", "▁", "<unk>"]]


def test_fields_of_all_types():
    data = b"\x08\xac\x02" + b"\x15" + struct.pack("<f", 1.5) + b"\x1a\x02hi" + b"\x21" + bytes(8)
    assert list(fields(data)) == [(1, 300), (2, struct.pack("<f", 1.5)), (3, b"hi"), (4, bytes(8))]
