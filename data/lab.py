"""Lab: colours as lightness L, from 0 to 100, and two numbers a (green to red) and b (blue to yellow).

    sRGB -> linear light -> X Y Z -> f(X / X_n), f(Y / Y_n), f(Z / Z_n) -> L, a, b
    f(t) = t^(1/3), for small t linear;    L = 116 f(Y / Y_n) - 16
    a = 500 (f(X / X_n) - f(Y / Y_n)),     b = 200 (f(Y / Y_n) - f(Z / Z_n))

This is CIE 1976 L*a*b*, with the white of daylight D65 as (X_n, Y_n, Z_n), and sRGB as in IEC 61966-2-1. At
equal distances in Lab two colours look about equally different, which is not so in sRGB. A grey picture has
a = b = 0.

Shapes: B images, H x W pixels.
"""

import torch
from torch import Tensor

# Rows X, Y, Z; columns R, G, B.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.950456, 1.0, 1.088754)  # the sums of the rows: white has a = b = 0
LINEAR = 0.008856  # f is linear up to this t


def mixed(matrix: Tensor, images: Tensor) -> Tensor:
    """Return matrix (3, 3) times the channels of images (B, 3, H, W), in the dtype of the images.

    Autocast would compute a matrix product in bfloat16, with 8 bits, and a multiplies such errors by 500.
    """
    return (matrix[:, :, None, None] * images[:, None]).sum(2)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W), floating-point, of sRGB in [0, 1] as L, a and b."""
    # Clamp before the powers, whose gradients at 0 are infinite.
    light = torch.where(
        images > 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92
    )
    matrix = images.new_tensor(XYZ) / images.new_tensor(WHITE)[:, None]
    xyz = mixed(matrix, light)
    x, y, z = torch.where(xyz > LINEAR, xyz.clamp(min=LINEAR) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Return images (B, 3, H, W), floating-point, of L, a and b as sRGB.

    A colour that sRGB cannot show has a channel outside of [0, 1].
    """
    L, a, b = lab.unbind(1)
    y = (L + 16) / 116
    f = torch.stack((y + a / 500, y, y - b / 200), dim=1)
    xyz = torch.where(f > LINEAR ** (1 / 3), f.clamp(min=0) ** 3, (f - 16 / 116) / 7.787)
    matrix = (lab.new_tensor(XYZ) / lab.new_tensor(WHITE)[:, None]).double().inverse().to(lab)
    light = mixed(matrix, xyz)
    return torch.where(
        light > 0.0031308, 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055, 12.92 * light
    )
