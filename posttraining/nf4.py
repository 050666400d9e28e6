"""NF4: the weights of a frozen model in 4 bits, as QLoRA trains adapters on them (Dettmers et al. 2023).

    w ~ c_q a            c: 16 fixed values in [-1, 1],  q: the index of the nearest to w / a,  a = max |w|
                         over the 64 weights of a block

The weights of a frozen model are not updated, so they need only the precision that its outputs need. Trained
weights are close to normally distributed. The 16 values of NF4 ("4-bit NormalFloat") are quantiles of a
normal distribution, so that all are used about equally often, while evenly spaced values would spend the
outer ones on the few large weights. (Only about: weights are divided by the largest of their block, not by
their standard deviation.) Each block has its own a, so that a large weight reduces the precision of only 63
others. The file has three parts:

    the values      the 16 of NF4, section 3 of the paper, and the 256 in which the constants a are stored
    the tensor      NF4: half a byte for each weight, and the constants, 32 bits for 64 weights, themselves
                    quantised to 8 bits (double quantisation): 4.127 bits per weight instead of 4.5
    the layers      y = x W^T, where W is dequantised for each product, forward and backward, and freed after
                    it. Only the packed W is kept for backward, and W gets no gradient. (The exception is the
                    head, which goes into the loss as a matrix.)

The numbers are those of bitsandbytes. There, embeddings and head usually stay in 16 bits. Here they are in 4
bits as well: in a small model they are a large part, and a look-up dequantises only the rows that it needs.

    python -m posttraining.nf4                     the 16 values and their quantiles
    python -m posttraining.nf4 runs/gpt/model      a checkpoint in 4 bits: its bytes, and the error by layer

Shapes: D inputs and N outputs of a layer, E experts, V vocabulary, M rows, n blocks of 64 weights.
"""

import importlib
import math
import re
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats import command
from kernels import grouped_matmul
from moe import ExpertLinear

BLOCK = 64  # weights that share a constant a
GROUP = 256  # constants a that share a second constant


def nf4_quantiles() -> Tensor:
    """Return 16 quantiles of the standard normal distribution, ascending, float32.

    They are at 8 evenly spaced probabilities from d to 1/2 and at 9 from 1/2 to 1 - d. 1/2 counts once, so
    that 0, the commonest weight, is represented exactly. d = (1/32 + 1/30) / 2 is the mean of half a step of
    16 and of 15 (Yoshida 2023, from the code); bitsandbytes rounds 1 - d to 0.9677083. The spacing is in
    float32, like that of the published values.
    """
    below, above = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, steps, device="cpu").double()).float()
        for steps in (8, 9)
    )
    return torch.cat((-below[:-1], above.flip(0)))


def nf4_code() -> Tensor:
    """Return the 16 values of NF4, ascending, float32: the quantiles, scaled to end at -1 and 1."""
    quantiles = nf4_quantiles()
    return quantiles / quantiles[-1]


def dynamic_code() -> Tensor:
    """Return the 256 values of an 8-bit format for numbers of any magnitude, +-10^-e f, ascending, float32.

    It is a floating-point format with the exponent in unary: after the sign come e zeros and a one, and the
    other 6 - e bits divide 0.1 to 1 into 2^(6 - e) parts, of which f is the middle of one. The two codes that
    are left over mean 0 and 1 (8-bit Optimizers via Block-wise Quantization, Dettmers et al. 2022, section
    1.3).
    """
    positive = []
    for e in range(6, -1, -1):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e) + 1, device="cpu")
        positive.append(10.0**-e * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(positive)  # (127,)
    return torch.cat((-positive.flip(0), positive.new_zeros(1), positive, positive.new_ones(1)))


@cache
def tables() -> tuple[Tensor, Tensor]:
    """Return the pair of values of each byte (256,), 2 float32 viewed as one int64, so that one look-up gives
    both; and `dynamic_code` (256,), viewed as int32."""
    code = nf4_code()
    pairs = torch.cartesian_prod(code, code)  # (256, 2): the high four bits are the first value
    return pairs.view(torch.int64).flatten(), dynamic_code().view(torch.int32)


def nearest(x: Tensor, largest: Tensor, code: Tensor) -> Tensor:
    """Return for each x (n, m) the index of the nearest value in code, uint8 (n, m).

    Rows are divided by their largest absolute value, `largest` (n,), first. code is ascending; if two values
    are equally near, it is the lower one. Rows of zeros get the index of 0.
    """
    scaled = x * (1 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    middles = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled, middles.to(x.device), out_int32=True).to(torch.uint8)


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed codes, uint8 (n, 32), two in a byte, and constants a, float32 (n,), of w of any shape.

    w is taken as one row, and its last block is padded with zeros.
    """
    flat = w.detach().flatten()
    if flat.numel() % BLOCK:
        flat = F.pad(flat, (0, -flat.numel() % BLOCK))
    packed, absmax = [], []
    # Take 8 million weights at a time, to bound the memory of copies.
    for part in flat.view(-1, BLOCK).split(2**17):
        part = part.float()
        absmax.append(part.abs().amax(dim=1))
        q = nearest(part, absmax[-1], nf4_code())
        packed.append(q[:, ::2] << 4 | q[:, 1::2])
    return torch.cat(packed), torch.cat(absmax)


class NF4(nn.Module):
    """A tensor of any shape in 4 bits, without gradient.

    The constants a are quantised too: their mean is subtracted, the rest is divided by the largest of each
    256, and rounded to the nearest value of `dynamic_code`, like bitsandbytes on a GPU. (On a CPU it rounds
    to a grid of 2^16 points first, so that about 1 code in several hundred is a neighbour of ours.)
    """

    codes: Tensor  # uint8 (n, 32)
    constants: Tensor  # uint8 (n,)
    # The bits of float32 numbers, viewed as int32, so that model.to(torch.bfloat16) does not round them.
    largest: Tensor  # (n / 256,)
    mean: Tensor  # ()

    def __init__(self, w: Tensor):
        """Quantise w. Raises ValueError if it is empty, not of a floating-point dtype, or not finite."""
        super().__init__()
        if not w.is_floating_point() or w.numel() == 0:
            raise ValueError(
                f"NF4: {w.dtype} of shape {tuple(w.shape)}: expected at least one floating-point number"
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
        for name, table in zip(("pairs", "dynamic"), tables(), strict=True):  # one copy for all on a CPU
            self.register_buffer(name, table.to(w.device), persistent=False)
        self.register_buffer("like", w.new_empty(0), persistent=False)  # its dtype follows .to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of w, which `to` changes as it changes that of any parameter."""
        return self.like.dtype

    def numel(self) -> int:
        """Return the number of weights."""
        return math.prod(self.shape)

    def absmax(self, block: Tensor) -> Tensor:
        """Return the constants a of these blocks, float32, in the shape of block (int64)."""
        largest, mean, dynamic = (t.view(torch.float32) for t in (self.largest, self.mean, self.dynamic))
        return dynamic[self.constants[block].int()] * largest[block // GROUP] + mean

    def values(self, codes: Tensor, block: Tensor) -> Tensor:
        """Return the weights (..., 64), float32, of codes (..., 32), which belong to block (...)."""
        pairs = self.pairs.index_select(0, codes.flatten().int())
        return pairs.view(torch.float32).view(*block.shape, BLOCK).mul_(self.absmax(block)[..., None])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor in its own dtype (None) or another, rounded once."""
        every = torch.arange(len(self.codes), device=self.codes.device)
        flat = self.values(self.codes, every).flatten()
        return flat[: self.numel()].view(self.shape).to(dtype or self.dtype)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows (..., D) of a matrix (V, D) at index (...).

        Only these are dequantised if rows consist of whole blocks (D a multiple of 64), otherwise all are.
        """
        V, D = self.shape
        if D % BLOCK:
            return F.embedding(index, self.dequantize(dtype))
        per_row = D // BLOCK
        codes = F.embedding(index, self.codes.view(V, -1))  # (..., D / 2)
        block = index[..., None] * per_row + torch.arange(per_row, device=index.device)
        return self.values(codes, block).flatten(-2).to(dtype or self.dtype)


class Product(torch.autograd.Function):
    """x W^T + b, or grouped_matmul(x, W, offsets), where W in 4 bits is dequantised again in backward."""

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
    """Return F.linear(x, w, bias) of x (..., D) and w (N, D), or with offsets grouped_matmul(x, w, offsets)
    of x (M, D) and w (E, N, D), in the dtype of x or of autocast. Only x and bias get gradients."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return Product.apply(x, bias, offsets, w, backend)


class QuantizedLinear(nn.Module):
    """A linear layer with its matrix in 4 bits."""

    def __init__(self, layer: nn.Linear, quantized: NF4 | None = None):
        """Quantise a layer; quantized: its weight, if that is quantised already."""
        super().__init__()
        self.nf4 = NF4(layer.weight) if quantized is None else quantized
        self.out_features, self.in_features = self.nf4.shape
        self.bias = layer.bias

    @classmethod
    def sharing(cls, embedding: "QuantizedEmbedding") -> "QuantizedLinear":
        """Return a head that shares the matrix (V, D) of an embedding."""
        V, D = embedding.nf4.shape
        return cls(nn.Linear(D, V, bias=False, device="meta"), embedding.nf4)

    @property
    def weight(self) -> Tensor:
        """The matrix (N, D), computed again at each use, in the dtype that the layer had."""
        return self.nf4.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.nf4, self.bias)


class QuantizedEmbedding(nn.Module):
    """An embedding with its matrix in 4 bits."""

    def __init__(self, layer: nn.Embedding, quantized: NF4 | None = None):
        """Quantise a layer. Raises ValueError if the layer changes its weights in use (max_norm)."""
        super().__init__()
        if layer.max_norm is not None:
            raise ValueError(f"max_norm {layer.max_norm}: weights in 4 bits cannot be changed; expected None")
        self.nf4 = NF4(layer.weight) if quantized is None else quantized
        self.num_embeddings, self.embedding_dim = self.nf4.shape

    @property
    def weight(self) -> Tensor:
        """The matrix (V, D), computed again at each use, in the dtype that the layer had."""
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
    """Raise ValueError for a parameter that is not finite."""
    for name, p in model.named_parameters():
        if p.numel() and not torch.stack(p.detach().aminmax()).isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite; it cannot be quantised")


def quantize(model: nn.Module) -> nn.Module:
    """Quantise the linear layers, embeddings and experts of a model in place, and freeze the rest: norms,
    routers, biases. Weights and layers that are shared stay shared.

    Each weight is freed before the next one is quantised, unless something else refers to it. Returns the
    model, or its replacement if it is such a layer itself. Raises ValueError, with the model unchanged,
    for a parameter that is not finite.
    """
    check_finite(model)
    # By id. All layers and weights exist from the start, so no two of them have the same id.
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
    """Return the bytes of all parameters and buffers; memory that is shared counts once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def errors(model: nn.Module) -> dict[str, tuple[int, float, float]]:
    """Return for each kind of weight (its name without the layer's number) the number of weights, and the
    relative error |w' - w| / |w| in bfloat16 and in NF4."""
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
    parser = command.Parser(description="Measure a checkpoint in 4 bits, or print the values of NF4.")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=command.filled,
        help="directory in Hugging Face layout (default: print the values)",
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
    command.run(main)
