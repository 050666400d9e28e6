"""Images with captions: drawn sets and their tests, files of records, captions by epoch, tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import captions, scenes
from data.captions import CaptionRows, Part, as_dataset, choose_tokenizer, encode, read
from data.tokenizer import get_tokenizer


def photo(path, value):
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Nine images with captions in metadata.jsonl, the first of which has three captions on two lines."""
    for i in range(9):
        photo(tmp_path / f"{i}.png", 20 * i)
    rows = [{"file_name": f"{i}.png", "text": f"grey number {i}"} for i in range(9)]
    rows.append({"image": "0.png", "caption": ["black", " dark "]})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_held_out_glyphs_are_classified_by_prompts_that_describe_their_classes():
    train, held = captions.glyph_parts("glyphs")
    assert (len(train.images), len(held.images)) == (1172, 130) and held.images.shape[1:] == (1, 32, 32)
    assert not set(train.captions) & set(held.captions)
    ways = {one.name: one for one in held.classes}
    assert [len(one.prompts) for one in ways.values()] == [62, 21, 1302]
    assert [len(one.prompts[0]) for one in ways.values()] == [21, 62, 1]
    for one in ways.values():
        for (text,), answer in zip(held.captions, one.answers, strict=True):
            assert text in one.prompts[answer]


def test_held_out_scenes_have_wrong_captions_of_the_same_words(monkeypatch):
    monkeypatch.setattr(captions, "N_SCENES", 20)
    monkeypatch.setattr(captions, "N_HELD_OUT", 5)
    train, held = captions.scene_parts()
    assert len(train.images) == 20 and held.images.shape == (10, 3, 32, 32)
    assert held.groups == {"": range(5), "unseen pairs": range(5, 10)}
    unseen = {f"{colour} {shape}" for colour, shape in scenes.HELD_OUT}
    assert all(any(pair in text for pair in unseen) for (text,) in held.captions[5:])
    assert not any(pair in text for pair in unseen for (text,) in train.captions + held.captions[:5])
    colours, relation = held.swaps
    for (right,), wrong, turned in zip(held.captions, colours.wrong, relation.wrong, strict=True):
        assert wrong != right != turned and sorted(wrong.split()) == sorted(right.split())


def test_records_name_images_beside_them_and_an_image_collects_its_captions(folder, tmp_path):
    train, held = read(str(folder), (4, 4), tmp_path / "cache")
    assert (len(train.images), len(held.images)) == (8, 1) and train.images.shape[1:] == (3, 4, 4)
    by_value = {
        int(image[0, 0, 0]): texts
        for part in (train, held)
        for image, texts in zip(part.images, part.captions, strict=True)
    }
    assert by_value[0] == ("grey number 0", "black", "dark") and by_value[160] == ("grey number 8",)
    # A file of its own, and other images held out.
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join(lines[:5]))
    (folder / "others.csv").write_text("image,caption\n7.png,seven\n8.png,eight\n")
    options = {"val": str(folder / "others.csv"), "channels": 1}
    train, held = read(str(folder / "some.jsonl"), (4, 4), tmp_path / "cache", **options)
    assert (len(train.images), held.captions) == (5, [("seven",), ("eight",)]) and held.images.shape[1] == 1


def test_what_is_missing_or_damaged_is_named_or_left_out(folder, tmp_path):
    def refused(data=folder, **options):
        with pytest.raises(ValueError) as error:
            read(str(data), (4, 4), tmp_path / "cache", **options)
        return str(error.value)

    assert "not found" in refused("nowhere.tar")
    assert "expected glyphs, scenes, a file of records" in refused("photo.png")
    assert "glyphs has a held-out part of its own" in refused("glyphs", val="x")
    assert "is among --data, too" in refused(val=str(folder))
    path = folder / "metadata.jsonl"
    good = path.read_text()
    for line, words in (
        ('{"image": "missing.png", "caption": "a"}', "missing.png: no such image beside this file"),
        ('{"image": "1.png", "caption": 3}', 'expected a "caption"'),
        ('{"image": "1.png", "caption": " "}', "the caption is empty"),
        ('{"caption": "a"}', "expected records"),
    ):
        path.write_text(good + line + "\n")
        assert words in refused()
        train, held = read(str(folder), (4, 4), tmp_path / "cache", bad="skip", notify=lambda line: None)
        assert len(train.images) + len(held.images) == 9
    path.write_text(good)
    (folder / "3.png").write_bytes(b"no image")
    assert "3.png: not an image" in refused()
    train, held = read(str(folder), (4, 4), tmp_path / "cache", bad="skip", notify=lambda line: None)
    texts = {text for part in (train, held) for some in part.captions for text in some}
    assert len(train.images) + len(held.images) == 8 and "grey number 3" not in texts
    assert "grey number 4" in texts


def test_an_image_has_its_next_caption_in_each_epoch():
    part = Part(np.zeros((2, 1, 2, 2), np.uint8), [("a", "b"), ("c",)])
    rows = CaptionRows(part, np.arange(3, dtype=np.int32)[:, None], augment=True)
    assert [rows[i]["tokens"].item() for i in range(6)] == [0, 2, 1, 2, 0, 2]
    assert rows[0]["tokens"].dtype == np.int64 and rows[0]["augment"]


def test_a_caption_ends_with_its_end_token_also_where_it_is_cut():
    tokenizer = get_tokenizer("bytes")
    table, n_cut = encode(["abc", "a", ""], tokenizer, 4)
    assert table.tolist() == [[97, 98, 99, 256], [97, 256, 256, 256], [256, 256, 256, 256]] and n_cut == 0
    table, n_cut = encode(["abcd", "a"], tokenizer, 4, length=6)
    assert table.tolist() == [[97, 98, 99, 256, 256, 256], [97, 256, 256, 256, 256, 256]] and n_cut == 1
    folder = Path(__file__).parents[1] / "fixtures" / "clip-vocabulary"
    clips = get_tokenizer(str(folder))
    assert encode(["a"], clips, 9)[0].tolist() == [[694, 320, 695]]


def test_a_tokenizer_is_learned_from_the_captions_and_both_parts_have_one_length(folder, tmp_path):
    parts = read(str(folder), (4, 4), tmp_path / "cache")
    tokenizer = choose_tokenizer("bpe:300", parts)
    assert 256 < tokenizer.n_vocab <= 300
    dataset = as_dataset(parts, tokenizer, 77)
    assert dataset.train.tokens.shape[1] == dataset.val.tokens.shape[1] < 20
    assert "8 images of 4 x 4 to learn from, 1 held out; 11 captions" in dataset.summary
    other = as_dataset(parts, get_tokenizer("bytes"), 5)
    assert other.fingerprint != dataset.fingerprint and "10 of them cut to 5 tokens" in other.summary
    assert as_dataset(parts, tokenizer, 77, 30).train.tokens.shape[1] == 30
