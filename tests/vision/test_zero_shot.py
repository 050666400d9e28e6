"""The figures of a trained model of images and texts: right answers, chance, ties, and folders of images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data.captions import CaptionRows, Part, Swap
from data.tokenizer import get_tokenizer
from vision import zero_shot

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ByColour(nn.Module):
    """A model whose vectors are the mean colour of an image, and the colour that a text begins with."""

    config = SimpleNamespace(
        layout="clip", objective="softmax", max_seq_len=9, n_channels=3, size=(2, 2), eos_token_id=256
    )

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def normalized(self, images):
        return images

    def encode_images(self, images):
        return images.mean(dim=(2, 3))

    def encode_texts(self, tokens):
        return torch.stack([tokens[:, 0] == ord(letter) for letter in "rgb"], dim=1).float()

    def logits(self, x, y):
        return 9 * x @ y.T


TOKENIZER = get_tokenizer("bytes")


def part_of(captions, **more):
    pixels = np.stack([np.full((2, 2, 3), COLOURS[text.split()[0]], np.uint8) for text in captions])
    return Part(pixels.transpose(0, 3, 1, 2), [(text,) for text in captions], **more)


def measured(part):
    rows = CaptionRows(part, np.zeros((len(part.captions), 1), np.int32), augment=False)
    return zero_shot.measure(ByColour(), TOKENIZER, rows)


def test_the_chance_of_recall_counts_equal_captions_as_right():
    figure = zero_shot.recall(torch.eye(4), ["a", "a", "b", "c"])
    assert figure == (1.0, (2 * 2 + 1 + 1) / 16)
    # The mean over all answers that a guess may give.
    answers = ["a", "a", "b", "c"]
    guesses = [zero_shot.recall(torch.eye(4)[[i] * 4], answers).right for i in range(4)]
    assert sum(guesses) / 4 == figure.chance
    assert zero_shot.recall(torch.eye(3), ["a", "b", "c"]).chance == pytest.approx(1 / 3)


def test_a_tie_with_a_wrong_caption_counts_one_half_and_an_equal_caption_is_left_out():
    captions = ["red a", "green b", "blue c", "red d"]
    wrong = ("green a", "green z", "blue c", "blue d")  # right, a tie, the same caption, right
    figures = measured(part_of(captions, swaps=(Swap("another", wrong), Swap("none", tuple(captions)))))
    assert figures["against another"] == (pytest.approx(2.5 / 3), 0.5)
    assert "against none" not in figures
    assert figures["recall@1, image to text"].right == 0.75  # of two red ones the first is found


def test_nothing_has_no_vectors():
    with pytest.raises(ValueError, match="no images: expected at least one"):
        zero_shot.encode_images(ByColour(), np.zeros((0, 3, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="no texts: expected at least one"):
        zero_shot.encode_texts(ByColour(), TOKENIZER, [])


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two classes with two images each, one of another colour, and a hidden image."""
    for name, colour in (
        ("red/1", "red"), ("red/2", "blue"), ("blue/3", "blue"), ("blue/4", "blue"), (".small/5", "red"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), COLOURS[colour]).save(path)
    return tmp_path


def test_images_of_a_known_class_are_counted_in_any_order_of_the_labels(folder):
    for labels in ([], ["blue", "red"], ["red", "blue"]):
        lines, figure = zero_shot.classify(ByColour(), TOKENIZER, str(folder), labels, ["{}"])
        assert len(lines) == 4 and figure == (0.75, 0.5), labels
        assert [line.split(": ")[1].split()[0] for line in lines if "/red/" in line] == ["red", "blue"]


def test_other_labels_than_the_folders_names_have_no_figure(folder):
    lines, figure = zero_shot.classify(ByColour(), TOKENIZER, str(folder), ["red", "green", "blue"], ["{}"])
    assert len(lines) == 4 and figure is None
    with pytest.raises(ValueError, match="--labels red: 1 classes; expected two --labels"):
        zero_shot.classify(ByColour(), TOKENIZER, str(folder), ["red"], ["{}"])
