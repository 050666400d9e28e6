"""Patches: an image as rows of numbers, some of these rows, and the positions of a grid.

Shapes: B batch, C channels, P patch size, N patches, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sin_cos(grid: tuple[int, ...], width: int) -> Tensor:
    """Return fixed positions (1, 1 + N, D), zeros for the class token (MAE's, He et al. 2021).

    The first half of D is for the column, the second for the row. A half is [sin(p w_0), sin(p w_1), ...,
    cos(p w_0), ...] of the place p, with w_i = 10000^(-i / (D / 4)).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    halves = []
    for place in (column, row):
        angles = place.reshape(-1, 1) * frequencies  # (N, D / 4)
        halves += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(halves, dim=1), (0, 0, 1, 0)).float()[None]


def resample(positions: Tensor, grid: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Return learned positions (1, 1 + N, D) for another grid, by bicubic interpolation between patches."""
    first, rest = positions[:, :1], positions[:, 1:]
    plane = rest.reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    plane = F.interpolate(plane, size=new, mode="bicubic", align_corners=False)
    return torch.cat((first, plane.flatten(2).transpose(1, 2)), dim=1)


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Return the patches (B, N, C P P) of images (B, C, height, width), each in order of channel, row and
    column, like the weights of a convolution."""
    B, C, height, width = images.shape
    P = patch_size
    x = images.view(B, C, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, -1, C * P * P)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x (B, N, D) at places (B, n), (B, n, D)."""
    B, N, D = x.shape
    in_batch = places + N * torch.arange(B, device=x.device)[:, None]
    # `gather` would keep x for backward, and copy numbers one by one instead of rows.
    return x.flatten(0, 1).index_select(0, in_batch.flatten()).view(B, -1, D)
