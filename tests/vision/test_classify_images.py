"""The task of classifying images: baselines, what is shown, and small runs."""

import json

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image

from data import baselines
from formats.open_model import open_model
from vision import classify_images


def flags(tmp_path, *more):
    small = ["--steps", "4", "--eval-every", "2", "--batch-size", "8", "--log-every", "1"]
    small += ["--cache", tmp_path / "cache", "--set", "n_layers=1", "patch_size=8"]
    return ["train.py", "--model", "vit", *small, "--out", tmp_path / "run", *more]


def test_a_run_counts_images_and_shows_a_picture_of_its_labels(tmp_path, few_glyphs):
    ended = run_command(*flags(tmp_path))
    assert ended.code == 0, ended.err
    assert "9 grey images of 32 x 32 to learn from, 6 held out, 3 classes" in ended.out
    assert "chance is right for 33.3%, the nearest neighbour in pixels for" in ended.out
    assert "images/s" in ended.err and "tok/s" not in ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1].keys() == {"step", "images", "val_loss", "val_accuracy"}
    assert "images_per_second" in rows[1] and "tokens" not in rows[1]
    assert "of 6 right; most often taken" in (tmp_path / "run" / "samples.txt").read_text()
    picture = np.asarray(Image.open(tmp_path / "run" / "picture.png")).astype(int)
    is_green, is_red = ((picture @ sign > 60).any() for sign in ((-1, 1, 0), (1, -1, 0)))
    assert is_green or is_red

    start = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]
    assert start["unit"] == "images" and start["loss"] == "nats per image"
    assert start["flags"]["optimizer"] == "muon" and start["flags"]["batch_size"] == 8
    model = open_model(tmp_path / "run" / "model")
    assert model.config.labels == ("A", "b", "7") and model.config.n_channels == 1


def test_a_folder_for_each_class_is_learned_in_colour(tmp_path):
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.clip(
                np.array(colour) + np.random.default_rng(i).integers(-30, 30, (16, 16, 3)), 0, 255
            )
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    ended = run_command(*flags(tmp_path, "--data", tmp_path / "set", "--steps", "20", "--eval-every", "20"))
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_accuracy"] == 1.0
    assert open_model(tmp_path / "run" / "model").config.n_channels == 3


@pytest.mark.parametrize(
    "more, words",
    [
        (["--data", "nowhere"], "--data nowhere: not found; expected glyphs, or a folder"),
        (["--document-mask"], "--document-mask: images have no documents"),
        (["--set", "patch_size=5"], "multiples of the patch"),
        (["--set", "warp=-1"], "warp -1: expected"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(tmp_path, more, words, few_glyphs):
    ended = run_command(*flags(tmp_path, *more))
    line = ended.err.strip().splitlines()[-1]
    assert ended.code == 2 and line.startswith("error: ") and words in line, ended.err


def test_images_without_classes_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / "set" / f"{i}.png")
    ended = run_command(*flags(tmp_path, "--data", tmp_path / "set"))
    assert ended.code == 2 and "0 classes; expected a folder for each class; --model mae" in ended.err


def test_a_batch_is_a_function_of_the_generator_and_held_out_images_are_not_augmented(few_glyphs, tmp_path):
    dataset = classify_images.prepare("glyphs", (32, 32), tmp_path)
    rows = [dataset.train[0], dataset.val[0]]

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        return classify_images.make_batch(rows, classify_images.settings(None), generator, None)["images"]

    assert torch.equal(batch(0), batch(0)) and not torch.equal(batch(0)[0], batch(1)[0])
    assert torch.equal(batch(0)[1], batch(1)[1])
    assert torch.equal(batch(0)[1] * 255, torch.from_numpy(dataset.val[0]["image"]).float())


def test_a_picture_of_few_images_shows_each_once(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(classify_images.pictures, "save", lambda out, *rows: shown.extend(rows))
    predicted, targets = [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]
    images, labels = torch.zeros(5, 1, 8, 8), ("a", "b")
    text = classify_images.show_labels(images, predicted, targets, labels, tmp_path, (2, 3))
    assert shown[1] == [["a", "b", "b"], ["a", "a"]] and [len(row) for row in shown[0]] == [3, 2]
    assert text == "4 of 5 right; most often taken: a for b 1x"


def test_baselines_find_what_pixels_show():
    torch.manual_seed(0)
    centres = torch.randn(3, 20)
    labels, expected = torch.arange(60) % 3, torch.arange(30) % 3
    train = centres[labels] + 0.3 * torch.randn(60, 20)
    held = centres[expected] + 0.3 * torch.randn(30, 20)
    train[:, 7] = held[:, 7] = 1.0  # a constant feature
    for predicted in (
        baselines.nearest_neighbour(train, labels, held),
        baselines.nearest_neighbour(train, labels, held, k=5),
        baselines.logistic_regression(train, labels, held),
    ):
        assert torch.equal(predicted, expected)
    # A line of loops: the nearest row.
    distances = [[(a - b).square().sum().item() for b in train] for a in held]
    nearest = [labels[row.index(min(row))].item() for row in distances]
    assert baselines.nearest_neighbour(train, labels, held).tolist() == nearest
