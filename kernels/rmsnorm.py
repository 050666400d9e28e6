"""Root-mean-square normalisation: scale each row to unit mean square, then multiply by a learned gain.

    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight

Root Mean Square Layer Normalization (Zhang and Sennrich 2019, equation 4). Its gradient, with n = x * r,
r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:

    dx = r * (g - n * mean(g * n))        dweight = sum over rows of dy * n

Backends: "reference" is the equation in plain PyTorch and defines what the others must compute, "torch" is
PyTorch's own operation, and "triton" is the kernels below, one for each direction. There are few operations
per byte, so reading and writing memory takes all the time. A row stays in registers between its sum and its
scaling, so it is read once. Memory traffic in bytes per element, where an element has e bytes:

    forward     2 e    read x, write y                with a residual 4 e: read it too, write h = x + residual
    backward    3 e    read x and dy, write dx        with a residual 4 e: read dh too and add it to dx

and 4 bytes per row for r. The forward pass stores nothing else for the backward pass: to compute n = x * r
again takes less time than to store it.

A program has a tile of ROWS x BLOCK_D elements, where BLOCK_D is D rounded up to a power of two: one wide row
or several narrow ones. In the forward pass each program has one tile. In the backward pass dweight sums over
all rows: a few programs on each multiprocessor go through the tiles, keep their part of the sum in registers
and write it as one row, 4 D bytes; a second, small sum adds these rows. There are no atomic operations, and
the order of additions, and so every bit of the result, depends only on the shape and the number of
multiprocessors.
"""

import math
from functools import cache, partial

import torch
from torch import Tensor, library

from kernels import configs
from kernels.backend import (
    architecture,
    choose,
    n_multiprocessors,
    on_device,
    refuse_second_derivative,
    tl,
    transformed,
    triton,
)

MAX_WIDTH = 16384  # a wider row does not fit the registers of one program
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the RMSNorm of x (..., D) over its last axis, with gain weight (D,): like x. It is computed in
    float32, or in float64 for float64.

    With a residual, of the shape of x, the sum comes first: h = x + residual, in the wider dtype of the two.
    The result then is (rms_norm(h), h), because a transformer needs both. x may have any strides, and weight
    another float dtype than x. With backend "triton" there is no second derivative.

    backend: "reference", "torch", "triton" (float16, bfloat16 or float32, D up to 16384, a GPU) or "auto".
    Raises ValueError if shapes do not fit each other, x has no float dtype, or the backend does not exist or
    cannot compute this.
    """
    if weight.shape != x.shape[-1:] or weight.dim() != 1 or not x.is_floating_point():
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)}: expected x (..., D) of a "
            "float dtype and weight (D,)"
        )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"rms_norm: residual {tuple(residual.shape)} for x {tuple(x.shape)}: expected the same shape"
            )
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)

    # The short way on a CPU: the checks below would take longer than the norm of a row.
    on_cpu = backend == "auto" and residual is None and x.device.type == "cpu" and x.dtype == weight.dtype
    if on_cpu and not transformed():
        return torch.rms_norm(x, weight.shape, weight, eps)

    # torch.compile fuses PyTorch's own norm with the operations around it, but not our kernel.
    obstacle = _obstacle(x)
    if backend == "auto" and (obstacle or torch.compiler.is_compiling()):
        backend = "torch"
    backend = choose("rms_norm", backend, x)
    if backend == "triton":
        if obstacle:
            raise ValueError(f"rms_norm: backend 'triton' {obstacle}; use 'auto', 'torch' or 'reference'")
        # torch.compile needs the registered operation. Without torch.compile it is not used: to call it takes
        # PyTorch tens of microseconds, longer than the kernels take on small inputs.
        run = _operation if torch.compiler.is_compiling() else _RMSNorm.apply
        y, h, _ = run(x, weight, residual, eps)
        return y if residual is None else (y, h)

    if residual is not None:
        x = x + residual
    if backend == "reference":
        y = _reference(x, weight, eps)
    else:
        # On a GPU, under autocast, this operation returns float32.
        y = torch.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype)
    return y if residual is None else (y, x)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * r * weight).to(x.dtype)


def _obstacle(x: Tensor) -> str:
    """Return why the kernels cannot normalise x, or "" if they can."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        return f"takes rows of 1 to {MAX_WIDTH} features, not {x.shape[-1]}"
    return "" if x.dtype in DTYPES else f"takes float16, bfloat16 and float32, not {x.dtype}"


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, x_stride, residual_stride, n_rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y, the factor r of each row and, with a residual, h, for one tile of rows."""
    # int64, because a tensor may have more than 2^31 elements
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < n_rows) & (cols < D)
    h = tl.load(x_ptr + rows * x_stride + cols, mask, other=0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * residual_stride + cols, mask, other=0)
        # h is rounded before it is normalised: y is the norm of the h that is returned.
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * D + cols, h, mask)
    h = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)
    tl.store(rstd_ptr + rows, rstd, rows < n_rows)
    weight = tl.load(weight_ptr + cols, cols < D, other=0).to(tl.float32)
    tl.store(y_ptr + rows * D + cols, (h * rstd * weight).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, dy_stride, dh_stride, h_stride, n_rows,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of every n-th tile of rows, for n programs, and their part of dweight."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + cols, cols < D, other=0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # With stages > 1 the next tiles are loaded into shared memory while this one is computed.
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < n_rows) & (cols < D)
        rstd = tl.load(rstd_ptr + rows, rows < n_rows, other=0)
        n = tl.load(h_ptr + rows * h_stride + cols, mask, other=0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask, other=0).to(tl.float32)
        if dweight_ptr is not None:  # before g, so that g can take the registers of dy
            dweight += dy * n
        if BLOCK_D > 8192:  # no registers are left to keep it: read it, from the cache, for every row
            weight = tl.load(weight_ptr + cols, cols < D, other=0).to(tl.float32)
        g = dy * weight
        dx = rstd * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / D))
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + rows * dh_stride + cols, mask, other=0).to(tl.float32)
        tl.store(dx_ptr + rows * D + cols, dx.to(dx_ptr.dtype.element_ty), mask)
    if dweight_ptr is not None:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + cols, total, cols < D)


@cache
def _tiling(D: int, element_size: int, norm: configs.Norm) -> tuple[int, int, int, int]:
    """Return ROWS, BLOCK_D, warps and stages, by a fixed rule: there is no tuning at run time.

    By default a tile has 2048 elements for 4 warps, and a wider row has more warps: 16 elements per thread. A
    thread loads 16 bytes at once, and the four float32 values that the backward kernel keeps of each element
    leave registers free. At D = 16384 a thread has 32 elements, and 16 warps use all registers. stages - 1
    tiles are loaded while one is computed: as many as fit 16 KB of shared memory for each of up to three
    tensors, 48 KB in total, which every GPU has.
    """
    BLOCK_D = 1 << (D - 1).bit_length()
    ROWS = max(1, norm.elements // BLOCK_D)
    stages = min(norm.stages, 1 + 16384 // (ROWS * BLOCK_D * element_size))
    return ROWS, BLOCK_D, min(max(4, ROWS * BLOCK_D // norm.per_warp), 16), stages


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x (..., D) in the layout that the kernels read, and its stride from row to row.

    In this layout the elements of a row are adjacent, and one stride leads from every row to the next. x is
    copied only if its own layout is another.
    """
    if not x.is_contiguous():
        x = x.reshape(-1, x.shape[-1])
        if x.stride(1) == 1:
            return x, x.stride(0)
        x = x.contiguous()
    return x, x.shape[-1]


def launch_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and h like x, and r = 1 / sqrt(mean(h^2) + eps) per row in float32. Without a residual h is
    empty, and r is that of x."""
    D = x.shape[-1]
    ROWS, BLOCK_D, num_warps, _ = _tiling(D, x.element_size(), configs.Norm())
    y, h, rstd = _forward_outputs(x, weight, residual, eps)
    n_rows = rstd.shape[0]
    x, x_stride = _rows(x)
    residual, residual_stride = (None, 0) if residual is None else _rows(residual)
    with on_device(x):
        _forward_kernel[(math.ceil(n_rows / ROWS),)](
            x, residual, weight.contiguous(), y, h, rstd, x_stride, residual_stride, n_rows, eps,
            D, ROWS, BLOCK_D, num_warps=num_warps,
        )  # fmt: skip
    return y, h, rstd


def _forward_outputs(x, weight, residual, eps):
    """Return y, h and r as `launch_forward` returns them, not yet computed."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, h, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Return dx, like h, and dweight, like weight, or empty if it is not needed. dx is the gradient of the
    residual too. dh: the gradient of the result h, or None."""
    D, n_rows = h.shape[-1], rstd.shape[0]
    norm = configs.chosen("rms_norm_backward", architecture(h), D, h.element_size()) or configs.Norm()
    ROWS, BLOCK_D, num_warps, stages = _tiling(D, h.element_size(), norm)
    # By default 16 warps on each multiprocessor: their registers fit, and the partial sums stay few.
    n_programs = min(math.ceil(n_rows / ROWS), norm.resident // num_warps * n_multiprocessors(h.device))
    partial_sums = h.new_empty((n_programs, D), dtype=torch.float32) if need_dweight else None
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    h, h_stride = _rows(h)
    dy, dy_stride = _rows(dy)
    dh, dh_stride = (None, 0) if dh is None else _rows(dh)
    with on_device(h):
        _backward_kernel[(n_programs,)](
            dy, dh, h, weight.contiguous(), rstd, dx, partial_sums, dy_stride, dh_stride, h_stride, n_rows,
            D, ROWS, BLOCK_D, stages, num_warps=num_warps,
        )  # fmt: skip
    return dx, partial_sums.sum(0).to(weight.dtype) if need_dweight else weight.new_empty(0)


def _save(ctx, inputs, output):
    x, weight, residual, _ = inputs
    _, h, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(*([rstd] if ctx.has_residual else [h, rstd]))
    ctx.set_materialize_grads(False)  # a missing gradient is None, not a tensor of zeros


def _gradients(backward, ctx, dy, dh, _):
    """Return the gradients of x, weight, residual and eps, with `backward` as the launcher of the kernel."""
    if dy is None:  # only h was used
        return dh, None, dh, None
    needs_dweight = ctx.needs_input_grad[1]
    dx, dweight = backward(dy, dh, *ctx.saved_tensors, needs_dweight)
    return dx, dweight if needs_dweight else None, dx if ctx.has_residual else None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        # With create_graph=True use the registered operation: a second derivative then is an error.
        return _gradients(
            _operation_backward if torch.is_grad_enabled() else launch_backward, ctx, *gradients
        )


_operation = library.custom_op("plinth::rms_norm", launch_forward, mutates_args=())
_operation_backward = library.custom_op("plinth::rms_norm_backward", launch_backward, mutates_args=())
_operation.register_fake(_forward_outputs)
_operation.register_autograd(partial(_gradients, _operation_backward), setup_context=_save)
refuse_second_derivative("rms_norm", _operation_backward)


@_operation_backward.register_fake
def _(dy, dh, h, weight, rstd, need_dweight):
    return h.new_empty(h.shape), weight.new_empty(weight.shape if need_dweight else 0)
