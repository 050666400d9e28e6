"""Palettes: each pixel of an image as the id of the nearest of a few colours, which k-means finds.

    id of a pixel = the number of the nearest of Q colours, by squared distance

Colours and pixels have C numbers from -1 to 1. iGPT reads and writes such ids (vision/igpt.py).

Shapes: B images, C channels, N pixels, Q colours.
"""

import torch
from torch import Tensor


def nearest(pixels: Tensor, colours: Tensor) -> Tensor:
    """Return the ids (...) of pixels (..., C): for each the number of the nearest of colours (Q, C)."""
    # The squared distance without |pixel|^2, which is the same for all colours.
    distance = colours.square().sum(1) - 2 * pixels @ colours.T
    return distance.argmin(dim=-1)


def k_means(pixels: Tensor, n: int) -> Tensor:
    """Return n colours (n, C), such that pixels (N, C) have a small mean squared distance to the nearest one.

    Lloyd's algorithm: each colour becomes the mean of the pixels that are nearest to it, 30 times. It begins
    with pixels that are far from each other, drawn as in k-means++ (Arthur and Vassilvitskii 2007). The
    result is sorted by the sum of the channels. Raises ValueError for fewer than n different pixels.
    """
    n_different = len(pixels.unique(dim=0))
    if n_different < n:
        raise ValueError(f"{n_different} different colours; expected at least {n}")
    # Each colour to begin with is a pixel. Its probability is in proportion to the squared distance from the
    # nearest colour so far.
    generator = torch.Generator().manual_seed(0)
    colours, distance = pixels[:1], (pixels - pixels[:1]).square().sum(1)
    while len(colours) < n:
        drawn = torch.multinomial(distance, 1, generator=generator)
        colours = torch.cat((colours, pixels[drawn]))
        distance = torch.minimum(distance, (pixels - pixels[drawn]).square().sum(1))

    # A colour that is nearest to no pixel stays as it is.
    for _ in range(30):
        ids = nearest(pixels, colours)
        counts = ids.bincount(minlength=n)[:, None]
        sums = torch.zeros_like(colours).index_add_(0, ids, pixels)
        colours = torch.where(counts > 0, sums / counts.clamp(min=1), colours)
    return colours[colours.sum(1).argsort()]


def encode(images: Tensor, colours: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return the ids (B, N) of images (B, C, height, width) with pixels in [0, 1], line by line."""
    return nearest(2 * images.flatten(2).transpose(1, 2) - 1, images.new_tensor(colours))


def paint(ids: Tensor, colours: tuple[tuple[float, ...], ...], size: tuple[int, ...]) -> Tensor:
    """Return images (B, C, height, width) with pixels in [0, 1] of ids (B, N). size: height and width."""
    table = torch.tensor(colours, device=ids.device)
    return ((table[ids] + 1) / 2).transpose(1, 2).unflatten(2, size)
