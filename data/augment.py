"""Augmentation: other views of an image that keep what it shows.

    view(x, y) = image(A (x, y) + t)        A: a small rotation, scaling and shear; t: a shift

The random numbers come from the batch's generator, which is seeded by the run's seed and the number of the
batch, so a resumed run draws the same views. Outside of an image its border is repeated.

Shapes: B images, C channels, H x W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.config_values import check_values


@dataclass(frozen=True)
class Augmentation:
    """Settings of a task that augments images."""

    warp: float = 1.0  # factor of the largest changes below; 0: no warping
    mirror: bool = False  # flip left and right with probability 1/2: not for letters and digits
    MAY_BE_ZERO = ("warp",)

    def __post_init__(self):
        check_values(self)


# Each change is drawn uniformly between minus and plus this number.
ROTATION = math.radians(12)
SCALING = 0.15  # the logarithm of the scale, drawn for the width and the height apart
SHEAR = 0.15
SHIFT = 0.15  # of half the width or height


def transforms(n: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Return n random affine maps [A, t], float32 (n, 2, 3), from a view's plane to the image's. Both planes
    span -1 to 1 in x and in y."""
    # Draw seven numbers for each image whatever the settings are: other settings change no other draw.
    u = 2 * torch.rand(n, 7, generator=generator) - 1
    angle, log_x, log_y, shear, shift_x, shift_y, mirror = u.unbind(1)
    w = settings.warp
    angle, shear = w * ROTATION * angle, w * SHEAR * shear
    scale_x, scale_y = (w * SCALING * log_x).exp(), (w * SCALING * log_y).exp()
    if settings.mirror:
        scale_x = torch.where(mirror < 0, -scale_x, scale_x)

    # [A, t] scales first, then shears, rotates and shifts.
    cos, sin = angle.cos(), angle.sin()
    rows = (
        (scale_x * cos, scale_y * (shear * cos - sin), w * SHIFT * shift_x),
        (scale_x * sin, scale_y * (shear * sin + cos), w * SHIFT * shift_y),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def augment(images: Tensor, chosen: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), float32, with a view in the place of each that is chosen, bool (B,).

    The generator draws the same numbers whichever images are chosen.
    """
    maps = transforms(len(images), settings, generator)
    if not chosen.any() or not (settings.warp or settings.mirror):
        return images
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)  # (B, H, W, 2)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(chosen[:, None, None, None], views, images)
