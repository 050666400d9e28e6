"""Landscapes: drawn in colours that a screen can show, with a ball whose colour nothing else tells."""

import numpy as np
import torch

from data import images, landscapes
from data.lab import lab_to_rgb, rgb_to_lab


def test_a_picture_is_a_function_of_its_number_and_its_colours_can_be_shown():
    drawn = [landscapes.draw(i, held_out) for i in range(40) for held_out in (False, True)]
    rgb = lab_to_rgb(torch.from_numpy(np.stack([lab for lab, _ in drawn])))
    assert rgb.min() > -0.02 and rgb.max() < 1.02
    assert {which for _, which in drawn} == {0, 1}
    again, which = landscapes.draw(3, True)
    assert np.array_equal(again, drawn[7][0]) and which == drawn[7][1]
    assert not np.array_equal(again, drawn[6][0])


def test_balls_are_red_or_blue_at_one_lightness_and_no_other_shape_has_their_colours():
    (L_red, *red), (L_blue, *blue) = landscapes.BALLS.values()
    assert L_red == L_blue
    pictures, which = landscapes.pictures(20, held_out=False)
    lab = rgb_to_lab(torch.from_numpy(pictures) / 255)
    for one, number in zip(lab, which, strict=True):
        near = [(one[1:] - torch.tensor(ball)[:, None, None]).norm(dim=0) < 5 for ball in (red, blue)]
        assert near[number].sum() > 20 and near[1 - number].sum() == 0
        assert abs(one[0][near[number]].mean() - L_red) < 4
    for shape in (name for name in vars(landscapes) if name.isupper() and name not in ("SIZE", "X", "Y")):
        colour = getattr(landscapes, shape)
        if len(colour) == 3 and shape != "BALLS":
            assert min(np.hypot(colour[1] - a, colour[2] - b) for a, b in (red, blue)) > 15, shape


def test_they_are_a_data_set_with_other_places_of_sun_and_house_held_out(monkeypatch, tmp_path):
    monkeypatch.setattr(landscapes, "COUNTS", (12, 4))
    dataset = images.prepare("landscapes", (32, 32), tmp_path)
    assert dataset.summary.startswith("12 colour images of 32 x 32 to learn from, 4 held out, 2 classes")
    assert dataset.labels == ("red", "blue") and dataset.train[0]["image"].shape == (3, 32, 32)
