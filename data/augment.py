"""Augmentation: other views of an image that keep what it shows.

    view(x, y) = image(A (x, y) + t)        A: a small rotation, scaling and shear; t: a shift

All views of a batch are one affine sampling. The random numbers come from the batch's generator, which is
seeded by (seed, batch), so a view is a function of (seed, step, place in the batch). What is outside of an
image repeats its border.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.config_values import check_values


@dataclass(frozen=True)
class Augmentation:
    """Settings of a task that reads images."""

    warp: float = 1.0  # times the largest rotation, scaling, shear and shift below; 0: none
    mirror: bool = False  # turn every other image around its vertical axis: not for letters and digits
    MAY_BE_ZERO = ("warp",)

    def __post_init__(self):
        check_values(self)


# The largest changes, all uniform between minus and plus.
ROTATION = math.radians(12)
SCALING = 0.15  # of the logarithm, in both directions
SHEAR = 0.15
SHIFT = 0.15  # of half the width or height


def transforms(n: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Return n random affine maps (n, 2, 3), of the plane in which an image spans -1 to 1 both ways."""
    # Draw seven numbers for each image, whatever the settings are.
    u = 2 * torch.rand(n, 7, generator=generator) - 1
    angle, log_x, log_y, shear, shift_x, shift_y, mirror = u.unbind(1)
    w = settings.warp
    angle, shear = w * ROTATION * angle, w * SHEAR * shear
    scale_x, scale_y = (w * SCALING * log_x).exp(), (w * SCALING * log_y).exp()
    if settings.mirror:
        scale_x = scale_x * mirror.sign()

    # Scale, shear, rotate, shift.
    cos, sin = angle.cos(), angle.sin()
    rows = (
        (scale_x * cos, scale_y * (shear * cos - sin), w * SHIFT * shift_x),
        (scale_x * sin, scale_y * (shear * sin + cos), w * SHIFT * shift_y),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def augment(images: Tensor, chosen: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), floating-point, with those that are chosen, bool (B,), as another view."""
    maps = transforms(len(images), settings, generator)
    if not chosen.any() or not (settings.warp or settings.mirror):
        return images
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)  # (B, H, W, 2)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(chosen[:, None, None, None], views, images)
