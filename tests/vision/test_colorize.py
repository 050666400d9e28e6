"""Colorization: soft targets, weights and annealed means by their definitions, balls, and a small run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data import landscapes
from formats.open_model import open_model
from vision import colorize
from vision.colorize import Config, Model

BINS = ((0.0, 0.0), (10.0, 0.0), (0.0, 10.0), (60.0, 40.0), (-40.0, 30.0))
SMALL = Config(
    width=8, dilations=(1, 2), image_size=(8, 12), bins=BINS, frequencies=(0.6, 0.2, 0.1, 0.02, 0.08)
)


def small(**changes):
    torch.manual_seed(0)
    model = Model(replace(SMALL, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_a_colour_is_encoded_by_its_nearest_bins():
    shares, nearest = small().soft_targets(torch.tensor([[2.0, 1.0], [60.0, 40.0]]))
    weights = [math.exp(-((a - 2) ** 2 + (b - 1) ** 2) / 50) for a, b in BINS]
    torch.testing.assert_close(shares[0], torch.tensor(weights) / sum(weights))
    assert nearest.tolist() == [0, 3] and shares[1, 3] > 0.999
    # Of many bins only ten have a share.
    line = tuple((10.0 * i, 0.0) for i in range(14))
    many = small(bins=line, frequencies=(1 / 14,) * 14)
    assert (many.soft_targets(torch.tensor([[30.0, 0.0]]))[0] > 0).sum() == 10


def test_rare_colours_weigh_more_and_the_mean_weight_is_one():
    p, centres = torch.tensor(SMALL.frequencies), torch.tensor(BINS)
    w = colorize.class_weights(p, centres, 0.5)
    assert (w * p).sum().item() == pytest.approx(1, abs=1e-6) and w.argmax() == 3
    # Neighbours at 10 share little, distant bins nothing: a loop over bins.
    near = [[math.exp(-((a - c) ** 2 + (b - d) ** 2) / 50) for c, d in BINS] for a, b in BINS]
    smooth = [
        sum(near[i][j] / sum(near[k][j] for k in range(5)) * p[j].item() for j in range(5)) for i in range(5)
    ]
    expected = [1 / (0.5 * share + 0.5 / 5) for share in smooth]
    torch.testing.assert_close(w / w[0], torch.tensor(expected) / expected[0])
    torch.testing.assert_close(colorize.class_weights(p, centres, 1.0), torch.ones(5))


def test_the_loss_is_that_of_a_loop_over_places():
    model, images = small(), torch.rand(2, 3, 8, 12)
    value, metrics = model.loss({"images": images})
    lab = colorize.rgb_to_lab(images)
    p = torch.log_softmax(model(lab[:, :1]), dim=1)
    assert p.shape == (2, 5, 4, 6)
    terms, distances = [], []
    for i in range(2):
        for y in range(4):
            for x in range(6):
                ab = lab[i, 1:, 2 * y, 2 * x]
                shares, nearest = model.soft_targets(ab[None])
                terms.append(-model.weights[nearest[0]] * (shares[0] * p[i, :, y, x]).sum())
                warm = torch.softmax(p[i, :, y, x] / 0.38, dim=0) @ model.centres
                distances.append((warm - ab).norm())
    torch.testing.assert_close(value, torch.stack(terms).mean())
    torch.testing.assert_close(metrics["distance"], torch.stack(distances).mean())
    grey = small(objective="l2")
    value, _ = grey.loss({"images": images})
    expected = (grey(lab[:, :1]) - lab[:, 1:, ::2, ::2] / 110).square().mean()
    torch.testing.assert_close(value, expected)


def test_the_temperature_leads_from_the_mean_to_the_mode():
    model = small()
    logits = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0]).view(1, 5, 1, 1)
    mean, mode = (model.colours(logits, T).flatten() for T in (1.0, 0.0))
    torch.testing.assert_close(mean, torch.softmax(logits.flatten(), 0) @ torch.tensor(BINS))
    assert mode.tolist() == [60, 40]
    torch.testing.assert_close(model.colours(logits, 0.01).flatten(), mode)
    assert mean.norm() < model.colours(logits).norm() < mode.norm()


def test_what_covers_balls_is_found_and_measured(monkeypatch):
    pictures, _ = landscapes.pictures(8, held_out=True)
    true = colorize.rgb_to_lab(torch.from_numpy(pictures) / 255)[:, 1:, ::2, ::2]
    balls = torch.tensor(list(landscapes.BALLS.values()))[:, 1:].float()
    exact = colorize.on_balls(true, true)
    assert exact.distance < 1 and 68 < exact.chroma < 76
    mean = balls.mean(0)[None, :, None, None].expand_as(true)
    answer = colorize.on_balls(mean, true)
    assert answer.distance == pytest.approx((balls[0] - balls[1]).norm().item() / 2, rel=1e-4)
    assert colorize.on_balls(true * 0, true).chroma == 0 and colorize.on_balls(true, true * 0) is None


def test_baselines_are_grey_and_the_mean_colour_of_a_lightness():
    known = torch.tensor([[20.0, 10, 0], [20, 20, 0], [60, 0, 30]]).T[None, :, :, None]
    held = torch.tensor([[20.5, 15, 0], [60, 0, 40], [90, 3, 4]]).T[None, :, :, None]
    grey, by_lightness = colorize.baselines(known, held)
    assert grey == pytest.approx((15 + 40 + 5) / 3) and by_lightness == pytest.approx((0 + 10 + 5) / 3)


@pytest.mark.parametrize("objective", ["classes", "l2"])
def test_flops_are_those_of_the_convolutions(objective):
    model = small(objective=objective)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(3, 1, 8, 12)).sum().backward()
    first = 2 * model.layers[0].weight.numel() * 8 * 12  # backward needs no gradient of the lightness
    assert counter.get_total_flops() == 3 * (model.flops_per_token() - first)


def test_settings_that_make_no_sense_are_refused():
    for changes, words in (
        ({"rebalance": 1.5}, "rebalance 1.5: expected 0 to 1"),
        ({"image_size": 9}, "image_size 9: expected multiples of 2"),
        ({"objective": "l1"}, "objective"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **changes)


def test_a_run_colours_pictures_and_its_model_colours_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(landscapes, "COUNTS", (64, 8))
    flags = [
        "--steps",
        "40",
        "--eval-every",
        "40",
        "--batch-size",
        "16",
        "--set",
        "width=16",
        "dilations=(1,2)",
    ]
    ended = run_command("train.py", "--model", "colorize", *flags, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "from held-out colours, the mean colour of each lightness" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "val_distance" in row)
    assert after["val_loss"] < 0.6 * before["val_loss"] and after["val_distance"] < before["val_distance"]
    assert "balls by the mode: " in (tmp_path / "run" / "samples.txt").read_text()
    model = open_model(tmp_path / "run" / "model")
    assert len(model.config.bins) == len(model.config.frequencies) > 5

    Image.new("RGB", (40, 50), (90, 160, 60)).save(tmp_path / "photo.png")
    ended = run_command(
        "-m", "vision.colorize", tmp_path / "run" / "model", tmp_path / "photo.png", "--out", tmp_path
    )
    assert ended.code == 0 and "grey, mean, annealed mean (0.38), mode, true" in ended.out
    assert np.asarray(Image.open(tmp_path / "picture.png")).shape[2] == 3


def test_grey_pictures_are_left_out_and_a_set_of_them_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(20):
        colour = (212, 51, 47) if i % 2 else (90, 90, 90)  # about as red as a ball
        Image.new("RGB", (8, 8), colour).save(tmp_path / "set" / f"{i}.png")
    flags = ["--cache", tmp_path / "cache", "--steps", "1", "--set", "width=8"]
    flags = ["train.py", "--model", "colorize", *flags, "--data", tmp_path / "set"]
    ended = run_command(*flags, "--out", tmp_path / "run")
    assert ended.code == 0 and "without 10 in grey" in ended.out, ended.err
    assert "balls" not in (tmp_path / "run" / "samples.txt").read_text()  # which only landscapes have
    for path in (tmp_path / "set").iterdir():
        Image.open(path).convert("L").save(path)
    ended = run_command(*flags, "--out", tmp_path / "grey")
    assert ended.code == 2 and "no image in colour to learn from" in ended.err
    ended = run_command("train.py", "--model", "colorize", "--data", "glyphs", "--out", tmp_path / "glyphs")
    assert ended.code == 2 and "images in grey; expected colours" in ended.err
