"""Conversations about images: files of LLaVA's format, labels beside the tokens, and cuts beside images."""

import json

import numpy as np
import pytest
from PIL import Image

from data.image_conversations import (
    IGNORED,
    FileTalks,
    SceneTalks,
    Seen,
    TalkRows,
    Writing,
    about,
    as_row,
    as_tokens,
    before_answer,
    length_within,
    read_seen,
)
from data.tokenizer import get_tokenizer
from formats.chat_template import ImageTokens, end_id, prompt_tokens, render

TOKENIZER = get_tokenizer("bytes").with_special_tokens({}, ["<image>"])
IMAGE = ImageTokens(TOKENIZER.special_tokens["<image>"], 3)
TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A <image> of red."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with an image that is wider than high, red on blue."""
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (20, 10), (200, 0, 0))
    image.paste((0, 0, 200), (10, 0, 20, 10))
    image.save(tmp_path / "a" / "1.png")
    return tmp_path


def read(folder, *records):
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_seen(path, folder)


def test_llavas_records_captions_and_text_alone_are_read(folder):
    text = {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}
    caption = {"image": "a/1.png", "caption": "Red and blue."}
    seen, named, alone = read(folder, {"id": 7, "image": "a/1.png", "conversations": TURNS}, caption, text)
    assert [message["content"] for message in seen.messages] == [turn["value"] for turn in TURNS]
    assert seen.image == named.image == folder / "a" / "1.png" and alone.image is None
    assert [m["content"] for m in named.messages] == ["<image>", "Red and blue."]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"image": "a/1.png", "conversations": TURNS[2:]}, "0 times <image> in the questions, but the image"),
        ({"conversations": TURNS}, "1 times <image> in the questions, but no image"),
        ({"image": "a/2.png", "conversations": TURNS}, "'a/2.png': no such file in the folder"),
        ({"image": "../1.png", "conversations": TURNS}, "expected a name relative to the folder"),
        ({"image": "/etc/passwd", "conversations": TURNS}, "expected a name relative to the folder"),
        ({"image": ["a/1.png"], "conversations": TURNS}, "expected the name of one file"),
        ({"image": "a/1.png", "caption": 3}, "assistant: 3: expected a string"),
        ([1, 2], "expected {"),
    ],
)
def test_other_records_are_refused_with_their_line(folder, record, words):
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 1: byte 0: ") as error:
        read(folder, record)
    assert words in str(error.value)
    with pytest.raises(ValueError, match=r"--images .*missing: no such folder"):
        read_seen(folder / "talks.jsonl", folder / "missing")


def test_answers_and_their_ends_are_learned_and_an_image_takes_its_tokens_in_the_question():
    messages = [{"role": "system", "content": "Be kind."}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": t["value"]} for i, t in enumerate(TURNS)]
    tokens, learned = as_tokens(messages, TOKENIZER, IMAGE, 2)
    assert tokens.count(IMAGE.id) == 3  # the "<image>" in the answer is text
    said = [t for t, flag in zip(tokens, learned, strict=True) if flag]
    end = [end_id(TOKENIZER)]
    assert said == TOKENIZER.encode("A <image> of red.") + end + TOKENIZER.encode("Yes.") + end
    # What precedes an answer is what precedes it in inference, and without an image nothing changes.
    before = before_answer(messages, TOKENIZER, IMAGE, 2)
    assert before == prompt_tokens(messages[:2], TOKENIZER, IMAGE)
    assert tokens[: len(before)] == before and not any(learned[: len(before)]) and learned[len(before)]
    assert as_tokens(messages, TOKENIZER, ImageTokens(IMAGE.id, 0), 2)[0] == [
        t for t in tokens if t != IMAGE.id
    ]
    assert render(messages, TOKENIZER)[0].count(IMAGE.id) == 0

    # Stage 1: the image and the first answer, without a question.
    tokens, learned = as_tokens(messages, TOKENIZER, IMAGE, 1)
    expected = [TOKENIZER.eot_id, *[IMAGE.id] * 3, *TOKENIZER.encode("A <image> of red."), *end]
    assert before_answer(messages, TOKENIZER, IMAGE, 1) == expected[:4]
    assert tokens == expected and learned == [False] * 4 + [True] * (len(tokens) - 4)


def test_targets_are_the_next_learned_token_and_padding_is_never_predicted():
    row = as_row([5, IMAGE.id, 7, 8, 9], [False, False, False, True, True], 8, IMAGE, 0)
    assert row["tokens"].tolist() == [5, IMAGE.id, 7, 8, 9, 0, 0, 0] and row["length"] == 5
    assert row["targets"].tolist() == [IGNORED, IGNORED, 8, 9, *[IGNORED] * 4]


def test_a_cut_is_never_inside_of_an_image():
    tokens = [1, 2, *[IMAGE.id] * 3, 4, 5]
    kept = {n: length_within(tokens, n, IMAGE) for n in range(1, 9)}
    assert kept == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 6, 7: 7, 8: 7}
    # Images that follow each other are kept or left out one by one.
    twice = [1, *[IMAGE.id] * 6, 4]
    assert [length_within(twice, n, IMAGE) for n in range(1, 9)] == [1, 1, 1, 4, 4, 4, 7, 8]
    assert as_row([IMAGE.id] * 3, [False] * 3, 2, IMAGE, 0)["length"] == 0


def test_an_image_that_is_not_square_gets_a_border_of_its_mean_colour_and_text_alone_a_blank(folder):
    talks = FileTalks([Seen(about("?", "!"), folder / "a" / "1.png"), Seen(about("?", "!"), None)])
    rows = TalkRows(talks, Writing(TOKENIZER, IMAGE, 2, 64, (3, 8, 8)))
    image = rows[0]["image"]
    assert image.shape == (3, 8, 8) and not rows[1]["image"].any()
    assert np.array_equal(image[:, 0], np.tile([[100], [0], [100]], 8))  # the border above
    assert (image[:, 4, 1] == [200, 0, 0]).all() and (image[:, 4, 6] == [0, 0, 200]).all()
    (folder / "a" / "1.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"1\.png: not an image"):
        rows[0]


def test_scenes_are_asked_every_question_or_one_each_or_described():
    talks = SceneTalks({"val": 3, "unseen": 2}, captions=False)
    assert len(talks) == 5 * 8 and talks[39].image == 4
    assert talks[8].messages[0]["content"].startswith("<image>\nWhat colour is the ")
    once = SceneTalks({"val": 3}, captions=False, every=False)
    assert [once[i].image for i in range(3)] == [0, 1, 2]
    assert "What shape" in once[1].messages[0]["content"]
    told = SceneTalks({"val": 3}, captions=True)
    assert len(told) == 3 and told[0].messages[0]["content"] == "<image>"
    assert told.pixels(2, (1, 16, 16)).shape == (1, 16, 16)
