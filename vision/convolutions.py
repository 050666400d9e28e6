"""The blocks of convolutions that U-Nets and autoencoders consist of.

    residual block   x + conv(silu(norm(conv(silu(norm(x))) + W silu(t))))
    attention        x + W_o attention(q, k, v), where q, k and v are linear maps of norm(x) at each place
    half             a convolution with stride 2
    double           each pixel is repeated in a square of 2 x 2, then a convolution

These are the blocks of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B). t is a vector of the time step,
which the blocks of an autoencoder do not have; norm is group normalisation (Wu and He 2018, 1803.08494).
Parameters have the names of diffusers' files.

Shapes: B images, C channels, h x w places.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import attention


class ResidualBlock(nn.Module):
    """Two convolutions, added to their input. Where the number of channels changes, the input passes through
    a convolution of 1 x 1. d_time: width of the vector of a time; 0: the block has none."""

    def __init__(
        self, n_in: int, n_out: int, n_groups: int, d_time: int = 0, eps: float = 1e-6, dropout: float = 0.0
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(n_groups, n_in, eps=eps)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        if d_time:
            self.time_emb_proj = nn.Linear(d_time, n_out)
        self.norm2 = nn.GroupNorm(n_groups, n_out, eps=eps)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.conv_shortcut = nn.Conv2d(n_in, n_out, 1)
        self.dropout = dropout

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Return the block's output (B, n_out, h, w) for x (B, n_in, h, w); time: (B, d_time)."""
        y = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.dropout(F.silu(self.norm2(y)), self.dropout, self.training))
        return y + (x if x.shape[1] == y.shape[1] else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all places of an image, added to its input."""

    def __init__(self, n_channels: int, n_heads: int, n_groups: int, backend: str, eps: float = 1e-6):
        super().__init__()
        self.group_norm = nn.GroupNorm(n_groups, n_channels, eps=eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(n_channels, n_channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(n_channels, n_channels)])
        self.n_heads, self.backend = n_heads, backend

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, h, w) plus the attention's output."""
        z = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h w, C)
        q, k, v = (f(z).unflatten(2, (self.n_heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        found = self.to_out[0](attention(q, k, v, backend=self.backend).flatten(2))
        return x + found.transpose(1, 2).view_as(x)


class Half(nn.Module):
    """A convolution with stride 2, which halves the height and the width.

    padding 0: one row of zeros below and one column on the right, as TensorFlow pads (DDPM, and the
    autoencoders of Stable Diffusion). padding 1: zeros on all sides (Stable Diffusion's U-Net).
    """

    def __init__(self, n_channels: int, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, C, h / 2, w / 2) of x (B, C, h, w)."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Each pixel is repeated in a square of 2 x 2, and a convolution follows: twice the height and width."""

    def __init__(self, n_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, C, 2 h, 2 w) of x (B, C, h, w)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them unless n_heads is 0."""

    def __init__(self, n_channels: int, n_heads: int, n_groups: int, backend: str, d_time: int = 0):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(n_channels, n_channels, n_groups, d_time) for _ in range(2)
        )
        if n_heads:
            self.attentions = nn.ModuleList([Attention(n_channels, n_heads, n_groups, backend)])

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Return the output (B, C, h, w) for x (B, C, h, w); time: (B, d_time)."""
        x = self.resnets[0](x, time)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x, time)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draw the parameters so that every layer about keeps the variance of its input. The last layer of each
    residual block and of each attention is zero, so that a new block is the identity (the code of DDPM).

    Raises ValueError for a parameter without a rule.
    """
    for name, p in module.named_parameters():
        if name.endswith("bias") or name.endswith(("conv2.weight", "to_out.0.weight", "proj_out.weight")):
            p.zero_()
        elif p.ndim == 1 and "norm" in name:
            p.fill_(1.0)
        elif name.endswith("weight") and p.ndim in (2, 4):
            p.normal_(std=1 / math.sqrt(p[0].numel()))
        else:
            raise ValueError(f"parameter {name}: no rule of initialisation; add one to convolutions.py")


def block_macs(n_in: int, n_out: int) -> int:
    """Return the multiplications of a residual block for one place, without those for the time."""
    return 9 * n_in * n_out + 9 * n_out * n_out + n_in * n_out * (n_in != n_out)


def middle_macs(n_channels: int, n_places: int, has_attention: bool) -> int:
    """Return the multiplications of a `Middle` for all of its n_places."""
    of_attention = 4 * n_channels**2 + 2 * n_places * n_channels
    return n_places * (2 * block_macs(n_channels, n_channels) + has_attention * of_attention)
