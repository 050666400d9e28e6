"""Cross entropy of a linear layer, the loss of a language model, without all logits in memory at once.

    x = hidden W^T,  softcap: x = c tanh(x / c)        lse_i = log sum_v exp(x_iv)
    loss = mean_i (lse_i - x_i,target) + z,        z = z_loss * mean_i lse_i^2

with i over the tokens whose target is not ignore_index. z keeps the softmax's denominator near 1 (PaLM,
Chowdhery et al. 2022, section 5); the soft-cap keeps logits in (-c, c) (Gemma 2, section 2). The gradient,
per token and before the mean:

    dx_iv = (1 + 2 z_loss lse_i) softmax_iv - [v = target_i],  softcap: times 1 - (x_iv / c)^2
    dhidden = dx W,  dW = dx^T hidden

Where the memory goes: N tokens of width D have N D numbers of hidden, and N V logits. With D = 768, V = 50257
the logits, their softmax and their gradient need more memory than the rest of a small model. But the loss of
a token needs only its own V logits, and so does its dx, up to one factor: the gradient of the loss, which the
backward pass brings and which is the same for all tokens. So the forward pass takes one chunk of tokens after
the other: it computes their logits, dx in the place of the logits, and from dx their rows of dhidden and
their share of dW. The backward pass multiplies both by the factor.

    reference   the equations above, on all logits at once
    torch       PyTorch's own: F.cross_entropy, or for many logits F.linear_cross_entropy, which has chunks
                too; without soft-cap and z-loss
    triton      chunks, with one kernel that reads logits and writes the losses, and dx in their place
    chunked     chunks, in PyTorch operations
    auto        triton on a GPU; elsewhere chunked, or, where it can, torch if all logits fit a CPU's cache

Gradients in the forward pass, chunk by chunk: Liger-Kernel (Hsu et al. 2024, section 3.2). Cut Cross-Entropy
(Wijmans et al. 2024) does not even store the logits of a chunk, but multiplies hidden and W once more.

Shapes: N tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, library

from kernels import configs
from kernels.backend import (
    HAS_TRITON,
    architecture,
    choose,
    on_device,
    readable,
    refuse_second_derivative,
    refuse_transforms,
    tl,
    transformed,
    triton,
)

HAS_CHUNKS = hasattr(torch.nn, "LinearCrossEntropyOptions")  # from PyTorch 2.13 on
IN_CACHE = 2**20  # logits, 4 MB in float32: about one core's share of a CPU's caches


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of the logits hidden @ weight.T, and the part of it that is z-loss.

    hidden (..., D) and weight (V, D) have one float dtype; targets (...) are int64, in [0, V) or equal to
    ignore_index. The results are two scalars in float32 (in float64 for float64): the loss, which includes z,
    and z, which has no gradient. A token whose target is ignored counts for nothing, whatever its logits; on
    a GPU its row of hidden must be finite. If all targets are ignored, both results are 0, with zero
    gradients. Under autocast the products run in its dtype, like those of F.linear.

    softcap: above 0. backend: see the top of this file. Only "reference" has a second derivative.
    Raises ValueError if shapes or dtypes do not fit each other or the backend cannot compute this; on a CPU
    also for a target out of range. On a GPU, where a check would wait for the GPU, such a target makes the
    loss NaN.
    """
    N, (V, D) = targets.numel(), weight.shape if weight.dim() == 2 else (0, 0)
    if hidden.shape != (*targets.shape, D) or V == 0 or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)} {targets.dtype}: expected (..., D), (V, D), V > 0, and (...) torch.int64"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap {softcap}: expected above 0, or None for none")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.dtype}, weight {weight.dtype}: expected one float dtype"
        )

    # One row per token.
    hidden, targets = hidden.reshape(N, D), targets.reshape(N).contiguous()  # as the kernel reads them
    valid = targets != ignore_index
    check_range(targets, valid, V, ignore_index)

    backend = _choose(backend, hidden, V, softcap, z_loss)
    if backend == "reference":
        total, z = _reference(without_ignored(hidden, valid), weight, targets, valid, softcap, z_loss)
    elif backend == "torch":
        total = _torch(without_ignored(hidden, valid), weight, targets, ignore_index)
        z = torch.zeros_like(total)
    else:
        needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        total, z, _, _ = _in_chunks(
            hidden, weight, targets, ignore_index, softcap, z_loss, backend == "triton", *needs
        )
    # The saved gradients are those of the sum over tokens, not of the mean: divided by N, many would be too
    # small for float16.
    n = valid.sum().clamp(min=1)
    return total / n, z.detach() / n


def check_range(targets: Tensor, valid: Tensor, V: int, ignore_index: int) -> None:
    """Raise ValueError for a valid target outside 0 ... V - 1, unless the check would wait for a GPU."""
    if readable(targets):
        outside = valid & ((targets < 0) | (targets >= V))
        if outside.any():
            raise ValueError(
                f"linear_cross_entropy: target {targets[outside][0]}: expected 0 to {V - 1} or {ignore_index}"
            )


def without_ignored(hidden: Tensor, valid: Tensor) -> Tensor:
    """Return hidden (N, D) with zeros in the rows of ignored tokens: 0 times NaN there would be NaN."""
    return hidden if readable(valid) and valid.all() else hidden.masked_fill(~valid[:, None], 0)


def _choose(backend: str, hidden: Tensor, V: int, softcap: float | None, z_loss: float) -> str:
    """Return the backend that runs. Raise ValueError if it does not exist or cannot compute this."""
    fits_cache = hidden.shape[0] * V <= IN_CACHE
    plain = softcap is None and not z_loss
    if backend == "auto" and transformed():
        return "reference"
    if backend == "auto" and hidden.is_cuda and HAS_TRITON and hidden.dtype != torch.float64:
        return "triton"
    if backend == "auto":
        return "torch" if fits_cache and plain else "chunked"
    if backend == "chunked":
        refuse_transforms("linear_cross_entropy", backend)
        return backend
    why = None
    if backend == "triton" and hidden.dtype == torch.float64:
        why = "computes in float32 and takes no float64"
    elif backend == "torch" and not plain:
        why = "has no softcap and no z_loss"
    if why is not None:
        raise ValueError(f"linear_cross_entropy: backend {backend!r} {why}; use 'auto' or 'reference'")
    return choose("linear_cross_entropy", backend, hidden)


def _reference(hidden, weight, targets, valid, softcap, z_loss):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(dim=1)
    nll = lse - logits.gather(1, targets.where(valid, 0)[:, None]).squeeze(1)
    z = z_loss * lse.square().where(valid, 0).sum()
    return nll.where(valid, 0).sum() + z, z


def _torch(hidden, weight, targets, ignore_index):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.shape[0] * weight.shape[0] <= IN_CACHE or not HAS_CHUNKS:
        logits = F.linear(hidden, weight).to(wide)
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    # F.linear_cross_entropy returns the dtype of hidden. A sum in 16 bits would be wrong by a percent, so for
    # 16 bits it returns one loss per token, and these are added in float32.
    reduction = "none" if hidden.dtype != wide else "sum"
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(
        hidden, weight, targets, reduction=reduction, ignore_index=ignore_index, options=options
    ).sum(dtype=wide)


def rows_per_chunk(N: int, D: int, V: int, device: str) -> int:
    """Return how many of N tokens a chunk has: a power of two, unless N is smaller.

    On a GPU at most N D / V, so that a chunk has no more logits than there are numbers of hidden; elsewhere
    as many as fit the cache. But always enough to keep the matrix products fast: to add the share of a chunk
    to dW takes 2 V D operations per row, and reads and writes 8 V D bytes for any number of rows. By the data
    sheet of an H100, 989 TFLOPS and 3.35 TB/s, the bytes take longer below about 1,200 rows. (From D = 512
    on, 1024 rows of bfloat16 logits take no more memory than dW.)
    """
    fewest, logits = (1024, N * D) if device == "cuda" else (256, IN_CACHE)
    rows = 1 << (max(logits // V, 1).bit_length() - 1)
    return max(1, min(max(rows, fewest), N))


@library.custom_op("plinth::linear_cross_entropy", mutates_args=())
def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    kernel: bool,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum over tokens of the loss with z, that of z, and the gradients of the first, dhidden and
    dweight, by chunks; kernel: with the Triton kernel.

    dhidden is like hidden, dweight in float32 or wider; a gradient that is not needed is empty.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = hidden.new_empty((N, D) if need_dhidden else 0)
    # In bfloat16 the share of each of dozens of chunks would be rounded to the 8 bits of the sum so far.
    dweight = weight.new_zeros((V, D) if need_dweight else 0, dtype=wide)
    nll, lse = hidden.new_empty((2, N), dtype=wide)

    rows = rows_per_chunk(N, D, V, hidden.device.type)
    if kernel:
        rows = min(max(rows, config_of(hidden, V).rows), max(N, 1))
    # A GPU reads 16 bytes at once if rows begin at multiples of 16 bytes: V is rounded up.
    stride = triton.cdiv(V, 64) * 64 if kernel else V
    logits = hidden.new_empty(rows, stride)
    to_gradient = to_gradient_triton if kernel else to_gradient_plain
    options = (ignore_index, softcap, z_loss, need_dhidden or need_dweight)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        h = hidden[part]
        # dx is 0 for an ignored token, but 0 times NaN or infinity in its row would be NaN in dweight.
        if need_dweight and not hidden.is_cuda and not h.sum(dtype=wide).isfinite():
            h = without_ignored(h, targets[part] != ignore_index)
        x = logits[: len(h), :V]
        torch.mm(h, weight.T, out=x)
        to_gradient(x, targets[part], nll[part], lse[part], *options)
        if need_dhidden:
            torch.mm(x, weight, out=dhidden[part])
        if need_dweight:
            _add_product(dweight, x.T, h)
    z = z_loss * lse.square().sum()
    return nll.sum() + z, z, dhidden, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, which may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # the product is never rounded
    else:
        total.add_(a @ b)


def config_of(x: Tensor, V: int) -> configs.CrossEntropy:
    """Return the configuration of the kernel for inputs like x and a vocabulary of V tokens."""
    config = configs.chosen("linear_cross_entropy", architecture(x), V, x.element_size())
    return config or configs.CrossEntropy()


def to_gradient_triton(logits, targets, nll, lse, ignore_index, softcap, z_loss, need_gradient):
    """Write the losses of logits (rows, V), without z, to nll (rows,), and lse (rows,); both are 0 for an
    ignored target. If need_gradient, the gradient of the losses with z replaces the logits."""
    rows, V = logits.shape
    config = config_of(logits, V)
    block = min(triton.next_power_of_2(V), config.block)
    with on_device(logits):
        _to_gradient_kernel[(rows,)](
            logits, targets, nll, lse, logits.stride(0), V, ignore_index, softcap or 1.0, z_loss,
            SOFTCAP=softcap is not None, GRADIENT=need_gradient, BLOCK=block,
            num_warps=max(1, block // config.per_warp),
        )  # fmt: skip


def to_gradient_plain(logits, targets, nll, lse, ignore_index, softcap, z_loss, need_gradient):
    """Do the same as `to_gradient_triton` in PyTorch operations; the logits are overwritten in any case."""
    x = logits.to(nll.dtype)  # a copy only if logits have 16 bits
    valid = (targets != ignore_index)[:, None]
    if not (readable(valid) and valid.all()):
        x.masked_fill_(~valid, 0)  # the logits of ignored tokens may be infinite, or NaN
    if softcap is not None:
        x.div_(softcap).tanh_()
        slope = 1 - x * x if need_gradient else None
        x.mul_(softcap)
    at_target = targets[:, None].where(valid, 0)
    x_target = x.gather(1, at_target)

    # lse from the softmax, which on a CPU takes less time than exp alone: its largest value in a row is
    # 1 / sum exp(x - largest).
    largest = x.amax(dim=1, keepdim=True)
    torch.softmax(x, dim=1, out=x)
    row_lse = largest - x.amax(dim=1, keepdim=True).log()
    torch.mul(row_lse - x_target, valid, out=nll[:, None])
    torch.mul(row_lse, valid, out=lse[:, None])
    if not need_gradient:
        return

    # The gradient of the header, in the place of the softmax.
    x.mul_((1 + 2 * z_loss * row_lse) * valid)
    x.scatter_add_(1, at_target, -valid.to(x.dtype))
    if softcap is not None:
        x.mul_(slope)
    if x is not logits:
        logits.copy_(x)


@triton.jit
def _capped(x, softcap):
    """Return softcap * tanh(x / softcap). A small |u| takes the series, as 1 - exp(-2 |u|) loses digits."""
    u = x / softcap
    e = tl.exp(-2 * tl.abs(u))
    large = tl.where(u < 0, e - 1, 1 - e) / (1 + e)
    uu = u * u
    small = u * (1 + uu * (-1 / 3 + uu * (2 / 15 + uu * (-17 / 315 + uu * (62 / 2835)))))
    return softcap * tl.where(tl.abs(u) < 0.3, small, large)


@triton.jit
def _load_logits(row, start, stride, V, valid, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the columns from start on and their logits, soft-capped: 0 from V on, and in an ignored row."""
    columns = start + tl.arange(0, BLOCK)
    # The bound is the stride, a multiple of 16; with the bound V, each number would be loaded by itself.
    x = tl.load(row + columns, mask=columns < stride, other=0.0).to(tl.float32)
    x = tl.where(valid & (columns < V), x, 0.0)
    return columns, _capped(x, softcap) if SOFTCAP else x


@triton.jit
def _to_gradient_kernel(
    Logits, Targets, NLL, LSE, stride, V, ignore_index, softcap, z_loss,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program reads its row twice, the second time from the L2 cache, which holds all rows in progress.
    i = tl.program_id(0)
    row = Logits + i.to(tl.int64) * stride
    target = tl.load(Targets + i)
    valid = target != ignore_index
    x_target = tl.load(row + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    if SOFTCAP:
        x_target = _capped(x_target, softcap)

    # Online softmax: the largest logit so far, and a sum that is corrected whenever a larger one appears.
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        columns, x = _load_logits(row, start, stride, V, valid, softcap, SOFTCAP, BLOCK)
        x = tl.where(columns < V, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    lse = largest + tl.log(total)
    tl.store(NLL + i, tl.where(valid, lse - x_target, 0.0))
    tl.store(LSE + i, tl.where(valid, lse, 0.0))

    # The gradient of the header, in the place of the logits.
    if GRADIENT:
        scale = tl.where(valid, 1 + 2 * z_loss * lse, 0.0)
        one = tl.where(valid, 1.0, 0.0)
        for start in range(0, V, BLOCK):
            columns, x = _load_logits(row, start, stride, V, valid, softcap, SOFTCAP, BLOCK)
            dx = scale * tl.exp(x - lse) - tl.where(columns == target, one, 0.0)
            if SOFTCAP:
                dx *= 1 - (x / softcap) * (x / softcap)
            tl.store(row + columns, dx.to(Logits.dtype.element_ty), mask=columns < stride)


@_in_chunks.register_fake
def _(hidden, weight, targets, ignore_index, softcap, z_loss, kernel, need_dhidden, need_dweight):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total, z = (hidden.new_empty((), dtype=wide) for _ in range(2))
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else 0)
    return total, z, dhidden, weight.new_empty(weight.shape if need_dweight else 0, dtype=wide)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor in dtype."""
    # The factor is a matrix (1, 1), as PyTorch would first round a scalar to the dtype of a 16-bit gradient.
    return torch.mul(gradient, factor[None, None], out=gradient.new_empty(gradient.shape, dtype=dtype))


_scaled_operation = library.custom_op("plinth::linear_cross_entropy_backward", _scaled, mutates_args=())


@_scaled_operation.register_fake
def _(gradient, factor, dtype):
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _backward(ctx, dtotal, *_):
    # With create_graph=True use the registered operation: a second derivative then is an error.
    scaled = _scaled_operation if torch.is_grad_enabled() else _scaled
    grads = [scaled(g, dtotal, ctx.dtype) if g.dim() == 2 else None for g in ctx.saved_tensors]
    return *grads, *[None] * 7


_in_chunks.register_autograd(_backward, setup_context=_save)
refuse_second_derivative("linear_cross_entropy", _scaled_operation)
