"""Palettes: images as numbers of colours, which k-means finds.

    id of a pixel = the nearest of Q colours          colours and pixels have C numbers from -1 to 1

Shapes: B batch, C channels, N pixels, Q colours.
"""

import torch
from torch import Tensor


def nearest(pixels: Tensor, colours: Tensor) -> Tensor:
    """Return the number of the nearest of colours (Q, C), by squared distance, of each of pixels (..., C)."""
    distance = colours.square().sum(1) - 2 * pixels @ colours.T  # without |pixel|^2, the same for all colours
    return distance.argmin(dim=-1)


def k_means(pixels: Tensor, n: int, n_rounds: int = 30) -> Tensor:
    """Return n colours (n, C) with a small mean squared distance to the nearest of them from pixels (M, C).

    Lloyd's algorithm: each colour becomes the mean of the pixels that are nearest to it. It begins with
    colours that are far from each other, drawn as in k-means++ (Arthur and Vassilvitskii 2007). The result is
    sorted by brightness. Raises ValueError for fewer than n different pixels.
    """
    n_different = len(pixels.unique(dim=0))
    if n_different < n:
        raise ValueError(f"{n_different} different colours; expected at least {n}")
    generator = torch.Generator().manual_seed(0)
    colours, distance = pixels[:1], (pixels - pixels[:1]).square().sum(1)
    while len(colours) < n:
        drawn = torch.multinomial(distance, 1, generator=generator)
        colours = torch.cat((colours, pixels[drawn]))
        distance = torch.minimum(distance, (pixels - pixels[drawn]).square().sum(1))

    for _ in range(n_rounds):
        numbers = nearest(pixels, colours)
        counts = numbers.bincount(minlength=n)[:, None]
        sums = torch.zeros_like(colours).index_add_(0, numbers, pixels)
        colours = torch.where(counts > 0, sums / counts.clamp(min=1), colours)
    return colours[colours.sum(1).argsort()]


def encode(images: Tensor, colours: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return the ids (B, N) of images (B, C, height, width) with pixels in [0, 1], line by line."""
    return nearest(2 * images.flatten(2).transpose(1, 2) - 1, images.new_tensor(colours))


def paint(ids: Tensor, colours: tuple[tuple[float, ...], ...], size: tuple[int, ...]) -> Tensor:
    """Return images (B, C, height, width) with pixels in [0, 1] of ids (B, N). size: height and width."""
    numbers = torch.tensor(colours, device=ids.device)
    return ((numbers[ids] + 1) / 2).transpose(1, 2).unflatten(2, size)
