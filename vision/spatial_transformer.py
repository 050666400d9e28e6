"""A Transformer layer inside a U-Net: how the places of an image read a text.

    x                                       the places of a feature map, one token each
    x <- x + attention(norm(x), norm(x))    self-attention: places to each other
    x <- x + attention(norm(x), text)       cross-attention: queries of places, keys and values of the text
    x <- x + MLP(norm(x))                   norm: a LayerNorm for each

Latent diffusion (Rombach et al. 2021, arXiv 2112.10752, section 3.3). Before the layer are a group
normalisation and a convolution of 1 x 1, after it is another convolution of 1 x 1, and its output is added to
the feature map. The last convolution starts at zero, so that a new layer changes nothing. Parameters have the
names of diffusers' files.

Shapes: B images, C channels, h x w = N places, S states that are attended to, T states of a text.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import attention


class Attention(nn.Module):
    """Multi-head attention of places to states: those of the places themselves, or those of a text."""

    def __init__(self, width: int, d_states: int, n_heads: int, backend: str):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(d_states, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.n_heads, self.backend = n_heads, backend

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Return the attention's output (B, N, C) for places x (B, N, C) and states (B, S, d_states)."""
        q, k, v = self.to_q(x), self.to_k(states), self.to_v(states)
        q, k, v = (y.unflatten(2, (self.n_heads, -1)) for y in (q, k, v))
        return self.to_out[0](attention(q, k, v, backend=self.backend).flatten(2))


class GatedMLP(nn.Module):
    """GEGLU: down(u gelu(g)) with (u, g) = up(x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int):
        super().__init__()
        up = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})
        # The identity stands where diffusers has a dropout, so that `down` is net.2 as in its files.
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, N, C) for x (B, N, C)."""
        u, gate = self.net[0]["proj"](x).chunk(2, dim=2)
        return self.net[2](u * F.gelu(gate))


class Layer(nn.Module):
    """One Transformer layer: self-attention, cross-attention to a text and an MLP, each added to its
    input."""

    def __init__(self, width: int, d_text: int, n_heads: int, backend: str):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, n_heads, backend)
        self.attn2 = Attention(width, d_text, n_heads, backend)
        self.ff = GatedMLP(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Return the output (B, N, C) for places x (B, N, C) and states of a text (B, T, d_text)."""
        inner = self.norm1(x)
        x = x + self.attn1(inner, inner)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A Transformer layer over the places of a feature map, added to the map."""

    def __init__(self, width: int, d_text: int, n_heads: int, n_groups: int, backend: str):
        super().__init__()
        self.norm = nn.GroupNorm(n_groups, width, eps=1e-6)  # published; others have norm_eps
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Layer(width, d_text, n_heads, backend)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Return x (B, C, h, w) plus the layer's output; text: states (B, T, d_text)."""
        z = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h w, C)
        z = self.transformer_blocks[0](z, text)
        return x + self.proj_out(z.transpose(1, 2).reshape(x.shape))
