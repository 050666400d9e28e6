"""Palettes: k-means finds the colours that are there, and ids are those of the nearest colour."""

import pytest
import torch

from data import palette


def test_k_means_finds_separate_colours_sorted_by_brightness():
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[-0.9, -0.8, -0.7], [0.9, -0.9, 0.1], [0.0, 0.8, 0.1], [0.9, 0.9, 0.9]])
    numbers = torch.randint(4, (2000,), generator=generator)
    pixels = centres[numbers] + 0.02 * torch.randn(2000, 3, generator=generator)
    found = palette.k_means(pixels, 4)
    means = torch.stack([pixels[numbers == i].mean(0) for i in range(4)])
    torch.testing.assert_close(found, means, rtol=0, atol=1e-6)
    assert torch.equal(found, palette.k_means(pixels, 4))


def test_k_means_is_better_than_even_steps_and_needs_enough_colours():
    pixels = torch.cat((torch.rand(900, 1) * 0.2 - 1, torch.rand(100, 1)))

    def error(colours):
        return (pixels - colours[palette.nearest(pixels, colours)]).square().mean()

    even = torch.linspace(-1, 1, 8)[:, None]
    assert error(palette.k_means(pixels, 8)) < 0.5 * error(even)
    assert palette.k_means(torch.tensor([[0.5], [0.5], [-0.5]]), 2).tolist() == [[-0.5], [0.5]]
    with pytest.raises(ValueError, match="2 different colours; expected at least 3"):
        palette.k_means(torch.tensor([[0.5], [0.5], [-0.5]]), 3)


def test_images_are_read_line_by_line_and_painted_again():
    colours = ((-1.0, -1.0, -1.0), (1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
    ids = torch.tensor([[0, 1, 2, 2, 1, 0]])
    images = palette.paint(ids, colours, (2, 3))
    assert images.shape == (1, 3, 2, 3) and images[0, :, 0, 1].tolist() == [1, 0, 0]
    assert images[0, :, 1, 0].tolist() == [1, 1, 1]
    noise = 0.2 * torch.rand(images.shape) - 0.1
    assert torch.equal(palette.encode(images + noise, colours), ids)
