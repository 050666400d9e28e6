"""Colours in Lab: known ones, and back."""

import pytest
import torch

from data.lab import lab_to_rgb, rgb_to_lab


@pytest.mark.parametrize(
    "rgb, lab",
    [  # published conversions, to two digits
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
    ],
)
def test_known_colours_have_their_numbers(rgb, lab):
    found = rgb_to_lab(torch.tensor(rgb).float().view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(found, torch.tensor(lab).float(), rtol=0, atol=0.03)


def test_there_and_back_is_the_same_picture_with_finite_gradients():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    images[0, :, 0] = 0
    images.requires_grad_()
    again = lab_to_rgb(rgb_to_lab(images))
    torch.testing.assert_close(again, images, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), again)
    again.sum().backward()
    assert images.grad.isfinite().all()
