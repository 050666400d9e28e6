"""FlashAttention: exact attention that never holds the T x S scores. The backward pass is flash_backward.py.

A program owns a tile of queries and walks over the tiles of keys they see. Softmax needs the largest score
of a row before the first exponential; *online* softmax instead carries the largest so far, m, and mends what
was summed up whenever a larger one turns up. In base 2, which is what the hardware exponentiates in, with
s_ij = scale log2(e) q_i . k_j:

    m'  = max(m, max_j s_ij)              p_ij = 2^(s_ij - m')
    l   = l 2^(m - m') + sum_j p_ij       acc  = acc 2^(m - m') + sum_j p_ij v_j

At the end out_i = acc / l, and lse_i = m + log2(l) is kept for the backward pass.

Every mask of kernels/attention.py lets query i see one interval of keys, [low_i, high_i), and both ends grow
with i. So a tile of queries sees the keys from low of its first to high of its last, nothing outside that
is computed, and between low of its last and high of its first every query sees every key: no mask there.

FlashAttention-2 (Dao 2023, algorithm 1); online softmax (Milakov and Gimelshein 2018). Memory: q is read
once, k and v once per tile of queries, mostly from L2; only out and lse are written, O(T).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import TensorDescriptor, architecture, on_device, tl, triton


class Rows(NamedTuple):
    """A tensor (B, T, H, K) as a kernel takes it where there are no tensor descriptors."""

    pointer: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any


@triton.jit
def load_rows(
    x, b, start, h, T, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, INSIDE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """x[b, start : start + ROWS, h] as (ROWS, BLOCK_K), zeros beyond T and K. INSIDE: nothing is beyond T."""
    if TMA:
        tile = x.load([b, h, start, 0]).reshape(ROWS, BLOCK_K)
    else:
        t, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_K)[None, :]
        row = x.pointer + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h
        pointers = row + t.to(tl.int64) * x.stride_t + column
        if INSIDE and K == BLOCK_K:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(t < T) & (column < K), other=0.0)
    return tile


@triton.jit
def store_rows(x, tile, b, start, h, T, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    t, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_K)[None, :]
    row = x.pointer + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h
    pointers = row + t.to(tl.int64) * x.stride_t + column
    tl.store(pointers, tile.to(x.pointer.dtype.element_ty), mask=(t < T) & (column < K))


@triton.jit
def keys_seen(
    i, offset, n_keys, window, doc_start, doc_end, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """The interval [low, high) of keys that query i sees."""
    p = i + offset
    low, high = p * 0, p * 0 + n_keys
    if WINDOWED:
        low = tl.maximum(p - window + 1, 0)
    if CAUSAL:
        high = tl.minimum(p + 1, n_keys)
    elif WINDOWED:
        high = tl.minimum(p + window, n_keys)
    if doc_start is not None:
        low, high = tl.maximum(low, tl.load(doc_start + i)), tl.minimum(high, tl.load(doc_end + i))
    return low, tl.maximum(high, 0)


@triton.jit
def middle(low_last, high_first, end, BLOCK: tl.constexpr):
    """(left, right): of the tiles up to `end`, those between the two need no mask."""
    left = tl.minimum(tl.cdiv(low_last, BLOCK) * BLOCK, end)
    return left, tl.maximum(high_first // BLOCK * BLOCK, left)


@triton.jit
def query_tile(
    seqlens_k, doc_start, doc_end, T, S, H, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's tile of queries: its first query, row and head; the keys [low, high) of each query; and
    the walk over the tiles of keys, from begin to end, without a mask from left to right."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    # The last queries of a causal model see most: started first, they leave the short ones to fill the gaps.
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    bh = tl.program_id(0) // n_tiles
    b, h = bh // H, bh % H
    n_keys = S
    if seqlens_k is not None:
        n_keys = tl.load(seqlens_k + b).to(tl.int32)
    offset = n_keys - T
    i = tl.minimum(i0 + tl.arange(0, BLOCK_M), T - 1)
    i_last = tl.minimum(i0 + BLOCK_M, T) - 1
    low, high = keys_seen(i, offset, n_keys, window, doc_start, doc_end, CAUSAL, WINDOWED)
    begin, full_end = keys_seen(i0, offset, n_keys, window, doc_start, doc_end, CAUSAL, WINDOWED)
    full_begin, end = keys_seen(i_last, offset, n_keys, window, doc_start, doc_end, CAUSAL, WINDOWED)
    left, right = middle(full_begin, full_end, end, BLOCK_N)
    return i0, b, h, low, high, begin // BLOCK_N * BLOCK_N, left, right, end


@triton.jit
def scores(qk, scale, SOFTCAP: tl.constexpr):
    """(s, c): s * c is the score in base 2, which puts log2(e) = 1.4427 into c. Left apart, the product and
    what is subtracted from it in the exponent are one instruction. With a soft-cap s is the tanh."""
    if SOFTCAP is None:
        s, c = qk, scale * 1.4426950408889634
    else:
        s, c = 2 * tl.sigmoid(qk * (scale * (2 / SOFTCAP))) - 1, SOFTCAP * 1.4426950408889634
    return s, c


@triton.jit
def attend(
    acc, m, l, q, k, v, b, g, first, last, low, high, S, scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from `first` up to `last`."""
    for start in range(first, last, BLOCK_N):
        k_tile = load_rows(k, b, start, g, S, BLOCK_N, K, BLOCK_K, not MASKED, TMA)
        s, c = scores(tl.dot(q, k_tile.T, input_precision=PRECISION), scale, SOFTCAP)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            j = start + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where((j >= low[:, None]) & (j < high[:, None]), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * c)
        base = m_new
        if MASKED:
            base = tl.where(m_new == -float("inf"), 0.0, m_new)  # nothing seen yet: inf - inf is no number
        p = tl.math.exp2(s * c - base[:, None])
        mend = tl.math.exp2(m - base)
        l = l * mend + tl.sum(p, 1)
        v_tile = load_rows(v, b, start, g, S, BLOCK_N, K, BLOCK_K, not MASKED, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * mend[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    q, k, v, out, lse, seqlens_k, doc_start, doc_end, T, S, H, window, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i0, b, h, low, high, begin, left, right, end = query_tile(
        seqlens_k, doc_start, doc_end, T, S, H, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N
    )
    q_tile = load_rows(q, b, i0, h, T, BLOCK_M, K, BLOCK_K, False, TMA)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    g = h // GROUP
    if WINDOWED or doc_start is not None:
        acc, m, l = attend(
            acc, m, l, q_tile, k, v, b, g, begin, left, low, high, S, scale,
            True, SOFTCAP, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
        )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k, v, b, g, left, right, low, high, S, scale,
        False, SOFTCAP, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k, v, b, g, right, end, low, high, S, scale,
        True, SOFTCAP, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    seen = l > 0
    store_rows(out, acc / tl.where(seen, l, 1.0)[:, None], b, i0, h, T, BLOCK_M, K, BLOCK_K)
    row = i0 + tl.arange(0, BLOCK_M)
    value = tl.where(seen, m + tl.math.log2(tl.where(seen, l, 1.0)), 0.0)
    tl.store(lse + (b * H + h).to(tl.int64) * T + row, value, mask=row < T)


# Queries and keys of a tile, warps and stages, by head width: of the forward pass, of dk and dv, and of dq.
# The largest found that keep 16-bit inputs in registers; what still spills, a few instructions at width 256
# or on Blackwell, is in results/machine_code.json. Float32 takes the row of twice its width, and fits in TF32
# at best. Nothing here has been tuned on a device yet.
TILES = {
    "Hopper": {  # and data-centre Blackwell: over 200 kB of shared memory
        64: ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        256: ((128, 32, 8, 2), (16, 64, 8, 2), (64, 32, 4, 2)),
        512: ((64, 16, 8, 1), (16, 16, 8, 1), (64, 16, 8, 1)),
    },
    "NVIDIA": {  # every other: at most 99 kB, which the smallest chips have
        64: ((128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 4, 1)),
        512: ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "AMD": {  # 64 kB, and 512 registers
        64: ((128, 64, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1)),
        128: ((128, 32, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1)),
        256: ((64, 32, 4, 1), (16, 64, 8, 1), (32, 32, 4, 1)),
        512: ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "interpreter": {512: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))},
}


FAMILIES = {"sm_90": "Hopper", "sm_100": "Hopper", "sm_103": "Hopper", "interpreter": "interpreter"}


def tiles(q: Tensor) -> tuple:
    """The row of TILES for inputs like q."""
    arch = architecture(q)
    table = TILES[FAMILIES.get(arch, "NVIDIA" if arch.startswith("sm_") else "AMD")]
    width = q.shape[3] * max(1, q.element_size() // 2)
    return table[min(limit for limit in table if width <= limit)]


def precision(q: Tensor) -> str:
    """Of products of float32 tiles, as torch.set_float32_matmul_precision has it. Even the highest is put
    together from three products of TF32, almost as exact: without tensor cores the tiles overflow the
    registers."""
    if not architecture(q).startswith("sm_"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def uses_tma(q: Tensor) -> bool:
    """Whether tiles come through Hopper's tensor memory accelerator, which spares registers for addresses."""
    arch = architecture(q)
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def packed(x: Tensor) -> Tensor:
    """x, copied if a kernel could not read it where it lies: whole rows, and steps of 16 bytes for TMA."""
    steps = [step * x.element_size() for step, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    fine = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if fine else x.contiguous()


def as_rows(x: Tensor, n_rows: int, tma: bool) -> "Rows | TensorDescriptor":
    """x (B, T, H, K), packed, as the kernels' load_rows takes tiles of n_rows."""
    B, T, H, K = x.shape
    strides = [step if n > 1 else K for step, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    if not tma:
        return Rows(x, *strides)
    # Heads before rows: then a tile is the last two dimensions, which is what TMA copies in one piece.
    strides = [strides[0], strides[2], strides[1], 1]
    return TensorDescriptor(x, [B, H, T, K], strides, [1, 1, n_rows, block_width(K)])


def block_width(K: int) -> int:
    """Of a tile of rows of width K: a power of two, and at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(K))


def shared_arguments(q, k, causal, window, softcap, scale, cu_seqlens, seqlens_k) -> dict:
    """What every kernel of a call is told besides its tensors and tiles."""
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    doc_start = doc_end = None
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(T, device=q.device), cu_seqlens, right=True)
        doc_start, doc_end = cu_seqlens[document - 1], cu_seqlens[document]  # of each position, (T,)
    windowed = window is not None and window < max(T, S)
    return dict(
        seqlens_k=seqlens_k, doc_start=doc_start, doc_end=doc_end, T=T, S=S, H=H,
        window=window if windowed else 0, scale=scale, GROUP=H // G, CAUSAL=causal, WINDOWED=windowed,
        SOFTCAP=softcap, K=K, BLOCK_K=block_width(K), PRECISION=precision(q),
        TMA=uses_tma(q), enable_fp_fusion=True,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, *masks) -> tuple[Tensor, Tensor]:
    """(out, lse) of `kernels.attention`: out (B, T, H, K) like q, lse float32 (B, H, T) in base 2.

    masks: causal, window, softcap, scale, cu_seqlens, seqlens_k, as in `kernels.attention`.
    """
    B, T, H, K = q.shape
    out, lse = q.new_empty(B, T, H, K), q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.zero_()
    q, k, v = packed(q), packed(k), packed(v)
    shared = shared_arguments(q, k, *masks)
    M, N, warps, stages = tiles(q)[0]
    tma = shared["TMA"]
    with on_device(q):
        forward_kernel[(triton.cdiv(T, M) * B * H,)](
            as_rows(q, M, tma), as_rows(k, N, tma), as_rows(v, N, tma), as_rows(out, M, False), lse,
            BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
    return out, lse
