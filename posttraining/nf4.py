"""QLoRA: a base model in 4 bits (Dettmers et al. 2023).

    w ~ c_q a            c: 16 fixed values in [-1, 1],  q: the index of the nearest to w / a,  a = max |w|
                         over the 64 weights of a block

What is trained of a frozen model is an adapter beside it (lora.py), so the weights themselves need be no more
exact than the output can bear. Trained weights are close to normally distributed. NF4 ("4-bit NormalFloat")
takes for c quantiles of the normal distribution, so that each of the 16 is used more nearly as often than
evenly spaced values, which waste the outer ones on the rare large weights. (Not quite as often: weights are
scaled by the largest of their block and not by their deviation.) A block has its own a so that one large
weight spoils 63 others and no more. In three steps:

    the values      the 16 of NF4, section 3 of the paper, and the 256 that hold the block constants a
    the tensor      NF4: half a byte for each weight, and the constants, 32 bits for 64 weights, themselves
                    quantised to 8 bits (double quantisation): 4.127 bits a weight in all, instead of 4.5
    the layers      y = x W^T with W dequantised for the product and forgotten after it, forward and backward:
                    what backward needs is the packed W, and it makes no gradient of W. (The head, which goes
                    into the loss as a matrix, is the exception.)

The numbers are bitsandbytes'. Those who use it leave embeddings and head in 16 bits; here they are in 4 as
well: in a small model they are much of all there is, and look-ups then dequantise only their rows.

    python -m posttraining.nf4                     the 16 values and where they come from
    python -m posttraining.nf4 runs/gpt/model      how much of a checkpoint 4 bits leave: bytes, and the error by layer

Shapes: D inputs and N outputs of a layer, E experts, V vocabulary, M rows, n blocks of 64 weights.
"""

import argparse
import importlib
import math
import re
import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import grouped_matmul
from moe import ExpertLinear

BLOCK = 64  # weights that share a constant
GROUP = 256  # constants that share a constant


def nf4_quantiles() -> Tensor:
    """(16,) float32, ascending: of the standard normal, at 8 evenly spaced probabilities from d to 1/2 and 9
    from 1/2 to 1 - d, where 1/2 counts once: weights are often 0, which so is exact.

    d = (1/32 + 1/30) / 2, the mean of half a step of 16 and of 15 (Yoshida 2023, who read it from the code);
    bitsandbytes rounds 1 - d to 0.9677083. It is spaced in float32 because that of the published values was.
    """
    below, above = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, steps, device="cpu").double()).float()
        for steps in (8, 9)
    )
    return torch.cat((-below[:-1], above.flip(0)))


def nf4_code() -> Tensor:
    """(16,) float32, ascending: the quantiles, scaled so that they end at -1 and 1."""
    quantiles = nf4_quantiles()
    return quantiles / quantiles[-1]


def dynamic_code() -> Tensor:
    """(256,) float32, ascending: a format of 8 bits for values of any magnitude, +-10^-e f.

    Like that of a floating-point number, its exponent costs bits of the fraction, but in unary: after the
    sign come e zeros and a one, and 6 - e bits are left to divide 0.1 to 1 into 2^(6 - e) parts, f being the
    middle of one. Two codes are left over, and they are 0 and 1 (8-bit Optimizers via Block-wise
    Quantization, Dettmers et al. 2022, section 1.3).
    """
    positive = []
    for e in range(6, -1, -1):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e) + 1, device="cpu")
        positive.append(10.0**-e * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(positive)  # (127,)
    return torch.cat((-positive.flip(0), positive.new_zeros(1), positive, positive.new_ones(1)))


@cache
def tables() -> tuple[Tensor, Tensor]:
    """What dequantises: the two values of each byte (256,), 2 float32 side by side as one int64, so that one
    look-up gives both; and `dynamic_code` (256,), its bits as int32."""
    code = nf4_code()
    pairs = torch.cartesian_prod(code, code)  # (256, 2): the high four bits are the first value
    return pairs.view(torch.int64).flatten(), dynamic_code().view(torch.int32)


def nearest(x: Tensor, largest: Tensor, code: Tensor) -> Tensor:
    """uint8, like x (n, m), each row by its largest absolute value (n,): the index of the value in code,
    ascending, that is nearest, of two the lower. A row of zeros stays zeros."""
    scaled = x * (1 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    middles = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled, middles.to(x.device), out_int32=True).to(torch.uint8)


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8 (n, 32), two in a byte, and constants, float32 (n,), of w of any shape, as one row;
    zeros fill up the last block."""
    flat = w.detach().flatten()
    if flat.numel() % BLOCK:
        flat = F.pad(flat, (0, -flat.numel() % BLOCK))
    packed, absmax = [], []
    for part in flat.view(-1, BLOCK).split(2**17):  # 8 million weights at a time, so that copies are small
        part = part.float()
        absmax.append(part.abs().amax(dim=1))
        q = nearest(part, absmax[-1], nf4_code())
        packed.append(q[:, ::2] << 4 | q[:, 1::2])
    return torch.cat(packed), torch.cat(absmax)


class NF4(nn.Module):
    """A tensor of any shape in 4 bits, without gradient.

    The block constants are quantised too: their mean is taken off, and what is left is scaled, 256 of them by
    the largest, and rounded to `dynamic_code`. That is to the nearest, as in bitsandbytes on a GPU; on a CPU
    it rounds to a grid of 2^16 points first, and 1 code in some hundreds comes out as a neighbour.
    """

    codes: Tensor  # uint8 (n, 32)
    constants: Tensor  # uint8 (n,)
    # Float32, but as bits in int32: model.to(torch.bfloat16) must not round them.
    largest: Tensor  # (n / 256,)
    mean: Tensor  # ()

    def __init__(self, w: Tensor):
        """Raises ValueError for a w that is empty, not of a float dtype, or not finite."""
        super().__init__()
        if not w.is_floating_point() or w.numel() == 0:
            raise ValueError(
                f"NF4: {w.dtype} of shape {tuple(w.shape)}: expected some floating-point numbers"
            )
        codes, absmax = quantize_blocks(w)
        mean = absmax.mean()
        if not mean.isfinite():
            raise ValueError(f"NF4: a tensor of shape {tuple(w.shape)} has numbers that are not finite")
        self.shape = w.shape
        groups = F.pad(absmax - mean, (0, -len(absmax) % GROUP)).view(-1, GROUP)
        largest = groups.abs().amax(dim=1)
        constants = nearest(groups, largest, dynamic_code()).flatten()[: len(absmax)].clone()
        self.register_buffer("codes", codes)
        self.register_buffer("constants", constants)
        self.register_buffer("largest", largest.view(torch.int32))
        self.register_buffer("mean", mean.view(torch.int32))
        for name, table in zip(("pairs", "dynamic"), tables(), strict=True):  # on a CPU, all share these
            self.register_buffer(name, table.to(w.device), persistent=False)
        self.register_buffer("like", w.new_empty(0), persistent=False)  # has the dtype, also after .to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """In which the weights came; `to` changes it as it would theirs."""
        return self.like.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def absmax(self, block: Tensor) -> Tensor:
        """The constants of these blocks, float32 like block (int64, of any shape)."""
        largest, mean, dynamic = (t.view(torch.float32) for t in (self.largest, self.mean, self.dynamic))
        return dynamic[self.constants[block].int()] * largest[block // GROUP] + mean

    def values(self, codes: Tensor, block: Tensor) -> Tensor:
        """float32 (..., 64) of codes (..., 32), which are those of block (...)."""
        pairs = self.pairs.index_select(0, codes.flatten().int())
        return pairs.view(torch.float32).view(*block.shape, BLOCK).mul_(self.absmax(block)[..., None])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in its own dtype (None) or another, rounded once."""
        every = torch.arange(len(self.codes), device=self.codes.device)
        flat = self.values(self.codes, every).flatten()
        return flat[: self.numel()].view(self.shape).to(dtype or self.dtype)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(..., D) of a matrix (V, D) at index (...). Unless rows are whole blocks (D a multiple of 64), all
        are dequantised for it."""
        V, D = self.shape
        if D % BLOCK:
            return F.embedding(index, self.dequantize(dtype))
        per_row = D // BLOCK
        codes = F.embedding(index, self.codes.view(V, -1))  # (..., D / 2)
        block = index[..., None] * per_row + torch.arange(per_row, device=index.device)
        return self.values(codes, block).flatten(-2).to(dtype or self.dtype)


class Product(torch.autograd.Function):
    """x W^T + b, or grouped_matmul(x, W, offsets), of a W in 4 bits that is dequantised again in backward."""

    @staticmethod
    def forward(ctx, x, bias, offsets, nf4, backend):
        ctx.nf4, ctx.backend = nf4, backend
        ctx.save_for_backward(offsets)
        w = nf4.dequantize(x.dtype)
        if offsets is None:
            return F.linear(x, w, bias)
        return grouped_matmul(x, w, offsets, backend=backend)

    @staticmethod
    def backward(ctx, dy):
        (offsets,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            w = ctx.nf4.dequantize(dy.dtype)
            dx = dy @ w if offsets is None else grouped_matmul(dy, w.mT, offsets, backend=ctx.backend)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dx, dbias, None, None, None


def product(
    x: Tensor, w: NF4, bias: Tensor | None = None, offsets: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """F.linear(x, w, bias) of x (..., D) and w (N, D), or with offsets grouped_matmul(x, w, offsets) of x
    (M, D) and w (E, N, D), in the dtype of x, or under autocast in that; gradients of x and bias only."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return Product.apply(x, bias, offsets, w, backend)


class QuantizedLinear(nn.Module):
    def __init__(self, layer: nn.Linear, quantized: NF4 | None = None):
        """quantized: the weight of layer, if it is quantised already."""
        super().__init__()
        self.nf4 = NF4(layer.weight) if quantized is None else quantized
        self.out_features, self.in_features = self.nf4.shape
        self.bias = layer.bias

    @classmethod
    def sharing(cls, embedding: "QuantizedEmbedding") -> "QuantizedLinear":
        """The head whose matrix (V, D) is that of an embedding."""
        V, D = embedding.nf4.shape
        return cls(nn.Linear(D, V, bias=False, device="meta"), embedding.nf4)

    @property
    def weight(self) -> Tensor:
        """(N, D), made anew at each use, in the dtype the layer came in."""
        return self.nf4.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.nf4, self.bias)


class QuantizedEmbedding(nn.Module):
    def __init__(self, layer: nn.Embedding, quantized: NF4 | None = None):
        """Raises ValueError for a layer that changes its weights as they are used (max_norm)."""
        super().__init__()
        if layer.max_norm is not None:
            raise ValueError(f"max_norm {layer.max_norm}: weights in 4 bits cannot be changed; expected None")
        self.nf4 = NF4(layer.weight) if quantized is None else quantized
        self.num_embeddings, self.embedding_dim = self.nf4.shape

    @property
    def weight(self) -> Tensor:
        """(V, D), made anew at each use, in the dtype the layer came in."""
        return self.nf4.dequantize()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.nf4.rows(tokens)


class QuantizedExpertLinear(nn.Module):
    """moe.py's ExpertLinear with its matrices (E, N, D) in 4 bits."""

    def __init__(self, layer: ExpertLinear, quantized: NF4 | None = None):
        super().__init__()
        self.nf4 = NF4(layer.weight) if quantized is None else quantized
        self.backend = layer.backend

    @property
    def weight(self) -> Tensor:
        """The matrices (E, N, D), computed again at each use, in the dtype that the layer had."""
        return self.nf4.dequantize()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return (M, N) of x (M, D), in which the rows of expert e end at offsets[e]."""
        return product(x, self.nf4, offsets=offsets, backend=self.backend)


# The layers that are quantised, and what takes their place.
COUNTERPARTS = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    ExpertLinear: QuantizedExpertLinear,
}


def check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.numel() and not torch.stack(p.detach().aminmax()).isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite; it cannot be quantised")


def quantize(model: nn.Module) -> nn.Module:
    """Put every linear layer, embedding and stack of experts of a model into 4 bits, in place, and freeze the
    rest: norms, routers, biases. A weight or layer that is in two places stays one.

    It goes layer by layer, and each weight is free before the next is quantised, if nothing else holds it.
    Returns the model (the layer in its place, if it is one itself). Raises ValueError, with nothing changed,
    for a parameter that is not finite.
    """
    check_finite(model)
    # By id: all layers and weights looked up here are there from the start, so no two have the same.
    tensors: dict[int, NF4] = {}
    layers: dict[int, nn.Module] = {}

    def quantized(weight: Tensor) -> NF4:
        if id(weight) not in tensors:
            tensors[id(weight)] = NF4(weight)
        return tensors[id(weight)]

    def replaced(module: nn.Module) -> nn.Module:
        if type(module) in COUNTERPARTS:
            if id(module) not in layers:
                layers[id(module)] = COUNTERPARTS[type(module)](module, quantized(module.weight))
            return layers[id(module)]
        for name in list(module._modules):  # names only: a list of the layers would keep all of them alive
            if module._modules[name] is not None:
                setattr(module, name, replaced(module._modules[name]))
        return module

    return replaced(model).requires_grad_(False)


def n_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each piece of memory counted once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def errors(model: nn.Module) -> dict[str, tuple[int, float, float]]:
    """For each kind of weight (its name without the layer's number): how many there are, and the error
    |w' - w| / |w| of w' in bfloat16 and in NF4."""
    sums: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if type(module) in COUNTERPARTS:
            w = module.weight.detach().float()
            off = [(other.float() - w).square().sum() for other in (w.bfloat16(), NF4(w).dequantize())]
            row = torch.stack((torch.tensor(w.numel()), w.square().sum(), *off)).double()
            kind = re.sub(r".*\.\d+\.", "", path)
            sums[kind] = sums.get(kind, 0) + row
    return {
        kind: (int(n), (bf16 / norm).sqrt().item(), (nf4 / norm).sqrt().item())
        for kind, (n, norm, bf16, nf4) in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What 4 bits make of a checkpoint, or the values of NF4.")
    parser.add_argument(
        "checkpoint", nargs="?", help="directory in Hugging Face layout; without it, the values"
    )
    args = parser.parse_args()
    if args.checkpoint is None:
        print(f"{'code':>4} {'probability':>12} {'quantile':>9} {'value':>20}")
        quantiles = nf4_quantiles()
        p = torch.special.ndtr(quantiles.double())
        for i, row in enumerate(zip(p.tolist(), quantiles.tolist(), nf4_code().tolist(), strict=True)):
            print(f"{i:4} {row[0]:12.6f} {row[1]:9.5f} {row[2]:20.16f}")
        return
    open_model = importlib.import_module("formats.open_model").open_model
    model = open_model(args.checkpoint).float()
    n = sum(p.numel() for p in model.parameters())
    print(f"{'weights':28} {'parameters':>15} {'error: bfloat16':>16} {'NF4':>8}")
    for kind, (count, bf16, nf4) in errors(model).items():
        print(f"{kind:28} {count:15,} {bf16:16.2%} {nf4:8.2%}")
    print(f"\n{'':28} {'bytes':>15} {'per parameter':>16}")
    sizes = {"float32": 4 * n, "bfloat16": 2 * n, "NF4, all in": n_bytes(quantize(model))}
    for name, size in sizes.items():
        print(f"{name:28} {size:15,} {size / n:16.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
