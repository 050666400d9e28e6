"""FlashAttention backward: the gradients of q, k and v, recomputing the scores tile by tile.

From s_ij = scale log2(e) q_i . k_j and the forward pass's lse_i, p_ij = 2^(s_ij - lse_i) is the softmax
again, with nothing kept but one number a row. With delta_i = dout_i . out_i,

    ds_ij = p_ij (dout_i . v_j - delta_i)
    dv_j  = sum_i p_ij dout_i             dk_j = scale sum_i ds_ij q_i            dq_i = scale sum_j ds_ij k_j

A program owns a tile of keys for dk and dv, summing over the queries of all heads that share them, and
another one a tile of queries for dq: each sum has one owner, so nothing is atomic and every run gives the
same bits, at the price of computing the scores twice: seven products of tiles where five would do.

Which tiles are left out, and which need no mask, follows as in flash_attention.py: the queries that see key j
are an interval too, and its ends grow with j.

FlashAttention-2 (Dao 2023, algorithm 2).
"""

import torch
from torch import Tensor

from kernels.backend import on_device, tl, triton
from kernels.flash_attention import (
    as_rows,
    keys_seen,
    load_rows,
    middle,
    packed,
    query_tile,
    scores,
    shared_arguments,
    store_rows,
    tiles,
)


@triton.jit
def queries_seeing(
    j, offset, T, window, doc_start, doc_end, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """The interval [first, last) of queries that see key j, one that exists: the inverse of `keys_seen`."""
    i = j - offset  # the query that stands at this key
    first, last = i * 0, i * 0 + T
    if CAUSAL:
        first = tl.maximum(i, 0)
    elif WINDOWED:
        first = tl.maximum(i - window + 1, 0)
    if WINDOWED:
        last = tl.minimum(i + window, T)
    if doc_start is not None:
        first, last = tl.maximum(first, tl.load(doc_start + j)), tl.minimum(last, tl.load(doc_end + j))
    return first, tl.maximum(last, 0)


@triton.jit
def delta_kernel(
    out, dout, delta, T, H, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    n_tiles = tl.cdiv(T, BLOCK_M)
    i0, bh = tl.program_id(0) % n_tiles * BLOCK_M, tl.program_id(0) // n_tiles
    o = load_rows(out, bh // H, i0, bh % H, T, BLOCK_M, K, BLOCK_K, False, False).to(tl.float32)
    do = load_rows(dout, bh // H, i0, bh % H, T, BLOCK_M, K, BLOCK_K, False, False).to(tl.float32)
    row = i0 + tl.arange(0, BLOCK_M)
    tl.store(delta + bh.to(tl.int64) * T + row, tl.sum(o * do, 1), mask=row < T)


@triton.jit
def dkdv_over_queries(
    dk, dv, k, v, q, dout, lse, delta, b, g, first, last, j0, H, offset, n_keys, T, window, scale,
    doc_start, doc_end,
    MASKED: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `first` up to `last`, of each head of the group, give to dk and dv.

    All tiles are transposed, keys by queries. One loop over heads and queries keeps its loads in flight from
    one head to the next.
    """
    n = tl.maximum(tl.cdiv(last - first, BLOCK_M), 0)
    for step in range(0, n * GROUP):
        if GROUP == 1:
            h, start = g, first + step * BLOCK_M
        else:
            h, start = g * GROUP + step // n, first + step % n * BLOCK_M
        i = start + tl.arange(0, BLOCK_M)
        row = (b * H + h).to(tl.int64) * T + i
        q_tile = load_rows(q, b, start, h, T, BLOCK_M, K, BLOCK_K, not MASKED, TMA)
        do = load_rows(dout, b, start, h, T, BLOCK_M, K, BLOCK_K, not MASKED, TMA)
        lse_i = tl.load(lse + row, mask=i < T, other=0.0)
        delta_i = tl.load(delta + row, mask=i < T, other=0.0)
        s, c = scores(tl.dot(k, q_tile.T, input_precision=PRECISION), scale, SOFTCAP)  # (N, M)
        p = tl.math.exp2(s * c - lse_i[None, :])
        if MASKED:
            i = tl.minimum(i, T - 1)
            low, high = keys_seen(i, offset, n_keys, window, doc_start, doc_end, CAUSAL, WINDOWED)
            j = j0 + tl.arange(0, BLOCK_N)[:, None]
            p = tl.where((j >= low[None, :]) & (j < high[None, :]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = p * (dp - delta_i[None, :])
        if SOFTCAP is not None:
            ds = ds * (1 - s * s)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, seqlens_k, doc_start, doc_end, T, S, H, window, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(S, BLOCK_N)
    j0 = tl.program_id(0) % n_tiles * BLOCK_N  # the first keys of a causal model, seen by most, start first
    bg = tl.program_id(0) // n_tiles
    G = H // GROUP
    b, g = bg // G, bg % G
    n_keys = S
    if seqlens_k is not None:
        n_keys = tl.load(seqlens_k + b).to(tl.int32)
    offset = n_keys - T
    j_last = tl.minimum(j0 + BLOCK_N, n_keys) - 1
    begin, full_end = queries_seeing(j0, offset, T, window, doc_start, doc_end, CAUSAL, WINDOWED)
    full_begin, end = queries_seeing(j_last, offset, T, window, doc_start, doc_end, CAUSAL, WINDOWED)
    end, full_end = tl.where(j0 < n_keys, end, 0), tl.where(j0 < n_keys, full_end, 0)
    left, right = middle(full_begin, full_end, end, BLOCK_M)

    k_tile = load_rows(k, b, j0, g, S, BLOCK_N, K, BLOCK_K, False, TMA)
    v_tile = load_rows(v, b, j0, g, S, BLOCK_N, K, BLOCK_K, False, TMA)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if CAUSAL or WINDOWED or doc_start is not None:
        dk_tile, dv_tile = dkdv_over_queries(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, b, g, begin // BLOCK_M * BLOCK_M, left,
            j0, H, offset, n_keys, T, window, scale, doc_start, doc_end,
            True, GROUP, CAUSAL, WINDOWED, SOFTCAP, BLOCK_M, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
        )  # fmt: skip
    dk_tile, dv_tile = dkdv_over_queries(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, b, g, left, right, j0, H, offset, n_keys,
        T, window, scale, doc_start, doc_end,
        False, GROUP, CAUSAL, WINDOWED, SOFTCAP, BLOCK_M, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    dk_tile, dv_tile = dkdv_over_queries(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, b, g, right, end, j0, H, offset, n_keys,
        T, window, scale, doc_start, doc_end,
        True, GROUP, CAUSAL, WINDOWED, SOFTCAP, BLOCK_M, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    if seqlens_k is not None:  # a tile without a mask may reach over the last key that exists
        exists = (j0 + tl.arange(0, BLOCK_N) < n_keys)[:, None]
        dk_tile, dv_tile = tl.where(exists, dk_tile, 0.0), tl.where(exists, dv_tile, 0.0)
    store_rows(dk, dk_tile * scale, b, j0, g, S, BLOCK_N, K, BLOCK_K)
    store_rows(dv, dv_tile, b, j0, g, S, BLOCK_N, K, BLOCK_K)


@triton.jit
def dq_over_keys(
    dq, q, do, lse, delta, k, v, b, g, first, last, low, high, S, scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `first` up to `last` give to dq."""
    for start in range(first, last, BLOCK_N):
        k_tile = load_rows(k, b, start, g, S, BLOCK_N, K, BLOCK_K, not MASKED, TMA)
        v_tile = load_rows(v, b, start, g, S, BLOCK_N, K, BLOCK_K, not MASKED, TMA)
        s, c = scores(tl.dot(q, k_tile.T, input_precision=PRECISION), scale, SOFTCAP)
        p = tl.math.exp2(s * c - lse[:, None])
        if MASKED:
            j = start + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where((j >= low[:, None]) & (j < high[:, None]), p, 0.0)
        dp = tl.dot(do, v_tile.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP is not None:
            ds = ds * (1 - s * s)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, seqlens_k, doc_start, doc_end, T, S, H, window, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i0, b, h, low, high, begin, left, right, end = query_tile(
        seqlens_k, doc_start, doc_end, T, S, H, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N
    )
    q_tile = load_rows(q, b, i0, h, T, BLOCK_M, K, BLOCK_K, False, TMA)
    do_tile = load_rows(dout, b, i0, h, T, BLOCK_M, K, BLOCK_K, False, TMA)
    row = (b * H + h).to(tl.int64) * T + tl.minimum(i0 + tl.arange(0, BLOCK_M), T - 1)
    lse_i, delta_i = tl.load(lse + row), tl.load(delta + row)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    g = h // GROUP
    if WINDOWED or doc_start is not None:
        dq_tile = dq_over_keys(
            dq_tile, q_tile, do_tile, lse_i, delta_i, k, v, b, g, begin, left, low, high,
            S, scale, True, SOFTCAP, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
        )  # fmt: skip
    dq_tile = dq_over_keys(
        dq_tile, q_tile, do_tile, lse_i, delta_i, k, v, b, g, left, right, low, high,
        S, scale, False, SOFTCAP, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    dq_tile = dq_over_keys(
        dq_tile, q_tile, do_tile, lse_i, delta_i, k, v, b, g, right, end, low, high,
        S, scale, True, SOFTCAP, BLOCK_N, K, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    store_rows(dq, dq_tile * scale, b, i0, h, T, BLOCK_M, K, BLOCK_K)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *masks
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) like q, k and v, from the gradient of `out` and what `forward` returned."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, out, dout = packed(q), packed(k), packed(v), packed(out), packed(dout)
    shared = shared_arguments(q, k, *masks)
    tma = shared["TMA"]
    delta = torch.empty_like(lse)
    with on_device(q):
        delta_kernel[(triton.cdiv(T, 64) * B * H,)](
            as_rows(out, 64, False), as_rows(dout, 64, False), delta, T, H,
            K=K, BLOCK_K=shared["BLOCK_K"], BLOCK_M=64,
        )  # fmt: skip
        M, N, warps, stages = tiles(q)[1]
        dkdv_kernel[(triton.cdiv(S, N) * B * G,)](
            as_rows(q, M, tma), as_rows(k, N, tma), as_rows(v, N, tma), as_rows(dout, M, tma), lse, delta,
            as_rows(dk, N, False), as_rows(dv, N, False),
            BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
        M, N, warps, stages = tiles(q)[2]
        dq_kernel[(triton.cdiv(T, M) * B * H,)](
            as_rows(q, M, tma), as_rows(k, N, tma), as_rows(v, N, tma), as_rows(dout, M, tma), lse, delta,
            as_rows(dq, M, False), BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
    return dq, dk, dv
