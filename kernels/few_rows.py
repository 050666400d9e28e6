"""Products of few rows with wide matrices on a CPU, of which a step of generation consists.

    y = x W^T        x (B, D), one token of each row; W (N, D)

So few rows leave the cores waiting for W. How fast MKL, PyTorch's library for products in float32, then reads
a large W of more rows than columns, depends on how the product is written:

    B = 1     F.linear(x, W) where the memory of W is laid out by columns: up to twice as fast as by rows
    B > 1     (W x^T)^T: up to 1.9 times as fast as F.linear(x, W)

(one thread of an AMD EPYC of family 25, N = 4096 and D = 384). A step of `gpt.SIZES["10m"]` is 1.24 times as
fast at B = 1 and 1.07 times as fast at B = 8, on a busy machine. Narrow matrices gain nothing, and small ones
stay in the caches.
"""

import copy
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 18  # numbers of a matrix from which on it is worth while
STEPS = 32  # tokens from which on: to arrange a model of 10M parameters takes as long as 10 to 15 steps save


class Wide(nn.Linear):
    """A linear layer (..., D) -> (..., N) for few rows, with the weight of another one; see `arrange`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, n_rows: int):
        super().__init__(*weight.shape[::-1], bias=False, device="meta")
        if n_rows == 1:
            weight = weight.t().contiguous().t()  # the same values, stored by columns
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (B, D)
        if len(rows) == 1:
            return F.linear(x, self.weight, self.bias)
        y = (self.weight @ rows.t()).t()  # (B, N)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def is_wide(weight: Tensor) -> bool:
    """Return True for a matrix (N, D) in float32 on a CPU that `Wide` multiplies faster."""
    n_rows, n_columns = weight.shape
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and n_rows > n_columns and weight.numel() >= LARGE


@torch.no_grad()
def arrange(model: nn.Module, n_rows: int, n_steps: int) -> nn.Module:
    """Return a copy of a model of generate.py that is faster in n_steps of n_rows tokens, or itself.

    In the copy, wide linear layers and a head that is the embedding matrix are `Wide`. All other parameters
    are shared with the model, which stays as it is. With n_rows 1 the wide matrices are copied, so there is
    at most one more copy of the weights.
    """
    wide = {
        name for name, layer in model.named_modules() if type(layer) is nn.Linear and is_wide(layer.weight)
    }
    tied = getattr(model, "lm_head", model) is None and is_wide(model.head_weight)
    if n_steps < STEPS or not (wide or tied):
        return model
    tensors = chain(model.parameters(), model.buffers())
    arranged = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in wide:
        layer = arranged.get_submodule(name)
        arranged.set_submodule(name, Wide(layer.weight, layer.bias, n_rows))
    if tied:
        arranged.lm_head = Wide(model.head_weight, None, n_rows)
    return arranged
