"""FlashAttention: exact attention that never stores the T x S scores. flash_backward.py is its gradient.

A program owns a tile of queries and goes through the tiles of keys that they see. A softmax needs the largest
score of its row before the first exponential. The *online* softmax keeps the largest score so far, m, and two
sums so far, l of the exponentials and acc of the values that they weight. Whenever a larger score appears, it
corrects both sums. The exponentials are in base 2, which the hardware computes, with
s_ij = scale log2(e) q_i . k_j:

    m'  = max(m, max_j s_ij)              p_ij = 2^(s_ij - m')
    l   = l 2^(m - m') + sum_j p_ij       acc  = acc 2^(m - m') + sum_j p_ij v_j

At the end out_i = acc / l, and lse_i = m + log2(l) is kept for the backward pass.

Every query sees an interval of keys, and many tiles of keys need no mask: flash_tiles.py explains which, and
has the parts that all kernels of attention share.

FlashAttention-2 (Dao 2023, algorithm 1); online softmax (Milakov and Gimelshein 2018). Memory: q is read
once, k and v once per tile of queries, mostly from the L2 cache; only out and lse are written, O(T).

Shapes: as in flash_tiles.py. A tile has BLOCK_M queries or BLOCK_N keys, of BLOCK_K columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import n_multiprocessors, on_device, tl, triton
from kernels.flash_tiles import (
    Bias,
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


class QueryTile(NamedTuple):
    """A tile of queries, and which tiles of keys it goes through."""

    i0: Any  # its first query
    b: Any  # its row
    h: Any  # its head
    n_keys: Any  # keys in the row
    p: Any  # (BLOCK_M,), the position of each query
    low: Any  # (BLOCK_M,), the first key that each query sees
    high: Any  # (BLOCK_M,), the key after the last that it sees
    begin: Any  # keys from begin to left, and from right to end, need a mask; those from left to right do not
    left: Any
    right: Any
    end: Any


class Keys(NamedTuple):
    """The keys and values of one head, and which of them each query of a tile sees."""

    k: Any
    v: Any
    n_keys: Any  # keys in the row
    b: Any  # the row
    g: Any  # the key/value head
    low: Any  # (BLOCK_M,), as in QueryTile, like the next two
    high: Any
    p: Any
    h: Any  # the head of the queries, or that of each of them
    bias: Any  # a Bias


@triton.jit
def middle(low_last, high_first, end, BLOCK: tl.constexpr):
    """Return (left, right): of the tiles of BLOCK keys up to `end`, those from left to right need no mask, as
    every query of a tile sees the keys from low_last to high_first. Likewise with keys and queries exchanged.
    """
    left = tl.minimum(tl.cdiv(low_last, BLOCK) * BLOCK, end)
    return left, tl.maximum(high_first // BLOCK * BLOCK, left)


@triton.jit
def query_tile(number, H, masks, const: tl.constexpr):
    """Return the QueryTile of this number."""
    # The last queries of a causal model see the most keys. Their programs start first, so that short ones are
    # left for the multiprocessors that become free near the end.
    n_tiles = tl.cdiv(masks.n_queries, const.BLOCK_M)
    i0 = (n_tiles - 1 - number % n_tiles) * const.BLOCK_M
    bh = number // n_tiles
    b, h = bh // H, bh % H
    n_keys, offset = keys_of_row(b, masks)

    # The intervals of all its queries; then those of the first and the last, which bound the loops over keys.
    i = tl.minimum(i0 + tl.arange(0, const.BLOCK_M), masks.n_queries - 1)
    i_last = tl.minimum(i0 + const.BLOCK_M, masks.n_queries) - 1
    low, high = keys_seen(i, offset, n_keys, masks, const)
    begin, full_end = keys_seen(i0, offset, n_keys, masks, const)
    full_begin, end = keys_seen(i_last, offset, n_keys, masks, const)
    left, right = middle(full_begin, full_end, end, const.BLOCK_N)
    begin = begin // const.BLOCK_N * const.BLOCK_N
    return QueryTile(i0, b, h, n_keys, i + offset, low, high, begin, left, right, end)


@triton.jit
def scores(qk, scale, SOFTCAP: tl.constexpr):
    """Return (s, c): s * c is the score in base 2, with log2(e) = 1.4427 as a part of c.

    They stay apart so that s * c minus the largest score is one instruction. With a soft-cap, s is the tanh,
    computed as tanh(u) = 2 sigmoid(2 u) - 1.
    """
    if SOFTCAP is None:
        s, c = qk, scale * 1.4426950408889634
    else:
        s, c = 2 * tl.sigmoid(qk * (scale * (2 / SOFTCAP))) - 1, SOFTCAP * 1.4426950408889634
    return s, c


@triton.jit
def load_keys(x, keys, start, INSIDE: tl.constexpr, const: tl.constexpr):
    """Return the keys or values from `start` on, (BLOCK_N, BLOCK_K), with zeros after the last key of the
    row: memory there may hold NaN, and a weight of 0 times NaN is NaN."""
    tile = load_rows(x, keys.b, start, keys.g, keys.n_keys, const.BLOCK_N, INSIDE, const)
    # TMA fills in zeros only after key S, not after the last key of a shorter row.
    if const.TMA and const.LENGTHS and not INSIDE:
        tile = tl.where(start + tl.arange(0, const.BLOCK_N)[:, None] < keys.n_keys, tile, 0.0)
    return tile


@triton.jit
def products(q, keys, start, INSIDE: tl.constexpr, const: tl.constexpr):
    """Return the products (BLOCK_M, BLOCK_N) of a tile of queries and the keys from `start` on."""
    k_tile = load_keys(keys.k, keys, start, INSIDE, const)
    return tl.dot(q, k_tile.T, input_precision=const.PRECISION)


@triton.jit
def attend(acc, m, l, q, keys, first, last, scale, MASKED: tl.constexpr, const: tl.constexpr):
    """Return acc, m and l of the online softmax, continued over the keys from `first` up to `last`."""
    if const.INTERLEAVED:
        ahead = products(q, keys, first, False, const)
    for start in tl.range(first, last, const.BLOCK_N, warp_specialize=const.SPECIALIZED):
        if const.INTERLEAVED:  # the product of the next tile does not wait for the exponentials of this one
            qk = ahead
            ahead = products(q, keys, start + const.BLOCK_N, False, const)
        else:
            qk = products(q, keys, start, not MASKED, const)
        if const.BIASED:
            distance = start + tl.arange(0, const.BLOCK_N)[None, :] - keys.p[:, None]
            s, c = with_bias(qk, distance, keys.h, keys.bias, scale)
        else:
            s, c = scores(qk, scale, const.SOFTCAP)
        if MASKED:
            j = start + tl.arange(0, const.BLOCK_N)[None, :]
            s = tl.where((j >= keys.low[:, None]) & (j < keys.high[:, None]), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * c)
        base = m_new
        if MASKED:
            base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen yet: -inf - -inf would be NaN
        p = tl.math.exp2(s * c - base[:, None])
        correction = tl.math.exp2(m - base)
        l = l * correction + tl.sum(p, 1)
        v_tile = load_keys(keys.v, keys, start, not MASKED, const)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None], input_precision=const.PRECISION)
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    q, k, v, out, lse, seqlens_k, doc_start, doc_end, T, S, H, window, scale, bias, reach, n_tiles,
    const: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of one tile of queries or, in a persistent program, of one after the other."""
    masks, bias = Masks(seqlens_k, doc_start, doc_end, T, S, window), Bias(bias, reach)
    if const.PERSISTENT:
        for number in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            forward_tile(number, q, k, v, out, lse, masks, H, scale, bias, const)
    else:
        forward_tile(tl.program_id(0), q, k, v, out, lse, masks, H, scale, bias, const)


@triton.jit
def forward_tile(number, q, k, v, out, lse, masks, H, scale, bias, const: tl.constexpr):
    """Compute out and lse of the tile of queries of this number."""
    BLOCK_M: tl.constexpr = const.BLOCK_M
    BLOCK_K: tl.constexpr = const.BLOCK_K
    T = masks.n_queries
    tile = query_tile(number, H, masks, const)
    q_tile = load_rows(q, tile.b, tile.i0, tile.h, T, BLOCK_M, False, const)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    g = tile.h // const.GROUP
    keys = Keys(k, v, tile.n_keys, tile.b, g, tile.low, tile.high, tile.p, tile.h, bias)

    # First the keys before those that all queries see, which there are only with a window or documents; then
    # those that all queries see; then the keys after them.
    if const.WINDOWED or masks.doc_start is not None:
        acc, m, l = attend(acc, m, l, q_tile, keys, tile.begin, tile.left, scale, True, const)
    acc, m, l = attend(acc, m, l, q_tile, keys, tile.left, tile.right, scale, False, const)
    acc, m, l = attend(acc, m, l, q_tile, keys, tile.right, tile.end, scale, True, const)

    # A query that sees no key has l = 0; its result is 0.
    seen = l > 0
    store_rows(out, acc / tl.where(seen, l, 1.0)[:, None], tile.b, tile.i0, tile.h, T, BLOCK_M, const)
    row = tile.i0 + tl.arange(0, BLOCK_M)
    value = tl.where(seen, m + tl.math.log2(tl.where(seen, l, 1.0)), 0.0)
    tl.store(lse + (tile.b * H + tile.h).to(tl.int64) * T + row, value, mask=row < T)


def forward(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of `kernels.attention`: out (B, T, H, K) like q, lse float32 (B, H, T) in base 2.

    options: causal, window, softcap, scale, cu_seqlens, seqlens_k, bias, as in `kernels.attention`.
    """
    B, T, H, K = q.shape
    out, lse = q.new_empty(B, T, H, K), q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.zero_()
    q, k, v = packed(q), packed(k), packed(v)
    shared, const = arguments(q, k, *options)
    config = tiles(q)[0]
    const, launch = configured(const, config)
    M, N, tma = const.BLOCK_M, const.BLOCK_N, const.TMA
    n_tiles = triton.cdiv(T, M) * B * H
    resident = config.persistent * n_multiprocessors(q.device)
    programs = min(n_tiles, resident) if config.persistent else n_tiles
    with on_device(q):
        forward_kernel[(programs,)](
            as_rows(q, M, tma), as_rows(k, N, tma), as_rows(v, N, tma), as_rows(out, M, False), lse,
            n_tiles=n_tiles, const=const, **launch, **shared,
        )  # fmt: skip
    return out, lse
