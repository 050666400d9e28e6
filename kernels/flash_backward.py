"""FlashAttention backward: the gradients of q, k and v, with the scores computed again tile by tile.

With s_ij = scale log2(e) q_i . k_j and lse_i of the forward pass, p_ij = 2^(s_ij - lse_i) is the softmax
again. So the forward pass keeps only one number per query besides out. With delta_i = dout_i . out_i,

    ds_ij = p_ij (dout_i . v_j - delta_i)
    dv_j  = sum_i p_ij dout_i             dk_j = scale sum_i ds_ij q_i            dq_i = scale sum_j ds_ij k_j

For dk and dv a program owns a tile of keys and sums over the queries of all heads that share them; for dq
another program owns a tile of queries. Each sum has one owner, so nothing is atomic and every run gives the
same bits. The price is that scores and dout_i . v_j are computed twice: seven products of tiles, not five.

Which tiles are left out and which need no mask follows as in flash_tiles.py: the queries that see key j are
an interval too, and its ends grow with j.

FlashAttention-2 (Dao 2023, algorithm 2).

Shapes: as in flash_tiles.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import on_device, tl, triton
from kernels.flash_attention import Keys, load_keys, middle, query_tile, scores
from kernels.flash_tiles import (
    Bias,
    Constants,
    Masks,
    arguments,
    as_rows,
    configured,
    keys_of_row,
    keys_seen,
    load_rows,
    packed,
    store_rows,
    tiles,
    with_bias,
)


class KeyTile(NamedTuple):
    """A tile of keys and values, loaded."""

    k: Any  # (BLOCK_N, BLOCK_K)
    v: Any
    j0: Any  # its first key
    b: Any  # its row
    g: Any  # its key/value head
    offset: Any  # the position of the first query of the row
    n_keys: Any  # keys in the row


class Queries(NamedTuple):
    """The queries, and what the backward pass needs of each of them."""

    q: Any  # (B, T, H, K)
    dout: Any  # (B, T, H, K)
    lse: Any  # (B, H, T), from the forward pass
    delta: Any  # (B, H, T)
    H: Any
    bias: Any  # a Bias


@triton.jit
def queries_seeing(j, offset, masks, const: tl.constexpr):
    """Return the interval [first, last) of queries that see an existing key j: the inverse of `keys_seen`."""
    i = j - offset  # the query at the position of this key
    first, last = i * 0, i * 0 + masks.n_queries
    if const.CAUSAL:
        first = tl.maximum(i, 0)
    elif const.WINDOWED:
        first = tl.maximum(i - masks.window + 1, 0)
    if const.WINDOWED:
        last = tl.minimum(i + masks.window, masks.n_queries)
    if masks.doc_start is not None:
        first, last = (
            tl.maximum(first, tl.load(masks.doc_start + j)),
            tl.minimum(last, tl.load(masks.doc_end + j)),
        )
    return first, tl.maximum(last, 0)


@triton.jit
def delta_kernel(out, dout, delta, T, H, const: tl.constexpr):
    """Compute delta of one tile of queries."""
    n_tiles = tl.cdiv(T, const.BLOCK_M)
    i0, bh = tl.program_id(0) % n_tiles * const.BLOCK_M, tl.program_id(0) // n_tiles
    o = load_rows(out, bh // H, i0, bh % H, T, const.BLOCK_M, False, const).to(tl.float32)
    do = load_rows(dout, bh // H, i0, bh % H, T, const.BLOCK_M, False, const).to(tl.float32)
    row = i0 + tl.arange(0, const.BLOCK_M)
    tl.store(delta + bh.to(tl.int64) * T + row, tl.sum(o * do, 1), mask=row < T)


@triton.jit
def dkdv_over_queries(
    dk, dv, keys, queries, first, last, scale, masks, MASKED: tl.constexpr, const: tl.constexpr
):
    """Return dk and dv plus the terms of the queries from `first` up to `last`, of each head of the group.

    All tiles are transposed, keys by queries. A single loop over heads and queries keeps its loads in flight
    from one head to the next.
    """
    n = tl.maximum(tl.cdiv(last - first, const.BLOCK_M), 0)
    for step in range(0, n * const.GROUP):
        if const.GROUP == 1:
            h, start = keys.g, first + step * const.BLOCK_M
        else:
            h, start = keys.g * const.GROUP + step // n, first + step % n * const.BLOCK_M

        # The softmax again, from the scores and lse.
        i = start + tl.arange(0, const.BLOCK_M)
        row = (keys.b * queries.H + h).to(tl.int64) * masks.n_queries + i
        q = load_rows(queries.q, keys.b, start, h, masks.n_queries, const.BLOCK_M, not MASKED, const)
        do = load_rows(queries.dout, keys.b, start, h, masks.n_queries, const.BLOCK_M, not MASKED, const)
        # After the last query q and dout are zeros, so that with lse = 0 no term of p = 1 is left. But a bias
        # could make p infinite, and infinity times 0 is NaN: with lse = inf, p is 0.
        missing: tl.constexpr = float("inf") if const.BIASED else 0.0
        lse = tl.load(queries.lse + row, mask=i < masks.n_queries, other=missing)
        delta = tl.load(queries.delta + row, mask=i < masks.n_queries, other=0.0)
        qk = tl.dot(keys.k, q.T, input_precision=const.PRECISION)  # (BLOCK_N, BLOCK_M)
        if const.BIASED:
            distance = keys.j0 + tl.arange(0, const.BLOCK_N)[:, None] - (i + keys.offset)[None, :]
            s, c = with_bias(qk, distance, h, queries.bias, scale)
        else:
            s, c = scores(qk, scale, const.SOFTCAP)
        p = tl.math.exp2(s * c - lse[None, :])
        if MASKED:
            i = tl.minimum(i, masks.n_queries - 1)
            j = keys.j0 + tl.arange(0, const.BLOCK_N)[:, None]
            low, high = keys_seen(i, keys.offset, keys.n_keys, masks, const)
            p = tl.where((j >= low[None, :]) & (j < high[None, :]), p, 0.0)

        # The equations of the header; the derivative of a soft-cap is 1 - tanh^2.
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=const.PRECISION)
        dp = tl.dot(keys.v, do.T, input_precision=const.PRECISION)
        ds = p * (dp - delta[None, :])
        if const.SOFTCAP is not None:
            ds = ds * (1 - s * s)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=const.PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, seqlens_k, doc_start, doc_end, T, S, H, window, scale, bias, reach,
    const: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys."""
    BLOCK_N: tl.constexpr = const.BLOCK_N
    BLOCK_K: tl.constexpr = const.BLOCK_K
    masks = Masks(seqlens_k, doc_start, doc_end, T, S, window)

    # Most queries see the first keys of a causal model, so the programs of these keys start first.
    n_tiles = tl.cdiv(S, BLOCK_N)
    j0 = tl.program_id(0) % n_tiles * BLOCK_N
    bg = tl.program_id(0) // n_tiles
    G = H // const.GROUP
    b, g = bg // G, bg % G
    n_keys, offset = keys_of_row(b, masks)

    # The queries that see its first and its last key bound the loops; a tile after the last key has none.
    j_last = tl.minimum(j0 + BLOCK_N, n_keys) - 1
    begin, full_end = queries_seeing(j0, offset, masks, const)
    full_begin, end = queries_seeing(j_last, offset, masks, const)
    end, full_end = tl.where(j0 < n_keys, end, 0), tl.where(j0 < n_keys, full_end, 0)
    left, right = middle(full_begin, full_end, end, const.BLOCK_M)

    # The tile of keys stays loaded, and the queries pass: with a mask, without, and with a mask again. Memory
    # after the last key, which may hold NaN, reaches only its own rows of dk and dv.
    k_tile = load_rows(k, b, j0, g, S, BLOCK_N, False, const)
    v_tile = load_rows(v, b, j0, g, S, BLOCK_N, False, const)
    keys, queries = (
        KeyTile(k_tile, v_tile, j0, b, g, offset, n_keys),
        Queries(q, dout, lse, delta, H, Bias(bias, reach)),
    )
    dk_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if const.CAUSAL or const.WINDOWED or doc_start is not None:
        begin = begin // const.BLOCK_M * const.BLOCK_M
        dk_tile, dv_tile = dkdv_over_queries(
            dk_tile, dv_tile, keys, queries, begin, left, scale, masks, True, const
        )
    dk_tile, dv_tile = dkdv_over_queries(
        dk_tile, dv_tile, keys, queries, left, right, scale, masks, False, const
    )
    dk_tile, dv_tile = dkdv_over_queries(
        dk_tile, dv_tile, keys, queries, right, end, scale, masks, True, const
    )

    # A tile without a mask may reach over the last key of its row: the gradients there are zeros.
    if seqlens_k is not None:
        exists = (j0 + tl.arange(0, BLOCK_N) < n_keys)[:, None]
        dk_tile, dv_tile = tl.where(exists, dk_tile, 0.0), tl.where(exists, dv_tile, 0.0)
    store_rows(dk, dk_tile * scale, b, j0, g, S, BLOCK_N, const)
    store_rows(dv, dv_tile, b, j0, g, S, BLOCK_N, const)


@triton.jit
def dq_over_keys(dq, q, do, lse, delta, keys, first, last, scale, MASKED: tl.constexpr, const: tl.constexpr):
    """Return dq plus the terms of the keys from `first` up to `last`."""
    for start in range(first, last, const.BLOCK_N):
        k = load_keys(keys.k, keys, start, not MASKED, const)
        v = load_keys(keys.v, keys, start, not MASKED, const)
        qk = tl.dot(q, k.T, input_precision=const.PRECISION)
        if const.BIASED:
            distance = start + tl.arange(0, const.BLOCK_N)[None, :] - keys.p[:, None]
            s, c = with_bias(qk, distance, keys.h, keys.bias, scale)
        else:
            s, c = scores(qk, scale, const.SOFTCAP)
        p = tl.math.exp2(s * c - lse[:, None])
        if MASKED:
            j = start + tl.arange(0, const.BLOCK_N)[None, :]
            p = tl.where((j >= keys.low[:, None]) & (j < keys.high[:, None]), p, 0.0)
        dp = tl.dot(do, v.T, input_precision=const.PRECISION)
        ds = p * (dp - delta[:, None])
        if const.SOFTCAP is not None:
            ds = ds * (1 - s * s)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=const.PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, seqlens_k, doc_start, doc_end, T, S, H, window, scale, bias, reach,
    const: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of queries."""
    BLOCK_M: tl.constexpr = const.BLOCK_M
    BLOCK_K: tl.constexpr = const.BLOCK_K
    masks = Masks(seqlens_k, doc_start, doc_end, T, S, window)
    tile = query_tile(tl.program_id(0), H, masks, const)
    b, h = tile.b, tile.h
    q_tile = load_rows(q, b, tile.i0, h, T, BLOCK_M, False, const)
    do = load_rows(dout, b, tile.i0, h, T, BLOCK_M, False, const)
    row = (b * H + h).to(tl.int64) * T + tl.minimum(tile.i0 + tl.arange(0, BLOCK_M), T - 1)
    lse_i, delta_i = tl.load(lse + row), tl.load(delta + row)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    g = h // const.GROUP
    keys = Keys(k, v, tile.n_keys, b, g, tile.low, tile.high, tile.p, h, Bias(bias, reach))

    # As in the forward pass: keys with a mask, without, and with a mask again.
    if const.WINDOWED or doc_start is not None:
        dq_tile = dq_over_keys(
            dq_tile, q_tile, do, lse_i, delta_i, keys, tile.begin, tile.left, scale, True, const
        )
    dq_tile = dq_over_keys(
        dq_tile, q_tile, do, lse_i, delta_i, keys, tile.left, tile.right, scale, False, const
    )
    dq_tile = dq_over_keys(
        dq_tile, q_tile, do, lse_i, delta_i, keys, tile.right, tile.end, scale, True, const
    )
    store_rows(dq, dq_tile * scale, b, tile.i0, h, T, BLOCK_M, const)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), like q, k and v, from the gradient of `out` and the results of `forward`.

    options: those of `forward`.
    """
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    # delta first, which both other kernels read; then dk and dv; then dq.
    q, k, v, out, dout = packed(q), packed(k), packed(v), packed(out), packed(dout)
    shared, common = arguments(q, k, *options)
    _, for_dkdv, for_dq = tiles(q)
    delta = torch.empty_like(lse)
    with on_device(q):
        delta_kernel[(triton.cdiv(T, 64) * B * H,)](
            as_rows(out, 64, False), as_rows(dout, 64, False), delta, T, H,
            const=Constants(K, common.BLOCK_K, BLOCK_M=64),
        )  # fmt: skip
        const, launch = configured(common, for_dkdv)
        M, N, tma = const.BLOCK_M, const.BLOCK_N, const.TMA
        dkdv_kernel[(triton.cdiv(S, N) * B * G,)](
            as_rows(q, M, tma), as_rows(k, N, tma), as_rows(v, N, tma), as_rows(dout, M, tma), lse, delta,
            as_rows(dk, N, False), as_rows(dv, N, False),
            const=const, **launch, **shared,
        )  # fmt: skip
        const, launch = configured(common, for_dq)
        M, N, tma = const.BLOCK_M, const.BLOCK_N, const.TMA
        dq_kernel[(triton.cdiv(T, M) * B * H,)](
            as_rows(q, M, tma), as_rows(k, N, tma), as_rows(v, N, tma), as_rows(dout, M, tma), lse, delta,
            as_rows(dq, M, False),
            const=const, **launch, **shared,
        )  # fmt: skip
    return dq, dk, dv
