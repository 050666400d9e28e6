"""The gradient of attention over selected blocks, with the scores computed again tile by tile.

The equations are those of flash_backward.py. A row i is one head of one query; j are the keys, up to the
query's own position, of the blocks that it selected; lse_i is that of the forward pass:

    p_ij  = 2^(scale log2(e) q_i . k_j - lse_i)     delta_i = dout_i . out_i
    ds_ij = p_ij (dout_i . v_j - delta_i)
    dv_j  = sum_i p_ij dout_i             dk_j = scale sum_i ds_ij q_i            dq_i = scale sum_j ds_ij k_j

dq is computed for tiles of rows as in the forward pass of selected_blocks.py, by query or by block. By block,
a row gets a part of dq from each block that it selected, and the parts are added afterwards. dk and dv of a
block are sums over the queries that selected it, which are in the lists of block_lists.py. The lists differ
in length, since every query may select the first block. So a program sums over at most SEGMENT rows of a
list, and `sum_kernel` adds the sums of each block, in order. There are no atomic additions, so that every run
gives the same bits.

Shapes: as in selected_blocks.py; R parts of lists, each with a sum for dk and one for dv.
"""

import torch
from torch import Tensor

from kernels import configs
from kernels.backend import architecture, on_device, tl, triton
from kernels.block_lists import lists_of, segments
from kernels.flash_tiles import as_rows, packed
from kernels.selected_blocks import (
    Lists,
    Sizes,
    by_query,
    configured,
    gathered,
    keys_of_step,
    load_keys,
    load_queries,
    programs_of,
    shared_arguments,
    store_part,
    tile_of_program,
)

SEGMENT = 16384  # the most rows of a list that one program sums over


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, blocks, order, starts, owner, begin, seqlens_k, T, S, C, G, n_blocks,
    scale, const: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of rows or, by block, the part of dq that comes from one block."""
    BLOCK_M: tl.constexpr = const.BLOCK_M
    BLOCK_K: tl.constexpr = const.BLOCK_K
    sizes = Sizes(T, S, C, G, n_blocks, seqlens_k)
    tile, n_read = tile_of_program(Lists(order, starts, owner, begin), sizes, const)
    q_tile, do = load_queries(q, tile, const), load_queries(dout, tile, const)
    base = tl.load(lse + tile.row, mask=tile.exists, other=0.0)
    d = tl.load(delta + tile.row, mask=tile.exists, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(0, n_read * tl.cdiv(const.KEYS, const.BLOCK_N)):
        start, end = keys_of_step(step, tile, blocks, const)
        j = start + tl.arange(0, const.BLOCK_N)[None, :]
        k_tile = load_keys(k, tile.b, tile.g, start, end, const)
        v_tile = load_keys(v, tile.b, tile.g, start, end, const)
        # The scores are in base 2: the number is log2(e).
        s = tl.dot(q_tile, k_tile.T, input_precision=const.PRECISION) * (scale * 1.4426950408889634)
        seen = (j <= tile.p[:, None]) & (j < end)
        weights = tl.where(seen, tl.math.exp2(s - base[:, None]), 0.0)
        dp = tl.dot(do, v_tile.T, input_precision=const.PRECISION)
        ds = (weights * (dp - d[:, None])).to(k_tile.dtype)
        acc = tl.dot(ds, k_tile, acc, input_precision=const.PRECISION)
    store_part(dq, acc * scale, tile, const)


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, order, starts, owner, begin, seqlens_k, T, S, C, G, n_blocks, scale,
    LENGTH: tl.constexpr, const: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys, summed over one part of the list of its block.

    dk, dv: (R, N, K), the sums. LENGTH: the most entries of a part.
    """
    BLOCK_N: tl.constexpr = const.BLOCK_N
    BLOCK_K: tl.constexpr = const.BLOCK_K
    sizes = Sizes(T, S, C, G, n_blocks, seqlens_k)
    per_block: tl.constexpr = (const.KEYS + BLOCK_N - 1) // BLOCK_N
    segment, part = tl.program_id(0) // per_block, tl.program_id(0) % per_block
    number = tl.load(owner + segment)
    if number < 0:
        return
    first = tl.load(begin + segment)
    last = tl.minimum(first + LENGTH, tl.load(starts + number + 1))
    own = gathered(order, first, last, number, sizes, const)
    start = own.block * const.KEYS + part * BLOCK_N
    end = tl.minimum((own.block + 1) * const.KEYS, own.n_keys)
    k_tile = load_keys(k, own.b, own.g, start, end, const)
    v_tile = load_keys(v, own.b, own.g, start, end, const)
    j = start + tl.arange(0, BLOCK_N)[:, None]
    dk_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)

    # Scores (base 2) and weights are transposed here: a row is a key, a column a row of the tile of queries.
    for i in range(first, last, const.BLOCK_M // const.PAD):
        tile = gathered(order, i, last, number, sizes, const)
        q_tile, do = load_queries(q, tile, const), load_queries(dout, tile, const)
        base = tl.load(lse + tile.row, mask=tile.exists, other=0.0)
        d = tl.load(delta + tile.row, mask=tile.exists, other=0.0)
        s = tl.dot(k_tile, q_tile.T, input_precision=const.PRECISION) * (scale * 1.4426950408889634)
        seen = (j <= tile.p[None, :]) & (j < end)
        weights = tl.where(seen, tl.math.exp2(s - base[None, :]), 0.0)
        dv_tile = tl.dot(weights.to(do.dtype), do, dv_tile, input_precision=const.PRECISION)
        dp = tl.dot(v_tile, do.T, input_precision=const.PRECISION)
        ds = (weights * (dp - d[None, :])).to(q_tile.dtype)
        dk_tile = tl.dot(ds, q_tile, dk_tile, input_precision=const.PRECISION)

    row, column = part * BLOCK_N + tl.arange(0, BLOCK_N)[:, None], tl.arange(0, const.BLOCK_K)[None, :]
    at = (segment.to(tl.int64) * const.KEYS + row) * const.K + column
    mask = (row < const.KEYS) & (column < const.K)
    tl.store(dk + at, dk_tile * scale, mask=mask)
    tl.store(dv + at, dv_tile, mask=mask)


@triton.jit
def sum_kernel(sums, ends, dx, S, G, n_blocks, ROWS: tl.constexpr, const: tl.constexpr):
    """Write dx (B, S, G, K), which is dk or dv, of ROWS keys: the total of the sums (R, N, K) of their block.

    ends: from `segments`.
    """
    BLOCK_K: tl.constexpr = const.BLOCK_K
    per_block: tl.constexpr = (const.KEYS + ROWS - 1) // ROWS
    bg_block, part = tl.program_id(0) // per_block, tl.program_id(0) % per_block
    bg, block = bg_block // n_blocks, bg_block % n_blocks
    number = bg * (n_blocks + 1) + block  # of the list
    row, column = part * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, const.BLOCK_K)[None, :]
    mask = (row < const.KEYS) & (column < const.K)
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    first = tl.load(ends + number - 1, mask=number > 0, other=0)
    for i in range(0, tl.load(ends + number) - first):
        at = ((first.to(tl.int64) + i) * const.KEYS + row) * const.K + column
        total += tl.load(sums + at, mask=mask, other=0.0)
    j = block * const.KEYS + row
    at = ((bg // G).to(tl.int64) * S + j) * G + bg % G
    tl.store(dx + at * const.K + column, total.to(dx.dtype.element_ty), mask=mask & (j < S))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), like q, k and v, from the gradient of `out` and the results of `forward`.

    Those are out and lse (B, T, H), in base 2; the other arguments are those of `selected_blocks.forward`.
    """
    (S, G, K), h = k.shape[1:], q.shape[2] // blocks.shape[2]
    dout, q, k, v, direct = dout.contiguous(), q.contiguous(), packed(k), packed(v), by_query(q, blocks)
    blocks, sizes, common = shared_arguments(q, k, blocks, block_size, scale, seqlens_k)
    n_blocks, wide = sizes["n_blocks"], torch.float32
    delta = torch.einsum("bthk,bthk->bth", dout.to(wide), out.to(wide)).contiguous()
    _, for_dkdv, for_dq = configs.selected(architecture(q), K, q.element_size(), direct)
    with on_device(q):
        # By query dq is complete at once; by block the parts of all blocks are added.
        const, launch = configured(common, for_dq, direct)
        programs, walk = programs_of(blocks, G, n_blocks, const)
        dq = q.new_empty(q.shape) if direct else q.new_zeros(*blocks.shape, h, K, dtype=wide)
        keys = [as_rows(x, const.BLOCK_N, const.TMA) for x in (k, v)]
        dq_kernel[(programs,)](q, *keys, dout, lse, delta, dq, *walk, const=const, **launch, **sizes)
        dq = dq if direct else dq.sum(3).reshape(q.shape).to(q.dtype)

        # Sum over each part of the lists, then add the sums of each block.
        const, launch = configured(common, for_dkdv, False)
        length = max(1, SEGMENT // const.PAD)
        order, starts = lists_of(blocks, n_blocks, G)
        owner, begin, ends = segments(starts, n_blocks, len(order), length)
        keys = [as_rows(x, const.BLOCK_N, const.TMA) for x in (k, v)]
        sums = [q.new_empty(len(owner), block_size, K, dtype=wide) for _ in range(2)]
        dkdv_kernel[(len(owner) * triton.cdiv(block_size, const.BLOCK_N),)](
            q, *keys, dout, lse, delta, *sums, order, starts, owner, begin,
            LENGTH=length, const=const, **launch, **sizes,
        )  # fmt: skip
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        for x, dx in zip(sums, (dk, dv), strict=True):
            sum_kernel[(k.shape[0] * G * n_blocks * triton.cdiv(block_size, 16),)](
                x, ends, dx, S, G, n_blocks, ROWS=16, const=const
            )
    return dq, dk, dv
