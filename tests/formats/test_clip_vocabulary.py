"""CLIP's vocab.json and merges.txt: the ids and texts of CLIPTokenizer (recorded), and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from data.pipeline import Pipeline
from data.tokenizer import get_tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "clip-vocabulary"


def test_ids_and_decoded_texts_are_those_of_clips_tokenizer():
    tokenizer, expected = get_tokenizer(str(FOLDER)), json.loads((FOLDER / "expected.json").read_text())
    assert len(expected["texts"]) == 4
    for text, ids, decoded in zip(*expected.values(), strict=True):
        assert [*tokenizer.begin_ids, *tokenizer.encode(text, "all"), tokenizer.eot_id] == ids
        assert tokenizer.decode(ids) == decoded
    # The largest id ends a text, which models from before 2023 rely on.
    assert tokenizer.eot_id == tokenizer.n_vocab - 1


def test_a_saved_vocabulary_is_opened_by_transformers_with_the_same_ids_and_texts(tmp_path):
    from transformers import AutoTokenizer

    get_tokenizer(str(FOLDER)).save(tmp_path)
    theirs, expected = (
        AutoTokenizer.from_pretrained(tmp_path),
        json.loads((FOLDER / "expected.json").read_text()),
    )
    again = Pipeline.load(tmp_path)
    for text, ids, decoded in zip(*expected.values(), strict=True):
        assert theirs(text).input_ids == ids and theirs.decode(ids) == decoded == again.decode(ids)


def test_a_tokenizer_json_whose_class_replaces_the_end_of_words_is_decoded_alike(tmp_path):
    get_tokenizer(str(FOLDER)).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text())
    file["decoder"] = file["decoder"]["decoders"][0]  # as CLIPTokenizer writes it
    path.write_text(json.dumps(file))
    tokenizer = Pipeline.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("A cat's dog")) == "a cat 's dog"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("vocab.json", '{"a": 0}', "has no <|startoftext|> and <|endoftext|>"),
        ("merges.txt", "#version: 0.2\na b c\n", "line 'a b c': expected two pieces that make a third"),
        ("merges.txt", "#version: 0.2\n\udcff", "merges.txt: not UTF-8"),
        ("merges.txt", None, "no such file; expected the merges of"),
    ],
)
def test_another_or_a_damaged_vocabulary_is_one_line(name, text, words, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "v")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        get_tokenizer(str(folder))
