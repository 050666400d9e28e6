"""Grouped matrix product: every row is multiplied by the matrix of its group, as a token by its expert's.

    y_i = w_e x_i        where e is the group of row i

This is where a mixture of experts spends its time. Rows are sorted by group: those of group e are the slice
of x from offsets[e - 1], or 0 for the first group, to offsets[e]; a group may be empty. Gradients, slice by
slice:

    dx_i = w_e^T dy_i        dw_e = dy_e^T x_e, zeros for an empty group

Backends: "reference" takes one group after the other in plain PyTorch and defines what the others must
compute. "torch" does the same on a CPU, but writes each product straight into its slice of the result and is
a single node for autograd; on a GPU it runs PyTorch's own operation. "triton" has one kernel for y and dx,
which differ only in how w is read, and one for dw; each computes all groups in one launch.

The number of rows of a group is in the memory of the GPU, and to read it on the CPU means to wait for the
GPU. So as many programs start as any sizes could need: M rows in E groups make at most (M + E (BLOCK_M - 1))
/ BLOCK_M tiles of rows. Each program reads all offsets, a few hundred bytes, counts the tiles of the groups
to find its own, and ends at once if there is none left for it.

Memory. A program reads BLOCK_M rows of x and BLOCK_N columns of w_e, over all D, for BLOCK_M x BLOCK_N
numbers of y. Programs that run at the same time share few tiles of rows and few of columns. So most of what
they read is in the L2 cache, and w_e is read from memory about once for every eight tiles of rows. In
decoding, where M is small, reading w is all the work, and w_e of a group without rows is never read. A tile
of dw belongs to one program, which goes through the rows of its group: nothing is atomic, and every run
gives the same bits.

MegaBlocks (Gale et al. 2022, section 4): no row is dropped, and only the last tile of a group is padded.

Shapes: M rows, D width of x, N width of y, E groups.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, library

from kernels import configs
from kernels.backend import (
    architecture,
    block_width,
    choose,
    multiplies,
    on_device,
    precision,
    readable,
    refuse_second_derivative,
    refuse_transforms,
    tl,
    triton,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the kernels and of F.grouped_mm


def grouped_matmul(x: Tensor, w: Tensor, offsets: Tensor, *, backend: str = "auto") -> Tensor:
    """Return y (M, N) of x (M, D), its rows sorted by group, and w (E, N, D), one matrix (out, in) per group.

    offsets: int32 (E,), the end of each group in x: in ascending order, the last equal to M. x and w have one
    float dtype and any strides. Under autocast the product runs in its dtype, like that of F.linear.

    backend: see kernels/backend.py. "triton" takes float16, bfloat16 and float32 and never waits for the
    GPU. "torch" on a GPU takes the same dtypes if rows of D and of N numbers are multiples of 16 bytes, and
    may wait for the GPU except in bfloat16. Only "reference" has a second derivative.
    Raises ValueError if shapes, dtypes or devices do not fit each other or the backend, and for wrong offsets
    wherever a check does not wait for a GPU; unchecked, wrong offsets give wrong numbers.
    """
    E, N, D = w.shape if w.dim() == 3 else (0, 0, 0)
    if x.dim() != 2 or x.shape[1] != D or offsets.shape != (E,) or E == 0:
        raise ValueError(
            f"grouped_matmul: x {tuple(x.shape)}, w {tuple(w.shape)}, offsets {tuple(offsets.shape)}: "
            "expected (M, D), (E, N, D) and (E,) with at least one group"
        )
    if offsets.dtype != torch.int32 or not x.device == w.device == offsets.device:
        raise ValueError(
            f"grouped_matmul: x on {x.device}, w on {w.device}, offsets {offsets.dtype} on {offsets.device}: "
            "expected torch.int32 offsets, all on one device"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    if x.dtype != w.dtype or not x.is_floating_point():
        raise ValueError(f"grouped_matmul: x {x.dtype}, w {w.dtype}: expected one float dtype")
    is_auto, backend = backend == "auto", choose("grouped_matmul", backend, x)
    obstacle = _obstacle(backend, x, N)
    if obstacle and is_auto:
        backend = "reference"
    elif obstacle:
        raise ValueError(f"grouped_matmul: backend {backend!r} {obstacle}; use 'auto' or 'reference'")
    if backend == "reference":
        return _reference(x, w, offsets)
    refuse_transforms("grouped_matmul", backend)
    if backend == "triton" and readable(offsets):
        _groups(offsets, len(x))  # the kernels do not check
    return _operation(x, w, offsets.contiguous(), backend == "triton")


def _obstacle(backend: str, x: Tensor, N: int) -> str:
    """Return why the backend cannot compute the product of x to rows of N numbers, or "" if it can."""
    if backend == "reference" or (backend == "torch" and not x.is_cuda):
        return ""
    if x.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32 on a GPU, not {x.dtype}"
    if backend == "torch" and (x.shape[1] * x.element_size() % 16 or N * x.element_size() % 16):
        return f"takes multiples of 16 bytes for D and N on a GPU, not {x.shape[1]} and {N} of {x.dtype}"
    if backend == "triton" and not multiplies(x):
        return "takes no bfloat16 in Triton's interpreter, which multiplies it wrongly"
    return ""


def _groups(offsets: Tensor, M: int) -> list[slice]:
    """Return the rows of each group as slices. Raise ValueError if the offsets are not ascending up to M."""
    ends = offsets.tolist()
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        if end < start:
            raise ValueError(f"grouped_matmul: offsets[{e}] is {end}: expected at least {start}")
    if ends[-1] != M:
        raise ValueError(f"grouped_matmul: offsets[-1] is {ends[-1]}: expected {M}, the rows of x")
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def _reference(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    sizes = [rows.stop - rows.start for rows in _groups(offsets, len(x))]
    # Split all at once: autograd would make the gradient of each x[rows] and w[e] as large as all of x and w.
    return torch.cat([F.linear(x_e, w_e) for x_e, w_e in zip(x.split(sizes), w.unbind(), strict=True)])


def product_torch(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Return the product (M, N) of x (M, K) and w (E, K, N) by groups; K is D for y and N for dx."""
    if x.is_cuda and x.numel() and w.numel():
        return F.grouped_mm(_aligned(x), _aligned(w), offs=offsets)
    y = x.new_empty(len(x), w.shape[2])
    for e, rows in enumerate(_groups(offsets, len(x))):
        if rows.start < rows.stop:
            torch.mm(x[rows], w[e], out=y[rows])
    return y


def weight_gradient_torch(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Return dw (E, N, D) from dy (M, N) and x (M, D), by groups."""
    if x.is_cuda and x.numel() and dy.numel():
        return F.grouped_mm(_aligned(dy).T, _aligned(x), offs=offsets)
    dw = x.new_empty(len(offsets), dy.shape[1], x.shape[1])
    for e, rows in enumerate(_groups(offsets, len(x))):
        if rows.start < rows.stop:
            torch.mm(dy[rows].T, x[rows], out=dw[e])
        else:
            dw[e].zero_()
    return dw


def _aligned(x: Tensor) -> Tensor:
    """Return x (..., rows, columns), or a copy if its layout does not fit F.grouped_mm.

    That needs rows, or columns, without gaps that begin at multiples of 16 bytes.
    """
    lines = x if x.stride(-1) == 1 else x.mT
    steps = [step * x.element_size() for step in lines.stride()[:-1]]
    fits = lines.stride(-1) == 1 and lines.stride(-2) >= lines.shape[-1] and not any(s % 16 for s in steps)
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


@triton.jit
def _place(number, n_rows, n_columns, TOGETHER: tl.constexpr):
    """Return (row, column) of a tile in the grid of tiles.

    The grid is divided into bands of TOGETHER rows. Tiles are numbered band by band, and column by column
    within a band. So programs that run at the same time read few rows and few columns.
    """
    above = number // (TOGETHER * n_columns) * TOGETHER
    height = tl.minimum(n_rows - above, TOGETHER)
    number = number % (TOGETHER * n_columns)
    return above + number % height, number // height


@triton.jit
def product_kernel(
    x, w, y, offsets, x_stride_m, x_stride_k, w_stride_e, w_stride_k, w_stride_n, M, N, K, E, n_tiles,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y (M, N), the product of x (M, K) and w (E, K, N) by groups."""
    # The group e of this tile, from the number of tiles of every group.
    tile, column = _place(tl.program_id(0), n_tiles, tl.cdiv(N, BLOCK_N), TOGETHER)
    groups = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + groups, mask=groups < E, other=0)
    starts = tl.load(offsets + groups - 1, mask=(groups > 0) & (groups < E), other=0)
    last = tl.cumsum(tl.cdiv(ends - starts, BLOCK_M))  # one after the last tile of each group
    e = tl.sum((last <= tile).to(tl.int32))
    if e >= E:
        return
    first = tl.max(tl.where(last <= tile, last, 0))  # the first tile of group e
    # Limited to the rows that exist: wrong offsets give wrong numbers, but no wrong addresses.
    start = tl.maximum(tl.load(offsets + e - 1, mask=e > 0, other=0), 0)
    end = tl.minimum(tl.load(offsets + e), M)

    # The addresses of its rows and columns, in int64: a tensor may have more than 2^31 elements.
    m = start.to(tl.int64) + (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at = x + m[:, None] * x_stride_m + k[None, :] * x_stride_k
    w_at = w + e.to(tl.int64) * w_stride_e + k[:, None] * w_stride_k + n[None, :] * w_stride_n

    # The sum over K, BLOCK_K terms at a time.
    m_inside, n_inside = (m < end)[:, None], (n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k_inside = k < K - begin
        x_tile = tl.load(x_at, mask=m_inside & k_inside[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=n_inside & k_inside[:, None], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        x_at += BLOCK_K * x_stride_k
        w_at += BLOCK_K * w_stride_k
    tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=m_inside & n_inside)


@triton.jit
def weight_kernel(
    dy, x, dw, offsets, dy_stride_m, dy_stride_n, x_stride_m, x_stride_d, M, N, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the gradient dw_e (N, D) of one group."""
    n_rows, n_columns = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    e = tl.program_id(0) // (n_rows * n_columns)
    row, column = _place(tl.program_id(0) % (n_rows * n_columns), n_rows, n_columns, TOGETHER)
    start = tl.maximum(tl.load(offsets + e - 1, mask=e > 0, other=0), 0)
    end = tl.minimum(tl.load(offsets + e), M)

    # The sum over the rows of group e, BLOCK_M at a time.
    m = tl.arange(0, BLOCK_M)
    n = (row * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = (column * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    dy_at = dy + (start.to(tl.int64) + m)[:, None] * dy_stride_m + n[None, :] * dy_stride_n
    x_at = x + (start.to(tl.int64) + m)[:, None] * x_stride_m + d[None, :] * x_stride_d
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for begin in range(start, end, BLOCK_M):
        m_inside = (m < end - begin)[:, None]
        dy_tile = tl.load(dy_at, mask=m_inside & (n < N)[None, :], other=0.0)
        x_tile = tl.load(x_at, mask=m_inside & (d < D)[None, :], other=0.0)
        acc = tl.dot(dy_tile.T, x_tile, acc, input_precision=PRECISION)
        dy_at += BLOCK_M * dy_stride_m
        x_at += BLOCK_M * x_stride_m
    at = dw + e.to(tl.int64) * N * D + n[:, None] * D + d[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


def depth(tile: configs.Product, x: Tensor) -> int:
    """Return how many terms of a sum a program reads at a time."""
    return max(16, tile.line // x.element_size())


def product_triton(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Return the product (M, N) of x (M, K) and w (E, K, N) by groups; K is D for y and N for dx."""
    (M, K), (E, _, N) = x.shape, w.shape
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    tile = configs.grouped(architecture(x), E, M / E, x.element_size()).product
    BLOCK_M, BLOCK_N = tile.rows, min(tile.columns, block_width(N))
    n_tiles = (M + min(E, M) * (BLOCK_M - 1)) // BLOCK_M  # the most tiles of rows: at most M groups have rows
    with on_device(x):
        product_kernel[(n_tiles * triton.cdiv(N, BLOCK_N),)](
            x, w, y, offsets, *x.stride(), *w.stride(), M, N, K, E, n_tiles,
            BLOCK_E=triton.next_power_of_2(E), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=depth(tile, x),
            PRECISION=precision(x), TOGETHER=tile.together, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def weight_gradient_triton(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Return dw (E, N, D) from dy (M, N) and x (M, D), by groups."""
    (M, N), D, E = dy.shape, x.shape[1], len(offsets)
    dw = x.new_empty(E, N, D)
    if dw.numel() == 0:
        return dw
    tile = configs.grouped(architecture(x), E, M / E, x.element_size()).weight
    BLOCK_N, BLOCK_D = min(tile.rows, block_width(N)), min(tile.columns, block_width(D))
    with on_device(x):
        weight_kernel[(E * triton.cdiv(N, BLOCK_N) * triton.cdiv(D, BLOCK_D),)](
            dy, x, dw, offsets, *dy.stride(), *x.stride(), M, N, D,
            BLOCK_M=depth(tile, x), BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
            PRECISION=precision(x), TOGETHER=tile.together, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dw


@library.custom_op("plinth::grouped_matmul", mutates_args=())
def _operation(x: Tensor, w: Tensor, offsets: Tensor, kernel: bool) -> Tensor:
    """Return y (M, N) as `grouped_matmul` does; kernel: with the Triton kernel instead of PyTorch."""
    product = product_triton if kernel else product_torch
    return product(x, w.mT, offsets)


@_operation.register_fake
def _(x, w, offsets, kernel):
    return x.new_empty(x.shape[0], w.shape[1])


@library.custom_op("plinth::grouped_matmul_backward", mutates_args=())
def _operation_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, kernel: bool, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """Return dx, like x, and dw, like w; a gradient that is not needed is empty."""
    product, weight_gradient = (
        (product_triton, weight_gradient_triton) if kernel else (product_torch, weight_gradient_torch)
    )
    dx = product(dy, w, offsets) if need_dx else x.new_empty(0)
    return dx, weight_gradient(dy, x, offsets) if need_dw else w.new_empty(0)


@_operation_backward.register_fake
def _(dy, x, w, offsets, kernel, need_dx, need_dw):
    return x.new_empty(x.shape if need_dx else 0), w.new_empty(w.shape if need_dw else 0)


def _save(ctx, inputs, output):
    *saved, ctx.kernel = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, dy):
    needs = ctx.needs_input_grad[:2]
    grads = _operation_backward(dy, *ctx.saved_tensors, ctx.kernel, *needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


_operation.register_autograd(_backward, setup_context=_save)
refuse_second_derivative("grouped_matmul", _operation_backward)
