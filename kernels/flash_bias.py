"""The gradient of attention's bias: the sums of ds along the diagonals of the scores.

The bias of query i and key j depends on their distance r = j - p_i alone, so with ds of flash_backward.py

    dbias[h, R + r] = sum of ds_ij over all rows and all i, j with j - p_i = r         -R < r < R

and the two ends, r = -R and R, also take all larger distances. A program owns a tile of queries, goes through
the tiles of keys, computes ds again, and adds up the diagonals of each tile. A tile of n queries and n keys
has 2 n - 1 diagonals. With row i rotated by i to the left, each diagonal is part of a column:

        a b c d           a b c d           unmarked: the diagonals 0 to n - 1
        e f g h           f g h e*          marked: the diagonals -n to -1, whose other part is in the tile of
        i j k l           k l i*j*          keys before this one
        m n o p           p m*n*o*

So every diagonal is complete after two tiles, and is stored once, to a vector that belongs to this program.
The sum of these vectors is the gradient: nothing is atomic, and every run gives the same bits. The price is
that the scores are computed once more, two products of tiles. Memory: one vector of 2 R + 1 numbers per tile
of queries.

Shapes: as in flash_tiles.py, and R the largest distance of the bias.
"""

import torch
from torch import Tensor

from kernels.backend import on_device, tl, triton
from kernels.flash_attention import Keys, load_keys, query_tile
from kernels.flash_tiles import (
    Bias,
    Masks,
    arguments,
    as_rows,
    configured,
    load_rows,
    packed,
    tiles,
    with_bias,
)


@triton.jit
def diagonals(ds, N: tl.constexpr):
    """Return (lower, upper), (N,) each: sums along the diagonals -N to -1 and 0 to N - 1 of ds (N, N)."""
    column = tl.arange(0, N)[:, None] + tl.arange(0, N)[None, :]
    rotated = tl.gather(ds, column % N, 1)
    return tl.sum(tl.where(column < N, 0.0, rotated), 0), tl.sum(tl.where(column < N, rotated, 0.0), 0)


@triton.jit
def keep(values, r, part, left, right, reach):
    """Store the values (N,) of the distances r to part. Return left and right, the sums of its two ends, plus
    the values from -reach down and from reach up."""
    tl.store(part + reach + r, values, mask=(r > -reach) & (r < reach))
    left += tl.sum(tl.where(r <= -reach, values, 0.0), 0)
    right += tl.sum(tl.where(r >= reach, values, 0.0), 0)
    return left, right


@triton.jit
def score_gradient(q, do, lse, delta, keys, start, scale, const: tl.constexpr):
    """Return ds (BLOCK_M, BLOCK_N) of a tile of queries and the keys from `start` on."""
    j = start + tl.arange(0, const.BLOCK_N)[None, :]
    k = load_keys(keys.k, keys, start, False, const)
    v = load_keys(keys.v, keys, start, False, const)
    qk = tl.dot(q, k.T, input_precision=const.PRECISION)
    s, c = with_bias(qk, j - keys.p[:, None], keys.h, keys.bias, scale)
    p = tl.math.exp2(s * c - lse[:, None])
    p = tl.where((j >= keys.low[:, None]) & (j < keys.high[:, None]), p, 0.0)
    dp = tl.dot(do, v.T, input_precision=const.PRECISION)
    return p * (dp - delta[:, None])


@triton.jit
def dbias_kernel(
    q, k, v, out, dout, lse, parts, seqlens_k, doc_start, doc_end, T, S, H, window, scale, bias, reach,
    const: tl.constexpr,
):  # fmt: skip
    """Compute the part (2 R + 1,) of one tile of queries."""
    N: tl.constexpr = const.BLOCK_N
    masks = Masks(seqlens_k, doc_start, doc_end, T, S, window)
    tile = query_tile(tl.program_id(0), H, masks, const)
    part = parts + tl.program_id(0).to(tl.int64) * (2 * reach + 1)
    keys = Keys(
        k, v, tile.n_keys, tile.b, tile.h // const.GROUP, tile.low, tile.high, tile.p, tile.h,
        Bias(bias, reach),
    )  # fmt: skip

    # Load the queries, and what the backward pass needs of each. With lse = inf, rows after the last query
    # have p = 0.
    q_tile = load_rows(q, tile.b, tile.i0, tile.h, T, N, False, const)
    do = load_rows(dout, tile.b, tile.i0, tile.h, T, N, False, const)
    o = load_rows(out, tile.b, tile.i0, tile.h, T, N, False, const)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i = tile.i0 + tl.arange(0, N)
    lse_i = tl.load(lse + (tile.b * H + tile.h).to(tl.int64) * T + i, mask=i < T, other=float("inf"))

    # Go through the keys. `waiting`: the diagonals that the next tile completes, from the distance r on.
    p0 = tl.min(tile.p, 0)
    waiting, left, right = tl.zeros((N,), tl.float32), 0.0, 0.0
    r = tile.begin - p0 - N + tl.arange(0, N)
    for start in range(tile.begin, tile.end, N):
        ds = score_gradient(q_tile, do, lse_i, delta, keys, start, scale, const)
        lower, upper = diagonals(ds, N)
        left, right = keep(waiting + lower, r, part, left, right, reach)
        waiting, r = upper, r + N
    left, right = keep(waiting, r, part, left, right, reach)
    tl.store(part, left)
    tl.store(part + 2 * reach, right)


def gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options) -> Tensor:
    """Return the gradient of the bias, float32 (H, 2 R + 1), from that of `out` and the results of `forward`.

    options: those of `flash_attention.forward`, whose last is the bias.
    """
    (B, T, H, _), bias = q.shape, options[-1]
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(bias, dtype=torch.float32)
    q, k, v, out, dout = packed(q), packed(k), packed(v), packed(out), packed(dout)
    shared, const = arguments(q, k, *options)

    # Tiles are square, as the diagonals need it, and small enough for four warps.
    dq = tiles(q)[2]
    n = min(dq.queries, dq.keys)
    const, launch = configured(const, dq._replace(queries=n, keys=n, warps=4))
    n_tiles = triton.cdiv(T, n)
    parts = q.new_zeros(B, H, n_tiles, bias.shape[1], dtype=torch.float32)
    with on_device(q):
        dbias_kernel[(n_tiles * B * H,)](
            *(as_rows(x, n, const.TMA) for x in (q, k, v, out, dout)), lse, parts,
            const=const, **launch, **shared,
        )  # fmt: skip
    return parts.sum((0, 2))
