"""Root-mean-square normalisation: scale a row to unit mean square, then by a learned gain.

    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight

Root Mean Square Layer Normalization (Zhang and Sennrich 2019, equation 4). Its gradient, with n = x * r,
r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:

    dx = r * (g - n * mean(g * n))        dweight = sum over rows of dy * n

`reference` is the equation in plain PyTorch and defines what every other backend must compute; `torch` runs
the library's own operation.
"""

import torch
from torch import Tensor

from kernels.attention import BACKENDS


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of x (..., D) over its last axis with gain weight (D,); statistics in float32, result like x.

    With residual (like x) the sum comes first: h = x + residual; returns (rms_norm(h), h), since a
    transformer needs both. backend: "reference", "torch", "triton" or "auto". Raises ValueError where
    shapes do not fit or the backend does not exist.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight {tuple(weight.shape)} for x {tuple(x.shape)}: expected ({x.shape[-1]},)"
        )
    if backend == "triton":
        raise ValueError("rms_norm: backend 'triton' is not built yet; use 'auto', 'torch' or 'reference'")
    if backend not in BACKENDS:
        raise ValueError(f"rms_norm: backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if residual is not None:
        x = x + residual
    if backend == "reference":
        y = _reference(x, weight, eps)
    else:
        y = torch.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return y if residual is None else (y, x)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * r * weight).to(x.dtype)
