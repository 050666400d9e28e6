"""Patches: cut images into patches, select some of them, and give each a position.

Shapes: B batch, C channels, P patch size, N patches, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Return the patches (B, N, C P P) of images (B, C, height, width), whose sides are multiples of P.

    Patches are in order of row and column, and the numbers of a patch in order of channel, row and column,
    like the weights of a convolution.
    """
    B, C, height, width = images.shape
    P = patch_size
    x = images.view(B, C, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, -1, C * P * P)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x (B, N, D) at places (B, n), int64, as (B, n, D)."""
    B, N, D = x.shape
    # `gather` would keep x for the backward pass, and copy single numbers instead of rows. So index the rows
    # of the whole batch, which are numbered from 0 to B N - 1.
    in_batch = places + N * torch.arange(B, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, in_batch.flatten()).view(B, -1, D)


def sin_cos(grid: tuple[int, ...], width: int) -> Tensor:
    """Return fixed positions (1, 1 + N, D), float32, for a class token and a grid of patches, as MAE has them
    (He et al. 2021).

    grid: its rows and columns. width: D, a multiple of 4. The first half of a patch's vector encodes its
    column, the second its row: place p is [sin(p w_0), sin(p w_1), ..., cos(p w_0), cos(p w_1), ...] with
    w_i = 10000^(-i / (D / 4)). The class token has zeros.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    halves = []
    for place in (column, row):
        angles = place.reshape(-1, 1) * frequencies  # (N, D / 4)
        halves += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(halves, dim=1), (0, 0, 1, 0)).float()[None]


def resample(positions: Tensor, grid: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Return learned positions (1, 1 + N, D) of a grid for a new grid: those of the patches are interpolated
    bicubically, that of the class token stays."""
    first, rest = positions[:, :1], positions[:, 1:]
    plane = rest.reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    plane = F.interpolate(plane, size=new, mode="bicubic", align_corners=False)
    return torch.cat((first, plane.flatten(2).transpose(1, 2)), dim=1)
