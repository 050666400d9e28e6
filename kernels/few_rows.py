"""The operations of a step of generation on a CPU: products of few rows with matrices, and small norms.

    y = x W^T        x (B, D), one token of each row; W (N, D)

With so few rows the cores wait until W is read, and the time depends on how W is stored in memory:

    B = 1            by columns, if W has at least as many rows as columns: F.linear is up to twice as fast
    B > 1            in the blocks that oneDNN reads in one go, as torch.compile stores the weights of a model
                     that it freezes: generation with 8 rows was 1.2 times as fast as with (W x^T)^T in MKL,
                     and 1.5 times as fast as with F.linear
    B > 1, Intel     by columns, which MKL, made for these CPUs, multiplies fastest: a product of 2 to 9 rows
                     with matrices of width 320 took a half to a third of the time that it takes with oneDNN,
                     and down to half of the time of F.linear

The first two were measured on two threads of an AMD EPYC of family 25, with a model of 10M parameters; the
last on one thread of an Intel Xeon with AMX, which other programs used too.

To start an operation takes longer than the arithmetic of a small one. So layers that read the same x, such as
those of queries, keys and values, become one product, with their weights stacked to one matrix. And RMSNorm,
with n the Euclidean length of x, is computed as

    y = x / hypot(n, sqrt(D eps)) * (sqrt(D) weight)        4 operations; PyTorch's own norm takes 12

`arrange` returns a copy of a model with these changes. `draw` chooses the next tokens.

Shapes: B rows of the batch, D width of x, N width of y, V vocabulary.
"""

import copy
import math
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 17  # the fewest numbers of a matrix whose layout matters; smaller matrices stay in the caches
STEPS = 32  # the fewest tokens to arrange a model for: with 10M parameters it takes what 10 to 15 steps save


@cache
def is_intel_with_mkl() -> bool:
    """Return True if this is an Intel CPU and PyTorch has Intel's MKL."""
    cpuinfo = Path("/proc/cpuinfo")
    about = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else platform.processor()
    return "GenuineIntel" in about and torch.backends.mkl.is_available()


class Product(nn.Module):
    """Linear layers that read the same input, as one layer (..., D) -> (..., N), for inputs of n_rows rows.

    Layer i has a weight (N_i, D) and a bias (N_i,), or all of them have the bias None; N = N_1 + N_2 + ...
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], n_rows: int):
        super().__init__()
        self.sizes = [len(weight) for weight in weights]
        weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).detach()
        bias = None if biases[0] is None else torch.cat(biases).detach()
        large = weight.numel() >= LARGE
        self.blocked = (
            large and n_rows > 1 and torch.backends.mkldnn.is_available() and not is_intel_with_mkl()
        )
        if self.blocked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
        elif large and (is_intel_with_mkl() if n_rows > 1 else weight.shape[0] >= weight.shape[1]):
            weight = weight.t().contiguous().t()  # the same values, stored by columns
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class SmallNorm(nn.Module):
    """RMSNorm of x (..., D) over its last dimension, by the second equation at the top of this file."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.width = len(weight)
        self.weight = nn.Parameter(math.sqrt(self.width) * weight, requires_grad=False)
        self.register_buffer("least", torch.tensor(math.sqrt(self.width * eps)))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.least) * self.weight


def products(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Return the outputs (..., N_i) of the linear layers that module.same_input names, for x (..., D); by one
    product, if `arrange` has joined them."""
    joined = getattr(module, "joined", None)
    if joined is None:
        return [getattr(module, name)(x) for name in module.same_input]
    return joined(x).split(joined.sizes, dim=-1)


def on_cpu(x: Tensor) -> bool:
    """Return True for a tensor in float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def is_plain(layer: nn.Module | None) -> bool:
    """Return True for PyTorch's own linear layer, in float32 on a CPU."""
    return type(layer) is nn.Linear and on_cpu(layer.weight)


def gains_by_compiling(model: nn.Module) -> bool:
    """Return True if torch.compile makes generation faster: not on a CPU with large matrices, apart from
    embeddings and head.

    A compiled step attends to every slot of the cache and masks the empty ones. Where products are most of a
    step, this takes longer than compiling saves: it was slower with 8 rows from width 256 on, and with one
    row at 10M parameters.
    """
    names = (name for name, x in model.named_parameters() if x.ndim == 2 and on_cpu(x) and x.numel() >= LARGE)
    return all("embed" in name or "lm_head" in name or "shared" in name for name in names)


@torch.no_grad()
def arrange(model: nn.Module, n_rows: int, n_steps: int) -> nn.Module:
    """Return a copy of a model for generate.py that generates n_steps tokens of n_rows rows faster, or the
    model itself for fewer than STEPS tokens, under autocast, and if it is not on a CPU in float32.

    In the copy linear layers are `Product`s: one for those that a module names in `same_input`, one for every
    other layer, and one for a head that is the embedding matrix. The copy shares all other tensors with the
    model, which stays as it is; so there is at most one more copy of the weights.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if n_steps < STEPS or not on_cpu(tensors[0]) or torch.is_autocast_enabled("cpu"):
        return model
    arranged = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

    # Layers of the same input, and tied heads.
    joined = set()
    for module in list(arranged.modules()):
        layers = [getattr(module, name) for name in getattr(module, "same_input", ())]
        alike = all(map(is_plain, layers)) and len({layer.bias is None for layer in layers}) == 1
        if len(layers) > 1 and alike:
            module.joined = Product([x.weight for x in layers], [x.bias for x in layers], n_rows)
            joined.update(layers)
        if getattr(module, "lm_head", module) is None and on_cpu(module.head_weight):
            module.lm_head = Product([module.head_weight], [None], n_rows)

    # The other layers, and the norms as gpt.py has them.
    for name, layer in list(arranged.named_modules()):
        if is_plain(layer) and layer not in joined:
            arranged.set_submodule(name, Product([layer.weight], [layer.bias], n_rows))
        elif getattr(layer, "kind", None) == "rms" and on_cpu(layer.weight):
            arranged.set_submodule(name, SmallNorm(layer.weight, layer.eps))
    return arranged


def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return one index per row, int64 (B, 1), drawn with the probabilities p (B, V), rows of sum 1.

    One random number per row is looked up in the running sum of p, in float64 (torch.multinomial draws V
    numbers per row, which takes ten times as long on a CPU).
    """
    ends = p.cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand(len(p), 1, dtype=torch.float64, device=p.device, generator=generator)
    # The first index whose end is above u: never one of probability 0, which ends where the one before ends.
    return torch.searchsorted(ends, u * ends[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
